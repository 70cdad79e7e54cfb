"""Claims about where keys lie and how close together: Figures 2 to 6 and 8, Equation 4."""

from collections.abc import Mapping
from typing import Any

from firsttok.claims.results import LEAST, NotJudgedError, ScriptResult, fixed
from firsttok.claims.verdicts import Claim, Verdict, grade, verdict

__all__ = ["KEY_CLAIMS"]

KEYS, FIRST_TOKENS, ENCODER, CONCENTRATION = (
    "figure2_keys",
    "figure3_first_tokens",
    "figure6_encoder_contrast",
    "figure8_concentration",
)
PROBE, SILHOUETTE = 0.9, 0.3
"""Two groups are apart if a linear probe is right in nine of ten cases on vectors it was not fitted
on, and the silhouette speaks of a structure at all. A probe alone finds a difference between almost
any two groups in 1536 dimensions; what a t-SNE picture shows as two clouds needs both."""
SHIFTED = "without, positions from 1"
TWOFOLD, TENFOLD = 2.0, 10.0
HALF = 0.5
LLAMA_FAMILY = ("llama2-7b", "llama3-8b", "mistral-7b", "smollm2-135m")
_APART = f"probe accuracy at least {PROBE} and silhouette at least {SILHOUETTE}"


def denominator_parts(result: ScriptResult) -> Verdict:
    """Figures 2a, 4a, 5a: C^-1 k_bar and k^u lie apart in collapse cases only."""
    return _collapse_only(result, "a")


def keys_part(result: ScriptResult) -> Verdict:
    """Figures 2b, 4b, 5b: k_bar and k^u lie apart in collapse cases only."""
    return _collapse_only(result, "b")


def first_tokens_alike(result: ScriptResult) -> Verdict:
    """Figure 3a: first tokens of normal prompts lie where k^u of collapse cases lies."""
    return _joins(result, panel="a", joined="collapse", left="normal")


def prefix_moves(result: ScriptResult) -> Verdict:
    """Figure 3b: behind a prefix, k^u of collapse cases lies where that of normal cases lies."""
    return _joins(result, panel="b", joined="normal", left="collapse")


def encoder_has_none(result: ScriptResult) -> Verdict:
    """Figure 6: in a bidirectional encoder first tokens are as others, in every layer."""
    views = {"without": _layers(result, kind="encoder", bos="without")}
    if result.chosen(kind="encoder", bos="with"):
        views["with"] = _layers(result, kind="encoder", bos="with")
    if min(map(len, views.values())) < LEAST:
        raise NotJudgedError(
            f"{result.script} has too few layers of the encoder; {LEAST} are needed."
        )
    shares: list[float] = []
    notes: list[str] = []
    for bos, layers in views.items():
        rows = list(layers.values())
        alike = [1 / TWOFOLD <= row["ratio"] <= TWOFOLD and not _is_apart(row) for row in rows]
        ratios = [row["ratio"] for row in rows]
        shares.append(sum(alike) / len(alike))
        notes.append(
            f"{sum(alike)} of {len(alike)} {bos} a special token in front (D(F)/D(S) from "
            f"{fixed(min(ratios))} to {fixed(max(ratios))}, silhouette at most "
            f"{max(row['silhouette'] for row in rows):.2f})"
        )
    lowest = min(row["ratio"] for row in _layers(result, kind="decoder", bos="without").values())
    contrast = lowest < 1 / TWOFOLD
    return verdict(
        grade(min(shares) == 1 and contrast, max(shares) >= HALF),
        f"Encoder layers in which first and subsequent tokens are alike: {', '.join(notes)}. In "
        f"the decoder D(F)/D(S) falls to {fixed(lowest)}.",
    )


