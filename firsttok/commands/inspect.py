"""``firsttok inspect``: look at a model, and propose how to edit it."""

import argparse
from dataclasses import replace
from math import sqrt
from pathlib import Path

from firsttok.console import progress_bar, show, show_json
from firsttok.inputs import fact_file, open_study
from firsttok.inspection import FirstTokens, Inspection, inspect_model, named_checks
from firsttok.inspection.forecast import DOZEN, choose_facts
from firsttok.models import BosPolicy
from firsttok.options import folder_name, model_label
from firsttok.paper.figures import PALETTE, figure, save_figure
from firsttok.storage import atomic_path, cache_folder, write_json

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Inspect the model, print what was found, and leave it in a folder if asked to."""
    args.model = args.name or args.model
    facts = tuple(fact_file(args)) if args.facts or args.limit is not None else None
    if facts is None and (args.join or args.straddle):
        usual = [fact for group in choose_facts() for fact in group[: DOZEN // 2]]
        facts = tuple(
            replace(fact, join=args.join or fact.join, straddle=args.straddle or fact.straddle)
            for fact in usual
        )
    given = None if args.text_bos is None else BosPolicy(args.text_bos)
    args.text_bos = args.text_bos or BosPolicy.WITHOUT.value
    label, folder = model_label(args.model), folder_name(args.model)
    with progress_bar() as progress:
        with named_checks(label):
            study = open_study(
                args,
                cache_folder("inspect", folder),
                progress,
                contexts_folder=Path("figures") / folder,
            )
        found = inspect_model(
            study,
            facts=facts,
            edit=args.edit,
            text_bos=given,
            second_moment=args.second_moment,
            progress=progress,
        )
    if args.out:
        _save(Path(args.out) / folder, found)
    if args.json:
        show_json(found.as_dict())
        return
    show(found.panel().text)
    if args.out:
        show(f"\n{args.out}: {folder}.json, {folder}.toml and a figure")


def _save(stem: Path, found: Inspection) -> None:
    # The name of a model may hold dots, so that a suffix cannot be put in place of one.
    write_json(stem.with_name(f"{stem.name}.json"), found.as_dict())
    with atomic_path(stem.with_name(f"{stem.name}.toml")) as temporary:
        temporary.write_text(found.proposal.toml, encoding="utf-8")
    view = found.first_tokens[0]
    if view.layers:
        _draw(stem, view, found.study.layer)


def _draw(stem: Path, view: FirstTokens, layer: int) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn, axes = figure(2, height=3.2)
    numbers = [row.layer for row in view.layers]
    titles = ("D of Equation 4, keys", "norm of the residual stream")
    for axis, column, title in zip(axes, ("d", "residual"), titles, strict=True):
        for group, colour in (("first", PALETTE["collapse"]), ("subsequent", PALETTE["normal"])):
            values = [getattr(row, f"{column}_{group}") for row in view.layers]
            label = f"{group} tokens"
            axis.plot(numbers, values, color=colour, marker="o", markersize=3, label=label)
        for number in view.anomalous:
            shade = (number - 0.5, number + 0.5)
            axis.axvspan(*shade, color=PALETTE["collapse"], alpha=0.08, linewidth=0)
        axis.axvline(layer, color="black", linewidth=1, linestyle=":")
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        if high < 10 * low:
            # Less than a decade would make much of small differences.
            middle = sqrt(low * high)
            axis.set_ylim(middle / sqrt(10), middle * sqrt(10))
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axis.set_xlabel("layer")
        axis.set_title(title)
    axes[1].legend(fontsize=8)
    save_figure(stem, drawn)
