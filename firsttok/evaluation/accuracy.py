"""Efficacy, generalization and locality as "The Fall of ROME" reports them (Tables 4 and 5)."""

from dataclasses import dataclass

from firsttok.data import Fact
from firsttok.editing import RankOneEdit
from firsttok.evaluation.targets import score_targets
from firsttok.models import Model
from firsttok.prompts import fact_prompt, text_prompt, with_target

__all__ = ["Accuracy", "edit_accuracy"]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Teacher-forced argmax accuracies of one edit; None where the fact has no such prompt."""

    efficacy: float
    """Share of the new target's tokens predicted behind the rewriting prompt."""
    generalization: float | None
    """The same behind the first paraphrase."""
    locality: float | None
    """Share of tokens at the first neighbour's answer whose argmax the edit did not change."""


def edit_accuracy(model: Model, fact: Fact, edit: RankOneEdit, *, context: str = "{}") -> Accuracy:
    """Measure one edit.

    Args:
        model: The model, unedited.
        fact: The fact the edit wrote.
        edit: The edit.
        context: Put before the rewriting prompt only, as in Table 5; ``"{}"`` for Table 4.
    """
    prompts = [with_target(model, fact_prompt(model, fact, context), fact.target_new)]
    if fact.paraphrases:
        paraphrase = text_prompt(model, fact.paraphrases[0])
        prompts.append(with_target(model, paraphrase, fact.target_new))
    neighbours = [
        with_target(model, text_prompt(model, text), fact.target_true)
        for text in fact.neighbours[:1]
    ]
    before = score_targets(model, neighbours)
    with edit.applied(model):
        after = score_targets(model, [*prompts, *neighbours])
    locality = None
    if neighbours:
        pairs = zip(before[0].predicted_ids, after[-1].predicted_ids, strict=True)
        locality = sum(a == b for a, b in pairs) / len(before[0].predicted_ids)
    return Accuracy(
        efficacy=after[0].accuracy,
        generalization=after[1].accuracy if fact.paraphrases else None,
        locality=locality,
    )
