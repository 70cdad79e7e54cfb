"""What makes the first token special, by intervention: its writers, and what it may attend to."""

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from firsttok.circuits.anatomy import PLACES, SINK, Act, Reading, read_heads
from firsttok.errors import UnsupportedModelError
from firsttok.evaluation import perplexity
from firsttok.models import Model, capture
from firsttok.probes import SeesAll, SeesItself
from firsttok.prompts import Prompt, pad

__all__ = [
    "HALF",
    "KnockOut",
    "Masked",
    "Needed",
    "Origin",
    "knock_out",
    "knocked_out_heads",
    "mask_doses",
    "mask_layers",
    "mean_keys",
    "needed_layers",
    "origins",
]

HALF = 0.5
"""A token has the state of a first one where it reaches this share of an act's peak."""
LATER = PLACES - 1
"""Place of the later token that is to see itself alone."""
_Hook = tuple[str, Callable[..., Any]]
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class KnockOut:
    """Some neurons of a writer set to another value."""

    layer: int
    neurons: tuple[int, ...]
    chosen: str
    """``top`` by what they write at the first token, or ``random``."""
    at: str
    """``first`` for the first token only, or ``all`` tokens."""
    value: str
    """``zero``, or the mean activation of ``later`` tokens or of ``first`` ones."""
    share: float
    """What is left of the act's peak at the first token."""
    perplexity: float
    """Mean perplexity of the unedited model."""


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A token whose view is changed at some layers, wholly or in part."""

    change: str
    """``closed``: the fourth token sees itself only; ``opened``: the first sees all."""
    first: int
    """First layer at which it is."""
    last: int
    """Last one."""
    dose: float
    """Share of its attention that is changed."""
    share: float
    """Its state at the act's peak along the direction of the act, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Layers at which a change of the mask works, that is, reaches or loses half of the peak."""

    until: int
    """Changed from layer 0 on, it works up to this layer at the least."""
    since: int
    """Changed up to the peak, it works from this layer on at the latest."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A token in a place, and how far it has the state of a first one."""

    what: str
    share: float
    """As for :class:`Masked`."""


def mean_keys(model: Model, reading: Reading, layer: int) -> dict[str, Float[Tensor, "d_mlp"]]:
    """Mean key of ``later`` tokens, and of ``first`` ones, at a layer."""
    hook = model.site(layer).key_hook
    keys = capture(model, reading.batch, [hook], stop_at_layer=layer + 1)[hook]
    return {"later": keys[reading.later].mean(0), "first": keys[:, 0].mean(0)}


def knock_out(
    model: Model,
    act: Act,
    layer: int,
    neurons: Sequence[int],
    *,
    chosen: str,
    at: str,
    value: str,
    means: Mapping[str, Float[Tensor, "d_mlp"]],
    texts: Sequence[str],
) -> KnockOut:
    """Set neurons to zero or to a mean, and measure state and perplexity on the same passes.

    Args:
        model: The model.
        act: The act whose peak is looked at.
        layer: Layer of the neurons.
        neurons: Their numbers.
        chosen: How they were chosen, for the record.
        at: ``first`` or ``all``.
        value: ``zero``, ``later`` or ``first``.
        means: What :func:`mean_keys` gives.
        texts: Sentences of the perplexity, under the model's BOS policy.
    """
    found: list[Tensor] = []

    def keep(state: Tensor, **_: Any) -> None:
        found.append(state[:, 0].double() @ act.direction.to(state.device))

    hooks = [
        _knock(model, layer, neurons, at=at, means=means.get(value)),
        (model.site(act.peak).residual_hook, keep),
    ]
    with model.hooks(hooks):
        measured = perplexity(model, texts, bos=model.bos)
    return KnockOut(
        layer=layer,
        neurons=tuple(neurons),
        chosen=chosen,
        at=at,
        value=value,
        share=float(torch.cat(found).mean() / act.norm),
        perplexity=measured.mean,
    )


