"""Figure 8 and Equation 4: how concentrated first tokens are, layer by layer.

The paper's claim: on GPT-2-XL and GPT-J, D(F) and D(S) go together in the lowest layers, then first
tokens shrink together while subsequent ones do not; on Llama2-7b, Mistral-7b and Llama3-8b they do
not (Appendix A.5). Here all layers are shown, not only those up to the edited one, with what goes
along: the residual stream's norm, the attention that the first token gets, and the effective rank.
Prompts are those of all listed collapse cases and of at least as many normal ones.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.paper.cases import all_listed_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, fixed, grade, layers_of, require
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import figure, layer_curve
from firsttok.paper.tables import Found, printed
from firsttok.probes import LayerConcentration, concentration, parts_at
from firsttok.prompts import fact_prompt

STYLES: dict[str, dict[str, Any]] = {
    "first": {"color": "#c0392b", "marker": "o", "markersize": 3.5},
    "subsequent": {"color": "#2c6fbb", "marker": "s", "markersize": 3.5},
}
COLUMNS = (
    "",
    "D(F)",
    "95 %",
    "D(S)",
    "95 %",
    "D(F) is",
    "norm, first",
    "norm, subsequent",
    "attention to first",
)
TWOFOLD, TENFOLD = 2.0, 10.0
LLAMA_FAMILY = ("llama2-7b", "llama3-8b", "mistral-7b", "smollm2-135m")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--place",
        type=int,
        help="position of the first token; 0 is BOS where there is one "
        "(default: the first token of the text)",
    )


def measure(options: ScriptOptions, progress: Progress) -> Found:
    study, place = options.study, options.args.place
    place = len(study.model.leading_ids) if place is None else place
    cases = all_listed_cases(options)
    facts = [*cases.collapse, *cases.normal]
    progress.add_task(f"{len(facts)} prompts, all layers", total=None)
    prompts = [fact_prompt(study.model, fact) for fact in facts]
    layers = concentration(study.model, prompts, place=place, seed=options.seed)
    name, edited = study.model.label, layers[study.layer]
    rows: list[dict[str, Any]] = [{"model": name, **asdict(layer)} for layer in layers]
    parted = parts_at(layers)
    lines = [
        line_of(f"layer {row.layer}" + (", edited" if row.layer == edited.layer else ""), row)
        for row in layers
    ]
    models, paper = printed("Equation 4")
    paper |= {(row.rpartition("/")[2], model): x for (row, model), x in printed("Text")[1].items()}
    for model in models:
        cells = [paper.get((label, model)) for label in ("D(F)", "D(S)")]
        lines.append([f"paper, {model}, edited", cells[0], None, cells[1], *[None] * 5])
    notes = [
        f"From layer {parted} to the last, D(F) is below D(S) with disjoint intervals."
        if parted is not None
        else "In the last layer D(F) is not below D(S) with disjoint intervals.",
        f"At layer {edited.layer} dimension {edited.massive_dimension} carries "
        f"{edited.massive_share:.2f} of the first tokens' squared norm and "
        f"{edited.massive_share_subsequent:.2f} of the others'; the effective rank of the keys is "
        f"{edited.effective_rank_first:.0f} and {edited.effective_rank_subsequent:.0f}.",
        f"First tokens: {edited.n_first} ({edited.distinct_first} distinct), position {place}.",
        f"Subsequent tokens: {edited.n_subsequent}. The intervals are over tokens.",
    ]
    return Found(
        title=f"Equation 4 at every layer of {name}",
        columns=COLUMNS,
        lines=lines,
        rows=rows,
        provenance={
            "place": place,
            "edited_layer": edited.layer,
            "parts_at": parted,
            "parted_layers": [row.layer for row in layers if parts_at([row]) is not None],
            "case_ids": [fact.case_id for fact in facts],
        },
        notes=notes,
        draw=partial(plot, rows, edited.layer),
    )


def line_of(label: str, row: LayerConcentration) -> list[object]:
    below = row.d_first_high < row.d_subsequent_low
    above = row.d_first_low > row.d_subsequent_high
    first = f"{row.d_first_low:.3g} to {row.d_first_high:.3g}"
    subsequent = f"{row.d_subsequent_low:.3g} to {row.d_subsequent_high:.3g}"
    side = "below" if below else "above" if above else "-"
    rest = [row.residual_first, row.residual_subsequent, row.attention_to_first]
    return [label, row.d_first, first, row.d_subsequent, subsequent, side, *rest]


def plot(rows: list[dict[str, Any]], edited: int) -> Figure:
    drawn, _ = figure(2, height=6.4)
    drawn.clear()
    axes = list(drawn.subplots(2, 2).flat)
    pairs = ("d", "residual", "effective_rank")
    titles = ("D of Equation 4, keys", "norm of the residual stream", "effective rank of keys")
    for axis, column, title in zip([axes[0], axes[1], axes[3]], pairs, titles, strict=True):
        for group, style in STYLES.items():
            layer_curve(axis, rows, f"{column}_{group}", label=f"{group} tokens", **style)
        axis.set_title(title)
    layer_curve(axes[2], rows, "attention_to_first", **STYLES["first"])
    axes[2].set_title("attention to the first token")
    axes[2].set_ylim(0, 1)
    for axis in axes:
        axis.axvline(edited, color="black", linewidth=1, linestyle=":", label="edited layer")
    for axis in axes[:2]:
        axis.set_yscale("log")
    axes[1].legend(fontsize=8, loc="best")
    return drawn


def equation4(result: Result) -> Verdict:
    row = edited_row(result)
    return grade(row["parted"] and row["ratio"] <= 1 / TENFOLD, row["parted"], describe(row))


def shrinks(result: Result) -> Verdict:
    edited = edited_row(result)["layer"]
    layers = {layer: row for layer, row in layers_of(result).items() if layer <= edited}
    require(len(layers), f"{result.script} has {len(layers)} layers up to the edited one")
    apart = {layer: row["parted"] and row["ratio"] <= 1 / TWOFOLD for layer, row in layers.items()}
    start = next(
        (layer for layer in layers if all(apart[at] for at in layers if at >= layer)), None
    )
    if start is None:
        reason = f"At no layer up to {edited} do the first tokens become and stay concentrated."
        return grade(False, False, reason)
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
    return grade(together, True, f"{reason}.")


def llama_does_not_shrink(result: Result) -> Verdict:
    model: Mapping[str, Any] = result.provenance.get("model", {})
    if model.get("name") not in LLAMA_FAMILY:
        raise GapError(
            f"{model.get('name', 'The model')} is not known to be of the Llama family, and the "
            "claim is about no other."
        )
    row = edited_row(result)
    alike = not row["parted"] or row["ratio"] > 1 / TWOFOLD
    return grade(alike, row["ratio"] > 1 / TENFOLD, describe(row))


def edited_row(result: Result) -> dict[str, Any]:
    layer = int(result.number("edited_layer"))
    layers = layers_of(result)
    if layer not in layers:
        raise GapError(f"{result.script} has no row of the edited layer {layer}.")
    distinct = min(result.values("distinct_first", least=1))
    said = (
        f"The first tokens are {distinct:g} different ones, so that D(F) is small by construction"
    )
    require(distinct, said)
    return layers[layer]


def describe(row: Mapping[str, Any]) -> str:
    side = "disjoint" if row["parted"] else "overlapping"
    return (
        f"At the edited layer {row['layer']} D(F) is {fixed(row['d_first'])} and D(S) "
        f"{fixed(row['d_subsequent'])}, a ratio of {fixed(row['ratio'])}, with {side} 95 % "
        "bootstrap intervals."
    )


CLAIMS = (
    Claim(
        id="equation4",
        place="Equation 4",
        sentence="At the edited layer first tokens are markedly more concentrated than subsequent "
        "ones.",
        rule=f"D(F) is below D(S) with disjoint 95 % bootstrap intervals, at least "
        f"{TENFOLD:g}-fold (24-fold in the paper). Partly: by less.",
        decide=equation4,
    ),
    Claim(
        id="figure8-shrinks",
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
        place="Appendix A.5",
        sentence="This concentration does not appear on Llama2-7b, Mistral-7b and Llama3-8b.",
        rule=f"Judged on models of the Llama architecture only: at the edited layer D(F) is above "
        f"half of D(S), or the 95 % bootstrap intervals overlap. Partly: D(F) is lower, but by "
        f"less than {TENFOLD:g}-fold. The paper does not say whether its BOS token was in front; "
        "with it, every prompt has the same first token and D(F) is 0 by construction.",
        decide=llama_does_not_shrink,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, add_options=add_options))
