"""No state of a model passes for another one: what is kept goes by the identity of a view."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory, build, load_tiny

from firsttok import contexts as contexts_module
from firsttok.contexts import kept_contexts
from firsttok.editing import C_ROME, ROME, Edit, compute_edit
from firsttok.errors import BadInputError, EditMismatchError, ViewError
from firsttok.evaluation import perplexity, prepare_texts
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import IntervenedKeys, capture_keys, keys_at
from firsttok.measuring import measure_facts
from firsttok.models import BosPolicy, Model
from firsttok.probes import SECOND2FIRST, SeesItself
from firsttok.prompts import pad, text_prompt
from firsttok.provenance import described
from firsttok.second_moment import SecondMoment, compute_second_moment
from firsttok.study import Study
from firsttok.sweep.local_run import sweep_facts
from firsttok.tensors import TokenBatch

LAYER = 2
STEPS = 3
LENGTHS = (3,)
"""Of sampled prefixes: a few tokens are enough to tell models apart."""


def strong_edit(model: Model, fact: int = 0, *, layer: int = LAYER) -> Edit:
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
    return edit.scaled(3)


Numbers = dict[str, list[float]]


def measured(model: Model, cache: Path) -> Numbers:
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


def differences(found: Numbers, expected: Numbers, *, least: float = 1e-6) -> dict[str, float]:
    """Relative difference of each kept thing that differs by so much at least."""
    all_of_them = {
        name: math.dist(found[name], expected[name]) / math.hypot(*expected[name])
        for name in expected
    }
    return {name: value for name, value in all_of_them.items() if not value < least}


@contextlib.contextmanager
def plain(model: Model) -> Generator[Model, None, None]:
    yield model


@contextlib.contextmanager
def applied(model: Model) -> Generator[Model, None, None]:
    with strong_edit(model, layer=1).applied(model):
        yield model


@contextlib.contextmanager
def applied_at_the_layer(model: Model) -> Generator[Model, None, None]:
    with strong_edit(model).applied(model):
        yield model


@contextlib.contextmanager
def applied_above(model: Model) -> Generator[Model, None, None]:
    with strong_edit(model, layer=3).applied(model) as view:
        yield view


@contextlib.contextmanager
def nested(model: Model) -> Generator[Model, None, None]:
    with strong_edit(model, layer=1).applied(model), strong_edit(model, 2).applied(model):
        yield model


@contextlib.contextmanager
def edited(model: Model) -> Generator[Model, None, None]:
    yield model.edited(strong_edit(model, layer=1), strong_edit(model, 2, layer=3))


@contextlib.contextmanager
def in_place(model: Model) -> Generator[Model, None, None]:
    done = strong_edit(model, layer=1).apply_(model)
    try:
        yield model
    finally:
        done.undo_()


@contextlib.contextmanager
def by_hand(model: Model) -> Generator[Model, None, None]:
    """Changed past everything but the values themselves."""
    weight = model.site(1).weight
    before = weight.data.clone()
    weight.data.mul_(1.5)
    try:
        yield model
    finally:
        weight.data.copy_(before)


@contextlib.contextmanager
def hooked(model: Model) -> Generator[Model, None, None]:
    def halve(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation / 2

    bridge: Any = model.bridge
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_out", halve)]):
        yield model


@contextlib.contextmanager
def autocast(model: Model) -> Generator[Model, None, None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield model


@contextlib.contextmanager
def behind_bos(model: Model) -> Generator[Model, None, None]:
    yield model.with_bos(BosPolicy.WITHOUT if model.leading_ids else BosPolicy.WITH)


@contextlib.contextmanager
def swapped(model: Model) -> Generator[Model, None, None]:
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
STATES_OF = {
    "llama": tuple(STATES),
    "gpt2": ("applied", "by hand", "hooked", "BOS", "positions swapped"),
}
"""Of the second architecture, those that another layout of weights, learnt positions or a tokenizer
without BOS could decide otherwise."""
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


def in_state(model: Model, state: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Numbers:
    """The kept things of a model in a state, through a cache."""
    monkeypatch.setenv("FIRSTTOK_CACHE", str(cache))
    with STATES.get(state, plain)(model) as view:
        return measured(view, cache)


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A cache that another process filled with all states of all models."""

    models: Path
    cache: Path
    numbers: dict[str, dict[str, Numbers]]
    """What that process found, by architecture and state."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    root = tmp_path_factory.mktemp("identity")
    for arch in STATES_OF:
        make_folders(root / arch, arch)
    cache = root / "shared"
    command = [sys.executable, __file__, str(root), str(cache)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "FIRSTTOK_CACHE": str(cache)}
    done = subprocess.run(
        command, env={**os.environ, **paths}, capture_output=True, text=True, check=True
    )
    return Filled(models=root, cache=cache, numbers=json.loads(done.stdout))


@pytest.mark.parametrize("arch", STATES_OF)
def test_every_kept_number_is_that_of_an_empty_cache(
    arch: str, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_module, "LENGTHS", LENGTHS)
    states = STATES_OF[arch]
    expected: dict[str, Numbers] = {}
    for state in (*states, *FOLDERS):
        model = load_tiny(filled.models / arch / (state if state in FOLDERS else "plain"))
        expected[state] = in_state(model, state, tmp_path / f"empty {state}", monkeypatch)
    assert filled.numbers[arch].keys() == expected.keys()
    for state, found in filled.numbers[arch].items():
        assert differences(found, expected[state]) == {}, state
    models = {name: load_tiny(filled.models / arch / name) for name in FOLDERS}
    for state in ("plain", *states, *FOLDERS):
        model = models[state if state in FOLDERS else "plain"]
        found = in_state(model, state, filled.cache, monkeypatch)
        assert differences(found, expected[state]) == {}, state
    # They are states: none of them has the numbers of the plain model by chance.
    for state in (*states, *FOLDERS[1:]):
        if state != "rope" or arch == "llama":
            assert differences(expected[state], expected["plain"], least=1e-3), state


@pytest.mark.slow
@pytest.mark.real_model
def test_kept_numbers_of_the_embedded_model_are_those_of_an_empty_cache(
    real_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_module, "LENGTHS", LENGTHS)
    # Tiny models show every state; what is kept of this one is as large as a user has it.
    states = ("plain", "applied")
    fresh = {s: in_state(real_model, s, tmp_path / s, monkeypatch) for s in states}
    # The cache of the one now gets the other, and then has both.
    for state in reversed(states):
        found = in_state(real_model, state, tmp_path / "plain", monkeypatch)
        assert differences(found, fresh[state]) == {}, state
    assert differences(fresh["applied"], fresh["plain"], least=1e-3)


@dataclass(frozen=True)
class Shift:
    """An intervention of a user's, whose name does not say all."""

    by: torch.Tensor
    name: str = "shift"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return batch


