"""Forward passes with nothing implicit: tokens, mask and positions are always given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from firsttok.errors import UnsupportedModelError
from firsttok.models.fused import pack_call
from firsttok.models.products import fast_products
from firsttok.tensors import Logits, TokenBatch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from firsttok.models.model import Model

__all__ = ["call_arguments", "capture", "find_first_position", "logits"]


def call_arguments(model: "Model", batch: TokenBatch) -> dict[str, Any]:
    """The keyword arguments that go with a batch's tokens."""
    arguments: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if batch.visible is not None:
        # One mask for all heads, to be added to the scores; the model adds none of its own then.
        hidden = torch.finfo(model.dtype).min
        mask = torch.zeros(batch.visible.shape, dtype=model.dtype, device=batch.device)
        arguments["attention_mask"] = mask.masked_fill(~batch.visible, hidden)[:, None]
    if not model.is_encoder_decoder:
        arguments["position_ids"] = batch.position_ids + model.first_position
    return arguments


@torch.no_grad()
def find_first_position(bridge: "TransformerBridge") -> int:
    """Find the position id of a prompt's first token, by trial against a pass without ids.

    It is 0 for all but RoBERTa, which counts from behind the id of its padding token.

    Args:
        bridge: The bridge of an encoder or a decoder.

    Raises:
        UnsupportedModelError: If positions are numbered in another way.
    """
    plain: Any = bridge
    device = next(plain.original_model.parameters()).device
    tokens = (torch.arange(6, device=device)[None] * 7 + 11) % int(plain.cfg.d_vocab)
    ones = torch.ones_like(tokens)
    implied = _last_states(plain, tokens, attention_mask=ones)
    padding = getattr(plain.original_model.config, "pad_token_id", None)
    # Replays of a decoder count from 0.
    behind = [] if plain.cfg.attention_dir == "causal" or padding is None else [int(padding) + 1]
    errors: dict[int, float] = {}
    for first in (0, *behind):
        ids = ones.cumsum(1) - 1 + first
        explicit = _last_states(plain, tokens, attention_mask=ones, position_ids=ids)
        difference = explicit.double() - implied.double()
        errors[first] = float(difference.norm() / implied.double().norm())
    found = min(errors, key=lambda first: errors[first])
    # The same kernels run, so what is the same differs in the last bits at most.
    if errors[found] <= 8 * torch.finfo(implied.dtype).eps:
        return found
    raise UnsupportedModelError(
        f"{plain.cfg.architecture} does not number the tokens of a prompt from 0 on, and firsttok "
        "passes such numbers; this architecture is not supported"
    )


def _last_states(bridge: Any, tokens: Tensor, **arguments: Tensor) -> Tensor:
    """The residual stream behind the last block; logits may be zero, as of an encoder's head."""
    found: list[Tensor] = []

    def keep(states: Tensor, hook: object) -> None:  # noqa: ARG001 (called by name)
        found.append(states)

    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_out"
    bridge.run_with_hooks(tokens, fwd_hooks=[(last, keep)], **arguments)
    return found[0]


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
