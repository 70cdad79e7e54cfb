"""Texts that MEND is trained on, each run once up to the edited layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from firsttok.data import Fact, find_corpus
from firsttok.editing.mend import edit_labels
from firsttok.editing.mend_edits import mend_edits
from firsttok.editing.mend_plan import MendPlan
from firsttok.engine.tail import Replay, Tail
from firsttok.errors import BadInputError
from firsttok.models import Model, capture_tail
from firsttok.prompts import Prompt, batches, pad, text_prompt
from firsttok.tensors import TokenBatch

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["EditPair", "ReadyText", "TrainingTexts", "prepare_training"]

_WINDOW = 24
"""Tokens of a text that is to stay as it was."""
_READ = 8
"""At how many of its last tokens the divergence is measured."""
_CAPTURED = 2048
"""Tokens of a batch that is run once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadyText:
    """One text with what is below the edited blocks run, and the places that are read."""

    tail: Tail
    """The pass from the first edited block on."""
    where: Bool[Tensor, "1 token"]
    """What is read: the predictions of the labels, or some of the last ones."""
    labels: Int[Tensor, "label"]
    """What these are to be; none of a text that is to stay as it was."""

    def logits(self, bridge: Any) -> Float[Tensor, "read vocab"]:
        """The predictions that are read, with what hooks on the bridge make of them."""
        return self.tail.logits(bridge, self.where)


@dataclass(frozen=True, kw_only=True, eq=False)
class EditPair:
    """An edit, and where its success is read."""

    edit: ReadyText
    """The target after the prompt, of which the edit is made."""
    rephrase: ReadyText
    """The target after a rephrase of the prompt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingTexts:
    """All that a training reads."""

    training: tuple[EditPair, ...]
    """Edits to train on."""
    validation: tuple[EditPair, ...]
    """Edits to stop by, of other subjects."""
    text: tuple[ReadyText, ...]
    """Windows of text that is to stay as it was."""
    validation_text: tuple[ReadyText, ...]
    """Others, one for each edit to stop by."""


def prepare_training(model: Model, plan: MendPlan, first: int, bar: "Progress") -> TrainingTexts:
    """Draw edits and windows, and run them up to the first edited layer.

    Args:
        model: The model, with its edits in the weights meanwhile.
        plan: How many there are to be, and their seed.
        first: The lowest edited layer, at least 1.
        bar: Where to show progress.

    Raises:
        BadInputError: If there are not so many.
    """
    windows = _windows(model, plan)
    examples = mend_edits(model, plan.edits, plan.validation, seed=plan.seed)
    facts = [*examples.training, *examples.validation]
    texts = [
        *(edit_labels(model, fact) for fact in facts),
        *(edit_labels(model, _rephrased(fact)) for fact in facts),
        *((window, []) for window in windows),
    ]
    ready = _run_below(model, texts, first - 1, bar)
    count, held_out = len(facts), len(examples.training)
    pairs = [
        EditPair(edit=edit, rephrase=rephrase)
        for edit, rephrase in zip(ready[:count], ready[count : 2 * count], strict=True)
    ]
    rest = ready[2 * count :]
    return TrainingTexts(
        training=tuple(pairs[:held_out]),
        validation=tuple(pairs[held_out:]),
        text=tuple(rest[: -plan.validation]),
        validation_text=tuple(rest[-plan.validation :]),
    )


def _rephrased(fact: Fact) -> Fact:
    return replace(fact, template=fact.paraphrases[0].replace(fact.subject, "{}", 1))


def _windows(model: Model, plan: MendPlan) -> list[Prompt]:
    """Windows of the shipped corpus, those of the validation last."""
    found: list[Prompt] = []
    lead = list(model.leading_ids)
    for document in find_corpus("sampled").documents:
        ids = list(text_prompt(model, document).token_ids)[len(lead) :]
        for start in range(0, len(ids) - _WINDOW + 1, _WINDOW):
            window = (*lead, *ids[start : start + _WINDOW])
            found.append(Prompt(text=document[:40], token_ids=window))
    wanted = plan.texts + plan.validation
    if wanted > len(found):
        raise BadInputError(
            f"the shipped text has {len(found)} windows, and {wanted} are asked for, with those of "
            "the validation; ask for fewer"
        )
    random = Random(f"text {plan.seed}")  # noqa: S311
    return random.sample(found, wanted)


def _run_below(
    model: Model, texts: Sequence[tuple[Prompt, list[int]]], layer: int, bar: "Progress"
) -> list[ReadyText]:
    """Run all texts up to a layer, those of one length together, so that nothing is padded."""
    lengths: dict[int, list[int]] = {}
    for index, (prompt, _) in enumerate(texts):
        lengths.setdefault(len(prompt.token_ids), []).append(index)
    task = bar.add_task("running what is below", total=len(texts))
    found: dict[int, ReadyText] = {}
    for same in lengths.values():
        for group in batches([texts[i][0] for i in same], max_tokens=_CAPTURED):
            chosen = [same[place] for place in group]
            batch = pad(model, [texts[i][0] for i in chosen])
            tail = capture_tail(model, batch, layer=layer, replay=Replay.ABOVE)
            for row, index in enumerate(chosen):
                found[index] = _text(tail.rows(torch.tensor([row])), texts[index][1])
            bar.advance(task, len(chosen))
    bar.remove_task(task)
    return [found[index] for index in range(len(texts))]


def _text(tail: Tail, labels: list[int]) -> ReadyText:
    batch: TokenBatch = tail.batch
    where = torch.zeros_like(batch.tokens, dtype=torch.bool)
    where[:, -(len(labels) or _READ) :] = True
    # The keys are not needed, and the rows of a batch are views of it, which would keep all of it.
    tail = replace(tail, residual=tail.residual.clone(), keys=tail.keys[..., :0])
    return ReadyText(
        tail=tail, where=where, labels=torch.tensor(labels, dtype=torch.long, device=batch.device)
    )
