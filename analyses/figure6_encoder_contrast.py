"""Figure 6: first tokens of an encoder, which see the tokens behind them, and of a decoder.

The paper's claim: in T5-3B's encoder first tokens lie where subsequent tokens lie, at every layer;
so it is the causal mask that sets them apart (Appendix A.3). The first token of each collapse
prompt is compared with as many subsequent tokens, drawn from the normal prompts. BOS ([CLS]) is
left out and put in; the first token is always the text's first, and BOS has columns of its own.
First tokens of collapse prompts are names and subsequent ones are any words, so that a probe has
more to go by than the place; D has not.
Pictures and separations are of keys scaled to norm 1; D is of the keys as they are.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress

from firsttok.cases import CaseSelection, all_listed_cases
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.errors import BadInputError
from firsttok.keys import keys_at
from firsttok.models import BosPolicy, Model, load
from firsttok.output import publish
from firsttok.plots import figure, save_figure
from firsttok.probes import (
    PositionShift,
    Projection,
    later_positions,
    normalise,
    project,
    save_points,
    scatter,
    separation,
    spread,
)
from firsttok.prompts import fact_prompt
from firsttok.script_options import parse_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST, LATER = "first tokens", "subsequent tokens"
COLOURS = {FIRST: "#c0392b", LATER: "#2c6fbb"}
STYLES: dict[str, dict[str, Any]] = {
    LATER: {"marker": "s", "facecolors": COLOURS[LATER], "edgecolors": "white"},
    FIRST: {"marker": "o", "facecolors": COLOURS[FIRST], "edgecolors": "white"},
}
PICTURES = 4
SHIFTED = "without, positions from 1"
SHOWN = {"encoder": ("without", "with", SHIFTED), "decoder": ("without",)}
"""Views that get a line of pictures, beside the one the tokenizer gives."""


def views(model: Model) -> Iterator[tuple[str, Model]]:
    """The model without BOS and, if it knows one, with it."""
    yield "without", model.with_bos(BosPolicy.WITHOUT)
    tokenizer: Any = model.tokenizer
    if tokenizer.bos_token_id is not None or tokenizer.cls_token_id is not None:
        yield "with", model.with_bos(BosPolicy.WITH)
    if not model.can_be_edited and model.leading_ids and model.position_embedding == "learned":
        # Position 0 has always held the BOS in training: is it the place or its embedding?
        shifted = model.with_bos(BosPolicy.WITHOUT).intervened(PositionShift(by=1))
        yield SHIFTED, shifted


def named(bos: str) -> str:
    """A view as titles name it."""
    return "without BOS, positions from 1" if bos == SHIFTED else f"{bos} BOS"


def read(model: Model, cases: CaseSelection, seed: int) -> dict[str, torch.Tensor]:
    """Keys ``[layer, token, d_mlp]`` of first tokens, subsequent tokens and BOS."""
    place = len(model.leading_ids)
    prompts = [fact_prompt(model, fact) for fact in cases.collapse]
    normal = [fact_prompt(model, fact) for fact in cases.normal]
    later = [(prompt, at) for prompt in normal for at in later_positions(model, prompt, place)]
    count = min(len(prompts), len(later))
    drawn = random.Random(seed).sample(later, count)  # noqa: S311
    layers = range(model.n_layers)
    found = {
        FIRST: keys_at(model, prompts, [place] * len(prompts), layers=layers),
        LATER: keys_at(model, [own for own, _ in drawn], [at for _, at in drawn], layers=layers),
    }
    if place:
        found["BOS"] = keys_at(model, prompts, [0] * len(prompts), layers=layers)
    return {name: keys.values for name, keys in found.items()}


def measure(keys: dict[str, torch.Tensor], layer: int, seed: int) -> dict[str, Any]:
    first, later = keys[FIRST][layer], keys[LATER][layer]
    row: dict[str, Any] = {
        **asdict(separation(normalise(first), normalise(later), seed=seed)),
        "distance_of_means": float((first.mean(0) - later.mean(0)).norm()),
        **spread(first, seed=seed).columns("d_first"),
        **spread(later, seed=seed).columns("d_subsequent"),
    }
    empty: dict[str, float | None] = dict.fromkeys(("d_bos", "d_bos_low", "d_bos_high"))
    bos = spread(keys["BOS"][layer], seed=seed).columns("d_bos") if "BOS" in keys else empty
    return row | bos


def pictured(layers: int) -> list[int]:
    """Layers spread evenly from the lowest to the highest."""
    return sorted({round(i * (layers - 1) / (PICTURES - 1)) for i in range(PICTURES)})


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--encoder",
        default="minilm-l6-v2",
        help="an encoder, or an encoder-decoder (t5-3b), whose encoder is read "
        "(default: %(default)s)",
    )
    with progress_bar() as progress:
        options = parse_script(parser, progress)
        args = options.args
        encoder = load(args.encoder, dtype=args.dtype, device=args.device)
        if encoder.can_be_edited:
            raise BadInputError(f"{args.encoder} is a decoder; give an encoder to --encoder")
        cases = all_listed_cases(options)
        models = {"encoder": encoder, "decoder": options.study.model}
        rows, panels, captions = collect(models, cases, options.seed, progress)
    columns = ["layer", "n", "d_first", "d_subsequent", "silhouette", "cosine_of_means"]
    columns += ["probe_accuracy", "probe_chance"]
    lines = [
        [f"{row['kind']}, {named(row['bos'])}", *(row[column] for column in columns)]
        for row in rows
        if row["layer"] in pictured(models[row["kind"]].n_layers)
    ]
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title=f"Figure 6. First tokens of {encoder.label} and of {options.study.model.label}",
        columns=["", "layer", "n", "D(F)", "D(S)", "silhouette", "cos of means", "probe", "chance"],
        lines=lines,
        rows=rows,
        provenance=options.provenance()
        | {"encoder": {"name": encoder.label, "source": encoder.source}}
        | {"encoder_fingerprint": encoder.fingerprint, "scale": "norm 1"}
        | {"case_ids": {"collapse": [fact.case_id for fact in cases.collapse]}}
        | {"seconds": round(time.perf_counter() - start, 1)},
    )
    for kind, bos in dict.fromkeys((row["kind"], row["bos"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["bos"]) == (kind, bos)]
        least = min(own, key=lambda row: row["d_first"] / row["d_subsequent"])
        ratio = least["d_first"] / least["d_subsequent"]
        show(
            f"{kind}, {named(bos)}: D(F) / D(S) is smallest at layer {least['layer']}, {ratio:.3g}."
        )
    show("The paper prints no numbers here; its pictures of T5-3B's encoder show one cloud.")
    plot(stem, rows, panels, captions)


def collect(
    models: dict[str, Model], cases: CaseSelection, seed: int, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Projection], dict[str, str]]:
    """Rows of all views and layers; pictures, with captions, of the views the tokenizers give."""
    rows: list[dict[str, Any]] = []
    panels: dict[str, Projection] = {}
    captions: dict[str, str] = {}
    for kind, model in models.items():
        for bos, view in views(model):
            keys = read(view, cases, seed)
            task = progress.add_task(f"{model.label}, {named(bos)}", total=model.n_layers)
            for layer in range(model.n_layers):
                head = {"model": model.label, "kind": kind, "bos": bos, "layer": layer}
                rows.append(head | measure(keys, layer, seed))
                wanted = bos in SHOWN[kind] or view.leading_ids == model.leading_ids
                if wanted and layer in pictured(model.n_layers):
                    groups = {name: normalise(keys[name][layer]) for name in (LATER, FIRST)}
                    title = f"{kind} {model.label}, {named(bos)}, layer {layer}"
                    panels[title] = project(groups)
                    captions[title] = (
                        "silhouette {silhouette:.2f}, cosine {cosine_of_means:.2f},\n"
                        "probe {probe_accuracy:.2f}"
                    ).format(**rows[-1])
                progress.advance(task)
    return rows, panels, captions


def plot(
    stem: Path,
    rows: list[dict[str, Any]],
    panels: dict[str, Projection],
    captions: dict[str, str],
) -> None:
    pictures: dict[str, dict[str, Projection]] = {}
    for name, panel in panels.items():
        pictures.setdefault(name.rpartition(", layer")[0], {})[name] = panel
    drawn, _ = figure(PICTURES, height=3.4 * len(pictures))
    drawn.clear()
    grid = drawn.subplots(len(pictures), PICTURES + 1, squeeze=False)
    for line, (view, own) in zip(grid, pictures.items(), strict=True):
        for axis in line[len(own) : PICTURES]:
            axis.set_axis_off()
        for axis, (name, projection) in zip(line, own.items(), strict=False):
            scatter(axis, projection, STYLES)
            axis.set_title(name.partition(" ")[2].replace(", layer", ",\nlayer"), fontsize=9)
            axis.set_xlabel(captions[name], fontsize=8)
        shown = [row for row in rows if titled(row) == view]
        curves(line[-1], shown)
        line[-1].set_title("D of Equation 4", fontsize=9)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "fontsize": 8, "ncols": 2}
        line[0].legend(**below, columnspacing=0.8, handletextpad=0.2)
        line[-1].legend(**below, columnspacing=0.8)
    save_figure(stem, drawn)
    save_points(stem.with_name(f"{stem.name}_points.csv"), panels)


def titled(row: dict[str, Any]) -> str:
    """The view a row is about, as the titles of its pictures begin."""
    return f"{row['kind']} {row['model']}, {named(row['bos'])}"


def curves(axis: "Axes", rows: list[dict[str, Any]]) -> None:
    layers = [row["layer"] for row in rows]
    for group, colour in (("first", COLOURS[FIRST]), ("subsequent", COLOURS[LATER])):
        low, high = ([row[f"d_{group}_{end}"] for row in rows] for end in ("low", "high"))
        label = f"D({group[0].upper()})"
        axis.plot(layers, [row[f"d_{group}"] for row in rows], color=colour, label=label)
        axis.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.set_xlabel("layer")


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
