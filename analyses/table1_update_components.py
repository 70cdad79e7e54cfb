"""Table 1: norm of the numerator and absolute value of the denominator of ROME's update.

The paper's claim: on collapse cases the denominator is two orders of magnitude smaller than on
normal cases, while the numerator is of the same order (Section 3.1).
"""

import argparse
import time
from statistics import mean

from firsttok.cases import choose_cases, measure_selection
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.data import paper_values
from firsttok.editing import C_ROME, ROME, find_method
from firsttok.output import pick, publish
from firsttok.plots import figure, save_figure, strip_plot
from firsttok.script_options import parse_script

METHODS = (ROME, C_ROME)
GROUPS = ("collapse", "normal")


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress)
        selection = choose_cases(options)
        measured = measure_selection(options.study, selection, METHODS, progress=progress)
    rows = [
        row | {"method": find_method(row["method"]).label, "denominator": abs(row["denominator"])}
        for row in measured
    ]

    paper = {(value.row, value.model): value.value for value in paper_values("Table 1")}
    models = list(dict.fromkeys(value.model for value in paper_values("Table 1")))
    lines: list[list[object]] = []
    for component in ("numerator", "denominator"):
        for cases in GROUPS:
            count = len(pick(rows, component, method="ROME", cases=cases))
            lines.append(
                [
                    f"{component}, {cases} (n={count})",
                    *(mean(pick(rows, component, method=m.label, cases=cases)) for m in METHODS),
                    *(paper[f"{component}/{cases}", model] for model in models),
                ]
            )
    here = options.study.model.label
    small, large = (mean(pick(rows, "denominator", method="ROME", cases=cases)) for cases in GROUPS)
    ratio = large / small
    stem = options.out / "table1_update_components"
    publish(
        stem,
        title="Table 1. Mean norm of the numerator and mean |denominator| (unit left vector)",
        columns=["", *(f"{here}, {m.label}" for m in METHODS), *(f"paper, {m}" for m in models)],
        lines=lines,
        rows=rows,
        provenance=options.provenance()
        | {
            "denominator_ratio": ratio,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    show(f"ROME's mean denominator is {ratio:,.0f} times larger on normal than on collapse cases.")
    drawn, axes = figure(2)
    order = [method.label for method in METHODS]
    strip_plot(axes[0], rows, x="method", y="numerator", label="norm of numerator", order=order)
    strip_plot(axes[1], rows, x="method", y="denominator", label="|denominator|", order=order)
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
