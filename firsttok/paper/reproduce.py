"""``firsttok reproduce``: every experiment, several side by side, then the report.

Each script runs in a process of its own with its share of the cores. On a CPU two processes of one
thread each get more done than one process of two threads: only the matrix products of a small model
keep two threads busy. No process outlives this one, however it ends: each watches a pipe that its
parent holds open.
"""

import _thread
import argparse
import io
import itertools
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, cast

from firsttok.config import configured
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.errors import BadInputError, WorkerError
from firsttok.options import PASSED_ON, add_script_options, folder_name
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS, in_lanes

__all__ = ["Ended", "Job", "cores", "run", "run_in_lanes"]

BAD_INPUT = 2
"""Exit code of a script that does not apply to the model."""
IMPORTED = (
    "firsttok.paper.cases",
    "firsttok.models.loading",
    "firsttok.paper.figures",
    "firsttok.probes",
    "firsttok.paper.experiment",
    "matplotlib.pyplot",
    "seaborn",
    "transformer_lens.model_bridge",
    "transformers.models.llama.modeling_llama",
)
"""What takes long to import, and every script needs."""
_POLL = 0.1
"""Seconds between two looks at what is running."""
_PATIENCE = 20.0
"""Seconds an interrupted script has to put down what it holds."""
_GRACE = 5.0
"""The same where there is nobody left to wait for it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A script that may have to wait for others."""

    name: str
    """What others wait for it by."""
    script: Path
    """The Python file."""
    arguments: tuple[str, ...] = ()
    """Its command line."""
    after: tuple[str, ...] = ()
    """Jobs that must have ended, in whatever way; a name that is no job is not waited for."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A script that has ended."""

    job: Job
    """The job."""
    code: int
    """Its exit code; negative for a signal."""
    output: str
    """What it wrote to standard output and to standard error."""
    seconds: float
    """How long it ran."""


def run(args: argparse.Namespace) -> None:
    """Run the scripts; one that does not apply is passed over and named at the end.

    Raises:
        BadInputError: If scripts are missing, or some did not apply.
        SystemExit: If a script fails, with its exit code.
        WorkerError: If a script was killed.
    """
    out = Path(args.out or ("figures" if args.profile == "full" else "figures/quick"))
    jobs = _jobs(args, out)
    lanes = _lanes(args)
    refused: list[str] = []
    with closing(_in_turn(jobs) if lanes == 1 else _side_by_side(jobs, lanes)) as ended:
        for name, code in ended:
            if code == BAD_INPUT:
                # The script has said why it does not apply to this model; the others may.
                refused.append(name)
            elif code:
                _stop(name, code)
    if len(refused) == len(jobs):
        raise BadInputError("no script could be run; each said why above")
    # Not before: with it comes torch, which this process would hold while the scripts run.
    from firsttok.paper.pages import write_reports

    for path in write_reports(out, folder_name(args.model)):
        show(f"\nfigures, numbers and verdicts: {path}")
    if refused:
        names = ", ".join(sorted(refused, key=SCRIPTS.index))
        raise BadInputError(f"these scripts did not apply, and said why: {names}")


def _stop(name: str, code: int) -> NoReturn:
    """End as a script did that cannot be passed over."""
    if code < 0:
        raise WorkerError(
            f"{name} was killed by signal {-code}, perhaps because memory ran out; run the same "
            "command again to resume, with --jobs 1"
        )
    raise SystemExit(code)


def _jobs(args: argparse.Namespace, out: Path) -> list[Job]:
    folder = Path(args.analyses)
    if not folder.is_dir():
        raise BadInputError(
            f"no folder {folder} with the analysis scripts; run this in a checkout of firsttok"
        )
    given = [
        [f"--{name}", value]
        for name in ("config", *PASSED_ON)
        if (value := getattr(args, name.replace("-", "_")))
    ]
    options = ["--model", args.model, "--profile", args.profile, "--out", str(out)]
    flags = ["--skip-bad"] if args.skip_bad else []
    arguments = (*options, *flags, *itertools.chain(*given))
    # A value that every script would refuse is refused before the first one starts.
    parser = argparse.ArgumentParser(prog="firsttok reproduce", add_help=False)
    add_script_options(parser)
    configured(parser.parse_args(arguments), parser, arguments)
    jobs = [
        Job(
            name=each.name,
            script=folder / f"{each.name}.py",
            arguments=arguments,
            after=each.after,
        )
        for each in EXPERIMENTS
        if not each.alone
    ]
    for job in jobs:
        if not job.script.is_file():
            raise BadInputError(f"no script {job.script}; the checkout is incomplete")
    return jobs


def _lanes(args: argparse.Namespace) -> int:
    if args.jobs is None:
        # One device is not shared, and more lanes than two would each hold what an edit needs.
        return min(2, cores()) if (args.device or "cpu") == "cpu" else 1
    return int(args.jobs)


def _in_turn(jobs: list[Job]) -> Generator[tuple[str, int], None, None]:
    """One script after another, each with the terminal to itself."""
    for number, job in enumerate(jobs, start=1):
        show(f"\n{job.name} ({number} of {len(jobs)})")
        yield job.name, run_alone(job)


