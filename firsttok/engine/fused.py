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

from firsttok.engine.blocks import block_arguments, replaced_forward
from firsttok.engine.fusibility import has_plain_arguments, is_fusible, is_watched, plain_norm
from firsttok.engine.kernels import rms_norm, rotate
from firsttok.engine.products import fast_products, linear, linear_into

__all__ = ["PackedCall", "Packing", "pack_call", "run_packed", "unembed"]


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


@dataclass(frozen=True, eq=False)
class PackedCall:
    """What blocks are run on, real tokens only, which stand one after the other."""

    blocks: Sequence[Any]
    """Blocks that can be fused."""
    packing: Packing
    """Where the tokens stand in their padded batch."""
    hidden: Float[Tensor, "place d_model"]
    """What enters the first block."""
    arguments: Sequence[dict[str, Any]]
    """What each block is called with on the padded batch."""


def run_packed(
    call: PackedCall,
    count: int | None = None,
    *,
    past: Sequence[tuple[Tensor, Tensor]] = (),
    keep: list[tuple[Tensor, Tensor]] | None = None,
    last: Callable[[Any], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Float[Tensor, "place d_model"]:
    """Run blocks on real tokens only.

    Args:
        call: The blocks and what they are run on.
        count: How many of the blocks, from the lowest on; None for all.
        past: Each attention's keys and values ``[prompt, head, pos, d_head]`` of earlier columns,
            which no gradient flows into; empty without.
        keep: Where to put each attention's keys and values of these columns.
        last: What to run the last block in.

    Returns:
        What leaves the last block.
    """
    state, blocks = call.hidden[None], call.blocks[:count]
    for index, (block, given) in enumerate(zip(blocks, call.arguments, strict=False)):
        before = past[index] if past else None
        attend = _attention_forward(block.attn, call.packing, given, before, keep)
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced_forward(block.attn, attend))
            for name in ("ln1", "ln2"):
                norm = getattr(block, name, None)
                plain = None if norm is None else plain_norm(norm)
                if plain is not None:
                    stack.enter_context(replaced_forward(norm, _norm_forward(*plain)))
            if index == len(blocks) - 1:
                stack.enter_context(last(block))
            stack.enter_context(fast_products(state.device))
            output = block(state, **given)
        state = output[0] if isinstance(output, tuple) else output
    return state[0]


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
    return PackedCall(blocks, packing, packing.pack(hidden), calls)


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
        or is_watched(part)
    ):
        with fast_products(hidden.device):
            return part(hidden)
    if into is not None:
        return linear_into(into[: len(hidden)], hidden, projection.weight)
    if len(hidden) == 1 and hidden.requires_grad:
        # The gradient of one row is a product of a vector and a matrix, which sums over the whole
        # vocabulary with several times the rounding error of a product of matrices.
        return linear(torch.cat([hidden, torch.zeros_like(hidden)]), projection.weight)[:1]
    return linear(hidden, projection.weight)


def _norm_forward(weight: Tensor, epsilon: float) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, weight, epsilon)

    return forward


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
    mask = arguments["attention_mask"]
    padded_angles = (each.expand(rows, -1, -1) for each in arguments["position_embeddings"])
    angles = tuple(packing.pack(each)[:, None] for each in padded_angles)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]

        def heads(projection: Any, turned: bool) -> Tensor:
            states = projection(hidden)[0].unflatten(-1, (-1, size))
            states = rotate(states, *angles) if turned else states
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
