"""Claims about what makes the first token special: Tables 6 and 7, Figure 7, mask, identity."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from firsttok.claims.results import NotJudgedError, ScriptResult, fixed
from firsttok.claims.verdicts import Claim, Verdict, grade, verdict
from firsttok.evaluation import COLLAPSE_THRESHOLD

__all__ = ["PLACE_CLAIMS"]

SECOND2FIRST, FIRST2SECOND, BOS = (
    "table6_second2first",
    "table7_first2second",
    "figure7_without_bos",
)
MASK, IDENTITY = "extra_attention_mask", "extra_token_identity"
SWAPPED = ("keys", "editing", "everything")
HALF = 0.5
UNCHANGED = 1.1
TENFOLD = 10.0


def persists(result: ScriptResult) -> Verdict:
    """Table 6: the second token's position does not end the first token's collapse."""
    result.values("perplexity", stage="none")
    result.values("case_id", stage="none")
    collapsing = {
        row["case_id"]
        for row in result.chosen(stage="none")
        if row["perplexity"] > COLLAPSE_THRESHOLD
    }
    if not collapsing:
        raise NotJudgedError("No case collapses without the swap, so there is nothing to end.")
    rows = tuple(row for row in result.rows if row.get("case_id") in collapsing)
    result = ScriptResult(script=result.script, rows=rows, provenance=result.provenance)
    before = result.values("perplexity", stage="none")
    stages = {stage: result.values("perplexity", stage=stage) for stage in SWAPPED}
    notes = ", ".join(f"{_above(values)} ({stage})" for stage, values in stages.items())
    reason = (
        f"Above {COLLAPSE_THRESHOLD:g} under the swap, by where it acts: {notes}; the mean goes "
        f"from {fixed(mean(before))} to {fixed(mean(stages['everything']))}."
    )
    if _embedding(result) == "rotary":
        values = [value for found in stages.values() for value in found]
        share = _share(values)
        return verdict(grade(share == 1, share >= HALF), f"Rotary positions. {reason}")
    share = _share(stages["everything"])
    milder = mean(stages["everything"]) <= mean(before) / 2
    return verdict(
        grade(milder and share >= HALF, share > 0), f"Learned position embeddings. {reason}"
    )


def key_untouched(result: ScriptResult) -> Verdict:
    """Under rotary positions the swap cannot reach the first token's key."""
    changes = result.values("first_key_change", stage="none")
    largest = max(changes)
    kind = _embedding(result)
    reason = (
        f"With {kind} position embeddings the swap changes the keys of {len(changes)} first tokens "
        f"by {'exactly 0' if largest == 0 else f'at most {fixed(largest)}'}."
    )
    if kind == "rotary":
        return verdict(grade(largest == 0, False), reason)
    return verdict(grade(min(changes) > 0, largest > 0), reason)


def partial_collapse(result: ScriptResult) -> Verdict:
    """Table 7: the first token's position does not make a second token collapse consistently."""
    stages = {stage: result.values("perplexity", stage=stage) for stage in SWAPPED}
    notes = ", ".join(f"{_above(values)} ({stage})" for stage, values in stages.items())
    values = stages["everything"]
    share = _share(values)
    reason = (
        f"Above {COLLAPSE_THRESHOLD:g} under the swap, by where it acts: {notes}; where it acts on "
        f"everything, the perplexities go from {fixed(min(values))} to {fixed(max(values))}."
    )
    if _embedding(result) == "rotary":
        return verdict(grade(share <= HALF, share < 1), f"Rotary positions. {reason}")
    return verdict(grade(0 < share < 1, share == 0), f"Learned position embeddings. {reason}")


def bos_takes_it_away(result: ScriptResult) -> Verdict:
    """Figure 7: without BOS the cases collapse, with BOS they do not."""
    without, with_bos = _bos(result)
    apart = _share(without) - _share(with_bos)
    return verdict(
        grade(_share(without) == 1 and _share(with_bos) == 0, apart >= HALF),
        f"Above {COLLAPSE_THRESHOLD:g}: {_above(without)} collapse cases without BOS, "
        f"{_above(with_bos)} with it (the highest at {fixed(max(with_bos))}).",
    )


