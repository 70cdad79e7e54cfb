"""Tables 1 and 4, Figures 1, 2 and 5 of "Rebuilding ROME": single edits of ROME, r-ROME and p-ROME.

r-ROME is C-ROME: one key, averaged over the prefixes, in every slot of the update. The paper's
claim: disabling edits have a large |Delta|, and vanish with r-ROME, which also generalises better.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.data import Fact
from firsttok.data.paper import REBUILDING
from firsttok.editing import METHODS, ROME, find_method
from firsttok.evaluation import COLLAPSE_THRESHOLD, continuation
from firsttok.paper.cases import choose_cases, measure_selection
from firsttok.paper.claims import Claim, GapError, Result, Verdict, fixed, grade, require, spread
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import PALETTE, figure
from firsttok.paper.tables import SCORES, Found, matching, pick, printed, score_cells

LABELS = {"Original": "ROME", "r-ROME": "C-ROME", "p-ROME": "p-ROME"}
"""Methods as the paper names them, and as they are named here."""
ORDERS, LARGE = 10.0, 3.0
"""Factors of |Delta| that count as orders of magnitude, and as larger."""
CLEAR, SOME = 0.9, 0.7
"""Shares of pairs of edits in which the disabling one has less entropy."""
SLIGHT = 5.0
"""Points of efficacy that are a slight expense."""
KINDS = ("collapse", "normal")
COLUMNS = ("denominator", "delta_norm", "mean_delta", "perplexity", "entropy", "collapsed")
SHOWN_TOKENS = 30


def measure(options: ScriptOptions, progress: Progress) -> Found:
    selection = choose_cases(options)
    measured = measure_selection(
        options.study,
        selection,
        METHODS,
        metrics=("perplexity", "scores", "entropy"),
        progress=progress,
    )
    rows = [
        {name: row[name] for name in ("case_id", "subject", "cases", *COLUMNS)}
        | {name.lower(): row[name.lower()] for name in SCORES}
        | {"method": find_method(row["method"]).label}
        for row in measured
    ]
    lines: list[list[object]] = []
    for method, kind in product(METHODS, KINDS):
        own = matching(rows, method=method.label, cases=kind)
        sizes, entropies = ([row[name] for row in own] for name in ("mean_delta", "entropy"))
        lines.append(
            [
                f"{method.label}, {kind} (n={len(own)})",
                *score_cells(own),
                median(sizes),
                median(entropies),
                max(row["perplexity"] for row in own),
            ]
        )
    return Found(
        title='"Rebuilding ROME", Tables 1 and 4: single edits, scores in percent',
        columns=["", *SCORES, "Score", "median |Delta|", "median entropy", "max perplexity"],
        lines=[*lines, *printed_lines()],
        rows=rows,
        notes=[
            "|Delta| is the Frobenius norm of the update over its number of elements; the entropy "
            "is of the words of ten generations. r-ROME is C-ROME.",
            *generations(options, {*pick(rows, "case_id", cases="collapse")}, selection.normal),
        ],
        draw=partial(plot, rows),
    )


def printed_lines() -> list[list[object]]:
    """The paper's own lines, which have scores alone."""
    lines: list[list[object]] = []
    for table in ("Table 1", "Table 4"):
        (model,), cells = printed(table, paper=REBUILDING)
        for name in LABELS:
            scores = [cells.get((f"{name}/{column}", model)) for column in (*SCORES, "Score")]
            lines.append([f"paper, {table}, {model}, {name}", *scores, None, None, None])
    return lines


def generations(options: ScriptOptions, collapsed: set[float], normal: Sequence[Fact]) -> list[str]:
    """What the model says after a disabling and after a normal edit (Figure 1)."""
    first = next((fact for fact in options.facts if fact.case_id in collapsed), None)
    chosen = {"a disabling edit": first, "a normal edit": normal[0]}
    notes: list[str] = []
    for name, fact in chosen.items():
        if fact is None:
            continue
        ((_, edits),) = options.study.edits([fact], [ROME])
        view = options.study.model.edited(edits[ROME.name])
        said = continuation(view, fact.prompt, tokens=SHOWN_TOKENS)
        notes.append(f"After {name}: {fact.prompt} -> {' '.join(said.split())}")
    return notes


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    drawn, axes = figure(len(METHODS), height=3.4)
    for axis, method in zip(axes, METHODS, strict=True):
        for kind in KINDS:
            own = matching(rows, method=method.label, cases=kind)
            points = ([row[name] for row in own] for name in ("mean_delta", "entropy"))
            axis.plot(*points, "o", color=PALETTE[kind], alpha=0.7, markersize=4, label=kind)
        axis.set_xscale("log")
        axis.set_title(method.label)
        axis.set_xlabel("|Δ| of one edit")
        axis.sharex(axes[0])
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("normalised entropy of ten generations")
    axes[0].legend(fontsize=8)
    return drawn


