"""Llama's kind of block, run on real tokens only and in fewer passes over memory, for replays.

A third of a small model's time on a CPU goes not into matrix products but into what lies between
them. Here no padding is run but by the attention's two products, a norm and a rotation are one step
of the graph each, keys are not repeated for the queries that share them, and kept columns are
attended to where they lie.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from firsttok.models.blocks import block_arguments, replaced_forward
from firsttok.models.products import fast_products, linear, linear_into

__all__ = [
    "PackedCall",
    "Packing",
    "has_plain_arguments",
    "is_fusible",
    "pack_call",
    "run_packed",
    "unembed",
]

_SPECIAL = ("sinks", "attn_logit_softcapping", "key_multiplier", "clip_qkv")
"""What an attention may have besides, as attributes of Hugging Face's module or configuration."""
_SWITCHES = (
    "use_split_qkv_input",
    "use_attn_in",
    "use_attn_result",
    "gated_q_proj",
    "rotary_interleaved_cos_sin",
    "rotary_adjacent_pairs",
)
"""What TransformerLens's configuration may ask for besides."""
_KEEPING = ("transformer_lens.", "transformers.utils.output_capturing")
"""Where the hooks come from that libraries leave for themselves."""
_MASK, _ANGLES = "attention_mask", "position_embeddings"


