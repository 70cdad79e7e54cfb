"""A change of one weight: two factors of any rank, or a dense matrix."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.errors import BadInputError, NonFiniteError
from firsttok.models import Place
from firsttok.models.fingerprint import tensor_hash
from firsttok.storage import content_hash
from firsttok.tensors import WeightInOut

__all__ = ["Delta"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """A change of one weight, ``W + left @ right``, laid out ``[d_in, d_out]``.

    Raises:
        BadInputError: If the shapes of the factors do not fit, or a number is not finite.
    """

    place: Place
    """The edit site."""
    left: Float[Tensor, "d_in rank"]
    """The left factor; the whole change ``[d_in, d_out]`` where there is no right one."""
    right: Float[Tensor, "rank d_out"] | None = None
    """The right factor; None for a dense change."""

    def __post_init__(self) -> None:
        """Check the factors."""
        factors = [self.left] if self.right is None else [self.left, self.right]
        for factor in factors:
            if factor.ndim != 2 or not factor.is_floating_point():
                raise BadInputError(
                    f"a change of {self.place} needs matrices of real numbers, not a tensor of "
                    f"shape {list(factor.shape)} and type {str(factor.dtype)[6:]}"
                )
            if not bool(torch.isfinite(factor).all()):
                raise NonFiniteError(
                    f"the change of {self.place} holds NaN or infinity; compute the edit again"
                )
        if self.right is not None and self.left.shape[1] != self.right.shape[0]:
            raise BadInputError(
                f"the factors of a change of {self.place} have ranks {self.left.shape[1]} and "
                f"{self.right.shape[0]}; give them the same"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``d_in`` and ``d_out``."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def rank(self) -> int:
        """Columns of the left factor, an upper bound of the change's rank."""
        return min(self.shape) if self.right is None else self.left.shape[1]

    @property
    def matrix(self) -> WeightInOut:
        """The dense change."""
        return self.left if self.right is None else self.left @ self.right

    @property
    def norm(self) -> float:
        """Frobenius norm; from the factors' Gram matrices, so that no dense matrix is made."""
        if self.right is None:
            return float(self.left.double().norm())
        left, right = self.left.double(), self.right.double()
        if self.rank == 1:
            return float(left.norm() * right.norm())
        return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))

    @property
    def content_hash(self) -> str:
        """SHA-256 of what it does: its place and its factors."""
        place, factors = self.place, [self.left, self.right]
        if place.port == "out" and self.right is not None and self.rank == 1:
            # As edits of firsttok 1 are named in what was computed on them.
            left, right = tensor_hash(self.left[:, 0]), tensor_hash(self.right[0])
            return content_hash([place.stack, place.layer, left, right])
        return content_hash([*place, *(None if f is None else tensor_hash(f) for f in factors)])

    def change(self, inputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the weight's output gains, ``(x left) right``, in the wider of both types."""
        wide = inputs.to(torch.promote_types(inputs.dtype, self.left.dtype))
        gained = wide @ self.left.to(wide)
        return gained if self.right is None else gained @ self.right.to(wide)

    def __mul__(self, factor: float) -> "Delta":
        """The change, scaled."""
        if self.right is None:
            return replace(self, left=factor * self.left)
        return replace(self, right=factor * self.right)

    def __add__(self, other: "Delta") -> "Delta":
        """Both changes of one weight; factors stay factors.

        Raises:
            BadInputError: If they are of different weights.
        """
        if self.place != other.place or self.shape != other.shape:
            raise BadInputError(
                f"changes of {self.place} {list(self.shape)} and {other.place} "
                f"{list(other.shape)} are not of one weight; put them into one edit"
            )
        if self.right is None or other.right is None:
            return Delta(place=self.place, left=self.matrix + other.matrix)
        return Delta(
            place=self.place,
            left=torch.cat([self.left, other.left], dim=1),
            right=torch.cat([self.right, other.right]),
        )
