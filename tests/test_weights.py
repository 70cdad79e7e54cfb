"""What stands in the weights: views, blocks left in any order, threads, late generators, Ctrl-C."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BARE_ONLY, DECODERS, FACTS, SENTENCES, TinyFactory, same_weights, weights

from firsttok.editing import ROME, Edit, compute_edit
from firsttok.errors import BadInputError, EditMismatchError, NonFiniteError
from firsttok.evaluation import perplexity
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import capture_keys
from firsttok.models import Model
from firsttok.models.weights import Weights
from firsttok.second_moment import SecondMoment

INTERRUPTS = int(os.environ.get("FIRSTTOK_INTERRUPTS", "600"))
"""``FIRSTTOK_INTERRUPTS=200000 pytest tests/test_weights.py -k interrupts`` takes long."""


def edit_of(model: Model, fact: int = 0, *, layer: int = 1) -> Edit:
    return compute_edit(
        model,
        FACTS[fact],
        method=ROME,
        contexts=BARE_ONLY,
        second_moment=SecondMoment.identity(model.site(layer).d_mlp),
        layer=layer,
        hyperparameters=Hyperparameters(steps=2),
    )


def measure(model: Model) -> float:
    return perplexity(model, SENTENCES).mean


@pytest.mark.parametrize("arch", DECODERS)
def test_a_view_runs_edited_and_the_model_does_not(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    one, two = edit_of(model), edit_of(model, 2, layer=2)
    before, plain = weights(model), measure(model)
    with one.applied(model), two.applied(model):
        expected, kept = measure(model), weights(model)
        keys = capture_keys(model, FACTS).values
    view = model.edited(one, two)
    assert measure(view) == expected
    assert torch.equal(capture_keys(view, FACTS).values, keys)
    assert measure(model) == plain
    assert same_weights(weights(model), before)
    for site in model.sites:
        held = view.site(site.layer)
        name = next(n for n, w in kept.items() if torch.equal(w, held.weight))
        assert torch.equal(kept[name], held.weight)
    assert view.edits == (one, two)
    assert model.edits == ()


def test_a_view_of_a_block_outlives_it(tiny: TinyFactory) -> None:
    model = tiny("llama")
    with edit_of(model).applied(model) as view:
        inside = measure(model)
        assert measure(view) == inside
    assert measure(view) == inside
    assert measure(model) != inside


def test_a_view_within_other_edits_is_as_outside(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    one, two = edit_of(model), edit_of(model, 2)
    view = model.edited(one)
    expected, plain = measure(view), measure(model)
    with two.applied(model):
        assert measure(view) == expected
        both = model.edited(one)
        assert both.edits == (two, one)
        apart = measure(both)
    assert measure(both) == apart
    assert measure(model) == plain


def test_blocks_may_be_left_in_any_order(tiny: TinyFactory) -> None:
    model = tiny("llama")
    before = weights(model)
    blocks = [edit_of(model, n, layer=1 + n % 2).applied(model) for n in range(4)]
    views = [block.__enter__() for block in blocks]
    expected = [measure(view) for view in views]
    for index in (1, 3, 0, 2):
        blocks[index].__exit__(None, None, None)
        assert [measure(view) for view in views] == expected
    assert same_weights(weights(model), before)
    assert model.edits == ()


def test_what_is_put_in_place_within_a_block_ends_with_it(tiny: TinyFactory) -> None:
    model = tiny("llama")
    before = weights(model)
    with edit_of(model).applied(model):
        left = edit_of(model, 2).apply_(model)
    assert same_weights(weights(model), before)
    with pytest.raises(EditMismatchError, match="changed after"):
        left.undo_()


def test_a_generator_that_is_closed_late_takes_its_edit_out(tiny: TinyFactory) -> None:
    model = tiny("llama")
    before = weights(model)
    edit = edit_of(model)

    def edited() -> Iterator[float]:
        with edit.applied(model):
            yield measure(model)
            yield measure(model)

    steps = edited()
    inside = next(steps)
    # It stands, and everything says so.
    assert model.edits == (edit,)
    assert measure(model) == inside
    assert model.record()["edits"] == [{"hash": edit.content_hash, "title": edit.title}]
    del steps
    gc.collect()
    assert same_weights(weights(model), before)


def in_thread(action: Callable[[], object]) -> list[Any]:
    """What an action in another thread returned or raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(action())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found


def test_another_threads_edit_is_not_measured_by_chance(tiny: TinyFactory) -> None:
    model = tiny("llama")
    edit, other = edit_of(model), edit_of(model, 2)
    view = model.edited(other)
    expected, plain = measure(view), measure(model)
    with edit.applied(model) as own:
        inside = measure(model)
        for action in (
            lambda: measure(model),
            lambda: other.apply_(model),
            lambda: other.applied(model).__enter__(),
            lambda: model.site(1),
        ):
            (refused,) = in_thread(action)
            assert isinstance(refused, EditMismatchError)
            assert "another thread holds the edit" in str(refused)
        assert in_thread(lambda: measure(own)) == [inside]
        assert in_thread(lambda: measure(view)) == [expected]
        assert measure(model) == inside
    assert in_thread(lambda: measure(model)) == [plain]


