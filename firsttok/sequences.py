"""Edit after edit on the weights as they have become, and what becomes of the model.

As in the released code, C and contexts are those of the model before the first edit, and all else
is taken from the current weights: W k, the anchor and v*, and the reference of the KL divergence.
Several sequences on one model are run side by side.
"""

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, cast

import torch
from rich.progress import Progress

from firsttok.arguments import take_fields, taken, whole_number
from firsttok.data import Fact
from firsttok.display import Note, Panel, Shown, Table
from firsttok.editing import Delta, Edit, Editor, Method, Turn, edit_in_step, load_edit
from firsttok.editing.record import EditRecord, edit_record
from firsttok.errors import BadInputError, FirsttokError, NonFiniteError
from firsttok.escapes import finite
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import (
    columns_of,
    edit_columns,
    hash_of,
    metric_columns,
    reason_against_measuring,
    slots_in,
)
from firsttok.metrics import Metric, find_metrics
from firsttok.models import Model
from firsttok.options import folder_name
from firsttok.provenance import versions
from firsttok.rows import DONE, FAILED, Row, first_columns, read_rows, write_rows
from firsttok.screening import screen
from firsttok.storage import content_hash, locked, make_folder, read_record, write_record
from firsttok.study import Study
from firsttok.svg import Plot

__all__ = [
    "EditSequence",
    "Guard",
    "SequencePlan",
    "SequenceRun",
    "order_facts",
    "run_sequences",
]

logger = logging.getLogger(__name__)
_PERIOD = 1.0
"""Seconds after which new rows are written."""
_FORMAT = 1
_RECORD = "sequence.json"
SCREENED, ROLLED_BACK = "screened", "rolled back"
"""What a guard did to a fact."""
_SINGULAR = 3
"""Singular values of the edited weight that are kept."""
_OWN = (
    *("step", "guard", "drift_norm", "mean_drift", "weight_norm", "condition_number"),
    *(f"singular_{number}" for number in range(1, _SINGULAR + 1)),
)
"""Columns of a step besides those of the fact, the editor's report and the metrics."""


class Guard(str, Enum):
    """What keeps a sequence from a disabling edit."""

    NONE = "none"
    SCREEN = "screen"
    """Leave out facts for which :meth:`~firsttok.screening.ScreenRow.is_hard` holds: ROME's
    denominator decides, whatever the editor."""
    ROLLBACK = "rollback"
    """Take an edit out again behind which the perplexity is a collapse, or jumps."""


