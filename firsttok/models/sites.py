"""Edit sites: the weights of every MLP; the one that maps a key to a value is checked on a pass."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from firsttok.engine.traits import some_tokens
from firsttok.errors import UnsupportedModelError
from firsttok.tensors import ValueMatrix, WeightInOut

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["PORTS", "EditSite", "Place", "find_inner_sites", "find_sites", "refuse_processed"]

PORTS = ("in", "gate", "out")
"""Matrices of an MLP, as TransformerLens names them: up, gate (where there is one) and down."""

_STACKS = ("blocks", "encoder_blocks", "decoder_blocks")
_CHECK_TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 5e-3}


class Place(NamedTuple):
    """Where an edit site is."""

    stack: str
    """``blocks``, ``encoder_blocks`` or ``decoder_blocks``."""
    layer: int
    """Layer within its stack, counted from 0."""
    port: str = "out"
    """Which of the MLP's matrices, one of :data:`PORTS`."""

    def __str__(self) -> str:
        """As messages name it."""
        where = "layer" if self.stack == "blocks" else f"{self.stack}, layer"
        return f"{where} {self.layer}" + ("" if self.port == "out" else f" ({self.port})")


@dataclass(frozen=True, kw_only=True, eq=False)
class EditSite:
    """One matrix of an MLP; of the second one, key ``k`` goes in and value ``k @ W + b`` out."""

    stack: str
    """``blocks``, ``encoder_blocks`` or ``decoder_blocks``."""
    layer: int
    """Layer within its stack, counted from 0."""
    weight: nn.Parameter
    """The live weight; its layout is the model's own."""
    bias: nn.Parameter | None
    """The live bias, or None."""
    in_out: bool
    """Whether the weight is laid out ``[d_in, d_out]`` (GPT-2) or transposed (all others)."""
    port: str = "out"
    """Which of the MLP's matrices it is, one of :data:`PORTS`."""

    @property
    def place(self) -> Place:
        """Where it is."""
        return Place(self.stack, self.layer, self.port)

    @property
    def key_hook(self) -> str:
        """Hook point of what the matrix is given: the key, or the MLP's input."""
        return f"{self.stack}.{self.layer}.mlp.{self.port}.hook_in"

    @property
    def value_hook(self) -> str:
        """Hook point of what it gives: the MLP's output, or what goes into the activation."""
        inner = "" if self.port == "out" else f"{self.port}."
        return f"{self.stack}.{self.layer}.mlp.{inner}hook_out"

    @property
    def residual_hook(self) -> str:
        """Hook point of the residual stream after the block."""
        return f"{self.stack}.{self.layer}.hook_out"

    @property
    def matrix(self) -> WeightInOut:
        """The weight as ``[d_in, d_out]``, a view."""
        weight = self.weight.detach()
        return weight if self.in_out else weight.T

    @property
    def d_mlp(self) -> int:
        """Width of a key."""
        return self.matrix.shape[0 if self.port == "out" else 1]

    @property
    def d_model(self) -> int:
        """Width of a value."""
        return self.matrix.shape[1 if self.port == "out" else 0]

    def in_layout(self, matrix: WeightInOut) -> Float[Tensor, "rows columns"]:
        """Lay out a ``[d_in, d_out]`` matrix as the weight is."""
        return matrix if self.in_out else matrix.T

    def values_of(self, keys: Float[Tensor, "prompt d_mlp"]) -> ValueMatrix:
        """Apply the layer in the keys' type: ``W k + b`` (the bias is part of the value)."""
        values = keys @ self.matrix.to(keys.dtype)
        return values if self.bias is None else values + self.bias.detach().to(keys.dtype)


def find_sites(bridge: "TransformerBridge") -> tuple[EditSite, ...]:
    """Find every edit site of a bridge and check it on one forward pass.

    Raises:
        UnsupportedModelError: If a layer has no single output projection, or if
            ``key @ W + b`` is not what the MLP puts out.
    """
    sites = tuple(_sites(bridge))
    if not sites:
        raise UnsupportedModelError(
            f"{bridge.cfg.architecture} has no stack of transformer blocks that firsttok knows; "
            "give a decoder, an encoder or an encoder-decoder with dense MLPs"
        )
    _check(bridge, sites)
    return sites


def find_inner_sites(
    bridge: "TransformerBridge", sites: Sequence[EditSite], tensors: Iterable[Tensor]
) -> tuple[EditSite, ...]:
    """Find the matrices that stand before the key, ``in`` and ``gate``, where there are such.

    A layer has none here whose MLP is no plain stack of linear maps, or keeps both in one matrix
    (Phi-3), which TransformerLens takes apart.

    Args:
        bridge: The bridge.
        sites: The sites of :func:`find_sites`.
        tensors: The tensors that the checkpoint holds as they are.
    """
    own = set(map(id, tensors))
    found: list[EditSite] = []
    for site in sites:
        mlp: Any = getattr(bridge, site.stack)[site.layer].mlp
        for port in PORTS[:-1]:
            original: Any = getattr(getattr(mlp, port, None), "original_component", None)
            if _is_linear(original) and id(original.weight) in own:
                found.append(_site(site.stack, site.layer, port, original))
    return tuple(found)


