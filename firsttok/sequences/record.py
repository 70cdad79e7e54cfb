"""What a sequence left: rows of its steps and of earlier facts, in parts that do not grow."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from firsttok.display import Note, Panel, Shown, Table
from firsttok.editing import load_edit
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.models import Model
from firsttok.rows import DONE, FAILED, Row, read_rows, write_rows
from firsttok.sequences.plan import SequencePlan
from firsttok.svg import Plot

__all__ = [
    "PART",
    "ROLLED_BACK",
    "SCREENED",
    "SequenceRun",
    "cut_older_files",
    "edit_path",
    "first_of_part",
    "is_sound",
    "is_written",
    "read_part",
    "read_steps",
    "retained_cases",
    "retained_path",
    "retained_paths",
    "steps_path",
]

logger = logging.getLogger(__name__)
PART = 500
"""Rows of a file, at most; no more are in memory while a sequence is run."""
SCREENED = "screened"
"""A guard left the fact out before its edit."""
ROLLED_BACK = "rolled back"
"""A guard took the edit of the fact back."""


def edit_path(folder: Path, step: int) -> Path:
    """The file of a step's edit."""
    return folder / "edits" / f"{step:04d}.safetensors"


def first_of_part(step: int) -> int:
    """The first step whose row is in the same file."""
    return step - (step - 1) % PART


def steps_path(folder: Path, first: int) -> Path:
    """The file of the rows of :data:`PART` steps."""
    return folder / "steps" / f"{first:06d}.parquet"


def retained_path(folder: Path, step: int, number: int) -> Path:
    """A file of :data:`PART` rows of a checkpoint."""
    return folder / "retained" / f"{step:06d}-{number:04d}.parquet"


def retained_paths(folder: Path, step: int) -> list[Path]:
    """Files of the rows of a checkpoint, in order."""
    return sorted((folder / "retained").glob(f"{step:06d}-*.parquet"))


