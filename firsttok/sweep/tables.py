"""The tables of "The Fall of ROME" and "Rebuilding ROME" from the rows of a sweep."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, harmonic_mean, median
from typing import Any

from firsttok.data import paper_values
from firsttok.data.paper import REBUILDING
from firsttok.display import Panel, Shown, Table
from firsttok.sweep.groups import GROUPS, GroupedRows

__all__ = ["ResultTable", "method_summary", "model_tables"]

_ACCURACIES = ("efficacy", "generalization", "locality")
_SCORES = ("ES", "EM", "PS", "PM", "NS", "NM")
_REASONS = 15
"""Reasons that are shown; the rows hold all."""
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")

_Line = tuple[Any, ...]


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
    builders = [_update_components, _perplexities, _accuracies, _prefixed_accuracies]
    builders += [_scores, _sizes]
    if any(rows.pick("generated_exact", method) for method in rows.methods):
        builders.append(_generated)
    if rows.failed:
        builders.append(_failures)
    return tuple(build(rows) for build in builders)


def method_summary(rows: GroupedRows, slots: Mapping[str, Mapping[str, str]]) -> ResultTable:
    """One line per method: which key stands where, and what that did.

    Args:
        rows: The model's rows.
        slots: Slot values by the name of the method, then of the slot, as a manifest has them.
    """
    names = list(dict.fromkeys(name for chosen in slots.values() for name in chosen))
    percents = ("locality", "efficacy", "prefixed_efficacy", "generated_first_words")
    lines: list[_Line] = []
    for method in rows.methods:
        sizes = [abs(value) for value in rows.pick("denominator", method)]
        collapsed = rows.pick("collapsed", method)
        lines.append(
            (
                rows.label(method),
                *(slots[method].get(name, "-").replace("_", " ") for name in names),
                len(sizes),
                f"{sum(map(bool, collapsed))} of {len(collapsed)}" if collapsed else None,
                _of(min, sizes),
                _of(max, rows.pick("perplexity", method)),
                *(rows.percent(column, method) for column in percents),
            )
        )
    before = "" if rows.original is None else f"; perplexity {rows.original:.2f} before"
    columns = (
        *("method", *names, "cases", "collapsed", "least |denominator|", "max perplexity"),
        *("locality", "efficacy", "behind a prefix", "generated"),
    )
    note = f"locality, efficacy and generated in percent{before}"
    return _table(rows, "Methods", "Methods side by side", columns, lines, note=note)


def _update_components(rows: GroupedRows) -> ResultTable:
    printed, papers = _printed("Table 1")
    lines: list[_Line] = []
    for component in ("numerator", "denominator"):
        for cases in rows.groups:
            values = [list(map(abs, rows.pick(component, m, cases))) for m in rows.methods]
            counts = sorted({len(each) for each in values}) or [0]
            count = f"n={counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
            own = (_of(fmean, each) for each in values)
            theirs = (printed.get((f"{component}/{cases}", paper)) for paper in papers)
            lines.append((f"{component}, {cases} ({count})", *own, *theirs))
    columns = ("", *map(rows.label, rows.methods), *(f"paper, {p}, ROME" for p in papers))
    what = "Table 1. Mean norm of the numerator and mean |denominator|"
    return _table(rows, "Table 1", what, columns, lines)


def _perplexities(rows: GroupedRows) -> ResultTable:
    printed, papers = _printed("Table 2")
    before = rows.original
    first = (before, before, before, None if before is None else 1.0)
    lines: list[_Line] = [("original", *first, *(printed["Original", paper] for paper in papers))]
    for method, cases in _by_group(rows):
        values = rows.pick("perplexity", method, cases)
        largest = _of(max, values)
        row = f"{rows.label(method)}/{cases}"
        lines.append(
            (
                f"{rows.label(method)}, {cases} (n={len(values)})",
                _of(min, values),
                _of(fmean, values),
                largest,
                largest / before if largest is not None and before else None,
                *(printed.get((row, paper)) for paper in papers),
            )
        )
    columns = ("", "min", "mean", "max", "max / original", *(f"paper, {p}, max" for p in papers))
    return _table(rows, "Table 2", "Table 2. Perplexity of the edited model", columns, lines)


def _accuracies(rows: GroupedRows) -> ResultTable:
    shown = [(method, cases) for method, cases in _by_group(rows) if cases != "normal"]
    lines = [_percents(rows, method, cases, _ACCURACIES) for method, cases in shown]
    lines += _paper_lines("Table 4", {"C-ROME, collapse": ""}, _ACCURACIES)
    what = "Table 4. Accuracy on collapse cases in percent"
    return _table(rows, "Table 4", what, ("", "cases", *_ACCURACIES), lines)


def _prefixed_accuracies(rows: GroupedRows) -> ResultTable:
    lines: list[_Line] = []
    for cases in rows.groups:
        # As in the paper, which prefixes the prompts of collapse cases and no others.
        first = "efficacy" if cases == "normal" else "prefixed_efficacy"
        columns = (first, *_ACCURACIES[1:])
        lines += [_percents(rows, method, cases, columns) for method in rows.methods]
    printed = {f"C-ROME, {cases}": f"{cases}/" for cases in GROUPS[:2]}
    lines += _paper_lines("Table 5", printed, _ACCURACIES)
    what = "Table 5. Accuracy in percent, rewriting prompts of collapse cases prefixed at test time"
    return _table(rows, "Table 5", what, ("", "cases", *_ACCURACIES), lines)


def _scores(rows: GroupedRows) -> ResultTable:
    columns = (*_SCORES, "Score")
    lines: list[_Line] = []
    for method in rows.methods:
        means = {name: rows.percent(name.lower(), method) for name in _SCORES}
        parts = [mean for mean in (means["ES"], means["PS"], means["NS"]) if mean is not None]
        score = float(harmonic_mean(parts)) if len(parts) == 3 else None
        lines.append((rows.label(method), len(rows.pick("es", method)), *means.values(), score))
    printed = {"ROME": "Original/", "r-ROME (C-ROME)": "r-ROME/", "p-ROME": "p-ROME/"}
    # Its tables of single edits; in its Table 2 they are sequential.
    for table in ("Table 1", "Table 4"):
        lines += _paper_lines(table, printed, columns, paper=REBUILDING)
    what = 'Table R1. Scores of single edits in percent, as in Tables 1 and 4 of "Rebuilding ROME"'
    note = "Score: harmonic mean of the mean ES, PS and NS"
    return _table(rows, "Table R1", what, ("", "cases", *columns), lines, note=note)


def _sizes(rows: GroupedRows) -> ResultTable:
    lines: list[_Line] = []
    for method, cases in _by_group(rows):
        sizes = rows.pick("mean_delta", method, cases)
        entropies = rows.pick("entropy", method, cases)
        lines.append(
            (
                f"{rows.label(method)}, {cases} (n={len(sizes)})",
                *(_of(measure, sizes) for measure in (median, max)),
                len(entropies),
                *(_of(measure, entropies) for measure in (min, median, max)),
            )
        )
    columns = (
        *("", "|Delta|, median", "|Delta|, max", "with entropy"),
        *("entropy, min", "entropy, median", "entropy, max"),
    )
    what = (
        "Figure R2. |Delta| (Frobenius norm over number of elements) and normalised entropy of "
        'ten generations, as in Figures 2 and 5 of "Rebuilding ROME"'
    )
    return _table(rows, "Figure R2", what, columns, lines)


def _generated(rows: GroupedRows) -> ResultTable:
    columns = {
        "exact": "generated_exact",
        "first words": "generated_first_words",
        "efficacy, forced": "efficacy",
        "locality": "locality",
    }
    lines = [
        _percents(rows, method, cases, [*columns.values()]) for method, cases in _by_group(rows)
    ]
    what = (
        "What the edited model writes behind the bare prompt, in percent: exactly the target, or "
        "the target and then more; and the teacher-forced efficacy, which gives it the target's "
        "earlier tokens"
    )
    return _table(rows, "Generated", what, ("", "cases", *columns), lines)


def _failures(rows: GroupedRows) -> ResultTable:
    """Reasons, most frequent first; what they quote differs from case to case and is left out."""
    cases: dict[str, list[int]] = {}
    for record in rows.failed:
        reason = _QUOTED.sub("'...'", record["reason"] or "no reason was kept")
        cases.setdefault(reason, []).append(record["case_id"])
    counts = Counter({reason: len(found) for reason, found in cases.items()})
    shown = counts.most_common(_REASONS)
    lines: list[_Line] = [
        (reason, count, len(set(cases[reason])), cases[reason][0]) for reason, count in shown
    ]
    if len(counts) > len(shown):
        rest = counts.total() - sum(count for _, count in shown)
        lines.append((f"{len(counts) - len(shown)} other reasons", rest, None, None))
    number = len({record["case_id"] for record in rows.failed})
    note = f"n={number}; what a reason quotes is left out"
    columns = ("reason", "rows", "cases", "first case")
    return _table(rows, "Failed cases", "Failed cases", columns, lines, note=note)


def _table(
    rows: GroupedRows,
    name: str,
    what: str,
    columns: tuple[str, ...],
    lines: Iterable[_Line],
    *,
    note: str | None = None,
) -> ResultTable:
    """A table; a note follows its title, by default what the groups are."""
    if note is None:
        note = "collapse: ROME's row of the case collapsed in this run; normal: it did not"
        note += "; not judged: no ROME row says" if GROUPS[2] in rows.groups else ""
    title = f"{what}, {rows.model} ({note})"
    return ResultTable(
        name=name, model=rows.model, title=title, columns=columns, lines=tuple(lines)
    )


def _by_group(rows: GroupedRows) -> list[tuple[str, str]]:
    return [(method, cases) for method in rows.methods for cases in rows.groups]


def _percents(rows: GroupedRows, method: str, cases: str, columns: Sequence[str]) -> _Line:
    count = len(rows.pick(columns[0], method, cases))
    means = (rows.percent(column, method, cases) for column in columns)
    return (f"{rows.label(method)}, {cases}", count, *means)


def _paper_lines(
    table: str, named: Mapping[str, str], columns: Sequence[str], **paper: str
) -> list[_Line]:
    """Lines of a paper's table, by what each is called and how its rows begin."""
    printed, papers = _printed(table, **paper)
    return [
        (f"paper, {model}, {name}", None, *(printed[begin + c, model] for c in columns))
        for model in papers
        for name, begin in named.items()
    ]


def _printed(table: str, **paper: str) -> tuple[dict[tuple[str, str], float], list[str]]:
    """What a paper prints, by row and model; and its models."""
    printed = {(value.row, value.model): value.value for value in paper_values(table, **paper)}
    return printed, list(dict.fromkeys(model for _, model in printed))


def _of(measure: Callable[[list[float]], float], values: list[float]) -> float | None:
    """A mean or an extreme, None of nothing."""
    return measure(values) if values else None
