"""``firsttok circuit``: who makes the first token special in a model."""

import argparse
from pathlib import Path

from firsttok.circuits import Circuit, circuit
from firsttok.console import progress_bar, show, show_json
from firsttok.escapes import as_html
from firsttok.inputs import texts_from
from firsttok.models import BosPolicy, load
from firsttok.options import folder_name
from firsttok.paper.figures import PALETTE, figure, save_figure
from firsttok.storage import atomic_path, write_json

__all__ = ["run"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ccc }}
svg {{ display: block; max-width: 100%; margin: 1rem 0 }}
</style></head><body>{body}</body></html>
"""


def run(args: argparse.Namespace) -> None:
    """Find the circuit, print it, and leave JSON, page and figure in a folder if asked to."""
    texts = texts_from(args)
    with progress_bar() as progress:
        model = load(args.model, bos=BosPolicy(args.bos), dtype=args.dtype, device=args.device)
        found = circuit(model, texts=texts, seed=args.seed, progress=progress)
    if args.out:
        _save(Path(args.out) / folder_name(args.model), found)
    if args.json:
        show_json(found.as_dict())
        return
    show(found.panel().text)


def _save(folder: Path, found: Circuit) -> None:
    write_json(folder / "circuit.json", found.as_dict())
    panel = found.panel()
    with atomic_path(folder / "circuit.html") as temporary:
        page = _PAGE.format(title=as_html(panel.title), body=panel.html)
        temporary.write_text(page, encoding="utf-8")
    _draw(folder / "circuit", found)


def _draw(stem: Path, found: Circuit) -> None:
    drawn, axes = figure(3, height=3.4)
    layers = [row.layer for row in found.layers]
    axes[0].plot(layers, [row.first for row in found.layers], color=PALETTE["collapse"])
    axes[0].plot(layers, [row.others for row in found.layers], color=PALETTE["normal"])
    axes[0].set_title("norm of the residual stream")
    axes[0].set_yscale("log")
    for each in found.acts:
        if each.act.writer is not None:
            axes[0].axvline(each.act.writer, color="black", linewidth=1, linestyle=":")
    axes[0].legend(["first token", "later, median", "writer"], fontsize=8)
    for each in found.acts:
        for chosen, style in (("top", "-"), ("random", "--")):
            curve = [
                (len(k.neurons), k.perplexity)
                for k in each.knock_outs
                if (k.chosen, k.at, k.value) == (chosen, "first", "zero")
            ]
            label = f"layer {each.act.writer}, {chosen}"
            axes[1].plot(*zip(*curve, strict=True) if curve else ((), ()), style, label=label)
    axes[1].axhline(found.perplexity, color="black", linewidth=1, linestyle=":")
    axes[1].set_yscale("log")
    axes[1].set_xlabel("neurons silent at the first token")
    axes[1].set_title("perplexity, not edited")
    if found.acts:
        axes[1].legend(fontsize=8)
    known = [row for row in found.edits if row.first is not None and row.others is not None]
    for column, colour in (("first", PALETTE["collapse"]), ("others", PALETTE["normal"])):
        ratios = [getattr(row, column) for row in known]
        axes[2].plot([row.layer for row in known], ratios, color=colour)
    axes[2].set_yscale("log")
    axes[2].set_title("ROME's denominator over C-ROME's")
    axes[2].legend(["subject first", "subject later"], fontsize=8)
    for axis in (axes[0], axes[2]):
        axis.set_xlabel("layer")
    save_figure(stem, drawn)
