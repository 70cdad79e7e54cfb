"""Optimised values on disk, so that an interrupted run goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing.methods import Slot
from firsttok.editing.value import Value
from firsttok.errors import BadInputError
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import ORDINARY_KEYS, KeySource
from firsttok.models import Model
from firsttok.prompts import joint_key
from firsttok.storage import atomic_path, content_hash, read_safetensors

__all__ = ["ValueStore"]

_FORMAT = 1


class ValueStore:
    """A folder of values, each under a hash of everything that determines it."""

    def __init__(self, folder: str | Path) -> None:
        """Use a folder; it is made on the first write."""
        self.folder: Path = Path(folder)

    def path(
        self,
        model: Model,
        fact: Fact,
        *,
        contexts: ContextSet,
        slot: Slot,
        layer: int,
        hyperparameters: Hyperparameters,
        key_source: KeySource = ORDINARY_KEYS,
    ) -> Path:
        """Return where the value of a fact under these settings lies."""
        key: list[Any] = [
            _FORMAT,
            model.fingerprint,
            str(model.dtype)
            if model.dtype is model.wide_dtype
            else f"{model.dtype}, float32 deltas",
            list(model.leading_ids),
            [fact.subject, fact.template, fact.target_new, *joint_key(model, fact)],
            contexts.content_hash,
            slot.value,
            layer,
            hyperparameters.as_dict(),
        ]
        if model.interventions or key_source is not ORDINARY_KEYS:
            # By their fields, not by their names, which a user gives.
            key.append([repr(key_source), *map(repr, model.interventions)])
        return self.folder / f"{content_hash(key)[:24]}.safetensors"

    def read(self, path: Path, model: Model) -> Value | None:
        """Read a value; None if it is not there or damaged."""
        try:
            tensors, metadata = read_safetensors(path, "a value")
            return Value(
                target=tensors["target"].to(model.device),
                anchor=tensors["anchor"].to(model.device),
                slot=Slot(metadata["slot"]),
                losses=tuple(json.loads(metadata["losses"])),
            )
        except (BadInputError, KeyError, ValueError):
            return None

    def write(self, path: Path, value: Value) -> None:
        """Write a value atomically.

        Raises:
            CacheError: If the folder cannot be written to.
        """
        from safetensors.torch import save_file

        tensors = {"target": value.target.cpu(), "anchor": value.anchor.cpu().contiguous()}
        metadata = {"slot": value.slot.value, "losses": json.dumps(value.losses)}
        with atomic_path(path) as temporary:
            save_file(tensors, str(temporary), metadata)
