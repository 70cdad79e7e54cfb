"""``firsttok audit``: where two states of a model differ, and what became of it."""

import argparse
from pathlib import Path

from firsttok.auditing import audit
from firsttok.console import progress_bar, show, show_json
from firsttok.editing import load_edit
from firsttok.escapes import finite
from firsttok.inputs import texts_from
from firsttok.models import BosPolicy, load

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Open both states, compare them, and print what was found."""
    edit = load_edit(args.second) if Path(args.second).suffix == ".safetensors" else None
    texts = texts_from(args)
    before = load(args.before, dtype=args.dtype, device=args.device)
    after = edit or load(args.second, dtype=args.dtype, device=args.device)
    with progress_bar() as progress:
        bos = BosPolicy(args.text_bos)
        found = audit(before, after, texts=texts, text_bos=bos, progress=progress)
    if args.json:
        show_json(finite(found.as_dict()))
    else:
        show(found.panel().text)
