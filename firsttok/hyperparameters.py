"""The numbers of the value optimisation, and those the papers used for each model."""

from dataclasses import asdict, dataclass, replace
from math import isfinite

from firsttok.arguments import take_fields
from firsttok.errors import HyperparameterError

__all__ = ["Hyperparameters", "SpreadSettings"]


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Settings of ROME's value optimisation (Meng et al. 2022, Section 3.1).

    Raises:
        HyperparameterError: If a number is outside its range.
    """

    steps: int = 25
    """Loss evaluations; the last makes no update, so there are at most ``steps - 1`` updates."""
    learning_rate: float = 0.5
    """Adam's learning rate."""
    weight_decay: float = 1e-3
    """Factor of ``||delta|| / ||anchor||^2`` in the loss."""
    clamp: float = 4.0
    """``||delta||`` is projected to at most this many times ``||anchor||``."""
    kl: float = 0.0625
    """Factor of the KL divergence at the subject's last token of ``"{subject} is a"``."""
    stop_below: float = 5e-2
    """The optimisation ends as soon as the loss is below this."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        take_fields(self)
        if self.steps < 1:
            raise HyperparameterError(f"steps is {self.steps}; give a whole number of at least 1")
        for name in ("learning_rate", "weight_decay", "clamp", "kl", "stop_below"):
            value: float = getattr(self, name)
            positive = name in ("learning_rate", "clamp")
            if not isfinite(value) or value < 0 or (positive and value == 0):
                bound = "greater than 0" if positive else "of at least 0"
                raise HyperparameterError(f"{name} is {value}; give a finite number {bound}")

    def stretched(self, factor: float) -> "Hyperparameters":
        """Settings under which the value may be ``factor`` times as long beside its anchor.

        Clamp and learning rate grow alike, and no weight decay draws the value back.
        """
        return replace(
            self,
            clamp=self.clamp * factor,
            learning_rate=self.learning_rate * factor,
            weight_decay=0.0,
        )

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers for provenance records."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SpreadSettings:
    """Settings of MEMIT, EMMET and AlphaEdit on a model.

    Raises:
        HyperparameterError: If a number is outside its range.
    """

    layers: tuple[int, ...]
    """Layers to edit, in order."""
    weight: float
    """MEMIT's lambda: how many pretended tokens C stands for."""
    threshold: float = 2e-2
    """AlphaEdit keeps what C holds in eigenvectors of at least this eigenvalue."""
    ridge: float = 10.0
    """What AlphaEdit adds to the diagonal (``L2`` in its settings)."""
    hyperparameters: Hyperparameters
    """Settings of the optimisation of z."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        take_fields(self)
        for name in ("weight", "threshold", "ridge"):
            value: float = getattr(self, name)
            if not isfinite(value) or value <= 0:
                raise HyperparameterError(f"{name} is {value}; give a finite number above 0")

    def moved(self, by: int) -> tuple[int, ...]:
        """The layers, each so many layers higher; those below the first one are left out."""
        return tuple(each + by for each in self.layers if each + by >= 0)
