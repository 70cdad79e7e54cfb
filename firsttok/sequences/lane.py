"""One sequence while it is run: the state of its model, and its files."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, cast

from firsttok.data import Fact
from firsttok.editing import Edit, Editor, load_edit
from firsttok.editing.record import EditRecord
from firsttok.errors import FirsttokError
from firsttok.models import Model
from firsttok.rows import FAILED, Row, first_columns, write_rows
from firsttok.sequences.plan import EditSequence, SequencePlan
from firsttok.sequences.record import (
    PART,
    SequenceRun,
    cut_older_files,
    edit_path,
    first_of_part,
    is_written,
    read_part,
    read_steps,
    retained_cases,
    retained_path,
    retained_paths,
    steps_path,
)
from firsttok.storage import make_folder
from firsttok.study import Study

__all__ = ["Lane"]

logger = logging.getLogger(__name__)


class Lane:
    """The state of a sequence, and the rows of at most two parts of its files.

    What grows with each step are the factors of its edit, and its number.
    """

    def __init__(
        self,
        folder: Path,
        study: Study,
        sequence: EditSequence,
        plan: SequencePlan,
        *,
        retry_failed: bool = False,
    ) -> None:
        """Begin with the model as the study has it; what is damaged counts as not there."""
        self.sequence: EditSequence = sequence
        self.plan: SequencePlan = plan
        self.study: Study = study
        self.folder: Path = folder / sequence.name
        # What is kept between edits are the edits themselves.
        (editor,) = study.varied(work=None).editors([sequence.editor])
        self.editor: Editor = editor
        self.model: Model = study.model
        self.perplexity: float = study.original_perplexity.mean
        self.redo: bool = retry_failed
        """Whether steps that failed are done again."""
        self.inside: list[int] = []
        """Steps whose edits are in the model."""
        self.first: int = 0
        self.rows: dict[int, Row] = {}
        """Rows of the part that begins with the step ``first``."""
        self.new: bool = False
        self.retained: list[Row] = []
        """Rows of a checkpoint that are in no file yet."""
        self.written: float = monotonic()
        for name in ("edits", "steps", "retained"):
            make_folder(self.folder / name)
        cut_older_files(self.folder)

    def enter(self, step: int) -> None:
        """Hold the rows of the part that a step is in, and no others."""
        first = first_of_part(step)
        if first != self.first:
            self.write()
            rows = read_part(steps_path(self.folder, first))
            self.first, self.rows = first, {row.step: row for row in rows}

    def fact(self, step: int) -> Fact:
        """The fact of a step."""
        return self.sequence.facts[step - 1]

    def saved(self, step: int) -> Edit | None:
        """The edit of a step, if its file is there, sound, and of this state of the model."""
        path = edit_path(self.folder, step)
        if not path.is_file():
            return None
        try:
            edit = load_edit(path)
            edit.check(self.model)
        except FirsttokError as error:
            logger.warning("%s; the edit is computed again", error)
            return None
        below = [each["hash"] for each in edit.provenance.get("model", {}).get("edits", [])]
        same = below == [each.content_hash for each in self.model.edits]
        facts = [replace(fact, source=self.fact(step).source) for fact in edit.facts]
        if not same or (facts and facts != [self.fact(step)]):
            logger.warning("%s is another edit; the edit is computed again", path)
            return None
        return edit

    def is_complete(self, step: int) -> bool:
        """Whether all that is measured at a step is there."""
        row = self.rows.get(step)
        if row is None or not self.is_checkpoint(step):
            return row is not None
        ids = {self.fact(number).case_id for number in self.inside}
        ids |= {row.case_id} if is_written(row) else set()
        columns = [name for metric in self.plan.of_the_model for name in metric.columns]
        return ids == {*retained_cases(self.folder, step)} and (
            not ids or all(row.get(name) is not None for name in columns)
        )

    def stands(self, step: int, edit: Edit | None) -> bool:
        """Whether what an earlier run made of a step, if anything, may stay."""
        return not self.redo if self.rows[step].status == FAILED else edit is not None

    def is_checkpoint(self, step: int) -> bool:
        """Whether earlier facts are measured at a step."""
        return step % self.plan.every == 0 or step == len(self.sequence.facts)

    @property
    def facts(self) -> list[Fact]:
        """The facts whose edits are in the model."""
        return [self.fact(step) for step in self.inside]

    def take(self, step: int, edit: Edit) -> None:
        """Put an edit into the state, if its row says so."""
        row = self.rows[step]
        if is_written(row):
            # Its record names all edits before it, so that all records would grow with the square.
            slim = replace(edit, losses=(), provenance=_without_edits(edit.provenance))
            self.model = self.model.edited(slim, anyway=True)
            self.perplexity = row.get("perplexity", self.perplexity)
            self.inside.append(step)

    def keep(self, row: Mapping[str, Any]) -> None:
        """Take up the row of a step."""
        self.rows[row["step"]] = Row(row)
        self.new = True

    def forget_retained(self, step: int) -> None:
        """Drop the rows of a checkpoint, which are measured anew."""
        self.retained.clear()
        for path in retained_paths(self.folder, step):
            path.unlink()

    def keep_retained(self, row: Mapping[str, Any]) -> None:
        """Take up the row of an earlier fact at a checkpoint; full parts are written."""
        self.retained.append(Row(row))
        if len(self.retained) == PART:
            self.write_retained(row["step"])

    def write_retained(self, step: int) -> None:
        """Write the rows of a checkpoint that are in no file yet into a new one."""
        if self.retained:
            number = len(retained_paths(self.folder, step))
            write_rows(retained_path(self.folder, step, number), self.retained)
            self.retained.clear()

    def write(self, *, at_most_every: float = 0.0) -> None:
        """Write the part that is held, if a row of it is new."""
        if not self.new or monotonic() - self.written < at_most_every:
            return
        rows = [self.rows[step] for step in sorted(self.rows)]
        write_rows(steps_path(self.folder, self.first), rows)
        self.new = False
        self.written = monotonic()

    def columns(self, step: int, reason: str | None = None) -> dict[str, Any]:
        """Columns of a row that nothing has to be computed for."""
        study, fact = self.study, self.fact(step)
        label, name = study.model.label, self.editor.name
        return {**first_columns(label, study.layer, fact, name, reason=reason), "step": step}

    def result(self) -> SequenceRun:
        """What became of it, as its files say: a finished run and a new one say the same."""
        return SequenceRun(
            name=self.sequence.name,
            folder=self.folder,
            plan=self.plan,
            original_perplexity=self.study.original_perplexity.mean,
            steps=tuple(read_steps(self.folder)),
        )


def _without_edits(record: EditRecord) -> EditRecord:
    model = {k: v for k, v in record.get("model", {}).items() if k != "edits"}
    return cast("EditRecord", {**record, "model": model})
