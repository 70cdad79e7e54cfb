"""``firsttok sequence``: edit after edit into a run folder."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from firsttok.commands.sweep import check_engine, worker_size
from firsttok.console import print_table, progress_bar, show
from firsttok.errors import BadInputError, WorkerError
from firsttok.inputs import fact_file, methods_from, open_study_of
from firsttok.options import folder_name
from firsttok.rows import FAILED
from firsttok.sequences import (
    EditSequence,
    Guard,
    SequencePlan,
    SequenceRun,
    check_order,
    order_facts,
    run_sequences,
)
from firsttok.study import Study
from firsttok.sweep.runner import Share

if TYPE_CHECKING:
    from firsttok.sweep.cluster import Recipe

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run the sequences of a folder, and tell what became of them.

    Raises:
        FirsttokError: If an input is unusable.
    """
    folder = Path(args.run)
    methods = methods_from(args)
    plan = SequencePlan(
        metrics=tuple(args.metrics),
        retained=tuple(args.retained),
        checkpoint=tuple(args.checkpoint),
        every=args.every,
        guard=Guard(args.guard),
        jump=args.jump,
        seed=args.seed,
    )
    share = Share.parse(args.shard)
    orders = dict.fromkeys(args.order)
    for order in orders:
        # Before the minutes in which the model is prepared.
        check_order(order)
    count = len(orders) * len(methods)
    if share.of > count:
        raise BadInputError(
            f"--shard is {args.shard}, and there are {count} sequences; give at most {count} shares"
        )
    check_engine(args)
    facts = fact_file(args)
    own = folder / "models" / folder_name(args.model)
    with progress_bar() as progress:
        study, usable = open_study_of(args, facts, own, progress, methods=methods)
        study.keep_original_perplexity()
        study.warn_if_collapsed()
        ordered = {order: order_facts(study, tuple(usable), order) for order in orders}
        sequences = [
            EditSequence(
                name=f"{method.name}-{order.replace(':', '')}", facts=chosen, editor=method
            )
            for (order, chosen), method in product(ordered.items(), methods)
        ]
        own_share = sequences[share.number - 1 :: share.of]
        if args.engine == "ray":
            found = _on_ray(args, folder, study, own_share, plan)
        else:
            found = run_sequences(
                folder,
                study,
                own_share,
                plan=plan,
                retry_failed=args.retry_failed,
                progress=progress,
            )
    _tell(folder, found)


def _on_ray(
    args: argparse.Namespace,
    folder: Path,
    study: Study,
    sequences: Sequence[EditSequence],
    plan: SequencePlan,
) -> dict[str, SequenceRun]:
    """Give each worker a part of the sequences, which it runs side by side.

    The folder has to be the same on all nodes.
    """
    from firsttok.sweep.cluster import Recipe, connected

    with connected(args.address) as ray:
        size = worker_size(args, ray)
        recipe = ray.put(Recipe.of(study, source=args.model, device=size.device))
        options = {"num_cpus": args.cpus_per_actor, "num_gpus": size.gpus, "max_retries": 0}
        remote = ray.remote(_run_part).options(**options)
        parts = [sequences[number :: size.actors] for number in range(size.actors)]
        waiting = [
            remote.remote(
                recipe, folder.absolute(), part, plan, args.retry_failed, args.cpus_per_actor
            )
            for part in parts
            if part
        ]
        try:
            found = [each for part in ray.get(waiting) for each in part.items()]
        except ray.exceptions.RayError as error:
            last = str(error).strip().rpartition("\n")[2].strip()
            raise WorkerError(
                f"a worker ended before its sequences ({last}); run the same command again to "
                "resume"
            ) from None
    return dict(sorted(found, key=lambda each: [one.name for one in sequences].index(each[0])))


def _run_part(
    recipe: "Recipe",
    folder: Path,
    sequences: Sequence[EditSequence],
    plan: SequencePlan,
    retry_failed: bool,
    threads: int,
) -> dict[str, SequenceRun]:
    """What one worker does."""
    import torch

    torch.set_num_threads(threads)
    return run_sequences(folder, recipe.study(), sequences, plan=plan, retry_failed=retry_failed)


def _tell(folder: Path, found: Mapping[str, SequenceRun]) -> None:
    lines: list[list[object]] = []
    for name, each in found.items():
        crossing, disabling = each.first_crossing, each.disabling_edit
        last = each.written[-1] if each.written else {}
        end = each.steps[-1].step
        lines.append(
            [
                name,
                f"{len(each.written)} of {len(each.steps)}",
                None if disabling is None else disabling.step,
                None if crossing is None else crossing.step,
                last.get("perplexity"),
                each.mean("score"),
                each.mean("score", step=end),
                last.get("drift_norm"),
                each.steps[-1].get("condition_number"),
            ]
        )
    columns = ("sequence", "written", "disabling edit", "above 1000 from", "perplexity at the end")
    more = ("Score right after", "Score retained", "drift", "condition number")
    print_table(f"{folder.name}: edit after edit", (*columns, *more), lines)
    for name, each in found.items():
        gone = len(each.left_out("screened")) + len(each.left_out("rolled back"))
        failed = sum(row.status == FAILED for row in each.steps)
        if gone:
            show(f"{name}: the guard left {gone} facts out")
        if failed:
            show(f"{name}: {failed} facts failed; --retry-failed tries them again")
        if each.verdict is not None:
            show(f"{name}: {each.verdict}")
