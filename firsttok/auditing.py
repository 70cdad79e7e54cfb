"""What somebody's edit did: where two states of a model differ, of which rank, and at what cost.

Whatever tool made it, an edit is a difference of weights. Of each changed MLP matrix its singular
values are told, and how much of the difference the first token's key meets beside those of all
later tokens: a difference that the later ones meet moves every residual stream, which is how a
rank-one edit collapses a model.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from firsttok.arguments import taken
from firsttok.console import own_bar
from firsttok.data import builtin_sentences
from firsttok.display import Note, Panel, Shown, Table
from firsttok.editing import Edit
from firsttok.errors import BadInputError
from firsttok.evaluation import Perplexity, perplexity
from firsttok.exploration import verdict
from firsttok.models import BosPolicy, Model, Place, capture, checkpoint_of
from firsttok.prompts import batches, pad, text_prompt

__all__ = ["MOVED", "Audit", "ChangedWeight", "Overlap", "audit"]

MOVED = 0.5
"""A collapse is predicted where later tokens' residual streams move by this share of their norm.

On SmolLM2-135M at layer 15, with C = I, five edits by ROME that collapsed it moved them by 1.9 or
more, and fifteen others by ROME and C-ROME by 0.15 or less.
"""
_SINGULAR = 8
"""Singular values that are shown."""
_MAX_TOKENS = 1024
_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How far a difference of an MLP's last matrix reaches, over the tokens of some sentences."""

    first_cosine: float
    """Mean ``|u . k| / ||k||`` of first tokens' keys with the first left singular vector; ``later``
    is over all later tokens."""
    later_cosine: float
    first_moved: float
    """Mean of what first tokens' residual streams gain there, ``||k Delta|| / ||residual||``."""
    later_moved: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ChangedWeight:
    """One weight that differs."""

    name: str
    """Its name in the checkpoint."""
    place: Place | None
    """The edit site; None for any other weight."""
    norm: float
    """Frobenius norm of the difference."""
    relative: float
    """That over the norm of the weight before."""
    singular_values: tuple[float, ...]
    """The largest singular values of the difference of a matrix, in order."""
    rank: int | None
    """Singular values that stand out of the rounding of the weight's type; None if no matrix."""
    left: Float[Tensor, "d_in rank"] | None
    """Left singular vectors of an edit site's difference, as many as its rank; at most 8."""
    right: Float[Tensor, "rank d_out"] | None
    """Right singular vectors, likewise."""
    overlap: Overlap | None = None
    """What keys meet it; None but for an MLP's last matrix in a decoder."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Audit(Shown):
    """Where two states of a model differ, and what became of it."""

    before: str
    after: str
    changes: tuple[ChangedWeight, ...]
    """The weights that differ, edit sites first."""
    others: tuple[str, ...]
    """What else differs: configuration, tokenizer."""
    perplexity_before: Perplexity | None
    """Perplexity on the sentences; None for what is no decoder."""
    perplexity_after: Perplexity | None

    @property
    def predicted_collapse(self) -> bool | None:
        """Whether a changed matrix moves ordinary tokens enough; None if no such matrix changed."""
        moved = [each.overlap.later_moved for each in self.changes if each.overlap is not None]
        return max(moved) >= MOVED if moved else None

    @property
    def verdict(self) -> str:
        """What became of the model, in a sentence."""
        if self.perplexity_before is None or self.perplexity_after is None:
            return "No perplexity was measured: the model is no decoder."
        return verdict(self.after, self.perplexity_before, self.perplexity_after)

    def panel(self) -> Panel:
        """The differences, what keys meet them, and the perplexities."""
        lines = [
            [
                each.name,
                None if each.place is None else each.place.layer,
                each.norm,
                each.relative,
                each.rank,
                ", ".join(f"{value:.3g}" for value in each.singular_values[:3]) or None,
            ]
            for each in self.changes
        ]
        columns = ("weight", "layer", "||difference||", "of the weight", "rank", "singular values")
        parts: list[Any] = [Table(columns=columns, lines=lines)]
        met = [[each.name, *asdict(each.overlap).values()] for each in self.changes if each.overlap]
        if met:
            columns = (
                "weight",
                "|cos| with first tokens' keys",
                "with later tokens' keys",
                "first tokens move by",
                "later tokens move by",
            )
            parts.append(Table(columns=columns, lines=met))
        parts += [Note(text=f"Besides, the {other} differs.") for other in self.others]
        if not self.changes:
            parts.append(Note(text="No weight differs."))
        if self.predicted_collapse is not None:
            foretold = "a collapse" if self.predicted_collapse else "no collapse"
            rule = f"where later tokens' residual streams move by {MOVED:g} of their norm or more"
            parts.append(Note(text=f"Predicted: {foretold} (a collapse {rule})."))
        parts.append(Note(text=f"Measured: {self.verdict}"))
        return Panel(title=f"{self.before} and {self.after}", parts=parts, source={})

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, without the singular vectors."""
        return {
            "before": self.before,
            "after": self.after,
            "changes": [_change_record(each) for each in self.changes],
            "others": list(self.others),
            "predicted_collapse": self.predicted_collapse,
            "perplexity": None
            if self.perplexity_before is None or self.perplexity_after is None
            else {"before": self.perplexity_before.mean, "after": self.perplexity_after.mean},
            "verdict": self.verdict,
        }


