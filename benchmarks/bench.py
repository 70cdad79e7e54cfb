"""Time firsttok against the plain algorithm, and write RESULTS.md and results.json.

Every benchmark runs in a process of its own, and so does every measurement of memory. What is
finished is kept when the rest is interrupted, and ``--only`` replaces only what it runs. A record
of another model or of other amounts is kept beside the usual one.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from children import ChildFailedError, child_main, run_child
from random_models import SIZES
from rendering import render
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from setting import Amounts, Setting

from firsttok.storage import atomic_path, write_json

__all__ = ["main"]

FOLDER = Path(__file__).resolve().parent
USUAL = Setting(amounts=Amounts(), folder=Path())
OPTIONS = ("repeats", "facts", "naive_facts", "steps")
"""Amounts that the command line may change; a record of others has a name of its own."""
_DESCRIPTION = """Time firsttok against the plain algorithm, and write RESULTS.md and results.json.
All of it takes most of an hour on two quiet CPU cores. Exit code 1: a benchmark failed, or the two
sides differ by more than the weights' type allows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 if one failed or disagreed, 130 if interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.child:
        return child_main(args.child)
    if args.quick and args.out is None:
        parser.error("--quick measures nothing worth keeping; give it a folder with --out")
    names = _names(parser, args)
    out = Path(args.out or FOLDER)
    failed = False
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="firsttok-bench-") as folder,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        setting = _setting(args, Path(folder))
        whole = progress.add_task("benchmarks", total=len(names))
        for name in names:
            part = progress.add_task(name)
            try:
                record = _measure(name, setting, progress, part)
                key = _key(name, setting, quick=args.quick)
                _keep(out, key, record | {"command": _command(args)})
                for failure in record["extras"]["failures"]:
                    progress.console.print(f"{name}: {failure}", markup=False, highlight=False)
                    failed = True
            except ChildFailedError as error:
                progress.console.print(f"{name} failed:\n{error}", markup=False, highlight=False)
                failed = True
            except KeyboardInterrupt:
                progress.console.print("interrupted; what was finished is kept")
                return 130
            progress.remove_task(part)
            progress.advance(whole)
    return int(failed)


def _names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The benchmarks to run; one that cannot follow a given option is not among them."""
    names: list[str] = args.only or [n for n, case in CASES.items() if not case.only_if_asked]
    given = {key for key, value in vars(args).items() if value != parser.get_default(key)}
    deaf = [name for name in names if CASES[name].deaf_to in given]
    if args.only and deaf:
        parser.error(
            f"{deaf[0]} does not go with --{CASES[deaf[0]].deaf_to}; leave one of them out"
        )
    return [name for name in names if name not in deaf]


def _measure(name: str, setting: Setting, progress: Progress, part: TaskID) -> dict[str, Any]:
    def report(done: int, total: int, what: str) -> None:
        progress.update(part, completed=done, total=total, description=f"{name}: {what}")

    record = run_child(name, setting, report)
    memory: dict[str, Any] = {}
    for side in CASES[name].memory[: setting.amounts.memory_sides]:
        report(0, 1, f"memory of {side}")
        memory[side] = run_child(name, setting, report, side=side)
    return record | {"title": CASES[name].title, "memory": memory}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=_DESCRIPTION)
    usual = Amounts()
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=list(CASES), help=f"of: {', '.join(CASES)}"
    )
    parser.add_argument("--repeats", type=_count, help=f"of every side (default: {usual.repeats})")
    parser.add_argument("--facts", type=_count, help=f"of the fast side (default: {usual.facts})")
    parser.add_argument(
        "--naive-facts", type=_count, help=f"of the naive side (default: {usual.naive_facts})"
    )
    parser.add_argument("--steps", type=_count, help="most losses of a fact (default: the model's)")
    parser.add_argument("--device", default=USUAL.device, help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default=USUAL.dtype, help=f"of weights (default: {USUAL.dtype})")
    parser.add_argument("--model", default=USUAL.name, help="name, hub id or folder")
    parser.add_argument("--size", choices=list(SIZES), help="a randomly initialised model instead")
    parser.add_argument("--quick", action="store_true", help="only see that all runs; needs --out")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the results (default: this script's)"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _setting(args: argparse.Namespace, folder: Path) -> Setting:
    amounts = Amounts.quick() if args.quick else Amounts()
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    amounts = replace(amounts, **given)
    return Setting(
        amounts=replace(amounts, naive_facts=min(amounts.naive_facts, amounts.facts)),
        folder=folder,
        name=args.model,
        size=args.size,
        device=args.device,
        dtype=args.dtype,
    )


def _command(args: argparse.Namespace) -> str:
    """The command that measured this, without folders."""
    words = ["python", "benchmarks/bench.py"]
    for name, value in vars(args).items():
        usual = _parser().get_default(name)
        if value == usual or name in ("child", "out"):
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list):
            words += value
        elif value is not True:
            words.append(Path(value).name if name == "model" else str(value))
    return shlex.join(words)


def _key(name: str, setting: Setting, *, quick: bool) -> str:
    """Where a record is kept: the usual one by name, any other beside it."""
    other = [
        str(found)
        for found, usual in (
            (setting.label, USUAL.label),
            (torch.device(setting.device).type, USUAL.device),
            (setting.dtype, USUAL.dtype),
        )
        if found != usual
    ]
    base = Amounts.quick() if quick else Amounts()
    other += ["quick"] if quick else []
    other += [
        f"{option.replace('_', '-')} {getattr(setting.amounts, option)}"
        for option in OPTIONS
        if getattr(setting.amounts, option) != getattr(base, option)
    ]
    return f"{name}: {', '.join(other)}" if other else name


def _keep(out: Path, key: str, record: dict[str, Any]) -> None:
    path = out / "results.json"
    known: dict[str, Any] = {}
    if path.is_file():
        known = json.loads(path.read_text("utf-8"))["benchmarks"]
    known[key] = record
    order = list(CASES)
    results = {
        name: known[name]
        for name in sorted(known, key=lambda name: (order.index(name.split(":")[0]), name))
    }
    write_json(path, {"benchmarks": results})
    with atomic_path(out / "RESULTS.md") as temporary:
        temporary.write_text(render(results), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
