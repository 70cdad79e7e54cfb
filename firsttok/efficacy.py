"""Accuracies of many edits: the rows and lines of Tables 4 and 5."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress

from firsttok.data import Fact
from firsttok.editing import Method
from firsttok.measuring import measure_facts
from firsttok.study import Study

__all__ = ["accuracy_line", "measure_accuracy"]

_COLUMNS = ("efficacy", "generalization", "locality")


def measure_accuracy(
    study: Study,
    facts: Sequence[Fact],
    methods: Sequence[Method],
    *,
    prefixed: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "accuracies",
) -> list[dict[str, Any]]:
    """Edit every fact by every method and measure efficacy, generalization and locality.

    Args:
        study: The study; what is in its work folder is not measured again.
        facts: The facts.
        methods: The methods.
        prefixed: Whether a prefix stands before the rewriting prompt at test time (Table 5).
        seed: Seed of the prefixes.
        progress: Where to show progress.
        label: What the progress bar says.

    Returns:
        A row for each fact and method, by the method's label.
    """
    names = {method.name: method.label for method in methods}
    rows = measure_facts(
        study, facts, methods, metrics=["accuracy"], seed=seed, progress=progress, label=label
    )
    return [
        {
            "case_id": row.case_id,
            "subject": row.subject,
            "method": names[row.method],
            "prefix": row.prefix if prefixed else "{}",
            **{column: row[column] for column in _COLUMNS},
        }
        | ({"efficacy": row.prefixed_efficacy} if prefixed else {})
        for row in rows
    ]


def accuracy_line(name: str, rows: Sequence[Mapping[str, Any]], **match: Any) -> list[object]:
    """One line of Table 4 or 5: name, number of cases, and three means in percent."""
    chosen = [row for row in rows if all(row[key] == value for key, value in match.items())]
    line: list[object] = [name, len(chosen)]
    for column in _COLUMNS:
        values = [row[column] for row in chosen if row[column] is not None]
        line.append(100.0 * sum(values) / len(values) if values else None)
    return line
