"""``firsttok reproduce``: every experiment, several side by side, then the report.

Each script runs in a process of its own with its share of the cores. On a CPU two processes of one
thread each get more done than one process of two threads: only the matrix products of a small model
keep two threads busy. No process outlives this one, however it ends: each reads a pipe that its
parent holds open.
"""

import _thread
import argparse
import itertools
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from firsttok.config import configured
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.errors import BadInputError, WorkerError
from firsttok.options import PASSED_ON, add_script_options, folder_name
from firsttok.paper.registry import EXPERIMENTS, in_lanes

__all__ = ["Ended", "Job", "cores", "run", "run_in_lanes"]

BAD_INPUT = 2
"""Exit code of a script that does not apply to the model."""
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
    command: tuple[str, ...]
    """The Python file, and its command line."""
    after: tuple[str, ...] = ()
    """Jobs that must have ended, in whatever way; a name that is no job is not waited for."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A script that has ended."""

    job: Job
    code: int
    """Its exit code; negative for a signal."""
    output: str
    """What it wrote to standard output and to standard error."""
    seconds: float


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
    side_by_side = _side_by_side(jobs, lanes, args.paper)
    with closing(_in_turn(jobs) if lanes == 1 else side_by_side) as ended:
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
        names = ", ".join(job.name for job in jobs if job.name in refused)
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
    jobs: list[Job] = []
    for each in EXPERIMENTS:
        script = folder / f"{each.name}.py"
        if each.alone or each.paper != args.paper:
            continue
        if not script.is_file():
            raise BadInputError(f"no script {script}; the checkout is incomplete")
        jobs.append(Job(name=each.name, command=(str(script), *arguments), after=each.after))
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
        yield job.name, _run_alone(run_script, job.command)


def _side_by_side(
    jobs: list[Job], lanes: int, paper: str
) -> Generator[tuple[str, int], None, None]:
    """Several scripts at a time; what one says is shown when it has ended."""
    # All of them need it, so it is made before with every core. What is wrong, the scripts say.
    code = _run_alone(prepare, jobs[0].command[1:])
    if code not in (0, BAD_INPUT):
        _stop("the preparation", code)
    with progress_bar(estimate_over=3600.0) as progress:
        task = progress.add_task(f"{len(jobs)} scripts, {lanes} at a time", total=len(jobs))
        order = [each.name for each in in_lanes(paper)]
        ordered = sorted(jobs, key=lambda job: order.index(job.name))
        for ended in run_in_lanes(ordered, lanes=lanes):
            progress.advance(task)
            progress.stop()
            show(f"\n{ended.job.name} ({ended.seconds:.0f} s)\n{ended.output.rstrip()}")
            progress.start()
            yield ended.job.name, ended.code


def cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_lanes(jobs: Sequence[Job], *, lanes: int) -> Generator[Ended, None, None]:
    """Run so many scripts at a time, the first that is ready first; closing ends what still runs.

    Every script is given its share of the cores (``OMP_NUM_THREADS``, unless it is set).

    Yields:
        The jobs in the order they end in.

    Raises:
        ValueError: If jobs wait for each other in a circle.
    """
    share = {"OMP_NUM_THREADS": str(max(1, cores() // lanes))}
    # Their output is read as UTF-8, whatever the terminal's encoding is.
    environment = share | os.environ | {"PYTHONIOENCODING": "utf-8"}
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            unended = {job.name for job in waiting} | {each.job.name for each in running}
            ready = [job for job in waiting if unended.isdisjoint(job.after)]
            for job in ready[: lanes - len(running)]:
                waiting.remove(job)
                running.append(_Running(job, environment))
            if not running:
                raise ValueError(f"these wait for each other: {[job.name for job in waiting]}")
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                yield each.ended()
            time.sleep(_POLL)
    finally:
        for each in running:
            each.ended()


class _Running:
    """A script that runs, and the file without a name that its output goes to."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.job, self.started = job, time.monotonic()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it ends)
        self.process = _start(run_script, job.command, environment, self.output)

    def ended(self) -> Ended:
        """End it where it still runs, and say what came of it."""
        seconds = time.monotonic() - self.started
        code = _end(self.process)
        with self.output:
            self.output.seek(0)
            output = self.output.read().decode("utf-8", "replace")
        return Ended(job=self.job, code=code, output=output, seconds=seconds)


def _start(
    main: Callable[[], None],
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Call a function of this module in a fresh interpreter that ends soon after this process."""
    # Left alone, Python would look for modules in the current folder first.
    path = [str(Path(folder).absolute()) for folder in sys.path]
    code = f"import sys; sys.path[:] = {path}; from {__name__} import {main.__name__}, bound; "
    code += f"bound({main.__name__})"
    command = [sys.executable, "-c", code, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=output, stderr=output, env=environment)


def _run_alone(main: Callable[[], None], words: Sequence[str]) -> int:
    """The same with the terminal to itself, to the end; returns its exit code."""
    process = _start(main, words)
    try:
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ask a process to end unless it has, and make it if it does not; returns its exit code."""
    with process:
        # Where Ctrl-C ended this process, the other has had it, too, and is stopping.
        process.terminate()
        try:
            return process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def bound(main: Callable[[], None]) -> None:
    """Call a function, without standard input, while a thread waits for the parent to be gone."""
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    main()


def _end_with_parent(pipe: int) -> None:
    # Nothing is ever written there.
    os.read(pipe, 1)
    # As Ctrl-C does, so that no half-written file is left; a long computation may not hear it.
    _thread.interrupt_main()
    time.sleep(_GRACE)
    os._exit(1)


def prepare() -> None:
    """Fetch the model, and make contexts and second moment, as every script would."""
    from firsttok.paper.experiment import parse_script

    def main() -> None:
        with progress_bar() as progress:
            parse_script(argparse.ArgumentParser(), progress)

    raise SystemExit(exit_on_error(main))


def run_script() -> None:
    """Run the file that the command line names as ``python script arguments`` would."""
    del sys.argv[0]
    script = sys.argv[0]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
