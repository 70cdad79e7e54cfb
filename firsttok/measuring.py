"""Facts edited and measured: the one loop of scripts, commands and sweeps."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

from rich.progress import Progress

from firsttok.arguments import take_fields, taken
from firsttok.data import Fact
from firsttok.editing import Edit, Editor, Method, OpenEditor, find_editors, optimisations
from firsttok.errors import BadInputError
from firsttok.metrics import METRICS, AccuracyMetric, Metric, ScoresMetric, find_metrics
from firsttok.prompts import fact_prompt
from firsttok.provenance import described
from firsttok.rows import COLUMNS, FACT, Row, first_columns, read_rows, write_rows
from firsttok.sieve import FailedFact, each_or_reason, nothing_done, reason_against
from firsttok.storage import content_hash, locked
from firsttok.study import Study

__all__ = [
    "TOGETHER",
    "Plan",
    "columns_of",
    "edit_columns",
    "hash_of",
    "hashes_of_open",
    "measure_chunk",
    "measure_each",
    "measure_facts",
    "metric_columns",
    "reason_against_measuring",
    "slots_in",
    "slots_of",
]

TOGETHER = 8
"""Facts whose values are optimised together on a CPU, where few of them fill a batch. A sweep that
is killed loses no more than these; on a GPU, which is fast, those of its chunk.
"""
_FORMAT = 4
"""Goes up when rows are measured otherwise."""
_PERIOD = 1.0
"""Seconds after which new rows are written."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done with every fact.

    Raises:
        BadInputError: If there is no method, results could not tell two apart, or a metric is
            unknown.
    """

    methods: tuple[Method | Editor, ...]
    """The methods or editors, each a row."""
    metrics: tuple[Metric | str, ...] = ("perplexity", "accuracy", "scores")
    """What is measured: metrics, or names of :data:`~firsttok.metrics.METRICS`."""
    seed: int = 0
    """Seed of Table 5's prefixes and of the generations."""

    def __post_init__(self) -> None:
        """Check the methods and metrics."""
        take_fields(self)
        if not self.methods:
            raise BadInputError("there is no method; give at least one method")
        find_editors(self.methods)
        if not self.measures:
            raise BadInputError(f"there is no metric; give at least one of {', '.join(METRICS)}")

    @cached_property
    def measures(self) -> tuple[Metric, ...]:
        """The metrics themselves."""
        return find_metrics(self.metrics, seed=self.seed)

    def steps(self, study: Study) -> int:
        """Optimisation steps that a fact takes; measuring it takes the time of three, about."""
        return optimisations(self.methods) * study.hyperparameters.steps + 3

    def described(self) -> dict[str, Any]:
        """Methods and metrics as JSON, with all that decides what they do.

        Raises:
            BadInputError: If an editor or a metric of the user's cannot be described.
        """
        own = [each for each in self.metrics if not isinstance(each, str)]
        return {
            "methods": {each.name: slots_of(each) for each in self.methods},
            "metrics": [metric.name for metric in self.measures],
            "seed": self.seed,
        } | ({"own_metrics": {each.name: hash_of(each) for each in own}} if own else {})


def measure_chunk(
    study: Study,
    facts: Sequence[Fact],
    plan: Plan,
    *,
    done: Collection[int] = (),
) -> list[Row]:
    """All that :func:`measure_each` gives, row by row."""
    found = measure_each(study, facts, plan, done=done)
    return [row for rows in found for row in rows]


