"""Figure 8 and Equation 4: how concentrated first tokens are, layer by layer.

The paper's claim: on GPT-2-XL and GPT-J, D(F) and D(S) go together in the lowest layers, then first
tokens shrink together while subsequent ones do not; on Llama2-7b, Mistral-7b and Llama3-8b they do
not (Appendix A.5). Here all layers are shown, not only those up to the edited one, with what goes
along: the residual stream's norm, the attention that the first token gets, and the effective rank.
Prompts are those of all listed collapse cases and of at least as many normal ones.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from firsttok.cases import all_listed_cases
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.data import paper_values
from firsttok.output import publish
from firsttok.plots import figure, save_figure
from firsttok.probes import LayerConcentration, concentration, parts_at
from firsttok.prompts import fact_prompt
from firsttok.script_options import parse_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST, LATER = "#c0392b", "#2c6fbb"


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--place",
        type=int,
        help="position of the first token; 0 is BOS where there is one "
        "(default: the first token of the text)",
    )
    with progress_bar() as progress:
        options = parse_script(parser, progress)
        study, place = options.study, options.args.place
        place = len(study.model.leading_ids) if place is None else place
        cases = all_listed_cases(options)
        facts = [*cases.collapse, *cases.normal]
        progress.add_task(f"{len(facts)} prompts, all layers", total=None)
        prompts = [fact_prompt(study.model, fact) for fact in facts]
        layers = concentration(study.model, prompts, place=place, seed=options.seed)
    name, edited = study.model.label, layers[study.layer]
    parted = parts_at(layers)
    printed = [*paper_values("Equation 4"), *paper_values("Text")]
    paper = {(value.row.rpartition("/")[2], value.model): value.value for value in printed}
    models = list(dict.fromkeys(value.model for value in paper_values("Equation 4")))

    def line(label: str, row: LayerConcentration) -> list[object]:
        side = "-"
        if row.d_first_high < row.d_subsequent_low:
            side = "below"
        elif row.d_first_low > row.d_subsequent_high:
            side = "above"
        return [
            label,
            row.d_first,
            f"{row.d_first_low:.3g} to {row.d_first_high:.3g}",
            row.d_subsequent,
            f"{row.d_subsequent_low:.3g} to {row.d_subsequent_high:.3g}",
            side,
            row.residual_first,
            row.residual_subsequent,
            row.attention_to_first,
        ]

    lines = [
        line(f"layer {row.layer}" + (", edited" if row.layer == edited.layer else ""), row)
        for row in layers
    ]
    for model in models:
        cells = [paper.get((label, model)) for label in ("D(F)", "D(S)")]
        lines.append([f"paper, {model}, edited", cells[0], None, cells[1], *[None] * 5])
    columns = ["", "D(F)", "95 %", "D(S)", "95 %", "D(F) is", "norm, first", "norm, subsequent"]
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title=f"Equation 4 at every layer of {name}",
        columns=[*columns, "attention to first"],
        lines=lines,
        rows=[{"model": name, **asdict(layer)} for layer in layers],
        provenance=options.provenance()
        | {"place": place, "edited_layer": edited.layer, "parts_at": parted}
        | {"parted_layers": [row.layer for row in layers if parts_at([row]) is not None]}
        | {"case_ids": [fact.case_id for fact in facts]}
        | {"seconds": round(time.perf_counter() - start, 1)},
    )
    show(
        f"From layer {parted} to the last, D(F) is below D(S) with disjoint intervals."
        if parted is not None
        else "In the last layer D(F) is not below D(S) with disjoint intervals."
    )
    show(
        f"At layer {edited.layer} dimension {edited.massive_dimension} carries "
        f"{edited.massive_share:.2f} of the first tokens' squared norm and "
        f"{edited.massive_share_subsequent:.2f} of the others'; the effective rank of the keys is "
        f"{edited.effective_rank_first:.0f} and {edited.effective_rank_subsequent:.0f}."
    )
    show(f"First tokens: {edited.n_first} ({edited.distinct_first} distinct), position {place}.")
    show(f"Subsequent tokens: {edited.n_subsequent}. The intervals are over tokens.")
    plot(stem, layers, edited.layer)


def plot(stem: Path, layers: Sequence[LayerConcentration], edited: int) -> None:
    drawn, _ = figure(2, height=6.4)
    drawn.clear()
    axes = list(drawn.subplots(2, 2).flat)
    numbers = [row.layer for row in layers]
    pairs = ("d", "residual", "effective_rank")
    titles = ("D of Equation 4, keys", "norm of the residual stream", "effective rank of keys")
    for axis, column, title in zip([axes[0], axes[1], axes[3]], pairs, titles, strict=True):
        for group, colour, marker in (("first", FIRST, "o"), ("subsequent", LATER, "s")):
            curve(axis, layers, f"{column}_{group}", f"{group} tokens", colour, marker)
        axis.set_title(title)
    for group, colour in (("first", FIRST), ("subsequent", LATER)):
        low = [getattr(row, f"d_{group}_low") for row in layers]
        high = [getattr(row, f"d_{group}_high") for row in layers]
        axes[0].fill_between(numbers, low, high, color=colour, alpha=0.25, linewidth=0)
    curve(axes[2], layers, "attention_to_first", "", FIRST, "o")
    axes[2].set_title("attention to the first token")
    axes[2].set_ylim(0, 1)
    for axis in axes:
        axis.axvline(edited, color="black", linewidth=1, linestyle=":", label="edited layer")
        axis.set_xlabel("layer")
    for axis in axes[:2]:
        axis.set_yscale("log")
    axes[1].legend(fontsize=8, loc="best")
    save_figure(stem, drawn)


def curve(
    axis: "Axes",
    layers: Sequence[LayerConcentration],
    column: str,
    label: str,
    colour: str,
    marker: str,
) -> None:
    values = [getattr(row, column) for row in layers]
    numbers = [row.layer for row in layers]
    axis.plot(numbers, values, color=colour, marker=marker, markersize=3.5, label=label)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
