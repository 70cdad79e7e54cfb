"""Files and folders that options name: whether they can be written, and what nothing may replace.

Whoever adds a command that writes names its files in :func:`written_files`; all is checked before
any work, and a file that a command reads is never one that it writes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firsttok.errors import BadInputError
from firsttok.options import folder_name
from firsttok.sinks import check_output

__all__ = ["check_places", "normal_file", "option_of", "record_file", "training_folder"]

_FILES = ("build_hard", "csv", "save")
"""Options that name a file to write."""
_FOLDERS = ("figures", "out", "work")
"""Options that name a folder to write to."""
_TO_A_FILE = ("hard", "sample", "synthesize", "train-mend")
"""Commands, or actions of one, whose ``--out`` is a file."""
_LISTS = (("hard", "out"), ("synthesize", "out"), ("screen", "build_hard"))
"""Files of facts, which are written as JSON."""
_DATA = ("exclude", "facts", "texts")
"""Options that name a file to read, or a data set that was pulled."""
_READ = (
    *("after", "before", "cases", "config", "contexts", "corpus", "edit", "method", "network"),
    *("scan", "second", "second_moment", "what"),
)
"""Other options and arguments that name files to read, among other things."""
_MODELS = ("before", "model", "name", "second", "what")
"""Options and arguments that may name the folder of a model."""
_OF_A_MODEL = (
    *("added_tokens", "config.", "generation_config", "merges", "model", "pytorch_model"),
    *("special_tokens", "spiece", "tokenizer", "vocab"),
)
"""What the names of a model's own files begin with."""
_OF_A_RUN = (".json", ".parquet", ".safetensors")
"""Endings of the files of a run."""
_WITHOUT = {
    "name": "the name",
    "run": "the run",
    "edit": "the file of an edit",
    "before": "the model before",
    "second": "the model after",
    "what": "the model, or the file of an edit",
}
"""Arguments that are no options."""


@dataclass(frozen=True, kw_only=True)
class _Output:
    """A file that will be written."""

    option: str
    """The option that names it, or what it lies beside or in."""
    named: Path
    """What that option says."""
    path: Path
    """The file."""

    @property
    def shown(self) -> str:
        """As messages name it."""
        if self.path == self.named:
            return f"{self.option} {self.path}"
        return f"{self.option} {self.named}: {self.path}, which is written too,"


def check_places(given: Mapping[str, Any]) -> None:
    """See that what the options name can be written, and replaces nothing that they read.

    Args:
        given: The options by name; none is None.

    Raises:
        BadInputError: If not; names the option.
        CacheError: If there can be no such file as an option names.
    """
    files, folders = _named_files(given), _named_folders(given)
    for name, text in folders.items():
        _check_folder(option_of(name), usable_path(option_of(name), text))
    for name, text in files.items():
        path = usable_path(option_of(name), text)
        if name == "csv" and not path.parent.is_dir():
            # Its folder is made.
            _check_folder(option_of(name), path.parent)
        else:
            check_output(path, option_of(name))
        _check_ending(given, name, path)
        if path.exists() and not path.is_file() and _beside(given, name, path):
            raise BadInputError(
                f"{option_of(name)} {path} is no file, and others are written beside it; name a "
                "file"
            )
    written = list(_written(given, files, folders))
    for output in written:
        if output.path != output.named and os.path.lexists(output.path.parent):
            check_output(output.path, f"{output.option} {output.named}:")
        _check_not_read(given, output)
    _check_apart(written, folders)


def record_file(out: Path) -> Path:
    """Where the record of a list of facts is written: beside it, as ``NAME.provenance.json``."""
    return out.with_name(f"{_stem(out)}.provenance.json")


def normal_file(out: Path) -> Path:
    """Where normal facts are written: beside the hard ones, as ``NAME.normal.json``."""
    return out.with_name(f"{_stem(out)}.normal{out.name[len(_stem(out)) :]}")


def training_folder(out: Path) -> Path:
    """Where the state of a training is kept, beside the network that it leaves."""
    return out.with_suffix(".work")


def usable_path(option: str, text: str) -> Path:
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
        raise BadInputError(f"{option} {text[:200]!r} is no usable path ({reason})") from None
    return path


def option_of(name: str) -> str:
    """How an option is written; of the arguments without one, what they name."""
    return _WITHOUT.get(name) or f"--{name.replace('_', '-')}"


def _named_files(given: Mapping[str, Any]) -> dict[str, str]:
    """What options name that is a file to write, by option."""
    to_a_file = not {given.get("command"), given.get("action")}.isdisjoint(_TO_A_FILE)
    names = (*_FILES, "out") if to_a_file else _FILES
    return {name: given[name] for name in names if name in given}


def _named_folders(given: Mapping[str, Any]) -> dict[str, str]:
    """What options name that is a folder to write to, by option."""
    files = _named_files(given)
    found = {name: given[name] for name in _FOLDERS if name in given and name not in files}
    match given:
        case {"command": "sweep", "run": [first, *_]} if first != "status":
            return found | {"run": first}
        case {"command": "sequence", "run": run}:
            return found | {"run": run}
        case _:
            return found


