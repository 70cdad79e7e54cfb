"""Average effects of causal tracing, and the layer that they propose (Meng et al. 2022, Section 2).

The unit of every average and of every interval is the fact: a fact's tokens of one role are
averaged first. (The released notebook averages over all tokens of all facts.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import taken
from firsttok.errors import BadInputError
from firsttok.probes.concentration import LEVEL, RESAMPLES, TAILS, Average, resampled
from firsttok.probes.tracing import LAST_SUBJECT, ROLES, Trace

__all__ = [
    "LayerProposal",
    "RoleEffect",
    "average_effects",
    "average_total_effect",
    "propose_layer",
]


@dataclass(frozen=True, kw_only=True)
class RoleEffect:
    """AIE of one kind of state at one layer, at the tokens of one role."""

    kind: str
    role: str
    """Role of the tokens; facts without such a token do not count."""
    layer: int
    """The layer, or the centre of the window."""
    effect: Average


@dataclass(frozen=True, kw_only=True)
class LayerProposal:
    """The layer at which restored states bring most of the answer back."""

    layer: int
    """The layer, or the centre of the window."""
    effect: Average
    """AIE there. It is the highest of many, so it lies high."""
    undecided: tuple[int, ...]
    """Layers that cannot be told from it, itself among them: the interval of the paired difference
    of their effects holds 0."""
    share: float
    """Share of the resamples in which this layer has the highest effect."""


@taken
def average_effects(traces: Sequence[Trace], *, seed: int = 0) -> tuple[RoleEffect, ...]:
    """Average the indirect effects of traces with the same kinds (Figure 2 of Meng et al.).

    Returns:
        Kinds and roles in the order of the traces and of :data:`ROLES`, layers ascending; a role
        that no fact has a token of is left out.

    Raises:
        BadInputError: If there is no trace.
    """
    _some(traces)
    effects: list[RoleEffect] = []
    for kind in traces[0].restored:
        for role in ROLES:
            values = _by_layer(traces, kind, role)
            if not len(values):
                continue
            averages = _averages(values, _resampled(values, seed))
            effects += [
                RoleEffect(kind=kind, role=role, layer=layer, effect=average)
                for layer, average in enumerate(averages)
            ]
    return tuple(effects)


@taken
def average_total_effect(traces: Sequence[Trace], *, seed: int = 0) -> Average:
    """ATE: mean of P - P*.

    Raises:
        BadInputError: If there is no trace.
    """
    _some(traces)
    values = torch.tensor([[trace.total_effect] for trace in traces], dtype=torch.float64)
    return _averages(values, _resampled(values, seed))[0]


@taken
def propose_layer(
    traces: Sequence[Trace],
    *,
    kind: str = "mlp",
    role: str = LAST_SUBJECT,
    layers: Iterable[int] | None = None,
    seed: int = 0,
) -> LayerProposal:
    """Propose the layer to edit: where restoring the MLPs has the highest AIE (Section 2.2).

    Every resample draws the same facts for all layers, so that layers are compared in pairs.

    Args:
        traces: Traces of one model.
        kind: Kind of the states.
        role: Role of the tokens.
        layers: Layers to choose from; None for all. The MLP of layer 0 sees little but the token
            itself, so that a window that holds it can bring back no more than the token's name.
        seed: Seed of the bootstrap.

    Raises:
        BadInputError: If no fact has a token of this role, the kind was not traced, or there is no
            layer to choose from.
    """
    _some(traces)
    if kind not in traces[0].restored:
        raise BadInputError(
            f"{kind!r} was not traced, but {', '.join(traces[0].restored)}; trace it or take those"
        )
    values = _by_layer(traces, kind, role)
    if not len(values):
        raise BadInputError(f"no traced fact has a {role!r}; take one of {', '.join(ROLES)}")
    chosen = list(range(values.shape[1]) if layers is None else layers)
    if not chosen or not set(chosen) <= set(range(values.shape[1])):
        raise BadInputError(
            f"layers {chosen} are not all traced; choose from 0 to {values.shape[1] - 1}"
        )
    values = values[:, chosen]
    means = _resampled(values, seed)
    averages = _averages(values, means)
    best = max(range(len(chosen)), key=lambda index: averages[index].value)
    low = torch.quantile(means[:, [best]] - means, (1 - LEVEL) / 2, dim=0).tolist()
    return LayerProposal(
        layer=chosen[best],
        effect=averages[best],
        undecided=tuple(layer for layer, bound in zip(chosen, low, strict=True) if bound <= 0),
        share=float((means.argmax(1) == best).double().mean()),
    )


def _some(traces: Sequence[Trace]) -> None:
    if not traces:
        raise BadInputError("there are no traces to average; trace at least one fact")


def _by_layer(traces: Sequence[Trace], kind: str, role: str) -> Float[Tensor, "fact layer"]:
    """Indirect effects of the facts that have a token of a role, mean over such tokens."""
    rows = [
        trace.indirect_effects(kind)[:, [own == role for own in trace.roles]].mean(1)
        for trace in traces
        if role in trace.roles
    ]
    layers = len(traces[0].restored[kind])
    return torch.stack(rows) if rows else torch.empty(0, layers, dtype=torch.float64)


def _resampled(values: Float[Tensor, "fact column"], seed: int) -> Float[Tensor, "resample column"]:
    """Means over facts drawn with replacement, the same draws for every column."""
    generator = torch.Generator().manual_seed(seed)
    return resampled(len(values), RESAMPLES, generator) @ values


def _averages(
    values: Float[Tensor, "fact column"], means: Float[Tensor, "resample column"]
) -> list[Average]:
    bounds = torch.quantile(means, TAILS, dim=0).T.tolist()
    return [
        Average(n=len(values), value=value, low=low, high=high)
        for value, (low, high) in zip(values.mean(0).tolist(), bounds, strict=True)
    ]
