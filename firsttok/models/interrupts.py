"""Ctrl-C, put off while something must not be left half done."""

import signal
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

__all__ = ["Deferral"]

_PATIENCE = 1.0
"""Seconds after which a second interrupt is not put off: whoever sends it insists."""


class Deferral:
    """Puts off an interrupt that arrives while one module's functions run, or while a pass does.

    The handler of SIGINT raises between any two instructions, also between those that put a weight
    back. Between :meth:`begin` and :meth:`end` this object stands in for it. It calls the handler
    at once if no function of the module is running and :attr:`passing` is off, and else in
    :meth:`end`. In other threads than the main one, where no handler runs, it does nothing.
    """

    def __init__(self, module: str) -> None:
        """Name the module whose functions are not to be interrupted."""
        self.passing: bool = False
        self.pending: bool = False
        self._module = module
        self._previous: Callable[[int, FrameType | None], Any] | None = None
        self._since = 0.0
        self._ended = False
        self._entry: tuple[CodeType, Callable[[], None]] | None = None

    def begin(self) -> None:
        """Take the handler's place."""
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            # What is no function of Python does not raise.
            if callable(handler):
                self._previous = handler
                signal.signal(signal.SIGINT, self._handle)

    def entered(self, code: CodeType, leave: Callable[[], None]) -> None:
        """Let a block begin: from here on an interrupt in ``code`` leaves the block, and is raised.

        Args:
            code: The code of the ``__enter__`` that is about to return.
            leave: What undoes it.
        """
        self._entry = (code, leave)

    def end(self) -> None:
        """Give the handler its place back, and call it if an interrupt was put off."""
        if self._previous is None or threading.current_thread() is not threading.main_thread():
            self._ended = True
            return
        # One that began later and has not ended hands on to this one, which then hands on, too.
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._previous)
        self._ended = True
        if self.pending:
            self.pending = False
            self._previous(signal.SIGINT, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._ended and (self.passing or self._is_inside(frame)):
            if self._entry is not None and frame is not None and frame.f_code is self._entry[0]:
                self._entry[1]()
                self.end()
            else:
                now = time.monotonic()
                if not self.pending:
                    self.pending, self._since = True, now
                if now - self._since < _PATIENCE:
                    return
        if self._previous is not None:
            self._previous(number, frame)

    def _is_inside(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_globals.get("__name__") == self._module:
                return True
            frame = frame.f_back
        return False