@dataclass(frozen=True, kw_only=True)
class EditSequence:
    """Facts that are written one after another by one editor.

    Raises:
        BadInputError: If there is no fact, or a fact comes twice.
    """

    name: str
    """Name of its folder in the run."""
    facts: tuple[Fact, ...]
    editor: Method | Editor

    def __post_init__(self) -> None:
        """Check the facts."""
        take_fields(self)
        if folder_name(self.name) != self.name:
            raise BadInputError(
                f"{self.name!r} cannot be the name of a folder; take letters, digits and -"
            )
        if not self.facts:
            raise BadInputError(f"the sequence {self.name!r} has no fact; give at least one")
        ids = [fact.case_id for fact in self.facts]
        for number in ids:
            if ids.count(number) > 1:
                raise BadInputError(
                    f"the case_id {number} comes twice in the sequence {self.name!r}; number each "
                    "fact once"
                )


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """What is measured along the way, and what keeps a sequence from a disabling edit.

    Raises:
        BadInputError: If a number is out of its range, or a metric is unknown.
    """

    metrics: tuple[Metric | str, ...] = ("perplexity", "scores")
    """Measured behind every edit, of the fact that it wrote, against the model before the first."""
    retained: tuple[Metric | str, ...] = ("scores",)
    """Measured at every checkpoint, of all facts that were written so far."""
    checkpoint: tuple[Metric | str, ...] = ()
    """Measured at every checkpoint, of the model as a whole, such as ``tasks``."""
    every: int = 10
    """Steps from one checkpoint to the next; the last step is one as well."""
    guard: Guard = Guard.NONE
    jump: float = 10.0
    """An edit disables a model where the perplexity is so many times that before it."""
    seed: int = 0
    """Seed of what metrics draw."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        take_fields(self)
        whole_number(self.every, "every", least=1)
        if not self.jump > 1:
            raise BadInputError(f"jump is {self.jump:g}; give a number above 1")
        names = {metric.name for metric in self.behind_each}
        behind = {column for metric in self.behind_each for column in metric.columns}
        for metric in (*self.behind_each, *self.at_checkpoints, *self.of_the_model):
            for column in metric.columns:
                if column in _OWN:
                    raise BadInputError(
                        f"the metric {metric.name!r} has a column {column!r}, which a row of a "
                        "sequence has already; give it another name"
                    )
        for metric in self.of_the_model:
            if not behind.isdisjoint(metric.columns):
                raise BadInputError(
                    f"{metric.name!r} is measured behind every edit, and so at every checkpoint; "
                    "name it once"
                )
        if self.guard is Guard.ROLLBACK and "perplexity" not in names:
            raise BadInputError(
                "the guard rollback needs the perplexity; let it be among the metrics"
            )

    @cached_property
    def behind_each(self) -> tuple[Metric, ...]:
        """The metrics behind every edit."""
        return find_metrics(self.metrics, seed=self.seed)

    @cached_property
    def at_checkpoints(self) -> tuple[Metric, ...]:
        """The metrics of earlier facts."""
        return find_metrics(self.retained, seed=self.seed)

    @cached_property
    def of_the_model(self) -> tuple[Metric, ...]:
        """The metrics of the model at checkpoints."""
        return find_metrics(self.checkpoint, seed=self.seed)

    def described(self) -> dict[str, Any]:
        """All of it as JSON.

        Raises:
            BadInputError: If a metric of the user's cannot be described.
        """
        return {
            "metrics": {each.name: hash_of(each) for each in self.behind_each},
            "retained": {each.name: hash_of(each) for each in self.at_checkpoints},
            "checkpoint": {each.name: hash_of(each) for each in self.of_the_model},
            "every": self.every,
            "guard": self.guard.value,
            "jump": self.jump,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SequenceRun(Shown):
    """What a sequence did to a model, as far as it has come."""

    name: str
    folder: Path
    plan: SequencePlan
    original_perplexity: float
    steps: tuple[Row, ...]
    """A row for each fact, in order, with ``step``, counted from 1."""
    retained: tuple[Row, ...]
    """A row for each checkpoint and fact that was written until then, with ``step``."""

    @property
    def written(self) -> tuple[Row, ...]:
        """The steps whose edits are in the model."""
        return tuple(row for row in self.steps if _is_written(row))

    @property
    def first_crossing(self) -> Row | None:
        """The first edit behind which the perplexity is a collapse (above 1000)."""
        return next((row for row in self._measured if not _sound(row)), None)

    @property
    def disabling_edit(self) -> Row | None:
        """The first edit that multiplied the perplexity by ``plan.jump``, or crossed 1000."""
        before = self.original_perplexity
        for row in self._measured:
            crossed = not _sound(row) and before <= COLLAPSE_THRESHOLD
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
        """Mean of a column over the edits, each right behind its own edit.

        Args:
            column: A column of :attr:`steps`, such as ``score``.
            step: Of the facts written until then as they are at that checkpoint: retention.

        Returns:
            The mean over the rows that have a value; None without one.
        """
        rows = self.written if step is None else [r for r in self.retained if r.step == step]
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
                model = model.edited(load_edit(_edit_path(self.folder, row.step)))
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
        last = max((row.step for row in self.retained), default=None)
        if last is not None:
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


@taken
def order_facts(study: Study, facts: Sequence[Fact], order: str) -> tuple[Fact, ...]:
    """Put facts into the order of a sequence.

    Args:
        study: The study; its keys say which facts are hard.
        facts: The facts.
        order: ``given``; ``seed:N`` for a random one; ``hard-first`` for those first at which ROME
            divides by the least share of what C-ROME divides by.

    Raises:
        BadInputError: If it is none of these.
    """
    check_order(order)
    if order == "hard-first":
        ratios = {row.case_id: row.ratio for row in screen(study, facts)}
        return tuple(sorted(facts, key=lambda fact: ratios[fact.case_id]))
    ordered = list(facts)
    if order != "given":
        random.Random(int(order.removeprefix("seed:"))).shuffle(ordered)  # noqa: S311
    return tuple(ordered)


def check_order(order: str) -> None:
    """Refuse an order that :func:`order_facts` does not know, before any work.

    Raises:
        BadInputError: If it is unknown.
    """
    name, _, number = order.partition(":")
    if order not in ("given", "hard-first") and not (name == "seed" and number.isdecimal()):
        raise BadInputError(f"the order is {order!r}; give given, seed:N or hard-first")


@taken
def run_sequences(
    folder: str | Path,
    study: Study,
    sequences: Sequence[EditSequence],
    *,
    plan: SequencePlan | None = None,
    progress: Progress | None = None,
) -> dict[str, SequenceRun]:
    """Run sequences of edits side by side, or resume them where they stopped.

    Every step is computed for all sequences together, those among them whose edit is there already
    included, so that the numbers of a resumed run are those of an undisturbed one.

    Args:
        folder: Folder of the run; each sequence has one in it, with ``edits/0001.safetensors`` and
            so on, ``steps.parquet`` and ``retained.parquet``.
        study: The study; its model is that before the first edit, and what scores compare with.
        sequences: The sequences.
        plan: What is measured, and the guard; None for the usual.
        progress: Where to show progress.

    Returns:
        What became of each, by its name.

    Raises:
        BadInputError: If two sequences have one name, or the run was begun with something else.
        CacheError: If a file cannot be written.
    """
    folder, plan = Path(folder), plan or SequencePlan()
    names = [each.name for each in sequences]
    for name in names:
        if names.count(name) > 1:
            raise BadInputError(f"two sequences are called {name!r}; give each its own name")
    if not sequences:
        raise BadInputError("there is no sequence; give at least one")
    if study.model.disturbance is not None:
        raise BadInputError(
            f"a run keeps its edits, and none of them would show that {study.model.disturbance}; "
            "take that away"
        )
    original = study.original_perplexity.mean
    if plan.guard is Guard.ROLLBACK and not original <= COLLAPSE_THRESHOLD:
        raise BadInputError(
            f"the unedited model has a perplexity of {original:.0f} on these sentences, "
            f"above {COLLAPSE_THRESHOLD:g} itself, so that the guard rollback would "
            "take every edit back; give other sentences, or --text-bos with"
        )
    progress = progress or Progress(disable=True)
    with ExitStack() as locks:
        ordered = sorted(sequences, key=lambda each: each.name)
        entries = {each.name: _entry(study, each, names, plan) for each in ordered}
        for name, entry in entries.items():
            _refuse_another(folder / name, entry)
        for name, entry in entries.items():
            _join(folder / name, entry, locks)
        lanes = [_Lane(folder, study, each, plan) for each in sequences]
        longest = max(len(each.facts) for each in sequences)
        task = progress.add_task("sequences", total=sum(len(each.facts) for each in sequences))
        hard = _hard(study, sequences, progress) if plan.guard is Guard.SCREEN else frozenset[str]()
        try:
            for step in range(1, longest + 1):
                running = [lane for lane in lanes if step <= len(lane.sequence.facts)]
                _step(study, running, step, plan, hard)
                progress.advance(task, len(running))
                for lane in running:
                    lane.write(at_most_every=_PERIOD)
        finally:
            for lane in lanes:
                lane.write()
    return {lane.sequence.name: lane.result() for lane in lanes}


def _hard(study: Study, sequences: Sequence[EditSequence], progress: Progress) -> frozenset[str]:
    """Hashes of facts that a collapse is predicted for; keys do not change in a sequence."""
    facts = {fact.content_hash: fact for each in sequences for fact in each.facts}
    rows = screen(study, facts.values(), progress=progress, total=len(facts))
    return frozenset(key for key, row in zip(facts, rows, strict=True) if row.is_hard(None))


def _settings(study: Study) -> dict[str, Any]:
    """What decides the numbers of all sequences of a study."""
    provenance, moment = study.provenance(), study.second_moment
    del provenance["versions"]
    # Its condition number is computed in every run, and its last digits differ by machine.
    provenance["second_moment"] = {"corpus": moment.corpus, "hash": moment.content_hash}
    return provenance


def _entry(
    study: Study,
    sequence: EditSequence,
    together: Sequence[str],
    plan: SequencePlan,
) -> dict[str, Any]:
    """What decides the numbers of a sequence, as JSON."""
    entry: dict[str, Any] = {
        "format": _FORMAT,
        **_settings(study),
        "editor": {"name": sequence.editor.name, **slots_in(study, sequence.editor)},
        "facts": content_hash([fact.content_hash for fact in sequence.facts]),
        "plan": plan.described(),
        "side_by_side": list(together),
    }
    return json.loads(json.dumps(finite(entry)))


def _refuse_another(folder: Path, entry: Mapping[str, Any]) -> None:
    """Refuse a folder that was begun with something else."""
    path = folder / _RECORD
    if not path.exists():
        return
    known = read_record(path, "a sequence's record")
    for name in entry:
        if known.get(name) != entry[name]:
            raise BadInputError(
                f"the sequence in {folder} was begun with something else ({name} differs); use "
                "the same settings (on Ray also --actors), or another folder"
            )


def _join(folder: Path, entry: Mapping[str, Any], locks: ExitStack) -> None:
    """Note what a sequence is made of, once no folder of the run is refused."""
    path = folder / _RECORD
    make_folder(folder)
    locks.enter_context(locked(path))
    _refuse_another(folder, entry)
    if not path.exists():
        write_record(path, {**entry, "versions": versions()})


def _edit_path(folder: Path, step: int) -> Path:
    return folder / "edits" / f"{step:04d}.safetensors"


def _is_written(row: Mapping[str, Any]) -> bool:
    return row["status"] == DONE and row.get("guard") is None


def _sound(row: Mapping[str, Any]) -> bool:
    """Whether a perplexity is no collapse; one that is no number is one."""
    return row["perplexity"] <= COLLAPSE_THRESHOLD


class _Lane:
    """One sequence while it is run: its state, and its files."""

    def __init__(
        self, folder: Path, study: Study, sequence: EditSequence, plan: SequencePlan
    ) -> None:
        """Read what an earlier run left; what is damaged counts as not there."""
        self.sequence, self.plan, self.study = sequence, plan, study
        self.folder = folder / sequence.name
        # What is kept between edits are the edits themselves.
        (self.editor,) = study.varied(work=None).editors([sequence.editor])
        self.model = study.model
        self.perplexity: float = study.original_perplexity.mean
        self.steps = {row.step: row for row in _kept(self.folder / "steps.parquet")}
        self.retained = {
            (row.step, row.case_id): row for row in _kept(self.folder / "retained.parquet")
        }
        self.new: set[str] = set()
        self.written = monotonic()
        (self.folder / "edits").mkdir(parents=True, exist_ok=True)

    def fact(self, step: int) -> Fact:
        """The fact of a step."""
        return self.sequence.facts[step - 1]

    def saved(self, step: int) -> Edit | None:
        """The edit of a step, if its file is there, sound, and of this state of the model."""
        path = _edit_path(self.folder, step)
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
        if step not in self.steps:
            return False
        if not self.is_checkpoint(step):
            return True
        facts, row = self.facts_until(step), self.steps[step]
        columns = [name for metric in self.plan.of_the_model for name in metric.columns]
        return all((step, fact.case_id) in self.retained for fact in facts) and (
            not facts or all(row.get(name) is not None for name in columns)
        )

    def is_checkpoint(self, step: int) -> bool:
        """Whether earlier facts are measured at a step."""
        return step % self.plan.every == 0 or step == len(self.sequence.facts)

    def facts_until(self, step: int) -> list[Fact]:
        """The facts whose edits are in the model behind a step."""
        return [self.fact(n) for n in range(1, step + 1) if _is_written(self.steps[n])]

    def take(self, step: int, edit: Edit) -> None:
        """Put an edit into the state, if its row says so."""
        row = self.steps[step]
        if _is_written(row):
            # Its record names all edits before it, so that all records would grow with the square.
            slim = replace(edit, losses=(), provenance=_without_edits(edit.provenance))
            self.model = self.model.edited(slim, anyway=True)
            self.perplexity = row.get("perplexity", self.perplexity)

    def keep(self, row: Mapping[str, Any]) -> None:
        """Take up the row of a step."""
        self.steps[row["step"]] = Row(row)
        self.new.add("steps")

    def keep_retained(self, row: Mapping[str, Any]) -> None:
        """Take up the row of an earlier fact."""
        self.retained[row["step"], row["case_id"]] = Row(row)
        self.new.add("retained")

    def write(self, *, at_most_every: float = 0.0) -> None:
        """Write the rows that are new."""
        if not self.new or monotonic() - self.written < at_most_every:
            return
        tables: dict[str, Mapping[Any, Row]] = {"steps": self.steps, "retained": self.retained}
        for name in sorted(self.new):
            rows = tables[name]
            write_rows(self.folder / f"{name}.parquet", [rows[key] for key in sorted(rows)])
        self.new.clear()
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
            steps=tuple(_kept(self.folder / "steps.parquet")),
            retained=tuple(_kept(self.folder / "retained.parquet")),
        )


def _without_edits(record: EditRecord) -> EditRecord:
    model = {k: v for k, v in record.get("model", {}).items() if k != "edits"}
    return cast("EditRecord", {**record, "model": model})


def _kept(path: Path) -> list[Row]:
    try:
        return read_rows(path) if path.is_file() else []
    except BadInputError as error:
        logger.warning("%s", error)
        return []


def _step(
    study: Study, lanes: Sequence[_Lane], step: int, plan: SequencePlan, hard: frozenset[str]
) -> None:
    """Do one step of all sequences, unless it is done."""
    metrics = (*plan.behind_each, *plan.at_checkpoints)
    reasons = [reason_against_measuring(study, lane.fact(step), metrics) for lane in lanes]
    turning = [
        lane
        for lane, reason in zip(lanes, reasons, strict=True)
        if reason is None and lane.fact(step).content_hash not in hard
    ]
    saved = [lane.saved(step) for lane in turning]
    if all(lane.is_complete(step) for lane in lanes) and all(
        edit is not None or lane.steps[step].status == FAILED
        for lane, edit in zip(turning, saved, strict=True)
    ):
        for lane, edit in zip(turning, saved, strict=True):
            if edit is not None:
                lane.take(step, edit)
        return
    for lane, reason in zip(lanes, reasons, strict=True):
        if reason is not None:
            lane.keep(lane.columns(step, reason))
        elif lane not in turning:
            lane.keep(lane.columns(step) | {"guard": SCREENED})
    # Together or not at all: how a batch is made up decides the last bits of what it holds.
    known = [edit for edit in saved if edit is not None]
    edits = known if len(known) == len(turning) else _edits(turning, step)
    made = _saved(study, turning, edits, saved, step)
    asked = [(lane.fact(step), in_all) for lane, _, in_all in made]
    measured = _by_fact(study, asked, plan.behind_each)
    taken_by = columns_of((*plan.behind_each, *plan.of_the_model))
    taken_by |= dict.fromkeys(_OWN, "a step")
    for (lane, edit, in_all), found in zip(made, measured, strict=True):
        row = edit_columns(study, lane.fact(step), lane.editor, edit, taken_by=taken_by) | found
        drift = in_all.report
        row |= {
            "step": step,
            "drift_norm": drift["delta_norm"],
            "mean_drift": drift["mean_delta"],
        }
        if plan.guard is Guard.ROLLBACK and not (
            _sound(row) and row["perplexity"] < plan.jump * lane.perplexity
        ):
            row["guard"] = ROLLED_BACK
        if lane.is_checkpoint(step):
            row |= _health(lane.model.edited(edit) if _is_written(row) else lane.model, edit)
        lane.keep(row)
        lane.take(step, edit)
    at_checkpoint = [lane for lane in lanes if lane.is_checkpoint(step)]
    _measure_models(study, at_checkpoint, step, plan)
    _look_back(study, at_checkpoint, step, plan)


def _measure_models(study: Study, lanes: Sequence[_Lane], step: int, plan: SequencePlan) -> None:
    """Measure the edited models of all sequences that are at a checkpoint, in one go."""
    lanes = [lane for lane in lanes if lane.facts_until(step)]
    if not lanes or not plan.of_the_model:
        return
    edits = [_in_all(study.model, lane.model) for lane in lanes]
    found = metric_columns(study, lanes[0].fact(step), edits, plan.of_the_model)
    for lane, columns in zip(lanes, found, strict=True):
        lane.keep({**lane.steps[step], **columns})


def _saved(
    study: Study,
    lanes: Sequence[_Lane],
    edits: Sequence[Edit | str],
    before: Sequence[Edit | None],
    step: int,
) -> list[tuple[_Lane, Edit, Edit]]:
    """Edits as their files hold them, each with all edits of its sequence so far in one.

    A sequence without an edit, or whose weights would not be finite, has a row with the reason.
    """
    made: list[tuple[_Lane, Edit, Edit]] = []
    for lane, computed, old in zip(lanes, edits, before, strict=True):
        if isinstance(computed, str):
            lane.keep(lane.columns(step, computed))
            continue
        edit = computed
        if old is None or old.content_hash != edit.content_hash:
            path = _edit_path(lane.folder, step)
            edit.save(path)
            # What later steps are made on is what a resumed run will read.
            edit = load_edit(path)
        try:
            made.append((lane, edit, _in_all(study.model, lane.model.edited(edit))))
        except NonFiniteError as error:
            lane.keep(lane.columns(step, str(error)))
    return made


def _edits(lanes: Sequence[_Lane], step: int) -> list[Edit | str]:
    """The next edit of each sequence, or why there is none."""
    turns = [Turn(model=lane.model, fact=lane.fact(step), editor=lane.editor) for lane in lanes]
    return [
        made if isinstance(made, Edit) else " ".join(str(made).split())
        for made in edit_in_step(turns)
    ]


def _in_all(model: Model, view: Model) -> Edit:
    """All edits of a view as one edit of the model: what its weights have more than the model's."""
    places = dict.fromkeys(
        place for edit in view.edits[len(model.edits) :] for place in edit.places
    )
    deltas = [
        # Of 16-bit weights the difference is wider than they are.
        Delta(
            place=place,
            left=view.site_at(place).matrix.to(model.wide_dtype)
            - model.site_at(place).matrix.to(model.wide_dtype),
        )
        for place in places
    ]
    return Edit(
        deltas=tuple(deltas),
        provenance=edit_record(
            model.record(),
            (),
            editor={"name": "sequence"},
            parameters={str(place): model.weights.name_of(place) for place in places},
        ),
    )


