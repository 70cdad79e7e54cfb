"""Table 7: normal cases whose subject is the second token, put at position one (First2Second).

The paper's claim: with the first token's position embedding, some of them collapse GPT-2-XL and
Llama2-7b, none GPT-J (Appendix A.4).
"""

import argparse
import time
from pathlib import Path

from firsttok.cases import second_token_cases
from firsttok.console import exit_on_error, progress_bar
from firsttok.data import paper_values
from firsttok.output import publish
from firsttok.plots import figure, save_figure, stage_plot
from firsttok.probes import FIRST2SECOND, measure_stages, stage_lines
from firsttok.script_options import parse_script


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress, without_bos=True)
        study = options.study
        facts = second_token_cases(options.halved())
        rows = measure_stages(study, facts, FIRST2SECOND, progress=progress)
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title=f"Table 7. Perplexity after ROME on {len(facts)} normal cases, First2Second",
        columns=["", "original model", "min", "avg", "max", "collapsed"],
        lines=stage_lines(study.model.label, rows, paper_values("Table 7")),
        rows=rows,
        provenance=options.provenance()
        | {
            "embedding": study.model.position_embedding,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    drawn, (axis,) = figure(1)
    stage_plot(axis, rows)
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
