"""What can be measured after an edit: each metric fills columns of its own in a row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

from firsttok.arguments import take_fields
from firsttok.data import Fact
from firsttok.editing import Edit
from firsttok.errors import BadInputError
from firsttok.evaluation import (
    OWN_TASKS,
    check_tasks,
    data_hash,
    edit_accuracies,
    edit_counterfact_scores,
    generated_match,
    generation_entropy,
    sample_continuations,
    score_edits,
    score_tasks,
)
from firsttok.prompts import fact_prompt, with_target
from firsttok.rows import FACT, METRIC_COLUMNS, REPORT
from firsttok.study import Study

__all__ = [
    "METRICS",
    "AccuracyMetric",
    "EntropyMetric",
    "GeneratedMetric",
    "Metric",
    "PerplexityMetric",
    "ScoresMetric",
    "TasksMetric",
    "find_metrics",
]

METRICS = tuple(METRIC_COLUMNS)
"""Names of the built-in metrics; those that generate text, and the tasks, are slow."""


@runtime_checkable
class Metric(Protocol):
    """What measures edits: a class with a name, columns and this method."""

    @property
    def name(self) -> str:
        """Name on the command line and in files."""
        ...

    @property
    def columns(self) -> Mapping[str, type]:
        """The columns it fills, each ``str``, ``int``, ``float`` or ``bool``."""
        ...

    def measure(
        self, study: Study, fact: Fact, edits: Sequence[Edit]
    ) -> Sequence[Mapping[str, Any]]:
        """Measure several edits of one fact, each on the unedited model of the study.

        Returns:
            Values of the columns for each edit, in order; None where there is nothing to measure.
        """
        ...


class PerplexityMetric:
    """Mean and corpus-level perplexity on the study's sentences, and whether that is a collapse."""

    name = "perplexity"
    columns: Mapping[str, type] = METRIC_COLUMNS["perplexity"]

    def measure(
        self,
        study: Study,
        fact: Fact,  # noqa: ARG002
        edits: Sequence[Edit],
    ) -> list[dict[str, Any]]:
        """As :meth:`Metric.measure`."""
        return [
            {
                "perplexity": found.mean,
                "corpus_perplexity": found.corpus,
                "collapsed": found.collapsed,
            }
            for found in study.perplexities(edits)
        ]


