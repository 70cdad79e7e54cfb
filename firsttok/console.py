"""The terminal: messages and progress on standard error, and how a command ends."""

import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from firsttok.errors import FirsttokError

__all__ = ["exit_on_error", "progress_bar", "stderr"]

stderr = Console(stderr=True)
_PERIOD = 30.0
"""Seconds between two lines on progress in a pipe."""


def progress_bar(*, estimate_over: float = 30.0) -> Progress:
    """A progress bar with an estimate, on standard error; in a pipe a line now and then.

    Args:
        estimate_over: Seconds of the latest progress that the estimate is made from.
    """
    return _Bar(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        speed_estimate_period=estimate_over,
    )


class _Bar(Progress):
    """Where no bar can be drawn, says how far a task is at most once in :data:`_PERIOD`."""

    def __init__(self, *columns: ProgressColumn, **settings: Any) -> None:
        super().__init__(*columns, **settings)
        self._said = monotonic()

    def advance(self, task_id: TaskID, advance: float | int = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        quiet = self.console.is_terminal or self.console.is_jupyter
        if quiet or monotonic() - self._said < _PERIOD:
            return
        self._said = monotonic()
        task = next((task for task in self.tasks if task.id == task_id), None)
        if task is None:
            return
        whole = "" if task.total is None else f" of {task.total:.0f}"
        left = task.time_remaining
        rest = "" if left is None else f", about {timedelta(seconds=int(left))} left"
        text = f"{task.description}: {int(task.completed)}{whole}{rest}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def exit_on_error(main: Callable[[], None]) -> int:
    """Run a command; turn a user's error into one sentence on standard error and exit code 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=stderr, show_time=False, show_path=False)],
    )
    logging.getLogger("firsttok").setLevel(logging.INFO)
    try:
        main()
    except FirsttokError as error:
        sys.stderr.write(f"firsttok: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("firsttok: interrupted; run the same command again to go on\n")
        return 130
    except BrokenPipeError:
        return 0
    return 0
