"""Edits on a model: applied, composed, taken out again to the bit, saved and refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from firsttok.editing import C_ROME, ROME, Delta, Edit, Method, compute_edit, load_edit
from firsttok.editing.record import edit_record
from firsttok.errors import (
    BadInputError,
    EditMismatchError,
    FirsttokError,
    LayerOutOfRangeError,
    NonFiniteError,
)
from firsttok.evaluation import perplexity, score_edits, score_targets
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import PORTS, Model, Place
from firsttok.prompts import text_prompt, with_target
from firsttok.second_moment import SecondMoment


def edit_of(model: Model, fact: Fact = FACTS[0], *, method: Method = ROME, layer: int = 1) -> Edit:
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
    # A later version may say more.
    more = cast("Any", edit.provenance) | {"model": {**edit.provenance["model"], "more": [1]}}
    edit = replace(edit, provenance=more)
    path = tmp_path / "folder" / "edit.safetensors"
    edit.save(path)
    loaded = load_edit(path)
    assert torch.equal(loaded.left, edit.left)
    assert torch.equal(loaded.right, edit.right)
    assert (loaded.left.dtype, loaded.places) == (edit.left.dtype, (Place("blocks", 1),))
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
    made, (delta,) = edit.provenance, edit.deltas
    short = replace(delta, left=delta.left[1:])
    high = replace(delta, place=Place("blocks", 4))
    with (
        pytest.raises(EditMismatchError, match=r"shape \[39, 24\], but layer 1 .* has \[40, 24\]"),
        Edit(deltas=(short,), provenance=made).applied(model),
    ):
        pass
    with (
        pytest.raises(LayerOutOfRangeError, match="no layer 4"),
        Edit(deltas=(high,), provenance=made).applied(model),
    ):
        pass


def test_edits_of_an_edited_model_stay_attached_to_the_loaded_weights(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with edit_of(model).applied(model):
        second = edit_of(model, FACTS[1])
    assert second.provenance["model"]["fingerprint"] == model.fingerprint


LEFT, RIGHT = "layer1.out.left", "layer1.out.right"


def spoil(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write an edit's file again with other content."""
    merged = {**load_file(path), **tensors}
    save_file(
        {name: tensor for name, tensor in merged.items() if tensor is not None}, path, metadata
    )


def record_of(edit: Edit, **changes: object) -> dict[str, str]:
    """The metadata of a saved edit, with some fields changed; None takes a field out."""
    record: dict[str, object] = {
        "components": dict(edit.components),
        "losses": list(edit.losses),
        "provenance": edit.provenance,
        **changes,
    }
    return {"firsttok_edit": json.dumps({k: v for k, v in record.items() if v is not None})}


