"""How a model scores given targets behind given prompts, teacher-forced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import Edit
from firsttok.models import Model, capture_tail, logits
from firsttok.prompts import Prompt, batches, fact_prompt, pad, with_target
from firsttok.tensors import TokenBatch, TokenMask

__all__ = [
    "TargetScore",
    "score_edits",
    "score_targets",
    "target_probabilities",
]

_MAX_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """One target behind one prompt."""

    nll: float
    """Mean NLL of the target's tokens, in nats."""
    target_ids: tuple[int, ...]
    """The target's tokens."""
    predicted_ids: tuple[int, ...]
    """The argmax at each of the target's places, all earlier target tokens given."""

    @property
    def probability(self) -> float:
        """exp(-nll): the geometric mean of the target tokens' probabilities."""
        return math.exp(-self.nll)

    @property
    def accuracy(self) -> float:
        """Share of the target's tokens that are the argmax (note 16)."""
        hits = sum(a == b for a, b in zip(self.target_ids, self.predicted_ids, strict=True))
        return hits / len(self.target_ids)


@taken
def score_targets(model: Model, prompts: Sequence[Prompt]) -> list[TargetScore]:
    """Score prompts that end in a target (see :func:`firsttok.prompts.with_target`)."""
    scores: dict[int, TargetScore] = {}
    for group in batches(prompts, max_tokens=_MAX_TOKENS):
        chosen = [prompts[i] for i in group]
        batch = pad(model, chosen)
        found = _scores(model, chosen, logits(model, batch)[_places(batch, chosen)])
        scores |= dict(zip(group, found, strict=True))
    return [scores[index] for index in range(len(prompts))]


@taken
@torch.no_grad()
def score_edits(
    model: Model, prompts: Sequence[Prompt], edits: Sequence[Edit]
) -> list[list[TargetScore]]:
    """Score prompts that end in a target on the model as it is, then under each edit alone.

    Edits of one layer's output share a pass up to that layer, in which no weight is touched (see
    :meth:`~firsttok.evaluation.PreparedTexts.measure_edits`); any other one is put into the weights
    for a pass of its own.

    Args:
        model: The model, unedited.
        prompts: The prompts.
        edits: Edits.

    Returns:
        The prompts' scores without any edit, then under each of them, in order.

    Raises:
        EditMismatchError: If an edit was made for another model.
    """
    together: dict[int, list[int]] = {}
    for index, edit in enumerate(edits):
        edit.check(model)
        if edit.output_layer is not None:
            together.setdefault(edit.output_layer, []).append(index)
    found: dict[int, list[TargetScore]] = {}
    before: list[TargetScore] | None = None
    for layer, indices in together.items():
        before, *after = _score_by_tail(model, prompts, [edits[i] for i in indices], layer)
        found |= dict(zip(indices, after, strict=True))
    for index, edit in enumerate(edits):
        if index not in found:
            found[index] = score_targets(model.edited(edit), prompts)
    if before is None:
        before = score_targets(model, prompts)
    return [before, *(found[index] for index in range(len(edits)))]


def _score_by_tail(
    model: Model, prompts: Sequence[Prompt], edits: Sequence[Edit], layer: int
) -> list[list[TargetScore]]:
    """Without any edit, then under each of some that change one layer's output alone."""
    count = 1 + len(edits)
    scores: list[dict[int, TargetScore]] = [{} for _ in range(count)]
    for group in batches(prompts, max_tokens=_MAX_TOKENS // count):
        chosen = [prompts[i] for i in group]
        batch = pad(model, chosen)
        tail = capture_tail(model, batch, layer=layer)
        changes = [torch.zeros_like(tail.residual)]
        changes += [edit.delta.change(tail.keys) for edit in edits]
        rows = torch.arange(len(chosen), device=model.device).repeat(count)
        where = _places(batch, chosen).repeat(count, 1)
        with model.running() as bridge:
            there = tail.rows(rows).logits(bridge, where, torch.cat(changes))
        found = _scores(model, chosen * count, there)
        for number, each in enumerate(scores):
            start = number * len(chosen)
            each |= dict(zip(group, found[start : start + len(chosen)], strict=True))
    return [[each[index] for index in range(len(prompts))] for each in scores]


def _places(batch: TokenBatch, prompts: Sequence[Prompt]) -> TokenMask:
    """Where a right-padded batch predicts the tokens of its prompts' targets."""
    where = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        end = len(prompt.token_ids) - 1
        where[row, end - prompt.target_length : end] = True
    return where


def _scores(
    model: Model, prompts: Sequence[Prompt], logits_there: Float[Tensor, "place vocab"]
) -> list[TargetScore]:
    """Score prompts by the logits at their targets' places, in row-major order."""
    chosen = logits_there.to(model.wide_dtype)
    labels = torch.tensor([i for prompt in prompts for i in prompt.target_ids])
    nll = torch.nn.functional.cross_entropy(chosen, labels.to(chosen.device), reduction="none")
    lengths = [prompt.target_length for prompt in prompts]
    pieces = zip(prompts, nll.split(lengths), chosen.argmax(-1).split(lengths), strict=True)
    return [
        TargetScore(
            nll=float(loss.double().mean()),
            target_ids=prompt.target_ids,
            predicted_ids=tuple(predicted.tolist()),
        )
        for prompt, loss, predicted in pieces
    ]


@taken
def target_probabilities(
    model: Model, fact: Fact, contexts: ContextSet, *, target: str | None = None
) -> list[float]:
    """Probability of a fact's target behind its prompt in each context, in their order.

    Args:
        model: The model, possibly with an edit applied.
        fact: The fact.
        contexts: Contexts put before the prompt; ``"{}"`` is the bare prompt.
        target: The target; None for the fact's new one.
    """
    wanted = fact.target_new if target is None else target
    prompts = [
        with_target(model, fact_prompt(model, fact, template), wanted, join=fact.join)
        for template in contexts.templates
    ]
    return [score.probability for score in score_targets(model, prompts)]