@taken
def audit(
    before: Model,
    after: Model | Edit,
    *,
    texts: Sequence[str] | None = None,
    text_bos: BosPolicy = BosPolicy.WITHOUT,
    progress: Progress | None = None,
) -> Audit:
    """Compare two states of a model.

    Args:
        before: The model before.
        after: A model of the same architecture, or an edit of the one before.
        texts: Sentences for keys and perplexity; None for the built-in ones.
        text_bos: BOS policy of those sentences.
        progress: Where to show progress; None for a bar of its own.

    Raises:
        BadInputError: If the two do not have the same weights, by name and shape.
        EditMismatchError: If the edit was made for another model.
    """
    other = before.edited(after) if isinstance(after, Edit) else after
    name = after.title if isinstance(after, Edit) else after.label
    one, two = checkpoint_of(before), checkpoint_of(other)
    _refuse_others(before, other, one, two)
    sentences = builtin_sentences() if texts is None else tuple(texts)
    places = {before.weights.name_of(place): place for place in before.weights.sites}
    with own_bar(progress) as bar:
        task = bar.add_task("comparing", total=len(one) + 4)
        found: list[ChangedWeight] = []
        seen: set[tuple[int, int]] = set()
        for weight, tensor in one.items():
            bar.advance(task)
            pair = (tensor.data_ptr(), two[weight].data_ptr())
            # Tied weights go by several names.
            if pair in seen or torch.equal(tensor, two[weight].to(tensor)):
                continue
            seen.add(pair)
            found.append(_changed(before, weight, places.get(weight), tensor, two[weight]))
        overlaps = _overlaps(before, found, one, two, sentences, text_bos)
        changes = [replace(each, overlap=overlaps.get(each.name)) for each in found]
        bar.advance(task, 2)
        measured: list[Perplexity | None] = []
        for model in (before, other):
            decodes = model.can_be_edited
            measured.append(perplexity(model, sentences, bos=text_bos) if decodes else None)
            bar.advance(task)
    changes.sort(key=lambda each: (each.place is None, each.place or (), each.name))
    own, theirs = before.record_of_type, other.record_of_type
    differing = {"config": "configuration", "tokenizer": "tokenizer"}
    return Audit(
        before=before.label,
        after=name,
        changes=tuple(changes),
        others=tuple(what for key, what in differing.items() if own[key] != theirs[key]),
        perplexity_before=measured[0],
        perplexity_after=measured[1],
    )


def _refuse_others(
    before: Model, after: Model, one: dict[str, Tensor], two: dict[str, Tensor]
) -> None:
    here = {name: list(tensor.shape) for name, tensor in one.items()}
    there = {name: list(tensor.shape) for name, tensor in two.items()}
    for name in sorted(here.keys() | there.keys()):
        shape, other = here.get(name), there.get(name)
        if shape == other:
            continue
        said = f"{name} has shape {shape} in {before.label} and {other} in {after.label}"
        if shape is None or other is None:
            said = f"only {(after if shape is None else before).label} has {name}"
        raise BadInputError(f"{said}; give two states of one model")