def read_part(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there or damaged."""
    try:
        return read_rows(path) if path.is_file() else []
    except BadInputError as error:
        logger.warning("%s", error)
        return []


def read_steps(folder: Path) -> list[Row]:
    """The rows of all steps, each with every column that one of them has."""
    rows = [r for path in sorted((folder / "steps").glob("*.parquet")) for r in read_part(path)]
    empty = dict.fromkeys(name for row in rows for name in row)
    return [Row({**empty, **row}) for row in rows]


def retained_cases(folder: Path, step: int) -> list[int]:
    """Case ids of the rows of a checkpoint, as far as its files are sound."""
    return [row.case_id for path in retained_paths(folder, step) for row in read_part(path)]


def cut_older_files(folder: Path) -> None:
    """Put the rows of a folder whose tables were one file each into parts.

    Raises:
        CacheError: If a file cannot be written.
    """
    whole = folder / "steps.parquet"
    for first, rows in groupby(read_part(whole), lambda row: first_of_part(row.step)):
        write_rows(steps_path(folder, first), rows)
    whole.unlink(missing_ok=True)
    whole = folder / "retained.parquet"
    for step, group in groupby(read_part(whole), lambda row: row.step):
        rows = list(group)
        for start in range(0, len(rows), PART):
            path = retained_path(folder, step, start // PART)
            write_rows(path, rows[start : start + PART])
    whole.unlink(missing_ok=True)


def is_written(row: Mapping[str, Any]) -> bool:
    """Whether the edit of a step is in the model."""
    return row["status"] == DONE and row.get("guard") is None


def is_sound(perplexity: float) -> bool:
    """Whether a perplexity is no collapse; one that is no number is one."""
    return perplexity <= COLLAPSE_THRESHOLD


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SequenceRun(Shown):
    """What a sequence did to a model, as far as it has come."""

    name: str
    folder: Path
    plan: SequencePlan
    original_perplexity: float
    steps: tuple[Row, ...]
    """A row for each fact, in order, with ``step``, counted from 1."""

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps after which all facts that were written until then were measured."""
        names = (path.name for path in (self.folder / "retained").glob("*.parquet"))
        return tuple(sorted({int(name.partition("-")[0]) for name in names}))

    @property
    def retained(self) -> tuple[Row, ...]:
        """All of :meth:`retained_at`, checkpoint by checkpoint, read anew each time.

        Raises:
            BadInputError: As :meth:`retained_at` does.
        """
        return tuple(row for step in self.checkpoints for row in self.retained_at(step))

    def retained_at(self, step: int) -> tuple[Row, ...]:
        """Read the rows of a checkpoint: each fact that was written until then, as it is now.

        Args:
            step: The checkpoint's step.

        Returns:
            The rows, by their case id; none where there is no checkpoint.

        Raises:
            BadInputError: If a file is damaged.
        """
        # A file has no column in which every cell is empty.
        empty = dict.fromkeys(n for metric in self.plan.at_checkpoints for n in metric.columns)
        rows = (row for path in retained_paths(self.folder, step) for row in read_rows(path))
        found = [Row({**empty, **row}) for row in rows]
        return tuple(sorted(found, key=lambda row: row.case_id))

    @property
    def written(self) -> tuple[Row, ...]:
        """The steps whose edits are in the model."""
        return tuple(row for row in self.steps if is_written(row))

    @property
    def first_crossing(self) -> Row | None:
        """The first edit after which the perplexity is a collapse (above 1000)."""
        return next((row for row in self._measured if not is_sound(row.perplexity)), None)

    @property
    def disabling_edit(self) -> Row | None:
        """The first edit that multiplied the perplexity by ``plan.jump``, or crossed 1000."""
        before = self.original_perplexity
        for row in self._measured:
            crossed = not is_sound(row.perplexity) and is_sound(before)
            if crossed or row.perplexity >= self.plan.jump * before:
                return row
            before = row.perplexity
        return None

    @property
    def verdict(self) -> str | None:
        """The disabling edit with its numbers, in a sentence; None without one."""
        row = self.disabling_edit
        if row is None:
            return None
        denominator = row.get("denominator")
        return (
            f"Step {row.step} disables the model: {row.prompt} {row.target_new} "
            f"(perplexity {row.perplexity:.4g}, |delta| {row.delta_norm:.3g}"
            + ("" if denominator is None else f", denominator {denominator:.3g}")
            + ")."
        )

    @property
    def _measured(self) -> tuple[Row, ...]:
        return tuple(row for row in self.written if row.get("perplexity") is not None)

    def left_out(self, reason: str) -> tuple[Row, ...]:
        """The steps that a guard left out: ``screened`` or ``rolled back``."""
        return tuple(row for row in self.steps if row.get("guard") == reason)

    def mean(self, column: str, *, step: int | None = None) -> float | None:
        """Mean of a column over the edits, each right after its own edit.

        Args:
            column: A column of :attr:`steps`, such as ``score``.
            step: Of the facts written until then as they are at that checkpoint: retention.

        Returns:
            The mean over the rows that have a value; None without one.
        """
        rows = self.written if step is None else self.retained_at(step)
        values = [float(row[column]) for row in rows if row.get(column) is not None]
        return sum(values) / len(values) if values else None

    def edited(self, model: Model, *, until: int | None = None) -> Model:
        """Return a view of a model with the edits of the sequence in its weights.

        Args:
            model: The model that the sequence was run on.
            until: Only those of the first steps.

        Raises:
            BadInputError: If the file of an edit is missing or damaged.
            EditMismatchError: If it is another model.
        """
        for row in self.written:
            if until is None or row.step <= until:
                model = model.edited(load_edit(edit_path(self.folder, row.step)))
        return model

    def panel(self) -> Panel:
        """How far it came, the disabling edit, and the perplexity along the way."""
        lines: list[list[Any]] = [
            ["facts written", f"{len(self.written)} of {len(self.steps)}"],
            *(
                [f"left out, {reason}", len(self.left_out(reason))]
                for reason in (SCREENED, ROLLED_BACK)
                if self.left_out(reason)
            ),
            ["failed", sum(row.status == FAILED for row in self.steps)],
            ["Score right behind each edit", self.mean("score")],
        ]
        for last in self.checkpoints[-1:]:
            lines.append([f"Score of all behind step {last}", self.mean("score", step=last)])
        parts: list[Any] = [Table(columns=("", self.name), lines=lines)]
        if self.verdict is not None:
            parts.append(Note(text=self.verdict))
        measured = [row for row in self._measured if math.isfinite(row.perplexity)]
        if len(measured) > 1:
            parts.append(
                Plot(
                    title="perplexity along the sequence",
                    series={self.name: [row.perplexity for row in measured]},
                    x=[row.step for row in measured],
                    x_label="step",
                    y_label="perplexity",
                    log=True,
                )
            )
        return Panel(title=f"sequence {self.name}", parts=parts, source={"run": self.folder.name})
