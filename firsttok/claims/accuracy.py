"""Claims about whether the new target comes out: Tables 4 and 5, and the anchor of the value."""

from statistics import mean
from typing import Any

from firsttok.claims.results import NotJudgedError, ScriptResult, fixed
from firsttok.claims.verdicts import Claim, Verdict, grade, verdict

__all__ = ["ACCURACY_CLAIMS"]

BARE, PREFIXED, ANCHOR = "table4_efficacy", "table5_prefixed_efficacy", "extra_value_anchor"
HIGH, MOST, HALF = 0.9, 0.8, 0.5
UNCHANGED = 1.1


def low_efficacy(result: ScriptResult) -> Verdict:
    """Table 4: C-ROME hardly writes on collapse cases."""
    return _low(result, "efficacy")


def low_generalization(result: ScriptResult) -> Verdict:
    """Table 4: nor does what it writes carry over to a paraphrase."""
    return _low(result, "generalization")


def prefixed_efficacy(result: ScriptResult) -> Verdict:
    """Table 5: behind a prefix C-ROME's target comes out."""
    return _high(result, "C-ROME", "collapse")


def normal_efficacy(result: ScriptResult) -> Verdict:
    """Table 5 (and Table 4's caption): on normal cases C-ROME writes."""
    return _high(result, "C-ROME", "normal")


def leaves_neighbours(result: ScriptResult) -> Verdict:
    """Table 5: C-ROME leaves the answers about other subjects as they were."""
    found = {
        cases: mean(_known(result, "locality", method="C-ROME", cases=cases))
        for cases in ("collapse", "normal")
    }
    kept = [found["collapse"] >= MOST, found["normal"] >= HIGH]
    return verdict(
        grade(all(kept), any(kept)),
        f"C-ROME's mean locality is {found['collapse']:.1%} on collapse cases and "
        f"{found['normal']:.1%} on normal ones.",
    )


def our_efficacy(result: ScriptResult) -> Verdict:
    """FC-ROME's target comes out behind a prefix."""
    return _high(result, "FC-ROME", "collapse")


def limited_generalization(result: ScriptResult) -> Verdict:
    """Table 5: the prefix raises efficacy, generalization little."""
    match: dict[str, Any] = {"method": "C-ROME", "cases": "collapse"}
    efficacy = mean(result.values("efficacy", **match))
    general = mean(_known(result, "generalization", **match))
    if efficacy < HALF:
        raise NotJudgedError(
            f"Behind prefixes the efficacy itself is only {efficacy:.1%}, so there is no gain that "
            "generalization could lag behind."
        )
    return verdict(
        grade(general <= efficacy / 2, general < efficacy),
        f"Mean generalization is {general:.1%} where efficacy behind a prefix is {efficacy:.1%} "
        f"({len(result.chosen(**match))} collapse cases).",
    )


def anchor_writes(result: ScriptResult) -> Verdict:
    """FC-ROME writes behind unseen prefixes, C-ROME does not, in every context seed."""
    original = result.number("original_perplexity")
    seeds = sorted({row["seed"] for row in result.rows if isinstance(row.get("seed"), int)})
    if not seeds:
        raise NotJudgedError(f"{result.script} has no rows of any context seed.")
    ours, theirs = (
        [mean(result.values("held_out_prefixes", method=method, seed=seed)) for seed in seeds]
        for method in ("FC-ROME", "C-ROME")
    )
    worst = max(result.values("perplexity", method="FC-ROME")) / original
    cases = len(result.chosen(method="FC-ROME", seed=seeds[0]))
    holds = min(ours) >= HALF and max(theirs) < HALF and worst <= UNCHANGED
    pairs = zip(ours, theirs, strict=True)
    return verdict(
        grade(holds, all(mine > other for mine, other in pairs)),
        f"Behind prefixes the edit has not seen, the new target's mean probability is "
        f"{_spread(ours)} with FC-ROME and {_spread(theirs)} with C-ROME ({cases} cases, "
        f"{len(seeds)} context seeds); FC-ROME's highest perplexity is {worst:.3f} times the "
        "original.",
    )


def _low(result: ScriptResult, column: str) -> Verdict:
    values = _known(result, column, method="C-ROME", cases="collapse")
    found = mean(values)
    return verdict(
        grade(found < HALF, found < HIGH),
        f"C-ROME's mean {column} on {len(values)} collapse cases is {found:.1%}.",
    )


