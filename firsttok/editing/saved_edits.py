"""Edits read from files: what they may hold, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from firsttok.arguments import taken, whole_number
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit
from firsttok.editing.record import checked_record
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.models import PORTS, Place
from firsttok.storage import read_safetensors

__all__ = ["load_edit"]


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
        if "layer" in record:
            tensors, record = _of_firsttok_1(tensors, record)
        saved = checked_record(record)
        return Edit(
            deltas=tuple(_deltas(tensors)),
            components=saved["components"],
            losses=tuple(saved["losses"]),
            provenance=saved["provenance"],
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


def _deltas(tensors: Mapping[str, Tensor]) -> list[Delta]:
    found: dict[Place, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        *stack, layer, port, part = name.split(".")
        number = whole_number(int(layer.removeprefix("layer")), "layer", least=0)
        place = Place(".".join(stack) or "blocks", number, port)
        if port not in PORTS or part not in ("left", "right", "dense"):
            raise ValueError(name)
        found.setdefault(place, {})[part] = tensor
    return [_delta(place, parts) for place, parts in sorted(found.items())]


def _delta(place: Place, parts: dict[str, Tensor]) -> Delta:
    if "dense" in parts:
        (dense,) = parts.values()
        return Delta(place=place, left=dense)
    return Delta(place=place, left=parts["left"], right=parts["right"])


def _of_firsttok_1(
    tensors: Mapping[str, Tensor], record: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file of one vector a side and one fact, as today's would be."""
    stack = "" if record["stack"] == "blocks" else f"{record['stack']}."
    place = f"{stack}layer{whole_number(record['layer'], 'layer', least=0)}.out"
    provenance = dict(record["provenance"])
    if "fact" in provenance:
        provenance["facts"] = [provenance.pop("fact")]
    return (
        {f"{place}.left": tensors["left"][:, None], f"{place}.right": tensors["right"][None]},
        {"components": record["report"], "losses": record["losses"], "provenance": provenance},
    )
