"""The terminal: messages and progress on standard error, and how a command ends."""

import logging
import sys
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from firsttok.errors import FirsttokError

__all__ = ["exit_on_error", "progress_bar", "stderr"]

stderr = Console(stderr=True)


def progress_bar(*, estimate_over: float = 30.0) -> Progress:
    """A progress bar with an estimate, on standard error.

    Args:
        estimate_over: Seconds of the latest progress that the estimate is made from.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        speed_estimate_period=estimate_over,
    )


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
