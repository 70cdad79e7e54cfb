"""MEMIT, FT and MEND on the embedded model, against what the released code computed on it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import relative

from firsttok.contexts import ContextSet
from firsttok.data import Fact, load_texts
from firsttok.editing import Edit, FineTuningEditor
from firsttok.editing.memit import MemitEditor, MemitRule, _read
from firsttok.editing.mend import MendEditor, MendStatistics
from firsttok.editing.mend_network import MendNetwork
from firsttok.engine.traits import KEY
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model, Place, capture
from firsttok.prompts import batches, pad, text_prompt
from firsttok.second_moment import SecondMoment

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

LAYERS = (13, 14, 15)
HYPERPARAMETERS = Hyperparameters(
    steps=25, learning_rate=0.5, weight_decay=1e-3, clamp=4.0, kl=0.0625
)
RUNS = {"batch": ("France", "Arthur", "England", "Danielle Darrieux"), "single": ("Arthur",)}


@dataclass(frozen=True, kw_only=True)
class Golden:
    content: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    edits: Mapping[str, Edit]


def fact(record: Mapping[str, str]) -> Fact:
    return Fact(
        subject=record["subject"],
        template=record["prompt"],
        target_new=record["target_new"],
        target_true=record["target_true"],
    )


@pytest.fixture(scope="module")
def model(real_model: Model) -> Model:
    return real_model.with_bos(BosPolicy.WITHOUT)


@pytest.fixture(scope="module")
def moments(shared: Path, model: Model) -> Mapping[int, SecondMoment]:
    """C of each layer as the released code takes it: no text is cut, however long it is."""
    texts = load_texts(shared / "data/me-ppl/ME-PPL_1k.json")
    prompts = [text_prompt(model, text) for text in texts]
    hooks = {layer: KEY.format(layer) for layer in LAYERS}
    sums = {
        layer: torch.zeros(model.site(layer).d_mlp, model.site(layer).d_mlp, dtype=torch.float64)
        for layer in LAYERS
    }
    tokens = 0
    for group in batches(prompts, max_tokens=4096):
        batch = pad(model, [prompts[i] for i in group])
        found = capture(model, batch, [*hooks.values()], stop_at_layer=LAYERS[-1] + 1)
        real = batch.attention_mask.bool()
        tokens += int(real.sum())
        for layer, hook in hooks.items():
            keys = found[hook][real].double()
            sums[layer] += keys.T @ keys
    return {
        layer: SecondMoment(
            # Stored in float32 there.
            matrix=(total / tokens).float().double(),
            tokens=tokens,
            corpus="ME-PPL_1k",
            corpus_hash="",
            layer=layer,
            model_fingerprint=model.fingerprint,
        )
        for layer, total in sums.items()
    }


def editor(moments: Mapping[int, SecondMoment], content: Mapping[str, Any]) -> MemitEditor:
    types = content.get("context_types", TYPES)
    return MemitEditor(
        contexts=ContextSet(templates=tuple(text for group in types for text in group)),
        second_moments=moments,
        layers=LAYERS,
        rule=MemitRule(weight=content["mom2_update_weight"]),
        hyperparameters=HYPERPARAMETERS,
    )


TYPES = (
    ("{}",),
    (
        "The long road north. {}",
        "Therefore, we kept looking. {}",
        "Because of the storm. {}",
        "I remember the summer well. {}",
        "You should read this slowly. {}",
    ),
)


@pytest.fixture(scope="module")
def golden(shared: Path, model: Model, moments: Mapping[int, SecondMoment]) -> Golden:
    folder = shared / "golden2"
    content: dict[str, Any] = json.loads((folder / "memit_a.json").read_text("utf-8"))
    assert tuple(content["layers"]) == LAYERS
    memit = editor(moments, content)
    edits = {
        run["run"]: memit.edit(model, [fact(each) for each in run["facts"]])
        for run in content["runs"]
    }
    return Golden(content=content, tensors=load_file(folder / "memit_a.safetensors"), edits=edits)


def test_the_second_moments_are_the_released_ones(
    shared: Path, moments: Mapping[int, SecondMoment]
) -> None:
    known = json.loads((shared / "golden2/moments.json").read_text("utf-8"))
    for layer, moment in moments.items():
        expected = known[f"layer{layer}"]
        assert moment.tokens == 28462
        assert float(moment.matrix.trace()) == pytest.approx(expected["trace"], rel=1e-5)
        corner = torch.tensor(expected["corner"], dtype=torch.float64)
        assert relative(moment.matrix[:3, :3], corner) < 1e-4


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_each_layers_update_is_the_released_one(golden: Golden, run: str, number: int) -> None:
    layer, delta = LAYERS[number], golden.edits[run].deltas[number]
    assert delta.place.layer == layer
    assert delta.right is not None
    left = golden.tensors[f"{run}.layer{layer}.adj_k"]
    right = golden.tensors[f"{run}.layer{layer}.resid"].T
    assert relative(delta.left, left) < 1e-2
    assert relative(delta.right, right) < 1e-2
    assert relative(delta.left @ delta.right, left @ right) < 1e-2


@pytest.mark.parametrize("run", RUNS)
def test_z_and_keys_are_the_released_ones(
    golden: Golden, run: str, model: Model, moments: Mapping[int, SecondMoment]
) -> None:
    memit = editor(moments, golden.content)._writer(model)
    edit, facts = golden.edits[run], golden.edits[run].facts
    # z = the last layer's residual stream before its own update, and all that it was given.
    view = model.edited(memit._edit(facts, edit.deltas[:-1]))
    last = edit.deltas[-1].right
    assert last is not None
    scenes = memit.scenes(facts)
    current = _read(scenes, view, LAYERS[-1]).states(memit.editor.residual)
    z = current + last
    assert relative(z, golden.tensors[f"{run}.z"]) < 1e-2
    keys = _read(scenes, model, LAYERS[0]).keys(None)
    assert relative(keys.T, golden.tensors[f"{run}.layer{LAYERS[0]}.keys"]) < 1e-4
    assert relative(current, golden.tensors[f"{run}.layer{LAYERS[-1]}.current"]) < 1e-3


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_step_of_a_sequence_is_the_released_one(
    shared: Path, model: Model, moments: Mapping[int, SecondMoment], step: int
) -> None:
    folder = shared / "golden2"
    content: dict[str, Any] = json.loads((folder / "memit_sequence_a.json").read_text("utf-8"))
    tensors = load_file(folder / "memit_sequence_a.safetensors")
    memit = editor(moments, content)
    view = model
    for earlier in range(1, step):
        for layer in LAYERS:
            view = view.edited(Edit.of(view, layer, *factors(tensors, earlier, layer)))
    edit = memit.edit(view, [fact(content["steps"][step - 1])])
    for layer, delta in zip(LAYERS, edit.deltas, strict=True):
        assert delta.right is not None
        left, right = factors(tensors, step, layer)
        assert relative(delta.left @ delta.right, left[:, None] @ right[None]) < 1e-2


def factors(
    tensors: Mapping[str, torch.Tensor], step: int, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = (tensors[f"step{step}.layer{layer}.{name}"] for name in ("adj_k", "resid"))
    return left.flatten(), right.flatten()


@pytest.fixture(scope="module")
def fine_tuned(shared: Path) -> Golden:
    folder = shared / "golden2"
    content: dict[str, Any] = json.loads((folder / "ft_a.json").read_text("utf-8"))
    return Golden(content=content, tensors=load_file(folder / "ft_a.safetensors"), edits={})


@pytest.mark.parametrize("number", range(5))
def test_fine_tuning_is_the_released_one(fine_tuned: Golden, model: Model, number: int) -> None:
    case, tensors = fine_tuned.content["cases"][number], fine_tuned.tensors
    eps = case["norm_constraint"] or None
    edit = FineTuningEditor(layer=case["layer"], eps=eps).edit(model, [fact(case)])
    assert edit.losses == pytest.approx(case["losses"], rel=2e-3)
    # The weight is kept as [d_out, d_in] there.
    change, key = edit.delta.matrix.T, case["key"]
    expected = tensors[f"{key}.delta_at_indices"]
    apart = (change.flatten()[tensors["indices"].long()] - expected).abs()
    assert float((apart <= 1e-6).double().mean()) >= 0.99
    assert relative(change.norm(dim=1), tensors[f"{key}.delta_row_norms"]) < 1e-3
    assert relative(change.norm(dim=0), tensors[f"{key}.delta_column_norms"]) < 1e-3
    assert edit.report["largest_entry"] == pytest.approx(case["delta_max"], rel=1e-3)
    if eps:
        share = edit.report["share_at_bound"]
        assert share == pytest.approx(case["share_at_bound"], abs=1e-3)


def test_fine_tuning_in_a_sequence_is_the_released_one(
    fine_tuned: Golden, shared: Path, model: Model
) -> None:
    known = json.loads((shared / "golden2/memit_sequence_a.json").read_text("utf-8"))
    facts = {each["subject"]: fact(each) for each in known["steps"]}
    (sequence,) = fine_tuned.content["sequences"]
    editor = FineTuningEditor(layer=sequence["layer"], eps=sequence["norm_constraint"])
    view, drift = model, torch.zeros(())
    for step in sequence["steps"][:4]:
        edit = editor.edit(view, [facts[step["subject"]]])
        assert edit.losses == pytest.approx(step["losses"], rel=2e-3)
        view, drift = view.edited(edit), drift + edit.delta.matrix
        assert float(drift.norm()) == pytest.approx(step["drift_frobenius"], rel=1e-3)
        assert float(drift.abs().max()) == pytest.approx(step["drift_max"], rel=1e-3)


MEND_LAYERS = (28, 29)
MEND_RUNS = {"released": MendStatistics.RESTARTED, "evaluated": MendStatistics.KEPT}
EIFFEL = Fact(
    subject="Eiffel Tower",
    template="The {} is located in the city of",
    target_new="New Orleans",
    target_true="Paris",
)
ENGLAND = Fact(
    subject="England",
    template="{}'s capital city is",
    target_new="Berlin",
    target_true="London",
)


@pytest.fixture(scope="module")
def mend_tensors(shared: Path) -> Mapping[str, torch.Tensor]:
    return load_file(shared / "golden2/mend_a.safetensors")


@pytest.fixture(scope="module")
def mend_network(mend_tensors: Mapping[str, torch.Tensor]) -> MendNetwork:
    own = {name: each for name, each in mend_tensors.items() if name.startswith("network.")}
    return MendNetwork.from_released(own, [Place("blocks", layer) for layer in MEND_LAYERS])


@pytest.mark.parametrize("run", MEND_RUNS)
def test_mend_makes_what_the_released_network_makes(
    shared: Path,
    model: Model,
    mend_network: MendNetwork,
    mend_tensors: Mapping[str, torch.Tensor],
    run: str,
) -> None:
    mend = MendEditor(network=mend_network, statistics=MEND_RUNS[run])
    known: dict[str, Any] = json.loads((shared / "golden2/mend_a.json").read_text("utf-8"))
    expected = {each["run"]: each["edits"] for each in known["runs"]}[run]
    view, trained = model, mend_network.statistics[1536, 576]
    for number, each in enumerate((ENGLAND, EIFFEL)):
        edit = mend.edit(view, [each])
        nll = expected[number]["new_mean_nll_before"]
        assert edit.report["target_nll"] == pytest.approx(nll, rel=1e-4)
        for place, delta in enumerate(edit.deltas):
            layer = MEND_LAYERS[place]
            start = f"{run}.edit{number}.layer{layer}"
            assert delta.right is not None
            assert relative(delta.left.T, mend_tensors[f"{start}.x_out"]) < 1e-4
            right = mend_network.rates[place] * mend_tensors[f"{start}.delta_out"]
            assert relative(delta.right, right) < 1e-4
            norm = expected[number]["layers"][str(layer)]["update_frobenius"]
            assert delta.norm == pytest.approx(norm, rel=1e-4)
        held = edit.provenance.get("statistics", {}).get("1536x576")
        mean = trained.mean if held is None else torch.tensor(held["mean"])
        squares = trained.squares if held is None else torch.tensor(held["squares"])
        tokens = trained.tokens if held is None else held["tokens"]
        start = f"{run}.edit{number}.stats"
        assert tokens == int(mend_tensors[f"{start}.k"])
        for found, name in ((mean, "mean"), ((squares / (tokens - 1)).sqrt(), "std")):
            parts = [mend_tensors[f"{start}.{side}_{name}"] for side in "uv"]
            assert relative(found, torch.cat(parts)) < 1e-4
        # There the weights are put back between edits, and the statistics are not.
        view = view.edited(edit.scaled(0.0))


def test_a_sequence_of_mend_is_the_released_one(
    shared: Path, model: Model, mend_network: MendNetwork
) -> None:
    known: dict[str, Any] = json.loads((shared / "golden2/mend_a.json").read_text("utf-8"))
    (run,) = (each for each in known["runs"] if each["run"] == "sequence_released")
    first, second = run["edits"][:2]
    mend = MendEditor(network=mend_network, statistics=MendStatistics.RESTARTED)
    rome = replace(EIFFEL, target_new=first["target_new"])
    london = Fact(
        subject="France",
        template="The capital of {} is",
        target_new=second["target_new"],
        target_true="Paris",
    )
    view = model
    for each, expected in ((rome, first), (london, second)):
        assert each.prompt == expected["prompt"]
        edit = mend.edit(view, [each])
        view = view.edited(edit)
        for layer, delta in zip(MEND_LAYERS, edit.deltas, strict=True):
            norm = expected["layers"][str(layer)]["update_frobenius"]
            assert delta.norm == pytest.approx(norm, rel=1e-3)
