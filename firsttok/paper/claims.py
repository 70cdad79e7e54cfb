"""Claims, and the verdict that a rule comes to on what an experiment measured.

A rule reads the rows and the provenance of one script and nothing else, says its thresholds in
words, and passes over no gap: what is missing is not judged. Each model is judged by itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any, TypeGuard

from firsttok.evaluation import COLLAPSE_THRESHOLD

__all__ = [
    "APART",
    "LEAST",
    "PROBE",
    "SILHOUETTE",
    "STAGES_RULE",
    "Claim",
    "GapError",
    "Judged",
    "Result",
    "Statement",
    "Status",
    "Verdict",
    "above",
    "crossed",
    "embedding",
    "fixed",
    "grade",
    "is_apart",
    "judge",
    "layers_of",
    "pair_of",
    "require",
    "share",
    "spread",
    "swapped",
    "tally",
]

LEAST = 3
"""Fewest cases of a group that a rule judges by; fewer say too little to call a claim."""
PROBE = 0.9
SILHOUETTE = 0.3
"""Two groups are apart if a linear probe is right in nine of ten cases on vectors it was not fitted
on, and the silhouette speaks of a structure at all. A probe alone finds a difference between almost
any two groups in 1536 dimensions; what a t-SNE picture shows as two clouds needs both."""
APART = f"probe accuracy at least {PROBE} and silhouette at least {SILHOUETTE}"
STAGES_RULE = (
    "The paper does not say where its swap acts, so three stages are measured: on the keys, on the "
    "keys and the value optimisation, and on everything"
)


class GapError(Exception):
    """Rows are missing, or do not allow a judgement; the message is the verdict's reason."""


class Status(Enum):
    """What became of a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT = "not"
    NOT_JUDGED = "not judged"
    """The script ran, and its rows do not allow a verdict."""


LABELS = {
    Status.REPRODUCED: ("reproduced", "holds"),
    Status.PARTLY: ("partly", "partly"),
    Status.NOT: ("not reproduced", "does not hold"),
    Status.NOT_JUDGED: ("not judged", "not judged"),
}
"""Words for the papers' claims and for our own."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rule came to, and the numbers it comes from."""

    status: Status
    reason: str
    """One or two sentences with the measured numbers, or with what is missing."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A claim that a table or a figure supports."""

    id: str
    """Short name, unique."""
    place: str
    """Where the paper makes it (``Table 1``); of a claim of ours, what was known of it before."""
    sentence: str
    rule: str
    """The rule that decides on it in words, thresholds included."""
    own: bool = False
    """Whether the claim is ours, and not one of the paper's."""


@dataclass(frozen=True, kw_only=True)
class Claim(Statement):
    """A claim, and the rule that decides on it."""

    decide: "Callable[[Result], Verdict]"
    """The rule: a pure function of rows and provenance."""
    on_collapse: bool = False
    """Whether it speaks of collapse cases and its rows do not say that they collapse here."""


