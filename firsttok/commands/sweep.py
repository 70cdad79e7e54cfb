"""``firsttok sweep``: facts x methods x models into a run folder, and how far it is."""

import argparse
import gc
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from firsttok.console import print_table, progress_bar, show
from firsttok.data import FactFile
from firsttok.errors import BadInputError
from firsttok.inputs import fact_file, methods_from, open_study
from firsttok.measuring import Plan, hashes_of_open
from firsttok.models.location import check_name
from firsttok.options import folder_name
from firsttok.rows import FAILED, read_table, rows_of, seconds_of, shard_paths
from firsttok.study import Study
from firsttok.sweep.engine import Engine, LocalEngine
from firsttok.sweep.manifest import check_run, join_run, model_entry, read_manifest, run_entry
from firsttok.sweep.runner import Share, model_folder, sweep

__all__ = ["WorkerSize", "check_engine", "run", "worker_size"]


def run(args: argparse.Namespace) -> None:
    """Do what is open in a run, or tell how far it is.

    Raises:
        FirsttokError: If an input is unusable.
    """
    match args.run:
        case ["status", folder]:
            _status(Path(folder))
        case ["status"]:
            raise BadInputError("name the run: firsttok sweep status RUN")
        case [folder]:
            _sweep(args, Path(folder))
        case _:
            raise BadInputError(
                "give one run folder: firsttok sweep RUN, or firsttok sweep status RUN"
            )


def _sweep(args: argparse.Namespace, folder: Path) -> None:
    share = Share.parse(args.shard, limit=args.limit)
    plan = Plan(
        methods=methods_from(args),
        metrics=tuple(args.metrics),
        seed=args.seed,
    )
    check_engine(args)
    if args.layers and len(set(args.layer or ())) > 1:
        raise BadInputError(
            "--layers fixes what is edited, and --layer names several layers; give one of both"
        )
    names: dict[str, str] = {}
    for name in args.model:
        # On some file systems names that differ in case alone are one.
        key = folder_name(name).casefold()
        if key in names:
            raise BadInputError(
                f"--model names {names[key]} and {name}, whose rows would be in one folder; give "
                "each model once, and models of one name in runs of their own"
            )
        names[key] = name
    for name in args.model:
        check_name(name)
    # The limit of a sweep is one on what is done now, not on what the run is about.
    facts = fact_file(argparse.Namespace(**{**vars(args), "limit": None}))
    entry = run_entry(
        facts_hash=facts.content_hash,
        facts=len(facts),
        facts_name=facts.path.name if facts.path else "built-in",
        left_out=facts.left_out,
        plan=plan,
        chunk=args.chunk,
    )
    check_run(folder, entry)
    with progress_bar() as progress:
        for name in args.model:
            for layer in dict.fromkeys(args.layer or [None]):
                _sweep_model(args, name, layer, folder, entry, facts, plan, share, progress)
                gc.collect()
    _status(folder)


def _sweep_model(
    args: argparse.Namespace,
    name: str,
    layer: int | None,
    folder: Path,
    entry: Mapping[str, Any],
    facts: FactFile,
    plan: Plan,
    share: Share,
    progress: Progress,
) -> None:
    chosen = argparse.Namespace(**{**vars(args), "model": name, "layer": layer})
    own = folder / "models" / folder_name(name)
    study = open_study(chosen, own, progress, methods=plan.methods, leave_in=own)
    for other in args.layer or ():
        # Before the hours that the first one takes.
        study.model.site(other)
    # A method that this model does not take would make every row a failed one.
    editors = hashes_of_open(study, plan.methods)
    study.warn_if_collapsed()
    several = len(set(args.layer or ())) > 1
    label = f"{study.model.label}-layer{layer}" if several else study.model.label
    join_run(folder, entry, label, model_entry(study, editors))
    with ExitStack() as stack:
        if args.engine == "ray":
            engine = _ray_engine(stack, chosen, study, plan)
            # The workers load their own; here it would only hold memory one of them may need.
            del study
            gc.collect()
        else:
            engine = LocalEngine(study=study, plan=plan)
        sweep(
            model_folder(folder, label),
            facts,
            engine,
            size=args.chunk,
            share=share,
            retry_failed=args.retry_failed,
            progress=progress,
            label=label,
            total=len(facts),
        )


def check_engine(args: argparse.Namespace) -> None:
    """See that a cluster answers, before the hours in which a model would be prepared.

    Raises:
        BadInputError: If none does, or options of a cluster are given without one.
    """
    if args.engine == "ray":
        from firsttok.sweep.cluster import check_cluster

        check_cluster(args.address)
        return
    for name in ("address", "actors"):
        if getattr(args, name) is not None:
            raise BadInputError(f"--{name} is for --engine ray; leave it out, or add that")


@dataclass(frozen=True, kw_only=True)
class WorkerSize:
    """How many workers there are on a cluster, and where each loads its model."""

    actors: int
    gpus: int
    device: str


def worker_size(args: argparse.Namespace, ray: Any) -> WorkerSize:
    """As many workers as are asked for; otherwise one per GPU, or per share of the CPUs."""
    held: dict[str, Any] = ray.cluster_resources()
    gpus = int(args.device.startswith("cuda"))
    most = held.get("GPU", 0) if gpus else held.get("CPU", 1) // args.cpus_per_actor
    return WorkerSize(
        actors=args.actors or max(1, int(most)), gpus=gpus, device="cuda" if gpus else args.device
    )


def _ray_engine(stack: ExitStack, args: argparse.Namespace, study: Study, plan: Plan) -> Engine:
    from firsttok.sweep.cluster import RayEngine, Recipe, connected

    ray = stack.enter_context(connected(args.address))
    size = worker_size(args, ray)
    return RayEngine(
        ray=ray,
        recipe=Recipe.of(study, source=args.model, device=size.device),
        plan=plan,
        label=study.model.label,
        actors=size.actors,
        cpus=args.cpus_per_actor,
        gpus=size.gpus,
    )


def _status(folder: Path) -> None:
    manifest = read_manifest(folder)
    facts, size = manifest["facts"]["count"], manifest["chunk"]
    methods = len(manifest["methods"])
    lines: list[list[object]] = []
    reasons: Counter[str] = Counter()
    for label in manifest["models"]:
        rows = whole = lost = 0
        seconds = 0.0
        for path in shard_paths(model_folder(folder, label)):
            table = read_table(path)
            first = size * int(path.stem.removeprefix("chunk-"))
            whole += table.num_rows >= methods * min(size, facts - first)
            failed = [row.reason or "" for row in rows_of(table) if row.status == FAILED]
            reasons.update(failed)
            rows, lost = rows + table.num_rows, lost + len(failed)
            seconds += seconds_of(table)
        done = rows // methods if methods else 0
        pace = seconds / done if done else None
        lines.append(
            [
                label,
                f"{done} of {facts}",
                f"{whole} of {-(-facts // size)}",
                lost,
                pace,
                None if pace is None else pace * (facts - done) / 3600,
            ]
        )
    print_table(
        f"{folder.name}: {methods} methods",
        ["model", "facts done", "chunks", "failed rows", "s per fact", "hours to do, one worker"],
        lines,
    )
    for reason, count in reasons.most_common(10):
        show(f"failed, {count} rows: {reason}")