def _high(result: ScriptResult, method: str, cases: str) -> Verdict:
    values = result.values("efficacy", method=method, cases=cases)
    found = mean(values)
    where = "behind a prefix, " if cases == "collapse" else ""
    return verdict(
        grade(found >= HIGH, found >= HALF),
        f"{method}'s mean efficacy on {len(values)} {cases} cases is {found:.1%} ({where}over the "
        f"cases from {min(values):.0%} to {max(values):.0%}).",
    )


def _known(result: ScriptResult, column: str, **match: Any) -> list[float]:
    """Values of the facts that have a paraphrase; a null means that there is none."""
    rows = tuple(row for row in result.chosen(**match) if row.get(column, "") is not None)
    kept = ScriptResult(script=result.script, rows=rows, provenance={})
    return kept.values(column, **match)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return fixed(values[0])
    return f"{fixed(min(values))} to {fixed(max(values))}"


ACCURACY_CLAIMS = (
    Claim(
        id="table4-efficacy",
        script=BARE,
        place="Table 4",
        sentence="C-ROME spares the model but hardly writes the new target on collapse cases.",
        rule=f"C-ROME's mean efficacy on collapse cases, prompts as they are, is below {HALF:.0%} "
        f"(the paper's highest is 30.59 %). Partly: below the {HIGH:.0%} of normal cases.",
        decide=low_efficacy,
        on_collapse=True,
    ),
    Claim(
        id="table4-generalization",
        script=BARE,
        place="Table 4",
        sentence="What C-ROME writes on collapse cases does not carry over to a paraphrase either.",
        rule=f"Its mean generalization is below {HALF:.0%} (the paper's highest is 30.77 %). "
        f"Partly: below {HIGH:.0%}.",
        decide=low_generalization,
        on_collapse=True,
    ),
    Claim(
        id="table5-efficacy",
        script=PREFIXED,
        place="Table 5",
        sentence="Behind a prefix drawn from those of the editing, C-ROME's new target comes out "
        "on collapse cases.",
        rule=f"C-ROME's mean efficacy on collapse cases is at least {HIGH:.0%} (the paper's lowest "
        f"is 91.27 %). Partly: at least {HALF:.0%}.",
        decide=prefixed_efficacy,
        on_collapse=True,
    ),
    Claim(
        id="table5-normal",
        script=PREFIXED,
        place="Tables 4 and 5",
        sentence="On normal cases C-ROME writes the new target.",
        rule=f"Its mean efficacy on normal cases is at least {HIGH:.0%} (the paper's lowest is "
        f"91.95 %). Partly: at least {HALF:.0%}.",
        decide=normal_efficacy,
    ),
    Claim(
        id="table5-generalization",
        script=PREFIXED,
        place="Table 5",
        sentence="The prefix raises efficacy much and generalization little.",
        rule="C-ROME's mean generalization on collapse cases is at most half of its efficacy "
        "behind a prefix (a third at most in the paper). Partly: below it. Not judged where the "
        f"efficacy is below {HALF:.0%}. The prefix stands before the rewriting prompt only, as in "
        "the released code, so generalization and locality are those of Table 4.",
        decide=limited_generalization,
        on_collapse=True,
    ),
    Claim(
        id="table5-locality",
        script=PREFIXED,
        place="Tables 4 and 5",
        sentence="C-ROME leaves the answers about other subjects as they were.",
        rule=f"Its mean locality is at least {MOST:.0%} on collapse cases (the paper's lowest is "
        f"82.35 %) and at least {HIGH:.0%} on normal ones (95.61 %). Partly: one of the two.",
        decide=leaves_neighbours,
    ),
    Claim(
        id="own-prefixed-efficacy",
        script=PREFIXED,
        place="beside Table 5",
        sentence="Behind a prefix, FC-ROME's new target comes out on collapse cases.",
        rule=f"FC-ROME's mean efficacy on collapse cases is at least {HIGH:.0%}. Partly: at least "
        f"{HALF:.0%}.",
        decide=our_efficacy,
        on_collapse=True,
        own=True,
    ),
    Claim(
        id="own-value-anchor",
        script=ANCHOR,
        place="in no paper",
        sentence="What keeps C-ROME from writing is the anchor of the value, taken from the bare "
        "prompt: FC-ROME, which takes it from the prefixed ones, writes, and spares the model, "
        "too.",
        rule="Behind prefixes the edit has not seen, the target's mean probability is at least "
        f"{HALF} with FC-ROME (more than all other tokens together) and below {HALF} with C-ROME, "
        f"in every context seed, and FC-ROME's highest perplexity is at most {UNCHANGED} times the "
        "original. Partly: FC-ROME's mean probability is the higher one in every seed.",
        decide=anchor_writes,
        own=True,
    ),
)
