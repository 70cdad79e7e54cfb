"""Where the first token's anomaly is, and which layers, neurons and heads write and read it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from firsttok.errors import BadInputError, NonFiniteError, UnsupportedModelError
from firsttok.models import Model, capture
from firsttok.prompts import Prompt, pad, text_prompt
from firsttok.tensors import TokenBatch

__all__ = [
    "MASSIVE",
    "RAISED",
    "SHARE",
    "SINK",
    "Act",
    "Carrier",
    "Head",
    "LayerState",
    "Neuron",
    "Reading",
    "Step",
    "circuit_prompts",
    "find_acts",
    "find_carriers",
    "find_neurons",
    "read",
    "read_heads",
    "read_layers",
]

RAISED = 3.0
"""The first token is raised after a layer where its norm is so many times the others' median."""
MASSIVE = 10.0
"""A token is massive where its norm is so many times the median of later tokens."""
SHARE = 0.1
"""A layer is a step where it adds or takes at least this share of an act's peak."""
SINK = 0.3
"""Threshold of Gu et al. (2410.10781): a head is a sink where alpha is above it."""
PLACES = 4
"""Tokens whose activations are shown side by side, from the first on."""
_PEAK = 0.95
_PROMPTS = 16
_TOKENS = 32
_SHOWN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What one pass over some prompts showed, at every layer."""

    batch: TokenBatch
    states: Float[Tensor, "layer prompt pos d_model"]
    """Residual stream after each layer."""
    entering: Float[Tensor, "prompt d_model"]
    """Residual stream of the first token before layer 0."""
    attention: Float[Tensor, "layer prompt d_model"]
    """What attention adds to the first token."""
    mlp: Float[Tensor, "layer prompt d_model"]
    """What the MLP adds to the first token."""
    patterns: Float[Tensor, "layer prompt head query key"]
    values: Float[Tensor, "layer prompt pos"]
    """Norm of each token's value vectors, all heads together."""

    @property
    def norms(self) -> Float[Tensor, "layer prompt pos"]:
        """Norm of the residual stream, in float64; NaN on padding."""
        norms = self.states.double().norm(dim=3)
        return norms.masked_fill(~self.batch.attention_mask.bool(), torch.nan)

    @property
    def later(self) -> Bool[Tensor, "prompt pos"]:
        """Every real token but the first."""
        later = self.batch.attention_mask.bool().clone()
        later[:, 0] = False
        return later


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """The first token against later ones after one layer."""

    layer: int
    first: float
    """Mean norm of the first token's residual stream."""
    others: float
    """Median norm of later tokens'."""
    dimension: int
    """Dimension that carries most of the first token's squared norm."""
    dimension_share: float
    self_attention: float
    """What the second to fourth tokens attend to themselves, mean over heads and tokens."""
    value_ratio: float
    """Norm of the first token's value vector over the median of later ones (Gu et al.)."""

    @property
    def ratio(self) -> float:
        """How many times as long the first token's residual stream is."""
        return self.first / max(self.others, 1e-300)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A layer that adds to, or takes from, the first token along the direction of an act's peak."""

    layer: int
    attention: float
    """Share of the peak that attention adds."""
    mlp: float
    """Share of the peak that the MLP adds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Act:
    """A run of layers after which the first token is raised."""

    start: int
    """First layer after which it is raised."""
    end: int
    """Last one."""
    peak: int
    """First layer after which it has reached 95 % of its largest norm."""
    norm: float
    """Mean norm there."""
    ratio: float
    """That over the median of later tokens."""
    dimension: int
    """Dimension that carries most of the squared norm at the peak."""
    dimension_share: float
    entered: float
    """Share of the peak that was there before the act's first layer."""
    ups: tuple[Step, ...]
    """Step-up layers (Sun et al., 2603.05498)."""
    downs: tuple[Step, ...]
    """Step-down layers."""
    direction: Float[Tensor, "d_model"]
    """Unit vector of the mean state at the peak."""

    @property
    def writer(self) -> int | None:
        """The layer whose MLP adds the most; None where no MLP is a step up."""
        writers = [step for step in self.ups if step.mlp >= SHARE]
        return max(writers, key=lambda step: step.mlp).layer if writers else None


