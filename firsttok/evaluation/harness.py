"""lm-eval's tasks on firsttok's passes, imported only where they are run.

It needs ``pip install 'firsttok[tasks]'``.
"""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lm_eval.tasks
from datasets.exceptions import DatasetsError
from jinja2 import UndefinedError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.squadv2.task import SQuAD2
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from firsttok.editing import Edit
from firsttok.errors import BadInputError
from firsttok.evaluation.generation import greedy_text
from firsttok.evaluation.protocols import PROTOCOL, answer_scores, protocol_task
from firsttok.evaluation.targets import score_edits
from firsttok.models import Model
from firsttok.prompts import Prompt, plain_ids

__all__ = ["Answers", "load_task", "run_tasks"]

_FOLDERS = {
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "lambada_standard": "lambada",
    "nq_open": "nq_open",
    "sst2": "glue/sst2",
    "mmlu": "mmlu/default",
}
"""Where the papers' tasks are within lm-eval: to read all its tasks takes seconds."""
_FIELDS = {
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "lambada_standard": ("text",),
    "nq_open": ("question", "answer"),
    "squadv2": ("id", "title", "context", "question", "answers"),
    "mmlu": ("question", "choices", "answer"),
    "sst2": ("sentence", "label"),
    "glue_sst2": ("sentence", "label"),
    "glue_cola": ("sentence", "label"),
    "glue_mrpc": ("sentence1", "sentence2", "label"),
    "glue_rte": ("sentence1", "sentence2", "label"),
}
"""Fields of the published data. Without a label, lm-eval counts every answer as wrong."""
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_GENERATED = 256
"""Most tokens of an answer where a task names no limit, as in lm-eval."""
_TOGETHER = 32
"""Requests scored between two steps of the progress bar."""
Answer = tuple[float, bool] | float | str
"""Log-likelihood and whether the target is greedy; of a whole text; a generated text."""


def load_task(
    name: str,
    files: Mapping[str, Path],
    revision: str | None,
    *,
    registered: str,
    changes: Mapping[str, Any],
) -> Task:
    """Return a task of lm-eval's, or of Rebuilding ROME's protocol.

    Args:
        name: The name that it goes by.
        files: A file for each split; none to load the published data from the hub.
        revision: The commit of the published data.
        registered: Its name in lm-eval.
        changes: What is asked otherwise than registered.

    Raises:
        BadInputError: If there is no such task, the split that it is measured on has no file, or
            the hub cannot be reached.
    """
    if files:
        data: dict[str, Any] = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {k: str(path) for k, path in files.items()}},
        }
    else:
        data = {"dataset_kwargs": {"revision": revision, "trust_remote_code": False}}
    with _quiet():
        try:
            if registered in PROTOCOL:
                config = protocol_task(registered) | data
                _check_splits(name, config, files)
                task: Task = ConfigurableTask(config=config)
            elif registered == "squadv2":
                task = _Squad(data)
            else:
                manager, path = _manager(registered)
                config = load_yaml(path, resolve_func=False)
                splits = _check_splits(name, config, files)
                asked = {"task": registered, **data, **splits, **changes}
                task = manager.load({"group": "one", "task": [asked]})["tasks"][registered]
        except (DatasetsError, UndefinedError, OSError, ValueError, KeyError, TypeError) as error:
            where = ", ".join(map(str, files.values())) or "the hub"
            advice = "see that they are JSON Lines" if files else "or give them in a folder"
            raise BadInputError(
                f"the data of {name} cannot be loaded from {where}; {advice} "
                f"({' '.join(str(error).split())[:300]})"
            ) from error
    for split, rows in cast("Any", task).dataset.items():
        for field in _FIELDS.get("mmlu" if registered.startswith("mmlu_") else registered, ()):
            if field not in rows.column_names:
                raise BadInputError(
                    f"the data of {name} ({split}) have no field {field!r}; give them in the "
                    "published schema"
                )
    return task


def _manager(name: str) -> tuple[TaskManager, Path]:
    root = Path(lm_eval.tasks.__file__).parent
    folder = _FOLDERS.get("mmlu" if name.startswith("mmlu") else name)
    for manager in _managers(None if folder is None else root / folder):
        entry = manager.task_index.get(name)
        if entry is not None and entry.yaml_path is not None:
            return manager, entry.yaml_path
    raise BadInputError(
        f"lm-eval has no task {name!r}; lm-eval ls tasks lists them (one task each, no group)"
    )