class AccuracyMetric:
    """Efficacy, generalization and locality (Table 4), and efficacy after a prefix (Table 5)."""

    name = "accuracy"
    columns: Mapping[str, type] = METRIC_COLUMNS["accuracy"]

    def __init__(self, *, seed: int = 0) -> None:
        """Take the seed of the prefix that is drawn for each fact."""
        self.seed: int = seed

    def measure(self, study: Study, fact: Fact, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """As :meth:`Metric.measure`."""
        model = study.model
        rows = [asdict(accuracy) for accuracy in edit_accuracies(model, fact, edits)]
        if study.contexts.prefixed:
            prefix = study.contexts.draw_prefix(fact, seed=self.seed)
            prompt = fact_prompt(model, fact, prefix)
            prompt = with_target(model, prompt, fact.target_new, join=fact.join)
            behind = score_edits(model, [prompt], edits)[1:]
            for row, (found,) in zip(rows, behind, strict=True):
                row.update(prefix=prefix, prefixed_efficacy=found.accuracy)
        return rows


class ScoresMetric:
    """COUNTERFACT's ES, PS, NS, EM, PM, NM and their Score."""

    name = "scores"
    columns: Mapping[str, type] = METRIC_COLUMNS["scores"]

    def measure(self, study: Study, fact: Fact, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """As :meth:`Metric.measure`."""
        scores = edit_counterfact_scores(study.model, fact, edits)[1:]
        return [asdict(each) | {"score": each.score} for each in scores]


class GeneratedMetric:
    """What the edited model writes after the bare prompt, and whether that is the target."""

    name = "generated"
    columns: Mapping[str, type] = METRIC_COLUMNS["generated"]

    def measure(self, study: Study, fact: Fact, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """As :meth:`Metric.measure`."""
        found = [generated_match(study.model.edited(edit), fact) for edit in edits]
        return [
            {
                "generated": match.text,
                "generated_exact": match.exact,
                "generated_first_words": match.first_words,
            }
            for match in found
        ]


class EntropyMetric:
    """Normalised entropy of the words of ten generations ("Rebuilding ROME")."""

    name = "entropy"
    columns: Mapping[str, type] = METRIC_COLUMNS["entropy"]

    def __init__(self, *, seed: int = 0) -> None:
        """Take the seed of the generations."""
        self.seed: int = seed

    def measure(self, study: Study, fact: Fact, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """As :meth:`Metric.measure`."""
        rows: list[dict[str, Any]] = []
        for edit in edits:
            with edit.applied(study.model) as view:
                texts = sample_continuations(view, fact.prompt, seed=self.seed)
            rows.append({"entropy": generation_entropy(texts)})
        return rows


@dataclass(frozen=True, kw_only=True)
class TasksMetric:
    """Downstream tasks, see :func:`~firsttok.evaluation.score_tasks`; a column for each.

    It holds accuracy where there is one, or else the task's first metric.

    Raises:
        BadInputError: If lm-eval is not installed, or a task's data are not there.
    """

    tasks: tuple[str, ...] = OWN_TASKS
    folder: str | None = None
    limit: int | None = None
    # What rows are kept by: other data, or prompts of another version, give other numbers.
    data: str = field(init=False, default="")
    harness: str = field(init=False, default="")
    name = "tasks"

    def __post_init__(self) -> None:
        """Check the tasks, and note what decides their numbers."""
        take_fields(self)
        check_tasks(self.tasks, self.folder)
        object.__setattr__(self, "data", data_hash(self.tasks, self.folder))
        object.__setattr__(self, "harness", version("lm-eval"))

    @property
    def columns(self) -> Mapping[str, type]:
        """A column for each task."""
        return {f"task_{each.partition('@')[0]}": float for each in self.tasks}

    def measure(
        self,
        study: Study,
        fact: Fact,  # noqa: ARG002
        edits: Sequence[Edit],
    ) -> list[dict[str, Any]]:
        """As :meth:`Metric.measure`."""
        found = score_tasks(study.model, edits, self.tasks, folder=self.folder, limit=self.limit)
        return [
            {f"task_{name}": scores.main for name, scores in each.items()} for each in found[1:]
        ]


def find_metrics(given: Iterable[Metric | str], *, seed: int = 0) -> tuple[Metric, ...]:
    """Return the metrics that are meant, in order, each once.

    Args:
        given: Metrics, or names of built-in ones.
        seed: Seed of those that draw something and are given by name.

    Raises:
        BadInputError: If no metric goes by a name, or a column is filled twice or of a kind that
            no file of rows takes.
    """
    builtin: dict[str, tuple[Callable[..., Metric], dict[str, int]]] = {
        "perplexity": (PerplexityMetric, {}),
        "accuracy": (AccuracyMetric, {"seed": seed}),
        "scores": (ScoresMetric, {}),
        "generated": (GeneratedMetric, {}),
        "entropy": (EntropyMetric, {"seed": seed}),
        "tasks": (TasksMetric, {}),
    }
    owners = dict.fromkeys([*FACT, *REPORT], "every row")
    owners |= {column: name for name in METRICS for column in METRIC_COLUMNS[name]}
    found: dict[str, Metric] = {}
    for each in given:
        if isinstance(each, str):
            if each not in builtin:
                raise BadInputError(f"no metric is called {each!r}; take {', '.join(METRICS)}")
            make, settings = builtin[each]
            if each not in found:
                found[each] = make(**settings)
            continue
        known = found[each.name].__class__ if each.name in found else None
        kind, _ = builtin.get(each.name, (type(each), {}))
        if type(each) is not (known or kind):
            raise BadInputError(f"two metrics are called {each.name!r}; give each its own name")
        for column, filled in each.columns.items():
            if owners.setdefault(column, each.name) != each.name:
                raise BadInputError(
                    f"the metric {each.name!r} has a column {column!r}, which {owners[column]!r} "
                    "has already; give it another name"
                )
            if filled not in (str, int, float, bool):
                raise BadInputError(
                    f"the column {column!r} of the metric {each.name!r} is a {filled!r}; take str, "
                    "int, float or bool"
                )
        found[each.name] = each
    return tuple(found.values())