def encoder_place(result: ScriptResult) -> Verdict:
    """An encoder's first token is as others once it does not stand at the special token's place."""
    ratios: dict[str, list[float]] = {}
    for bos in ("without", SHIFTED):
        layers = _layers(result, kind="encoder", bos=bos)
        if len(layers) < LEAST:
            raise NotJudgedError(
                f"{result.script} has {len(layers)} layers of the encoder {bos} BOS; {LEAST} are "
                "needed."
            )
        ratios[bos] = [row["ratio"] for row in layers.values()]
    before, after = min(ratios["without"]), min(ratios[SHIFTED])
    if before >= 1 / TWOFOLD:
        raise NotJudgedError(
            "Without a special token the encoder's first tokens are not concentrated, so there is "
            "nothing to explain."
        )
    return verdict(
        grade(after >= 1 / TWOFOLD, after >= TENFOLD * before),
        f"Without a special token in front D(F)/D(S) falls to {fixed(before)}; with all position "
        f"ids one higher, and nothing else changed, it is at least {fixed(after)}.",
    )


def equation4(result: ScriptResult) -> Verdict:
    """Equation 4: at the edited layer the first tokens are markedly more concentrated."""
    row = _edited(result)
    return verdict(
        grade(row["parted"] and row["ratio"] <= 1 / TENFOLD, row["parted"]), _describe(row)
    )


def shrinks(result: ScriptResult) -> Verdict:
    """Figure 8: no divergence in the first layers, then the first tokens shrink together."""
    edited = _edited(result)["layer"]
    layers = {layer: row for layer, row in _layers(result).items() if layer <= edited}
    if len(layers) < LEAST:
        raise NotJudgedError(
            f"{result.script} has {len(layers)} layers up to the edited one; {LEAST} are needed."
        )
    apart = {layer: row["parted"] and row["ratio"] <= 1 / TWOFOLD for layer, row in layers.items()}
    start = next(
        (layer for layer in layers if all(apart[at] for at in layers if at >= layer)), None
    )
    if start is None:
        reason = f"At no layer up to {edited} do the first tokens become and stay concentrated."
        return verdict(grade(False, False), reason)
    below = {layer: row["ratio"] for layer, row in layers.items() if layer < start}
    diverging = [at for at, ratio in below.items() if not 1 / TWOFOLD <= ratio <= TWOFOLD]
    together = bool(below) and not diverging
    reason = f"From layer {start} on, up to the edited layer {edited}, D(F) is below D(S)/2"
    if below:
        reason += (
            f"; below it D(F)/D(S) goes from {fixed(min(below.values()))} to "
            f"{fixed(max(below.values()))}, and is more than twofold off in {len(diverging)} of "
            f"{len(below)} layers"
        )
    return verdict(grade(together, True), f"{reason}.")


def llama_does_not_shrink(result: ScriptResult) -> Verdict:
    """Appendix A.5: the concentration does not appear on models of the Llama family."""
    model: Mapping[str, Any] = result.provenance.get("model", {})
    if model.get("name") not in LLAMA_FAMILY:
        raise NotJudgedError(
            f"{model.get('name', 'The model')} is not known to be of the Llama family, and the "
            "claim is about no other."
        )
    row = _edited(result)
    alike = not row["parted"] or row["ratio"] > 1 / TWOFOLD
    return verdict(grade(alike, row["ratio"] > 1 / TENFOLD), _describe(row))


def _collapse_only(result: ScriptResult, panel: str) -> Verdict:
    collapse, normal = (_pair(result, panel=panel, cases=cases) for cases in ("collapse", "normal"))
    apart, others = _is_apart(collapse), _is_apart(normal)
    return verdict(
        grade(apart and not others, apart),
        f"Collapse cases: {_measures(collapse)}. Normal cases: {_measures(normal)}.",
    )


def _joins(result: ScriptResult, *, panel: str, joined: str, left: str) -> Verdict:
    """Whether a group lies with one of two others, by the angle between means."""
    pairs: dict[str, dict[str, float]] = {}
    for row in result.chosen(panel=panel):
        pair = str(row.get("pair"))
        other = pair.rpartition(" / ")[2]
        for kind in (joined, left):
            if kind in other:
                pairs[kind] = _pair(result, panel=panel, pair=pair)
                pairs[kind]["gap"] = (
                    1 - result.values("cosine_of_means", least=1, panel=panel, pair=pair)[0]
                )
    if len(pairs) < 2:
        raise NotJudgedError(
            f"{result.script} has no rows with panel = {panel} for both {joined} and {left} cases."
        )
    near, far = pairs[joined], pairs[left]
    closer = near["gap"] <= far["gap"] / TWOFOLD
    parted = far["silhouette"] >= SILHOUETTE and far["silhouette"] > near["silhouette"]
    return verdict(
        grade(closer and parted, near["gap"] < far["gap"]),
        f"1 - cosine of the means is {fixed(near['gap'])} to k^u of {joined} cases (silhouette "
        f"{near['silhouette']:.2f}) and {fixed(far['gap'])} to that of {left} cases (silhouette "
        f"{far['silhouette']:.2f}), {near['n']:.0f} vectors each.",
    )


