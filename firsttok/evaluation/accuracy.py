"""Efficacy, generalization and locality as "The Fall of ROME" reports them (Tables 4 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.editing import Edit
from firsttok.evaluation.targets import TargetScore, score_edits
from firsttok.models import Model
from firsttok.prompts import fact_prompt, text_prompt, with_target

__all__ = ["Accuracy", "edit_accuracies", "edit_accuracy"]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Teacher-forced argmax accuracies of one edit; None where the fact has no such prompt."""

    efficacy: float
    """Share of the new target's tokens predicted after the rewriting prompt."""
    generalization: float | None
    """The same after the first paraphrase."""
    locality: float | None
    """Share of tokens at the first neighbour's answer whose argmax the edit did not change; the
    first whose answer is known."""


@taken
def edit_accuracy(model: Model, fact: Fact, edit: Edit, *, context: str = "{}") -> Accuracy:
    """Measure one edit: efficacy, generalization and locality of Section 4.

    Args:
        model: The model, unedited.
        fact: The fact the edit wrote.
        edit: The edit.
        context: Put before the rewriting prompt only, as in Table 5; ``"{}"`` for Table 4.

    Raises:
        EditMismatchError: If the edit was made for another model.
    """
    return edit_accuracies(model, fact, [edit], context=context)[0]


@taken
def edit_accuracies(
    model: Model, fact: Fact, edits: Sequence[Edit], *, context: str = "{}"
) -> list[Accuracy]:
    """As :func:`edit_accuracy`, for several edits, which share their passes where they can.

    See :func:`~firsttok.evaluation.score_edits`.

    Args:
        model: The model, unedited.
        fact: The fact the edits wrote.
        edits: The edits.
        context: As for :func:`edit_accuracy`.

    Raises:
        EditMismatchError: If an edit was made for another model.
    """
    prompt = fact_prompt(model, fact, context)
    prompts = [with_target(model, prompt, fact.target_new, join=fact.join)]
    if fact.paraphrases:
        paraphrase = text_prompt(model, fact.paraphrases[0])
        prompts.append(with_target(model, paraphrase, fact.target_new, join=fact.join))
    prompts += [
        with_target(model, text_prompt(model, text), answer, join=fact.join)
        for text, answer in fact.answered_neighbours[:1]
    ]
    before, *after = score_edits(model, prompts, edits)
    return [_accuracy(fact, before, scores) for scores in after]


def _accuracy(fact: Fact, before: Sequence[TargetScore], after: Sequence[TargetScore]) -> Accuracy:
    locality = None
    if fact.answered_neighbours:
        pairs = zip(before[-1].predicted_ids, after[-1].predicted_ids, strict=True)
        locality = sum(a == b for a, b in pairs) / len(before[-1].predicted_ids)
    return Accuracy(
        efficacy=after[0].accuracy,
        generalization=after[1].accuracy if fact.paraphrases else None,
        locality=locality,
    )
