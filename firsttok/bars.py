"""Progress: a bar in a terminal and in Jupyter, in a pipe a line now and then."""

import html
import threading
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID

from firsttok.escapes import printable

__all__ = ["Bar"]

_SOON = 2.0
"""Seconds after which a pipe is told what is being done."""
_PERIOD = 30.0
"""Seconds between two lines on the same thing in a pipe."""
_TICK = 0.5
"""Seconds between two looks at how far the work is, where nothing advances it meanwhile."""


class Bar(Progress):
    """Progress on tasks, by what the output can show.

    Args:
        columns: What a line of the bar holds, in a terminal.
        console: Where to.
        settings: As for :class:`rich.progress.Progress`.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, **settings: Any) -> None:
        self._lines = not console.is_terminal or console.is_dumb_terminal
        # Rich's own bar in Jupyter needs widgets; a kernel alone shows this one.
        self._page = _page() if console.is_jupyter else None
        super().__init__(*columns, console=console, disable=self._page is not None, **settings)
        self._said, self._told = monotonic(), TaskID(-1)
        self._saying = threading.Lock()
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None

    def start(self) -> None:
        """Begin to show progress."""
        super().start()
        if self._watch is None and (self._lines or self._page is not None):
            self._ended.clear()
            self._watch = threading.Thread(target=self._look, daemon=True)
            self._watch.start()

    def stop(self) -> None:
        """Show the last state, and no other."""
        self._ended.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        if self._page is not None:
            self._page.update({"text/html": "", "text/plain": ""}, raw=True)
        super().stop()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count what was done."""
        super().advance(task_id, advance)
        self._say()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change what is known of a task."""
        super().update(task_id, **changes)
        self._say()

    def _look(self) -> None:
        while not self._ended.wait(_TICK):
            self._say()

    def _say(self) -> None:
        if self._page is None and not self._lines:
            return
        # One thread says it; the others need not wait.
        if not self._saying.acquire(blocking=False):
            return
        try:
            task = next((task for task in self.tasks if not task.finished), None)
            wait = _TICK if self._page is not None else _PERIOD
            if task is not None and task.id != self._told:
                wait = min(wait, _SOON)
            if task is None or monotonic() - self._said < wait:
                return
            self._said, self._told = monotonic(), task.id
            if self._page is not None:
                self._page.update({"text/html": _drawn(task), "text/plain": _line(task)}, raw=True)
            else:
                self.console.print(_line(task), markup=False, highlight=False, soft_wrap=True)
        finally:
            self._saying.release()


def _page() -> Any:
    from IPython.display import display

    return display({"text/html": "", "text/plain": ""}, raw=True, display_id=True)


def _line(task: Task) -> str:
    whole = "" if task.total is None else f" of {task.total:.0f}"
    left = task.time_remaining
    rest = "" if left is None else f", about {timedelta(seconds=int(left))} left"
    return printable(f"{task.description}: {int(task.completed)}{whole}{rest}", lines=False)


def _drawn(task: Task) -> str:
    size = "" if task.total is None else f' max="{task.total:g}" value="{task.completed:g}"'
    return f"<progress{size}></progress> {html.escape(_line(task))}"
