"""Configuration files: TOML whose values take the place of an option's default."""

import argparse
import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from firsttok.arguments import check_text
from firsttok.errors import BadInputError, HyperparameterError
from firsttok.hyperparameters import Hyperparameters
from firsttok.option_values import HYPERPARAMETERS, check_options
from firsttok.options import add_script_options
from firsttok.storage import read_toml

__all__ = ["config_keys", "configured", "read_config", "toml_line"]

_OF_ONE_RUN = frozenset({"config", "profile", "collapse", "normal", "out", "skip_bad"})
"""Options of scripts that say what one run does and not what it works on."""
_KINDS = {int: "a whole number", float: "a number", str: "a text in quotation marks"}


def configured(
    args: argparse.Namespace, parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse again with the values of ``--config`` as defaults, and check every value.

    Given options win. Nothing is loaded.

    Args:
        args: What the parser made of the arguments.
        parser: The parser; ``--config`` is an option of it or of one of its subcommands.
        argv: The arguments; None for those of the process.

    Returns:
        The options; ``args`` itself where no file was given.

    Raises:
        BadInputError: If an argument is no text, the file is no configuration, or a value is out of
            range; see :func:`~firsttok.option_values.check_options`.
    """
    for word in sys.argv[1:] if argv is None else argv:
        check_text(word, "the argument")
    owner: argparse.ArgumentParser | None = vars(args).pop("configurable", None)
    if owner is not None and args.config is not None:
        own = _actions(owner)
        values = {name: value for name, value in read_config(args.config).items() if name in own}
        owner.set_defaults(
            **{name: [value] if own[name].nargs == "+" else value for name, value in values.items()}
        )
        args = parser.parse_args(argv)
        vars(args).pop("configurable")
    check_options(args)
    return args


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration and check every value.

    Keys are the names of options, with ``-`` or ``_`` between words. Paths in it are meant as on
    the command line: from the folder in which the command is run.

    Returns:
        Values by the names under which options are parsed.

    Raises:
        BadInputError: If the file is missing or damaged, a key is unknown, or a value is of the
            wrong type or outside its range; the message names file and key.
    """
    path = Path(path)
    known = config_keys()
    values: dict[str, Any] = {}
    for key, value in read_toml(path, "options").items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            raise BadInputError(
                f"{path}: [{key}] is a table, and a configuration has none; write each of its "
                "lines without it"
            )
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise BadInputError(f"{path}: key {key!r} is unknown; {hint}")
        if name in values:
            raise BadInputError(f"{path}: {name} is given twice, with - and with _; keep one")
        values[name] = _checked(f"{path}: {key}", known[name], value)
    changed = {HYPERPARAMETERS[n]: value for n, value in values.items() if n in HYPERPARAMETERS}
    try:
        Hyperparameters(**changed)
    except HyperparameterError as error:
        raise BadInputError(f"{path}: {error}") from None
    return values


def toml_line(key: str, value: str | int | float, comment: str = "") -> str:
    """One line of a configuration, with a comment after it if there is one."""
    written = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    # The one control character that JSON leaves as it is, and TOML forbids.
    written = written.replace("\x7f", "\\u007f")
    return f"{key} = {written}" + (f"  # {comment}" if comment else "")


def config_keys() -> dict[str, argparse.Action]:
    """The option of every key that a configuration may hold, in the order of ``--help``."""
    parser = argparse.ArgumentParser(add_help=False)
    add_script_options(parser)
    return {name: action for name, action in _actions(parser).items() if name not in _OF_ONE_RUN}


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions}


def _checked(where: str, action: argparse.Action, value: Any) -> str | int | float:
    kind: Any = str if action.type is None else action.type
    accepted = (int, float) if kind is float else kind
    # True is an int to Python, but nobody means 1 by it.
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise BadInputError(f"{where} is {value!r}, and not {_KINDS[kind]}; correct that line")
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise BadInputError(f"{where} is {value!r}; choose one of {choices}")
    try:
        return kind(value)
    except OverflowError:
        raise BadInputError(f"{where} is a number out of range; correct that line") from None