class Closed:
    """Another, without fields to its name."""

    name = "closed"

    def __init__(self, position: int) -> None:
        self.position = position

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return SeesItself(position=self.position)(batch)


class ClosedBehind(Closed):
    """The same fields, another code."""

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return SeesItself(position=self.position + 1)(batch)


class Held:
    """Holds what nobody can describe."""

    name = "held"

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return batch


def test_an_intervention_is_known_by_what_it_does(tiny: TinyFactory) -> None:
    model = tiny("llama")
    long, other = torch.zeros(5000), torch.zeros(5000)
    other[2500] = 1
    assert repr(long) == repr(other)
    different = [
        Shift(long),
        Shift(other),
        Shift(long, name="other"),
        Closed(1),
        Closed(2),
        ClosedBehind(1),
        SeesItself(position=1),
        SeesItself(position=2),
        SECOND2FIRST,
    ]
    identities = [model.intervened(each).identity() for each in different]
    assert len({model.identity(), *identities}) == 1 + len(different)
    assert model.intervened(Closed(1)).identity() == identities[3]
    assert model.intervened(Shift(long.clone())).identity() == identities[0]
    assert model.base_identity() == model.intervened(Closed(1)).base_identity()
    assert all(model.intervened(each).disturbance is None for each in different)


FACTOR = 2


def scaled(value: int) -> int:
    return value * FACTOR


class Reading:
    """Reads a global through a function, as code in a notebook does."""

    name = "reading"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return SeesItself(position=scaled(1))(batch)


class WithSet(Closed):
    """Has a member that is no plain value."""

    members = frozenset({1})


@dataclass(frozen=True)
class Bare:
    """A dataclass without fields, whose subclass sets something of its own."""

    name = "bare"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return batch


class Own(Bare):
    def __init__(self, value: int) -> None:
        object.__setattr__(self, "value", value)


