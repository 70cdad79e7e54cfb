"""Table 1: norm of the numerator and absolute value of the denominator of ROME's update.

The paper's claim: on collapse cases the denominator is two orders of magnitude smaller than on
normal cases, while the numerator is of the same order (Section 3.1).
"""

from functools import partial
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.editing import C_ROME, ROME, find_method
from firsttok.paper.cases import choose_cases, measure_selection
from firsttok.paper.claims import Claim, GapError, Result, Verdict, fixed, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import figure, strip_plot
from firsttok.paper.tables import Found, pick, printed

METHODS = (ROME, C_ROME)
GROUPS = ("collapse", "normal")
TWO_ORDERS, ONE_ORDER = 100.0, 10.0
SAME_SIZE = 3.0


def measure(options: ScriptOptions, progress: Progress) -> Found:
    selection = choose_cases(options)
    measured = measure_selection(options.study, selection, METHODS, progress=progress)
    rows = [
        row | {"method": find_method(row["method"]).label, "denominator": abs(row["denominator"])}
        for row in measured
    ]
    models, paper = printed("Table 1")
    lines = [
        [
            f"{component}, {cases} (n={len(pick(rows, component, method='ROME', cases=cases))})",
            *(mean(pick(rows, component, method=m.label, cases=cases)) for m in METHODS),
            *(paper[f"{component}/{cases}", model] for model in models),
        ]
        for component in ("numerator", "denominator")
        for cases in GROUPS
    ]
    here = options.study.model.label
    small, large = (mean(pick(rows, "denominator", method="ROME", cases=cases)) for cases in GROUPS)
    ratio = large / small
    note = f"ROME's mean denominator is {ratio:,.0f} times larger on normal than on collapse cases."
    return Found(
        title="Table 1. Mean norm of the numerator and mean |denominator| (unit left vector)",
        columns=["", *(f"{here}, {m.label}" for m in METHODS), *(f"paper, {m}" for m in models)],
        lines=lines,
        rows=rows,
        provenance={"denominator_ratio": ratio},
        notes=[note],
        draw=partial(plot, rows),
    )


def plot(rows: list[dict[str, Any]]) -> Figure:
    drawn, axes = figure(2)
    order = [method.label for method in METHODS]
    strip_plot(axes[0], rows, x="method", y="numerator", label="norm of numerator", order=order)
    strip_plot(axes[1], rows, x="method", y="denominator", label="|denominator|", order=order)
    return drawn


def small_denominators(result: Result) -> Verdict:
    collapse, normal = (
        [abs(value) for value in result.values("denominator", method="ROME", cases=cases)]
        for cases in GROUPS
    )
    if min(collapse) == 0:
        raise GapError("A denominator is exactly zero, so no ratio can be formed.")
    of_means, of_medians = (middle(normal) / middle(collapse) for middle in (mean, median))
    factor = min(of_means, of_medians)
    return grade(
        factor >= TWO_ORDERS,
        factor >= ONE_ORDER,
        f"ROME's mean |denominator| is {fixed(mean(collapse))} on {len(collapse)} collapse cases "
        f"and {fixed(mean(normal))} on {len(normal)} normal ones: {fixed(of_means)} times "
        f"smaller by the mean, {fixed(of_medians)} times by the median.",
    )


def equal_numerators(result: Result) -> Verdict:
    collapse, normal = (
        mean(result.values("numerator", method="ROME", cases=cases)) for cases in GROUPS
    )
    if min(collapse, normal) <= 0:
        raise GapError("A mean numerator is zero, so no ratio can be formed.")
    factor = max(collapse / normal, normal / collapse)
    side = "larger" if collapse > normal else "smaller"
    return grade(
        factor <= SAME_SIZE,
        factor < ONE_ORDER,
        f"The mean numerator of ROME is {fixed(collapse)} on collapse cases and {fixed(normal)} on "
        f"normal ones: {fixed(factor)} times {side} on collapse cases.",
    )


CLAIMS = (
    Claim(
        id="table1-denominator",
        place="Table 1",
        sentence="On collapse cases ROME's denominator is two orders of magnitude smaller than on "
        "normal ones.",
        rule=f"Normal over collapse, of the mean and of the median |denominator|: the smaller of "
        f"both ratios is at least {TWO_ORDERS:g}, which is what two orders of magnitude are (the "
        f"paper's means are 240 to 320 apart). Partly: at least {ONE_ORDER:g}.",
        decide=small_denominators,
        on_collapse=True,
    ),
    Claim(
        id="table1-numerator",
        place="Table 1",
        sentence="The numerators of collapse and normal cases do not differ significantly.",
        rule=f"The mean norms lie within a factor of {SAME_SIZE:g} of each other, in either "
        f"direction. Partly: within one order of magnitude (less than {ONE_ORDER:g}).",
        decide=equal_numerators,
        on_collapse=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS))
