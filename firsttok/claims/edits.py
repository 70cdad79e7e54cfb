"""Claims about what an edit does to update and perplexity: Tables 1 to 3, Section 3.3."""

from collections.abc import Sequence
from itertools import compress
from statistics import mean, median

from firsttok.claims.results import LEAST, NotJudgedError, ScriptResult, fixed
from firsttok.claims.verdicts import Claim, Verdict, grade, verdict
from firsttok.evaluation import COLLAPSE_THRESHOLD

__all__ = ["EDIT_CLAIMS"]

COMPONENTS, PERPLEXITY, TRANSFER = (
    "table1_update_components",
    "table2_perplexity",
    "table3_transfer",
)
TWO_ORDERS, ONE_ORDER = 100.0, 10.0
SAME_SIZE = 3.0
UNCHANGED, NEARLY_UNCHANGED, NO_SHARP_RISE = 1.1, 1.2, 2.0
NEARLY_ALL, HALF = 0.9, 0.5


def small_denominators(result: ScriptResult) -> Verdict:
    """Table 1: denominators of collapse cases are two orders of magnitude smaller."""
    collapse, normal = (
        result.values("denominator", method="ROME", cases=cases) for cases in ("collapse", "normal")
    )
    if min(map(abs, collapse)) == 0:
        raise NotJudgedError("A denominator is exactly zero, so no ratio can be formed.")
    sizes = [[abs(value) for value in group] for group in (collapse, normal)]
    of_means, of_medians = (middle(sizes[1]) / middle(sizes[0]) for middle in (mean, median))
    factor = min(of_means, of_medians)
    return verdict(
        grade(factor >= TWO_ORDERS, factor >= ONE_ORDER),
        f"ROME's mean |denominator| is {fixed(mean(sizes[0]))} on {len(collapse)} collapse cases "
        f"and {fixed(mean(sizes[1]))} on {len(normal)} normal ones: {fixed(of_means)} times "
        f"smaller by the mean, {fixed(of_medians)} times by the median.",
    )


def equal_numerators(result: ScriptResult) -> Verdict:
    """Table 1: the numerators do not differ much."""
    collapse, normal = (
        mean(result.values("numerator", method="ROME", cases=cases))
        for cases in ("collapse", "normal")
    )
    if min(collapse, normal) <= 0:
        raise NotJudgedError("A mean numerator is zero, so no ratio can be formed.")
    factor = max(collapse / normal, normal / collapse)
    side = "larger" if collapse > normal else "smaller"
    return verdict(
        grade(factor <= SAME_SIZE, factor < ONE_ORDER),
        f"The mean numerator of ROME is {fixed(collapse)} on collapse cases and {fixed(normal)} on "
        f"normal ones: {fixed(factor)} times {side} on collapse cases.",
    )


def rome_collapses(result: ScriptResult) -> Verdict:
    """Table 2: ROME destroys the model on collapse cases and leaves it alone on normal ones."""
    original = result.number("original_perplexity")
    collapse, normal = (
        result.values("perplexity", method="ROME", cases=cases) for cases in ("collapse", "normal")
    )
    collapsed = sum(value > COLLAPSE_THRESHOLD for value in collapse)
    spoilt = sum(value > COLLAPSE_THRESHOLD for value in normal)
    quiet = sum(value <= NEARLY_UNCHANGED * original for value in normal)
    every = collapsed == len(collapse)
    return verdict(
        grade(every and quiet == len(normal), collapsed >= HALF * len(collapse) and not spoilt),
        f"{collapsed} of {len(collapse)} collapse cases end above {COLLAPSE_THRESHOLD:g} (the "
        f"lowest at {fixed(min(collapse))}); of {len(normal)} normal ones {spoilt} do and {quiet} "
        f"stay within {NEARLY_UNCHANGED} times the original {fixed(original)} (the highest at "
        f"{fixed(max(normal))}).",
    )


def c_rome_spares(result: ScriptResult) -> Verdict:
    """Table 2: C-ROME leaves the perplexity where it was."""
    rome = result.values("perplexity", method="ROME", cases="collapse")
    if max(rome) <= COLLAPSE_THRESHOLD:
        raise NotJudgedError("ROME collapses the model on no case here: nothing is to be avoided.")
    return _stays(result, ("C-ROME",))


def ours_spare(result: ScriptResult) -> Verdict:
    """The two other consistent variants leave the perplexity where it was, too."""
    return _stays(result, ("p-ROME", "FC-ROME"))


def first_tokens(result: ScriptResult) -> Verdict:
    """Section 3.3: nearly every collapse case has a one-token subject that begins the prompt."""
    # Of a list made on another model, only those count that collapse here, too.
    perplexities = result.values("perplexity", method="ROME", cases="collapse")
    collapsed = [value > COLLAPSE_THRESHOLD for value in perplexities]
    first, single = (
        list(compress(result.values(column, method="ROME", cases="collapse"), collapsed))
        for column in ("first_token", "one_token")
    )
    normal = result.values("first_token", method="ROME", cases="normal")
    if len(first) < LEAST:
        raise NotJudgedError(
            f"ROME collapses the model on {len(first)} cases here, which is too few."
        )
    both = sum(at_first and alone for at_first, alone in zip(first, single, strict=True))
    share, usual = both / len(first), mean(normal)
    return verdict(
        grade(share >= NEARLY_ALL and usual < HALF, share >= HALF and share > usual),
        f"In {both:g} of {len(first)} collapse cases the subject is one token and the first; of "
        f"{len(normal)} normal cases {usual:.0%} have a subject in the first place.",
    )