def measure_each(
    study: Study,
    facts: Sequence[Fact],
    plan: Plan,
    *,
    done: Collection[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> Iterator[list[Row]]:
    """Edit the facts of a chunk, and give the rows of each as soon as it is measured.

    The values of a few facts are optimised together (:data:`TOGETHER`), always of the same ones,
    and no finished part is read from the study's work folder. So a chunk's numbers depend on its
    facts alone, and not on which of them were done before. Facts that cannot be edited, as their
    tokens tell, and those that fail become rows with the reason.

    Args:
        study: The study.
        facts: The chunk.
        plan: Methods and metrics.
        done: Case ids of facts that are not measured, since their rows are there.
        on_step: Called with the number of facts that took one optimisation step.

    Yields:
        For each other fact, in order, a row per method.

    Raises:
        CacheError: If a disk is full or cannot be written to; that is no fault of a case.
    """
    study = study.varied(work=None)
    # A method that this model does not take would fail for every fact.
    study.editors(plan.methods)

    def together(some: Sequence[Fact]) -> Iterator[list[Row]]:
        for fact, edits in study.edits(some, plan.methods, on_step=on_step):
            if fact.case_id in done:
                yield []
            else:
                yield _measured(study, fact, list(edits.values()), plan.methods, plan.measures)

    size = TOGETHER if study.model.device.type == "cpu" else max(1, len(facts))
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        if all(fact.case_id in done for fact in part):
            continue
        reasons = {
            fact.case_id: reason_against_measuring(study, fact, plan.measures) for fact in part
        }
        found = each_or_reason([f for f in part if reasons[f.case_id] is None], together)
        for fact in part:
            outcome = reasons[fact.case_id] or next(found)[1]
            if fact.case_id in done:
                continue
            if isinstance(outcome, list):
                yield outcome
            else:
                reason = outcome.reason if isinstance(outcome, FailedFact) else outcome
                columns = (
                    first_columns(study.model.label, study.layer, fact, each.name, reason=reason)
                    for each in plan.methods
                )
                yield list(map(Row, columns))


@taken
def measure_facts(
    study: Study,
    facts: Sequence[Fact],
    methods: Sequence[Method | str | Editor],
    *,
    metrics: Sequence[Metric | str] = ("perplexity",),
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "editing",
    on_failure: Callable[[FailedFact], None] | None = None,
) -> list[Row]:
    """Edit every fact by every method and measure each edit alone.

    Finished rows are kept in the study's work folder, metric by metric, and an interrupted run goes
    on from there.

    Args:
        study: The model and its settings.
        facts: The facts.
        methods: The methods, their names as ``--method`` takes them, or editors.
        metrics: What is measured: metrics, or names of :data:`~firsttok.metrics.METRICS`.
        seed: Seed of Table 5's prefixes and of the generations.
        progress: Where to show progress.
        label: What the progress bar says.
        on_failure: Told of each fact that something goes wrong with, such as one whose update is
            not finite; it has no row then. None to raise what went wrong.

    Returns:
        The rows, fact by fact, the methods in order.

    Raises:
        BadInputError: If there are no facts, two of them have one number, or none has a row.
    """
    if not facts:
        raise nothing_done("edit", None)
    numbered = {fact.case_id: fact for fact in facts}
    for fact in facts:
        if numbered[fact.case_id] != fact:
            raise BadInputError(
                f"two facts have the case_id {fact.case_id}, {fact.prompt!r} and "
                f"{numbered[fact.case_id].prompt!r}; number each once"
            )
    plan = Plan(methods=find_editors(methods), metrics=tuple(metrics), seed=seed)
    # A method that this model does not take would fail for every fact.
    study.editors(plan.methods)
    progress = progress or Progress(disable=True)
    task = progress.add_task(label, total=len(facts))

    def on_step(count: int) -> None:
        progress.advance(task, count / plan.steps(study))

    kept = _Kept(study, plan)
    known = {fact.case_id: kept.rows(fact) for fact in facts}

    def together(some: Sequence[Fact]) -> Iterator[list[Row]]:
        for fact, edits in study.edits(some, plan.methods, on_step=on_step):
            for missing, lacking in kept.missing(fact):
                wanted = [edits[method.name] for method in missing]
                kept.add(fact, missing, lacking, _measured(study, fact, wanted, missing, lacking))
            yield kept.rows(fact)

    open_facts = [fact for fact in facts if kept.missing(fact)]
    failed: FailedFact | None = None
    try:
        found: Iterator[tuple[Fact, list[Row] | FailedFact]] = (
            zip(open_facts, together(open_facts), strict=True)
            if on_failure is None or not open_facts
            else each_or_reason(open_facts, together)
        )
        for done, (fact, outcome) in enumerate(found, len(facts) - len(open_facts) + 1):
            if isinstance(outcome, FailedFact):
                failed = outcome
                del known[fact.case_id]
                if on_failure is not None:
                    on_failure(outcome)
            else:
                known[fact.case_id] = outcome
                kept.write(at_most_every=_PERIOD)
            progress.update(task, completed=done)
    finally:
        kept.write()
    progress.update(task, completed=len(facts))
    if not known:
        raise nothing_done("edit", failed)
    return [row for fact in facts for row in known.get(fact.case_id, ())]


def reason_against_measuring(study: Study, fact: Fact, metrics: Sequence[Metric]) -> str | None:
    """Why a fact cannot be edited or measured, as far as its tokens tell; None if it can."""
    asked: list[tuple[str, str]] = []
    if any(isinstance(metric, AccuracyMetric | ScoresMetric) for metric in metrics):
        asked += [(text, fact.target_new) for text in fact.paraphrases]
        asked += fact.answered_neighbours
    return reason_against(study.model, fact, templates=study.contexts.templates, asked=asked)


def edit_columns(
    study: Study,
    fact: Fact,
    editor: Method | Editor,
    edit: Edit,
    *,
    taken_by: Mapping[str, str],
) -> dict[str, Any]:
    """Columns of a row that say which fact was edited, and what its editor reports.

    Args:
        study: The study.
        fact: The fact.
        editor: The editor or method.
        edit: Its edit.
        taken_by: Columns that no report may fill, and what fills them.

    Raises:
        BadInputError: If the report fills one of them.
    """
    for name in edit.report:
        if name in taken_by:
            raise BadInputError(
                f"{editor.name!r} reports {name!r}, which is a column of {taken_by[name]!r}; "
                "give it another name"
            )
    prompt = fact_prompt(study.model, fact)
    return {
        **first_columns(study.model.label, study.layer, fact, editor.name),
        "first_token": prompt.subject_position == 0,
        "one_token": prompt.subject_length == 1,
        **edit.report,
    } | ({"steps": len(edit.losses), "final_loss": edit.losses[-1]} if edit.losses else {})


def metric_columns(
    study: Study, fact: Fact, edits: Sequence[Edit], metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Columns that metrics fill, for each edit of a fact.

    Raises:
        BadInputError: If a metric fills a column that it does not name.
    """
    rows: list[dict[str, Any]] = [{} for _ in edits]
    for metric in metrics:
        for row, found in zip(rows, metric.measure(study, fact, edits), strict=True):
            if extra := set(found) - set(metric.columns):
                raise BadInputError(
                    f"the metric {metric.name!r} fills {min(extra)!r}, which is not among its "
                    "columns; name it there"
                )
            for name, kind in metric.columns.items():
                value = found.get(name)
                # A number of NumPy or PyTorch becomes a plain one.
                row[name] = None if value is None else kind(value)
    return rows


def columns_of(metrics: Sequence[Metric]) -> dict[str, str]:
    """Columns of facts and metrics, and what fills them."""
    owners = dict.fromkeys(FACT, "every row")
    return owners | {column: metric.name for metric in metrics for column in metric.columns}


def _measured(
    study: Study,
    fact: Fact,
    edits: Sequence[Edit],
    methods: Sequence[Method | Editor],
    metrics: Sequence[Metric],
) -> list[Row]:
    """A row for each edit of a fact."""
    taken_by = columns_of(metrics)
    rows = [
        edit_columns(study, fact, method, edit, taken_by=taken_by)
        for method, edit in zip(methods, edits, strict=True)
    ]
    found = metric_columns(study, fact, edits, metrics)
    return [Row({**row, **own}) for row, own in zip(rows, found, strict=True)]


class _Kept:
    """The rows of one call of :func:`measure_facts`, and the files that they are kept in.

    There is a file for each method and metric under one study's settings, whose name is made from
    all that decides its numbers. So scripts that measure the same find it done.
    """

    def __init__(self, study: Study, plan: Plan) -> None:
        """Read what an earlier run left; damage counts as not there."""
        self.study, self.plan = study, plan
        # By method and metric: rows by the hash of the fact, and those that are not written yet.
        self.held = defaultdict[tuple[str, str], dict[str, Row]](dict)
        self.new = defaultdict[tuple[str, str], dict[str, Row]](dict)
        self.paths: dict[tuple[str, str], Path] = {}
        self.written = monotonic()
        self.settings = _row_settings(study)
        if self.settings is None or study.work is None:
            return
        for method, metric in product(plan.methods, plan.measures):
            # What cannot be described is not kept.
            with suppress(BadInputError, TypeError):
                parts = [self.settings, method.name, slots_in(study, method), described(metric)]
                path = study.work / "rows" / f"{content_hash(parts)[:24]}.parquet"
                self.paths[method.name, metric.name] = path
                self.held[method.name, metric.name] = _rows_by_fact(path)

    def missing(self, fact: Fact) -> list[tuple[list[Method | Editor], list[Metric]]]:
        """What is to be measured of a fact, methods that lack the same metrics together."""
        key = fact.content_hash
        lacking: dict[tuple[str, ...], list[Method | Editor]] = {}
        for method in self.plan.methods:
            names = [each.name for each in self.plan.measures]
            names = tuple(name for name in names if key not in self.held[method.name, name])
            if names:
                lacking.setdefault(names, []).append(method)
        return [
            (methods, [each for each in self.plan.measures if each.name in names])
            for names, methods in lacking.items()
        ]

    def rows(self, fact: Fact) -> list[Row]:
        """The rows of a fact, as far as they are whole."""
        key = fact.content_hash
        # A file has no column in which every cell is empty.
        empty = [name for metric in self.plan.measures for name in metric.columns]
        rows: list[Row] = []
        for method in self.plan.methods:
            parts = [self.held[method.name, each.name].get(key) for each in self.plan.measures]
            if None in parts:
                continue
            whole: dict[str, Any] = dict.fromkeys(empty)
            for part in parts:
                whole |= part or {}
            # The same model may have gone by another name then.
            whole["model"] = self.study.model.label
            order = dict.fromkeys([*(name for name in COLUMNS if name in whole), *whole])
            rows.append(Row({name: whole[name] for name in order}))
        return rows

    def add(
        self,
        fact: Fact,
        methods: Sequence[Method | Editor],
        metrics: Sequence[Metric],
        rows: Sequence[Row],
    ) -> None:
        """Take up new rows, one for each method."""
        # An edit that was put into the model meanwhile would be filed under the model without.
        same = self.settings is not None and _row_settings(self.study) == self.settings
        others = {name for metric in metrics for name in metric.columns}
        for (method, row), metric in product(zip(methods, rows, strict=True), metrics):
            leave = others - set(metric.columns)
            part = Row({name: value for name, value in row.items() if name not in leave})
            place = method.name, metric.name
            for kept in (self.held, self.new) if same and place in self.paths else (self.held,):
                kept[place][fact.content_hash] = part

    def write(self, *, at_most_every: float = 0.0) -> None:
        """Write what is new, beside what another process wrote meanwhile."""
        if not self.new or monotonic() - self.written < at_most_every:
            return
        for place, path in self.paths.items():
            if new := self.new.pop(place, None):
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(path):
                    rows = _rows_by_fact(path) | new
                    write_rows(path, ({**row, "fact": key} for key, row in rows.items()))
        self.written = monotonic()


def _rows_by_fact(path: Path) -> dict[str, Row]:
    """Kept rows by the hash of their fact; none if there is no sound file."""
    try:
        rows = map(dict, read_rows(path))
        return {row.pop("fact"): Row(row) for row in rows}
    except (BadInputError, KeyError):
        return {}


def _row_settings(study: Study) -> list[Any] | None:
    """What decides the rows of a study besides fact, method and metric; None without that."""
    views = (study.model,) if study.judge is None else (study.model, study.judge)
    try:
        source = described(study.key_source)
    except TypeError:
        return None
    if any(view.disturbance is not None for view in views):
        return None
    identities = [view.identity() for view in views]
    settings = [
        *(identities if study.judge is not None else identities * 2),
        source,
        study.layer,
        study.contexts.content_hash,
        study.second_moment.content_hash,
        study.hyperparameters.as_dict(),
        list(study.texts),
        study.text_bos.value,
    ]
    return [_FORMAT, content_hash(settings)]


def slots_of(method: Method | Editor) -> Mapping[str, str]:
    """What decides what a method does: its slots, or the hash of an editor's code and settings."""
    return method.slots if isinstance(method, Method) else {"editor": hash_of(method)}


def slots_in(study: Study, method: Method | Editor) -> Mapping[str, str]:
    """As :func:`slots_of`, with what an editor takes from the study."""
    return slots_of(method if isinstance(method, Method) else study.editors([method])[0])


def hashes_of_open(study: Study, methods: Sequence[Method | Editor]) -> dict[str, str]:
    """Hash of each editor that takes something from the study, by its name.

    Raises:
        BadInputError: If the study, or its model, does not have what an editor needs.
    """
    opened = [each for each in methods if isinstance(each, OpenEditor)]
    return {each.name: slots_in(study, each)["editor"] for each in opened}


def hash_of(thing: Editor | Metric) -> str:
    """Hash of what an editor or a metric of the user's is: its code and settings.

    Raises:
        BadInputError: If it cannot be described.
    """
    try:
        return content_hash(described(thing))[:24]
    except TypeError as error:
        raise BadInputError(
            f"{thing.name!r} cannot be told from another one ({error}); let it hold numbers, texts "
            "and tensors only, as a frozen dataclass does"
        ) from None
