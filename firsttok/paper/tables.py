"""An experiment's table: printed beside the paper's numbers, and kept with rows and verdicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import TYPE_CHECKING, Any

from firsttok.console import print_table, show
from firsttok.data.paper import FALL_OF_ROME, paper_values
from firsttok.paper.claims import Claim, Result, judge
from firsttok.storage import save_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from firsttok.probes import Projection

__all__ = [
    "MEASURES",
    "SCORES",
    "Found",
    "accuracy_line",
    "collapsed_of",
    "edit_cells",
    "matching",
    "pick",
    "printed",
    "publish",
    "score_cells",
    "share",
]

MEASURES = ("efficacy", "generalization", "locality")
"""Columns of Tables 4 and 5."""

SCORES = ("ES", "EM", "PS", "PM", "NS", "NM")
"""Columns of the tables of "Rebuilding ROME", before their Score."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an experiment found: rows, the table they give, and what is said and drawn of them."""

    title: str
    """Title of the table."""
    columns: Sequence[str]
    lines: Sequence[Sequence[Any]]
    """A cell is a text, a number or None."""
    rows: Sequence[Mapping[str, Any]]
    """The measured rows, flat, one per observation; claims are judged by them."""
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What they were made with, beyond study and options."""
    notes: Sequence[str] = ()
    """Sentences below the table."""
    draw: "Callable[[], Figure] | None" = None
    points: "Mapping[str, Projection] | None" = None
    """Points of its pictures, kept beside it."""


def publish(
    stem: Path, found: Found, *, provenance: Mapping[str, Any], claims: Sequence[Claim] = ()
) -> None:
    """Print a script's table and the verdicts on its claims, and keep them with its rows.

    Args:
        stem: Path without suffix, ``figures/<model>/<script>``, of ``.json`` and ``.csv``.
        found: Rows, and the table they give.
        provenance: What the rows were made with, beside what ``found`` says.
        claims: What the rows decide.

    Raises:
        ValueError: If a number is not finite.
        CacheError: If a file cannot be written.
    """
    made_with = {**provenance, **found.provenance}
    result = Result(script=stem.name, rows=tuple(found.rows), provenance=made_with)
    judged = [judge(claim, result) for claim in claims]
    print_table(found.title, found.columns, found.lines)
    for each in judged:
        show(f"{each.label} ({each.place}): {each.sentence}")
    table = {"title": found.title, "columns": found.columns, "lines": found.lines}
    verdicts = {"claims": [each.as_dict() for each in judged]}
    save_result(stem, {**table, **verdicts, "provenance": made_with, "rows": found.rows})


def pick(rows: Sequence[Mapping[str, Any]], column: str, **match: Any) -> list[float]:
    """One column of the rows whose other columns have the given values."""
    return [float(row[column]) for row in matching(rows, **match)]


def collapsed_of(rows: Sequence[Mapping[str, Any]], **match: Any) -> str:
    """How many of the rows that match are edits which destroyed the model."""
    flags = pick(rows, "collapsed", **match)
    return f"{int(sum(flags))} of {len(flags)}"


def edit_cells(rows: Sequence[Mapping[str, Any]], **match: Any) -> list[object]:
    """Cells on edits: mean |denominator|, maximum perplexity, and how many collapsed."""
    denominators = [abs(value) for value in pick(rows, "denominator", **match)]
    highest = max(pick(rows, "perplexity", **match))
    return [mean(denominators), highest, collapsed_of(rows, **match)]


def printed(
    table: str, *, paper: str = FALL_OF_ROME
) -> tuple[list[str], dict[tuple[str, str], float]]:
    """Models of a table of a paper, in its order, and its numbers by row and model."""
    values = paper_values(table, paper=paper)
    models = list(dict.fromkeys(value.model for value in values))
    return models, {(value.row, value.model): value.value for value in values}


def accuracy_line(name: str, rows: Sequence[Mapping[str, Any]], **match: Any) -> list[object]:
    """One line of Table 4 or 5: name, number of cases, and three means in percent."""
    chosen = matching(rows, **match)
    return [name, len(chosen), *(share(chosen, column) for column in MEASURES)]


def share(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """Mean of a column in percent, over rows in which there was something to measure."""
    known = [row[column] for row in rows if row[column] is not None]
    return 100.0 * sum(known) / len(known) if known else None


def score_cells(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Means of COUNTERFACT's scores in percent, and the harmonic mean of those of ES, PS and NS."""
    means = [share(rows, name.lower()) for name in SCORES]
    parts = [mean for mean in means[::2] if mean is not None]
    return [*means, float(harmonic_mean(parts)) if len(parts) == 3 else None]


def matching(rows: Sequence[Mapping[str, Any]], **match: Any) -> list[Mapping[str, Any]]:
    """Rows whose columns have the given values; where rows have various columns, name theirs first.

    So a row of another kind is passed over before a column that it lacks is asked for.
    """
    return [row for row in rows if all(row[name] == wanted for name, wanted in match.items())]
