"""What the options of commands and scripts may be, checked before anything is computed."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

from firsttok.arguments import LARGEST, seed_number
from firsttok.errors import BadInputError
from firsttok.hyperparameters import Hyperparameters
from firsttok.sinks import check_output

__all__ = ["HYPERPARAMETERS", "check_device_name", "check_options"]

HYPERPARAMETERS = {
    "steps": "steps",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "clamp": "clamp",
    "kl": "kl",
}
"""Fields of :class:`Hyperparameters` by the option that sets them."""
_COUNTS = (
    "actors",
    "batch",
    "chunk",
    "collapse",
    "count",
    "cpus_per_actor",
    "edits",
    "every",
    "jobs",
    "ft_steps",
    "limit",
    "normal",
    "patience",
    "rank",
    "tokens",
    "validation",
    "windows",
)
_POSITIVE = (
    *("sql_seconds", "temperature", "threshold"),
    *("mom2_weight", "nullspace_threshold", "l2", "eps", "ft_lr"),
)
_FILES = ("build_hard", "csv", "save")
"""Options that name a file to write."""
_READ = ("network", "after", "exclude", "contexts", "second_moment", "texts")
"""Options that name files to read, which nothing may replace."""
_FOLDERS = ("figures", "out", "work")
"""Options that name a folder to write to."""
_TO_A_FILE = ("hard", "sample", "synthesize", "train-mend")
"""Commands, or actions of one, whose ``--out`` is a file."""
_WITHOUT = {
    "name": "the name",
    "run": "the run",
    "edit": "the file of an edit",
    "before": "the model before",
    "second": "the model after",
}
"""Arguments that are no options."""
_TEXTS = ("subject", "target", "template", "true")
"""Options whose text is a fact's, which says itself what may be empty."""


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that cannot be right whatever the model; what is not given is passed over.

    Raises:
        BadInputError: If a number is outside its range, or nothing can be written where it is to
            be; names the option.
        CacheError: If there can be no such file as an option names.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name, value in given.items():
        if name in _COUNTS and value < 1:
            raise BadInputError(f"{_option(name)} is {value}; give at least 1")
        values: list[Any] = value if isinstance(value, list) else [value]
        if name not in _TEXTS and any(isinstance(v, str) and not v.strip() for v in values):
            raise BadInputError(f"{_option(name)} is empty; give a value, or leave it out")
    if "seed" in given:
        seed_number(given["seed"], "--seed")
    for name in ("layer", "layers"):
        layers = given.get(name, 0)
        for layer in layers if isinstance(layers, list) else [layers]:
            if layer < 0:
                raise BadInputError(
                    f"--{name} is {layer}, but a model has no layer {layer}; count them from 0"
                )
    for name in _POSITIVE:
        if not 0 < given.get(name, 1.0) <= LARGEST:
            raise BadInputError(
                f"{_option(name)} is {given[name]}; give a number above 0, and no larger than "
                f"{LARGEST:g}"
            )
    if not 0 < given.get("top_p", 1.0) <= 1:
        raise BadInputError(f"--top-p is {given['top_p']}; give a number above 0, and at most 1")
    Hyperparameters(**{f: given[name] for name, f in HYPERPARAMETERS.items() if name in given})
    if "device" in given:
        check_device_name(given["device"])
    methods = {"c-rome" if name == "r-rome" else name for name in given.get("method", ())}
    if "save" in given and len(methods) > 1:
        raise BadInputError(f"--save takes one method, not {len(methods)}; run it for each")
    _check_places(given)


def check_device_name(device: str) -> None:
    """Refuse a device that is not supported.

    Raises:
        BadInputError: If it is neither ``cpu`` nor ``cuda`` nor ``cuda:N``.
    """
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,2}))?", device):
        raise BadInputError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")


def _check_places(given: dict[str, Any]) -> None:
    """See that what the options name can be written, so that no work is lost at its end."""
    named = {name: given[name] for name in (*_FILES, *_FOLDERS) if name in given}
    if given.get("command") == "sweep" and given["run"][0] != "status":
        named["run"] = given["run"][0]
    to_a_file = not {given.get("command"), given.get("action")}.isdisjoint(_TO_A_FILE)
    for name, text in named.items():
        option = _option(name)
        path = _path(option, text)
        for other in _READ:
            for read in _all_of(given.get(other)):
                if path.is_file() and Path(read).is_file() and path.samefile(read):
                    raise BadInputError(
                        f"{option} {path} is a file of {_option(other)}, which it would replace; "
                        "name another"
                    )
        if name == "csv" and not path.parent.is_dir():
            # Its folder is made.
            _check_folder(option, path.parent)
        elif name in _FILES or (name == "out" and to_a_file):
            check_output(path, option)
        else:
            _check_folder(option, path)


def _all_of(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _check_folder(name: str, path: Path) -> None:
    """See that a folder is one, or can be made."""
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        kind = "file" if there.exists() else "link to nothing"
        raise BadInputError(f"{name} {path}: {there} is a {kind}; name a folder")
    if not os.access(there, os.W_OK):
        raise BadInputError(f"{name}: {there} cannot be written to; choose another place")


def _path(name: str, text: str) -> Path:
    """A path that the system takes.

    Raises:
        BadInputError: If it is too long, runs in circles, or holds a NUL.
    """
    path = Path(text)
    try:
        # Not Path.exists, which takes a loop of links for nothing at all.
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInputError(f"{name} {text[:200]!r} is no usable path ({reason})") from None
    return path


def _option(name: str) -> str:
    """How an option is written; of the arguments without one, what they name."""
    return _WITHOUT.get(name) or f"--{name.replace('_', '-')}"
