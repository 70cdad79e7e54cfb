"""Which blocks, calls and norms are as in Llama, so that they can be run packed and fused."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.engine.kernels import rms_norm
from firsttok.engine.products import runs_plain

__all__ = ["has_plain_arguments", "hooks_of", "is_fusible", "is_watched", "plain_norm"]

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


def is_fusible(blocks: Sequence[Any]) -> bool:
    """Whether blocks can be run packed: attention as in Llama, float32, and nobody looking on.

    Hooks would be given tokens without their rows, so with one in place nothing is fused.
    """
    if runs_plain():
        return False
    return all(_is_plain_attention(getattr(block, "attn", None)) for block in blocks) and not any(
        map(is_watched, blocks)
    )


def has_plain_arguments(blocks: Sequence[Any], arguments: Sequence[Mapping[str, Any]]) -> bool:
    """Whether blocks are called with one mask to be added and with angles of the usual size."""
    return all(map(_is_plain_call, blocks, arguments))


def is_watched(part: Any) -> bool:
    """Whether a hook, TransformerLens's or PyTorch's, is on a module or on any part of it."""
    return any(hooks_of(each) for each in part.modules())


def hooks_of(module: Any) -> tuple[Any, ...]:
    """The hooks on a module, forward and backward, that no library left there for itself."""
    # Most modules have none, and this is asked of all of them.
    if not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return ()
    from transformer_lens.hook_points import HookPoint

    forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if not isinstance(module, HookPoint):
        forward = tuple(hook for hook in forward if not _is_own(hook))
    return (*forward, *module._backward_hooks.values(), *module._backward_pre_hooks.values())


def plain_norm(norm: Any) -> tuple[Float[Tensor, "d_model"], float] | None:
    """Weight and epsilon of a bridge's norm, if it does what :func:`rms_norm` does, by trial."""
    weight = getattr(norm.original_component, "weight", None)
    epsilon = getattr(norm.original_component, "variance_epsilon", None)
    if not isinstance(epsilon, float) or not isinstance(weight, Tensor):
        return None
    if weight.dtype is not torch.float32 or weight.requires_grad:
        return None
    # One row far above epsilon and one below it.
    row = torch.linspace(-1, 1.5, weight.numel(), device=weight.device)
    rows = torch.stack([row, row * epsilon**0.5])
    with torch.no_grad():
        expected = norm.original_component(rows)
        found = rms_norm(rows, weight, epsilon)
    return (weight, epsilon) if torch.allclose(found, expected, rtol=1e-5, atol=0) else None


def _is_own(hook: Any) -> bool:
    """Whether a library put a hook there for itself, which keeps what it sees and no more.

    TransformerLens has one on each norm; Hugging Face leaves some once it was asked for all states.
    """
    return str(getattr(hook, "__module__", "")).startswith(_KEEPING)


def _is_plain_call(block: Any, arguments: Mapping[str, Any]) -> bool:
    mask, angles = arguments.get("attention_mask"), arguments.get("position_embeddings")
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