def knocked_out_heads(
    model: Model, reading: Reading, layer: int, neurons: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Layer and number of heads that are sinks, and are none once neurons are silent at the first.

    Args:
        model: The model.
        reading: The pass without a change.
        layer: Layer of the neurons, which are set to zero at the first token.
        neurons: Their numbers.
    """
    names = [f"blocks.{at}.attn.hook_pattern" for at in range(model.n_layers)]
    with model.hooks([_knock(model, layer, neurons, at="first", means=None)]):
        seen = capture(model, reading.batch, names, stop_at_layer=None)
    without = replace(reading, patterns=torch.stack([seen[name] for name in names]))
    pairs = zip(read_heads(reading), read_heads(without), strict=True)
    return tuple(
        (before.layer, before.head) for before, after in pairs if before.alpha > SINK >= after.alpha
    )


def mask_layers(
    model: Model, prompts: Sequence[Prompt], act: Act, change: str, layers: Iterable[int]
) -> Masked:
    """Let the first token see all, or the fourth one itself alone, at some layers.

    Args:
        model: The model.
        prompts: Prompts of more than four tokens.
        act: The act whose peak is looked at.
        change: ``opened`` or ``closed``.
        layers: A run of layers.

    Raises:
        UnsupportedModelError: If the model gives its layers no mask.
    """
    chosen = [*layers]
    batch = pad(model, prompts)
    place = 0 if change == "opened" else LATER
    seen = batch.attention_mask.bool().clone()
    if change == "closed":
        seen[:] = False
        seen[:, place] = True
    with _row_of_mask(model, chosen, place, seen):
        share = _share(model, prompts, act, place)
    return Masked(change=change, first=chosen[0], last=chosen[-1], dose=1.0, share=share)


def mask_doses(
    model: Model, prompts: Sequence[Prompt], act: Act, doses: Sequence[float]
) -> tuple[Masked, ...]:
    """Move a share of the fourth token's attention to itself, at every layer up to the peak.

    Returns:
        One for each dose; none if TransformerLens discards a changed pattern, as on GPT-J.
    """

    def under(dose: float) -> float:
        hooks = [_alone(layer, LATER, dose) for layer in range(act.peak + 1)]
        with warnings.catch_warnings():
            # It warns of what is found out here.
            warnings.simplefilter("ignore", UserWarning)
            return _share(model, prompts, act, LATER, hooks)

    closed = mask_layers(model, prompts, act, "closed", range(act.peak + 1)).share
    if abs(under(1.0) - closed) > _TOLERANCE * max(1.0, abs(closed)):
        return ()
    return tuple(
        Masked(change="closed", first=0, last=act.peak, dose=dose, share=under(dose))
        for dose in doses
    )


def needed_layers(
    model: Model, prompts: Sequence[Prompt], act: Act, change: str
) -> tuple[Needed | None, tuple[Masked, ...]]:
    """In which layers a token must be alone to get an act's state.

    The mask is changed from layer 0 up to every layer, and from every layer up to the peak.

    Returns:
        Where it has to be changed, None if changing all layers neither reaches half of the peak
        (``closed``) nor loses it (``opened``); and every run.
    """
    peak = act.peak
    up = [mask_layers(model, prompts, act, change, range(last + 1)) for last in range(peak + 1)]
    down = [
        mask_layers(model, prompts, act, change, range(first, peak + 1))
        for first in range(1, peak + 1)
    ]
    runs = (*up, *down)

    def works(run: Masked) -> bool:
        return (run.share >= HALF) == (change == "closed")

    if not works(up[-1]):
        return None, runs
    until = min(run.last for run in up if works(run))
    since = max(run.first for run in (up[-1], *down) if works(run))
    return Needed(until=until, since=since), runs


def origins(model: Model, prompts: Sequence[Prompt], act: Act) -> tuple[Origin, ...]:
    """Whether the place, the token, or what a token sees makes it a first one.

    Raises:
        UnsupportedModelError: If the model does not obey a mask, or if a mask changed at all of its
            layers is not what a changed mask of the model is.
    """
    leading = len(model.leading_ids)
    changes = (
        ("closed", "the fourth token that sees itself alone", SeesItself(position=LATER), LATER),
        ("opened", "the first token that sees all", SeesAll(position=0), 0),
    )
    found: list[Origin] = []
    for change, what, intervention, place in changes:
        share = _share(model.intervened(intervention), prompts, act, place)
        by_layer = mask_layers(model, prompts, act, change, range(act.peak + 1)).share
        if abs(by_layer - share) > _TOLERANCE * max(1.0, abs(share)):
            raise UnsupportedModelError(
                f"{model.name} does not run with a mask at each layer as with one for all, so that "
                "its layers cannot be told apart"
            )
        found.append(Origin(what=what, share=share))
    repeated = [
        replace(
            prompt, token_ids=(*[prompt.token_ids[leading]] * PLACES, *prompt.token_ids[PLACES:])
        )
        for prompt in prompts
    ]
    found.append(
        Origin(
            what="the fourth of four equal tokens at the beginning",
            share=_share(model, repeated, act, LATER),
        )
    )
    tokenizer: Any = model.tokenizer
    bos = model.leading_ids[0] if leading else tokenizer.bos_token_id
    if bos is not None:
        moved = [
            replace(
                prompt,
                token_ids=(*prompt.token_ids[:LATER], bos, *prompt.token_ids[LATER + 1 :]),
            )
            for prompt in prompts
        ]
        found.append(Origin(what="BOS as the fourth token", share=_share(model, moved, act, LATER)))
    if leading:
        bare = [replace(prompt, token_ids=prompt.token_ids[leading:]) for prompt in prompts]
        found.append(
            Origin(
                what="the text's first token without BOS",
                share=_share(model, bare, act, 0),
            )
        )
    return tuple(found)


def _share(
    view: Model, prompts: Sequence[Prompt], act: Act, place: int, hooks: Sequence[_Hook] = ()
) -> float:
    """Mean state of a token at the peak, along the act's direction, as a share of its norm."""
    name = view.site(act.peak).residual_hook
    batch = pad(view, prompts)
    with view.hooks(hooks):
        state = capture(view, batch, [name], stop_at_layer=act.peak + 1)[name][:, place]
    return float((state.double() @ act.direction.to(state.device)).mean() / act.norm)


@contextmanager
def _row_of_mask(
    model: Model, layers: Sequence[int], place: int, seen: Bool[Tensor, "prompt key"]
) -> Generator[None]:
    """Set what one token sees at some layers; TransformerLens has no hook point at the mask."""

    def change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise UnsupportedModelError(
                f"{model.name} gives its layers no mask, so that its layers cannot be told apart"
            )
        changed = mask.clone()
        row = seen[:, None].to(mask.device)
        if mask.dtype != torch.bool:
            hidden = torch.full_like(row, torch.finfo(mask.dtype).min, dtype=mask.dtype)
            row = hidden.masked_fill(row, 0.0)
        changed[:, :, place] = row
        return args, kwargs | {"attention_mask": changed}

    blocks: Any = model.weights.bridge.blocks
    with ExitStack() as stack:
        for layer in layers:
            handle = blocks[layer].attn.register_forward_pre_hook(change, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _alone(layer: int, place: int, dose: float) -> _Hook:
    """A hook that moves a share of a token's attention to itself."""

    def move(pattern: Tensor, **_: Any) -> Tensor:
        changed = pattern.clone()
        changed[:, :, place] *= 1 - dose
        changed[:, :, place, place] += dose
        return changed

    return f"blocks.{layer}.attn.hook_pattern", move


def _knock(
    model: Model,
    layer: int,
    neurons: Sequence[int],
    *,
    at: str,
    means: Float[Tensor, "d_mlp"] | None,
) -> _Hook:
    """A hook that sets neurons to zero, or to their mean."""
    which = torch.tensor([*neurons])

    def change(keys: Tensor, **_: Any) -> Tensor:
        changed = keys.clone()
        chosen = which.to(keys.device)
        value = 0.0 if means is None else means.to(keys)[chosen]
        if at == "first":
            changed[:, 0, chosen] = value
        else:
            changed[:, :, chosen] = value
        return changed

    return model.site(layer).key_hook, change
