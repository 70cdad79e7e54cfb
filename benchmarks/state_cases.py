"""Benchmarks of many states of one model: sequences side by side, tasks under many edits."""

import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import Extras, Plan, Side
from pass_cases import random_edits
from setting import Setting
from tolerances import Difference, judge

import firsttok as ft
from firsttok.editing import C_ROME, FC_ROME, P_ROME, ROME
from firsttok.evaluation import OWN_TASKS, TaskScores, score_tasks
from firsttok.sequences import EditSequence, SequencePlan, SequenceRun, run_sequences

__all__ = ["downstream_tasks", "sequences"]

METHODS = (ROME, C_ROME, P_ROME, FC_ROME)
TASKS = OWN_TASKS


def sequences(setting: Setting) -> Plan:
    """Four methods in two orders, side by side and one after another."""
    setting.prepare()
    facts = tuple(setting.facts[: setting.amounts.sequence_steps])
    orders = {"given": facts, "reversed": facts[::-1]}
    every = [
        EditSequence(name=f"{method.name}-{order}", facts=own, editor=method)
        for (order, own), method in product(orders.items(), METHODS)
    ]
    plan = SequencePlan(metrics=("perplexity", "scores"), retained=("scores",), every=len(facts))
    study = ft.prepare_study(
        setting.model,
        contexts=setting.contexts,
        second_moment=setting.moment,
        layer=setting.layer,
        hyperparameters=setting.hyperparameters,
    )

    def together(groups: Sequence[Sequence[EditSequence]]) -> dict[str, list[torch.Tensor]]:
        found: dict[str, list[torch.Tensor]] = {}
        for group in groups:
            with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
                runs = run_sequences(folder, study, group, plan=plan)
                found |= {name: _lefts(run) for name, run in runs.items()}
        return found

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        pairs = [
            (one, other)
            for name, own in results["side by side"].items()
            for one, other in zip(own, results["one after another"][name], strict=True)
        ]
        worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        return judge(
            "Largest relative difference between the two ways",
            Difference(of="a left vector", found=worst, allowed=1e-5),
        )

    count = len(every) * len(facts)
    alone = [[each] for each in every]
    return Plan(
        sides=(
            Side(label="side by side", run=lambda: together([every]), items=count, unit="edit"),
            Side(label="one after another", run=lambda: together(alone), items=count, unit="edit"),
        ),
        pairs=(
            ("eight sequences, against one after another", "side by side", "one after another"),
        ),
        warm=lambda: None,
        check=check,
    )


def _lefts(run: SequenceRun) -> list[torch.Tensor]:
    files = [run.folder / "edits" / f"{row.step:04d}.safetensors" for row in run.written]
    return [ft.load_edit(Path(path)).left for path in files]


def downstream_tasks(setting: Setting) -> Plan:
    """Shipped tasks under many edits, against lm-eval's own model edit by edit."""
    setting.prepare()
    model, limit = setting.model, setting.amounts.items
    edits = random_edits(setting, setting.amounts.task_edits)
    slow = edits[: setting.amounts.naive_edits]

    def fast() -> list[dict[str, TaskScores]]:
        return score_tasks(model, edits, TASKS, limit=limit)

    def harness() -> list[dict[str, dict[str, float]]]:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        from firsttok.evaluation.harness import _quiet
        from firsttok.evaluation.tasks import load_tasks

        make: Any = HFLM
        found: list[dict[str, dict[str, float]]] = []
        tasks = load_tasks(TASKS)
        for edit in slow:
            plain = ft.plain_model(model.edited(edit))
            with _quiet():
                lm = make(pretrained=plain, tokenizer=model.tokenizer, batch_size=16)
                given: Any = {"tasks": tasks}
                run: Any = evaluate(lm, given, limit=limit, bootstrap_iters=0, log_samples=False)
            found.append(run["results"])
        return found

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        worst = max(
            abs(mine[name].metrics["acc"] - theirs[name]["acc,none"])
            for mine, theirs in zip(results["together"][1:], results["lm-eval"], strict=False)
            for name in TASKS
        )
        return judge(
            "Largest difference from lm-eval's own model",
            Difference(of="an accuracy", found=worst, allowed=0.0),
        )

    return Plan(
        sides=(
            Side(label="together", run=fast, items=len(edits), unit="edit"),
            Side(label="lm-eval", run=harness, items=len(slow), unit="edit"),
        ),
        pairs=(("downstream tasks under many edits", "together", "lm-eval"),),
        warm=lambda: None,
        check=check,
    )