def _pair(result: ScriptResult, **match: str) -> dict[str, float]:
    """The one row of a pair of groups."""
    columns = ("silhouette", "probe_accuracy", "n")
    found = {column: result.values(column, least=1, **match)[0] for column in columns}
    if found["n"] < LEAST:
        raise NotJudgedError(
            f"{result.script} has {found['n']:g} vectors in a group; {LEAST} are needed."
        )
    return found


def _is_apart(row: Mapping[str, Any]) -> bool:
    return row["probe_accuracy"] >= PROBE and row["silhouette"] >= SILHOUETTE


def _measures(row: Mapping[str, Any]) -> str:
    side = "apart" if _is_apart(row) else "not apart"
    return (
        f"{side} (probe accuracy {row['probe_accuracy']:.2f}, silhouette {row['silhouette']:.2f}, "
        f"{row['n']:.0f} vectors of each)"
    )


def _layers(result: ScriptResult, **match: str) -> dict[int, dict[str, Any]]:
    """Layers in order, with D(F)/D(S) and whether the bootstrap intervals lie apart."""
    numbers = ["layer", "d_first", "d_subsequent", "d_first_high", "d_subsequent_low"]
    if match:
        numbers += ["silhouette", "probe_accuracy"]
    columns = {name: result.values(name, least=1, **match) for name in numbers}
    layers: dict[int, dict[str, Any]] = {}
    for index, layer in enumerate(columns["layer"]):
        row: dict[str, Any] = {name: values[index] for name, values in columns.items()}
        if row["d_subsequent"] <= 0:
            raise NotJudgedError(f"D(S) is zero at layer {layer:g}, so no ratio can be formed.")
        row["layer"] = int(layer)
        row["ratio"] = row["d_first"] / row["d_subsequent"]
        row["parted"] = row["d_first_high"] < row["d_subsequent_low"]
        layers[int(layer)] = row
    return dict(sorted(layers.items()))


def _edited(result: ScriptResult) -> dict[str, Any]:
    layer = int(result.number("edited_layer"))
    layers = _layers(result)
    if layer not in layers:
        raise NotJudgedError(f"{result.script} has no row of the edited layer {layer}.")
    distinct = min(result.values("distinct_first", least=1))
    if distinct < LEAST:
        raise NotJudgedError(
            f"The first tokens are {distinct:g} different ones, so that D(F) is small by "
            f"construction; {LEAST} are needed."
        )
    return layers[layer]


def _describe(row: Mapping[str, Any]) -> str:
    side = "disjoint" if row["parted"] else "overlapping"
    return (
        f"At the edited layer {row['layer']} D(F) is {fixed(row['d_first'])} and D(S) "
        f"{fixed(row['d_subsequent'])}, a ratio of {fixed(row['ratio'])}, with {side} 95 % "
        "bootstrap intervals."
    )


