"""Table 5: the same as Table 4 with a prefix put before collapse prompts at test time.

The paper's claim: after a prefix drawn from those used for editing, C-ROME's new target comes out
on collapse cases nearly always; generalization improves little (Section 4).
"""

from functools import partial
from itertools import product
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.editing import C_ROME, FC_ROME
from firsttok.paper.cases import choose_cases, collapse_cases, measure_accuracy
from firsttok.paper.claims import Claim, GapError, Result, Verdict, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import accuracy_bars, figure
from firsttok.paper.tables import MEASURES, Found, accuracy_line, printed

METHODS = (C_ROME, FC_ROME)
GROUPS = ("collapse", "normal")
HIGH, MOST, HALF = 0.9, 0.8, 0.5


def measure(options: ScriptOptions, progress: Progress) -> Found:
    study = options.study
    facts = {
        "collapse": collapse_cases(options, progress=progress),
        "normal": choose_cases(options).normal,
    }
    rows = [
        {"cases": cases} | row
        for cases in GROUPS
        for row in measure_accuracy(
            study,
            facts[cases],
            METHODS,
            # As in the paper, which prefixes the prompts of collapse cases and no others.
            prefixed=cases == "collapse",
            seed=options.seed,
            progress=progress,
            label=cases,
        )
    ]
    here = study.model.label
    lines = [
        accuracy_line(f"{here}, {name}, {cases}", rows, method=name, cases=cases)
        for cases, name in product(GROUPS, [method.label for method in METHODS])
    ]
    models, paper = printed("Table 5")
    for model, cases in product(models, GROUPS):
        cells = [paper[f"{cases}/{column}", model] for column in MEASURES]
        lines.append([f"paper, {model}, C-ROME, {cases}", None, *cells])
    return Found(
        title="Table 5. Accuracy with collapse prompts prefixed at test time, in percent",
        columns=["", "cases", *MEASURES],
        lines=lines,
        rows=rows,
        draw=partial(plot, rows),
    )


def plot(rows: list[dict[str, Any]]) -> Figure:
    drawn, axes = figure(2)
    for axis, cases in zip(axes, GROUPS, strict=True):
        accuracy_bars(axis, [row for row in rows if row["cases"] == cases])
        axis.set_title(f"{cases} cases" + (", prefixed" if cases == "collapse" else ""))
    return drawn


def leaves_neighbours(result: Result) -> Verdict:
    collapse, normal = (
        mean(result.known("locality", method="C-ROME", cases=cases)) for cases in GROUPS
    )
    kept = [collapse >= MOST, normal >= HIGH]
    return grade(
        all(kept),
        any(kept),
        f"C-ROME's mean locality is {collapse:.1%} on collapse cases and {normal:.1%} on normal "
        "ones.",
    )


def limited_generalization(result: Result) -> Verdict:
    match: dict[str, Any] = {"method": "C-ROME", "cases": "collapse"}
    efficacy = mean(result.values("efficacy", **match))
    general = mean(result.known("generalization", **match))
    if efficacy < HALF:
        raise GapError(
            f"Behind prefixes the efficacy itself is only {efficacy:.1%}, so there is no gain that "
            "generalization could lag behind."
        )
    return grade(
        general <= efficacy / 2,
        general < efficacy,
        f"Mean generalization is {general:.1%} where efficacy behind a prefix is {efficacy:.1%} "
        f"({len(result.chosen(**match))} collapse cases).",
    )


def high(result: Result, method: str, cases: str) -> Verdict:
    values = result.values("efficacy", method=method, cases=cases)
    found = mean(values)
    where = "behind a prefix, " if cases == "collapse" else ""
    return grade(
        found >= HIGH,
        found >= HALF,
        f"{method}'s mean efficacy on {len(values)} {cases} cases is {found:.1%} ({where}over the "
        f"cases from {min(values):.0%} to {max(values):.0%}).",
    )


CLAIMS = (
    Claim(
        id="table5-efficacy",
        place="Table 5",
        sentence="Behind a prefix drawn from those of the editing, C-ROME's new target comes out "
        "on collapse cases.",
        rule=f"C-ROME's mean efficacy on collapse cases is at least {HIGH:.0%} (the paper's lowest "
        f"is 91.27 %). Partly: at least {HALF:.0%}.",
        decide=partial(high, method="C-ROME", cases="collapse"),
        on_collapse=True,
    ),
    Claim(
        id="table5-normal",
        place="Tables 4 and 5",
        sentence="On normal cases C-ROME writes the new target.",
        rule=f"Its mean efficacy on normal cases is at least {HIGH:.0%} (the paper's lowest is "
        f"91.95 %). Partly: at least {HALF:.0%}.",
        decide=partial(high, method="C-ROME", cases="normal"),
    ),
    Claim(
        id="table5-generalization",
        place="Table 5",
        sentence="The prefix raises efficacy much and generalization little.",
        rule="C-ROME's mean generalization on collapse cases is at most half of its efficacy "
        "behind a prefix (a third at most in the paper). Partly: below it. Not judged where the "
        f"efficacy is below {HALF:.0%}. The prefix stands before the rewriting prompt only, as in "
        "the released code, so generalization and locality are those of Table 4.",
        decide=limited_generalization,
        on_collapse=True,
    ),
    Claim(
        id="table5-locality",
        place="Tables 4 and 5",
        sentence="C-ROME leaves the answers about other subjects as they were.",
        rule=f"Its mean locality is at least {MOST:.0%} on collapse cases (the paper's lowest is "
        f"82.35 %) and at least {HIGH:.0%} on normal ones (95.61 %). Partly: one of the two.",
        decide=leaves_neighbours,
    ),
    Claim(
        id="own-prefixed-efficacy",
        place="beside Table 5",
        sentence="Behind a prefix, FC-ROME's new target comes out on collapse cases.",
        rule=f"FC-ROME's mean efficacy on collapse cases is at least {HIGH:.0%}. Partly: at least "
        f"{HALF:.0%}.",
        decide=partial(high, method="FC-ROME", cases="collapse"),
        on_collapse=True,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS))
