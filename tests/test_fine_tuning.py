"""Fine-tuning: what its bound and its stop promise, and a plain writing of it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import DECODERS, FACTS, LAYERS, TinyFactory, relative, same_weights, weights

from benchmarks.naive import naive_fine_tuning, naive_model
from firsttok.data import Fact
from firsttok.editing import (
    Edit,
    FineTuningEditor,
    FineTuningLoss,
    SideBySideEditor,
    edit_each,
    load_edit,
)
from firsttok.errors import BadInputError, EmptyTargetError, HyperparameterError, NonFiniteError
from firsttok.models import BosPolicy, Model

QUICK = FineTuningEditor(layer=1, steps=5, eps=2e-3, learning_rate=1e-3)
FREE = replace(QUICK, eps=None, stop_at=0.0)


def change(edit: Edit) -> torch.Tensor:
    return edit.delta.matrix


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("loss", FineTuningLoss)
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("softmax_in_float64")
def test_an_edit_is_a_plain_writing_on_a_copy(
    tiny: TinyFactory, arch: str, loss: FineTuningLoss, layer: int
) -> None:
    model = tiny(arch, "float64")
    before = weights(model)
    for facts, eps in ((FACTS[1:2], None), (FACTS[:3], 2e-3)):
        editor = replace(QUICK, layer=layer, loss=loss, eps=eps)
        edit = editor.edit(model, facts)
        expected = naive_fine_tuning(naive_model(model, layer), facts, editor)
        assert edit.losses == pytest.approx(expected.losses, rel=1e-8)
        assert relative(change(edit), expected.change) < 1e-8
    assert same_weights(before, weights(model))


@given(
    eps=st.floats(1e-5, 1e-1),
    rate=st.floats(1e-5, 1e-1),
    steps=st.integers(1, 6),
    fact=st.sampled_from(FACTS),
    layer=st.integers(0, LAYERS - 1),
    loss=st.sampled_from(FineTuningLoss),
)
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_entry_leaves_the_ball(
    tiny: TinyFactory,
    eps: float,
    rate: float,
    steps: int,
    fact: Fact,
    layer: int,
    loss: FineTuningLoss,
) -> None:
    editor = FineTuningEditor(
        layer=layer, eps=eps, learning_rate=rate, steps=steps, stop_at=0.0, loss=loss
    )
    edit = editor.edit(tiny("llama"), [fact])
    assert edit.report["largest_entry"] == float(change(edit).abs().max())
    assert change(edit).abs().max() <= torch.tensor(eps)
    assert len(edit.losses) == steps
    # Adam's first step is the learning rate wherever there is a gradient.
    if steps == 1:
        moved = change(edit)[change(edit) != 0].abs()
        assert float(moved.median()) == pytest.approx(min(eps, rate), rel=1e-3)


def test_without_a_bound_entries_go_further(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    free, bound = FREE.edit(model, [FACTS[0]]), replace(FREE, eps=1e-3).edit(model, [FACTS[0]])
    assert float(change(free).abs().max()) > 2e-3
    assert "share_at_bound" not in free.report
    assert 0.5 < bound.report["share_at_bound"] <= 1
    assert free.losses[-1] < bound.losses[-1] < bound.losses[0]


def test_the_last_step_below_the_limit_is_not_made(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float64")
    whole = FREE.edit(model, [FACTS[0]])
    assert list(whole.losses) == sorted(whole.losses, reverse=True)
    stop = (whole.losses[2] + whole.losses[3]) / 2
    stopped = replace(FREE, stop_at=stop).edit(model, [FACTS[0]])
    assert stopped.losses == whole.losses[:4]
    assert torch.equal(change(stopped), change(replace(FREE, steps=3).edit(model, [FACTS[0]])))
    # The last loss is that of the edited model, and nothing is left to do on it.
    view = model.edited(stopped)
    again = replace(FREE, stop_at=stop).edit(view, [FACTS[0]])
    assert again.losses == pytest.approx(stopped.losses[-1:], rel=1e-12)
    assert not bool(change(again).any())


@pytest.mark.parametrize("budget", [None, 1], ids=["one batch", "a batch for each"])
@pytest.mark.parametrize("loss", FineTuningLoss)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
@pytest.mark.usefixtures("plain", "softmax_in_float64")
def test_side_by_side_is_one_by_one(
    tiny: TinyFactory,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    loss: FineTuningLoss,
    budget: int | None,
) -> None:
    model = tiny(arch, "float64")
    if budget is not None:
        monkeypatch.setattr("firsttok.editing.value.CPU_BUDGET", budget)
    facts = list(FACTS)
    free = replace(FREE, loss=loss)
    alone = [free.edit(model, [fact]) for fact in facts]
    # Half of the facts end on the way, one after the other.
    stop = 1.000001 * sorted(edit.losses[2] for edit in alone)[len(facts) // 2]
    editor = replace(free, stop_at=stop)
    expected = [editor.edit(model, [fact]) for fact in facts]
    assert len({len(edit.losses) for edit in expected}) > 1
    found = editor.edit_all(model, facts)
    for edit, one, fact in zip(found, expected, facts, strict=True):
        assert edit.losses == pytest.approx(one.losses, rel=1e-9)
        assert relative(change(edit), change(one)) < 1e-8 or not bool(change(one).any())
        assert [each.prompt for each in edit.facts] == [fact.prompt]


def test_the_ball_is_around_the_weight_at_the_beginning_of_this_edit(tiny: TinyFactory) -> None:
    model = tiny("llama", "float64")
    editor = replace(QUICK, eps=1e-3, stop_at=0.0)
    first = editor.edit(model, [FACTS[0]])
    view = model.edited(first)
    second = editor.edit(view, [FACTS[0]])
    assert second.report["largest_entry"] <= 1e-3
    drift = change(first) + change(second)
    assert 1.9e-3 < float(drift.abs().max()) <= 2e-3
    with first.applied(model):
        expected = naive_fine_tuning(naive_model(model, 1), [FACTS[0]], editor)
    assert relative(change(second), expected.change) < 1e-6
    assert second.provenance["model"]["edits"][0]["hash"] == first.content_hash


def test_an_interrupt_leaves_the_model_as_it_was(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    before, earlier = weights(model), QUICK.edit(model, [FACTS[0]])
    view = model.edited(earlier)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupt)
        for one in (model, view):
            with pytest.raises(KeyboardInterrupt):
                QUICK.edit(one, [FACTS[1]])
    assert not model.edits
    assert same_weights(before, weights(model))


def test_no_gradient_is_left_on_the_model(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    weight = model.site(2).weight
    weight.requires_grad_(True)
    try:
        QUICK.edit(model, [FACTS[0]])
        assert weight.grad is None
    finally:
        weight.requires_grad_(False)


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
def test_the_released_loss_trains_what_begins_a_text_too(tiny: TinyFactory, bos: BosPolicy) -> None:
    model = tiny("llama", "float64").with_bos(bos)
    row = QUICK._row(model, FACTS[0])
    tokenizer: Any = model.tokenizer
    own = tokenizer.encode(" Berlin", add_special_tokens=False)
    assert row.labels == (*model.leading_ids, *own)
    assert bool(model.leading_ids) == (bos is BosPolicy.WITH)
    assert set(row.reads) == {len(row.prompt.token_ids) - 1}


def test_tokens_that_the_tokenizer_does_not_know_do_not_count(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float64")
    tokenizer: Any = copy.deepcopy(model.tokenizer)
    (known,) = tokenizer.encode(" is", add_special_tokens=False)
    first, *rest = tokenizer.encode(" is early", add_special_tokens=False)
    assert first == known
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(known)
    other = replace(model, tokenizer=tokenizer)
    row = QUICK._row(other, replace(FACTS[0], target_new="is early"))
    assert row.labels == tuple(rest)
    with pytest.raises(EmptyTargetError, match="no token that the tokenizer knows"):
        QUICK._row(other, replace(FACTS[0], target_new="is"))


def test_windows_of_facts_are_given_to_editors_that_take_them(tiny: TinyFactory) -> None:
    model = tiny("llama", "float64")
    seen: list[int] = []

    class Watched(FineTuningEditor):
        def edit(self, model: Model, facts: Sequence[Fact]) -> Edit:
            raise AssertionError(f"{len(facts)} facts were given to edit, on {model.name}")

        def edit_all(
            self,
            model: Model,
            facts: Sequence[Fact],
            *,
            on_step: Callable[[int], None] | None = None,
        ) -> list[Edit]:
            seen.append(len(facts))
            return super().edit_all(model, facts, on_step=on_step)

    editor = Watched(layer=1, steps=2)
    assert isinstance(editor, SideBySideEditor)
    other = replace(QUICK, steps=2, name="other")
    found = list(edit_each(model, FACTS, [editor, other]))
    assert seen == [len(FACTS)]
    for fact, edits in found:
        assert list(edits) == ["ft", "other"]
        assert {each.prompt for edit in edits.values() for each in edit.facts} == {fact.prompt}


def test_an_edit_is_saved_and_read(tiny: TinyFactory, tmp_path: Path) -> None:
    edit = replace(QUICK, name="ft-m", label="FT-M", loss=FineTuningLoss.TEACHER_FORCED).edit(
        tiny("mistral"), list(FACTS[:2])
    )
    edit.save(tmp_path / "edit.safetensors")
    again = load_edit(tmp_path / "edit.safetensors")
    assert again.content_hash == edit.content_hash
    assert torch.equal(change(again), change(edit))
    assert (again.losses, again.report) == (edit.losses, edit.report)
    assert again.provenance["editor"] == {
        "name": "ft-m",
        "layer": 1,
        "eps": 2e-3,
        "learning_rate": 1e-3,
        "steps": 5,
        "stop_at": 1e-2,
        "loss": "teacher-forced",
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"eps": 0.0}, "eps is 0.0; give a finite number greater than 0, or None"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"stop_at": -1.0}, "stop_at is -1.0"),
    ],
)
def test_numbers_outside_their_range_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HyperparameterError, match=sentence):
        replace(QUICK, **changes)


def test_nothing_to_write_is_refused(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    none: list[Fact] = []
    with pytest.raises(BadInputError, match="was given no fact"):
        QUICK.edit(model, none)
    assert QUICK.edit_all(model, none) == []
    for loss in FineTuningLoss:
        with pytest.raises(EmptyTargetError):
            replace(QUICK, loss=loss).edit(model, [replace(FACTS[0], target_new=" ")])


def test_a_loss_that_is_not_finite_is_refused(tiny: TinyFactory) -> None:
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        replace(FREE, learning_rate=1e38, steps=3).edit(tiny("gpt2"), [FACTS[0]])
