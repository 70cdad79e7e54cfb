"""What a script left behind, and how a rule reads it: strictly, so that no gap passes unseen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from firsttok.errors import BadInputError
from firsttok.storage import read_json

__all__ = ["LEAST", "NotJudgedError", "ScriptResult", "fixed", "load_result", "load_sweep"]

LEAST = 3
"""Fewest cases of a group that a rule judges by; fewer say too little to call a claim."""


class NotJudgedError(Exception):
    """Rows are missing, or do not allow a judgement; the message is the verdict's reason."""


@dataclass(frozen=True, kw_only=True)
class ScriptResult:
    """The content of ``figures/<model>/<script>.json``."""

    script: str
    """Name of the script, without suffix."""
    rows: tuple[Mapping[str, Any], ...]
    """The measured rows, flat."""
    provenance: Mapping[str, Any]
    """What they were made with."""
    title: str = ""
    """Title of the table the script printed; empty if it kept none."""
    columns: tuple[str, ...] = ()
    """The table's columns."""
    lines: tuple[tuple[Any, ...], ...] = ()
    """The table's lines; a cell is a text, a number or None."""

    def chosen(self, **match: Any) -> list[Mapping[str, Any]]:
        """Rows whose fields have the given values."""
        return [
            row
            for row in self.rows
            if all(row.get(field) == wanted for field, wanted in match.items())
        ]

    def values(self, column: str, *, least: int = LEAST, **match: Any) -> list[float]:
        """One column of the rows that match.

        Raises:
            NotJudgedError: If there are fewer than ``least`` such rows, or a cell is no finite
                number: a hole is often the most extreme case, so it is not passed over.
        """
        rows = self.chosen(**match)
        if len(rows) < least:
            raise NotJudgedError(
                f"{self.script} has {_count(len(rows))}{_where(match)}; {least} are needed."
            )
        found = [row.get(column) for row in rows]
        numbers = [
            float(value)
            for value in found
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        if len(numbers) < len(rows):
            raise NotJudgedError(
                f"{self.script} has no number for {column} in {len(rows) - len(numbers)} of its "
                f"{len(rows)} rows{_where(match)}."
            )
        return numbers

    def number(self, field: str) -> float:
        """One number of the provenance.

        Raises:
            NotJudgedError: If it is not there, or no finite number.
        """
        value = self.provenance.get(field)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise NotJudgedError(f"{self.script} has no number for {field} in its provenance.")
        return float(value)


def fixed(value: float) -> str:
    """A number as the reasons show it: readable at a glance, and never rounded to nothing."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.4f}"


def load_result(folder: Path, script: str) -> ScriptResult | None:
    """Read a script's result; None if it has not been run.

    Raises:
        BadInputError: If the file is not what a script writes.
    """
    path = folder / f"{script}.json"
    if not path.is_file():
        return None
    return _read(path, f"script; run python analyses/{script}.py again")


def load_sweep(folder: Path, name: str) -> ScriptResult:
    """Read what a sweep published.

    Raises:
        BadInputError: If the file is missing, or not what a sweep writes.
    """
    return _read(folder / f"{name}.json", "sweep; publish the run again")


def _read(path: Path, what: str) -> ScriptResult:
    content = read_json(path, "results")
    try:
        record = cast(dict[str, Any], content)
        result = ScriptResult(
            script=path.stem,
            rows=tuple(dict(row) for row in record["rows"]),
            provenance=dict(record["provenance"]),
            title=str(record.get("title", "")),
            columns=_texts(record.get("columns", ())),
            lines=tuple(tuple(line) for line in record.get("lines", ())),
        )
        if any(len(line) != len(result.columns) for line in result.lines):
            raise ValueError("a line has more or fewer cells than there are columns")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInputError(f"{path} is not a result of a firsttok {what}") from None
    return result


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _count(number: int) -> str:
    return f"{number or 'no'} row{'' if number == 1 else 's'}"


def _where(match: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{field} = {value}" for field, value in match.items())
    return f" with {shown}" if shown else ""
