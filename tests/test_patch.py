"""Edits on a model: applied, composed, taken out again to the bit, saved and refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    TinyFactory,
    build,
    load_tiny,
    same_weights,
    weights,
)

from firsttok.data import Fact
from firsttok.editing import C_ROME, ROME, Method, RankOneEdit, compute_edit, load_edit
from firsttok.errors import (
    BadInputError,
    EditMismatchError,
    FirsttokError,
    LayerOutOfRangeError,
    NonFiniteError,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import Model
from firsttok.second_moment import SecondMoment


def edit_of(
    model: Model, fact: Fact = FACTS[0], *, method: Method = ROME, layer: int = 1
) -> RankOneEdit:
    """A quick edit."""
    return compute_edit(
        model,
        fact,
        method=method,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(layer).d_mlp),
        layer=layer,
        hyperparameters=Hyperparameters(steps=3),
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("arch", DECODERS)
def test_applied_restores_to_the_bit(tiny: TinyFactory, arch: str, dtype: str) -> None:
    edit = edit_of(tiny(arch))
    model = tiny(arch, dtype)
    before = weights(model)
    edit = replace(edit, provenance={"model": {"fingerprint": model.fingerprint}})
    with edit.applied(model) as edited:
        assert edited.stands
        assert edited.edits == model.edits == (edit,)
        assert not same_weights(weights(model), before)
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("arch", DECODERS)
def test_applied_restores_after_anything_raised_inside(
    tiny: TinyFactory, arch: str, error: type[BaseException]
) -> None:
    model = tiny(arch)
    edit = edit_of(model)
    before = weights(model)

    def fail_inside() -> None:
        with edit.applied(model):
            assert not same_weights(weights(model), before)
            raise error

    with pytest.raises(error):
        fail_inside()
    assert same_weights(weights(model), before)


def test_applied_restores_after_the_weight_was_spoiled_inside(tiny: TinyFactory) -> None:
    model = tiny("llama")
    before = weights(model)
    with edit_of(model).applied(model), torch.no_grad():
        model.site(1).weight.fill_(torch.nan)
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("layers", [(1, 1), (1, 2)])
@pytest.mark.parametrize("arch", DECODERS)
def test_nested_edits_compose_and_unwind(
    tiny: TinyFactory, arch: str, layers: tuple[int, int]
) -> None:
    model = tiny(arch, "float32")
    one = edit_of(model, FACTS[0], layer=layers[0])
    two = edit_of(model, FACTS[2], layer=layers[1], method=C_ROME)
    before = weights(model)
    plain = {layer: model.site(layer).matrix.clone() for layer in layers}
    with one.applied(model):
        between = weights(model)
        with two.applied(model):
            for layer in set(layers):
                expected = plain[layer]
                for edit in (one, two):
                    if edit.layer == layer:
                        expected = expected + torch.outer(edit.left, edit.right)
                assert torch.equal(model.site(layer).matrix, expected)
        assert same_weights(weights(model), between)
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("arch", DECODERS)
def test_in_place_edits_are_undone_in_reverse_order_only(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    before = weights(model)
    one, two = edit_of(model, FACTS[0]), edit_of(model, FACTS[2])
    first = one.apply_(model)
    middle = weights(model)
    second = two.apply_(model)
    both = weights(model)
    with pytest.raises(EditMismatchError, match="undo the later edit first"):
        first.undo_()
    assert same_weights(weights(model), both)
    second.undo_()
    assert same_weights(weights(model), middle)
    first.undo_()
    assert same_weights(weights(model), before)
    with pytest.raises(EditMismatchError, match="changed after"):
        first.undo_()


def test_in_place_and_scoped_edits_do_the_same(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    edit = edit_of(model)
    with edit.applied(model):
        scoped = weights(model)
    applied = edit.apply_(model)
    assert same_weights(weights(model), scoped)
    applied.undo_()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("arch", ["gpt2", "gptj"])
def test_a_saved_edit_comes_back_bit_for_bit(
    tiny: TinyFactory, tmp_path: Path, arch: str, dtype: str
) -> None:
    model = tiny(arch, dtype)
    edit = edit_of(model, FACTS[2])
    path = tmp_path / "folder" / "edit.safetensors"
    edit.save(path)
    loaded = load_edit(path)
    assert torch.equal(loaded.left, edit.left)
    assert torch.equal(loaded.right, edit.right)
    assert (loaded.left.dtype, loaded.layer, loaded.stack) == (edit.left.dtype, 1, "blocks")
    assert loaded.report == edit.report
    assert loaded.losses == edit.losses
    assert loaded.provenance == edit.provenance
    with edit.applied(model):
        expected = weights(model)
    with loaded.applied(model):
        assert same_weights(weights(model), expected)


@pytest.mark.parametrize("other", ["seed", "arch", "dtype"])
def test_an_edit_is_refused_on_another_model(tiny: TinyFactory, tmp_path: Path, other: str) -> None:
    edit = edit_of(tiny("gpt2"))
    build("gpt2", tmp_path, seed=7)
    models: dict[str, Callable[[], Model]] = {
        "seed": lambda: load_tiny(tmp_path),
        "arch": lambda: tiny("gptj"),
        "dtype": lambda: tiny("gpt2", "float64"),
    }
    model = models[other]()
    before = weights(model)
    with pytest.raises(EditMismatchError, match="load that model") as raised, edit.applied(model):
        pass
    with pytest.raises(EditMismatchError, match="load that model"):
        edit.apply_(model)
    with pytest.raises(EditMismatchError, match="load that model"):
        model.edited(edit)
    if other == "dtype":
        assert "in float32, and this is" in str(raised.value)
        assert "cast=True" in str(raised.value)
    else:
        assert edit.provenance["model"]["fingerprint"][:12] in str(raised.value)
        assert model.fingerprint[:12] in str(raised.value)
    assert same_weights(weights(model), before)


def test_an_edit_of_the_wrong_shape_or_layer_is_refused(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    edit = edit_of(model)
    with (
        pytest.raises(EditMismatchError, match=r"shape \[39, 24\], but layer 1 .* has \[40, 24\]"),
        replace(edit, left=edit.left[1:]).applied(model),
    ):
        pass
    with (
        pytest.raises(LayerOutOfRangeError, match="no layer 4"),
        replace(edit, layer=4).applied(model),
    ):
        pass


def test_edits_of_an_edited_model_stay_attached_to_the_loaded_weights(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with edit_of(model).applied(model):
        second = edit_of(model, FACTS[1])
    assert second.provenance["model"]["fingerprint"] == model.fingerprint


def spoil(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write an edit's file anew with other content."""
    merged = {**load_file(path), **tensors}
    save_file(
        {name: tensor for name, tensor in merged.items() if tensor is not None}, path, metadata
    )


