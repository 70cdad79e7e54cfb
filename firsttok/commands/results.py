"""``firsttok results``: the papers' tables from a sweep, or the answer to a query over its rows."""

import argparse
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from firsttok.console import print_table, show, show_json
from firsttok.errors import BadInputError
from firsttok.options import folder_name
from firsttok.storage import atomic_path
from firsttok.sweep.groups import GroupedRows
from firsttok.sweep.results import RunResults, read_run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["run"]

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Print the tables of a run, or the answer to a query; keep rows and figures if asked to.

    Raises:
        FirsttokError: If the run or an option is unusable.
    """
    results = read_run(args.run)
    if args.model is not None:
        results = results.of(args.model)
    answer: pd.DataFrame | None = None
    if args.sql is None:
        _print_run(results, as_json=args.json)
    elif args.figures:
        raise BadInputError("--figures draws the whole run, not an answer; leave out --sql")
    else:
        answer = results.sql(args.sql, seconds=args.sql_seconds)
        _print_answer(answer, as_json=args.json)
    kept: list[Path] = []
    if args.csv is not None:
        kept.append(Path(args.csv))
        with atomic_path(kept[0]) as temporary:
            frame = results.frame() if answer is None else answer
            frame.to_csv(temporary, index=False)
    if args.figures is not None:
        kept += _draw(results, Path(args.figures))
    if not args.json:
        for path in kept:
            show(str(path))


def _print_answer(answer: "pd.DataFrame", *, as_json: bool) -> None:
    columns = [str(name) for name in answer.columns]
    rows = [list(row) for row in answer.itertuples(index=False, name=None)]
    if as_json:
        show_json(_plain({"columns": columns, "rows": rows}))
    elif rows:
        # All of it, however wide: a query says itself which columns and how many rows it wants.
        show(answer.to_string(index=False, na_rep="-", float_format="{:.6g}".format))
    else:
        show(f"no rows ({', '.join(columns)})")


def _print_run(results: RunResults, *, as_json: bool) -> None:
    tables = results.tables()
    if as_json:
        record = {
            "progress": [asdict(each) for each in results.progress()],
            "tables": [asdict(table) for table in tables],
            "manifest": dict(results.manifest),
        }
        show_json(_plain(record))
        return
    for each in results.progress():
        show(str(each))
    if not results.models:
        show("no model has begun with this run")
    for table in tables:
        show()
        print_table(table.title, table.columns, table.lines)


def _plain(value: Any) -> Any:
    """A value as JSON has it; what is missing or no finite number is null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        record = cast(dict[Any, Any], value)
        return {str(key): _plain(each) for key, each in record.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast(list[Any], value)]
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


def _draw(results: RunResults, folder: Path) -> Iterator[Path]:
    """|Delta| against entropy, a panel per method, as in Figures 2 and 5 of "Rebuilding ROME"."""
    for model in results.models:
        rows = results.grouped(model)
        if not any(rows.pick("entropy", method) for method in rows.methods):
            logger.warning("%s: no entropy was measured, so there is nothing to draw", model)
            continue
        stem = folder / f"{folder_name(model)}_delta_entropy"
        _scatter(rows, stem)
        yield stem.with_name(f"{stem.name}.png")


def _scatter(rows: GroupedRows, stem: Path) -> None:
    # They take seconds to import, and only a figure needs them.
    from firsttok.paper.figures import PALETTE, figure, plain, save_figure

    drawn, axes = figure(len(rows.methods))
    for axis, method in zip(axes, rows.methods, strict=True):
        # Collapse cases last, on top of the many others.
        for cases in sorted(rows.groups, reverse=True):
            points = [
                (record["mean_delta"], record["entropy"])
                for record in rows.done.get((method, cases), ())
                if None not in (record["mean_delta"], record["entropy"])
            ]
            # As pixels: a sweep has more points than a vector graphic should hold.
            axis.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                s=14,
                alpha=0.6,
                color=PALETTE.get(cases, "grey"),
                label=f"{cases} (n={len(points)})",
                rasterized=True,
            )
        axis.set_title(plain(f"{rows.model}, {rows.label(method)}"))
        axis.set_xscale("log")
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("|Delta|")
        axis.set_ylabel("normalised entropy of generations")
        axis.legend(title=None)
    # One scale for all panels: the methods' sizes are what is to be compared.
    limits = [limit for axis in axes for limit in axis.get_xlim()]
    for axis in axes:
        axis.set_xlim(min(limits), max(limits))
    save_figure(stem, drawn)