def _by_fact(
    study: Study, asked: Sequence[tuple[Fact, Edit]], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Metrics of facts under edits; edits that are asked for the same fact share its passes."""
    groups: dict[str, list[int]] = {}
    for number, (fact, _) in enumerate(asked):
        groups.setdefault(fact.content_hash, []).append(number)
    found: list[dict[str, Any]] = [{} for _ in asked]
    for numbers in groups.values():
        edits = [asked[number][1] for number in numbers]
        rows = metric_columns(study, asked[numbers[0]][0], edits, metrics)
        for number, row in zip(numbers, rows, strict=True):
            found[number] = row
    return found


def _health(view: Model, edit: Edit) -> dict[str, float]:
    """The edited weight as it has become; of several, that of the last layer."""
    weight = view.site_at(max(edit.places)).matrix.double()
    values = torch.linalg.svdvals(weight)
    found = {"weight_norm": float(weight.norm())}
    found |= {f"singular_{n}": float(value) for n, value in enumerate(values[:_SINGULAR], 1)}
    return found | {"condition_number": float(values[0] / values[-1])}


def _look_back(study: Study, lanes: Sequence[_Lane], step: int, plan: SequencePlan) -> None:
    """Measure all facts that were written so far, in every sequence that is at a checkpoint."""
    asked: list[tuple[_Lane, Fact, Edit]] = []
    for lane in lanes:
        facts = lane.facts_until(step)
        if facts:
            in_all = _in_all(study.model, lane.model)
            asked += [(lane, fact, in_all) for fact in facts]
    rows = _by_fact(study, [each[1:] for each in asked], plan.at_checkpoints)
    for (lane, fact, _), row in zip(asked, rows, strict=True):
        label, name = study.model.label, lane.editor.name
        lane.keep_retained(first_columns(label, study.layer, fact, name) | {"step": step} | row)
