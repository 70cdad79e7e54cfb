"""No state of a model passes for another one: what is kept goes by the identity of a view."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXTS, FACTS, SENTENCES, build, load_tiny

from firsttok import contexts as contexts_module
from firsttok.contexts import kept_contexts
from firsttok.editing import C_ROME, ROME, RankOneEdit, compute_edit
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import IntervenedKeys, capture_keys
from firsttok.models import BosPolicy, Model
from firsttok.probes import SECOND2FIRST, SeesItself
from firsttok.second_moment import SecondMoment, compute_second_moment
from firsttok.study import Study, measure_facts

LAYER = 2
STEPS = 3
LENGTHS = (3,)
"""Of sampled prefixes: a few tokens are enough to tell models apart."""


def strong_edit(model: Model, fact: int = 0, *, layer: int = LAYER) -> RankOneEdit:
    """An edit that shows in every number."""
    edit = compute_edit(
        model,
        FACTS[fact],
        method=ROME,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(layer).d_mlp),
        layer=layer,
        hyperparameters=Hyperparameters(steps=STEPS),
    )
    return replace(edit, right=3 * edit.right)


def measured(model: Model, cache: Path) -> dict[str, list[float]]:
    """Every kept thing of a model, as numbers, through a cache that others may have filled."""
    contexts = kept_contexts(model, seed=3)
    moment = compute_second_moment(model, layer=LAYER, corpus=SENTENCES * 12)
    study = Study(
        model=model,
        contexts=replace(contexts, templates=contexts.templates[:4]),
        second_moment=moment,
        layer=LAYER,
        hyperparameters=replace(model.hyperparameters, steps=STEPS),
        texts=SENTENCES,
        work=cache / "work",
    )
    study.keep_original_perplexity()
    fact = replace(FACTS[0], case_id=1)
    ((_, edits),) = study.edits([fact], [ROME, C_ROME])
    rows = measure_facts(study, [fact], [ROME, C_ROME])
    probed = study.varied(
        key_source=IntervenedKeys(name="closed", interventions=(SeesItself(position=1),))
    )
    ((_, through),) = probed.edits([fact], [ROME])
    return {
        "contexts": [float(sum(map(ord, "".join(contexts.templates))))],
        "second moment": moment.matrix.flatten().tolist(),
        "keys": capture_keys(model, fact, layers=[LAYER]).values.flatten().tolist(),
        "values": [x for m in ("rome", "c-rome") for x in edits[m].right.tolist()],
        "values of a probe": through["rome"].right.tolist(),
        "losses": list(edits["rome"].losses),
        "rows": [x for row in rows for x in (row.denominator, row.perplexity, row.final_loss)],
        "original perplexity": list(study.original_perplexity.per_sentence),
        "prepared texts": list(
            study.prepared_texts.measure_edits(model, [edits["rome"]])[0].per_sentence
        ),
    }


def differences(
    found: dict[str, list[float]], expected: dict[str, list[float]]
) -> dict[str, float]:
    """Relative difference of each kept thing."""
    return {
        name: math.dist(found[name], expected[name]) / math.hypot(*expected[name])
        for name in expected
    }


@contextlib.contextmanager
def plain(model: Model) -> Iterator[Model]:
    yield model


@contextlib.contextmanager
def applied(model: Model) -> Iterator[Model]:
    with strong_edit(model, layer=1).applied(model):
        yield model


@contextlib.contextmanager
def applied_at_the_layer(model: Model) -> Iterator[Model]:
    with strong_edit(model).applied(model):
        yield model


@contextlib.contextmanager
def applied_above(model: Model) -> Iterator[Model]:
    with strong_edit(model, layer=3).applied(model) as view:
        yield view


@contextlib.contextmanager
def nested(model: Model) -> Iterator[Model]:
    with strong_edit(model, layer=1).applied(model), strong_edit(model, 2).applied(model):
        yield model


@contextlib.contextmanager
def edited(model: Model) -> Iterator[Model]:
    yield model.edited(strong_edit(model, layer=1), strong_edit(model, 2, layer=3))


@contextlib.contextmanager
def in_place(model: Model) -> Iterator[Model]:
    done = strong_edit(model, layer=1).apply_(model)
    try:
        yield model
    finally:
        done.undo_()


@contextlib.contextmanager
def by_hand(model: Model) -> Iterator[Model]:
    """Changed past everything but the values themselves."""
    weight = model.site(1).weight
    before = weight.data.clone()
    weight.data.mul_(1.5)
    try:
        yield model
    finally:
        weight.data.copy_(before)


@contextlib.contextmanager
def hooked(model: Model) -> Iterator[Model]:
    def halve(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation / 2

    bridge: Any = model.bridge
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_out", halve)]):
        yield model


@contextlib.contextmanager
def autocast(model: Model) -> Iterator[Model]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield model


@contextlib.contextmanager
def behind_bos(model: Model) -> Iterator[Model]:
    yield model.with_bos(BosPolicy.WITHOUT if model.leading_ids else BosPolicy.WITH)


@contextlib.contextmanager
def swapped(model: Model) -> Iterator[Model]:
    yield model.intervened(SECOND2FIRST)


STATES: dict[str, Callable[[Model], contextlib.AbstractContextManager[Model]]] = {
    "applied": applied,
    "applied at the layer": applied_at_the_layer,
    "applied above": applied_above,
    "nested": nested,
    "edited": edited,
    "in place": in_place,
    "by hand": by_hand,
    "hooked": hooked,
    "autocast": autocast,
    "BOS": behind_bos,
    "positions swapped": swapped,
}
FOLDERS = ("plain", "rope", "tokenizer", "epsilon")
"""Folders of the same weights."""


def make_folders(root: Path, arch: str) -> None:
    """The same weights, with another angle, another norm or another tokenizer."""
    build(arch, root / "plain")
    for name in FOLDERS[1:]:
        shutil.copytree(root / "plain", root / name)
    change_json(root / "rope" / "config.json", "rope_theta", 50.0)
    change_json(root / "epsilon" / "config.json", "rms_norm_eps", 0.3)
    change_json(root / "epsilon" / "config.json", "layer_norm_epsilon", 0.3)
    path = root / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    one, other = "Ġis", "Ġthe"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content), "utf-8")


def change_json(path: Path, key: str, value: float) -> None:
    """Change a field wherever it is."""

    def changed(part: Any) -> Any:
        if isinstance(part, dict):
            return {k: value if k == key else changed(v) for k, v in part.items()}
        return part

    path.write_text(json.dumps(changed(json.loads(path.read_text("utf-8")))), "utf-8")


def under_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRSTTOK_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_every_kept_number_is_that_of_an_empty_cache(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_module, "LENGTHS", LENGTHS)
    make_folders(tmp_path / "models", arch)
    expected: dict[str, dict[str, list[float]]] = {}

    def of_state(model: Model, state: str, cache: str) -> dict[str, list[float]]:
        with STATES.get(state, plain)(model) as view:
            return measured(view, under_cache(tmp_path / cache, monkeypatch))

    for state in (*STATES, *FOLDERS):
        folder = state if state in FOLDERS else "plain"
        model = load_tiny(tmp_path / "models" / folder)
        expected[state] = of_state(model, state, f"empty {state}")
    # Another process fills a cache with all states; this one then finds them there.
    there = json.loads(
        subprocess.run(
            [sys.executable, __file__, str(tmp_path / "models"), str(tmp_path / "shared")],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "FIRSTTOK_CACHE": str(tmp_path / "shared"),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    models = {name: load_tiny(tmp_path / "models" / name) for name in FOLDERS}
    for state in ("plain", *STATES, *FOLDERS, "plain"):
        model = models[state if state in FOLDERS else "plain"]
        found = of_state(model, state, "shared")
        assert max(differences(found, expected[state]).values()) < 1e-6, (
            state,
            differences(found, expected[state]),
        )
        assert max(differences(there[state], expected[state]).values()) < 1e-6, state
    # The states are states: none of them has the numbers of the plain model by chance.
    for state in (*STATES, *FOLDERS[1:]):
        if state != "rope" or arch == "llama":
            assert max(differences(expected[state], expected["plain"]).values()) > 1e-3, state


def main(root: Path, cache: Path) -> None:
    contexts_module.LENGTHS = LENGTHS
    found: dict[str, Any] = {}
    for name in FOLDERS:
        found[name] = measured(load_tiny(root / name), cache)
    model = load_tiny(root / "plain")
    for state, enter in STATES.items():
        with enter(model) as view:
            found[state] = measured(view, cache)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
