"""How a model scores given targets after given prompts, teacher-forced."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
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
    """One target after one prompt."""

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
    for part in _batches(model, prompts, most=_MAX_TOKENS, shared=False):
        found = logits(model, part.batch)[part.where]
        scores.update(zip(part.numbers, _scores(model, part, found), strict=True))
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
    shared = model.runs_packed and not model.interventions
    for part in _batches(model, prompts, most=_MAX_TOKENS // count, shared=shared):
        tail = capture_tail(model, part.batch, layer=layer)
        changes = [torch.zeros_like(tail.residual)]
        changes += [edit.delta.change(tail.keys) for edit in edits]
        rows = torch.arange(len(part.where), device=model.device).repeat(count)
        where = part.where.repeat(count, 1)
        with model.running() as bridge:
            there = tail.rows(rows).logits(bridge, where, torch.cat(changes))
        for each, own in zip(scores, there.chunk(count), strict=True):
            each.update(zip(part.numbers, _scores(model, part, own), strict=True))
    return [[each[index] for index in range(len(prompts))] for each in scores]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Some prompts in one batch; a row holds those that are equal up to their targets."""

    numbers: tuple[int, ...]
    """Which prompts these are."""
    prompts: tuple[Prompt, ...]
    batch: TokenBatch
    where: TokenMask
    """Columns that predict a token of a target."""
    places: Int[Tensor, "target"]
    """Of every target's every token, which of these columns it is predicted in."""


def _batches(
    model: Model, prompts: Sequence[Prompt], *, most: int, shared: bool
) -> Iterator[_Part]:
    """Batches of prompts; a target's last token, after which nothing is read, is not run.

    Args:
        model: The model.
        prompts: Prompts that end in a target.
        most: Most tokens of a batch of several rows.
        shared: Run what stands before several targets once. Each target then sees that and its own
            tokens, at the places that they have alone.
    """
    rows: list[list[int]] = []
    longest = min(model.max_tokens, model.attention_window or model.max_tokens)
    last: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        context = prompt.token_ids[: len(prompt.token_ids) - prompt.target_length]
        row = last.get(context)
        together = sum(prompts[i].target_length - 1 for i in (*(row or ()), number))
        if row is None or not shared or len(context) + together > longest:
            rows.append([])
            last[context] = row = rows[-1]
        row.append(number)
    # A mask that is given takes the place of the model's own, with its window.
    for alone in (True, False):
        chosen = [row for row in rows if (len(row) == 1) is alone]
        joined = [_joined([prompts[number] for number in row]) for row in chosen]
        for group in batches(joined, max_tokens=most):
            yield _part(model, prompts, [chosen[i] for i in group], [joined[i] for i in group])


def _joined(prompts: Sequence[Prompt]) -> Prompt:
    first = prompts[0]
    context = first.token_ids[: len(first.token_ids) - first.target_length]
    targets = (token for prompt in prompts for token in prompt.target_ids[:-1])
    return Prompt(text=first.text, token_ids=(*context, *targets))


def _part(
    model: Model, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], joined: Sequence[Prompt]
) -> _Part:
    batch = pad(model, joined)
    position_ids = batch.position_ids.clone()
    # Which target a column is of; 0 before all of them.
    owner = torch.zeros_like(batch.tokens)
    where = torch.zeros_like(batch.tokens, dtype=torch.bool)
    columns: list[tuple[int, int]] = []
    for row, numbers in enumerate(rows):
        length = prompts[numbers[0]].target_length
        context = len(prompts[numbers[0]].token_ids) - length
        start = context
        for count, number in enumerate(numbers, 1):
            own = prompts[number].target_length - 1
            columns += [(row, context - 1), *((row, start + i) for i in range(own))]
            owner[row, start : start + own] = count
            position_ids[row, start : start + own] = batch.position_ids[
                row, context : context + own
            ]
            start += own
        where[row, context - 1 : start] = True
    if any(len(numbers) > 1 for numbers in rows):
        own_or_before = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
        visible = batch.causally_visible() & own_or_before
        batch = replace(batch, position_ids=position_ids, visible=visible)
    numbered = where.flatten().cumsum(0).view_as(where) - 1
    flat = [number for numbers in rows for number in numbers]
    return _Part(
        numbers=tuple(flat),
        prompts=tuple(prompts[number] for number in flat),
        batch=batch,
        where=where,
        places=torch.stack([numbered[row, column] for row, column in columns]),
    )


def _scores(
    model: Model, part: _Part, logits_there: Float[Tensor, "place vocab"]
) -> list[TargetScore]:
    """Score prompts by the logits at the places that predict their targets."""
    chosen = logits_there.to(model.wide_dtype)
    labels = torch.tensor([i for prompt in part.prompts for i in prompt.target_ids])
    labels = labels.to(chosen.device)
    said = chosen[part.places, labels]
    nll = chosen.logsumexp(-1)[part.places] - said
    lengths = [prompt.target_length for prompt in part.prompts]
    best = chosen.argmax(-1)[part.places]
    pieces = zip(part.prompts, nll.split(lengths), best.split(lengths), strict=True)
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
    """Probability of a fact's target after its prompt in each context, in their order.

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
