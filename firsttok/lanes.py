"""Several commands side by side, each with its share of the cores.

On a CPU two processes of one thread each get more done than one process of two threads: only the
matrix products of a small model keep two threads busy.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import IO

__all__ = ["Ended", "Job", "cores", "run_in_lanes"]

_POLL = 0.1
"""Seconds between two looks at what is running."""
_PATIENCE = 20.0
"""Seconds an interrupted command has to put down what it holds."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command that may have to wait for others."""

    name: str
    """What others wait for it by."""
    command: tuple[str, ...]
    """Program and arguments."""
    after: tuple[str, ...] = ()
    """Jobs that must have ended, in whatever way; a name that is no job is not waited for."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that has ended."""

    job: Job
    """The job."""
    code: int
    """Its exit code; negative for a signal."""
    output: str
    """What it wrote to standard output and to standard error."""


def cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_in_lanes(jobs: Sequence[Job], *, lanes: int) -> Generator[Ended, None, None]:
    """Run commands in as many lanes, the first that is ready first; closing ends what still runs.

    Every command is given its share of the cores (``OMP_NUM_THREADS``, unless it is set).

    Args:
        jobs: The jobs.
        lanes: Most commands that run at the same time.

    Yields:
        The jobs in the order they end in.

    Raises:
        ValueError: If jobs wait for each other in a circle.
    """
    share = str(max(1, cores() // lanes))
    environment = {"OMP_NUM_THREADS": share} | os.environ
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            unended = {job.name for job in waiting} | {each.job.name for each in running}
            ready = [job for job in waiting if unended.isdisjoint(job.after)]
            for job in ready[: lanes - len(running)]:
                waiting.remove(job)
                running.append(_Running.start(job, environment))
            if not running:
                raise ValueError(f"these wait for each other: {[job.name for job in waiting]}")
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                yield each.ended()
            time.sleep(_POLL)
    finally:
        for each in running:
            each.end()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Running:
    job: Job
    process: "subprocess.Popen[bytes]"
    file: IO[bytes]

    @staticmethod
    def start(job: Job, environment: dict[str, str]) -> "_Running":
        file = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(job.command, stdout=file, stderr=file, env=environment)
        return _Running(job=job, process=process, file=file)

    def ended(self) -> Ended:
        with self.file as file:
            file.seek(0)
            output = file.read().decode("utf-8", "replace")
        return Ended(job=self.job, code=self.process.returncode, output=output)

    def end(self) -> None:
        # Where Ctrl-C ended this process, the commands have had it, too, and are stopping.
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.file.close()
