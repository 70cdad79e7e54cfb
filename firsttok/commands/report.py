"""``firsttok report``: write the report on what the scripts found."""

import argparse
from pathlib import Path

from firsttok.console import show
from firsttok.options import folder_name
from firsttok.paper.pages import write_reports
from firsttok.paper.report import result_folders

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Write the pages of one model, or of all, and print their paths."""
    out, model = Path(args.out), args.model
    if model is not None and model not in {folder.name for folder in result_folders(out)}:
        model = folder_name(model)
    for path in write_reports(out, model):
        show(str(path))