def refuse_processed(bridge: "TransformerBridge", name: str) -> None:
    """Refuse a bridge whose weights or hook points are no longer those that were checked.

    Args:
        bridge: The bridge of a loaded model.
        name: What the model is called.

    Raises:
        UnsupportedModelError: If TransformerLens's compatibility mode is on, or if it has
            processed the weights.
    """
    if bridge.compatibility_mode or getattr(bridge, "_weights_processed", False):
        raise UnsupportedModelError(
            f"TransformerLens has changed the weights or the hook points of {name} "
            "(enable_compatibility_mode, process_weights), so that its edit sites are not those "
            "that were checked; load it again, and leave these calls out"
        )


def _is_linear(module: object) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _sites(bridge: "TransformerBridge") -> Iterator[EditSite]:
    for stack in _STACKS:
        blocks: Any = getattr(bridge, stack, None)
        for layer, block in enumerate(blocks if blocks is not None else ()):
            projection: Any = getattr(getattr(block, "mlp", None), "out", None)
            original: Any = getattr(projection, "original_component", None)
            if not _is_linear(original):
                raise UnsupportedModelError(
                    f"layer {layer} of {stack} in {bridge.cfg.architecture} has no single MLP "
                    "output projection (a mixture of experts?), so there is no key to edit"
                )
            yield _site(stack, layer, "out", original)


def _site(stack: str, layer: int, port: str, linear: Any) -> EditSite:
    return EditSite(
        stack=stack,
        layer=layer,
        port=port,
        weight=linear.weight,
        bias=linear.bias,
        in_out=not isinstance(linear, nn.Linear),
    )


def _check(bridge: "TransformerBridge", sites: tuple[EditSite, ...]) -> None:
    seen: dict[str, Tensor] = {}
    given: dict[EditSite, list[Tensor]] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        seen[hook.name] = activation.detach()

    def watch(site: EditSite) -> Callable[..., None]:
        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            given[site] = [value.detach() for value in values if isinstance(value, Tensor)]

        return enter

    names = [name for site in sites for name in (site.key_hook, site.value_hook)]
    tokens = some_tokens(bridge, 1, 6)
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for site in sites:
            mlp: Any = getattr(bridge, site.stack)[site.layer].mlp
            stack.callback(mlp.register_forward_pre_hook(watch(site), with_kwargs=True).remove)
        try:
            bridge.run_with_hooks(
                tokens,
                attention_mask=torch.ones_like(tokens),
                fwd_hooks=[(name, keep) for name in names],
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UnsupportedModelError(
                f"{bridge.cfg.architecture} cannot be run on a few tokens in "
                f"{str(sites[0].weight.dtype).removeprefix('torch.')} ({reason}); load it in "
                "float32, or choose another architecture"
            ) from None
    for site in sites:
        if site.key_hook not in seen or site.value_hook not in seen:
            raise UnsupportedModelError(
                f"hook point {site.key_hook} or {site.value_hook} did not fire on "
                f"{bridge.cfg.architecture}; this architecture is not supported"
            )
        key, value = seen[site.key_hook], seen[site.value_hook]
        expected = site.values_of(key.reshape(-1, key.shape[-1]))
        value = value.reshape(-1, value.shape[-1])
        tolerance = _CHECK_TOLERANCES.get(value.dtype, 1e-4)
        error = _distance(expected, value)
        if not error <= tolerance:
            cause = _cause(expected, value, given.get(site, []), tolerance)
            raise UnsupportedModelError(
                f"at layer {site.layer} of {site.stack} the key times the weight differs from the "
                f"MLP's output by {error:.1e}{cause}; this architecture "
                f"({bridge.cfg.architecture}) is not supported"
            )


def _distance(found: Tensor, value: Tensor) -> float:
    scale = value.norm().float().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found - value).norm().float() / scale)


def _cause(expected: Tensor, value: Tensor, given: Sequence[Tensor], tolerance: float) -> str:
    """Why an MLP's output is not what its second matrix puts out, where that can be told."""
    states = [each.reshape(value.shape) for each in given if each.numel() == value.numel()]
    if any(_distance(expected + each, value) <= tolerance for each in states):
        return ", since the MLP itself adds the residual stream to it"
    wide, other = expected.flatten().double(), value.flatten().double()
    factor = float(wide @ other / (wide @ wide).clamp_min(torch.finfo(torch.float64).tiny))
    if _distance(expected * factor, value) <= tolerance:
        return f", since the MLP multiplies it by {factor:.3g}"
    return ""
