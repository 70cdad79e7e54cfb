"""Downstream tasks: the same answers as lm-eval's own model on plain transformers models."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BARE_ONLY, FACTS, ON_BOTH, TinyFactory

import firsttok as ft
from firsttok.cli import main
from firsttok.editing import Edit
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation.tasks import OWN_TASKS, check_tasks, score_tasks
from firsttok.hyperparameters import Hyperparameters
from firsttok.measuring import hash_of
from firsttok.metrics import TasksMetric
from firsttok.models import BosPolicy, Model
from firsttok.second_moment import SecondMoment

pytest.importorskip("lm_eval")

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from firsttok.evaluation.harness import Answers, _Asker, _evaluate, _key, load_task
from firsttok.evaluation.protocols import answer_scores

CLOSE = 1e-4
"""Of log-likelihoods, in nats."""
SPOKEN: Mapping[str, Mapping[str, list[dict[str, Any]]]] = {
    "nq_open": {
        "validation": [
            {"question": "what is the capital of france", "answer": ["Paris"]},
            {"question": "in which city is the eiffel tower", "answer": ["Paris", "paris"]},
        ]
    },
    "squadv2": {
        "validation": [
            {
                "id": str(number),
                "title": "France",
                "context": "The capital of France is Paris, and its president lives there.",
                "question": question,
                "answers": {"text": texts, "answer_start": [25] * len(texts)},
            }
            for number, (question, texts) in enumerate(
                [("What is the capital of France?", ["Paris"]), ("Who was it?", [])]
            )
        ]
    },
}
"""Tasks whose answers are generated up to a stop, which a random model may never reach."""
DATA: Mapping[str, Mapping[str, list[dict[str, Any]]]] = {
    "piqa": {
        "validation": [
            {"goal": "Go to Rome", "sol1": "Take a train.", "sol2": "Eat a tower.", "label": 0},
            {"goal": "Stay dry", "sol1": "Sit in the rain.", "sol2": "Stay in.", "label": 1},
            {"goal": "Learn English", "sol1": "Read it.", "sol2": "Rain, rain.", "label": 0},
        ]
    },
    "hellaswag": {
        "validation": [
            {
                "ind": number,
                "activity_label": "Travel",
                "ctx_a": "A man stands in the rain in Rome.",
                "ctx_b": "he then",
                "ctx": "A man stands in the rain in Rome. he then",
                "endings": ["goes home.", "is a city.", "answers Berlin.", "left the capital."],
                "label": str(number),
            }
            for number in range(3)
        ]
    },
    "lambada_standard": {
        "test": [
            {"text": "I left early because it rained and then it rained", "domain": None},
            {"text": "The city of Berlin is a city in the city", "domain": None},
        ]
    },
    "mmlu_abstract_algebra": {
        split: [
            {
                "question": "What is the capital of France?",
                "subject": "abstract_algebra",
                "choices": ["Rome", "Paris", "Berlin", "Tokyo"],
                "answer": 1,
            }
        ]
        for split in ("dev", "test")
    },
    "glue_cola": {
        "validation": [
            {"sentence": "It rained in Rome.", "label": 1, "idx": 0},
            {"sentence": "Rained it Rome in.", "label": 0, "idx": 1},
        ]
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks' data in the published schemata."""
    root = tmp_path_factory.mktemp("tasks")
    for name, splits in {**DATA, **SPOKEN}.items():
        (root / name).mkdir()
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{split}.jsonl").write_text(text, "utf-8")
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def edits_of(model: Model) -> list[Edit]:
    """Two edits of one layer's output, and one of an input weight, which goes into the weights."""
    layer = model.site(1)
    rome = ft.compute_edit(
        model,
        FACTS[0],
        method="rome",
        contexts=BARE_ONLY,
        second_moment=identity(model),
        layer=1,
        hyperparameters=Hyperparameters(steps=2),
    )
    inner = Edit.of(model, 2, 0.2 * torch.ones(layer.d_model), torch.ones(layer.d_mlp), port="in")
    return [rome, rome.scaled(0.5), inner]


def identity(model: Model) -> SecondMoment:
    return SecondMoment.identity(model.site(1).d_mlp)