@dataclass(frozen=True, kw_only=True)
class Judged(Verdict, Statement):
    """A claim with its verdict on one model."""

    @property
    def label(self) -> str:
        """The verdict in one or two words."""
        return LABELS[self.status][self.own]

    def as_dict(self) -> dict[str, Any]:
        """As a result file holds it."""
        return asdict(self) | {"status": self.status.value}

    @staticmethod
    def of(record: Mapping[str, Any]) -> "Judged":
        """Read what :meth:`as_dict` made.

        Raises:
            TypeError: If a field is missing, or is none.
            ValueError: If there is no such status.
        """
        given: dict[str, Any] = {**record, "status": Status(record.get("status"))}
        return Judged(**given)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The content of ``figures/<model>/<script>.json``."""

    script: str
    """Name of the script, without suffix."""
    rows: tuple[Mapping[str, Any], ...]
    """The measured rows, flat."""
    provenance: Mapping[str, Any]
    """What they were made with."""
    title: str = ""
    """Of the table that the script printed; empty if it kept none."""
    columns: tuple[str, ...] = ()
    lines: tuple[tuple[Any, ...], ...] = ()
    """The table's lines; a cell is a text, a number or None."""
    claims: tuple[Judged, ...] | None = None
    """The script's claims with their verdicts; None if an older version wrote the file."""

    def chosen(self, **match: Any) -> list[Mapping[str, Any]]:
        """Rows whose fields have the given values."""
        return [
            row
            for row in self.rows
            if all(row.get(field) == wanted for field, wanted in match.items())
        ]

    def values(self, column: str, *, least: int = LEAST, **match: Any) -> list[float]:
        """One column of the rows that match.

        Raises:
            GapError: If there are fewer than ``least`` such rows, or a cell is no finite
                number: a hole is often the most extreme case, so it is not passed over.
        """
        rows = self.chosen(**match)
        where = ", ".join(f"{field} = {value}" for field, value in match.items())
        where = f" with {where}" if where else ""
        if len(rows) < least:
            count = f"{len(rows) or 'no'} row{'' if len(rows) == 1 else 's'}"
            raise GapError(f"{self.script} has {count}{where}; {least} are needed.")
        numbers = [float(row[column]) for row in rows if _is_finite(row.get(column))]
        if len(numbers) < len(rows):
            raise GapError(
                f"{self.script} has no number for {column} in {len(rows) - len(numbers)} of its "
                f"{len(rows)} rows{where}."
            )
        return numbers

    def known(self, column: str, **match: Any) -> list[float]:
        """As :meth:`values`, without rows of facts that have no paraphrase or neighbour (None)."""
        rows = tuple(row for row in self.rows if row.get(column, "") is not None)
        return replace(self, rows=rows).values(column, **match)

    def number(self, field: str) -> float:
        """One number of the provenance; raises GapError if it is not there, or not finite."""
        value = self.provenance.get(field)
        if not _is_finite(value):
            raise GapError(f"{self.script} has no number for {field} in its provenance.")
        return float(value)


def grade(reproduced: bool, partly: bool, reason: str) -> Verdict:
    """Return ``reproduced`` if the first holds, or else ``partly`` if the second does."""
    status = Status.PARTLY if partly else Status.NOT
    return Verdict(status=Status.REPRODUCED if reproduced else status, reason=reason)


def judge(claim: Claim, result: Result) -> Judged:
    """Return a claim with its verdict, ``not judged`` with a reason where the rows allow none."""
    try:
        _check_original(result)
        if claim.on_collapse:
            _check_list(result)
        found = claim.decide(result)
    except GapError as gap:
        found = Verdict(status=Status.NOT_JUDGED, reason=str(gap))
    stated = {field.name: getattr(claim, field.name) for field in fields(Statement)}
    return Judged(**stated, status=found.status, reason=found.reason)


def _check_original(result: Result) -> None:
    """No edit can collapse a model that is no language model on these sentences to begin with."""
    found = [row.get("original_perplexity") for row in result.rows]
    found.append(result.provenance.get("original_perplexity"))
    highest = max((value for value in found if isinstance(value, int | float)), default=0.0)
    if highest > COLLAPSE_THRESHOLD:
        raise GapError(
            f"The unedited model's perplexity is {highest:,.0f}, above {COLLAPSE_THRESHOLD:g} "
            "itself; run the script with --text-bos with."
        )


def _check_list(result: Result) -> None:
    """Cases that collapse another model are no collapse cases here."""
    listed = result.provenance.get("case_list")
    model = result.provenance.get("model")
    if not (isinstance(listed, Mapping) and isinstance(model, Mapping)):
        return
    if listed.get("fingerprint") != model.get("fingerprint"):
        raise GapError(
            f"The cases are those that collapse {listed.get('model')}; nothing says that they "
            "collapse this model."
        )


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def require(count: int | float, said: str) -> None:
    """Raise GapError where a count that a rule needs, and that is said, is below the least one."""
    if count < LEAST:
        raise GapError(f"{said}; {LEAST} are needed.")


