"""The terminal: the only place that prints, and how a command ends.

All that is printed passes through here, where text from outside is made harmless: it is never
markup, and a terminal obeys no character of it. Standard output that cannot be written is a
:class:`~firsttok.errors.FirsttokError`.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from firsttok.display import Table, cell_text
from firsttok.errors import FirsttokError, sentence_of
from firsttok.escapes import as_json, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = [
    "exit_on_error",
    "note",
    "own_bar",
    "print_table",
    "progress_bar",
    "show",
    "show_json",
]

_LONGEST = 1500
"""Characters of a sentence on standard error; what is longer quotes something endless."""
_PIPE_WIDTH = 140
"""Columns of a table in a file or a pipe: neither has a width of its own."""


def show(text: str = "") -> None:
    """Print a text and a line end on standard output."""
    _write(f"{printable(text)}\n")


def show_json(content: Any) -> None:
    """Print one line of JSON on standard output; NaN and infinity are a ValueError."""
    _write(f"{as_json(content, encoding=getattr(sys.stdout, 'encoding', None) or 'utf-8')}\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output, columns of numbers flush right.

    A cell is a text, a number, a truth value or None.
    """
    from rich.table import Table as Drawn

    drawn = Drawn(title=printable(title), title_justify="left")
    left = Table(columns=columns, lines=rows).left
    for name, flush in zip(columns, left, strict=True):
        drawn.add_column(printable(name), justify="left" if flush else "right")
    for row in rows:
        drawn.add_row(*(printable(cell_text(cell)) for cell in row))
    console = _console(errors=False)
    if not console.is_terminal:
        # A narrow table would cut its numbers off.
        console.width = _PIPE_WIDTH
    with _output_errors(), console.capture() as captured:
        console.print(drawn)
    _write(captured.get())


def note(text: str) -> None:
    """Print a text on standard error, above a progress bar if there is one."""
    _stderr().print(printable(text), soft_wrap=True)


def progress_bar(*, estimate_over: float = 30.0) -> "Progress":
    """A progress bar on standard error, in a pipe a line now and then.

    Its estimate is made from the latest ``estimate_over`` seconds.
    """
    from firsttok.bars import Bar

    return Bar(console=_stderr(), say=note, speed_estimate_period=estimate_over)


@contextlib.contextmanager
def own_bar(progress: "Progress | None") -> "Generator[Progress, None, None]":
    """The progress that was given, or else a bar of its own, in a terminal or in Jupyter only.

    The own one goes when the block ends.
    """
    if progress is not None:
        yield progress
        return
    from firsttok.bars import Bar

    console = _console(errors=True)
    silent = not (console.is_terminal or console.is_jupyter)
    with Bar(console=console, say=note, transient=True, disable=silent) as bar:
        yield bar


def exit_on_error(main: Callable[[], None]) -> int:
    """Run a command, and say in one sentence what went wrong if the user can do something about it.

    Returns:
        The exit code: 0; 2 after a sentence; 130, 143 or 129 after an interrupt, a termination or
        the end of the terminal. Output that nobody reads any more ends the command with 0.

    Raises:
        SystemExit: If the command raises it.
        Exception: If the program itself is wrong, so that the traceback is seen.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Terminal()])
    logging.getLogger("firsttok").setLevel(logging.INFO)
    stopped: SystemExit | None = None
    with _stoppable():
        try:
            try:
                main()
            except SystemExit as error:
                stopped = error
            # Until then, what was printed may wait in the process for a disk that is full.
            _write("", flush=True)
        except BaseException as error:
            return _told(error)
    if stopped is not None:
        raise stopped
    return 0


class _Stopped(BaseException):
    """The process was asked to end; raised so that files and workers are put in order."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code: int = 128 + number


class _Terminal(logging.Handler):
    """Messages above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            note(f"{record.levelname:<8} {self.format(record)}")
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def _stoppable() -> Generator[None, None, None]:
    """Raise where the system's default is to end the process at once, as Ctrl-C does."""

    def stop(number: int, _frame: object) -> None:
        raise _Stopped(number)

    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    changed: list[signal.Signals] = []
    # Elsewhere no signal arrives; and where one is ignored, as under nohup, it stays so.
    if threading.current_thread() is threading.main_thread():
        changed = [n for n in numbers if n and signal.getsignal(n) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _told(error: BaseException) -> int:
    """Say what went wrong, and return the exit code; raise what the user cannot help."""
    code = 2
    sentence = None
    if isinstance(error, KeyboardInterrupt):
        code, sentence = 130, "interrupted; run the same command again to resume"
    elif isinstance(error, _Stopped):
        code = error.code
    elif isinstance(error, BrokenPipeError):
        code = 0
    else:
        sentence = sentence_of(error)
        if sentence is None:
            raise error
    said = "" if sentence is None else printable(sentence, lines=False)
    if len(said) > _LONGEST:
        said = f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
    _last_words(sys.stderr, f"firsttok: {said}\n" if said else "")
    _last_words(sys.stdout, "")
    return code


def _last_words(stream: Any, text: str) -> None:
    """Write what is left, or let it go where nothing can be written."""
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        # Python would try again at its end, and give its own message and exit code.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write(text: str, *, flush: bool = False) -> None:
    # There is none where the command was started without one.
    stream: Any = sys.stdout
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with _output_errors():
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        if flush:
            stream.flush()


@contextlib.contextmanager
def _output_errors() -> Generator[None, None, None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FirsttokError(
            f"the output cannot be written ({error.strerror or error}); free some space or send "
            "it elsewhere"
        ) from None


def _console(*, errors: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=errors, markup=False, emoji=False, highlight=False)


@cache
def _stderr() -> "Console":
    """One for the progress bar and what is printed above it."""
    return _console(errors=True)