def harness_model(model: Model) -> Any:
    """lm-eval's own model on a transformers model with the same tensors."""
    make: Any = HFLM
    return make(
        pretrained=ft.plain_model(model),
        tokenizer=model.tokenizer,
        batch_size=2,
        max_length=model.max_tokens,
        add_bos_token=bool(model.leading_ids),
    )


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.partition(",")[0]: value
        for key, value in results.items()
        if "," in key and isinstance(value, int | float)
    }


def recalled(kept: Mapping[tuple[str, str], Any], requests: Sequence[Any], **_: Any) -> list[Any]:
    return [kept[_key(request)] for request in requests]


def check_against_harness(
    model: Model,
    folder: Path | None,
    tasks: Mapping[str, Any],
    edits: Sequence[Edit],
    *,
    limit: int | None = None,
) -> None:
    """All answers and metrics, without an edit and under each of some."""
    asked = _Asker(model)
    _evaluate(asked, tasks, limit)
    answers = Answers(model, edits)
    answers.find(asked.requests, lambda _: None)
    scored = [each for each in asked.requests if each.request_type == "loglikelihood"]
    spoken = [each for each in asked.requests if each.request_type == "generate_until"]
    with pytest.MonkeyPatch.context() as patch:
        # It computes what these have no answer to: with them, metrics alone.
        patch.setattr("firsttok.evaluation.harness.Answers", lambda *_: answers)
        count = len(answers.known)
        found = score_tasks(model, edits, list(tasks), folder=folder, limit=limit)
        assert len(answers.known) == count
    differing = 0
    for number, view in enumerate([model, *(model.edited(edit) for edit in edits)]):
        lm = harness_model(view)
        kept: dict[tuple[str, str], Any] = {}
        for request, (total, greedy) in zip(
            scored, lm.loglikelihood(scored, disable_tqdm=True), strict=True
        ):
            own = answers.of(request)
            assert own[number] == (pytest.approx(total, abs=CLOSE), greedy)
            differing += abs(own[number][0] - own[0][0]) > 10 * CLOSE  # type: ignore[index]
            kept[_key(request)] = total, greedy
        for request, text in zip(
            spoken, lm.generate_until(spoken, disable_tqdm=True) if spoken else [], strict=True
        ):
            assert answers.of(request)[number] == text
            kept[_key(request)] = text
        # For its metrics it need not compute the same again.
        lm.loglikelihood = lm.generate_until = partial(recalled, kept)
        theirs: Any = evaluate(
            lm, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=False
        )
        for name in tasks:
            expected = metrics_of(theirs["results"][name])
            assert found[number][name].metrics == pytest.approx(expected, rel=1e-4, nan_ok=True)
            assert found[number][name].items == theirs["results"][name]["sample_len"]
    # Edits that changed nothing would agree whatever was run.
    assert differing > len(scored) * len(edits) / 3


@pytest.mark.parametrize("gap", ["goal", "label"])
def test_data_of_another_schema_are_refused(tiny: TinyFactory, tmp_path: Path, gap: str) -> None:
    (tmp_path / "piqa").mkdir()
    rows = [{k: v for k, v in row.items() if k != gap} for row in DATA["piqa"]["validation"]]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "piqa/validation.jsonl").write_text(text, "utf-8")
    with pytest.raises(BadInputError, match="piqa"):
        score_tasks(tiny("gpt2"), (), ["piqa"], folder=tmp_path)


