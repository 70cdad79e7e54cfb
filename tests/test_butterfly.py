"""What decides on the claims of "The Butterfly Effect"; every rule can fail."""

from collections.abc import Sequence
from typing import Any

import pytest

from analyses import butterfly_sequences as sequences
from analyses import butterfly_single_edits as single
from analyses import butterfly_surrogate as surrogate
from firsttok.evaluation import OWN_TASKS
from firsttok.paper.claims import Claim, Result, Status, judge

YES, PARTLY, NO, NOT_JUDGED = Status.REPRODUCED, Status.PARTLY, Status.NOT, Status.NOT_JUDGED
Rows = list[dict[str, Any]]


def verdict(claims: Sequence[Claim], name: str, rows: Rows) -> Status:
    claim = next(each for each in claims if each.id == name)
    result = Result(script="s", rows=tuple(rows), provenance={"original_perplexity": 70.0})
    return judge(claim, result).status


def edits(method: str, cases: str, **columns: Any) -> Rows:
    return [{"part": "edit", "method": method, "cases": cases} | columns for _ in range(4)]


@pytest.mark.parametrize(
    ("rome", "others", "expected"),
    [
        (5e4, (80.0, 80.0, 80.0), YES),
        (5e4, (80.0, 2000.0, 2000.0), PARTLY),
        (5e4, (2000.0, 2000.0, 2000.0), NO),
        (900.0, (80.0, 80.0, 80.0), NO),
    ],
)
def test_what_decides_on_single_edits(
    rome: float, others: tuple[float, ...], expected: Status
) -> None:
    rows = edits("ROME", "collapse", perplexity=rome)
    for method, value in zip(("FT", "MEND", "MEMIT"), others, strict=True):
        rows += edits(method, "normal", perplexity=value)
    assert verdict(single.CLAIMS, "butterfly-single", rows) is expected


@pytest.mark.parametrize(
    ("original", "edited", "expected"),
    [
        (0.3, (0.0, 0.05), YES),
        (0.3, (0.0, 0.2), PARTLY),
        (0.3, (0.2, 0.2), NO),
        (0.05, (0.0, 0.0), NOT_JUDGED),
    ],
)
def test_what_decides_on_tasks(
    original: float, edited: tuple[float, ...], expected: Status
) -> None:
    def state(name: str, over: float) -> dict[str, Any]:
        return {"part": "tasks", "state": name} | dict.fromkeys(OWN_TASKS, 0.25 + over)

    rows = [
        state("original", original),
        *(state(f"case {n}", value) for n, value in enumerate(edited)),
    ]
    rows.append(state("random", 0.0))
    assert verdict(single.CLAIMS, "butterfly-tasks", rows) is expected
    assert verdict(single.CLAIMS, "butterfly-tasks", []) is NOT_JUDGED


@pytest.mark.parametrize(
    ("ratios", "expected"), [((10.0, 20.0), YES), ((2.0, 20.0), PARTLY), ((2.0, 9.0), NO)]
)
def test_what_decides_on_the_change(ratios: tuple[float, float], expected: Status) -> None:
    low, high = ratios
    names = [f"quantile_{q:g}" for q in single.QUANTILES]
    one = dict.fromkeys(names, high) | {names[0]: low}
    rows: Rows = [
        {"part": "change", "cases": "collapse", **one},
        {"part": "change", "cases": "normal", **dict.fromkeys(names, 1.0)},
    ]
    assert verdict(single.CLAIMS, "butterfly-change", rows) is expected


@pytest.mark.parametrize(
    ("hard", "repaired", "expected"),
    [(0.3, 0.9, YES), (0.3, 0.5, PARTLY), (0.9, 0.95, NO), (0.9, 0.5, NO)],
)
def test_what_decides_on_underwriting(hard: float, repaired: float, expected: Status) -> None:
    rows: Rows = []
    for name in ("MEMIT", "AlphaEdit"):
        for variant, kind, value in (
            ("", "collapse", hard),
            ("", "normal", 0.95),
            ("FC-", "collapse", repaired),
            ("FC-", "normal", 0.95),
        ):
            found = {"efficacy": value, "prefixed_efficacy": value}
            rows += edits(f"{variant}{name}", kind, **found)
    assert verdict(single.CLAIMS, "own-underwrite", rows) is expected
    assert verdict(single.CLAIMS, "own-underwrite", rows[4:]) is NOT_JUDGED


@pytest.mark.parametrize(
    ("rho", "high", "expected"),
    [(-0.9, -0.7, YES), (-0.9, -0.4, PARTLY), (-0.6, -0.1, PARTLY), (-0.3, 0.1, NO)],
)
def test_what_decides_on_the_surrogate(rho: float, high: float, expected: Status) -> None:
    rows: Rows = [{"part": "model", "perplexity": 70.0} for _ in range(9)]
    for name in (*OWN_TASKS, "mean"):
        rows.append({"part": "correlation", "task": name, "rho": rho, "low": -1.0, "high": high})
    assert verdict(surrogate.CLAIMS, "butterfly-surrogate", rows) is expected


def test_the_correlation_is_spearmans() -> None:
    rows = [
        {"subject": "AB"[n % 2], "perplexity": 10.0**n, **dict.fromkeys(OWN_TASKS, 1.0 / n)}
        for n in range(1, 9)
    ]
    found = surrogate.correlation(rows, "mean", 0)
    assert found["rho"] == pytest.approx(-1.0)
    assert found["low"] <= found["high"] < -0.8
    flat = [row | dict.fromkeys(OWN_TASKS, 0.5) for row in rows]
    assert surrogate.correlation(flat, "mean", 0)["rho"] == 0.0


def steps(**highest: tuple[float, float]) -> Rows:
    rows: Rows = []
    for method, ends in highest.items():
        for kind, end in zip(("hard", "normal"), ends, strict=True):
            for step, value in enumerate((70.0, 75.0, 80.0, end), 1):
                rows.append({"part": "step", "method": method, "cases": kind, "step": step})
                rows[-1]["perplexity"] = float(value)
    return rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (steps(ROME=(1e6, 90), MEMIT=(2e3, 90), FT=(3e3, 2e3), MEND=(2e3, 3e3)), (YES, YES, YES)),
        (
            steps(ROME=(1e6, 90), MEMIT=(90, 90), FT=(3e3, 90), MEND=(90, 90)),
            (PARTLY, PARTLY, PARTLY),
        ),
        (steps(ROME=(1e6, 1e6), MEMIT=(90, 90), FT=(90, 2e3), MEND=(90, 2e3)), (NO, NO, NO)),
    ],
)
def test_what_decides_on_sequences(rows: Rows, expected: tuple[Status, ...]) -> None:
    names = ("butterfly-hard", "butterfly-alike", "butterfly-only-hard")
    assert tuple(verdict(sequences.CLAIMS, name, rows) for name in names) == expected


def test_a_perplexity_that_is_no_number_is_a_collapse() -> None:
    rows = steps(ROME=(float("nan"), 90), MEMIT=(2e3, 90), FT=(3e3, 2e3), MEND=(2e3, 3e3))
    assert verdict(sequences.CLAIMS, "butterfly-only-hard", rows) is YES
