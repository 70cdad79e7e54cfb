"""MLP keys: the input of the output projection at one token of each prompt (Equation 1's K)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import take_fields, taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.engine.replay import keys_behind
from firsttok.errors import NonFiniteError
from firsttok.models import Model, capture
from firsttok.prompts import Prompt, batches, fact_prompt, is_changed, pad, positions
from firsttok.svg import Plot
from firsttok.tensors import Intervention, KeyMatrix, KeyVector

__all__ = [
    "ORDINARY_KEYS",
    "TOGETHER",
    "FactKeys",
    "IntervenedKeys",
    "KeySource",
    "Keys",
    "OrdinaryKeys",
    "capture_keys",
    "fact_keys",
    "keys_at",
    "keys_by_layer",
    "keys_of_facts",
]

TOGETHER = 8
"""Facts whose prompts share a batch; keys and values of their beginnings are all in memory."""
_MAX_TOKENS = 4096
"""Most tokens of a padded batch."""
_SHOWN = 12
"""Prompts whose norms are listed; ``norms`` holds all."""
_DRAWN = 6
"""Prompts that are drawn."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Keys(Shown):
    """Keys of some prompts at some layers, with what they belong to beside them."""

    values: Float[Tensor, "layer prompt d_mlp"]
    layers: tuple[int, ...]
    """Layer of each first index."""
    prompts: tuple[Prompt, ...]
    """Prompt of each second index."""
    positions: tuple[int, ...]
    """Absolute token position the key was read at, for each prompt."""
    model_fingerprint: str
    origin: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The view of it, by label; see :attr:`firsttok.models.Model.origin`."""

    @property
    def norms(self) -> Float[Tensor, "layer prompt"]:
        """Euclidean norm of every key, in float64 on the CPU."""
        return self.values.double().norm(dim=2).cpu()

    def panel(self) -> Panel:
        """Where each key was read, and its norm by layer."""
        norms, ends = self.norms, (self.layers[0], self.layers[-1]) if self.layers else ("-", "-")
        places = [*zip(self.prompts, self.positions, strict=True)][:_SHOWN]
        lines = [
            [prompt.text, position, *norms[[0, -1], index].tolist()]
            for index, (prompt, position) in enumerate(places)
        ]
        columns = ("prompt", "position", *(f"norm, layer {layer}" for layer in ends))
        series = {
            str(line[0]): norms[:, index].tolist() for index, line in enumerate(lines[:_DRAWN])
        }
        plot = Plot(
            title="norm of the key by layer",
            series=series,
            x=self.layers,
            x_label="layer",
            y_label="norm",
            log=True,
        )
        table = Table(columns=columns, lines=lines)
        return Panel(
            title=f"keys, [layer {len(self.layers)}, prompt {len(self.prompts)}, "
            f"d_mlp {self.values.shape[-1]}]",
            parts=[table, plot] if len(self.layers) > 1 and lines else [table],
            source=self.origin or {"weights": short_hash(self.model_fingerprint)},
        )

    def at(self, layer: int) -> KeyMatrix:
        """Keys of one captured layer.

        Raises:
            ValueError: If the layer was not captured.
        """
        return self.values[self.layers.index(layer)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FactKeys(Shown):
    """The two keys of a fact that the released code mixes up."""

    prefixed_mean: KeyVector
    """k_bar: mean over the context set (Equation 1)."""
    unprefixed: KeyVector
    """k^u: key of the bare prompt."""

    def panel(self) -> Panel:
        """How far apart the two are."""
        lines = [
            ["norm of k_bar, the prefixed mean", float(self.prefixed_mean.double().norm())],
            ["norm of k^u, of the bare prompt", float(self.unprefixed.double().norm())],
            ["cosine", self.cosine],
        ]
        return Panel(
            title="the two keys of a fact", parts=[Table(columns=("", "value"), lines=lines)]
        )

    @property
    def cosine(self) -> float:
        """Cosine of k_bar and k^u."""
        mean, bare = self.prefixed_mean.double(), self.unprefixed.double()
        return float(mean @ bare / (mean.norm() * bare.norm()))

    @property
    def norm_ratio(self) -> float:
        """``||k^u|| / ||k_bar||``."""
        return float(self.unprefixed.double().norm() / self.prefixed_mean.double().norm())


@taken
def keys_at(
    model: Model,
    prompts: Sequence[Prompt],
    at: Sequence[int],
    *,
    layers: Iterable[int],
    stack: str | None = None,
    max_tokens: int = _MAX_TOKENS,
) -> Keys:
    """Capture keys at any layers in one pass per batch, stopping above the highest layer.

    Args:
        model: The model.
        prompts: The prompts.
        at: Absolute token position to read, one for each prompt.
        layers: Layers to read.
        stack: ``encoder_blocks`` or ``decoder_blocks`` on encoder-decoders.
        max_tokens: Most tokens of a padded batch.

    Raises:
        LayerOutOfRangeError: If a layer does not exist.
        NonFiniteError: If a key is NaN or infinite.
    """
    sites = [model.site(layer, stack=stack) for layer in layers]
    stop = max(site.layer for site in sites) + 1 if sites[0].stack == "blocks" else None
    # At least float32, so that what is computed from bfloat16 keys loses no more than they did.
    values = torch.empty(
        len(sites), len(prompts), sites[0].d_mlp, dtype=model.wide_dtype, device=model.device
    )
    causal = model.can_be_edited and not model.sees_later
    # In a decoder, nothing after the token that is read changes its key.
    read = [position + 1 for position in at] if causal else None
    for group in batches(prompts, max_tokens=max_tokens, lengths=read):
        batch = pad(model, [prompts[i] for i in group])
        columns = batch.columns(torch.tensor([at[i] for i in group]))
        if causal:
            batch = batch.first(int(columns.max()) + 1)
        seen = capture(model, batch, [site.key_hook for site in sites], stop_at_layer=stop)
        rows = torch.arange(len(group), device=columns.device)
        for index, site in enumerate(sites):
            values[index, group] = seen[site.key_hook][rows, columns].to(values.dtype)
    return Keys(
        values=_finite(model, values),
        layers=tuple(site.layer for site in sites),
        prompts=tuple(prompts),
        positions=tuple(at),
        model_fingerprint=model.fingerprint,
        origin=model.origin,
    )


@taken
def capture_keys(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    layers: Iterable[int] | None = None,
    context: str = "{}",
) -> Keys:
    """Capture the keys of facts at their subjects' last tokens; all layers' unless some are named.

    The prompts are put into the context, a template with one ``{}``.
    """
    chosen = [facts] if isinstance(facts, Fact) else facts
    prompts = [fact_prompt(model, fact, context) for fact in chosen]
    read = range(model.n_layers) if layers is None else layers
    return keys_at(model, prompts, positions(prompts).tolist(), layers=read)


@taken
def fact_keys(model: Model, fact: Fact, contexts: ContextSet, *, layer: int) -> FactKeys:
    """Capture k_bar and k^u of one fact (Equation 1 and Section 3.1)."""
    return keys_of_facts(model, [fact], contexts, layer=layer)[0]


@taken
def keys_by_layer(
    model: Model, fact: Fact, contexts: ContextSet, *, layers: Iterable[int]
) -> dict[int, FactKeys]:
    """As :func:`fact_keys` at several layers, in one pass."""
    prompts = _fact_prompts(model, [fact], (*contexts.templates, "{}"))
    keys = keys_at(model, prompts, positions(prompts).tolist(), layers=layers)
    return {
        layer: FactKeys(prefixed_mean=own[:-1].mean(0), unprefixed=own[-1])
        for layer, own in zip(keys.layers, keys.values, strict=True)
    }


@taken
def keys_of_facts(
    model: Model, facts: Sequence[Fact], contexts: ContextSet, *, layer: int
) -> list[FactKeys]:
    """As :func:`fact_keys`, for several facts, which share batches and what contexts begin with."""
    templates = (*contexts.templates, "{}")
    found: list[FactKeys] = []
    for start in range(0, len(facts), TOGETHER):
        prompts = _fact_prompts(model, facts[start : start + TOGETHER], templates)
        keys = _behind_beginnings(model, prompts, len(templates), layer=layer)
        if keys is None:
            keys = keys_at(model, prompts, positions(prompts).tolist(), layers=[layer]).at(layer)
        found += [
            FactKeys(prefixed_mean=own[:-1].mean(0), unprefixed=own[-1])
            for own in keys.split(len(templates))
        ]
    return found


def _fact_prompts(model: Model, facts: Sequence[Fact], templates: Sequence[str]) -> list[Prompt]:
    with model.texts.unchanged(model.tokenizer):
        return [fact_prompt(model, fact, template) for fact in facts for template in templates]


def _behind_beginnings(
    model: Model, prompts: Sequence[Prompt], templates: int, *, layer: int
) -> KeyMatrix | None:
    """Keys of prompts of which every so many have one template; what these share is run once.

    Returns:
        The keys; None if nothing is shared, or if the model cannot be run in parts.
    """
    at = positions(prompts).tolist()
    shared = [
        _shared_beginning(
            [prompts[i].token_ids[: at[i]] for i in range(t, len(prompts), templates)]
        )
        for t in range(templates)
    ]
    cut = max(shared)
    if len(prompts) == templates or not cut or model.sees_later:
        return None
    # Nothing after a read token is run, and beginnings stand below one another.
    aligned = [
        replace(
            prompt,
            token_ids=prompt.token_ids[: position + 1],
            subject_position=shared[row % templates],
        )
        for row, (prompt, position) in enumerate(zip(prompts, at, strict=True))
    ]
    batch = pad(model, aligned, side="subject")
    columns = batch.columns(torch.tensor(at))
    if batch.tokens.numel() > 2 * _MAX_TOKENS:
        return None
    with model.running() as bridge:
        keys = keys_behind(bridge, batch, layer=layer, cut=cut)
    if keys is None:
        return None
    rows = torch.arange(len(prompts), device=columns.device)
    return _finite(model, keys[rows, columns - cut].to(model.wide_dtype))


def _finite(model: Model, keys: Float[Tensor, "... d_mlp"]) -> Float[Tensor, "... d_mlp"]:
    if not bool(torch.isfinite(keys).all()):
        raise NonFiniteError(f"a key of {model.name} is NaN or infinite; load the model in float32")
    return keys


def _shared_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return len([*takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))])


@runtime_checkable
class KeySource(Protocol):
    """Where an edit takes its two keys from; a probe gives one that intervenes."""

    @property
    def name(self) -> str:
        """What it does, in a few words; it enters provenance and cache keys."""
        ...

    def keys(self, model: Model, fact: Fact, contexts: ContextSet, *, layer: int) -> FactKeys:
        """Return k_bar and k^u of a fact."""
        ...


@dataclass(frozen=True, kw_only=True)
class OrdinaryKeys:
    """The keys of the model as it is (Equation 1 and Section 3.1)."""

    name: str = "ordinary"

    def keys(self, model: Model, fact: Fact, contexts: ContextSet, *, layer: int) -> FactKeys:
        """Return the keys of :func:`fact_keys`."""
        return fact_keys(model, fact, contexts, layer=layer)


@dataclass(frozen=True, kw_only=True)
class IntervenedKeys:
    """Both keys read in a view of the model that intervenes."""

    name: str
    interventions: tuple[Intervention, ...]

    __post_init__ = take_fields

    def keys(self, model: Model, fact: Fact, contexts: ContextSet, *, layer: int) -> FactKeys:
        """Return the keys under these interventions and no others.

        Raises:
            UnsupportedModelError: If the model does not obey them.
        """
        view = replace(model, interventions=self.interventions)
        return fact_keys(view, fact, contexts, layer=layer)

    def is_idle(self, model: Model, fact: Fact, contexts: ContextSet) -> bool:
        """Whether they change none of the fact's prompts, so that equal keys are no finding."""
        view = replace(model, interventions=self.interventions)
        templates = (*contexts.templates, "{}")
        return not is_changed(view, [fact_prompt(model, fact, text) for text in templates])


ORDINARY_KEYS = OrdinaryKeys()
"""The key source of every edit that is not part of a probe."""
