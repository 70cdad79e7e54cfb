"""Figure 6: first tokens of an encoder, which see the tokens after them, and of a decoder.

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
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok import probes
from firsttok.errors import BadInputError
from firsttok.keys import keys_at
from firsttok.models import BosPolicy, Model, load
from firsttok.paper.cases import CaseSelection, all_listed_cases
from firsttok.paper.claims import (
    APART,
    Claim,
    GapError,
    Result,
    Verdict,
    fixed,
    grade,
    is_apart,
    layers_of,
    require,
)
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import caption, figure, layer_curve, legend_below
from firsttok.paper.tables import Found
from firsttok.probes import Projection
from firsttok.prompts import fact_prompt

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
COLUMNS = {
    "layer": "layer",
    "n": "n",
    "d_first": "D(F)",
    "d_subsequent": "D(S)",
    "silhouette": "silhouette",
    "cosine_of_means": "cos of means",
    "probe_accuracy": "probe",
    "probe_chance": "chance",
}
TWOFOLD, TENFOLD, HALF = 2.0, 10.0, 0.5


def views(model: Model) -> Iterator[tuple[str, Model]]:
    """The model without BOS and, if it knows one, with it."""
    yield "without", model.with_bos(BosPolicy.WITHOUT)
    tokenizer: Any = model.tokenizer
    if tokenizer.bos_token_id is not None or tokenizer.cls_token_id is not None:
        yield "with", model.with_bos(BosPolicy.WITH)
    if not model.can_be_edited and model.leading_ids and model.position_embedding == "learned":
        # Position 0 has always held the BOS in training: is it the place or its embedding?
        shifted = model.with_bos(BosPolicy.WITHOUT).intervened(probes.PositionShift(by=1))
        yield SHIFTED, shifted


def named(bos: str) -> str:
    """A view as titles name it."""
    return "without BOS, positions from 1" if bos == SHIFTED else f"{bos} BOS"


def read(model: Model, cases: CaseSelection, seed: int) -> dict[str, torch.Tensor]:
    """Keys ``[layer, token, d_mlp]`` of first tokens, subsequent tokens and BOS."""
    place = len(model.leading_ids)
    prompts = [fact_prompt(model, fact) for fact in cases.collapse]
    normal = [fact_prompt(model, fact) for fact in cases.normal]
    later = [
        (prompt, at) for prompt in normal for at in probes.later_positions(model, prompt, place)
    ]
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


def compare(keys: dict[str, torch.Tensor], layer: int, seed: int) -> dict[str, Any]:
    first, later = keys[FIRST][layer], keys[LATER][layer]
    row: dict[str, Any] = {
        **asdict(probes.separation(probes.normalise(first), probes.normalise(later), seed=seed)),
        "distance_of_means": float((first.mean(0) - later.mean(0)).norm()),
        **probes.spread(first, seed=seed).columns("d_first"),
        **probes.spread(later, seed=seed).columns("d_subsequent"),
    }
    empty: dict[str, float | None] = dict.fromkeys(("d_bos", "d_bos_low", "d_bos_high"))
    bos = probes.spread(keys["BOS"][layer], seed=seed).columns("d_bos") if "BOS" in keys else empty
    return row | bos


def pictured(layers: int) -> list[int]:
    """Layers spread evenly from the lowest to the highest."""
    return sorted({round(i * (layers - 1) / (PICTURES - 1)) for i in range(PICTURES)})


def add_options(parser: argparse.ArgumentParser) -> None:
    text = "an encoder, or an encoder-decoder (t5-3b), whose encoder is read (default: %(default)s)"
    parser.add_argument("--encoder", default="minilm-l6-v2", help=text)


def measure(options: ScriptOptions, progress: Progress) -> Found:
    args = options.args
    encoder = load(args.encoder, dtype=args.dtype, device=args.device)
    if encoder.can_be_edited:
        raise BadInputError(f"{args.encoder} is a decoder; give an encoder to --encoder")
    cases = all_listed_cases(options)
    models = {"encoder": encoder, "decoder": options.study.model}
    rows, panels, captions = collect(models, cases, options.seed, progress)
    notes: list[str] = []
    for kind, bos in dict.fromkeys((row["kind"], row["bos"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["bos"]) == (kind, bos)]
        least = min(own, key=lambda row: row["d_first"] / row["d_subsequent"])
        ratio = least["d_first"] / least["d_subsequent"]
        notes.append(
            f"{kind}, {named(bos)}: D(F) / D(S) is smallest at layer {least['layer']}, {ratio:.3g}."
        )
    return Found(
        title=f"Figure 6. First tokens of {encoder.label} and of {options.study.model.label}",
        columns=["", *COLUMNS.values()],
        lines=[
            [f"{row['kind']}, {named(row['bos'])}", *(row[column] for column in COLUMNS)]
            for row in rows
            if row["layer"] in pictured(models[row["kind"]].n_layers)
        ],
        rows=rows,
        provenance={
            "encoder": {"name": encoder.label, "source": encoder.source},
            "encoder_fingerprint": encoder.fingerprint,
            "scale": "norm 1",
            "case_ids": {"collapse": [fact.case_id for fact in cases.collapse]},
        },
        notes=[
            *notes,
            "The paper prints no numbers here; its pictures of T5-3B's encoder show one cloud.",
        ],
        draw=partial(plot, rows, panels, captions),
        points=panels,
    )


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
                rows.append(head | compare(keys, layer, seed))
                wanted = bos in SHOWN[kind] or view.leading_ids == model.leading_ids
                if wanted and layer in pictured(model.n_layers):
                    groups = {name: probes.normalise(keys[name][layer]) for name in (LATER, FIRST)}
                    title = f"{kind} {model.label}, {named(bos)}, layer {layer}"
                    panels[title] = probes.project(groups)
                    captions[title] = caption(rows[-1], join=",\n")
                progress.advance(task)
    return rows, panels, captions


def plot(
    rows: list[dict[str, Any]], panels: dict[str, Projection], captions: dict[str, str]
) -> Figure:
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
            probes.scatter(axis, projection, STYLES)
            axis.set_title(name.partition(" ")[2].replace(", layer", ",\nlayer"), fontsize=9)
            axis.set_xlabel(captions[name], fontsize=8)
        shown = [row for row in rows if titled(row) == view]
        for column, label, group in (("d_first", "D(F)", FIRST), ("d_subsequent", "D(S)", LATER)):
            layer_curve(line[-1], shown, column, label=label, color=COLOURS[group])
        line[-1].set_yscale("log")
        line[-1].set_title("D of Equation 4", fontsize=9)
        legend_below(line[0], 0.2, ncols=2, columnspacing=0.8, handletextpad=0.2)
        legend_below(line[-1], 0.2, ncols=2, columnspacing=0.8)
    return drawn


def titled(row: dict[str, Any]) -> str:
    """The view a row is about, as the titles of its pictures begin."""
    return f"{row['kind']} {row['model']}, {named(row['bos'])}"


def encoder_has_none(result: Result) -> Verdict:
    views = {"without": layers_of(result, kind="encoder", bos="without")}
    if result.chosen(kind="encoder", bos="with"):
        views["with"] = layers_of(result, kind="encoder", bos="with")
    require(min(map(len, views.values())), f"{result.script} has too few layers of the encoder")
    shares: list[float] = []
    notes: list[str] = []
    for bos, layers in views.items():
        rows = list(layers.values())
        alike = [1 / TWOFOLD <= row["ratio"] <= TWOFOLD and not is_apart(row) for row in rows]
        ratios = [row["ratio"] for row in rows]
        shares.append(sum(alike) / len(alike))
        notes.append(
            f"{sum(alike)} of {len(alike)} {bos} a special token in front (D(F)/D(S) from "
            f"{fixed(min(ratios))} to {fixed(max(ratios))}, silhouette at most "
            f"{max(row['silhouette'] for row in rows):.2f})"
        )
    lowest = min(row["ratio"] for row in layers_of(result, kind="decoder", bos="without").values())
    contrast = lowest < 1 / TWOFOLD
    return grade(
        min(shares) == 1 and contrast,
        max(shares) >= HALF,
        f"Encoder layers in which first and subsequent tokens are alike: {', '.join(notes)}. In "
        f"the decoder D(F)/D(S) falls to {fixed(lowest)}.",
    )


def encoder_place(result: Result) -> Verdict:
    ratios: dict[str, list[float]] = {}
    for bos in ("without", SHIFTED):
        layers = layers_of(result, kind="encoder", bos=bos)
        require(len(layers), f"{result.script} has {len(layers)} layers of the encoder {bos} BOS")
        ratios[bos] = [row["ratio"] for row in layers.values()]
    before, after = min(ratios["without"]), min(ratios[SHIFTED])
    if before >= 1 / TWOFOLD:
        raise GapError(
            "Without a special token the encoder's first tokens are not concentrated, so there is "
            "nothing to explain."
        )
    return grade(
        after >= 1 / TWOFOLD,
        after >= TENFOLD * before,
        f"Without a special token in front D(F)/D(S) falls to {fixed(before)}; with all position "
        f"ids one higher, and nothing else changed, it is at least {fixed(after)}.",
    )


CLAIMS = (
    Claim(
        id="figure6-encoder",
        place="Figure 6",
        sentence="In a bidirectional encoder, whose first token sees the others, first tokens do "
        "not differ from subsequent ones.",
        rule=f"In every encoder layer D(F)/D(S) lies between 1/{TWOFOLD:g} and {TWOFOLD:g} and "
        f"the two groups are not apart ({APART}), while in the decoder D(F)/D(S) falls below "
        f"1/{TWOFOLD:g} somewhere. First tokens stand in the very first place, as in T5, and also "
        "behind the encoder's special token, where it has one. Partly: in at least half of the "
        "layers, in one of the two.",
        decide=encoder_has_none,
    ),
    Claim(
        id="own-encoder-place",
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
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, add_options=add_options))