@pytest.mark.parametrize(
    ("tensors", "changes", "error", "message"),
    [
        ({LEFT: None}, {}, BadInputError, "no edit saved by firsttok"),
        ({RIGHT: None}, {}, BadInputError, "no edit saved by firsttok"),
        ({LEFT: None, RIGHT: None}, {}, BadInputError, "no edit saved by firsttok"),
        ({"layer1.out.dense": torch.zeros(40, 24)}, {}, BadInputError, "no edit saved by firsttok"),
        ({"layer1.up.dense": torch.zeros(40, 24)}, {}, BadInputError, "no edit saved by firsttok"),
        ({"layerX.out.dense": torch.zeros(40, 24)}, {}, BadInputError, "no edit saved by firsttok"),
        ({"layer-1.in.dense": torch.zeros(24, 40)}, {}, BadInputError, "no edit saved by firsttok"),
        ({LEFT: torch.zeros(40, 2)}, {}, BadInputError, "no edit saved by firsttok"),
        ({LEFT: torch.zeros(40)}, {}, BadInputError, "no edit saved by firsttok"),
        ({}, {"components": {"numerator": "1"}}, BadInputError, "no edit saved by firsttok"),
        ({}, {"components": None}, BadInputError, "no edit saved by firsttok"),
        ({}, {"losses": 3}, BadInputError, "no edit saved by firsttok"),
        ({}, {"provenance": {"facts": {}}}, BadInputError, "no edit saved by firsttok"),
        ({}, {"provenance": {"model": {"edits": [""]}}}, BadInputError, "no edit saved"),
        ({LEFT: torch.full((40, 1), torch.nan)}, {}, NonFiniteError, "NaN or infinity"),
        ({RIGHT: torch.full((1, 24), torch.inf)}, {}, NonFiniteError, "NaN or infinity"),
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
    old = {"layer": 1, "stack": "blocks", "report": {}}
    tensors = {LEFT: None, RIGHT: None, "left": torch.zeros(2, 40), "right": torch.zeros(24)}
    spoil(path, tensors, record_of(edit, **old))
    with pytest.raises(BadInputError, match="no edit saved"):
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


def test_a_file_of_firsttok_1_is_read(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    edit, path = edit_of(model), tmp_path / "edit.safetensors"
    facts = edit.provenance["facts"]
    made = {k: v for k, v in edit.provenance.items() if k != "facts"} | {"fact": facts[0]}
    old = {"layer": 1, "stack": "blocks", "report": edit.report, "losses": list(edit.losses)}
    record = json.dumps(old | {"provenance": made})
    save_file({"left": edit.left, "right": edit.right}, path, {"firsttok_edit": record})
    loaded = load_edit(path)
    assert loaded.content_hash == edit.content_hash
    assert (loaded.report, loaded.losses) == (edit.report, edit.losses)
    assert (loaded.provenance, loaded.facts, loaded.title) == (
        edit.provenance,
        edit.facts,
        edit.title,
    )


def drawn(model: Model, place: Place, rank: int | None, seed: int) -> Delta:
    """A random change of a weight; dense for no rank."""
    stack, layer, port = place
    shape = model.site(layer, stack=stack, port=port).matrix.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return 0.1 * torch.randn(*size, generator=generator, dtype=model.dtype)

    if rank is None:
        return Delta(place=place, left=normal(*shape))
    return Delta(place=place, left=normal(shape[0], rank), right=normal(rank, shape[1]))


PLACES = [Place("blocks", 1, port) for port in PORTS] + [Place("blocks", 2, "out")]


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(st.sampled_from(PLACES), min_size=1, max_size=4, unique=True),
    ranks=st.lists(st.sampled_from([1, 2, 5, None]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_an_edit_of_any_kind_is_its_dense_matrices(
    tiny: TinyFactory,
    tmp_path_factory: pytest.TempPathFactory,
    places: list[Place],
    ranks: list[int | None],
    seed: int,
) -> None:
    model = tiny("llama", "float64")
    deltas = tuple(drawn(model, p, r, seed) for p, r in zip(places, ranks, strict=False))
    edit = Edit(deltas=deltas, provenance=edit_record(model.record(), []))
    dense = Edit(deltas=tuple(replace(d, left=d.matrix, right=None) for d in deltas))
    path = tmp_path_factory.mktemp("edits") / "edit.safetensors"
    edit.save(path)
    loaded = load_edit(path)
    assert loaded.content_hash == edit.content_hash
    assert loaded.report == pytest.approx(edit.report)
    assert edit.report["delta_norm"] == pytest.approx(dense.report["delta_norm"], rel=1e-9)
    inputs = torch.randn(3, deltas[0].shape[0], dtype=torch.float64)
    torch.testing.assert_close(deltas[0].change(inputs), inputs @ dense.deltas[0].matrix)
    before = weights(model)
    with edit.applied(model):
        for delta in dense.deltas:
            stack, layer, port = delta.place
            parameter = model.site(layer, stack=stack, port=port).weight
            plain = model.weights.bridge.original_model.state_dict(keep_vars=True)
            (name,) = (n for n, p in plain.items() if p is parameter and n in before)
            torch.testing.assert_close(parameter.data, before[name] + delta.matrix.T)
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_one_edit_of_many_weights_is_scored_as_if_it_stood_there(
    tiny: TinyFactory, arch: str
) -> None:
    model = tiny(arch)
    outputs = edit_of(model)
    gated = Place("blocks", 1, "gate") in model.weights.sites
    wide, narrow = model.site(1).d_mlp, model.site(1).d_model
    inner = Edit.of(model, 1, torch.eye(narrow)[:, :2], torch.ones(2, wide), port="in")
    gate = inner.scaled(2)
    if gated:
        gate = Edit.of(model, 1, torch.full((narrow, wide), 0.1), port="gate")
    edits = [outputs, inner, gate, outputs + inner, outputs + outputs, inner.scaled(-1)]
    prompts = [
        with_target(model, text_prompt(model, text), " b c") for text in ("a", "c b a", "b a")
    ]
    found = score_edits(model, prompts, edits)
    plain = [score.nll for score in score_targets(model, prompts)]
    assert [score.nll for score in found[0]] == pytest.approx(plain, rel=1e-5)
    texts = ["a b c d e", "e d c"]
    for edit, scores in zip(edits, found[1:], strict=True):
        with edit.applied(model):
            expected = score_targets(model, prompts)
            said = perplexity(model, texts).mean
        nlls = [score.nll for score in scores]
        assert nlls == pytest.approx([score.nll for score in expected], rel=1e-4)
        assert perplexity(model.edited(edit), texts).mean == pytest.approx(said, rel=1e-6)
    assert found[1] != found[0]
    assert found[2] != found[0]


def test_edits_add_up(tiny: TinyFactory) -> None:
    model = tiny("llama")
    one, other = edit_of(model), edit_of(model, FACTS[1])
    both = one + other
    assert both.delta.rank == 2
    assert both.facts == (*one.facts, *other.facts)
    with one.applied(model), other.applied(model):
        expected = weights(model)
        later = edit_of(model, FACTS[2])
    with both.applied(model):
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, expected[name])
    with pytest.raises(EditMismatchError, match="made on other edits"):
        _ = one + later
    after = edit_of(model.edited(one), FACTS[1])
    with one.applied(model), after.applied(model):
        expected = weights(model)
    with (one + after).applied(model):
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, expected[name])
    with pytest.raises(EditMismatchError, match="different models"):
        _ = one + edit_of(tiny("gpt2"))


def test_a_report_is_never_of_other_changes(tiny: TinyFactory) -> None:
    edit = edit_of(tiny("llama"))
    assert edit.report["delta_norm"] == pytest.approx(float(edit.delta.matrix.norm()), rel=1e-5)
    twice = edit.scaled(2)
    assert "numerator" in edit.report
    assert "numerator" not in twice.report
    assert twice.report["delta_norm"] == pytest.approx(2 * edit.report["delta_norm"])


def test_keys_below_an_edit_are_those_of_the_model_without(tiny: TinyFactory) -> None:
    model = tiny("llama")
    key, value = torch.ones(model.site(1).d_mlp), torch.ones(model.site(1).d_model)
    output = Edit.of(model, 1, key, value)
    inner = Edit.of(model, 1, value, key, port="in")
    assert model.edited(output).identity(1) == model.identity(1)
    assert model.edited(output).identity(2) != model.identity(2)
    assert model.edited(inner).identity(1) != model.identity(1)
    assert model.edited(inner).identity(0) == model.identity(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Edit(deltas=()), "needs at least one change"),
        (lambda m: Edit.of(m, 1, torch.ones(40), torch.ones(23)), "has shape"),
        (lambda m: Edit.of(m, 1, torch.ones(24, 40), port="gate"), "no matrix 'gate' of its own"),
        (lambda m: Edit.of(m, 9, torch.ones(40), torch.ones(24)), "has no layer 9"),
        (lambda m: Edit.of(m, 1, torch.full((40,), torch.nan), torch.ones(24)), "NaN"),
    ],
)
def test_what_is_no_edit_is_refused(
    tiny: TinyFactory, make: Callable[[Model], Edit], message: str
) -> None:
    with pytest.raises(FirsttokError, match=message):
        make(tiny("gpt2"))
