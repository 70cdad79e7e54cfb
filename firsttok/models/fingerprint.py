"""The fingerprint of a model's weights, by which caches and committed results know the model."""

import hashlib
from typing import TYPE_CHECKING

import torch
from jaxtyping import Shaped
from torch import Tensor

from firsttok.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fingerprint_of"]


def fingerprint_of(model: "nn.Module") -> str:
    """SHA-256 over names, shapes, types and bytes of all weights, which have to be finite.

    Args:
        model: The model as loaded; its weights are read only.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        if weight.is_floating_point() and not _is_finite(weight):
            raise NonFiniteError(
                f"weight {key} holds NaN or infinity; the model file is damaged, fetch it again"
            )
        digest.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
        plain = weight.detach().cpu().reshape(-1).view(torch.uint8)
        digest.update(memoryview(plain.numpy()))
    return digest.hexdigest()


def _is_finite(weight: Shaped[Tensor, "..."]) -> bool:
    # The sum is finite only if each term is, and is quick; finite terms may overflow it, though.
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())
