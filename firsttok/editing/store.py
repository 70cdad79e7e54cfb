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
from firsttok.provenance import described
from firsttok.storage import content_hash, read_tensors, write_tensors

__all__ = ["ValueStore"]

_FORMAT = 2


class ValueStore:
    """A folder of values, each under a hash of everything that determines it."""

    def __init__(self, folder: str | Path) -> None:
        """Use a folder; it is made on the first write."""
        self.folder: Path = Path(folder)

    def path(
        self,
        identity: str,
        fact: Fact,
        *,
        contexts: ContextSet,
        slot: Slot,
        layer: int,
        hyperparameters: Hyperparameters,
        key_source: KeySource = ORDINARY_KEYS,
    ) -> Path:
        """Return where the value of a fact under these settings is kept.

        Args:
            identity: Identity of the model's view that it is optimised on.
            fact: The fact.
            contexts: Contexts of the rewriting prompts.
            slot: Which key's output the anchor is.
            layer: The edited layer.
            hyperparameters: Settings of the optimisation.
            key_source: Where the keys come from.

        Raises:
            TypeError: If the key source cannot be described.
        """
        key: list[Any] = [
            _FORMAT,
            identity,
            [fact.subject, fact.template, fact.target_new, fact.join, fact.straddle],
            contexts.content_hash,
            slot.value,
            layer,
            hyperparameters.as_dict(),
        ]
        if key_source is not ORDINARY_KEYS:
            key.append(described(key_source))
        return self.folder / f"{content_hash(key)[:24]}.safetensors"

    def read(self, path: Path, model: Model) -> Value | None:
        """Read a value; None if it is not there or damaged."""
        try:
            tensors, metadata = read_tensors(path, "a value")
            return Value(
                target=tensors["target"].to(model.device),
                anchor=tensors["anchor"].to(model.device),
                slot=Slot(metadata["slot"]),
                losses=tuple(json.loads(metadata["losses"])),
            )
        except (BadInputError, KeyError, TypeError, ValueError):
            return None

    def write(self, path: Path, value: Value) -> None:
        """Write a value atomically.

        Raises:
            CacheError: If the folder cannot be written to.
        """
        tensors = {"target": value.target, "anchor": value.anchor}
        write_tensors(path, tensors, {"slot": value.slot.value, "losses": json.dumps(value.losses)})
