"""Forward passes with nothing implicit: tokens, mask and positions are always given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from firsttok.models.fused import pack_call
from firsttok.models.products import fast_products
from firsttok.tensors import Logits, TokenBatch

if TYPE_CHECKING:
    from firsttok.models.model import Model

__all__ = ["call_arguments", "capture", "logits"]


def call_arguments(model: "Model", batch: TokenBatch) -> dict[str, Any]:
    """The keyword arguments that go with a batch's tokens."""
    arguments: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if batch.visible is not None:
        # One mask for all heads, to be added to the scores; the model adds none of its own then.
        hidden = torch.finfo(model.dtype).min
        mask = torch.zeros(batch.visible.shape, dtype=model.dtype, device=batch.device)
        arguments["attention_mask"] = mask.masked_fill(~batch.visible, hidden)[:, None]
    if not model.is_encoder_decoder:
        arguments["position_ids"] = batch.position_ids
    return arguments


@torch.no_grad()
def logits(model: "Model", batch: TokenBatch) -> Logits:
    """Run the whole model.

    Returns:
        Logits at every column of the batch, padding included.
    """
    with model.running() as bridge, fast_products(batch.device):
        output: Tensor = bridge(batch.tokens, **call_arguments(model, batch))
    return output


@torch.no_grad()
def capture(
    model: "Model", batch: TokenBatch, hook_names: Sequence[str], *, stop_at_layer: int | None
) -> dict[str, Tensor]:
    """Run the model and keep the activations at some hook points.

    Args:
        model: The model.
        batch: The prompts.
        hook_names: TransformerLens hook points.
        stop_at_layer: The first block of ``blocks`` that need not run; None runs all.

    Returns:
        One tensor ``[prompt, pos, ...]`` per hook point.
    """
    seen: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        seen[hook.name] = activation

    arguments = call_arguments(model, batch)
    only_keys = {*hook_names} <= {site.key_hook for site in model.sites}
    with model.running() as bridge:
        if only_keys and model.can_be_edited:
            call = pack_call(bridge, batch.tokens, batch.attention_mask, arguments)
            if call is not None:
                with bridge.hooks(fwd_hooks=[(name, keep) for name in hook_names]):
                    call.run(stop_at_layer)
                return {name: call.packing.unpack(found[0]) for name, found in seen.items()}
        if stop_at_layer is not None and stop_at_layer < model.n_layers:
            arguments["stop_at_layer"] = stop_at_layer
        with fast_products(batch.device):
            bridge.run_with_hooks(
                batch.tokens,
                return_type="logits",
                fwd_hooks=[(name, keep) for name in hook_names],
                **arguments,
            )
    return seen
