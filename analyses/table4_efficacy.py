"""Table 4: efficacy, generalization and locality on collapse cases, prompts as they are.

The paper's claim: C-ROME keeps the model whole but hardly writes the new target on collapse cases,
because it edits with prefixed keys and is tested with unprefixed ones (Section 4).
"""

import argparse
import time
from pathlib import Path

from firsttok.cases import collapse_cases
from firsttok.console import exit_on_error, progress_bar
from firsttok.data import paper_values
from firsttok.editing import METHODS
from firsttok.efficacy import accuracy_line, measure_accuracy
from firsttok.output import publish
from firsttok.plots import accuracy_bars, figure, save_figure
from firsttok.script_options import parse_script


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress)
        facts = collapse_cases(options, progress=progress)
        measured = measure_accuracy(options.study, facts, METHODS, progress=progress)
    rows = [{"cases": "collapse"} | row for row in measured]
    name = options.study.model.label
    lines = [
        accuracy_line(f"{name}, {method.label}", rows, method=method.label) for method in METHODS
    ]
    values = paper_values("Table 4")
    for model in dict.fromkeys(value.model for value in values):
        printed = {value.row: value.value for value in values if value.model == model}
        cells = [printed[column] for column in ("efficacy", "generalization", "locality")]
        lines.append([f"paper, {model}, C-ROME", None, *cells])
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title="Table 4. Accuracy on collapse cases, in percent",
        columns=["", "cases", "efficacy", "generalization", "locality"],
        lines=lines,
        rows=rows,
        provenance=options.provenance() | {"seconds": round(time.perf_counter() - start, 1)},
    )
    drawn, (axis,) = figure(1)
    accuracy_bars(axis, rows)
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