def bos_heals(result: ScriptResult) -> Verdict:
    """The reverse: BOS given to the prompts leaves the perplexity where it was."""
    without, _ = _bos(result)
    if max(without) <= COLLAPSE_THRESHOLD:
        raise NotJudgedError("No case collapses without BOS, so there is nothing to prevent.")
    match: dict[str, Any] = {"cases": "collapse", "bos": "with"}
    worst = 0.0
    for column, original in (
        ("perplexity", "original_perplexity"),
        ("perplexity_same_bos", "original_perplexity_same_bos"),
    ):
        pairs = zip(result.values(column, **match), result.values(original, **match), strict=True)
        worst = max(worst, *(after / before for after, before in pairs))
    gone = _share(_bos(result)[1]) == 0
    return verdict(
        grade(worst <= UNCHANGED and gone, gone),
        f"With a BOS before the prompt, the perplexity after ROME is at most {worst:.3f} times the "
        f"original on {len(without)} collapse cases, {_above(without)} of which end above "
        f"{COLLAPSE_THRESHOLD:g} without it.",
    )


def mask_makes_the_state(result: ScriptResult) -> Verdict:
    """A token that sees only itself has the first token's huge residual norm, another has not."""

    def norm(intervention: str, place: int) -> float:
        match: dict[str, Any] = {"part": "state", "intervention": intervention, "place": place}
        found = mean(result.values("residual_norm", least=1, **match))
        if found <= 0:
            raise NotJudgedError("A residual norm is zero, so no ratio can be formed.")
        return found

    later = int(max(result.values("place", least=2, part="state")))
    first, other = norm("none", 0), norm("none", later)
    opened, closed = norm("first sees all", 0), norm("later sees itself only", later)
    anomaly = first >= TENFOLD * other
    held = [opened <= first / TENFOLD, closed >= TENFOLD * other]
    return verdict(
        grade(anomaly and all(held), anomaly and any(held)),
        f"Mean residual norm: {fixed(first)} at the first token and {fixed(other)} at token "
        f"{later}; {fixed(opened)} at the first when it may attend to all, {fixed(closed)} at "
        f"token {later} when it may attend to itself only.",
    )


def mask_makes_the_collapse(result: ScriptResult) -> Verdict:
    """ROME collapses the model with a k^u that saw only itself, wherever its token stands."""
    alone = ("first token", "later token sees itself only")
    seeing = ("first token sees all", "later token")
    return _crossed(result, "key_from", alone, seeing, part="edit")


def place_makes_the_collapse(result: ScriptResult) -> Verdict:
    """ROME collapses the model with a k^u from the first place, whichever the token."""
    cells = {
        f"{position}, {space} space": result.chosen(position=position, space=space)
        for position in ("first", "later")
        for space in ("without", "with")
    }
    rows = tuple(dict(row) | {"cell": name} for name, found in cells.items() for row in found)
    named = ScriptResult(script=result.script, rows=rows, provenance=result.provenance)
    first, later = tuple(cells)[:2], tuple(cells)[2:]
    return _crossed(named, "cell", first, later)


def _crossed(
    result: ScriptResult, field: str, bad: Sequence[str], good: Sequence[str], **match: Any
) -> Verdict:
    """All edits of the bad kinds collapse, none of the good kinds."""
    found: dict[str, list[float]] = {}
    for name in (*bad, *good):
        wanted: dict[str, Any] = match | {field: name}
        found[name] = result.values("perplexity", **wanted)
    shares = {name: _share(values) for name, values in found.items()}
    holds = all(shares[name] == 1 for name in bad) and all(shares[name] == 0 for name in good)
    mostly = all(shares[name] >= HALF for name in bad) and all(shares[name] < HALF for name in good)
    notes = ", ".join(f"{_above(values)} ({name})" for name, values in found.items())
    return verdict(
        grade(holds, mostly), f"Above {COLLAPSE_THRESHOLD:g} after ROME, by k^u: {notes}."
    )


def _bos(result: ScriptResult) -> tuple[list[float], list[float]]:
    """Perplexities of collapse cases: without BOS, and with it, the higher of both text policies.

    The paper's texts have no BOS; a model that only survives on such texts is not spared.
    """
    match: dict[str, Any] = {"cases": "collapse"}
    without = result.values("perplexity", bos="without", **match)
    pairs = zip(
        result.values("perplexity", bos="with", **match),
        result.values("perplexity_same_bos", bos="with", **match),
        strict=True,
    )
    return without, [max(pair) for pair in pairs]


def _embedding(result: ScriptResult) -> str:
    kind = result.provenance.get("embedding")
    if kind not in ("learned", "rotary"):
        raise NotJudgedError(f"{result.script} does not say which position embedding it ran on.")
    return str(kind)


def _share(values: Sequence[float]) -> float:
    return sum(value > COLLAPSE_THRESHOLD for value in values) / len(values)


def _above(values: Sequence[float]) -> str:
    return f"{sum(value > COLLAPSE_THRESHOLD for value in values)} of {len(values)}"


