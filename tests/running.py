"""Commands and scripts run as a user runs them, in a process of their own or in this one."""

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
import warnings
from typing import Any

import pytest

from firsttok.cli import main
from firsttok.console import _Terminal


def in_a_process(
    words: list[str], environment: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a script, or a module behind ``-m``, by a Python of its own."""
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