def test_what_code_reads_from_elsewhere_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [described(Reading()), described(WithSet(1))]
    monkeypatch.setitem(globals(), "FACTOR", 3)
    monkeypatch.setattr(WithSet, "members", frozenset({2}))
    after = [described(Reading()), described(WithSet(1))]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert described(Own(1)) != described(Own(2))
    large = torch.tensor([2**53]), torch.tensor([2**53 + 1])
    assert described(large[0]) != described(large[1])
    turned = torch.tensor([1 + 1j]), torch.tensor([1 + 2j])
    assert described(turned[0]) != described(turned[1])


def test_what_cannot_be_described_is_not_kept(tiny: TinyFactory, tmp_path: Path) -> None:
    view = tiny("llama").intervened(Held())
    assert "of unknown content" in str(view.disturbance)
    study = study_of(view, tmp_path)
    measure_facts(study, [FACTS[0]], [ROME])
    study.keep_original_perplexity()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def study_of(model: Model, work: Path) -> Study:
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(LAYER).d_mlp),
        layer=LAYER,
        hyperparameters=replace(model.hyperparameters, steps=STEPS),
        texts=SENTENCES[:2],
        work=work,
    )


def test_identity_below_a_layer_leaves_out_what_its_keys_do_not_see(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    below = [model.identity(layer) for layer in range(model.n_layers)]
    for layer in range(model.n_layers):
        with strong_edit(model, layer=layer).applied(model):
            now = [model.identity(each) for each in range(model.n_layers)]
            assert [a == b for a, b in zip(now, below, strict=True)] == [
                each <= layer for each in range(model.n_layers)
            ]
    for layer in range(model.n_layers):
        site = model.site(layer)
        attention = model.weights.bridge.blocks[layer].attn.o.weight
        for weight in (site.weight, site.bias, attention):
            assert weight is not None
            kept = weight.detach().clone()
            weight.data.add_(1)
            changed = [a != b for a, b in zip(map(model.identity, range(4)), below, strict=True)]
            weight.data.copy_(kept)
            first = layer + (weight is site.weight or weight is site.bias)
            assert changed == [each >= first for each in range(4)]


def test_a_weight_that_was_put_back_is_as_loaded(tiny: TinyFactory) -> None:
    model = tiny("llama")
    before = model.identity()
    weight = model.site(1).weight
    kept = weight.detach().clone()
    for change in (
        lambda: weight.data.mul_(3),
        lambda: weight.detach().mul_(3),
        lambda: weight.detach().numpy().__imul__(3),
        lambda: setattr(weight, "data", 3 * kept),
    ):
        change()
        assert model.identity() != before
        assert list(model.weights.changes()) == ["model.layers.1.mlp.down_proj.weight"]
        weight.data.copy_(kept)
        assert model.identity() == before


def test_a_second_moment_of_another_layer_or_model_is_refused(tiny: TinyFactory) -> None:
    model, other = tiny("llama"), tiny("mistral")
    moment = compute_second_moment(model, layer=1, corpus=SENTENCES * 12)
    assert moment.model_identity == model.base_identity(1)
    for call in (
        lambda: compute(model, moment, layer=2),
        lambda: replace(study_of(model, Path()), second_moment=moment),
        lambda: compute(model, SecondMoment.identity(40), layer=1),
        lambda: compute(other, moment, layer=1),
        lambda: compute(other, replace(moment, matrix=torch.eye(36).double()), layer=1),
    ):
        with pytest.raises(BadInputError, match="second moment"):
            call()
    edit = strong_edit(model, layer=0)
    with edit.applied(model):
        inside = compute_second_moment(model, layer=1, corpus=SENTENCES * 12)
        # That of the model as loaded may stand for it, as in released sequences.
        compute(model, moment, layer=1)
        compute(model, inside, layer=1)
    with pytest.raises(BadInputError, match="other edits below layer 1"):
        compute(model, inside, layer=1)
    compute(model.with_bos(BosPolicy.WITHOUT).intervened(SECOND2FIRST), moment, layer=1)


def compute(model: Model, moment: SecondMoment, *, layer: int) -> Edit:
    return compute_edit(
        model,
        FACTS[0],
        method=C_ROME,
        contexts=CONTEXTS,
        second_moment=moment,
        layer=layer,
        hyperparameters=Hyperparameters(steps=1),
    )


def test_prepared_texts_are_refused_after_a_change_they_do_not_know(tiny: TinyFactory) -> None:
    model = tiny("llama")
    prepared = prepare_texts(model, SENTENCES, layer=LAYER)
    edit = strong_edit(model)
    expected = prepared.measure_edits(model, [edit])[0].mean
    for layer, right in ((1, False), (LAYER, False), (3, True)):
        with strong_edit(model, 2, layer=layer).applied(model):
            if right:
                with edit.applied(model):
                    there = perplexity(model, SENTENCES).mean
                assert prepared.measure_edits(model, [edit])[0].mean == pytest.approx(
                    there, rel=1e-5
                )
            else:
                with pytest.raises(EditMismatchError, match="since the sentences were prepared"):
                    prepared.measure_edits(model, [edit])
    with hooked(model), pytest.raises(EditMismatchError, match="since the sentences were"):
        prepared.measure_edits(model, [edit])
    with pytest.raises(EditMismatchError, match="since the sentences were"):
        prepared.measure_edits(model.intervened(SECOND2FIRST), [edit])
    assert prepared.measure_edits(model, [edit])[0].mean == expected


def test_the_bridge_of_a_view_does_not_pass_for_the_view(tiny: TinyFactory) -> None:
    model = tiny("llama")
    edit = strong_edit(model)
    for view in (model.intervened(SECOND2FIRST), model.edited(edit)):
        with pytest.raises(ViewError, match="use the view's run_with_cache"):
            _ = view.bridge
        with pytest.raises(ViewError, match=r"view\.edited\(edit\)"):
            edit.apply_(view.edited(strong_edit(model, 2)))
    with edit.applied(model) as view:
        assert view.bridge is model.bridge
    assert model.with_bos(BosPolicy.WITHOUT).bridge is model.bridge


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_a_view_has_a_cache_and_hooks_of_its_own(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch).with_bos(BosPolicy.WITHOUT)
    edit = strong_edit(model)
    prompts = [text_prompt(model, text) for text in SENTENCES[:2]]
    batch = pad(model, prompts, side="left")
    places = [prompt.last_position for prompt in prompts]
    site = model.site(3)
    seen: list[torch.Tensor] = []
    for view in (
        model,
        model.intervened(SECOND2FIRST),
        model.intervened(SeesItself(position=1)).edited(edit),
        model.edited(edit),
    ):
        expected = keys_at(view, prompts, places, layers=[3]).at(3)
        logits, cache = view.run_with_cache(
            batch.tokens, attention_mask=batch.attention_mask, names_filter=[site.key_hook]
        )
        assert torch.allclose(cache[site.key_hook][:, -1], expected, rtol=1e-4, atol=1e-5)
        kept: list[torch.Tensor] = []
        hook = (site.key_hook, lambda activation, hook, kept=kept: kept.append(activation))
        hooked_logits = view.run_with_hooks(
            batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=[hook]
        )
        assert torch.equal(kept[0], cache[site.key_hook])
        assert torch.equal(hooked_logits, logits)
        with view.hooks([hook]):
            capture_keys(view, FACTS[0], layers=[3])
        assert len(kept) == 2
        assert all(not torch.allclose(logits, other, rtol=1e-3) for other in seen)
        seen.append(logits)
    assert model.disturbance is None


def test_a_hook_that_is_left_on_is_told_and_a_run_is_refused(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    model = tiny("llama")
    with hooked(model):
        assert model.disturbance == "a hook is on blocks.1.hook_out"
        edit = strong_edit(model)
        assert edit.provenance["model"]["disturbed by"] == model.disturbance
        with pytest.raises(BadInputError, match=r"a hook is on blocks\.1\.hook_out"):
            sweep_facts(tmp_path / "run", study_of(model, tmp_path), [FACTS[0]], [ROME])
    assert not (tmp_path / "run").exists()
    handle = model.site(1)
    bridge: Any = model.bridge
    handle = bridge.blocks[1].mlp.register_forward_pre_hook(lambda *_: None)
    assert "a hook is on" in str(model.disturbance)
    handle.remove()
    assert model.disturbance is None


def main(root: Path, cache: Path) -> None:
    contexts_module.LENGTHS = LENGTHS
    found: dict[str, dict[str, Numbers]] = {}
    for arch, states in STATES_OF.items():
        folders = root / arch
        found[arch] = {name: measured(load_tiny(folders / name), cache) for name in FOLDERS}
        model = load_tiny(folders / "plain")
        for state in states:
            with STATES[state](model) as view:
                found[arch][state] = measured(view, cache)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
