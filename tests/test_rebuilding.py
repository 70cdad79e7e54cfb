"""What decides on the claims of "Rebuilding ROME"; every rule can fail."""

from collections.abc import Sequence
from typing import Any

import pytest

from analyses import rebuilding_sequences as sequences
from analyses import rebuilding_single_edits as single
from firsttok.paper.claims import Claim, Result, Status, judge

YES, PARTLY, NO, NOT_JUDGED = Status.REPRODUCED, Status.PARTLY, Status.NOT, Status.NOT_JUDGED
Rows = list[dict[str, Any]]


def verdict(claims: Sequence[Claim], name: str, rows: Rows) -> Status:
    claim = next(each for each in claims if each.id == name)
    result = Result(script="s", rows=tuple(rows), provenance={"original_perplexity": 70.0})
    return judge(claim, result).status


def edits(method: str, cases: str, *, count: int = 4, **columns: Any) -> Rows:
    scores = dict.fromkeys(("es", "em", "ps", "pm", "ns", "nm"), 0.9)
    return [{"method": method, "cases": cases} | scores | columns for _ in range(count)]


@pytest.mark.parametrize(
    ("rome", "normal", "spared", "expected"),
    [
        (1.0, 0.1, 0.1, YES),
        (1.0, 0.1, 0.2, PARTLY),
        (1.0, 0.3, 0.3, PARTLY),
        (1.0, 0.5, 0.1, NO),
        (1.0, 0.1, 0.5, NO),
    ],
)
def test_what_decides_on_the_size_of_an_edit(
    rome: float, normal: float, spared: float, expected: Status
) -> None:
    rows = edits("ROME", "collapse", mean_delta=rome) + edits("ROME", "normal", mean_delta=normal)
    # The largest normal one decides whether they are apart, the median whether by how much.
    rows[-1]["mean_delta"] = 2 * normal
    rows += edits("C-ROME", "collapse", mean_delta=spared)
    assert verdict(single.CLAIMS, "rebuilding-delta", rows) is expected


@pytest.mark.parametrize(
    ("low", "expected"), [([0.1] * 10, YES), ([0.1] * 7 + [0.9] * 3, PARTLY), ([0.5] * 10, NO)]
)
def test_what_decides_on_the_entropy(low: list[float], expected: Status) -> None:
    rows = [row for value in low for row in edits("ROME", "collapse", count=1, entropy=value)]
    rows += edits("ROME", "normal", entropy=0.5)
    assert verdict(single.CLAIMS, "rebuilding-entropy", rows) is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ps": 0.95}, YES),
        ({"ps": 0.95, "es": 0.8}, PARTLY),
        ({"ns": 0.95}, PARTLY),
        ({"ps": 0.85}, NO),
    ],
)
def test_what_decides_on_r_rome(changes: dict[str, Any], expected: Status) -> None:
    rows = edits("ROME", "normal") + edits("C-ROME", "normal", **changes)
    assert verdict(single.CLAIMS, "rebuilding-r-rome", rows) is expected
    assert verdict(single.CLAIMS, "rebuilding-r-rome", rows[:5]) is NOT_JUDGED


@pytest.mark.parametrize(
    ("em", "ps", "expected"), [(0.9, 0.8, YES), (0.8, 0.8, PARTLY), (0.8, 0.9, NO)]
)
def test_what_decides_on_p_rome(em: float, ps: float, expected: Status) -> None:
    rows = edits("p-ROME", "normal", em=em, ps=ps)
    rows += edits("C-ROME", "normal")
    assert verdict(single.CLAIMS, "rebuilding-p-rome", rows) is expected


def steps(
    method: str,
    perplexities: Sequence[float],
    sizes: Sequence[float] | None = None,
    guard: str = "none",
    **columns: Any,
) -> Rows:
    scores = dict.fromkeys(("es", "em", "ps", "pm", "ns", "nm"), 0.9)
    return [
        {"part": "step", "method": method, "order": "seed:0", "guard_of": guard, "guard": None}
        | {"step": step, "subject": "A", "status": "done", "perplexity": float(perplexity)}
        | {"delta_norm": 1.0 if sizes is None else float(sizes[step - 1])}
        | scores
        | columns
        for step, perplexity in enumerate(perplexities, 1)
    ]


@pytest.mark.parametrize(
    ("perplexities", "sizes", "expected"),
    [
        ((70, 70, 5000, 6000), (1, 1, 3, 1), YES),
        # It fades away.
        ((70, 500, 1500, 6000), (1, 1, 2, 3), PARTLY),
        ((70, 70, 900, 900), (1, 1, 9, 1), NO),
    ],
)
def test_what_decides_on_a_disabling_edit(
    perplexities: Sequence[float], sizes: Sequence[float], expected: Status
) -> None:
    rows = steps("ROME", perplexities, sizes)
    assert verdict(sequences.CLAIMS, "rebuilding-sequence-rome", rows) is expected
    assert verdict(sequences.CLAIMS, "rebuilding-sequence-rome", rows[:2]) is NOT_JUDGED


@pytest.mark.parametrize(
    ("highest", "size", "expected"), [(1000, 0.1, YES), (1000, 0.2, PARTLY), (1001, 0.1, NO)]
)
def test_what_decides_on_survival(highest: float, size: float, expected: Status) -> None:
    rows = steps("ROME", (70, 70, 5000), (0.5, 0.5, 1))
    for method, name in (("C-ROME", "r-rome"), ("p-ROME", "p-rome")):
        rows += steps(method, (70, highest, 80), (0.01, size, 0.01))
        assert verdict(sequences.CLAIMS, f"rebuilding-sequence-{name}", rows) is expected


@pytest.mark.parametrize(
    ("rome", "prompt", "mean", "expected"),
    [(0.5, 0.8, 0.9, YES), (0.5, 0.9, 0.8, PARTLY), (0.85, 0.8, 0.9, NO)],
)
def test_what_decides_on_the_order_of_scores(
    rome: float, prompt: float, mean: float, expected: Status
) -> None:
    rows: Rows = []
    for method, score in (("ROME", rome), ("p-ROME", prompt), ("C-ROME", mean)):
        rows += steps(method, (70, 70, 70), es=score)
    assert verdict(sequences.CLAIMS, "rebuilding-table2", rows) is expected


@pytest.mark.parametrize(
    ("kept", "expected"), [((80, 80, 80, 80), YES), ((80, 90, 90, 90), PARTLY), ((81,) * 4, NO)]
)
def test_what_decides_on_retention(kept: Sequence[float], expected: Status) -> None:
    rows: Rows = []
    for method, score in zip(sequences.COLOURS, kept, strict=True):
        rows += steps(method, (70, 70, 70))
        rows.append(
            {"part": "retained", "method": method, "order": "seed:0", "guard_of": "none"}
            | {"step": 3, "es": float(score)}
        )
    assert verdict(sequences.CLAIMS, "own-retained", rows) is expected


@pytest.mark.parametrize(
    ("screened", "rolled", "expected"), [(900, 900, YES), (5000, 900, PARTLY), (5000, 5000, NO)]
)
def test_what_decides_on_guards(screened: float, rolled: float, expected: Status) -> None:
    rows = steps("ROME", (70, 70, screened), guard="screen")
    rows += steps("ROME", (70, 70, rolled), guard="rollback")
    # What was taken back does not count.
    rows += steps("ROME", (9e9,), guard="rollback")
    rows[-1]["guard"] = "rolled back"
    assert verdict(sequences.CLAIMS, "own-guards", rows) is expected