@dataclass(frozen=True, kw_only=True)
class Neuron:
    """A neuron of a writer's MLP."""

    layer: int
    index: int
    share: float
    """Share it writes of the MLP's output at the first token, along that output."""
    activations: tuple[float, ...]
    """Mean activation at the first, second, third and fourth token."""
    gate: tuple[float, ...]
    """What goes into its activation function there; of a plain MLP, all that goes in."""
    up: tuple[float, ...]
    """What its activation is multiplied by there; empty in a plain MLP."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """How much attention a head pays to the first token."""

    layer: int
    head: int
    alpha: float
    """Mean over prompts and queries, the first token's own included (Gu et al., Section 3)."""


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A token that is massive after some layer."""

    token: str | None
    """Its text; None for whatever token is the first of the sequence."""
    massive: int
    """How often it is massive after some layer."""
    seen: int
    """How often it occurs; a text counts at later places only."""
    ratio: float
    """Its largest norm over the median of later tokens after the same layer."""


def circuit_prompts(model: Model, texts: Sequence[str]) -> tuple[Prompt, ...]:
    """The beginnings of the first sixteen texts that begin differently; at most 32 tokens each.

    Raises:
        BadInputError: If fewer than two texts have five tokens.
    """
    place = len(model.leading_ids)
    chosen: dict[int, Prompt] = {}
    for text in texts:
        prompt = text_prompt(model, text)
        ids = prompt.token_ids[: _TOKENS + place]
        if len(ids) > place + PLACES:
            chosen.setdefault(ids[place], replace(prompt, token_ids=ids))
        if len(chosen) == _PROMPTS:
            break
    if len(chosen) < 2:
        raise BadInputError(
            f"{len(chosen)} of {len(texts)} texts have {PLACES + 1} tokens and begin with a token "
            "of their own; give at least 2"
        )
    return tuple(chosen.values())


def read(model: Model, prompts: Sequence[Prompt]) -> Reading:
    """Run some prompts and keep what is told of the first token.

    Raises:
        NonFiniteError: If an activation is NaN or infinite.
        UnsupportedModelError: If the model is no decoder, or does not show its attention.
    """
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is no decoder with a final norm and an unembedding, and only in a "
            "decoder is there a first token that sees itself alone"
        )
    batch = pad(model, prompts)
    points = [_points(model, layer) for layer in range(model.n_layers)]
    names = ["blocks.0.hook_in", *(name for point in points for name in point.values())]
    seen = capture(model, batch, names, stop_at_layer=None)
    missing = next((name for name in names if name not in seen), None)
    if missing is not None:
        raise UnsupportedModelError(
            f"{model.name} does not show what its circuit is read from (hook point {missing} did "
            "not fire)"
        )
    states = torch.stack([seen[point["after"]] for point in points])
    if not bool(torch.isfinite(states[:, batch.attention_mask.bool()]).all()):
        raise NonFiniteError(
            f"an activation of {model.name} is NaN or infinite; load the model in float32"
        )
    attention: list[Tensor] = []
    mlp: list[Tensor] = []
    before = seen["blocks.0.hook_in"][:, 0]
    for point, after in zip(points, states[:, :, 0], strict=True):
        written = after - seen[point["middle"]][:, 0] if "middle" in point else None
        mlp.append(seen[point["mlp"]][:, 0] if written is None else written)
        attention.append(after - before - mlp[-1])
        before = after
    return Reading(
        batch=batch,
        states=states,
        entering=seen["blocks.0.hook_in"][:, 0],
        attention=torch.stack(attention),
        mlp=torch.stack(mlp),
        patterns=torch.stack([seen[point["pattern"]] for point in points]),
        values=torch.stack(
            [seen[point["value"]].flatten(2).double().norm(dim=2) for point in points]
        ),
    )


def _points(model: Model, layer: int) -> dict[str, str]:
    """Hook points of a layer."""
    bridge: Any = model.weights.bridge
    block = f"blocks.{layer}"
    found = {
        "after": model.site(layer).residual_hook,
        "mlp": model.site(layer).value_hook,
        "pattern": f"{block}.attn.hook_pattern",
        "value": f"{block}.attn.v.hook_out",
    }
    middle = f"{block}.ln2.hook_in"
    # Where attention and MLP run side by side, no state lies between them.
    if middle in bridge.hook_dict and not bridge.cfg.parallel_attn_mlp:
        found["middle"] = middle
    if found["value"] not in bridge.hook_dict:
        found["value"] = f"{block}.attn.hook_v"
    return found


def read_layers(reading: Reading) -> tuple[LayerState, ...]:
    """The first token against later ones, from layer 0 up."""
    first, others, later = reading.norms[:, :, 0].mean(1), _medians(reading), reading.later
    rows: list[LayerState] = []
    for layer, states in enumerate(reading.states):
        squares = states[:, 0].double().square()
        shares = (squares / squares.sum(1, keepdim=True)).mean(0)
        itself = reading.patterns[layer].diagonal(dim1=2, dim2=3)[:, :, 1:PLACES]
        values = reading.values[layer]
        rows.append(
            LayerState(
                layer=layer,
                first=float(first[layer]),
                others=float(others[layer]),
                dimension=int(shares.argmax()),
                dimension_share=float(shares.max()),
                self_attention=float(itself.double().mean()),
                value_ratio=float(values[:, 0].mean() / values[later].median()),
            )
        )
    return tuple(rows)


def find_acts(reading: Reading) -> tuple[Act, ...]:
    """Runs of layers in which the first token is raised, with the layers that lift and lower it.

    With ``u`` the unit vector of the mean state at the peak, the mean state after every layer is
    the state before it plus what attention and MLP add, so that ``u`` splits the peak exactly.
    """
    means = reading.states[:, :, 0].double().mean(1)
    norms, others = means.norm(dim=1), _medians(reading)
    # The mean norm, not the norm of the mean: first tokens without a common direction have one too.
    lengths = reading.norms[:, :, 0].mean(1)
    raised = (lengths >= RAISED * others).tolist()
    runs: list[tuple[int, int]] = []
    for layer, is_raised in enumerate(raised):
        if is_raised and runs and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer)
        elif is_raised:
            runs.append((layer, layer))
    found: list[Act] = []
    begin = 0
    for number, (start, end) in enumerate(runs):
        inside = lengths[start : end + 1]
        peak = start + int((inside >= _PEAK * inside.max()).nonzero()[0])
        direction = means[peak] / norms[peak]
        gains = [
            Step(
                layer=layer,
                attention=float(
                    reading.attention[layer].double().mean(0) @ direction / norms[peak]
                ),
                mlp=float(reading.mlp[layer].double().mean(0) @ direction / norms[peak]),
            )
            for layer in range(len(means))
        ]
        until = runs[number + 1][0] if number + 1 < len(runs) else len(means)
        before = reading.entering.double().mean(0) if begin == 0 else means[begin - 1]
        shares = means[peak].square() / means[peak].square().sum()
        found.append(
            Act(
                start=start,
                end=end,
                peak=peak,
                norm=float(lengths[peak]),
                ratio=float(lengths[peak] / others[peak]),
                dimension=int(shares.argmax()),
                dimension_share=float(shares.max()),
                entered=float(before @ direction / norms[peak]),
                ups=tuple(s for s in gains[begin : peak + 1] if s.attention + s.mlp >= SHARE),
                downs=tuple(s for s in gains[peak + 1 : until] if s.attention + s.mlp <= -SHARE),
                direction=direction,
            )
        )
        begin = end + 1
    return tuple(found)


def find_neurons(
    model: Model, reading: Reading, layer: int, *, top: int = _SHOWN
) -> tuple[Neuron, ...]:
    """The neurons that write most of an MLP's output at the first token, along that output.

    Args:
        model: The model that was read.
        reading: The pass; its batch is run again up to the layer.
        layer: The writer's layer.
        top: How many neurons.
    """
    site = model.site(layer)
    ports = {"up": "in", "gate": "gate"}
    names = {kind: f"blocks.{layer}.mlp.{port}.hook_out" for kind, port in ports.items()}
    known: Mapping[str, Any] = model.weights.bridge.hook_dict
    names = {kind: name for kind, name in names.items() if name in known}
    seen = capture(model, reading.batch, [site.key_hook, *names.values()], stop_at_layer=layer + 1)
    keys = seen[site.key_hook][:, :PLACES].double()
    written = (keys[:, 0] @ site.matrix.double()).mean(0)
    shares = keys[:, 0].mean(0) * (site.matrix.double() @ written) / written.square().sum()
    inner = {kind: seen[name][:, :PLACES].double().mean(0) for kind, name in names.items()}
    if "gate" not in inner and "up" in inner:
        inner["gate"] = inner.pop("up")

    def at(kind: str, index: int) -> tuple[float, ...]:
        # Some MLPs keep gate and up in one matrix, whose hook point is twice as wide.
        if kind not in inner or inner[kind].shape[1] != keys.shape[2]:
            return ()
        return tuple(inner[kind][:, index].tolist())

    return tuple(
        Neuron(
            layer=layer,
            index=index,
            share=float(shares[index]),
            activations=tuple(keys[:, :, index].mean(0).tolist()),
            gate=at("gate", index),
            up=at("up", index),
        )
        for index in shares.argsort(descending=True)[:top].tolist()
    )


def read_heads(reading: Reading) -> tuple[Head, ...]:
    """Attention of every head to the first token: alpha of Gu et al. (2410.10781), Section 3.

    Alpha is the mean of a token's column of the pattern over all queries from that token on, its
    own among them.
    """
    real = reading.batch.attention_mask.double()
    columns = reading.patterns[..., 0].double() * real[None, :, None]
    alphas = (columns.sum(3) / real.sum(1)[None, :, None]).mean(1)
    return tuple(
        Head(layer=layer, head=head, alpha=alpha)
        for layer, row in enumerate(alphas.tolist())
        for head, alpha in enumerate(row)
    )


def find_carriers(model: Model, reading: Reading) -> tuple[Carrier, ...]:
    """Tokens that are massive after some layer: the first ones, then texts at later places."""
    ratios = (reading.norms / _medians(reading)[:, None, None]).amax(0)
    counts: dict[int | None, list[float]] = {}
    for row, column in reading.batch.attention_mask.nonzero().tolist():
        token = int(reading.batch.tokens[row, column]) if column else None
        counts.setdefault(token, []).append(float(ratios[row, column]))
    tokenizer: Any = model.tokenizer
    found = [
        Carrier(
            token=None if token is None else tokenizer.decode([token]),
            massive=sum(ratio >= MASSIVE for ratio in own),
            seen=len(own),
            ratio=max(own),
        )
        for token, own in counts.items()
    ]
    massive = [each for each in found if each.massive]
    return tuple(sorted(massive, key=lambda each: (each.token is not None, -each.massive)))


def _medians(reading: Reading) -> Float[Tensor, "layer"]:
    return reading.norms[:, reading.later].median(1).values