def _written(
    given: Mapping[str, Any], files: Mapping[str, str], folders: Mapping[str, str]
) -> Iterator[_Output]:
    """Every file whose name is known before the work."""
    for name, text in (*files.items(), *folders.items()):
        named = Path(text)
        paths = _beside(given, name, named) if name in files else _within(given, name, named)
        for path in ([named] if name in files else []) + paths:
            yield _Output(option=option_of(name), named=named, path=path)


def _beside(given: Mapping[str, Any], name: str, out: Path) -> list[Path]:
    """What is written beside a file that an option names."""
    match given.get("command"), name:
        case "hard", "out":
            return [record_file(out), *([normal_file(out)] if given.get("with_normal") else [])]
        case "screen", "build_hard":
            return [record_file(out)]
        case "train-mend", "out":
            kept = training_folder(out)
            state = [kept / "training.safetensors"] if os.path.lexists(kept) else []
            return [
                *(out.with_suffix(f".{kind}") for kind in ("json", "csv", "png", "svg")),
                *state,
            ]
        case _:
            return []


def _within(given: Mapping[str, Any], name: str, folder: Path) -> list[Path]:
    """What is written in a folder that an option names, as far as it is known."""
    model = given.get("name") or given.get("model")
    if name != "out" or not isinstance(model, str):
        return []
    own = folder_name(model)
    match given.get("command"):
        case "inspect":
            return [folder / f"{own}.{kind}" for kind in ("json", "toml", "png", "svg")]
        case "circuit":
            return [folder / own / f"circuit.{kind}" for kind in ("json", "html", "png", "svg")]
        case "scan":
            return [folder / own / "collapse_cases.json"]
        case "screen":
            return [folder / own / f"screen.{kind}" for kind in ("json", "csv", "png", "svg")]
        case _:
            return []


def _check_ending(given: Mapping[str, Any], name: str, path: Path) -> None:
    ending = path.name.lower().removesuffix(".gz")
    for command in (given.get("command"), given.get("action")):
        if (command, name) in _LISTS and ending.endswith(".parquet"):
            raise BadInputError(
                f"{option_of(name)} {path} is written as JSON; let it end in .json or .jsonl"
            )
    if given.get("command") == "train-mend" and path.suffix != ".safetensors":
        raise BadInputError(
            f"{option_of(name)} {path} is written as safetensors, with other files beside it; let "
            "it end in .safetensors"
        )


def _check_not_read(given: Mapping[str, Any], output: _Output) -> None:
    """Refuse to replace what is read: a file, or one of a model's or of a run."""
    if not output.path.is_file():
        return
    for name in (*_DATA, *_READ):
        for text in _texts(given.get(name)):
            if any(_is_same(output.path, read) for read in _meant(name, text)):
                raise BadInputError(
                    f"{output.shown} is a file of {option_of(name)}, which it would replace; "
                    "name another"
                )
    for name in _MODELS:
        for text in _texts(given.get(name)):
            if output.path.name.startswith(_OF_A_MODEL) and _is_same(
                output.path.parent, Path(text)
            ):
                raise BadInputError(
                    f"{output.shown} is a file of the model {text}, which it would replace; name "
                    "another"
                )
    if given.get("command") == "results" and output.path.suffix in _OF_A_RUN:
        run = Path(given["run"])
        if any(_is_same(folder, run) for folder in output.path.resolve().parents):
            raise BadInputError(
                f"{output.shown} is a file of the run, which it would replace; name another"
            )


def _check_apart(written: Sequence[_Output], folders: Mapping[str, str]) -> None:
    """Refuse one place for two outputs."""
    for name, text in folders.items():
        folder = Path(text).resolve()
        for output in written:
            if output.path.resolve() in (folder, *folder.parents):
                raise BadInputError(
                    f"{output.shown} is to be a file, and {option_of(name)} {text} a folder at the "
                    "same place; name another"
                )
    places: dict[Path, _Output] = {}
    for output in written:
        other = places.setdefault(output.path.resolve(), output)
        # A device takes any number of outputs.
        if other is not output and (output.path.is_file() or not output.path.exists()):
            raise BadInputError(
                f"{output.shown} is a file that {other.option} {other.named} stands for, too; name "
                "another"
            )


def _meant(name: str, text: str) -> list[Path]:
    """The files that a text may mean: a path, or where a pulled data set is."""
    path = Path(text)
    if name not in _DATA or path.exists():
        return [path]
    # It takes a moment to import, and is needed only where a file is to be replaced.
    from firsttok.data.pulls import pulled_file

    pulled = pulled_file(text)
    return [] if pulled is None else [pulled]


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except (OSError, ValueError):
        return False


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]


def _check_folder(name: str, path: Path) -> None:
    """See that a folder is one, or can be made."""
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not there.is_dir():
        kind = "file" if there.exists() else "link to nothing"
        raise BadInputError(f"{name} {path}: {there} is a {kind}; name a folder")
    if not os.access(there, os.W_OK):
        raise BadInputError(f"{name}: {there} cannot be written to; choose another place")


def _stem(path: Path) -> str:
    """The name without its endings: ``hard`` of ``hard.json.gz``."""
    name = path.name[: -len(".gz")] if path.name.lower().endswith(".gz") else path.name
    return name[: len(name) - len(Path(name).suffix)]