def record_of(edit: RankOneEdit, **changes: object) -> dict[str, str]:
    """The metadata of a saved edit, with some fields changed; None takes a field out."""
    record: dict[str, object] = {
        "layer": edit.layer,
        "stack": edit.stack,
        "report": edit.report.as_dict(),
        "losses": list(edit.losses),
        "provenance": edit.provenance,
        **changes,
    }
    return {"firsttok_edit": json.dumps({k: v for k, v in record.items() if v is not None})}


@pytest.mark.parametrize(
    ("tensors", "changes", "error", "message"),
    [
        ({"left": None}, {}, BadInputError, "no edit saved by firsttok"),
        ({"right": None}, {}, BadInputError, "no edit saved by firsttok"),
        ({}, {"layer": None}, BadInputError, "no edit saved by firsttok"),
        ({}, {"layer": "first"}, BadInputError, "no edit saved by firsttok"),
        ({}, {"report": {"numerator": 1.0}}, BadInputError, "no edit saved by firsttok"),
        ({}, {"losses": 3}, BadInputError, "no edit saved by firsttok"),
        ({"left": torch.full((40,), torch.nan)}, {}, NonFiniteError, "NaN or infinity"),
        ({"right": torch.full((24,), torch.inf)}, {}, NonFiniteError, "NaN or infinity"),
    ],
)
def test_a_spoiled_file_is_refused(
    tiny: TinyFactory,
    tmp_path: Path,
    tensors: dict[str, Any],
    changes: dict[str, object],
    error: type[FirsttokError],
    message: str,
) -> None:
    path = tmp_path / "edit.safetensors"
    edit = edit_of(tiny("gpt2"))
    edit.save(path)
    spoil(path, tensors, record_of(edit, **changes))
    with pytest.raises(error, match=message) as raised:
        load_edit(path)
    assert str(path) in str(raised.value)


def test_a_file_with_matrices_for_vectors_is_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    edit = edit_of(tiny("gpt2"))
    edit.save(path)
    spoil(path, {"left": torch.zeros(2, 40)}, record_of(edit))
    with pytest.raises(BadInputError, match=r"vectors of the wrong shape|no edit saved"):
        load_edit(path)


def test_files_that_are_no_edit_are_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    with pytest.raises(BadInputError, match="no file of an edit"):
        load_edit(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(BadInputError, match="not a complete safetensors file of an edit"):
        load_edit(path)
    save_file({"left": torch.zeros(3), "right": torch.zeros(3)}, path)
    with pytest.raises(BadInputError, match="no edit saved by firsttok"):
        load_edit(path)
    edit_of(tiny("gpt2")).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(BadInputError, match="not a complete safetensors file of an edit"):
        load_edit(path)
