"""``firsttok sequence``: edit after edit into a run folder."""

import argparse
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from firsttok.console import print_table, progress_bar, show
from firsttok.editing import find_methods
from firsttok.errors import BadInputError
from firsttok.inputs import fact_file, open_study_of
from firsttok.options import folder_name
from firsttok.sequences import (
    EditSequence,
    Guard,
    SequencePlan,
    SequenceRun,
    order_facts,
    run_sequences,
)
from firsttok.sweep.runner import Share

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run the sequences of a folder, and tell what became of them.

    Raises:
        FirsttokError: If an input is unusable.
    """
    folder = Path(args.run)
    methods = find_methods(args.method)
    plan = SequencePlan(
        metrics=tuple(args.metrics),
        retained=tuple(args.retained),
        every=args.every,
        guard=Guard(args.guard),
        jump=args.jump,
        seed=args.seed,
    )
    share = Share.parse(args.shard)
    facts = fact_file(args)
    own = folder / "models" / folder_name(args.model)
    with progress_bar() as progress:
        study, usable = open_study_of(args, facts, own, progress)
        study.keep_original_perplexity()
        study.warn_if_collapsed()
        orders = {
            order: order_facts(study, tuple(usable), order) for order in dict.fromkeys(args.order)
        }
        sequences = [
            EditSequence(
                name=f"{method.name}-{order.replace(':', '')}", facts=ordered, editor=method
            )
            for (order, ordered), method in product(orders.items(), methods)
        ]
        chosen = sequences[share.number - 1 :: share.of]
        if not chosen:
            raise BadInputError(
                f"--shard is {args.shard}, and there are {len(sequences)} sequences; give fewer "
                "shares"
            )
        found = run_sequences(folder, study, chosen, plan=plan, progress=progress)
    _tell(folder, found)


def _tell(folder: Path, found: Mapping[str, SequenceRun]) -> None:
    lines: list[list[object]] = []
    for name, each in found.items():
        crossing, disabling = each.first_crossing, each.disabling_edit
        last = each.steps[-1]
        lines.append(
            [
                name,
                f"{len(each.written)} of {len(each.steps)}",
                None if disabling is None else disabling.step,
                None if crossing is None else crossing.step,
                last.get("perplexity"),
                each.mean("score"),
                each.mean("score", step=last.step),
                last.get("drift_norm"),
                last.get("condition_number"),
            ]
        )
    columns = ("sequence", "written", "disabling edit", "above 1000 from", "perplexity at the end")
    more = ("Score right after", "Score retained", "drift", "condition number")
    print_table(f"{folder.name}: edit after edit", (*columns, *more), lines)
    for name, each in found.items():
        row = each.disabling_edit
        if row is not None:
            denominator = (
                "" if row.get("denominator") is None else f", denominator {row.denominator:.3g}"
            )
            show(
                f"{name}: step {row.step} disables the model: {row.prompt} {row.target_new} "
                f"(perplexity {row.perplexity:.4g}, |delta| {row.delta_norm:.3g}{denominator})"
            )
