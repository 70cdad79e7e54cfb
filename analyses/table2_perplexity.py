"""Table 2: maximum perplexity of models edited by ROME and its consistent variants.

The paper's claim: ROME lifts the perplexity to thousands on collapse cases, C-ROME leaves it where
it was, on collapse and normal cases alike (Section 3.1).
"""

import argparse
import time
from statistics import mean
from typing import Any

from firsttok.cases import choose_cases, measure_selection
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.data import paper_values
from firsttok.editing import METHODS, find_method
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.output import pick, publish
from firsttok.plots import figure, save_figure, strip_plot
from firsttok.script_options import parse_script


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress)
        selection = choose_cases(options)
        measured = measure_selection(options.study, selection, METHODS, progress=progress)
    rows = [row | {"method": find_method(row["method"]).label} for row in measured]
    study = options.study
    original = study.original_perplexity.mean

    paper = {(value.row, value.model): value.value for value in paper_values("Table 2")}
    models = list(dict.fromkeys(value.model for value in paper_values("Table 2")))
    lines: list[list[object]] = [
        ["Original", original, original, 1.0, *(paper["Original", model] for model in models)]
    ]
    for method in METHODS:
        for cases in ("collapse", "normal"):
            values = pick(rows, "perplexity", method=method.label, cases=cases)
            printed = [paper.get((f"{method.label}/{cases}", model)) for model in models]
            label = f"{method.label}, {cases} (n={len(values)})"
            lines.append([label, max(values), mean(values), max(values) / original, *printed])
    here = study.model.label
    stem = options.out / "table2_perplexity"
    publish(
        stem,
        title=f"Table 2. Maximum perplexity of the edited model ({len(study.texts)} sentences)",
        columns=[
            "",
            f"{here}, max",
            f"{here}, mean",
            "max / original",
            *(f"paper, {m}" for m in models),
        ],
        lines=lines,
        rows=rows,
        provenance=options.provenance()
        | {
            "original_perplexity": original,
            "original_corpus_perplexity": study.original_perplexity.corpus,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    print_cases(rows, bos=bool(study.model.leading_ids))
    drawn, (axis,) = figure(1, height=4.0)
    order = [method.label for method in METHODS]
    strip_plot(
        axis, rows, x="method", y="perplexity", label="perplexity after one edit", order=order
    )
    for height, name, style in (
        (original, "original", "--"),
        (COLLAPSE_THRESHOLD, "collapse", ":"),
    ):
        axis.axhline(height, color="black", linewidth=1, linestyle=style)
        axis.text(3.45, height, name, va="bottom", ha="right", fontsize=8)
    save_figure(stem, drawn)


def print_cases(rows: list[dict[str, Any]], *, bos: bool) -> None:
    show("Collapse cases, verified in this run (ROME lifts the perplexity above 1000):")
    for row in rows:
        if row["cases"] == "collapse" and row["method"] == "ROME":
            place = "first token" if row["first_token"] else "not the first token"
            length = "one token" if row["one_token"] else "several tokens"
            show(
                f"  {row['case_id']:>3} {row['subject']}: perplexity {row['perplexity']:,.0f}, "
                f"denominator {row['denominator']:.4f}; {place}, {length}, "
                f"{'BOS before it' if bos else 'no BOS'}"
            )


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
