"""Progress: a bar in a terminal and in Jupyter, in a pipe a line now and then."""

import html
import threading
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from firsttok.escapes import printable

__all__ = ["Bar"]

_SOON = 2.0
"""Seconds after which a pipe is told what is being done."""
_PERIOD = 30.0
"""Seconds between two lines on the same thing in a pipe."""
_TICK = 0.5
"""Seconds between two looks at how far the work is, where nothing advances it meanwhile."""


_EMPTY = {"text/html": "", "text/plain": ""}


class Bar(Progress):
    """Progress on tasks, by what a console can show; ``say`` prints a line there."""

    def __init__(
        self, *, console: Any, say: Callable[[str], None], disable: bool = False, **settings: Any
    ) -> None:
        self._lines = not disable and (not console.is_terminal or console.is_dumb_terminal)
        # Rich's own bar in Jupyter needs widgets; this one needs the kernel alone.
        self._notebook = console.is_jupyter and not disable
        self._page: Any = None
        super().__init__(
            SpinnerColumn(),
            _Description(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=disable or self._notebook,
            **settings,
        )
        self._say_line = say
        self._said, self._told = monotonic(), TaskID(-1)
        self._latest = TaskID(-1)
        """The task that something was done of last."""
        self._moved = self._said
        """When that was."""
        self._saying = threading.Lock()
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None

    def start(self) -> None:
        """Begin to show progress."""
        super().start()
        if self._notebook and self._page is None:
            # A kernel has it; firsttok[notebooks] asks for it, too.
            from IPython.display import display

            self._page = display(_EMPTY, raw=True, display_id=True)
        if self._watch is None and (self._lines or self._notebook):
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
            self._page.update(_EMPTY, raw=True)
        super().stop()

    def advance(self, task_id: TaskID, advance: float | int = 1) -> None:
        """Count what was done."""
        super().advance(task_id, advance)
        self._latest, self._moved = task_id, monotonic()
        self._say()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change what is known of a task."""
        super().update(task_id, **changes)
        if not changes.keys().isdisjoint(("advance", "completed")):
            self._latest, self._moved = task_id, monotonic()
        self._say()

    def _look(self) -> None:
        while not self._ended.wait(_TICK):
            self._say()

    def _say(self) -> None:
        if not (self._lines or self._notebook):
            return
        # One thread says it; the others need not wait.
        if not self._saying.acquire(blocking=False):
            return
        try:
            task = next((task for task in self.tasks if not task.finished), None)
            wait = _TICK if self._notebook else _PERIOD
            if task is not None and task.id != self._told:
                wait = min(wait, _SOON)
            if task is None or monotonic() - self._said < wait:
                return
            self._said, self._told = monotonic(), task.id
            if self._page is not None:
                self._page.update({"text/html": _drawn(task), "text/plain": _line(task)}, raw=True)
            elif self._lines:
                self._say_line(self._both(task))
        finally:
            self._saying.release()

    def _both(self, outer: Task) -> str:
        """How far the work is, and how far what is being done for it."""
        inner = next((task for task in self.tasks if task.id == self._latest), outer)
        # After a longer pause than the estimate, the estimate is wrong.
        left = outer.time_remaining
        late = left is not None and monotonic() - self._moved > left
        if inner is outer or inner.finished:
            return _line(outer, estimate=not late)
        return f"{_line(outer, estimate=False)}; {_line(inner)}"


class _Description(ProgressColumn):
    """What is done, which may hold the name of a model or a file."""

    def render(self, task: Task) -> Text:
        return Text(printable(task.description, lines=False))


def _line(task: Task, *, estimate: bool = True) -> str:
    whole = "" if task.total is None else f" of {task.total:.0f}"
    left = task.time_remaining if estimate else None
    rest = "" if left is None else f", about {timedelta(seconds=int(left))} left"
    return printable(f"{task.description}: {int(task.completed)}{whole}{rest}", lines=False)


def _drawn(task: Task) -> str:
    size = "" if task.total is None else f' max="{task.total:g}" value="{task.completed:g}"'
    return f"<progress{size}></progress> {html.escape(_line(task))}"