def sizes_part(result: Result) -> Verdict:
    rome, normal, spared = (
        result.values("mean_delta", method=method, cases=cases)
        for method, cases in (("ROME", "collapse"), ("ROME", "normal"), ("C-ROME", "collapse"))
    )
    ratios = [one / other for one, other in zip(rome, spared, strict=True)]
    apart = median(rome) / median(normal)
    return grade(
        min(rome) > max(normal) and median(ratios) >= ORDERS,
        apart >= LARGE and median(ratios) >= LARGE,
        f"|Delta| of ROME is {spread(rome)} on collapse cases and {spread(normal)} on normal ones "
        f"(medians {apart:.1f} times apart); on the same collapse cases it is {median(ratios):.1f} "
        "times that of r-ROME (median).",
    )


def entropy_tells(result: Result) -> Verdict:
    low, usual = (result.values("entropy", method="ROME", cases=cases) for cases in KINDS)
    wins = [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in product(low, usual)]
    found = sum(wins) / len(wins)
    return grade(
        found >= CLEAR,
        found >= SOME,
        f"The model after a disabling edit has less entropy in {found:.0%} of all pairs with one "
        f"after a normal edit (medians {median(low):.2f} and {median(usual):.2f}).",
    )


def means(result: Result, method: str) -> dict[str, float]:
    """The scores of a method on normal cases, of which nearly all of COUNTERFACT consists."""
    rows = result.chosen(method=method, cases="normal")
    require(len(rows), f"{result.script} has {len(rows)} normal cases of {method}")
    cells = dict(zip((*SCORES, "Score"), score_cells(rows), strict=True))
    found = {name: value for name, value in cells.items() if value is not None}
    if len(found) < len(cells):
        raise GapError("Normal cases have no paraphrases or no neighbours with answers.")
    return found


def r_rome_generalises(result: Result) -> Verdict:
    rome, other = means(result, "ROME"), means(result, "C-ROME")
    lost = rome["ES"] - other["ES"]
    return grade(
        other["Score"] > rome["Score"] and other["PS"] > rome["PS"] and lost <= SLIGHT,
        other["Score"] > rome["Score"] or other["PS"] > rome["PS"],
        f"On normal cases r-ROME has PS {fixed(other['PS'])} against {fixed(rome['PS'])} of ROME, "
        f"ES {fixed(other['ES'])} against {fixed(rome['ES'])}, Score {fixed(other['Score'])} "
        f"against {fixed(rome['Score'])}.",
    )


def p_rome_does_not(result: Result) -> Verdict:
    one, other = means(result, "p-ROME"), means(result, "C-ROME")
    efficacy, worse = one["EM"] >= other["EM"], one["PS"] < other["PS"]
    return grade(
        efficacy and worse,
        efficacy or worse,
        f"On normal cases p-ROME has EM {fixed(one['EM'])} against {fixed(other['EM'])} of r-ROME, "
        f"PS {fixed(one['PS'])} against {fixed(other['PS'])}, Score {fixed(one['Score'])} against "
        f"{fixed(other['Score'])}.",
    )


CLAIMS = (
    Claim(
        id="rebuilding-delta",
        place="Rebuilding ROME, Figure 2",
        sentence="Disabling edits have a larger |Delta|, and that of r-ROME is orders of magnitude "
        "smaller.",
        rule=f"ROME's smallest |Delta| on collapse cases is above its largest on normal ones, and "
        f"on the same collapse cases at least {ORDERS:g} times that of r-ROME in the median. "
        f"Partly: both medians are {LARGE:g} times apart.",
        decide=sizes_part,
        on_collapse=True,
    ),
    Claim(
        id="rebuilding-entropy",
        place="Rebuilding ROME, Figures 2 and 5",
        sentence="After a disabling edit the model's generations have little entropy.",
        rule=f"In at least {CLEAR:.0%} of all pairs of a collapse and a normal case the first one "
        f"has less entropy under ROME. Partly: in {SOME:.0%}. The collapse cases are chosen by "
        f"perplexity (above {COLLAPSE_THRESHOLD:g}), not by entropy.",
        decide=entropy_tells,
        on_collapse=True,
    ),
    Claim(
        id="rebuilding-r-rome",
        place="Rebuilding ROME, Table 1",
        sentence="r-ROME generalises better at a slight expense of efficacy, with a higher Score.",
        rule=f"On normal cases Score and PS of r-ROME are above ROME's, and ES is at most "
        f"{SLIGHT:g} points below. Partly: Score or PS is above. On GPT2-XL the paper's own Table "
        "4 has the Score of r-ROME and its PS below ROME's.",
        decide=r_rome_generalises,
    ),
    Claim(
        id="rebuilding-p-rome",
        place="Rebuilding ROME, Table 1",
        sentence="p-ROME is more effective than r-ROME and generalises worse.",
        rule="On normal cases EM of p-ROME is at least that of r-ROME, and PS is below. Partly: "
        "one of both.",
        decide=p_rome_does_not,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS))
