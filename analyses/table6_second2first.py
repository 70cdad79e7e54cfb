"""Table 6: collapse cases with the first token at the second one's position (Second2First).

The paper's claim: that does not end the collapse; it mitigates it on GPT-2-XL, whose position
embeddings are learned, and does nothing on GPT-J and Llama2, whose are rotary (Appendix A.4). On
rotary models it cannot: the first token attends to itself alone, whatever its angle.
"""

import argparse
import time
from pathlib import Path

from firsttok.cases import first_token_cases
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.data import paper_values
from firsttok.output import publish
from firsttok.plots import figure, save_figure, stage_plot
from firsttok.probes import SECOND2FIRST, first_key_change, measure_stages, stage_lines
from firsttok.prompts import fact_prompt
from firsttok.script_options import parse_script


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress, without_bos=True)
        study = options.study
        facts = first_token_cases(options.halved(), progress=progress)
        prompts = [fact_prompt(study.model, fact) for fact in facts]
        changes = {
            fact.case_id: first_key_change(study.model, [prompt], SECOND2FIRST, layer=study.layer)
            for fact, prompt in zip(facts, prompts, strict=True)
        }
        rows = [
            row | {"first_key_change": changes[row["case_id"]]}
            for row in measure_stages(study, facts, SECOND2FIRST, progress=progress)
        ]
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title=f"Table 6. Perplexity after ROME on {len(facts)} collapse cases, Second2First",
        columns=["", "original model", "min", "avg", "max", "collapsed"],
        lines=stage_lines(study.model.label, rows, paper_values("Table 6")),
        rows=rows,
        provenance=options.provenance()
        | {
            "embedding": study.model.position_embedding,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    change = max(changes.values())
    show(f"Second2First changes the first tokens' keys by at most {change:.3g}.")
    drawn, (axis,) = figure(1)
    stage_plot(axis, rows)
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
