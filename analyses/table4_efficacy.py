"""Table 4: efficacy, generalization and locality on collapse cases, prompts as they are.

The paper's claim: C-ROME keeps the model whole but hardly writes the new target on collapse cases,
because it edits with prefixed keys and is tested with unprefixed ones (Section 4).
"""

from functools import partial
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.editing import METHODS
from firsttok.paper.cases import collapse_cases, measure_accuracy
from firsttok.paper.claims import Claim, Result, Verdict, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import accuracy_bars, figure
from firsttok.paper.tables import MEASURES, Found, accuracy_line, printed

HIGH, HALF = 0.9, 0.5


def measure(options: ScriptOptions, progress: Progress) -> Found:
    facts = collapse_cases(options, progress=progress)
    measured = measure_accuracy(options.study, facts, METHODS, progress=progress)
    rows = [{"cases": "collapse"} | row for row in measured]
    name = options.study.model.label
    lines = [
        accuracy_line(f"{name}, {method.label}", rows, method=method.label) for method in METHODS
    ]
    models, paper = printed("Table 4")
    lines += [
        [f"paper, {model}, C-ROME", None, *(paper[column, model] for column in MEASURES)]
        for model in models
    ]
    return Found(
        title="Table 4. Accuracy on collapse cases, in percent",
        columns=["", "cases", *MEASURES],
        lines=lines,
        rows=rows,
        draw=partial(plot, rows),
    )


def plot(rows: list[dict[str, Any]]) -> Figure:
    drawn, (axis,) = figure(1)
    accuracy_bars(axis, rows)
    return drawn


def low(result: Result, column: str) -> Verdict:
    values = result.known(column, method="C-ROME", cases="collapse")
    found = mean(values)
    return grade(
        found < HALF,
        found < HIGH,
        f"C-ROME's mean {column} on {len(values)} collapse cases is {found:.1%}.",
    )


CLAIMS = (
    Claim(
        id="table4-efficacy",
        place="Table 4",
        sentence="C-ROME spares the model but hardly writes the new target on collapse cases.",
        rule=f"C-ROME's mean efficacy on collapse cases, prompts as they are, is below {HALF:.0%} "
        f"(the paper's highest is 30.59 %). Partly: below the {HIGH:.0%} of normal cases.",
        decide=partial(low, column="efficacy"),
        on_collapse=True,
    ),
    Claim(
        id="table4-generalization",
        place="Table 4",
        sentence="What C-ROME writes on collapse cases does not carry over to a paraphrase either.",
        rule=f"Its mean generalization is below {HALF:.0%} (the paper's highest is 30.77 %). "
        f"Partly: below {HIGH:.0%}.",
        decide=partial(low, column="generalization"),
        on_collapse=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS))
