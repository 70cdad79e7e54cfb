"""Table 6: collapse cases with the first token at the second one's position (Second2First).

The paper's claim: that does not end the collapse; it mitigates it on GPT-2-XL, whose position
embeddings are learned, and does nothing on GPT-J and Llama2, whose are rotary (Appendix A.4). On
rotary models it cannot: the first token attends to itself alone, whatever its angle.
"""

from dataclasses import replace
from functools import partial
from statistics import mean

from rich.progress import Progress

from firsttok.data import paper_values
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.paper.cases import first_token_cases
from firsttok.paper.claims import (
    STAGES_RULE,
    Claim,
    GapError,
    Result,
    Verdict,
    embedding,
    fixed,
    grade,
    share,
    swapped,
)
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import stage_plot
from firsttok.paper.tables import Found
from firsttok.probes import SECOND2FIRST, first_key_change, measure_stages, stage_lines
from firsttok.prompts import fact_prompt

HALF = 0.5


def measure(options: ScriptOptions, progress: Progress) -> Found:
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
    change = max(changes.values())
    return Found(
        title=f"Table 6. Perplexity after ROME on {len(facts)} collapse cases, Second2First",
        columns=["", "original model", "min", "avg", "max", "collapsed"],
        lines=stage_lines(study.model.label, rows, paper_values("Table 6")),
        rows=rows,
        provenance={"embedding": study.model.position_embedding},
        notes=[f"Second2First changes the first tokens' keys by at most {change:.3g}."],
        draw=partial(stage_plot, rows),
    )


def persists(result: Result) -> Verdict:
    result.values("perplexity", stage="none")
    result.values("case_id", stage="none")
    collapsing = {
        row["case_id"]
        for row in result.chosen(stage="none")
        if row["perplexity"] > COLLAPSE_THRESHOLD
    }
    if not collapsing:
        raise GapError("No case collapses without the swap, so there is nothing to end.")
    rows = tuple(row for row in result.rows if row.get("case_id") in collapsing)
    result = replace(result, rows=rows)
    before = mean(result.values("perplexity", stage="none"))
    kind, stages, reason = swapped(result)
    after = mean(stages["everything"])
    reason += f"; the mean goes from {fixed(before)} to {fixed(after)}."
    if kind == "rotary":
        lasting = share([value for found in stages.values() for value in found])
        return grade(lasting == 1, lasting >= HALF, reason)
    lasting = share(stages["everything"])
    return grade(after <= before / 2 and lasting >= HALF, lasting > 0, reason)


def key_untouched(result: Result) -> Verdict:
    changes = result.values("first_key_change", stage="none")
    largest = max(changes)
    kind = embedding(result)
    reason = (
        f"With {kind} position embeddings the swap changes the keys of {len(changes)} first tokens "
        f"by {'exactly 0' if largest == 0 else f'at most {fixed(largest)}'}."
    )
    if kind == "rotary":
        return grade(largest == 0, False, reason)
    return grade(min(changes) > 0, largest > 0, reason)


CLAIMS = (
    Claim(
        id="table6-second2first",
        place="Table 6",
        sentence="Giving the first token the position embedding of the second does not end the "
        "collapse: it mitigates it on GPT-2-XL (learned positions) and does nothing on GPT-J and "
        "Llama2-7b (rotary ones).",
        rule=f"{STAGES_RULE}. Rotary models, as GPT-J and Llama2-7b: every case stays above "
        f"{COLLAPSE_THRESHOLD:g} at every stage; partly: at least half of them. Learned "
        "embeddings, as GPT-2-XL, swap on everything: the mean perplexity falls to at most a half, "
        f"and at least half of the cases stay above {COLLAPSE_THRESHOLD:g} (all of the paper's "
        "do); partly: some stay above it.",
        decide=persists,
    ),
    Claim(
        id="own-second2first-key",
        place="beside Table 6",
        sentence="On rotary models Second2First cannot change the first token's key at all: it "
        "attends to itself alone, whatever its angle. With learned embeddings it does.",
        rule="Rotary: the largest change of any first token's key at the edited layer is exactly "
        "0. Learned: it is above 0 for every case; partly: for some.",
        decide=key_untouched,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