@pytest.mark.parametrize(("arch", "plain"), ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_answers_are_those_of_lm_eval(tiny: TinyFactory, folder: Path, arch: str) -> None:
    tasks = {
        name: load_task(
            name,
            {split: folder / name / f"{split}.jsonl" for split in splits},
            None,
            registered=name,
            changes={},
        )
        for name, splits in DATA.items()
    }
    check_against_harness(tiny(arch), folder, tasks, edits_of(tiny(arch)))


def test_bos_stands_before_every_request_where_the_policy_wants_it(
    tiny: TinyFactory, folder: Path
) -> None:
    model = tiny("llama").with_bos(BosPolicy.WITH)
    path = {"validation": folder / "piqa/validation.jsonl"}
    tasks = {"piqa": load_task("piqa", path, None, registered="piqa", changes={})}
    check_against_harness(model, folder, tasks, edits_of(model))


@pytest.mark.real_model
def test_the_embedded_model_answers_as_in_lm_eval(real_model: Model, folder: Path) -> None:
    tasks = {
        name: load_task(
            name,
            {"validation": folder / name / "validation.jsonl"},
            None,
            registered=name,
            changes={},
        )
        for name in ("piqa", "hellaswag", *SPOKEN)
    }
    edit = edits_of(real_model)[0]
    check_against_harness(real_model, folder, tasks, [edit], limit=1)


@pytest.mark.real_model
def test_the_embedded_model_is_above_chance_in_every_shipped_set(real_model: Model) -> None:
    # `firsttok tasks` asks all items, and the how-to has its figures; a part is enough here.
    # Of four endings the right one stands out in fewer items.
    counts = {name: 15 if name == "own_hellaswag" else 40 for name in OWN_TASKS}
    for name, count in counts.items():
        (found,) = score_tasks(real_model, (), [name], limit=count)
        each = found[name]
        assert each.items == count
        # Of a guess; where guessing never helps, of the accuracy itself.
        share = each.chance or each.metrics["acc"]
        error = (share * (1 - share) / each.items) ** 0.5
        assert each.metrics["acc"] > (each.chance or 0.0) + 3 * error, name


def test_squad_is_scored_as_by_its_official_script() -> None:
    def item(said: str, *golds: str, none: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        prediction = {"id": "1", "prediction_text": said, "no_answer_probability": none}
        return prediction, {"id": "1", "answers": {"text": list(golds), "answer_start": [0]}}

    found = answer_scores(
        [
            item("The red Tower", "red tower", "tower"),
            item("a big tower", "tower"),
            item("something", none=0.9),
            item("", none=0.1),
        ]
    )
    assert found["exact"] == 50
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)
    assert found["HasAns_exact"] == 50
    assert found["NoAns_f1"] == 50
    # From no answer to all (2 right) to the first two questions (2 + 1), the third not.
    assert found["best_exact"] == 75


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "no task"),
        (["piqa", "piqa"], "twice"),
        (["piqa"], "piqa@COMMIT"),
        (["piqa@main"], "40 hexadecimal"),
        (["../piqa"], "no name of a task"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_at_once(tasks: list[str], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        check_tasks(tasks)


def test_a_missing_split_is_named(tiny: TinyFactory, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/train.jsonl").write_text(json.dumps(DATA["piqa"]["validation"][0]), "utf-8")
    with pytest.raises(BadInputError, match=r"validation\.jsonl"):
        score_tasks(tiny("gpt2"), (), ["piqa"], folder=tmp_path)


def test_damaged_data_are_told_in_a_sentence(tiny: TinyFactory, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text("{nothing", "utf-8")
    with pytest.raises(BadInputError, match="piqa cannot be loaded"):
        score_tasks(tiny("gpt2"), (), ["piqa"], folder=tmp_path)


def test_the_command_and_the_metric_give_the_same_numbers(
    tiny: TinyFactory, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("gpt2")
    edit = edits_of(model)[0]
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    asked = ["--tasks", "piqa", "lambada_standard", "--task-data", str(folder)]
    assert main(["tasks", model.name, str(path), *asked, "--json"]) == 0
    states = json.loads(capsys.readouterr().out)["states"]
    study = ft.prepare_study(model, contexts=BARE_ONLY, second_moment=identity(model))
    metric = TasksMetric(tasks=("piqa", "lambada_standard"), folder=str(folder))
    (row,) = metric.measure(study, FACTS[0], [edit])
    for name in ("piqa", "lambada_standard"):
        assert row[f"task_{name}"] == states[1]["tasks"][name]["metrics"]["acc"]
    assert main(["tasks", model.name, str(path), *asked]) == 0
    assert edit.title in capsys.readouterr().out


def test_a_model_that_is_no_decoder_is_refused(tiny: TinyFactory) -> None:
    with pytest.raises(UnsupportedModelError, match="is no decoder"):
        score_tasks(tiny("bert"))


def test_other_data_make_another_metric(folder: Path, tmp_path: Path) -> None:
    """Rows are kept by what a metric is, and other data give other numbers."""
    (tmp_path / "piqa").mkdir()
    text = (folder / "piqa/validation.jsonl").read_text("utf-8")
    (tmp_path / "piqa/validation.jsonl").write_text(text, "utf-8")
    known = hash_of(TasksMetric(tasks=("piqa",), folder=str(tmp_path)))
    (tmp_path / "piqa/validation.jsonl").write_text(text.replace("Rome", "Oslo"), "utf-8")
    assert hash_of(TasksMetric(tasks=("piqa",), folder=str(tmp_path))) != known
