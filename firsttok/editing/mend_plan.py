"""What fixes a training of MEND's network."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from firsttok.arguments import LARGEST, seed_number, take_fields, whole_number
from firsttok.editing.mend_edits import MOST_EDITS
from firsttok.errors import BadInputError
from firsttok.models import PORTS, Model, Place

__all__ = ["MendPlan", "MendTarget"]

_MOST = {
    "steps": 10**9,
    "batch": MOST_EDITS,
    "edits": MOST_EDITS,
    "texts": 10**9,
    "validation": MOST_EDITS,
    "rank": 10**9,
    "every": 10**9,
    "patience": 10**9,
}
"""The largest whole numbers of a plan; a model's rows and the shipped text may allow fewer."""


class MendTarget(str, Enum):
    """Behind which prompt the target is to be likely after the edit."""

    SAME = "same"
    """The very prompt of the edit, as in the fork of EasyEdit."""
    REPHRASE = "rephrase"
    """A rephrase of it, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class MendPlan:
    """What fixes a training; two trainings of one plan on one model give the same network.

    Raises:
        BadInputError: If a number is out of range.
    """

    layers: tuple[int, ...] = ()
    """Layers whose MLPs are changed, all matrices of each; empty for the last three."""
    target: MendTarget = MendTarget.REPHRASE
    """Where the edit's loss is read."""
    steps: int = 300
    """Most steps of Adam."""
    batch: int = 4
    """Edits of a step, all different, each made alone on the unedited model."""
    seed: int = 0
    """Seed of the network, of the edits and of the text."""
    edits: int = 1000
    """Edits to train on, at most 20 000."""
    texts: int = 500
    """Windows of text that is to stay as it was, at most as many as the shipped text has."""
    validation: int = 40
    """Edits to stop by, of other subjects, each with a window of its own."""
    rank: int = 64
    """Rank of the networks' blocks, at most the width of their rows."""
    lr: float = 1e-4
    """Adam's learning rate of the networks."""
    rate: float = -1e-3
    """The rate that every matrix begins with; negative ones go down the gradient."""
    rate_lr: float = 1e-5
    """Adam's learning rate of the rates."""
    edit_weight: float = 0.1
    """Weight of the edit's NLL in the loss."""
    locality_weight: float = 1.0
    """Weight of the divergence."""
    every: int = 50
    """Steps between two looks at the validation edits, at which the training is saved, too."""
    patience: int = 10
    """Looks without a better one, after which the training ends."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        take_fields(self)
        for name, most in _MOST.items():
            whole_number(getattr(self, name), name, least=1, most=most)
        if self.batch > self.edits:
            raise BadInputError(
                f"batch is {self.batch}, and there are {self.edits} edits to train on; give at "
                "most so many"
            )
        for name in ("lr", "rate_lr"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise BadInputError(f"{name} is {getattr(self, name)}; give a number above 0")
        if not abs(self.rate) <= LARGEST:
            raise BadInputError(f"rate is {self.rate}; give a finite number")
        weights = (self.edit_weight, self.locality_weight)
        if not all(0 <= weight <= LARGEST for weight in weights) or not any(weights):
            raise BadInputError(
                f"edit_weight and locality_weight are {weights[0]} and {weights[1]}; give numbers "
                "of at least 0, and one above it"
            )
        if len(set(self.layers)) < len(self.layers):
            raise BadInputError(f"the layers are {list(self.layers)}; give each once")
        seed_number(self.seed)

    def places(self, model: Model) -> tuple[Place, ...]:
        """The matrices of a model that are changed, layer by layer.

        Raises:
            BadInputError: If a layer is the first one, below which there is nothing to keep, or the
                rank is larger than the width of the rows.
            LayerOutOfRangeError: If there is no such layer.
        """
        count = model.n_layers
        layers = self.layers or tuple(range(max(count - 3, 1), count))
        found: list[Place] = []
        for layer in sorted(layers):
            if layer < 1:
                raise BadInputError("MEND is trained on layers above the first; leave layer 0 out")
            place = model.site(layer).place
            every = [place._replace(port=port) for port in PORTS]
            found += [each for each in every if each in model.weights.sites]
        width = min(sum(model.site_at(each).matrix.shape) for each in found)
        if self.rank > width:
            raise BadInputError(
                f"rank is {self.rank}, and the rows of {model.name} that the network takes are "
                f"{width} wide; give at most so much"
            )
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain content for records."""
        return asdict(self) | {"layers": list(self.layers), "target": self.target.value}
