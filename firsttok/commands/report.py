"""``firsttok report``: write the report on what the scripts found."""

import argparse
from pathlib import Path

from firsttok.console import show
from firsttok.options import model_label
from firsttok.report import write_reports

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Write the pages of one model, or of all, and print their paths.

    Raises:
        FirsttokError: If there is no result, or a file is not what a script writes.
    """
    model = None if args.model is None else model_label(args.model)
    for path in write_reports(Path(args.out), model):
        show(str(path))
