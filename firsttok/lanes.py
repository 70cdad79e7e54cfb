"""Several scripts side by side, each in a process of its own with its share of the cores.

On a CPU two processes of one thread each get more done than one process of two threads: only the
matrix products of a small model keep two threads busy.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["Ended", "Job", "cores", "process_context", "run_in_lanes"]

_POLL = 0.1
"""Seconds between two looks at what is running."""
_PATIENCE = 20.0
"""Seconds an interrupted script has to put down what it holds."""


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


def cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def process_context(imported: Sequence[str] = ()) -> Any:
    """How processes are started: forked from one that has imported something, where that is safe.

    Args:
        imported: Modules that it imports, once.
    """
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
        imported: Modules that most scripts import; see :func:`process_context`.

    Yields:
        The jobs in the order they end in.

    Raises:
        ValueError: If jobs wait for each other in a circle.
    """
    share = max(1, cores() // lanes)
    threads = os.environ.get("OMP_NUM_THREADS", str(share))
    context = process_context(imported)
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            unended = {job.name for job in waiting} | {each.job.name for each in running}
            ready = [job for job in waiting if unended.isdisjoint(job.after)]
            for job in ready[: lanes - len(running)]:
                waiting.remove(job)
                running.append(_Running.start(job, context, threads))
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
    def start(job: Job, context: Any, threads: str) -> "_Running":
        handle, name = tempfile.mkstemp(prefix="firsttok-", suffix=".log")
        os.close(handle)
        process = context.Process(
            target=_run_script, args=(str(job.script), job.arguments, name, threads)
        )
        process.start()
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
        # Where Ctrl-C ended this process, the scripts have had it, too, and are stopping.
        self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.output.unlink(missing_ok=True)


def _run_script(script: str, arguments: Sequence[str], output: str, threads: str) -> None:
    """Run a file as ``python script arguments`` would, all it writes going to a file."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ["OMP_NUM_THREADS"] = threads
    if "torch" in sys.modules:
        # Imported before this process was forked, it has not seen the variable.
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
