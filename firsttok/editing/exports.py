"""Edited models as folders that transformers loads, and edits in models that it has loaded."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from firsttok.arguments import taken
from firsttok.editing.edit import Edit
from firsttok.errors import BadInputError, CacheError, NonFiniteError
from firsttok.models import EXPORT_RECORD, Model, plain_model, quiet_libraries
from firsttok.models.fingerprint import tensor_hash
from firsttok.models.loading import DTYPES
from firsttok.storage import write_record

__all__ = ["check_export", "export_model"]

_TYPES = {name: DTYPES[name] for name in ("float32", "bfloat16", "float16")}


def check_export(out: Path) -> None:
    """Check that a model can be written to a folder, before work is done for it.

    Raises:
        BadInputError: If the folder is there and not empty, or a file has its name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInputError(f"{out} is there and not empty; name a new folder for the model")


@taken
def export_model(
    model: Model, out: str | Path, *, edits: Sequence[Edit] = (), dtype: str | None = None
) -> Path:
    """Write a view, its edits in the weights, as ``save_pretrained`` of transformers does.

    The folder holds weights, configuration, generation configuration, tokenizer and chat template,
    and beside them every edit as a file of its own and a record of them, by which
    :func:`firsttok.load` says what is in it. It is there as a whole, or not at all.

    Args:
        model: The model, or a view of it.
        out: The folder, new or empty.
        edits: Edits to put in first, in order, on top of those of the view.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for the model's own type.

    Raises:
        BadInputError: If the folder is not empty, the type unknown, or the view has interventions,
            which no checkpoint holds.
        CacheError: If the folder cannot be written.
        EditMismatchError: If an edit was made for another model.
        NonFiniteError: If a weight does not fit into the type.
        UnsupportedModelError: As for :func:`firsttok.models.plain_model`.
    """
    check_export(out := Path(out))
    if dtype is not None and dtype not in _TYPES:
        raise BadInputError(f"dtype {dtype!r} is unknown; choose from {', '.join(_TYPES)}")
    if model.interventions:
        names = ", ".join(change.name for change in model.interventions)
        raise BadInputError(
            f"a folder of weights cannot hold interventions ({names}); export the model without"
        )
    view = model.edited(*edits)
    plain: Any = plain_model(view)
    if dtype is not None:
        plain.to(_TYPES[dtype])
        for name, tensor in plain.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{name} does not fit into {dtype}: an entry would become infinite; take "
                    "bfloat16 or float32"
                )
    state = plain.state_dict()
    edited = sorted({view.weights.name_of(place) for edit in view.edits for place in edit.places})
    record = {
        "model": view.record(),
        "dtype": str(plain.dtype).removeprefix("torch."),
        "weights": {name: tensor_hash(state[name]) for name in edited},
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name[:40]}.", dir=out.parent) as folder:
            whole = Path(folder) / "model"
            with quiet_libraries():
                plain.save_pretrained(str(whole))
                model.tokenizer.save_pretrained(str(whole))
            for number, edit in enumerate(view.edits, 1):
                if isinstance(edit, Edit):
                    (whole / "edits").mkdir(exist_ok=True)
                    edit.save(whole / "edits" / f"{number}.safetensors")
            write_record(whole / EXPORT_RECORD, record)
            if out.is_dir():
                out.rmdir()
            shutil.move(whole, out)
    except OSError as error:
        raise CacheError(
            f"{out} cannot be written ({error.strerror or error}); free some space or choose "
            "another folder"
        ) from None
    return out