def test_threads_measure_views_side_by_side(tiny: TinyFactory) -> None:
    model = tiny("llama")
    views = [model, *(model.edited(edit_of(model, n)) for n in range(3))]
    expected = [measure(view) for view in views]
    found: dict[int, list[float]] = {n: [] for n in range(len(views))}

    def run(number: int) -> None:
        for _ in range(6):
            found[number].append(measure(views[number]))

    threads = [threading.Thread(target=run, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {n: [value] * 6 for n, value in enumerate(expected)}


def test_an_edit_computed_on_edits_is_refused_without_them(tiny: TinyFactory) -> None:
    model = tiny("llama")
    one = edit_of(model)
    done = one.apply_(model)
    two = edit_of(model, 2)
    done.undo_()
    assert two.provenance["model"]["edits"] == [{"hash": one.content_hash, "title": one.title}]
    for action in (
        lambda: two.apply_(model),
        lambda: model.edited(two),
        lambda: two.applied(model).__enter__(),
    ):
        with pytest.raises(
            EditMismatchError, match=r"with other edits in it \(England's capital city is"
        ):
            action()
    assert model.edited(one, two).edits == (one, two)
    assert model.edited(two, anyway=True).edits == (two,)
    with one.applied(model), edit_of(model, 3).applied(model), two.applied(model):
        assert len(model.edits) == 3


def test_an_edit_computed_on_a_changed_weight_is_refused_without_the_change(
    tiny: TinyFactory,
) -> None:
    model = tiny("gpt2")
    weight = model.site(0).weight
    before = weight.detach().clone()
    weight.data.mul_(2)
    edit = edit_of(model)
    assert [name for name in edit.provenance["model"]["changed"] if "mlp" in name]
    with edit.applied(model):
        pass
    weight.data.copy_(before)
    with pytest.raises(EditMismatchError, match="had been changed otherwise"):
        model.edited(edit)
    model.edited(edit, anyway=True)
    assert model.weights.changes() == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "float16"])
def test_an_edit_in_another_type_is_rounded_only_if_asked(tiny: TinyFactory, dtype: str) -> None:
    edit, model = edit_of(tiny("llama")), tiny("llama", dtype)
    with pytest.raises(EditMismatchError, match="cast=True"):
        model.edited(edit)
    weight = model.site(1).weight.detach().clone()
    with edit.applied(model, cast=True):
        expected = weight + edit.delta.matrix.T.to(weight.dtype)
        assert torch.equal(model.site(1).weight, expected)


def test_an_edit_for_other_weights_is_not_rounded_to_these(tiny: TinyFactory) -> None:
    edit, model = edit_of(tiny("llama")), tiny("llama", "float16")
    made = {**edit.provenance["model"], "source": "a fine-tuned model", "fingerprint": "0"}
    other = replace(edit, provenance={**edit.provenance, "model": made})
    with pytest.raises(EditMismatchError, match="not for"):
        other.applied(model, cast=True).__enter__()


def test_a_handler_that_does_not_raise_leaves_the_edit_in(tiny: TinyFactory) -> None:
    """As asyncio's, which notes the interrupt and returns."""
    model = tiny("llama")
    edit, weight = edit_of(model), model.site(1).weight.detach().clone()
    noted: list[int] = []
    plain, pressed = Weights._push, [False]

    def push(weights: Weights, *args: Any, **settings: Any) -> Any:
        if not pressed[0]:
            pressed[0] = True
            signal.raise_signal(signal.SIGINT)
        return plain(weights, *args, **settings)

    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Weights, "_push", push)
            with edit.applied(model):
                assert not torch.equal(model.site(1).weight, weight)
            assert torch.equal(model.site(1).weight, weight)
            pressed[0] = False
            applied = edit.apply_(model)
            assert not torch.equal(model.site(1).weight, weight)
            applied.undo_()
    finally:
        signal.signal(signal.SIGINT, before)
    assert noted == [signal.SIGINT, signal.SIGINT]
    assert torch.equal(model.site(1).weight, weight)


def test_an_edit_that_overflows_its_type_is_refused(tiny: TinyFactory) -> None:
    edit, model = edit_of(tiny("llama")), tiny("llama", "float16")
    before = weights(model)
    large = edit.scaled(1e8)
    with pytest.raises(NonFiniteError, match="does not fit into float16"):
        large.applied(model, cast=True).__enter__()
    assert same_weights(weights(model), before)
    tiny("llama").edited(large)


def test_a_backward_pass_over_an_edit_that_is_out_is_refused(tiny: TinyFactory) -> None:
    """As after a write in place: the gradient would be that of another weight."""
    model = tiny("llama")
    bridge: Any = model.bridge
    tokens = torch.tensor([[5, 6, 7]])
    embedded = bridge.embed(tokens).detach().requires_grad_(True)
    with edit_of(model, layer=2).applied(model):
        output = model.site(2).values_of(embedded[0] @ torch.ones(32, 48))
        weight = model.site(2).weight
        output = torch.nn.functional.linear(embedded[0] @ torch.ones(32, 48), weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_training_mode_with_dropout_is_refused_and_without_it_is_not_kept(
    tiny: TinyFactory,
) -> None:
    for arch in ("gpt2", "llama"):
        model = tiny(arch)
        bridge: Any = model.bridge
        expected = measure(model)
        bridge.train()
        try:
            assert model.disturbance == "the model is in training mode"
            if arch == "gpt2":
                with pytest.raises(BadInputError, match=r"call model\.bridge\.eval\(\)"):
                    measure(model)
            else:
                assert measure(model) == pytest.approx(expected, rel=1e-5)
        finally:
            bridge.eval()
        assert model.disturbance is None
        assert measure(model) == expected


def test_no_interrupt_leaves_a_model_changed() -> None:
    """Of blocks, of views and of edits, at any instruction: weights, hooks and handlers."""
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interrupts.py")), str(INTERRUPTS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads(found.stdout)
    assert record["interrupts"] == INTERRUPTS
    assert record["left changed"] == 0
    # Both outcomes occur: what is interrupted, and what ends before.
    assert min(record[name] for name in ("applied", "view", "edits")) > 0
