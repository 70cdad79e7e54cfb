"""``firsttok data``: list the published data sets, pull one, or put facts together."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from firsttok.console import progress_bar, show
from firsttok.data import DATA_SETS, Fact, is_pulled_data, pull_data
from firsttok.data.records import LINES
from firsttok.output import print_table
from firsttok.storage import atomic_path

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """List the data sets, pull the named one, or write synthetic facts.

    Raises:
        FirsttokError: If an argument makes no sense, or something cannot be fetched or written.
    """
    if args.action == "list":
        _list()
    elif args.action == "pull":
        _pull(args)
    else:
        _synthesize(args)


def _list() -> None:
    rows = [
        [
            each.name,
            each.kind,
            each.records,
            each.megabytes,
            "no address" if each.url is None else "SHA-256" if each.sha256 else "at first pull",
            "yes" if is_pulled_data(each.name) else "no",
        ]
        for each in DATA_SETS
    ]
    print_table("Data sets", ["name", "holds", "records", "MB", "pinned", "in the cache"], rows)
    for each in DATA_SETS:
        show(f"{each.name}: {each.note}")


def _pull(args: argparse.Namespace) -> None:
    with progress_bar() as progress:
        path = pull_data(
            args.name, url=args.url, sha256=args.sha256, out=args.out, progress=progress
        )
    show(str(path))


def _synthesize(args: argparse.Namespace) -> None:
    out = Path(args.out)
    from firsttok.models import load
    from firsttok.synthetic import synthetic_facts

    model = load(args.model)
    facts = synthetic_facts(model, args.count, seed=args.seed)
    with progress_bar() as progress:
        shown = progress.track(facts, total=args.count, description="facts")
        with atomic_path(out) as temporary:
            _write(temporary, shown, lines=out.suffix.lower() in LINES)
    show(f"{args.count} facts: {out}")


def _write(path: Path, facts: Iterable[Fact], *, lines: bool) -> None:
    """Write records as they come, as a JSON list or one a line."""
    with path.open("w", encoding="utf-8") as file:
        file.write("" if lines else "[\n")
        for index, fact in enumerate(facts):
            if index:
                file.write("\n" if lines else ",\n")
            file.write(json.dumps(fact.as_record(), ensure_ascii=False))
        file.write("\n" if lines else "\n]\n")
