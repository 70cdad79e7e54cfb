"""Norms of a bridge, without what it computes for hook points that nobody listens to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from firsttok.engine.products import runs_plain

__all__ = ["skip_idle_hooks"]

_METHOD = "_hf_autograd_forward_with_hooks"
"""Where TransformerLens runs a norm of Hugging Face and, for its hooks, the same norm again."""


def skip_idle_hooks(bridge: Any) -> None:
    """Let norms run once as long as ``hook_scale`` and ``hook_normalized`` have no hooks.

    TransformerLens computes both whether they are wanted or not, and gives Hugging Face's own
    output back unless a hook changed them: what this skips changes nothing.

    Args:
        bridge: A TransformerBridge; where its norms are made another way, nothing is changed.
    """
    for module in bridge.modules():
        plain = getattr(module, _METHOD, None)
        if plain is not None:
            vars(module)[_METHOD] = _once(module, plain)


def _once(norm: Any, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        points = (norm.hook_scale, norm.hook_normalized)
        if runs_plain() or any(point.fwd_hooks or point.bwd_hooks for point in points):
            return plain(hidden)
        output: Tensor = norm.original_component(hidden)
        return output.to(hidden.dtype)

    return forward