def _managers(folder: Path | None) -> Iterator[TaskManager]:
    if folder is not None:
        yield TaskManager(include_path=folder, include_defaults=False)
    yield TaskManager()


def _check_splits(
    name: str, config: Mapping[str, Any], files: Mapping[str, Path]
) -> dict[str, str | None]:
    """Splits that no file holds are not asked for; the one that is measured has to be there."""
    if not files:
        return {}
    measured = config.get("test_split") or config.get("validation_split")
    if measured not in files:
        raise BadInputError(
            f"the folder of {name} has no {measured}.jsonl, on which it is measured; add that file"
        )
    return {key: None for key in _SPLITS if config.get(key) and config[key] not in files}


class _Squad(SQuAD2):
    """SQuAD 2.0 from a given place, and with a metric that needs no download."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.DATASET_PATH = data.get("dataset_path", self.DATASET_PATH)
        self._kwargs = data["dataset_kwargs"]
        super().__init__()

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        super().download({**(dataset_kwargs or {}), **self._kwargs})

    def has_training_docs(self) -> Any:
        return "train" in self.dataset

    def aggregation(self) -> dict[str, Any]:
        return {name: partial(_squad_score, name) for name in super().aggregation()}


def _squad_score(name: str, items: Sequence[Any]) -> float:
    return answer_scores(items).get(name, float("nan"))


class Answers:
    """What a model answers to requests, without an edit and under each of some.

    Edits of one layer share all passes below it.
    """

    def __init__(self, model: Model, edits: Sequence[Edit]) -> None:
        """Take the model, unedited, and the edits."""
        self.model, self.edits = model, tuple(edits)
        self.known: dict[tuple[str, str], list[Answer]] = {}

    def of(self, request: Instance) -> list[Answer]:
        """Answers without an edit, then under each."""
        return self.known[_key(request)]

    def find(self, requests: Sequence[Instance], advance: Callable[[float], None]) -> None:
        """Compute the answers to all requests.

        Args:
            requests: The requests.
            advance: Called with the share of the work that was just done.
        """
        new = {_key(each): each for each in requests if _key(each) not in self.known}
        scored = [key for key in new if key[0] != "generate_until"]
        prompts = {key: _prompts(self.model, new[key]) for key in scored}
        # Those that are about as long share a batch.
        scored.sort(key=lambda key: max((len(each.token_ids) for each in prompts[key]), default=0))
        for start in range(0, len(scored), _TOGETHER):
            some = scored[start : start + _TOGETHER]
            flat = [prompt for key in some for prompt in prompts[key]]
            by_edit = score_edits(self.model, flat, self.edits)
            places = iter(range(len(flat)))
            for key in some:
                own = [next(places) for _ in prompts[key]]
                found: list[Answer] = []
                for scores in by_edit:
                    total = -sum(scores[i].nll * len(scores[i].target_ids) for i in own)
                    greedy = all(scores[i].accuracy == 1 for i in own)
                    found.append(total if key[0] == "loglikelihood_rolling" else (total, greedy))
                self.known[key] = found
            advance(len(some) / len(new))
        generated = [key for key in new if key[0] == "generate_until"]
        views = [self.model, *(self.model.edited(edit) for edit in self.edits)]
        for key in generated:
            self.known[key] = [_generated(view, new[key]) for view in views]
            advance(1 / len(new))


def run_tasks(
    model: Model,
    edits: Sequence[Edit],
    tasks: Mapping[str, Task],
    *,
    limit: int | None,
    advance: Callable[[float], None],
) -> list[dict[str, dict[str, Any]]]:
    """Run tasks without any edit, then under each; returns lm-eval's results of each.

    Args:
        model: The model, unedited.
        edits: The edits.
        tasks: Tasks by the name that they go by.
        limit: Most items of each task.
        advance: Called with the share of the work that was just done.

    Raises:
        BadInputError: If the data of a task are not in its schema.
    """
    asked = _Asker(model)
    try:
        _evaluate(asked, tasks, limit)
    except (KeyError, TypeError, ValueError, IndexError, UndefinedError) as error:
        raise BadInputError(
            f"the data of {', '.join(tasks)} are not in the published schema "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    answers = Answers(model, edits)
    answers.find(asked.requests, advance)
    return [
        _evaluate(_Teller(model, answers, number), tasks, limit) for number in range(1 + len(edits))
    ]


def _evaluate(lm: "_OurLM", tasks: Mapping[str, Task], limit: int | None) -> Any:
    with _quiet():
        found = evaluate(
            lm, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return cast("Any", found)["results"]


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without the bars and the notes of lm-eval, which has one for each short part of the work."""
    names = ("lm_eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


class _OurLM(TemplateLM):
    """Tokenises as the model's BOS policy says."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def answer(self, request: Instance) -> Any:
        raise NotImplementedError

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:  # noqa: ARG002
        return [self.answer(each) for each in requests]

    loglikelihood_rolling = loglikelihood
    generate_until = loglikelihood

    @property
    def eot_token_id(self) -> int:
        return _start_of(self.model)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:  # noqa: ARG002
        return plain_ids(self.model, string)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Any]:
        raise NotImplementedError


class _Asker(_OurLM):
    """Keeps the requests, and gives an answer that stands for none."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.requests = list[Instance]()

    def answer(self, request: Instance) -> Answer:
        self.requests.append(request)
        blank: dict[str, Answer] = {"loglikelihood_rolling": 0.0, "generate_until": ""}
        return blank.get(request.request_type, (0.0, False))


class _Teller(_OurLM):
    """Gives the answers of one edit."""

    def __init__(self, model: Model, answers: Answers, number: int) -> None:
        super().__init__(model)
        self.answers, self.number = answers, number

    def answer(self, request: Instance) -> Answer:
        return self.answers.of(request)[self.number]


def _key(request: Instance) -> tuple[str, str]:
    return request.request_type, json.dumps(request.args, sort_keys=True, default=str)


def _start_of(model: Model) -> int:
    """What an empty context is replaced by: BOS, or what ends a text."""
    tokenizer: Any = model.tokenizer
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _prompts(model: Model, request: Instance) -> list[Prompt]:
    """A request's text with its target; of a long whole text, window by window."""
    if request.request_type == "loglikelihood_rolling":
        text = cast("tuple[str]", request.args)[0]
        windows = get_rolling_token_windows(
            token_list=plain_ids(model, text, leading=False),
            prefix_token=_start_of(model),
            max_seq_len=model.max_tokens - 1,
            context_len=1,
        )
        return [_prompt(model, *make_disjoint_window(each)) for each in windows]
    context, target = cast("tuple[str, str]", request.args)
    if not context:
        ids = plain_ids(model, target, leading=False)
        start = _start_of(model)
        return [_prompt(model, *((ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)))]
    stripped = context.rstrip()
    target = context[len(stripped) :] + target
    head, whole = plain_ids(model, stripped), plain_ids(model, stripped + target)
    return [_prompt(model, head, whole[len(head) :])]


def _prompt(model: Model, context: Sequence[int], target: Sequence[int]) -> Prompt:
    if not target:
        raise BadInputError("a task asks for a target that has no token of its own; leave it out")
    if len(target) >= model.max_tokens:
        raise BadInputError(
            f"a task asks for a target of {len(target)} tokens, and {model.name} reads at most "
            f"{model.max_tokens}; leave it out"
        )
    # Cut on the left, where the model cannot read all.
    ids = (*context, *target)[-model.max_tokens :]
    return Prompt(text="", token_ids=tuple(ids), target_length=len(target))


def _generated(view: Model, request: Instance) -> str:
    context, settings = cast("tuple[str, dict[str, Any]]", request.args)
    if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
        raise BadInputError("a task samples its answers; firsttok generates greedily only")
    until = settings.get("until") or []
    most = settings.get("max_gen_toks", settings.get("max_new_tokens", _GENERATED))
    most = min(most, view.max_tokens - 1)
    ids = plain_ids(view, context)[-(view.max_tokens - most) :]
    prompt = Prompt(text="", token_ids=tuple(ids))
    stops: Collection[str] = [until] if isinstance(until, str) else until
    return greedy_text(view, prompt, tokens=most, stops=tuple(filter(None, stops)))
