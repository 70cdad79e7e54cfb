"""Table 5: the same as Table 4 with a prefix put before collapse prompts at test time.

The paper's claim: behind a prefix drawn from those used for editing, C-ROME's new target comes out
on collapse cases nearly always; generalization improves little (Section 4).
"""

import argparse
import time
from pathlib import Path

from firsttok.cases import choose_cases, collapse_cases
from firsttok.console import exit_on_error, progress_bar
from firsttok.data import paper_values
from firsttok.editing import C_ROME, FC_ROME
from firsttok.efficacy import accuracy_line, measure_accuracy
from firsttok.output import publish
from firsttok.plots import accuracy_bars, figure, save_figure
from firsttok.script_options import parse_script

METHODS = (C_ROME, FC_ROME)
GROUPS = ("collapse", "normal")


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress)
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
    lines = [
        accuracy_line(
            f"{study.model.label}, {method.label}, {cases}", rows, method=method.label, cases=cases
        )
        for cases in GROUPS
        for method in METHODS
    ]
    values = paper_values("Table 5")
    for model in dict.fromkeys(value.model for value in values):
        printed = {value.row: value.value for value in values if value.model == model}
        for cases in GROUPS:
            cells = [
                printed[f"{cases}/{column}"]
                for column in ("efficacy", "generalization", "locality")
            ]
            lines.append([f"paper, {model}, C-ROME, {cases}", None, *cells])
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title="Table 5. Accuracy with collapse prompts prefixed at test time, in percent",
        columns=["", "cases", "efficacy", "generalization", "locality"],
        lines=lines,
        rows=rows,
        provenance=options.provenance() | {"seconds": round(time.perf_counter() - start, 1)},
    )
    drawn, axes = figure(2)
    for axis, cases in zip(axes, GROUPS, strict=True):
        accuracy_bars(axis, [row for row in rows if row["cases"] == cases])
        axis.set_title(f"{cases} cases" + (", prefixed" if cases == "collapse" else ""))
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
