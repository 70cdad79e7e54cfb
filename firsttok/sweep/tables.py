"""The tables of "The Fall of ROME" and "Rebuilding ROME" from the rows of a sweep."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean, median
from typing import Any

from firsttok.data import paper_values
from firsttok.data.paper import REBUILDING
from firsttok.display import Panel, Shown, Table
from firsttok.sweep.groups import GROUPS, GroupedRows, mean_of

__all__ = ["ResultTable", "method_summary", "model_tables"]

_ACCURACIES = ("efficacy", "generalization", "locality")
_SCORES = ("ES", "EM", "PS", "PM", "NS", "NM")
_SINGLE_EDITS = (("Table 1", "gpt-j-6b"), ("Table 4", "gpt2-xl"))
"""Tables of "Rebuilding ROME" that can stand beside a sweep; its Table 2 edits sequentially."""
_REASONS = 15
"""Reasons that are shown; the rows hold all."""
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True, kw_only=True, repr=False)
class ResultTable(Shown):
    """A table of a run."""

    name: str
    """Short name: ``Table 1``, ``Table R1`` for one of "Rebuilding ROME", ``Failed cases``."""
    model: str
    """Label of the model its numbers are of."""
    title: str
    """What it shows."""
    columns: tuple[str, ...]
    """Names of its columns."""
    lines: tuple[tuple[Any, ...], ...]
    """Its lines; a cell is a text, a number or None."""

    def panel(self) -> Panel:
        """The table under its title."""
        return Panel(title=self.title, parts=[Table(columns=self.columns, lines=self.lines)])


def model_tables(rows: GroupedRows) -> tuple[ResultTable, ...]:
    """All tables of one model, the papers' numbers beside its own.

    Tables 1, 2, 4 and 5 of "The Fall of ROME", Tables 1 and 4 and Figures 2 and 5 of "Rebuilding
    ROME", and the failed cases if there are any.

    Args:
        rows: The model's rows.
    """
    tables = [
        _update_components(rows),
        _perplexities(rows),
        _accuracies(rows),
        _prefixed_accuracies(rows),
        _scores(rows),
        _sizes(rows),
    ]
    if any(rows.pick("generated_exact", method) for method in rows.methods):
        tables.append(_generated(rows))
    return (*tables, _failures(rows)) if rows.failed else tuple(tables)


def method_summary(rows: GroupedRows, slots: Mapping[str, Mapping[str, str]]) -> ResultTable:
    """One line per method: which key stands where, and what that did.

    Args:
        rows: The model's rows.
        slots: Slot values by the name of the method, then of the slot, as a manifest has them.
    """
    names = list(dict.fromkeys(name for chosen in slots.values() for name in chosen))
    lines: list[tuple[Any, ...]] = []
    for method in rows.methods:
        sizes = [abs(value) for value in rows.pick("denominator", method)]
        collapsed = rows.pick("collapsed", method)
        lines.append(
            (
                rows.label(method),
                *(slots[method].get(name, "-").replace("_", " ") for name in names),
                len(sizes),
                f"{sum(map(bool, collapsed))} of {len(collapsed)}" if collapsed else None,
                min(sizes, default=None),
                max(rows.pick("perplexity", method), default=None),
                rows.percent("locality", method),
                rows.percent("efficacy", method),
                rows.percent("prefixed_efficacy", method),
                rows.percent("generated_first_words", method),
            )
        )
    before = "" if rows.original is None else f"; perplexity {rows.original:.2f} before"
    return ResultTable(
        name="Methods",
        model=rows.model,
        title=f"Methods side by side, {rows.model} (locality, efficacy and generated in "
        f"percent{before})",
        columns=(
            *("method", *names, "cases", "collapsed", "least |denominator|", "max perplexity"),
            *("locality", "efficacy", "behind a prefix", "generated"),
        ),
        lines=tuple(lines),
    )


def _update_components(rows: GroupedRows) -> ResultTable:
    printed, papers = _printed("Table 1")
    lines: list[tuple[Any, ...]] = []
    for component in ("numerator", "denominator"):
        for cases in rows.groups:
            values = [
                [abs(value) for value in rows.pick(component, method, cases)]
                for method in rows.methods
            ]
            lines.append(
                (
                    f"{component}, {cases} ({_counts(values)})",
                    *(mean_of(each) for each in values),
                    *(printed.get((f"{component}/{cases}", paper)) for paper in papers),
                )
            )
    return ResultTable(
        name="Table 1",
        model=rows.model,
        title=f"Table 1. Mean norm of the numerator and mean |denominator|, {rows.model} "
        f"({_meaning(rows)})",
        columns=("", *map(rows.label, rows.methods), *(f"paper, {p}, ROME" for p in papers)),
        lines=tuple(lines),
    )


def _perplexities(rows: GroupedRows) -> ResultTable:
    printed, papers = _printed("Table 2")
    before = rows.original
    first = (before, before, before, None if before is None else 1.0)
    lines: list[tuple[Any, ...]] = [
        ("original", *first, *(printed["Original", paper] for paper in papers))
    ]
    for method in rows.methods:
        for cases in rows.groups:
            values = rows.pick("perplexity", method, cases)
            largest = max(values, default=None)
            row = f"{rows.label(method)}/{cases}"
            lines.append(
                (
                    f"{rows.label(method)}, {cases} (n={len(values)})",
                    min(values, default=None),
                    mean_of(values),
                    largest,
                    largest / before if largest is not None and before else None,
                    *(printed.get((row, paper)) for paper in papers),
                )
            )
    return ResultTable(
        name="Table 2",
        model=rows.model,
        title=f"Table 2. Perplexity of the edited model, {rows.model} ({_meaning(rows)})",
        columns=("", "min", "mean", "max", "max / original", *(f"paper, {p}, max" for p in papers)),
        lines=tuple(lines),
    )


def _accuracies(rows: GroupedRows) -> ResultTable:
    shown = [cases for cases in rows.groups if cases != "normal"]
    lines = [
        _accuracy_line(rows, method, cases, _ACCURACIES)
        for method in rows.methods
        for cases in shown
    ]
    printed, papers = _printed("Table 4")
    for paper in papers:
        cells = (printed[column, paper] for column in _ACCURACIES)
        lines.append((f"paper, {paper}, C-ROME, collapse", None, *cells))
    return ResultTable(
        name="Table 4",
        model=rows.model,
        title=f"Table 4. Accuracy on collapse cases in percent, {rows.model} ({_meaning(rows)})",
        columns=("", "cases", *_ACCURACIES),
        lines=tuple(lines),
    )


def _prefixed_accuracies(rows: GroupedRows) -> ResultTable:
    lines: list[tuple[Any, ...]] = []
    for cases in rows.groups:
        # As in the paper, which prefixes the prompts of collapse cases and no others.
        first = "efficacy" if cases == "normal" else "prefixed_efficacy"
        columns = (first, *_ACCURACIES[1:])
        lines += [_accuracy_line(rows, method, cases, columns) for method in rows.methods]
    printed, papers = _printed("Table 5")
    for paper in papers:
        for cases in GROUPS[:2]:
            cells = (printed[f"{cases}/{column}", paper] for column in _ACCURACIES)
            lines.append((f"paper, {paper}, C-ROME, {cases}", None, *cells))
    return ResultTable(
        name="Table 5",
        model=rows.model,
        title="Table 5. Accuracy in percent, rewriting prompts of collapse cases prefixed at test "
        f"time, {rows.model} ({_meaning(rows)})",
        columns=("", "cases", *_ACCURACIES),
        lines=tuple(lines),
    )


def _scores(rows: GroupedRows) -> ResultTable:
    lines: list[tuple[Any, ...]] = []
    for method in rows.methods:
        means = {name: rows.percent(name.lower(), method) for name in _SCORES}
        count = len(rows.pick("es", method))
        lines.append((rows.label(method), count, *means.values(), _score(means)))
    for table, paper in _SINGLE_EDITS:
        printed, _ = _printed(table, paper=REBUILDING)
        for row in dict.fromkeys(row.partition("/")[0] for row, _ in printed):
            name = {"Original": "ROME", "r-ROME": "r-ROME (C-ROME)"}.get(row, row)
            cells = (printed[f"{row}/{column}", paper] for column in (*_SCORES, "Score"))
            lines.append((f"paper, {paper}, {name}", None, *cells))
    return ResultTable(
        name="Table R1",
        model=rows.model,
        title='Table R1. Scores of single edits in percent, as in Tables 1 and 4 of "Rebuilding '
        f'ROME", {rows.model} (Score: harmonic mean of the mean ES, PS and NS)',
        columns=("", "cases", *_SCORES, "Score"),
        lines=tuple(lines),
    )


def _generated(rows: GroupedRows) -> ResultTable:
    columns = ("generated_exact", "generated_first_words", "efficacy", "locality")
    lines = [
        _accuracy_line(rows, method, cases, columns)
        for method in rows.methods
        for cases in rows.groups
    ]
    return ResultTable(
        name="Generated",
        model=rows.model,
        title="What the edited model writes behind the bare prompt, in percent: exactly the "
        "target, or the target and then more; and the teacher-forced efficacy, which gives it the "
        f"target's earlier tokens, {rows.model} ({_meaning(rows)})",
        columns=("", "cases", "exact", "first words", "efficacy, forced", "locality"),
        lines=tuple(lines),
    )


def _sizes(rows: GroupedRows) -> ResultTable:
    lines: list[tuple[Any, ...]] = []
    for method in rows.methods:
        for cases in rows.groups:
            sizes = rows.pick("mean_delta", method, cases)
            entropies = rows.pick("entropy", method, cases)
            lines.append(
                (
                    f"{rows.label(method)}, {cases} (n={len(sizes)})",
                    median(sizes) if sizes else None,
                    max(sizes, default=None),
                    len(entropies),
                    min(entropies, default=None),
                    median(entropies) if entropies else None,
                    max(entropies, default=None),
                )
            )
    return ResultTable(
        name="Figure R2",
        model=rows.model,
        title="Figure R2. |Delta| (Frobenius norm over number of elements) and normalised "
        f'entropy of ten generations, as in Figures 2 and 5 of "Rebuilding ROME", {rows.model} '
        f"({_meaning(rows)})",
        columns=(
            *("", "|Delta|, median", "|Delta|, max", "with entropy"),
            *("entropy, min", "entropy, median", "entropy, max"),
        ),
        lines=tuple(lines),
    )


def _failures(rows: GroupedRows) -> ResultTable:
    """Reasons, most frequent first; what they quote differs from case to case and is left out."""
    cases: dict[str, list[int]] = {}
    for record in rows.failed:
        reason = _QUOTED.sub("'...'", record["reason"] or "no reason was kept")
        cases.setdefault(reason, []).append(record["case_id"])
    counts = Counter({reason: len(found) for reason, found in cases.items()})
    shown = counts.most_common(_REASONS)
    lines: list[tuple[Any, ...]] = [
        (reason, count, len(set(cases[reason])), cases[reason][0]) for reason, count in shown
    ]
    if len(counts) > len(shown):
        rest = counts.total() - sum(count for _, count in shown)
        lines.append((f"{len(counts) - len(shown)} other reasons", rest, None, None))
    number = len({record["case_id"] for record in rows.failed})
    return ResultTable(
        name="Failed cases",
        model=rows.model,
        title=f"Failed cases, {rows.model} (n={number}; what a reason quotes is left out)",
        columns=("reason", "rows", "cases", "first case"),
        lines=tuple(lines),
    )


def _accuracy_line(
    rows: GroupedRows, method: str, cases: str, columns: Sequence[str]
) -> tuple[Any, ...]:
    count = len(rows.pick(columns[0], method, cases))
    means = (rows.percent(column, method, cases) for column in columns)
    return (f"{rows.label(method)}, {cases}", count, *means)


def _meaning(rows: GroupedRows) -> str:
    """What the groups are."""
    meaning = "collapse: ROME's row of the case collapsed in this run; normal: it did not"
    unknown = "; not judged: no ROME row says" if GROUPS[2] in rows.groups else ""
    return meaning + unknown


def _printed(table: str, **paper: str) -> tuple[dict[tuple[str, str], float], list[str]]:
    """What a paper prints, by row and model; and its models."""
    printed = {(value.row, value.model): value.value for value in paper_values(table, **paper)}
    return printed, list(dict.fromkeys(model for _, model in printed))


def _counts(values: Sequence[Sequence[float]]) -> str:
    sizes = sorted({len(each) for each in values}) or [0]
    return f"n={sizes[0]}" if len(sizes) == 1 else f"n={sizes[0]} to {sizes[-1]}"


def _score(means: Mapping[str, float | None]) -> float | None:
    """The papers' Score: harmonic mean of the mean ES, PS and NS; 0 if one of them is 0."""
    parts = [mean for mean in (means[name] for name in ("ES", "PS", "NS")) if mean is not None]
    return float(harmonic_mean(parts)) if len(parts) == 3 else None
