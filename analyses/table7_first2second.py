"""Table 7: normal cases whose subject is the second token, put at position one (First2Second).

The paper's claim: with the first token's position embedding, some of them collapse GPT-2-XL and
Llama2-7b, none GPT-J (Appendix A.4).
"""

from functools import partial

from rich.progress import Progress

from firsttok.data import paper_values
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.paper.cases import second_token_cases
from firsttok.paper.claims import STAGES_RULE, Claim, Result, Verdict, fixed, grade, share, swapped
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import stage_plot
from firsttok.paper.tables import Found
from firsttok.probes import FIRST2SECOND, measure_stages, stage_lines

HALF = 0.5


def measure(options: ScriptOptions, progress: Progress) -> Found:
    study = options.study
    facts = second_token_cases(options.halved())
    rows = measure_stages(study, facts, FIRST2SECOND, progress=progress)
    return Found(
        title=f"Table 7. Perplexity after ROME on {len(facts)} normal cases, First2Second",
        columns=["", "original model", "min", "avg", "max", "collapsed"],
        lines=stage_lines(study.model.label, rows, paper_values("Table 7")),
        rows=rows,
        provenance={"embedding": study.model.position_embedding},
        draw=partial(stage_plot, rows),
    )


def partial_collapse(result: Result) -> Verdict:
    kind, stages, reason = swapped(result)
    values = stages["everything"]
    collapsed = share(values)
    reason += (
        f"; where it acts on everything, the perplexities go from {fixed(min(values))} to "
        f"{fixed(max(values))}."
    )
    if kind == "rotary":
        return grade(collapsed <= HALF, collapsed < 1, reason)
    return grade(0 < collapsed < 1, collapsed == 0, reason)


CLAIMS = (
    Claim(
        id="table7-first2second",
        place="Table 7",
        sentence="Giving a second token the position embedding of the first does not collapse the "
        "model consistently: partly on GPT-2-XL and Llama2-7b, never on GPT-J.",
        rule=f"{STAGES_RULE}; the last decides. Rotary models, on which the paper finds both some "
        f"collapse (Llama2-7b) and none (GPT-J): at most half of the cases above "
        f"{COLLAPSE_THRESHOLD:g}; partly: not all. Learned embeddings, as GPT-2-XL: some cases "
        "above it, but not all; partly: none.",
        decide=partial_collapse,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