_JOINS = (
    "1 - cosine of the means to k^u of {joined} cases is at most half of that to k^u of {left} "
    f"cases, and the silhouette against the latter is at least {SILHOUETTE} and the larger one. "
    "Partly: the former is smaller. No probe is asked: some normal cases have their subject in the "
    "first place, where both groups are the same tokens."
)
KEY_CLAIMS = (
    Claim(
        id="figure2-denominator",
        script=KEYS,
        place="Figures 2a, 4a and 5a",
        sentence="The two elements of the denominator, C^-1 k_bar and k^u, lie apart in collapse "
        "cases and not in normal ones.",
        rule=f"Collapse cases: {_APART}, measured on the vectors and not on the picture. Normal "
        "cases: not both. Partly: apart in collapse cases, but in normal ones as well.",
        decide=denominator_parts,
        on_collapse=True,
    ),
    Claim(
        id="figure2-keys",
        script=KEYS,
        place="Figures 2b, 4b and 5b",
        sentence="The unprefixed key k^u lies apart from the prefixed k_bar in collapse cases and "
        "not in normal ones.",
        rule=f"Collapse cases: {_APART}, measured on the vectors and not on the picture. Normal "
        "cases: not both. Partly: apart in collapse cases, but in normal ones as well.",
        decide=keys_part,
        on_collapse=True,
    ),
    Claim(
        id="figure3-first-tokens",
        script=FIRST_TOKENS,
        place="Figure 3a",
        sentence="First tokens of normal prompts lie where k^u of collapse cases lies.",
        rule=_JOINS.format(joined="collapse", left="normal"),
        decide=first_tokens_alike,
        on_collapse=True,
    ),
    Claim(
        id="figure3-prefixed",
        script=FIRST_TOKENS,
        place="Figure 3b",
        sentence="Behind a prefix, k^u of collapse cases lies where that of normal cases lies.",
        rule=_JOINS.format(joined="normal", left="collapse"),
        decide=prefix_moves,
        on_collapse=True,
    ),
    Claim(
        id="figure6-encoder",
        script=ENCODER,
        place="Figure 6",
        sentence="In a bidirectional encoder, whose first token sees the others, first tokens do "
        "not differ from subsequent ones.",
        rule=f"In every encoder layer D(F)/D(S) lies between 1/{TWOFOLD:g} and {TWOFOLD:g} and "
        f"the two groups are not apart ({_APART}), while in the decoder D(F)/D(S) falls below "
        f"1/{TWOFOLD:g} somewhere. First tokens stand in the very first place, as in T5, and also "
        "behind the encoder's special token, where it has one. Partly: in at least half of the "
        "layers, in one of the two.",
        decide=encoder_has_none,
    ),
    Claim(
        id="own-encoder-place",
        script=ENCODER,
        place="beside Figure 6",
        sentence="What concentrates the first token of an encoder with learned positions is "
        "position 0, which has always held the special token, and not that it comes first.",
        rule=f"With all position ids one higher, so that no token stands at position 0, D(F)/D(S) "
        f"is at least 1/{TWOFOLD:g} in every layer. Partly: its smallest value is at least "
        f"{TENFOLD:g} times the one without the shift. Not judged where first tokens are not "
        "concentrated in the first place, or where positions are relative.",
        decide=encoder_place,
        own=True,
    ),
    Claim(
        id="equation4",
        script=CONCENTRATION,
        place="Equation 4",
        sentence="At the edited layer first tokens are markedly more concentrated than subsequent "
        "ones.",
        rule=f"D(F) is below D(S) with disjoint 95 % bootstrap intervals, at least "
        f"{TENFOLD:g}-fold (24-fold in the paper). Partly: by less.",
        decide=equation4,
    ),
    Claim(
        id="figure8-shrinks",
        script=CONCENTRATION,
        place="Figure 8",
        sentence="On GPT-2-XL and GPT-J, D(F) and D(S) go together in the lowest layers; then "
        "the first tokens shrink together.",
        rule="There is a layer from which on, up to the edited one, D(F) is at most half of D(S) "
        f"with disjoint 95 % bootstrap intervals, and in every layer below it, of which there is "
        f"at least one, D(F)/D(S) lies between 1/{TWOFOLD:g} and {TWOFOLD:g}. Partly: only the "
        "former. Models of other kinds are held to the same rule.",
        decide=shrinks,
    ),
    Claim(
        id="figure8-llama",
        script=CONCENTRATION,
        place="Appendix A.5",
        sentence="This concentration does not appear on Llama2-7b, Mistral-7b and Llama3-8b.",
        rule=f"Judged on models of the Llama architecture only: at the edited layer D(F) is above "
        f"half of D(S), or the 95 % bootstrap intervals overlap. Partly: D(F) is lower, but by "
        f"less than {TENFOLD:g}-fold. The paper does not say whether its BOS token was in front; "
        "with it, every prompt has the same first token and D(F) is 0 by construction.",
        decide=llama_does_not_shrink,
    ),
)
