"""Edits read from files: what they may hold, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from firsttok.arguments import taken, whole_number
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.models import PORTS, Place
from firsttok.storage import read_safetensors

__all__ = ["load_edit"]

_OBJECTS = ("contexts", "editor", "hyperparameters", "method", "model", "second_moment", "versions")
"""Parts of the provenance that are read again, each an object if it is there."""


@taken
def load_edit(path: str | Path) -> Edit:
    """Read an edit written by :meth:`Edit.save`, or a rank-one edit of firsttok 1.

    Applying it checks the model.

    Raises:
        BadInputError: If the file is missing, truncated or no edit.
        NonFiniteError: If a factor holds NaN or infinity.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path, "an edit")
    try:
        record = json.loads(metadata["firsttok_edit"])
        provenance = _checked_provenance(record["provenance"])
        if "layer" in record:
            layer = whole_number(record["layer"], "layer", least=0)
            place = Place(str(record["stack"]), layer)
            factors = {place: {"left": tensors["left"][:, None], "right": tensors["right"][None]}}
        else:
            factors = _factors_of(tensors)
        if any(set(each) not in ({"dense"}, {"left", "right"}) for each in factors.values()):
            raise ValueError("factors")
        deltas = [
            Delta(place=place, left=each.get("dense", each.get("left")), right=each.get("right"))  # pyright: ignore[reportArgumentType]
            for place, each in factors.items()
        ]
        return Edit(
            deltas=tuple(deltas),
            components=_numbers(record["report" if "layer" in record else "components"]),
            losses=tuple(record["losses"]),
            provenance=provenance,
        )
    except NonFiniteError:
        raise NonFiniteError(f"{path} holds NaN or infinity; compute the edit again") from None
    except (
        AttributeError,
        BadInputError,
        IndexError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
    ):
        raise BadInputError(f"{path} is no edit saved by firsttok; save one with --save") from None


def _factors_of(tensors: Mapping[str, Tensor]) -> dict[Place, dict[str, Tensor]]:
    found: dict[Place, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        *stack, layer, port, part = name.split(".")
        if port not in PORTS or part not in ("left", "right", "dense"):
            raise ValueError(name)
        number = int(layer.removeprefix("layer"))
        place = Place(".".join(stack) or "blocks", whole_number(number, "layer", least=0), port)
        found.setdefault(place, {})[part] = tensor
    return dict(sorted(found.items()))


def _numbers(given: Any) -> dict[str, float]:
    if not isinstance(given, dict):
        raise TypeError("components")
    numbers: dict[str, Any] = given
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(name)
    return {name: float(value) for name, value in numbers.items()}


def _checked_provenance(given: Any) -> dict[str, Any]:
    """What a file says of an edit, where what is read again has the shape that is expected."""
    provenance: dict[str, Any] = dict(given)
    if "fact" in provenance:
        # A rank-one edit of firsttok 1 has one.
        provenance["facts"] = [provenance.pop("fact")]
    objects = [provenance.get(name, {}) for name in _OBJECTS]
    objects += [objects[_OBJECTS.index("model")].get("changed", {})]
    for fact in provenance.get("facts", []):
        rewrite = fact.get("requested_rewrite", {})
        objects += [fact, rewrite, rewrite.get("target_new", {})]
    if not all(isinstance(each, dict) for each in objects):
        raise TypeError("provenance")
    for below in provenance.get("model", {}).get("edits", []):
        if not (isinstance(below["hash"], str) and isinstance(below["title"], str)):
            raise TypeError("edits")
    return provenance