_STAGES = (
    "The paper does not say where its swap acts, so three stages are measured: on the keys, on the "
    "keys and the value optimisation, and on everything"
)
PLACE_CLAIMS = (
    Claim(
        id="table6-second2first",
        script=SECOND2FIRST,
        place="Table 6",
        sentence="Giving the first token the position embedding of the second does not end the "
        "collapse: it mitigates it on GPT-2-XL (learned positions) and does nothing on GPT-J and "
        "Llama2-7b (rotary ones).",
        rule=f"{_STAGES}. Rotary models, as GPT-J and Llama2-7b: every case stays above "
        f"{COLLAPSE_THRESHOLD:g} at every stage; partly: at least half of them. Learned "
        "embeddings, as GPT-2-XL, swap on everything: the mean perplexity falls to at most a half, "
        f"and at least half of the cases stay above {COLLAPSE_THRESHOLD:g} (all of the paper's "
        "do); partly: some stay above it.",
        decide=persists,
    ),
    Claim(
        id="table7-first2second",
        script=FIRST2SECOND,
        place="Table 7",
        sentence="Giving a second token the position embedding of the first does not collapse the "
        "model consistently: partly on GPT-2-XL and Llama2-7b, never on GPT-J.",
        rule=f"{_STAGES}; the last decides. Rotary models, on which the paper finds both some "
        f"collapse (Llama2-7b) and none (GPT-J): at most half of the cases above "
        f"{COLLAPSE_THRESHOLD:g}; partly: not all. Learned embeddings, as GPT-2-XL: some cases "
        "above it, but not all; partly: none.",
        decide=partial_collapse,
    ),
    Claim(
        id="figure7-bos",
        script=BOS,
        place="Figure 7",
        sentence="It is the BOS token that protects the models which have one: without it they "
        "collapse on the same cases.",
        rule=f"Every collapse case above {COLLAPSE_THRESHOLD:g} without BOS and none with it, the "
        "texts having BOS or not. Partly: the shares above it differ by at least one half. Where "
        "the cases were found on this very model without BOS, the first half holds by choice.",
        decide=bos_takes_it_away,
    ),
    Claim(
        id="own-second2first-key",
        script=SECOND2FIRST,
        place="beside Table 6",
        sentence="On rotary models Second2First cannot change the first token's key at all: it "
        "attends to itself alone, whatever its angle. With learned embeddings it does.",
        rule="Rotary: the largest change of any first token's key at the edited layer is exactly "
        "0. Learned: it is above 0 for every case; partly: for some.",
        decide=key_untouched,
        own=True,
    ),
    Claim(
        id="own-bos-reverse",
        script=BOS,
        place="beside Figure 7",
        sentence="The reverse holds, too: a BOS put before the prompts prevents the collapse.",
        rule=f"With BOS every collapse case stays within {UNCHANGED} times the original, measured "
        f"on texts without and with BOS. Partly: none above {COLLAPSE_THRESHOLD:g}. Not judged "
        "where nothing collapses without BOS.",
        decide=bos_heals,
        own=True,
    ),
    Claim(
        id="own-mask-state",
        script=MASK,
        place="in no paper",
        sentence="A token that may attend to itself only becomes the anomaly wherever it stands, "
        "and a first token that may attend to others is none.",
        rule=f"By mean residual norm at the edited layer: the first token's is at least "
        f"{TENFOLD:g} times a later one's; it falls to a tenth or less when it may attend to all; "
        f"the later one's rises at least {TENFOLD:g}-fold when it may attend to itself only. "
        "Partly: the first and one of the others.",
        decide=mask_makes_the_state,
        own=True,
    ),
    Claim(
        id="own-mask-edit",
        script=MASK,
        place="in no paper",
        sentence="ROME destroys the model with the k^u of a token that saw only itself, wherever "
        "it stands, and with no other.",
        rule=f"Every edit with k^u of the first token, and of a later token that sees itself only, "
        f"ends above {COLLAPSE_THRESHOLD:g}; none with k^u of a later token, or of a first token "
        "that sees all. Partly: at least half, and fewer than half.",
        decide=mask_makes_the_collapse,
        own=True,
    ),
    Claim(
        id="own-token-identity",
        script=IDENTITY,
        place="in no paper",
        sentence="It is the place and not the token: with and without its leading space, the "
        "subject collapses the model from the first place and from no later one.",
        rule=f"Every edit with a k^u from the first place ends above {COLLAPSE_THRESHOLD:g}, in "
        "either spelling, and none with a k^u from a later place. Partly: at least half, and fewer "
        "than half, in each of the four crossings.",
        decide=place_makes_the_collapse,
        own=True,
    ),
)
