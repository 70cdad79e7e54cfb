"""Downstream tasks of edited models, by EleutherAI's lm-evaluation-harness (extra ``tasks``)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.progress import Progress

from firsttok.arguments import taken, whole_number
from firsttok.editing import Edit
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.models import Model

__all__ = ["OWN_TASKS", "TaskScores", "check_tasks", "data_hash", "load_tasks", "score_tasks"]

_OWN: Mapping[str, tuple[str, float]] = {
    "own_piqa": ("piqa", 0.5),
    "own_hellaswag": ("hellaswag", 0.25),
    "own_lambada": ("lambada_standard", 0.0),
    "own_sst2": ("sst2", 0.5),
}
"""Task of lm-eval that asks the items of each shipped set, and the accuracy of guessing."""
_CHANGED: Mapping[str, Mapping[str, str]] = {
    # As "Rebuilding ROME" puts it, without its examples: lm-eval's question is answered worse.
    "own_sst2": {"doc_to_text": "Review : {{sentence}}\nSentiment :"}
}
OWN_TASKS = tuple(_OWN)
"""Shipped items in the schemata of the published sets, written for firsttok; no network needed."""
_SHA256 = {
    "own_piqa": "43a20b4767827038d38a50d34c3a6d4c68435380feaae68469191c73671df8a8",
    "own_hellaswag": "2445a3d6f039ddf84032b135473993ddec4d61c9631974887af920c089468ad0",
    "own_lambada": "71566b8615f1eba1e844e1802e1eb4501a75064bb1b8945d2888cc8bfb8ffbba",
    "own_sst2": "08993a5e64458ef6860c9d0913a36f25de14854c5f62f3311bef6594b088e8bf",
}


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What one model state scores in one task."""

    task: str
    items: int
    """How many items were asked."""
    metrics: dict[str, float]
    """Metrics in the task's order: ``acc``, ``acc_norm``, ``exact_match``, ``f1`` and so on."""

    @property
    def main(self) -> float:
        """Accuracy where there is one, or else the task's first metric."""
        return self.metrics.get("acc", next(iter(self.metrics.values())))

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing, for the shipped sets."""
        return _OWN[self.task][1] if self.task in _OWN else None


@taken
def score_tasks(
    model: Model,
    edits: Sequence[Edit] = (),
    tasks: Sequence[str] = OWN_TASKS,
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, TaskScores]]:
    """Run tasks on a model without any edit, then under each of some alone.

    Every task is lm-eval's, asked zero-shot unless it says otherwise, or one of Rebuilding ROME's
    GLUE protocol (``glue_sst2``, ``glue_mrpc``, ``glue_cola``, ``glue_rte``). Requests that score a
    target are run for all edits together (see :func:`~firsttok.evaluation.score_edits`), and texts
    are tokenised under the model's BOS policy. Answers are generated greedily, edit by edit.

    Args:
        model: The model, unedited.
        edits: The edits.
        tasks: Names of shipped sets; of lm-eval's tasks, with ``folder``; or, without it, with the
            commit of the published data on the hub, as ``piqa@COMMIT``.
        folder: Folder with the data in ``TASK/SPLIT.jsonl``, in the published schema.
        limit: Most items of each task; None for all.
        progress: Where to show progress.

    Returns:
        The scores by task without an edit, then under each of them.

    Raises:
        BadInputError: If lm-eval is not installed, a task is unknown, or its data are not there.
        EditMismatchError: If an edit was made for another model.
        UnsupportedModelError: If the model is no decoder.
    """
    if limit is not None:
        whole_number(limit, "limit", least=1)
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is no decoder, and tasks are asked of decoders only; give one"
        )
    loaded = load_tasks(tasks, folder=folder)
    for edit in edits:
        edit.check(model)
    from firsttok.evaluation.harness import run_tasks

    progress = progress or Progress(disable=True)
    task = progress.add_task("tasks", total=1.0)
    found = run_tasks(
        model,
        edits,
        loaded,
        limit=limit,
        advance=lambda share: progress.advance(task, share),
    )
    return [{name: _scores(name, each[name]) for name in loaded} for each in found]


def load_tasks(tasks: Sequence[str], *, folder: str | Path | None = None) -> dict[str, Any]:
    """Load tasks for lm-eval's own ``evaluate``, by the name that each goes by.

    Raises:
        BadInputError: As for :func:`score_tasks`.
    """
    check_tasks(tasks, folder)
    from firsttok.evaluation.harness import load_task

    loaded: dict[str, Any] = {}
    for each in tasks:
        name, _, revision = each.partition("@")
        loaded[name] = load_task(
            name,
            _files(name, folder),
            revision or None,
            registered=_OWN[name][0] if name in _OWN else name,
            changes=_CHANGED.get(name, {}),
        )
    return loaded


def check_tasks(tasks: Sequence[str], folder: str | Path | None = None) -> None:
    """Refuse tasks that cannot be run, before any work.

    Raises:
        BadInputError: If none is given, one comes twice, lm-eval is missing, or so is a folder.
    """
    if find_spec("lm_eval") is None:
        raise BadInputError("tasks need lm-eval; pip install 'firsttok[tasks]'")
    names = [each.partition("@")[0] for each in tasks]
    if not names:
        raise BadInputError("there is no task; give at least one")
    for each, name in zip(tasks, names, strict=True):
        if names.count(name) > 1:
            raise BadInputError(f"the task {name} comes twice; give it once")
        if not name.replace("_", "").replace("-", "").isalnum():
            raise BadInputError(f"{each!r} is no name of a task")
        if name in _OWN or _files(name, folder):
            continue
        if "@" not in each:
            where = f"{folder} has no folder {name}" if folder else "no folder with its data"
            raise BadInputError(
                f"{name}: {where}; add {name}/SPLIT.jsonl there, or name the commit of the "
                f"published data on the hub as {name}@COMMIT"
            )
        revision = each.partition("@")[2]
        if len(revision) != 40 or not set(revision) <= set("0123456789abcdef"):
            raise BadInputError(
                f"{each!r} names no commit; give its 40 hexadecimal digits after the @"
            )


def data_hash(tasks: Sequence[str], folder: str | Path | None = None) -> str:
    """SHA-256 of the files of some tasks, and of the commits of those from the hub."""
    digest = hashlib.sha256()
    for each in tasks:
        digest.update(f"{each}\n".encode())
        for split, path in sorted(_files(each.partition("@")[0], folder).items()):
            digest.update(f"{split} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files(name: str, folder: str | Path | None) -> dict[str, Path]:
    """The file of each split of a task; none where its data are on the hub."""
    if name in _OWN:
        path = Path(str(resources.files("firsttok.data.builtin").joinpath(f"{name}.jsonl")))
        if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256[name]:
            raise BadInputError(f"{path.name} is not what was shipped; install firsttok again")
        return {"test" if name == "own_lambada" else "validation": path}
    own = None if folder is None else Path(folder) / name
    if own is None or not own.is_dir():
        return {}
    return {path.stem: path for path in sorted(own.glob("*.jsonl"))}


def _scores(name: str, results: dict[str, Any]) -> TaskScores:
    metrics = {
        key.partition(",")[0]: float(value)
        for key, value in results.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }
    return TaskScores(task=name, items=int(results["sample_len"]), metrics=metrics)
