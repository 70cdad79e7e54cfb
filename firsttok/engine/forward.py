"""Forward passes with nothing implicit: tokens, mask and positions are always given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from firsttok.engine.fused import pack_call, run_packed
from firsttok.engine.products import fast_products
from firsttok.engine.traits import KEY, is_decoder, some_weight
from firsttok.tensors import Logits, TokenBatch

__all__ = ["call_arguments", "capture", "logits"]


def call_arguments(bridge: Any, batch: TokenBatch) -> dict[str, Any]:
    """The keyword arguments that go with a batch's tokens."""
    arguments: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if batch.visible is not None:
        # One mask for all heads, to be added to the scores; the model adds none of its own then.
        dtype = some_weight(bridge).dtype
        mask = torch.zeros(batch.visible.shape, dtype=dtype, device=batch.device)
        mask.masked_fill_(~batch.visible, torch.finfo(dtype).min)
        arguments["attention_mask"] = mask[:, None]
    # An encoder-decoder (T5) has other stacks, and takes no position ids.
    if hasattr(bridge, "blocks"):
        arguments["position_ids"] = batch.position_ids
    return arguments


def logits(bridge: Any, batch: TokenBatch) -> Logits:
    """Run a whole bridge; logits are of every column, padding included."""
    with fast_products(batch.device):
        output: Tensor = bridge(batch.tokens, **call_arguments(bridge, batch))
    return output


@torch.no_grad()
def capture(
    bridge: Any, batch: TokenBatch, hook_names: Sequence[str], *, stop_at_layer: int | None
) -> dict[str, Tensor]:
    """Run a bridge and keep the activations at some hook points.

    Args:
        bridge: The bridge.
        batch: The prompts.
        hook_names: TransformerLens hook points.
        stop_at_layer: The first block of ``blocks`` that need not run; None runs all.

    Returns:
        One tensor ``[prompt, pos, ...]`` per hook point.
    """
    seen: dict[str, Tensor] = {}

    def keep(activation: Any, hook: Any) -> None:
        seen[hook.name] = activation[0] if isinstance(activation, tuple) else activation

    hooks = [(name, keep) for name in hook_names]
    arguments = call_arguments(bridge, batch)
    if is_decoder(bridge):
        layers = range(len(bridge.blocks))
        if {*hook_names} <= {KEY.format(layer) for layer in layers}:
            call = pack_call(bridge, batch.tokens, batch.attention_mask, arguments)
            if call is not None:
                with bridge.hooks(fwd_hooks=hooks):
                    run_packed(call, stop_at_layer)
                return {name: call.packing.unpack(found[0]) for name, found in seen.items()}
    if stop_at_layer is not None and stop_at_layer < len(bridge.blocks):
        arguments["stop_at_layer"] = stop_at_layer
    with fast_products(batch.device):
        bridge.run_with_hooks(batch.tokens, return_type="logits", fwd_hooks=hooks, **arguments)
    return seen
