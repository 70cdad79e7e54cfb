"""The rows of one model by method and group of cases: what the tables are made from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from firsttok.rows import DONE, FAILED

__all__ = ["COLUMNS", "GROUPS", "GroupedRows", "Record", "method_label"]

COLUMNS = (
    *("case_id", "method", "status", "reason", "numerator", "denominator", "mean_delta"),
    *("perplexity", "collapsed", "efficacy", "generalization", "locality", "prefixed_efficacy"),
    *("es", "em", "ps", "pm", "ns", "nm", "entropy"),
    *("generated_exact", "generated_first_words"),
)
"""Columns of a :class:`~firsttok.rows.Row` that the tables need."""
GROUPS = ("collapse", "normal", "not judged")
"""Groups of cases, by what ROME did to the model in this very run (Section 3). A case without a
finished ROME row, or whose perplexity was not measured, is not judged, since nothing says which."""
# As firsttok.editing.METHODS has them. To import that takes seconds, and a table needs no model.
_LABELS = {"rome": "ROME", "c-rome": "C-ROME", "p-rome": "p-ROME", "fc-rome": "FC-ROME"}

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedRows:
    """The rows of one model."""

    model: str
    """Label of the model."""
    methods: tuple[str, ...]
    """Names of the methods, in order."""
    records: Sequence[Record]
    """The rows, with at least :data:`COLUMNS`."""
    original: float | None = None
    """Perplexity of the unedited model, where it is known."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names in tables of methods that are not built in."""

    @cached_property
    def done(self) -> Mapping[tuple[str, str], Sequence[Record]]:
        """Rows that hold numbers, by method and group of the case."""
        finished = [record for record in self.records if record["status"] == DONE]
        cases = {
            record["case_id"]: GROUPS[0] if record["collapsed"] else GROUPS[1]
            for record in finished
            if record["method"] == "rome" and record["collapsed"] is not None
        }
        done: dict[tuple[str, str], list[Record]] = {}
        for record in finished:
            group = cases.get(record["case_id"], GROUPS[2])
            done.setdefault((record["method"], group), []).append(record)
        return done

    @property
    def failed(self) -> list[Record]:
        """Rows that hold a reason."""
        return [record for record in self.records if record["status"] == FAILED]

    def label(self, method: str) -> str:
        """Name of a method in tables."""
        return self.labels.get(method) or method_label(method)

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups to show: both of the papers', and the third if there is a case in it."""
        unknown = any(group == GROUPS[2] for _, group in self.done)
        return GROUPS if unknown else GROUPS[:2]

    def pick(self, column: str, method: str, *groups: str) -> list[float]:
        """The measured values of a column; of all groups if none is named.

        A perplexity that is no number counts as infinite: it is worse than any, and must not hide
        after the order of the rows.
        """
        values = [
            float(record[column])
            for group in groups or GROUPS
            for record in self.done.get((method, group), ())
            if record[column] is not None
        ]
        if column == "perplexity":
            return [math.inf if math.isnan(value) else value for value in values]
        return values

    def percent(self, column: str, method: str, *groups: str) -> float | None:
        """Mean of a column of fractions in percent, None if nothing was measured."""
        values = self.pick(column, method, *groups)
        return 100.0 * fmean(values) if values else None


def method_label(name: str) -> str:
    """Name of a method in tables."""
    return _LABELS.get(name, name)
