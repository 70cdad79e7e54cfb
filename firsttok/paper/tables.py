"""An experiment's table: printed beside the paper's numbers, and kept with rows and verdicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firsttok.console import print_table, show
from firsttok.data import paper_values
from firsttok.paper.claims import Claim, ScriptResult, judge
from firsttok.storage import save_result

__all__ = ["MEASURES", "accuracy_line", "collapsed_of", "pick", "printed", "publish"]

MEASURES = ("efficacy", "generalization", "locality")
"""Columns of Tables 4 and 5."""


def publish(
    stem: Path,
    *,
    title: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[Any]],
    rows: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    claims: Sequence[Claim] = (),
) -> None:
    """Print a script's table and the verdicts on its claims, and keep them with its rows.

    Args:
        stem: Path without suffix, ``figures/<model>/<script>``, of ``.json`` and ``.csv``.
        title: Title of the table.
        columns: Names of its columns.
        lines: Its lines; a cell is a text, a number or None.
        rows: The measured rows, flat, one per observation.
        provenance: What they were made with.
        claims: What the rows decide.

    Raises:
        ValueError: If a number is not finite.
        CacheError: If a file cannot be written.
    """
    result = ScriptResult(script=stem.name, rows=tuple(rows), provenance=provenance)
    judged = tuple(judge(claim, result) for claim in claims)
    print_table(title, columns, lines)
    for each in judged:
        show(f"{each.label} ({each.place}): {each.sentence}")
    table = {"title": title, "columns": list(columns), "lines": [list(line) for line in lines]}
    verdicts = [each.as_dict() for each in judged]
    save_result(stem, {**table, "claims": verdicts, "provenance": provenance, "rows": rows})


def pick(rows: Sequence[Mapping[str, Any]], column: str, **match: Any) -> list[float]:
    """One column of the rows whose other columns have the given values."""
    return [
        float(row[column])
        for row in rows
        if all(row[name] == wanted for name, wanted in match.items())
    ]


def collapsed_of(rows: Sequence[Mapping[str, Any]], **match: Any) -> str:
    """How many of the rows that match are edits which destroyed the model."""
    flags = pick(rows, "collapsed", **match)
    return f"{int(sum(flags))} of {len(flags)}"


def printed(table: str) -> tuple[list[str], dict[tuple[str, str], float]]:
    """Models of a table of the paper, in its order, and its numbers by row and model."""
    values = paper_values(table)
    models = list(dict.fromkeys(value.model for value in values))
    return models, {(value.row, value.model): value.value for value in values}


def accuracy_line(name: str, rows: Sequence[Mapping[str, Any]], **match: Any) -> list[object]:
    """One line of Table 4 or 5: name, number of cases, and three means in percent."""
    chosen = [row for row in rows if all(row[key] == value for key, value in match.items())]
    line: list[object] = [name, len(chosen)]
    for column in MEASURES:
        values = [row[column] for row in chosen if row[column] is not None]
        line.append(100.0 * sum(values) / len(values) if values else None)
    return line