def _side_by_side(jobs: list[Job], lanes: int) -> Generator[tuple[str, int], None, None]:
    """Several scripts at a time; what one says is shown when it has ended."""
    # All of them need it, so it is made before with every core. What is wrong, the scripts say.
    preparing = start_process(_prepare, (jobs[0].arguments,), imported=IMPORTED)
    try:
        preparing.join()
    finally:
        end_process(preparing)
    if preparing.exitcode not in (0, BAD_INPUT):
        _stop("the preparation", preparing.exitcode or 0)
    with progress_bar(estimate_over=3600.0) as progress:
        task = progress.add_task(f"{len(jobs)} scripts, {lanes} at a time", total=len(jobs))
        order = [each.name for each in in_lanes()]
        ordered = sorted(jobs, key=lambda job: order.index(job.name))
        for ended in run_in_lanes(ordered, lanes=lanes, imported=IMPORTED):
            progress.advance(task)
            progress.stop()
            show(f"\n{ended.job.name} ({ended.seconds:.0f} s)\n{ended.output.rstrip()}")
            progress.start()
            yield ended.job.name, ended.code


def _prepare(options: tuple[str, ...]) -> None:
    """Fetch the model, and make contexts and second moment, as every script would."""
    from firsttok.paper.experiment import parse_script

    def prepare() -> None:
        with progress_bar() as progress:
            parse_script(argparse.ArgumentParser(), progress, argv=options)

    raise SystemExit(exit_on_error(prepare))


def cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_process(
    target: Callable[..., None],
    args: Sequence[Any],
    *,
    imported: Sequence[str] | None = None,
    scratch: Path | None = None,
) -> BaseProcess:
    """Run a function in a process that is interrupted when this one is gone, and soon ended.

    Args:
        target: The function.
        args: Its arguments.
        imported: Modules that it needs; it is forked, where that is safe, from a process that
            imports them once. None for a fresh interpreter.
        scratch: A file to remove if this process is gone.
    """
    context = multiprocessing.get_context("spawn") if imported is None else _context(imported)
    process: BaseProcess = context.Process(target=_bound, args=(target, tuple(args), scratch))
    process.start()
    return process


def end_process(process: BaseProcess) -> None:
    """Ask a process to end, and make it if it does not; nothing is done if it has ended."""
    # Where Ctrl-C ended this process, the other has had it, too, and is stopping.
    process.terminate()
    process.join(_PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def run_alone(job: Job) -> int:
    """Run a script that has the terminal to itself, and return its exit code.

    Args:
        job: The job; what it waits for must have ended.
    """
    process = start_process(_run_script, (str(job.script), job.arguments))
    try:
        process.join()
    finally:
        end_process(process)
    return process.exitcode or 0


def _context(imported: Sequence[str]) -> Any:
    # Not on macOS, whose own libraries do not outlive a fork.
    method = "forkserver" if sys.platform.startswith("linux") else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([*imported])
    return context


def run_in_lanes(
    jobs: Sequence[Job], *, lanes: int, imported: Sequence[str] = ()
) -> Generator[Ended, None, None]:
    """Run scripts in as many lanes, the first that is ready first; closing ends what still runs.

    Every script is given its share of the cores (``OMP_NUM_THREADS``, unless it is set).

    Args:
        jobs: The jobs.
        lanes: Most scripts that run at the same time.
        imported: Modules that most scripts import; see :func:`start_process`.

    Yields:
        The jobs in the order they end in.

    Raises:
        ValueError: If jobs wait for each other in a circle.
    """
    share = max(1, cores() // lanes)
    threads = os.environ.get("OMP_NUM_THREADS", str(share))
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            unended = {job.name for job in waiting} | {each.job.name for each in running}
            ready = [job for job in waiting if unended.isdisjoint(job.after)]
            for job in ready[: lanes - len(running)]:
                waiting.remove(job)
                running.append(_Running.start(job, imported, threads))
            if not running:
                raise ValueError(f"these wait for each other: {[job.name for job in waiting]}")
            for each in [each for each in running if not each.process.is_alive()]:
                running.remove(each)
                yield each.ended()
            time.sleep(_POLL)
    finally:
        for each in running:
            each.end()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Running:
    job: Job
    process: BaseProcess
    output: Path
    started: float

    @staticmethod
    def start(job: Job, imported: Sequence[str], threads: str) -> "_Running":
        handle, name = tempfile.mkstemp(prefix="firsttok-", suffix=".log")
        os.close(handle)
        process = start_process(
            _run_captured,
            (name, threads, str(job.script), job.arguments),
            imported=imported,
            scratch=Path(name),
        )
        return _Running(job=job, process=process, output=Path(name), started=time.monotonic())

    def ended(self) -> Ended:
        output = self.output.read_text("utf-8", "replace")
        self.output.unlink()
        return Ended(
            job=self.job,
            code=self.process.exitcode or 0,
            output=output,
            seconds=time.monotonic() - self.started,
        )

    def end(self) -> None:
        end_process(self.process)
        self.output.unlink(missing_ok=True)


def _bound(target: Callable[..., None], args: tuple[Any, ...], scratch: Path | None) -> None:
    """Call a function while another thread waits for the parent to be gone."""
    threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True).start()
    target(*args)


def _end_with_parent(scratch: Path | None) -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    if scratch is not None:
        scratch.unlink(missing_ok=True)
    # As Ctrl-C does, so that no half-written file is left; a long computation may not hear it.
    _thread.interrupt_main()
    time.sleep(_GRACE)
    os._exit(1)


def _run_captured(output: str, threads: str, script: str, arguments: Sequence[str]) -> None:
    """Run a file with its share of the cores, all it writes going to a file."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    for text in (sys.stdout, sys.stderr):
        # As it is read again, whatever the terminal's encoding is.
        cast(io.TextIOWrapper, text).reconfigure(encoding="utf-8")
    os.environ["OMP_NUM_THREADS"] = threads
    if "torch" in sys.modules:
        # Imported before this process was forked, it has not seen the variable.
        import torch

        torch.set_num_threads(int(threads))
    _run_script(script, arguments)


def _run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a file as ``python script arguments`` would."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
