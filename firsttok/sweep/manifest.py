"""What a run is made of; one that was begun with something else is not resumed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from firsttok.errors import BadInputError
from firsttok.escapes import finite
from firsttok.options import folder_name
from firsttok.storage import locked, make_folder, read_json, write_record

if TYPE_CHECKING:
    from firsttok.data import LeftOut
    from firsttok.measuring import Plan
    from firsttok.study import Study

__all__ = ["check_run", "join_run", "model_entry", "read_manifest", "run_entry"]

_NAME = "manifest.json"
_FORMAT = 2
_SHOWN = 6
"""Differences that are named; a whole list would hide the first."""


def run_entry(
    *,
    facts_hash: str,
    facts: int,
    facts_name: str,
    plan: "Plan",
    chunk: int,
    left_out: Sequence["LeftOut"] = (),
) -> Any:
    """What is the same for all models of a run.

    Args:
        facts_hash: Hash of all facts.
        facts: Number of facts.
        facts_name: Where they came from; told, not compared.
        plan: Methods and metrics.
        chunk: Facts in a chunk.
        left_out: Records of the file that could not be read, by reason; told, not compared.

    Raises:
        BadInputError: If an editor or a metric of the user's cannot be described.
    """
    return {
        "format": _FORMAT,
        "facts": {"hash": facts_hash, "count": facts},
        **plan.described(),
        "chunk": chunk,
        "told": {
            "facts": facts_name,
            "labels": {method.name: method.label for method in plan.methods},
        }
        | ({"left_out": [asdict(each) for each in left_out]} if left_out else {}),
    }


def model_entry(study: "Study", editors: Mapping[str, str]) -> Any:
    """What is fixed for one model: everything that determines its numbers.

    Args:
        study: The study.
        editors: Hashes of what editors take from it, see
            :func:`~firsttok.measuring.hashes_of_open`.

    Raises:
        BadInputError: If something disturbs the model that is no part of its identity.
    """
    disturbance = study.model.disturbance
    if disturbance is not None:
        raise BadInputError(
            f"a run keeps its rows, and none of them would show that {disturbance}; take that away"
        )
    entry = study.provenance()
    # Its condition number is computed anew in every run, and its last digits hang on the machine.
    entry["second_moment"] = {
        "corpus": study.second_moment.corpus,
        "tokens": study.second_moment.tokens,
        "hash": study.second_moment.content_hash,
    }
    if editors:
        entry["editors"] = dict(editors)
    entry["original_perplexity"] = finite(study.original_perplexity.mean)
    return entry


def check_run(folder: Path, entry: Mapping[str, Any]) -> None:
    """Refuse a run that was begun with another :func:`run_entry`; nothing is written.

    Raises:
        BadInputError: If it was begun with something else; the message shows the difference.
    """
    if (folder / _NAME).exists():
        known = read_manifest(folder)
        _refuse(folder, {key: known.get(key) for key in entry}, entry)


def join_run(folder: Path, entry: Mapping[str, Any], label: str, model: Mapping[str, Any]) -> None:
    """Begin a run, or let a model take part in one that was begun with the same settings.

    Args:
        folder: The run's folder; it is made if need be.
        entry: What :func:`run_entry` returned.
        label: Label of the model.
        model: What :func:`model_entry` returned.

    Raises:
        BadInputError: If the run was begun, or a model of that name took part, with something else,
            or the label differs from that of another model in case alone.
        CacheError: If the folder cannot be written to.
    """
    path = folder / _NAME
    make_folder(folder, "run folder")
    with locked(path):
        check_run(folder, entry)
        manifest = read_manifest(folder) if path.exists() else {**entry, "models": {}}
        models = cast(dict[str, Any], manifest["models"])
        folders = {folder_name(known).casefold(): known for known in models}
        other = folders.get(folder_name(label).casefold(), label)
        if other != label:
            raise BadInputError(
                f"the rows of {label} would be in the folder of {other}, which takes part in the "
                f"run in {folder}; begin another run with it"
            )
        if label in models:
            _refuse(folder, models[label], model)
        else:
            write_record(path, manifest | {"models": models | {label: model}})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        BadInputError: If the folder holds no run, or its manifest is damaged.
    """
    path = folder / _NAME
    if not path.is_file():
        raise BadInputError(f"{folder} holds no run (no {_NAME}); begin one with: firsttok sweep")
    content = read_json(path, "a run's manifest")
    if not isinstance(content, dict):
        raise BadInputError(f"{path} is not the manifest of a run; begin another run elsewhere")
    manifest = cast(dict[str, Any], content)
    for name in _damaged(manifest):
        raise BadInputError(
            f"{path} has no field {name}, or it is damaged; begin another run elsewhere"
        )
    if manifest.get("format") != _FORMAT:
        raise BadInputError(
            f"{path} has format {manifest.get('format')}, this version of firsttok reads "
            f"{_FORMAT}; begin another run elsewhere"
        )
    return manifest


def _damaged(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Fields that are not what a sweep writes, as far as they are not only compared."""
    facts, methods = manifest.get("facts"), manifest.get("methods")
    if not _is_table(manifest.get("models"), dict):
        yield "models"
    if not (isinstance(facts, dict) and _is_count(cast(Any, facts).get("count"), 0)):
        yield "facts.count"
    if not (_is_table(methods, dict) and all(_is_table(each, str) for each in methods.values())):
        yield "methods"
    if not _is_count(manifest.get("chunk"), 1):
        yield "chunk"
    for name in ("format", "seed"):
        if type(manifest.get(name)) is not int:
            yield name


def _is_table(found: Any, kind: type[Any]) -> TypeGuard[dict[str, Any]]:
    """Whether it is a JSON object whose values are all of a kind."""
    return isinstance(found, dict) and all(
        isinstance(value, kind) for value in cast(dict[str, Any], found).values()
    )


def _is_count(found: Any, least: int) -> bool:
    """Whether it is a whole number, which True is not, and not below the least."""
    return type(found) is int and found >= least


def _refuse(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = list(_differences(known, wanted, ""))
    if len(differences) > _SHOWN:
        differences[_SHOWN:] = [f"and {len(differences) - _SHOWN} more"]
    if differences:
        raise BadInputError(
            f"the run in {folder} was begun with something else ({'; '.join(differences)}); "
            "use the same settings, or another folder"
        )


_TOLD = ("told", "original_perplexity", "name", "source")
"""Fields that are only told: they follow from the others, or change no number."""


def _differences(known: Any, wanted: Any, place: str) -> Iterator[str]:
    """Each difference as ``place: old, now new``."""
    if isinstance(known, Mapping) and isinstance(wanted, Mapping):
        old, new = cast(Mapping[str, Any], known), cast(Mapping[str, Any], wanted)
        for key in dict.fromkeys([*old, *new]):
            if key not in _TOLD:
                name = f"{place}.{key}" if place else key
                yield from _differences(old.get(key), new.get(key), name)
    elif _plain(known) != _plain(wanted):
        yield f"{place}: {_plain(known)}, now {_plain(wanted)}"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(cast(Sequence[Any], value))
    return value
