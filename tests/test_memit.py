"""MEMIT, EMMET and AlphaEdit: what their closed forms promise, and a plain writing of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONTEXTS, DECODERS, FACTS, TinyFactory, relative, same_weights, weights

from benchmarks.naive import naive_model, naive_spread
from firsttok.data import Fact
from firsttok.editing import (
    MEMIT,
    SPREAD,
    AlphaEditRule,
    EmmetRule,
    MemitEditor,
    MemitRule,
    SpreadRule,
    load_edit,
)
from firsttok.editing.memit import _read
from firsttok.editing.methods import Slot
from firsttok.errors import (
    BadInputError,
    HyperparameterError,
    NonFiniteError,
    UnsupportedModelError,
)
from firsttok.hyperparameters import Hyperparameters, SpreadSettings
from firsttok.keys import IntervenedKeys
from firsttok.models import CATALOG, Model, ModelSpec
from firsttok.probes import SeesAll
from firsttok.second_moment import SecondMoment
from firsttok.study import Study

LAYERS = (1, 2)
QUICK = Hyperparameters(steps=4, learning_rate=0.5)
RULES = (MemitRule(weight=3.0), EmmetRule(), AlphaEditRule(threshold=0.9, ridge=0.5))
PREFIXED = tuple(text for text in CONTEXTS.templates if text != "{}")


def moment_of(size: int, *, rank: int | None = None, seed: int = 0) -> SecondMoment:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rank or 2 * size, size, generator=generator, dtype=torch.float64)
    return SecondMoment(
        matrix=keys.T @ keys / len(keys),
        tokens=len(keys),
        corpus="random",
        corpus_hash="",
        layer=None,
        model_fingerprint=None,
    )


def editor(model: Model, **changes: Any) -> MemitEditor:
    given: dict[str, Any] = {
        "contexts": CONTEXTS,
        "second_moments": {layer: moment_of(model.site(layer).d_mlp) for layer in LAYERS},
        "layers": LAYERS,
        "hyperparameters": QUICK,
    }
    return MemitEditor(**given | changes)


shapes = st.tuples(st.integers(2, 12), st.integers(1, 4), st.integers(0, 1000)).filter(
    lambda shape: shape[1] <= shape[0]
)


def drawn(shape: tuple[int, int, int]) -> tuple[torch.Tensor, SecondMoment]:
    size, facts, seed = shape
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(size, facts, generator=generator, dtype=torch.float64)
    return keys, moment_of(size, seed=seed)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_emmet_maps_every_key_to_its_value(shape: tuple[int, int, int]) -> None:
    keys, moment = drawn(shape)
    left = EmmetRule().left(keys, moment, None)
    # (W + R left^T) K = W K + R for every R.
    torch.testing.assert_close(left.T @ keys, torch.eye(shape[1]).double(), rtol=0, atol=1e-6)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_memit_is_between_emmet_and_nothing(shape: tuple[int, int, int]) -> None:
    keys, moment = drawn(shape)
    exact = EmmetRule().left(keys, moment, None)
    small = MemitRule(weight=1e-9).left(keys, moment, None)
    assert relative(small, exact) < 1e-3
    assert float(MemitRule(weight=1e12).left(keys, moment, None).norm()) < 1e-6 * float(
        exact.norm()
    )


@given(st.integers(4, 12), st.integers(1, 3), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_alphaedit_leaves_preserved_keys_alone(size: int, facts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randn(size // 2, size, generator=generator, dtype=torch.float64)
    moment = replace(moment_of(size), matrix=kept.T @ kept / len(kept))
    keys = torch.randn(size, facts, generator=generator, dtype=torch.float64)
    left = AlphaEditRule(threshold=1e-9, ridge=0.1).left(keys, moment, None)
    assert float((left.T @ kept.T).abs().max()) < 1e-6
    assert float(left.norm()) > 0


@given(shapes)
@settings(deadline=None, max_examples=30)
def test_remembered_keys_weigh_like_those_of_c(shape: tuple[int, int, int]) -> None:
    keys, moment = drawn(shape)
    more = drawn((shape[0], shape[1], shape[2] + 1))[0]
    both = replace(moment, matrix=moment.matrix + more @ more.T)
    for rule in (MemitRule(weight=1.0), EmmetRule()):
        expected = rule.left(keys, both, None)
        assert relative(rule.left(keys, moment, more), expected) < 1e-8


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("softmax_in_float64")
def test_an_edit_is_a_plain_writing_on_a_copy(
    tiny: TinyFactory, arch: str, rule: SpreadRule
) -> None:
    model = tiny(arch, "float64")
    before = weights(model)
    facts = list(FACTS[:3])
    memit = editor(model, rule=rule)
    edit = memit.edit(model, facts)
    naives = {layer: naive_model(model, layer) for layer in LAYERS}
    expected = naive_spread(naives, facts, memit)
    for layer, found, (left, right) in zip(LAYERS, edit.deltas, expected, strict=True):
        assert found.place.layer == layer
        assert found.right is not None
        assert relative(found.left @ found.right, left @ right) < 1e-8
    assert same_weights(before, weights(model))


def test_slots_say_which_prompts_are_meant(tiny: TinyFactory) -> None:
    model = tiny("llama", "float64")
    fact = FACTS[1]
    bare = editor(model, keys=Slot.UNPREFIXED).edit(model, [fact])
    assert bare.report["denominator_1"] == pytest.approx(1.0)
    assert bare.report["key_cosine_1"] == pytest.approx(1.0)
    released = editor(model).edit(model, [fact])
    prefixed = editor(model, keys=Slot.PREFIXED_MEAN).edit(model, [fact])
    assert released.report["key_cosine_1"] > prefixed.report["key_cosine_1"]
    moved = editor(model, anchor=Slot.PREFIXED_MEAN, residual=Slot.PREFIXED_MEAN)
    assert relative(moved.edit(model, [fact]).deltas[0].left, released.deltas[0].left) < 1e-12
    found = moved.edit(model, [fact]).deltas[0].right
    assert found is not None
    assert released.deltas[0].right is not None
    assert relative(found, released.deltas[0].right) > 1e-5


def test_an_editor_that_remembers_keeps_the_keys_of_earlier_facts(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float64")
    plain = editor(model, layers=(1,))
    keeping = replace(plain, remembers=True)
    first = keeping.edit(model, [FACTS[0]])
    assert relative(first.deltas[0].left, plain.edit(model, [FACTS[0]]).deltas[0].left) < 1e-12
    view = model.edited(first)
    writer = plain._writer(view)
    keys, own = (_read(writer.scenes([fact]), view, 1).keys(None) for fact in FACTS[:2])
    expected = plain._writer(view).editor.rule.left(own, plain.second_moments[1], keys)
    second = keeping.edit(view, [FACTS[1]])
    assert relative(second.deltas[0].left, expected) < 1e-10
    assert relative(plain.edit(view, [FACTS[1]]).deltas[0].left, expected) > 1e-3


def test_an_edit_of_several_layers_is_saved_and_read(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("mistral")
    edit = editor(model).edit(model, list(FACTS[:2]))
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.content_hash == edit.content_hash
    assert again.layers == LAYERS
    assert [fact.prompt for fact in again.facts] == [fact.prompt for fact in FACTS[:2]]
    assert again.report == edit.report
    weight = 1.5 * model.site(LAYERS[-1]).d_mlp
    assert again.provenance["editor"]["rule"] == {"weight": weight, "name": "memit"}


@pytest.mark.usefixtures("softmax_in_float64")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_facts_edited_side_by_side_are_edited_alone(tiny: TinyFactory, rule: SpreadRule) -> None:
    model = tiny("llama", "float64")
    one = editor(model, rule=rule, keys=Slot.PREFIXED_MEAN, residual=Slot.PREFIXED_MEAN)
    for fact, edit in zip(FACTS, one.edit_all(model, FACTS), strict=True):
        for found, alone in zip(edit.deltas, one.edit(model, [fact]).deltas, strict=True):
            assert relative(found.left, alone.left) < 1e-10
            assert found.right is not None
            assert alone.right is not None
            assert relative(found.right, alone.right) < 1e-8


def test_a_study_fills_in_what_an_editor_leaves_open(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float64")
    moments = {layer: moment_of(model.site(layer).d_mlp, seed=layer) for layer in LAYERS}
    study = Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=moments[2],
        second_moments={1: moments[1]},
        layer=2,
        hyperparameters=replace(model.hyperparameters, steps=4),
        texts=("One. Two.",),
    )
    with pytest.raises(BadInputError, match="no second moment of layer 0"):
        study.editors(["memit"])
    rules = {rule.name: rule for rule in (MemitRule(), EmmetRule(), RULES[2])}
    opened = [replace(each, layers=LAYERS, rule=rules[each.rule.name]) for each in SPREAD]
    ((_, edits),) = study.edits([FACTS[0]], opened)
    whole = editor(model, second_moments=moments, rule=MemitRule(), hyperparameters=None)
    alone = replace(whole, hyperparameters=study.hyperparameters).edit(model, [FACTS[0]])
    assert list(edits) == [each.name for each in SPREAD]
    assert edits["memit"].content_hash == alone.content_hash
    # Nothing was written before, so that there is nothing to remember.
    assert edits["memit-seq"].content_hash == alone.content_hash
    assert len({edit.content_hash for edit in edits.values()}) == len(SPREAD) - 1


def study_of(model: Model, **changes: Any) -> Study:
    given: dict[str, Any] = {
        "model": model,
        "contexts": CONTEXTS,
        "second_moment": moment_of(model.site(2).d_mlp),
        "second_moments": {1: moment_of(model.site(1).d_mlp)},
        "layer": 2,
        "hyperparameters": model.hyperparameters,
        "texts": ("One. Two.",),
    }
    return Study(**given | changes)


@pytest.mark.parametrize("spec", [spec for spec in CATALOG if spec.spread], ids=lambda s: s.name)
def test_by_default_the_released_layers_are_edited(tiny: TinyFactory, spec: ModelSpec) -> None:
    assert spec.spread is not None
    assert spec.layer is not None
    model = replace(tiny("gpt2"), default_layer=spec.layer, spread=spec.spread)
    assert MEMIT.moments_of(model, spec.layer) == spec.spread.layers
    moved = tuple(layer + 2 for layer in spec.spread.layers)
    assert MEMIT.moments_of(model, spec.layer + 2) == moved


def test_what_is_asked_for_holds_for_z_and_what_is_not_is_the_models(tiny: TinyFactory) -> None:
    own = SpreadSettings(
        layers=LAYERS, weight=3.0, hyperparameters=Hyperparameters(clamp=0.75, steps=7)
    )
    model = replace(tiny("gpt2"), default_layer=2, spread=own)
    (editor,) = study_of(model).editors(["memit"])
    assert isinstance(editor, MemitEditor)
    assert editor.hyperparameters == own.hyperparameters
    asked: dict[str, Any] = {"clamp": model.hyperparameters.clamp, "steps": 5}
    changed = replace(model.hyperparameters, **asked)
    (editor,) = study_of(model, hyperparameters=changed, given=asked).editors(["memit"])
    assert isinstance(editor, MemitEditor)
    assert editor.hyperparameters == replace(own.hyperparameters, **asked)


def test_alphaedit_says_when_it_may_change_nothing(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    own = {layer: SecondMoment.identity(model.site(layer).d_mlp) for layer in LAYERS}
    opened = editor(model, rule=AlphaEditRule(threshold=0.5, ridge=1.0), second_moments=own)
    with pytest.raises(BadInputError, match=r"no eigenvalue .* is below 0.5"):
        opened.edit(model, [FACTS[0]])


def test_facts_with_one_key_have_no_exact_solution(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float64")
    other = replace(FACTS[0], target_new=FACTS[1].target_new)
    keys = editor(model, keys=Slot.UNPREFIXED)
    with pytest.raises(NonFiniteError, match="depend on one another"):
        replace(keys, rule=EmmetRule()).edit(model, [FACTS[0], other])
    edit = keys.edit(model, [FACTS[0], other])
    assert "denominator_1" not in edit.report
    assert "key_cosine_1" in edit.report


def test_a_source_of_keys_is_refused_that_an_editor_would_pass_over(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    study = study_of(
        model, key_source=IntervenedKeys(name="seen", interventions=(SeesAll(position=0),))
    )
    for name in ("memit", "ft", "mend"):
        with pytest.raises(BadInputError, match="leave the key source out, or the method"):
            study.editors([name])


def test_without_a_study_it_says_what_is_missing(tiny: TinyFactory) -> None:
    with pytest.raises(BadInputError, match="MEMIT has no contexts"):
        MEMIT.edit(tiny("gpt2"), [FACTS[0]])
    with pytest.raises(BadInputError, match="MEMIT has no second moments"):
        replace(MEMIT, contexts=CONTEXTS).edit(tiny("gpt2"), [FACTS[0]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": (2, 1)}, "from the lowest on"),
        ({"layers": ()}, "from the lowest on"),
        ({"layers": (1, 3)}, "layer 3 has no second moment"),
        ({"contexts": replace(CONTEXTS, templates=PREFIXED)}, "lack the bare prompt"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tiny: TinyFactory, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInputError, match=sentence):
        editor(tiny("gpt2"), **changes)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_numbers_of_a_rule_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(HyperparameterError, match="above 0"):
        MemitRule(weight=value)
    with pytest.raises(HyperparameterError, match="above 0"):
        AlphaEditRule(ridge=value)
    with pytest.raises(HyperparameterError, match="above 0"):
        AlphaEditRule(threshold=value)


def test_one_fact_stands_for_a_sequence_of_one(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    bare: Any = FACTS[0]
    found = editor(model).edit(model, bare)
    assert found.content_hash == editor(model).edit(model, [bare]).content_hash


def test_no_fact_is_refused(tiny: TinyFactory) -> None:
    none: list[Fact] = []
    with pytest.raises(BadInputError, match="was given no fact"):
        editor(tiny("gpt2")).edit(tiny("gpt2"), none)


def test_a_model_that_runs_whole_is_refused(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRSTTOK_PLAIN", "1")
    with pytest.raises(UnsupportedModelError, match="no plain stack of blocks"):
        editor(tiny("gpt2")).edit(tiny("gpt2"), [FACTS[0]])
