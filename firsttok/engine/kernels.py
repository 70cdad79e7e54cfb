"""A norm and a rotation that are one step of the graph each, forward and backward."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["rms_norm", "rotate"]


def rms_norm(
    hidden: Float[Tensor, "*batch d_model"], weight: Float[Tensor, "d_model"], epsilon: float
) -> Float[Tensor, "*batch d_model"]:
    """Return ``hidden / sqrt(mean(hidden**2) + epsilon) * weight``.

    Only ``hidden`` has a gradient.
    """
    return _RMSNorm.apply(hidden, weight, epsilon)


def rotate(
    states: Float[Tensor, "*batch d_head"],
    cos: Float[Tensor, "*#batch d_head"],
    sin: Float[Tensor, "*#batch d_head"],
) -> Float[Tensor, "*batch d_head"]:
    """Rotary embedding in Llama's convention: a token's two halves are the planes' two axes.

    Only ``states`` has a gradient.
    """
    return _Rotation.apply(states, cos, sin)


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
