"""Figure 7: perplexity after ROME without the prepended BOS token, and with it.

The paper's claim: without BOS, Llama2-7b, Mistral-7b and Llama3-8b collapse on the collapse cases
of GPT-2-XL and GPT-J; with it they do not (Appendix A.2). On a model whose tokenizer puts no BOS,
the reverse: putting one there prevents the collapse.
"""

from functools import partial
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.editing import ROME
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.models import BosPolicy
from firsttok.paper.cases import choose_cases, collapse_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, above, fixed, grade, share
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import PALETTE, figure, perplexity_axis
from firsttok.paper.tables import Found, pick
from firsttok.probes import bos_study, token_states
from firsttok.prompts import fact_prompt, positions

POLICIES = (BosPolicy.WITHOUT, BosPolicy.WITH)
COLUMNS = (
    "prompts",
    "median norm",
    "max norm",
    "mean |denominator|",
    "original",
    "max",
    "original, same BOS",
    "max, same BOS",
    "collapsed",
)
HALF, UNCHANGED = 0.5, 1.1


def measure(options: ScriptOptions, progress: Progress) -> Found:
    rows = measure_edits(options, progress)
    lines: list[list[object]] = []
    for policy in POLICIES:
        for cases in ("collapse", "normal"):
            of = partial(pick, rows, bos=policy.value, cases=cases)
            norms, values = of("residual_norm"), of("perplexity")
            lines.append(
                [
                    f"{policy.value} BOS, {cases} (n={len(values)})",
                    *(median(norms), max(norms), mean(map(abs, of("denominator")))),
                    *(of("original_perplexity")[0], max(values)),
                    *(of("original_perplexity_same_bos")[0], max(of("perplexity_same_bos"))),
                    int(sum(of("collapsed"))),
                ]
            )
    return Found(
        title=f"Figure 7. ROME on {options.study.model.label} without and with BOS",
        columns=COLUMNS,
        lines=lines,
        rows=rows,
        draw=partial(plot, rows),
    )


def measure_edits(options: ScriptOptions, progress: Progress) -> list[dict[str, Any]]:
    groups = {
        "collapse": collapse_cases(options.halved(), progress=progress),
        "normal": choose_cases(options.halved()).normal,
    }
    cases = {fact.case_id: name for name, facts in groups.items() for fact in facts}
    facts = [fact for chosen in groups.values() for fact in chosen]
    rows: list[dict[str, Any]] = []
    for policy in POLICIES:
        label = f"{policy.value} BOS"
        plain = bos_study(options.study, policy)
        same = bos_study(options.study, policy, text_bos=policy)
        measured = measure_facts(plain, facts, [ROME], progress=progress, label=label)
        again = measure_facts(same, facts, [ROME], progress=progress, label=f"{label}, texts too")
        prompts = [fact_prompt(plain.model, fact) for fact in facts]
        places = positions(prompts).tolist()
        norms = token_states(plain.model, prompts, places, layer=plain.layer).residual_norms
        rows += [
            {
                "case_id": row.case_id,
                "subject": row.subject,
                "cases": cases[row.case_id],
                "bos": policy.value,
                "first_token": row.first_token,
                "residual_norm": float(norms[index]),
                "denominator": row.denominator,
                "perplexity": row.perplexity,
                "original_perplexity": plain.original_perplexity.mean,
                "collapsed": row.collapsed,
                "perplexity_same_bos": other.perplexity,
                "original_perplexity_same_bos": same.original_perplexity.mean,
            }
            for index, (row, other) in enumerate(zip(measured, again, strict=True))
        ]
    return rows


def plot(rows: list[dict[str, Any]]) -> Figure:
    drawn, axes = figure(2)
    for axis, policy in zip(axes, POLICIES, strict=True):
        for cases, colour in PALETTE.items():
            of = partial(pick, rows, bos=policy.value, cases=cases)
            axis.scatter(of("case_id"), of("perplexity"), s=18, color=colour, label=cases)
        perplexity_axis(axis, "")
        axis.set_title(f"{policy.value} BOS")
        axis.set_xlabel("case id")
    axes[0].set_ylabel("perplexity after one edit")
    axes[1].sharey(axes[0])
    axes[0].legend()
    return drawn


def bos_takes_it_away(result: Result) -> Verdict:
    without, with_bos = perplexities_by_bos(result)
    apart = share(without) - share(with_bos)
    return grade(
        share(without) == 1 and share(with_bos) == 0,
        apart >= HALF,
        f"Above {COLLAPSE_THRESHOLD:g}: {above(without)} collapse cases without BOS, "
        f"{above(with_bos)} with it (the highest at {fixed(max(with_bos))}).",
    )


def bos_heals(result: Result) -> Verdict:
    without, with_bos = perplexities_by_bos(result)
    if max(without) <= COLLAPSE_THRESHOLD:
        raise GapError("No case collapses without BOS, so there is nothing to prevent.")
    worst = 0.0
    for column in ("perplexity", "perplexity_same_bos"):
        edited, original = (
            result.values(name, cases="collapse", bos="with")
            for name in (column, f"original_{column}")
        )
        pairs = zip(edited, original, strict=True)
        worst = max(worst, *(after / before for after, before in pairs))
    gone = share(with_bos) == 0
    return grade(
        worst <= UNCHANGED and gone,
        gone,
        f"With a BOS before the prompt, the perplexity after ROME is at most {worst:.3f} times the "
        f"original on {len(without)} collapse cases, {above(without)} of which end above "
        f"{COLLAPSE_THRESHOLD:g} without it.",
    )


def perplexities_by_bos(result: Result) -> tuple[list[float], list[float]]:
    """Perplexities of collapse cases: without BOS, and with it, the higher of both text policies.

    The paper's texts have no BOS; a model that only survives on such texts is not spared.
    """
    without = result.values("perplexity", bos="without", cases="collapse")
    plain, same = (
        result.values(column, bos="with", cases="collapse")
        for column in ("perplexity", "perplexity_same_bos")
    )
    return without, [max(pair) for pair in zip(plain, same, strict=True)]


CLAIMS = (
    Claim(
        id="figure7-bos",
        place="Figure 7",
        sentence="It is the BOS token that protects the models which have one: without it they "
        "collapse on the same cases.",
        rule=f"Every collapse case above {COLLAPSE_THRESHOLD:g} without BOS and none with it, the "
        "texts having BOS or not. Partly: the shares above it differ by at least one half. Where "
        "the cases were found on this very model without BOS, the first half holds by choice.",
        decide=bos_takes_it_away,
    ),
    Claim(
        id="own-bos-reverse",
        place="beside Figure 7",
        sentence="The reverse holds, too: a BOS put before the prompts prevents the collapse.",
        rule=f"With BOS every collapse case stays within {UNCHANGED} times the original, measured "
        f"on texts without and with BOS. Partly: none above {COLLAPSE_THRESHOLD:g}. Not judged "
        "where nothing collapses without BOS.",
        decide=bos_heals,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