def no_transfer(result: ScriptResult) -> Verdict:
    """Table 3: one model's collapse cases leave other models alone."""
    own = result.values("collapsed", source=True)
    if not any(own):
        raise NotJudgedError("No case collapses the model they are said to come from.")
    names = list(dict.fromkeys(str(row["model"]) for row in result.chosen(source=False)))
    if not names:
        missing = ", ".join(map(str, result.provenance.get("missing", ()))) or "none was named"
        raise NotJudgedError(f"No other model was there to edit ({missing}).")
    factors: dict[str, float] = {}
    notes: list[str] = []
    for name in names:
        perplexities = result.values("perplexity", source=False, model=name)
        originals = result.values("original_perplexity", source=False, model=name)
        pairs = zip(perplexities, originals, strict=True)
        factors[name] = max(after / before for after, before in pairs)
        bos = all(row.get("bos") in (True, "with") for row in result.chosen(model=name))
        notes.append(
            f"{name} ({'with' if bos else 'without'} BOS): at most {fixed(factors[name])} times "
            f"the original, on {len(perplexities)} cases"
        )
    within = [factor <= UNCHANGED for factor in factors.values()]
    mild = all(factor <= NO_SHARP_RISE for factor in factors.values())
    return verdict(grade(all(within), any(within) or mild), f"{'; '.join(notes)}.")


def _stays(result: ScriptResult, methods: Sequence[str]) -> Verdict:
    original = result.number("original_perplexity")
    notes: list[str] = []
    worst = 0.0
    for method in methods:
        for cases in ("collapse", "normal"):
            values = result.values("perplexity", method=method, cases=cases)
            worst = max(worst, max(values) / original)
            notes.append(f"{fixed(max(values))} for {method} on {len(values)} {cases} cases")
    return verdict(
        grade(worst <= UNCHANGED, worst <= NO_SHARP_RISE),
        f"The highest perplexity is {', '.join(notes)}; the original is {fixed(original)}, so the "
        f"largest factor is {worst:.3f}.",
    )


_SELECTED = (
    "Collapse cases are chosen by this very threshold (unless the list comes from another model), "
    "so it is the normal ones that can fail."
)
EDIT_CLAIMS = (
    Claim(
        id="table1-denominator",
        script=COMPONENTS,
        place="Table 1",
        sentence="On collapse cases ROME's denominator is two orders of magnitude smaller than on "
        "normal ones.",
        rule=f"Normal over collapse, of the mean and of the median |denominator|: the smaller of "
        f"both ratios is at least {TWO_ORDERS:g}, which is what two orders of magnitude are (the "
        f"paper's means are 240 to 320 apart). Partly: at least {ONE_ORDER:g}.",
        decide=small_denominators,
        on_collapse=True,
    ),
    Claim(
        id="table1-numerator",
        script=COMPONENTS,
        place="Table 1",
        sentence="The numerators of collapse and normal cases do not differ significantly.",
        rule=f"The mean norms lie within a factor of {SAME_SIZE:g} of each other, in either "
        f"direction. Partly: within one order of magnitude (less than {ONE_ORDER:g}).",
        decide=equal_numerators,
        on_collapse=True,
    ),
    Claim(
        id="table2-rome",
        script=PERPLEXITY,
        place="Table 2",
        sentence="One ROME edit destroys the model on collapse cases and changes little on normal "
        "ones.",
        rule=f"Every collapse case above {COLLAPSE_THRESHOLD:g}, every normal one within "
        f"{NEARLY_UNCHANGED} times the original perplexity (the paper's largest factor is 1.11). "
        f"Partly: at least half of the collapse cases and no normal one above "
        f"{COLLAPSE_THRESHOLD:g}. {_SELECTED}",
        decide=rome_collapses,
    ),
    Claim(
        id="table2-c-rome",
        script=PERPLEXITY,
        place="Table 2",
        sentence="C-ROME, with the same key in every slot, leaves the model as it was.",
        rule=f"The highest perplexity over collapse and normal cases is at most {UNCHANGED} times "
        f"the original (the paper's largest factor is 1.06). Partly: at most {NO_SHARP_RISE:g} "
        "times. Not judged where ROME collapses nothing.",
        decide=c_rome_spares,
    ),
    Claim(
        id="section3-first-token",
        script=PERPLEXITY,
        place="Section 3.3",
        sentence="In almost all collapse cases the subject is a single token at the beginning of "
        "the prompt.",
        rule=f"At least {NEARLY_ALL:.0%} of the collapse cases, while fewer than half of the "
        "normal cases have their subject in the first place. Partly: at least half of the collapse "
        "cases, and a larger share than of the normal ones.",
        decide=first_tokens,
    ),
    Claim(
        id="table3-transfer",
        script=TRANSFER,
        place="Table 3",
        sentence="The collapse cases of one model do not collapse other models.",
        rule=f"On every other model the highest perplexity is at most {UNCHANGED} times its "
        f"original (the paper's largest factor is 1.06). Partly: on some other model, or at most "
        f"{NO_SHARP_RISE:g} times on all of them. The paper's cases here end in a period; cases "
        "that begin with their subject are another kind, and the model's BOS policy decides on "
        "them (Figure 7).",
        decide=no_transfer,
    ),
    Claim(
        id="own-consistent-variants",
        script=PERPLEXITY,
        place="beside Table 2",
        sentence="The other consistent variants, p-ROME and FC-ROME, leave the model as it was, "
        "too.",
        rule=f"The highest perplexity of both over collapse and normal cases is at most "
        f"{UNCHANGED} times the original. Partly: at most {NO_SHARP_RISE:g} times.",
        decide=ours_spare,
        own=True,
    ),
)
