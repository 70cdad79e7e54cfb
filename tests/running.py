"""Commands and scripts run as a user runs them, in a process of their own or in this one."""

import contextlib
import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from firsttok.cli import main
from firsttok.console import _Terminal


def in_a_process(
    words: list[str], environment: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a script, or a module given with ``-m``, by a Python of its own."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=300,
    )


def in_this_process(
    words: list[str], environment: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """The same without another start of Python: only that takes seconds."""
    said, told = io.StringIO(), io.StringIO()
    messages = _Terminal()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(told),
        warnings.catch_warnings(),
    ):
        # As Python begins: what pytest keeps for its summary is shown.
        patch.setattr(warnings, "showwarning", show_warning)
        warnings.resetwarnings()
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", hidden)
        warnings.simplefilter("ignore", ResourceWarning)
        for name, value in environment.items():
            patch.setenv(name, value)
        logging.getLogger().addHandler(messages)
        try:
            if words[0] == "-m":
                code = main(words[2:])
            else:
                patch.setattr(sys, "argv", words)
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(words[0], run_name="__main__")
                code = ended.value.code
        finally:
            logging.getLogger().removeHandler(messages)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, said.getvalue(), told.getvalue())


def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    sys.stderr.write(f"{category.__name__}: {message}\n")


_FORK = """
import json, os, sys
import firsttok.commands.{command}
from firsttok.cli import main
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        words, *paths = json.loads(line)
        for number, path in enumerate(paths):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()
    _, status, usage = os.wait4(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    code: int
    """Its exit code, or the negative number of the signal that killed it."""
    peak: int
    """Most memory it had, in the system's unit."""


class Started:
    """A process that was started, and may still run."""

    def __init__(self, server: "subprocess.Popen[str]", pid: int) -> None:
        self._server = server
        self.pid = pid
        self.begun = time.monotonic()

    def kill(self) -> Ended:
        """Kill it, unless it has ended by then."""
        # Nobody has waited for it before: its number is still its own.
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        """Wait for its end."""
        code, peak = json.loads(_ask(self._server, "wait"))
        return Ended(code=code, peak=peak)


class Starter:
    """Starts one command again and again, each time in a process of its own.

    They are forked from one that has imported all that the command needs: the import takes longer
    than a run of a tiny model, and a kill at a random moment would mostly meet it.
    """

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self._server = server

    def start(self, words: list[str], *, out: str = os.devnull, err: str = os.devnull) -> Started:
        """Start the command with these words; the one before must have ended."""
        asked = json.dumps([words, os.devnull, out, err])
        return Started(self._server, int(_ask(self._server, asked)))

    def run(self, words: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
        """Run it to its end; what it says goes through files in a folder."""
        out, err = folder / "stdout", folder / "stderr"
        for path in (out, err):
            path.unlink(missing_ok=True)
        ended = self.start(words, out=str(out), err=str(err)).wait()
        said = (path.read_text("utf-8") for path in (out, err))
        return subprocess.CompletedProcess(words, ended.code, *said)


def _ask(server: "subprocess.Popen[str]", line: str) -> str:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(line + "\n")
    server.stdin.flush()
    return server.stdout.readline()


@contextlib.contextmanager
def starter(command: str, environment: dict[str, str]) -> Generator[Starter, None, None]:
    """What starts a command, as ``sweep``; whatever still runs at the end is killed."""
    server = subprocess.Popen(
        [sys.executable, "-c", _FORK.format(command=command)],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "ready\n"
        yield Starter(server)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()