def fixed(value: float) -> str:
    """A number as the reasons show it: readable at a glance, and never rounded to nothing."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.4f}"


def spread(values: Sequence[float]) -> str:
    """The smallest and the largest of some numbers, as :func:`fixed` shows them."""
    ends = dict.fromkeys(fixed(end) for end in (min(values), max(values)))
    return " to ".join(ends)


def share(perplexities: Sequence[float]) -> float:
    """The share of edits that destroyed the model."""
    return sum(value > COLLAPSE_THRESHOLD for value in perplexities) / len(perplexities)


def above(perplexities: Sequence[float]) -> str:
    """The same as a count."""
    return f"{sum(value > COLLAPSE_THRESHOLD for value in perplexities)} of {len(perplexities)}"


def tally(perplexities: Mapping[str, Sequence[float]]) -> str:
    """The same of several groups, by name."""
    return ", ".join(f"{above(values)} ({name})" for name, values in perplexities.items())


def crossed(
    result: Result, *, bad: Mapping[str, Mapping[str, Any]], good: Mapping[str, Any]
) -> Verdict:
    """Whether all edits of the bad kinds destroy the model, and none of the good kinds.

    A kind is a name, and fields that pick its rows.
    """
    found = {name: result.values("perplexity", **match) for name, match in {**bad, **good}.items()}
    worse, better = [share(found[name]) for name in bad], [share(found[name]) for name in good]
    return grade(
        min(worse) == 1 and max(better) == 0,
        min(worse) >= 0.5 > max(better),
        f"Above {COLLAPSE_THRESHOLD:g} after ROME, by k^u: {tally(found)}.",
    )


def swapped(result: Result) -> tuple[str, dict[str, list[float]], str]:
    """The position embedding, perplexities by the stage a swap acts in, and collapses in words."""
    kind = embedding(result)
    stages = {
        stage: result.values("perplexity", stage=stage)
        for stage in ("keys", "editing", "everything")
    }
    positions = "Rotary positions" if kind == "rotary" else "Learned position embeddings"
    threshold = f"Above {COLLAPSE_THRESHOLD:g} under the swap, by where it acts"
    return kind, stages, f"{positions}. {threshold}: {tally(stages)}"


def embedding(result: Result) -> str:
    """The kind of position embedding a swap was measured on, ``learned`` or ``rotary``."""
    kind = result.provenance.get("embedding")
    if kind not in ("learned", "rotary"):
        raise GapError(f"{result.script} does not say which position embedding it ran on.")
    return str(kind)


def pair_of(result: Result, **match: str) -> dict[str, float]:
    """How far two groups of vectors are apart: the one row that matches."""
    columns = ("silhouette", "probe_accuracy", "n")
    found = {column: result.values(column, least=1, **match)[0] for column in columns}
    require(found["n"], f"{result.script} has {found['n']:g} vectors in a group")
    return found


def is_apart(row: Mapping[str, Any]) -> bool:
    """Whether two groups are apart, by :data:`APART`."""
    return row["probe_accuracy"] >= PROBE and row["silhouette"] >= SILHOUETTE


def layers_of(result: Result, **match: str) -> dict[int, dict[str, Any]]:
    """Layers in order, with D(F)/D(S) and whether the bootstrap intervals lie apart."""
    numbers = ["layer", "d_first", "d_subsequent", "d_first_high", "d_subsequent_low"]
    if match:
        numbers += ["silhouette", "probe_accuracy"]
    columns = {name: result.values(name, least=1, **match) for name in numbers}
    layers: dict[int, dict[str, Any]] = {}
    for values in zip(*columns.values(), strict=True):
        row: dict[str, Any] = dict(zip(columns, values, strict=True))
        if row["d_subsequent"] <= 0:
            raise GapError(f"D(S) is zero at layer {row['layer']:g}, so no ratio can be formed.")
        row["layer"] = int(row["layer"])
        row["ratio"] = row["d_first"] / row["d_subsequent"]
        row["parted"] = row["d_first_high"] < row["d_subsequent_low"]
        layers[row["layer"]] = row
    return dict(sorted(layers.items()))
