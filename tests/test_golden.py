"""The embedded model against what the paper's released code computed on it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import edits_of, relative

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import C_ROME, ROME, Edit, ValueStore
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model
from firsttok.second_moment import SecondMoment, load_second_moment

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

METHODS = {"rome": ROME, "c_rome": C_ROME}
CASES = [
    f"case{case}.{method}.{kind}"
    for case in range(6)
    for method in METHODS
    for kind in ("mom2", "identity")
    if kind == "mom2" or case < 2
]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What the released code returned, and what firsttok returns for the same requests."""

    records: dict[str, dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    edits: dict[str, Edit]


def setting(content: dict[str, Any]) -> Hyperparameters:
    """The released code's hyperparameters."""
    given = content["hparams"]
    return Hyperparameters(
        steps=given["v_num_grad_steps"],
        learning_rate=float(given["v_lr"]),
        weight_decay=float(given["v_weight_decay"]),
        clamp=float(given["clamp_norm_factor"]),
        kl=float(given["kl_factor"]),
    )


def computed(
    folder: Path,
    content: dict[str, Any],
    real_model: Model,
    work: Path,
    *,
    cases: Sequence[str],
    kinds: Sequence[str] = ("mom2", "identity"),
    methods: Sequence[str] = tuple(METHODS),
    **settings: Any,
) -> dict[str, Edit]:
    """firsttok's edits for some of the released code's requests."""
    model = real_model.with_bos(BosPolicy.WITHOUT)
    layer = int(content["layer"])
    d_mlp = model.site(layer).d_mlp
    facts = {
        key.split(".")[0]: Fact(
            subject=record["subject"],
            template=record["prompt"],
            target_new=record["target_new"],
            target_true="unknown",
        )
        for record in content["cases"]
        if (key := record["key"]).split(".")[0] in cases
    }
    edits: dict[str, Edit] = {}
    for kind in kinds:
        moment = SecondMoment.identity(d_mlp)
        if kind == "mom2":
            path = folder / "second_moment_layer15.safetensors"
            moment = load_second_moment(path, d_mlp=d_mlp)
        found = edits_of(
            model,
            list(facts.values()),
            methods=[METHODS[name] for name in methods],
            contexts=ContextSet(templates=tuple(content["templates"])),
            second_moment=moment,
            layer=layer,
            hyperparameters=replace(setting(content), **settings),
            store=ValueStore(work),
        )
        for case, (_, by_method) in zip(facts, found, strict=True):
            for name in methods:
                edits[f"{case}.{name}.{kind}"] = by_method[METHODS[name].name]
    return edits


@pytest.fixture(scope="module")
def golden(shared: Path, real_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = shared / "golden"
    content: dict[str, Any] = json.loads((folder / "released_code.json").read_text("utf-8"))
    records: dict[str, dict[str, Any]] = {record["key"]: record for record in content["cases"]}
    cases = [f"case{case}" for case in range(6)]
    work = tmp_path_factory.mktemp("values")
    return Golden(
        records=records,
        tensors=load_file(folder / "released_code.safetensors"),
        edits=computed(folder, content, real_model, work, cases=cases),
    )


def test_every_released_case_is_tested(golden: Golden) -> None:
    assert sorted(CASES) == sorted(golden.records)
    assert {f"{case}.{side}" for case in CASES for side in ("left", "right")} <= set(golden.tensors)


@pytest.mark.parametrize("case", CASES)
def test_left_vectors_are_the_released_ones(golden: Golden, case: str) -> None:
    found = golden.edits[case].left
    assert relative(found, golden.tensors[f"{case}.left"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_released_ones(golden: Golden, case: str) -> None:
    losses = golden.edits[case].losses
    expected = golden.records[case]["losses"]
    assert len(losses) == len(expected)
    assert losses == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_components_are_the_released_ones(golden: Golden, case: str) -> None:
    report, record = golden.edits[case].report, golden.records[case]
    assert abs(report["denominator"]) == pytest.approx(record["denominator_abs"], rel=0.01)
    assert report["numerator"] == pytest.approx(record["numerator_norm"], rel=0.01)


@pytest.mark.parametrize("case", CASES)
def test_right_vectors_are_the_released_ones(golden: Golden, case: str) -> None:
    assert relative(golden.edits[case].right, golden.tensors[f"{case}.right"]) < 0.01


def test_the_plain_paths_begin_in_the_same_way(
    shared: Path, real_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRSTTOK_PLAIN", "1")
    folder = shared / "golden"
    content: dict[str, Any] = json.loads((folder / "released_code.json").read_text("utf-8"))
    tensors = load_file(folder / "released_code.safetensors")
    records = {record["key"]: record for record in content["cases"]}
    # A whole pass for each step is slow: the first two hold a forward and a backward pass.
    found = computed(
        folder,
        content,
        real_model,
        tmp_path,
        cases=["case0"],
        kinds=["identity"],
        methods=["rome"],
        steps=2,
    )
    (case,) = found
    assert relative(found[case].left, tensors[f"{case}.left"]) < 1e-4
    assert found[case].losses == pytest.approx(records[case]["losses"][:2], abs=2e-3)
