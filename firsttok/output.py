"""Tables: printed beside the paper's numbers, and saved as CSV and JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firsttok.console import show_table
from firsttok.display import Table, cell_text
from firsttok.storage import atomic_path, write_record

__all__ = ["cell_text", "pick", "print_table", "publish", "save_result"]


def publish(
    stem: Path,
    *,
    title: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[Any]],
    rows: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> None:
    """Print a script's table, and leave it with its rows in ``stem.json`` and ``stem.csv``.

    Args:
        stem: Path without suffix, ``figures/<model>/<script>``.
        title: Title of the table.
        columns: Names of its columns.
        lines: Its lines; a cell is a text, a number or None.
        rows: The measured rows, flat, one per observation.
        provenance: What they were made with.
    """
    print_table(title, columns, lines)
    save_result(stem, title=title, columns=columns, lines=lines, rows=rows, provenance=provenance)


def save_result(
    stem: Path,
    *,
    title: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[Any]],
    rows: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> None:
    """As :func:`publish`, without printing.

    Raises:
        ValueError: If a number is not finite.
        CacheError: If a file cannot be written.
    """
    import pandas as pd

    flat = [dict(row) for row in rows]
    table = {"title": title, "columns": list(columns), "lines": [list(line) for line in lines]}
    # JSON first: it refuses NaN, and then there is to be no CSV either.
    record = {**table, "provenance": dict(provenance), "rows": flat}
    write_record(stem.with_name(f"{stem.name}.json"), record)
    with atomic_path(stem.with_name(f"{stem.name}.csv")) as temporary:
        pd.DataFrame(flat).to_csv(temporary, index=False)


def pick(rows: Sequence[Mapping[str, Any]], column: str, **match: Any) -> list[float]:
    """One column of the rows whose other columns have the given values."""
    return [
        float(row[column])
        for row in rows
        if all(row[name] == wanted for name, wanted in match.items())
    ]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output, columns of numbers flush right.

    Args:
        title: Title of the table.
        columns: Names of its columns.
        rows: Its lines; a cell is a text, a number, a truth value or None.

    Raises:
        OutputError: If the output cannot be written.
    """
    lines = [[cell_text(cell) for cell in row] for row in rows]
    show_table(title, columns, lines, left=Table(columns=columns, lines=rows).left)