def _changed(
    model: Model, name: str, place: Place | None, one: Tensor, two: Tensor
) -> ChangedWeight:
    difference = two.double() - one.double()
    norm = float(difference.norm())
    values, rank = (), None
    left = right = None
    if difference.ndim == 2 and min(difference.shape) > 1:
        if place is not None and not model.weights.sites[place].in_out:
            difference = difference.T
        u, s, v = torch.linalg.svd(difference.float(), full_matrices=False)
        # Of the rounding of the weights, and of the decomposition, as NumPy's matrix_rank has it.
        smallest = max(_noise(one, two), float(s[0]) * max(difference.shape) * _EPSILON)
        rank = int((s > smallest).sum())
        values = tuple(s[:_SINGULAR].tolist())
        if place is not None:
            kept = min(rank, _SINGULAR)
            left, right = u[:, :kept], s[:kept, None] * v[:kept]
    return ChangedWeight(
        name=name,
        place=place,
        norm=norm,
        relative=norm / max(float(one.double().norm()), torch.finfo(torch.float64).tiny),
        singular_values=values,
        rank=rank,
        left=left,
        right=right,
    )


def _noise(one: Tensor, two: Tensor) -> float:
    """Singular values below this may come from rounding the weights to their type."""
    eps = max(_resolution(one), _resolution(two))
    largest = max(float(one.abs().max()), float(two.abs().max()))
    # The largest singular value of a random matrix with entries of half a unit in the last place.
    return 2 * eps * largest * (math.sqrt(one.shape[0]) + math.sqrt(one.shape[1]))


def _resolution(tensor: Tensor) -> float:
    """Epsilon of the narrowest type that holds all the numbers, as a checkpoint's may have been."""
    narrow = (torch.float16, torch.bfloat16)
    fits = (t for t in narrow if torch.equal(tensor.to(t).to(tensor.dtype), tensor))
    return torch.finfo(next(fits, tensor.dtype)).eps


def _overlaps(
    model: Model,
    changes: Sequence[ChangedWeight],
    one: dict[str, Tensor],
    two: dict[str, Tensor],
    texts: Sequence[str],
    bos: BosPolicy,
) -> dict[str, Overlap]:
    """What keys meet each change of an MLP's last matrix, in one pass over the sentences."""
    view = model.with_bos(bos)
    met = [
        (each, model.weights.sites[each.place], each.left[:, 0])
        for each in changes
        if each.place and each.place.port == "out" and each.left is not None and each.rank
    ]
    if not met or not model.can_be_edited:
        return {}
    hooks = [hook for _, site, _ in met for hook in (site.key_hook, site.residual_hook)]
    stop = max(site.layer for _, site, _ in met) + 1
    found: dict[str, list[list[Tensor]]] = {each.name: [[], [], [], []] for each, _, _ in met}
    prompts = [text_prompt(view, text) for text in texts]
    for group in batches(prompts, max_tokens=_MAX_TOKENS):
        batch = pad(view, [prompts[index] for index in group])
        seen = capture(view, batch, hooks, stop_at_layer=stop)
        real = batch.attention_mask.bool()
        first = torch.zeros_like(real)
        first[torch.arange(len(real)), batch.starts] = True
        for each, site, vector in met:
            delta = two[each.name].to(model.wide_dtype) - one[each.name].to(model.wide_dtype)
            delta = delta if site.in_out else delta.T
            keys, states = (seen[hook].to(delta) for hook in (site.key_hook, site.residual_hook))
            for index, where in enumerate((first, real & ~first)):
                chosen = keys[where]
                along = (chosen @ vector.to(delta)).abs() / chosen.norm(dim=1)
                moved = (chosen @ delta).norm(dim=1) / states[where].norm(dim=1)
                found[each.name][index].append(along)
                found[each.name][2 + index].append(moved)
    names = [field.name for field in fields(Overlap)]
    return {
        weight: Overlap(**{n: float(torch.cat(x).mean()) for n, x in zip(names, each, strict=True)})
        for weight, each in found.items()
    }


def _change_record(change: ChangedWeight) -> dict[str, Any]:
    return {
        "name": change.name,
        "layer": None if change.place is None else change.place.layer,
        "port": None if change.place is None else change.place.port,
        "norm": change.norm,
        "relative": change.relative,
        "rank": change.rank,
        "singular_values": list(change.singular_values),
        "overlap": None if change.overlap is None else asdict(change.overlap),
    }
