"""``firsttok export``: a model with saved edits in it, as a folder that transformers loads."""

import argparse
from pathlib import Path

from firsttok.commands.show import open_model_of
from firsttok.console import show
from firsttok.editing import check_export, export_model, load_edit

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Put the edits into the model, one after another, and write it."""
    edits = [load_edit(path) for path in args.edit]
    out = Path(args.out)
    check_export(out)
    model = open_model_of(edits[0], args.edit[0], name=args.model, device="cpu")
    export_model(model, out, edits=edits, dtype=args.dtype)
    for number, edit in enumerate(edits, 1):
        show(f"edit {number}: {edit.title}")
    show(f"\n{model.label} with {'it' if len(edits) == 1 else 'them'} in its weights: {out}")