@dataclass(frozen=True, eq=False)
class Packing:
    """The real places of a padded batch, in row-major order."""

    real: Bool[Tensor, "prompt suffix"]
    """Which places hold a token."""

    @cached_property
    def places(self) -> Int[Tensor, "place"]:
        """Their indices in the flattened batch."""
        return self.real.flatten().nonzero()[:, 0]

    def pack(self, padded: Shaped[Tensor, "prompt suffix *rest"]) -> Shaped[Tensor, "place *rest"]:
        """Leave the padding out."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def unpack(
        self, packed: Shaped[Tensor, "place *rest"]
    ) -> Shaped[Tensor, "prompt suffix *rest"]:
        """Put zeros where padding was."""
        rows, columns = self.real.shape
        if len(self.places) == rows * columns:
            return packed.unflatten(0, (rows, columns))
        flat = packed.new_zeros(rows * columns, *packed.shape[1:])
        return flat.index_copy(0, self.places, packed).unflatten(0, (rows, columns))


def is_fusible(blocks: Sequence[Any]) -> bool:
    """Whether blocks can be run packed: attention as in Llama, float32, and nobody looking on.

    Hooks would be given tokens without their rows, so with one in place nothing is fused.
    """
    return all(_is_plain_attention(getattr(block, "attn", None)) for block in blocks) and not any(
        map(_is_watched, blocks)
    )


def has_plain_arguments(blocks: Sequence[Any], arguments: Sequence[Mapping[str, Any]]) -> bool:
    """Whether blocks are called with one mask to be added and with angles of the usual size."""
    return all(map(_is_plain_call, blocks, arguments))


def run_packed(
    blocks: Sequence[Any],
    packing: Packing,
    hidden: Float[Tensor, "place d_model"],
    arguments: Sequence[Mapping[str, Any]],
    *,
    past: Sequence[tuple[Tensor, Tensor]] = (),
    keep: list[tuple[Tensor, Tensor]] | None = None,
    last: Callable[[Any], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Float[Tensor, "place d_model"]:
    """Run blocks on real tokens only, which stand one behind the other.

    Args:
        blocks: Blocks that can be fused.
        packing: Where the tokens stand in their padded batch.
        hidden: What enters the first block.
        arguments: What each block is called with on the padded batch.
        past: Each attention's keys and values ``[prompt, head, pos, d_head]`` of earlier columns,
            which no gradient flows into; empty without.
        keep: Where to put each attention's keys and values of these columns.
        last: What to run the last block in.

    Returns:
        What leaves the last block.
    """
    state = hidden[None]
    for index, (block, given) in enumerate(zip(blocks, arguments, strict=True)):
        attend = _attention_forward(block.attn, packing, given, past[index] if past else None, keep)
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced_forward(block.attn, attend))
            for name in ("ln1", "ln2"):
                norm = getattr(block, name, None)
                if norm is not None and _is_plain_norm(norm):
                    stack.enter_context(replaced_forward(norm, _norm_forward(norm)))
            if index == len(blocks) - 1:
                stack.enter_context(last(block))
            stack.enter_context(fast_products(hidden.device))
            output = block(state, **given)
        state = output[0] if isinstance(output, tuple) else output
    return state[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedCall:
    """A forward pass up to its first block, whose blocks can be run packed."""

    blocks: Sequence[Any]
    """All blocks."""
    packing: Packing
    """Where the tokens stand."""
    hidden: Float[Tensor, "place d_model"]
    """What enters the first block."""
    arguments: Sequence[dict[str, Any]]
    """What each block is called with."""

    def run(
        self,
        count: int | None = None,
        *,
        past: Sequence[tuple[Tensor, Tensor]] = (),
        keep: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Float[Tensor, "place d_model"]:
        """Run the lowest blocks; see :func:`run_packed`.

        Args:
            count: How many; None for all.
            past: Keys and values of earlier columns, of those blocks at least.
            keep: Where to put each attention's keys and values of these columns.
        """
        return run_packed(
            self.blocks[:count],
            self.packing,
            self.hidden,
            self.arguments[:count],
            past=past[:count],
            keep=keep,
        )


def pack_call(
    bridge: Any, tokens: Tensor, mask: Tensor, arguments: Mapping[str, Any]
) -> PackedCall | None:
    """Go up to the first block; None if blocks of this model cannot be run packed.

    Args:
        bridge: A decoder's bridge.
        tokens: Token ids ``[prompt, pos]``.
        mask: 1 at each of them that is real, 0 at padding.
        arguments: What else the model is called with.
    """
    blocks = list(bridge.blocks)
    if not is_fusible(blocks):
        return None
    hidden, calls = block_arguments(bridge, tokens, arguments)
    if not has_plain_arguments(blocks, calls):
        return None
    packing = Packing(mask.bool())
    return PackedCall(blocks=blocks, packing=packing, hidden=packing.pack(hidden), arguments=calls)


def unembed(
    bridge: Any,
    hidden: Float[Tensor, "place d_model"],
    *,
    into: Float[Tensor, "most vocab"] | None = None,
) -> Float[Tensor, "place vocab"]:
    """Logits; a bias of nothing but zeros, which TransformerLens puts there, is not added.

    Args:
        bridge: A decoder's bridge.
        hidden: What the last norm puts out.
        into: Logits that are not needed any more, of as many places at least. They may be
            overwritten: the system clears every page of a large tensor that is made anew. Not
            where a gradient is wanted.
    """
    part = bridge.unembed
    projection = part.original_component
    bias = getattr(projection, "bias", None)
    if (
        type(projection) is not torch.nn.Linear
        or bias is None
        or bool(bias.any())
        or _is_watched(part)
    ):
        with fast_products(hidden.device):
            return part(hidden)
    if into is not None:
        return linear_into(into[: len(hidden)], hidden, projection.weight)
    return linear(hidden, projection.weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float
    ) -> Tensor:
        square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_()
        inverse = square.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return (hidden * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, inverse = ctx.saved_tensors
        scaled = gradient * weight
        along = (scaled * hidden).sum(-1, keepdim=True)
        along *= inverse**3 / hidden.shape[-1]
        return scaled.mul_(inverse).addcmul_(hidden, along, value=-1), None, None


class _Rotation(torch.autograd.Function):
    """Rotary embedding in Llama's convention: a token's two halves are the planes' two axes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, states: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = states.shape[-1] // 2
        turned = states * cos
        turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
        return turned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        turned = gradient * cos
        turned[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        turned[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return turned, None, None


def _is_plain_norm(norm: Any) -> bool:
    """Whether a bridge's norm is ``x / sqrt(mean(x^2) + eps) * weight``, by trial."""
    epsilon = _epsilon(norm)
    weight = getattr(norm.original_component, "weight", None)
    if epsilon is None or not isinstance(weight, Tensor) or weight.dtype is not torch.float32:
        return False
    if weight.requires_grad:
        return False
    # One row far above epsilon and one below it.
    row = torch.linspace(-1, 1.5, weight.numel(), device=weight.device)
    rows = torch.stack([row, row * epsilon**0.5])
    with torch.no_grad():
        expected = norm.original_component(rows)
        found = _RMSNorm.apply(rows, weight, epsilon)
    return torch.allclose(found, expected, rtol=1e-5, atol=0)


def _epsilon(norm: Any) -> float | None:
    found = getattr(norm.original_component, "variance_epsilon", None)
    return found if isinstance(found, float) else None


def _norm_forward(norm: Any) -> Callable[..., Tensor]:
    weight, epsilon = norm.original_component.weight, _epsilon(norm)

    def forward(hidden_states: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden_states, weight, epsilon)

    return forward


def _is_watched(block: Any) -> bool:
    """Whether a hook, TransformerLens's or PyTorch's, is on any part of a block."""
    from transformer_lens.hook_points import HookPoint

    for part in block.modules():
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if part._backward_hooks or any(
            isinstance(part, HookPoint) or not _is_own(hook) for hook in hooks
        ):
            return True
    return False


def _is_own(hook: Any) -> bool:
    """Whether a library put a hook there for itself, which keeps what it sees and no more.

    TransformerLens has one on each norm; Hugging Face leaves some once it was asked for all states.
    """
    return str(getattr(hook, "__module__", "")).startswith(_KEEPING)


def _is_plain_call(block: Any, arguments: Mapping[str, Any]) -> bool:
    mask, angles = arguments.get(_MASK), arguments.get(_ANGLES)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not mask.is_floating_point():
        return False
    size = getattr(getattr(block.attn, "original_component", None), "head_dim", None)
    return isinstance(angles, tuple) and all(
        each.ndim == 3 and each.shape[-1] == size for each in angles
    )


def _is_plain_attention(attention: Any) -> bool:
    """Whether a bridge's attention is Llama's: rotary, with nothing else between the products."""
    from transformer_lens.model_bridge.generalized_components import (
        PositionEmbeddingsAttentionBridge,
    )

    if type(attention) is not PositionEmbeddingsAttentionBridge:
        return False
    original: Any = attention.original_component
    config: Any = getattr(original, "config", None)
    weight = getattr(attention.q.original_component, "weight", None)
    special = [getattr(holder, name, None) for holder in (original, config) for name in _SPECIAL]
    switched = [getattr(attention.config, name, False) for name in _SWITCHES]
    scaled = (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta")
    return (
        not attention.compatibility_mode
        and not attention.training
        and not attention.is_cross_attention
        and not any(switched)
        and not any(found is not None for found in (*special, scaled))
        and {"q", "k", "v", "o"} == set(attention.submodules)
        and getattr(weight, "dtype", None) is torch.float32
    )


def _attention_forward(
    attention: Any,
    packing: Packing,
    arguments: Mapping[str, Any],
    past: tuple[Tensor, Tensor] | None,
    keep: list[tuple[Tensor, Tensor]] | None,
) -> Callable[..., tuple[Tensor, None]]:
    size = attention.original_component.head_dim
    scaling = getattr(attention.original_component, "scaling", size**-0.5)
    rows, columns = packing.real.shape
    mask = arguments[_MASK]
    padded_angles = (each.expand(rows, -1, -1) for each in arguments[_ANGLES])
    angles = tuple(packing.pack(each)[:, None] for each in padded_angles)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]

        def heads(projection: Any, turned: bool) -> Tensor:
            states = projection(hidden)[0].unflatten(-1, (-1, size))
            states = _Rotation.apply(states, *angles) if turned else states
            return packing.unpack(states).transpose(1, 2)

        keys, values = heads(attention.k, turned=True), heads(attention.v, turned=False)
        if keep is not None:
            keep.append((keys, values))
        # Queries of one group stand below each other, before the keys that they share.
        group = (rows, keys.shape[1], -1, size)
        queries = heads(attention.q, turned=True).reshape(group)
        scores = queries @ keys.transpose(-2, -1)
        kept = 0
        if past is not None:
            kept = past[0].shape[2]
            scores = torch.cat([queries @ past[0].transpose(-2, -1), scores], dim=-1)
        scores = torch.add(mask, scores.view(rows, -1, columns, kept + columns), alpha=scaling)
        pattern = torch.nn.functional.softmax(scores, dim=-1).view(*group[:3], kept + columns)
        output = pattern[..., kept:] @ values
        if past is not None:
            output = output + pattern[..., :kept] @ past[1]
        output = output.view(rows, -1, columns, size).transpose(1, 2)
        return attention.o(packing.pack(output.flatten(2))[None]), None

    return forward
