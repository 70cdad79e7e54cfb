"""Sweeps on Ray: complete and equal to the local engine's, whoever is lost on the way."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXTS, FACTS, SENTENCES, build, load_tiny

from firsttok.data import Fact
from firsttok.editing import C_ROME, ROME
from firsttok.errors import BadInputError, WorkerError
from firsttok.hyperparameters import Hyperparameters
from firsttok.measuring import Plan
from firsttok.models import BosPolicy
from firsttok.rows import FAILED, Row, read_rows, shard_paths
from firsttok.second_moment import compute_second_moment
from firsttok.study import Study
from firsttok.sweep.cluster import LIVES, RayEngine, Recipe, connected
from firsttok.sweep.engine import LocalEngine
from firsttok.sweep.runner import sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.release,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
PLAN = Plan(methods=(ROME, C_ROME))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("cluster")
    build("gpt2", folder / "model")
    model = load_tiny(folder / "model").with_bos(BosPolicy.WITHOUT)
    cached = pytest.MonkeyPatch()
    cached.setenv("FIRSTTOK_CACHE", str(folder / "cache"))
    moment = compute_second_moment(model, layer=1, corpus=SENTENCES * 4)
    cached.undo()
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=moment,
        layer=1,
        hyperparameters=Hyperparameters(steps=3),
        texts=tuple(SENTENCES),
        work=folder / "work",
    )


def facts(count: int) -> list[Fact]:
    return [
        replace(FACTS[index % 5], case_id=index, target_new=f"Rome {index}")
        for index in range(count)
    ]


def rows_in(folder: Path) -> list[Row]:
    return [row for path in shard_paths(folder) for row in read_rows(path)]


def equal(one: Sequence[Row], other: Sequence[Row]) -> None:
    assert len(one) == len(other)
    for row, expected in zip(one, other, strict=True):
        for name, value in expected.items():
            wanted = pytest.approx(value, rel=1e-5, abs=1e-9) if isinstance(value, float) else value
            assert getattr(row, name) == wanted, (row.case_id, name)


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def engine(ray: Any, study: Study, **changes: Any) -> RayEngine:
    recipe = Recipe.of(study, source=study.model.name, device="cpu")
    usual = RayEngine(ray=ray, recipe=recipe, plan=PLAN, label=study.model.label, actors=2)
    return replace(usual, **changes)


def test_a_lost_node_loses_no_row(two_nodes: Any, study: Study, tmp_path: Path) -> None:
    """One of two nodes is killed while both are at work."""
    (other,) = two_nodes.worker_nodes
    killed: list[int] = []

    cases = facts(36)
    with connected(two_nodes.address) as ray:
        two_nodes.wait_for_nodes()
        working = engine(ray, study)

        class Killing:
            """The engine, with a node lost after the second chunk."""

            def run(self, chunks: Any, *, on_facts: Any) -> Any:
                for number, done in enumerate(working.run(chunks, on_facts=on_facts)):
                    yield done
                    if number == 1:
                        two_nodes.remove_node(other, allow_graceful=False)
                        killed.append(done.index)

        assert sweep(tmp_path / "ray", cases, Killing(), size=3) == 12
    assert len(killed) == 1
    torch.set_num_threads(1)
    sweep(tmp_path / "local", cases, LocalEngine(study=study, plan=PLAN), size=3)
    equal(rows_in(tmp_path / "ray"), rows_in(tmp_path / "local"))


class Bomb(Fact):
    """A fact that no worker survives: reading it ends the process."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        """How it travels."""
        return os._exit, (1,)


def test_a_chunk_that_kills_its_workers_becomes_failed_rows(study: Study, tmp_path: Path) -> None:
    """A worker that dies is hired anew; the chunk is given up after a few."""
    cases = facts(9)
    cases[4] = Bomb(
        subject="Arthur", template="{} left", target_new="a", target_true="b", case_id=4
    )
    with connected(None) as ray:
        sweep(tmp_path / "ray", cases, engine(ray, study, actors=1), size=3)
    rows = rows_in(tmp_path / "ray")
    assert [row.case_id for row in rows] == [case.case_id for case in cases for _ in PLAN.methods]
    failed = {row.case_id: row.reason for row in rows if row.status == FAILED}
    assert failed == dict.fromkeys((3, 4, 5), f"its worker was lost {LIVES} times")


def test_what_cannot_work_is_told(study: Study, tmp_path: Path) -> None:
    with connected(None) as ray:
        wrong = replace(Recipe.of(study, source=study.model.name, device="cpu"), identity="0")
        with pytest.raises(WorkerError, match="another model than where the run was begun"):
            sweep(tmp_path / "a", facts(2), engine(ray, study, recipe=wrong))
        gone = replace(wrong, source=str(tmp_path / "gone"))
        with pytest.raises(WorkerError, match="cannot load the model"):
            sweep(tmp_path / "b", facts(2), engine(ray, study, recipe=gone))
    assert not list(shard_paths(tmp_path / "a"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "auto", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_told(address: str) -> None:
    with pytest.raises(BadInputError, match="no Ray cluster answers"), connected(address):
        pass


def test_without_workers_it_gives_up(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firsttok.sweep.cluster.PATIENCE", 3.0)
    with connected(None) as ray, pytest.raises(WorkerError, match=r"no worker with 1000 CPUs"):
        sweep(tmp_path, facts(2), engine(ray, study, cpus=1000))
