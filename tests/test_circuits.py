"""The circuit: what was planted is found, nothing where nothing is; on every architecture."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Plan, build_planted, draw_plan
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    SENTENCES,
    VOCABULARY,
    TinyFactory,
    build,
    load_tiny,
)

from firsttok.circuits import Act, EditLayer, Needed, Step, brief, circuit
from firsttok.circuits.anatomy import (
    circuit_prompts,
    find_acts,
    find_carriers,
    find_neurons,
    read,
    read_heads,
)
from firsttok.circuits.causes import (
    knocked_out_heads,
    mask_doses,
    mask_layers,
    needed_layers,
    origins,
)
from firsttok.cli import main
from firsttok.console import progress_bar
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.models import Model, capture
from firsttok.probes import SeesItself
from firsttok.prompts import pad

PLANTED = range(40)
ROTARY = ("gptj", "llama", "mistral", "gemma3")


def planted(seed: int, folder: Path, *, without: str = "") -> tuple[Plan, Model]:
    plan = draw_plan(seed)
    build_planted(plan, folder, seed=seed, without=without)
    return plan, load_tiny(folder, "float32")


@pytest.mark.parametrize("seed", PLANTED)
def test_what_was_planted_is_found(seed: int, tmp_path: Path) -> None:
    plan, model = planted(seed, tmp_path)
    prompts = circuit_prompts(model, SENTENCES)
    reading = read(model, prompts)
    (act,) = find_acts(reading)
    assert (act.start, act.peak, act.writer) == (plan.writer,) * 3
    assert act.dimension == plan.dimension
    assert [step.layer for step in act.ups] == [plan.writer]
    assert [step.layer for step in act.downs] == [plan.down]
    neurons = find_neurons(model, reading, plan.writer, top=2)
    assert neurons[0].index == plan.neuron
    assert neurons[0].share > 0.95 > 0.05 > neurons[1].share
    assert knocked_out_heads(model, reading, plan.writer, [plan.neuron]) == (plan.sink,)
    for change in ("closed", "opened"):
        found, _ = needed_layers(model, prompts, act, change)
        assert found == Needed(until=plan.detector, since=plan.detector)
    assert find_carriers(model, reading)[0].token is None


@pytest.mark.parametrize("seed", PLANTED)
def test_nothing_is_found_where_nothing_was_planted(seed: int, tmp_path: Path) -> None:
    if seed % 3 == 2:
        build("llama", tmp_path, seed=seed)
        model = load_tiny(tmp_path, "float32")
    else:
        without = ("detector", "writer")[seed % 3]
        _, model = planted(seed, tmp_path, without=without)
    reading = read(model, circuit_prompts(model, SENTENCES))
    assert find_acts(reading) == ()
    assert find_carriers(model, reading) == ()


@pytest.fixture(scope="module")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return planted(1, tmp_path_factory.mktemp("planted"))[1]


def test_the_whole_circuit_says_what_was_planted(planted_model: Model) -> None:
    plan = draw_plan(1)
    found = circuit(planted_model, texts=SENTENCES, facts=FACTS, contexts=CONTEXTS)
    (each,) = found.acts
    assert each.alone == each.open == Needed(until=plan.detector, since=plan.detector)
    assert each.heads == (plan.sink,)
    told = {origin.what: origin.share for origin in each.origins}
    assert told["the fourth token that sees itself alone"] > 0.9
    # Equal tokens cancel each other as a token that sees itself alone does.
    assert told["the fourth of four equal tokens at the beginning"] > 0.9
    assert told["the first token that sees all"] < 0.1
    by_value = {
        value: [k for k in each.knock_outs if (k.chosen, k.at, k.value) == ("top", "first", value)]
        for value in ("zero", "later", "first")
    }
    assert all(k.share < 0.1 for k in by_value["zero"] + by_value["later"])
    assert all(k.share > 0.9 for k in by_value["first"])
    random = [k for k in each.knock_outs if k.chosen == "random"]
    assert all(k.share > 0.9 for k in random)
    assert found.proposed_layer is None or found.proposed_layer < plan.writer
    text = found.panel().text
    assert f"written by layer {plan.writer}: neuron {plan.neuron} writes 100%" in text
    assert json.loads(json.dumps(found.as_dict()))["acts"][0]["writer"] == plan.writer


def test_the_short_form_says_what_the_whole_does(planted_model: Model) -> None:
    plan = draw_plan(1)
    asked: dict[str, Any] = {"texts": SENTENCES, "facts": FACTS, "contexts": CONTEXTS}
    with progress_bar() as progress:
        found = brief(planted_model, **asked, progress=progress)
    whole = circuit(planted_model, **asked)
    (act,), (neuron,) = found.acts, found.neurons
    assert neuron is not None
    assert (act.writer, neuron.index) == (plan.writer, plan.neuron)
    assert found.edits == whole.edits
    assert found.proposed_layer == whole.proposed_layer
    assert f"layer {plan.writer} writes it, 100% by neuron {plan.neuron}" in found.sentences[0]
    assert json.loads(json.dumps(found.as_dict()))["acts"][0]["writer"] == plan.writer


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        # Ordinary everywhere: there is nothing to keep away from, as after a BOS.
        ([1.0, 1.0, 1.0, 1.0], None),
        ([1.0, 1.0, 1.0, 0.01], 1),
        ([1.0, 0.01, 1.0, 0.01], 0),
        ([0.01, 0.01, 1.0, 0.01], None),
        ([None, None, None, None], None),
    ],
)
def test_the_proposed_layer_is_below_the_writer_and_ordinary(
    ratios: list[float | None], expected: int | None, planted_model: Model
) -> None:
    with progress_bar() as progress:
        found = brief(
            planted_model, texts=SENTENCES, facts=(), contexts=CONTEXTS, progress=progress
        )
    edits = tuple(
        EditLayer(layer=layer, first=ratio, first_least=ratio, others=1.0)
        for layer, ratio in enumerate(ratios)
    )
    acts = tuple(replace(act, ups=(Step(layer=2, attention=0.0, mlp=1.0),)) for act in found.acts)
    assert replace(found, acts=acts, edits=edits).proposed_layer == expected


def test_a_circuit_without_an_anomaly_says_that_there_is_none(tiny: TinyFactory) -> None:
    found = circuit(tiny("gpt2"), texts=SENTENCES, facts=())
    assert (found.acts, found.carriers, found.edits) == ((), (), ())
    assert "No token is massive" in found.verdict[0]
    assert found.proposed_layer is None


@pytest.mark.parametrize("arch", DECODERS)
def test_additions_sum_to_the_state(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch)
    reading = read(model, circuit_prompts(model, SENTENCES))
    before = reading.entering
    for layer, state in enumerate(reading.states[:, :, 0]):
        added = reading.attention[layer] + reading.mlp[layer]
        torch.testing.assert_close(before + added, state)
        before = state


@pytest.mark.parametrize("arch", DECODERS)
def test_the_sublayers_are_told_apart(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch)
    reading = read(model, circuit_prompts(model, SENTENCES))
    site = model.site(1)
    seen = capture(model, reading.batch, [site.value_hook], stop_at_layer=2)[site.value_hook]
    if arch == "gemma3":
        # A norm lies between the MLP's output and the residual stream.
        assert not torch.allclose(seen[:, 0], reading.mlp[1])
    else:
        torch.testing.assert_close(seen[:, 0], reading.mlp[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", DECODERS)
def test_alpha_is_the_mean_of_a_column(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch)
    prompts = circuit_prompts(model, SENTENCES)
    found = {(head.layer, head.head): head.alpha for head in read_heads(read(model, prompts))}
    alphas: list[torch.Tensor] = []
    for prompt in prompts:
        hook = "blocks.2.attn.hook_pattern"
        pattern = capture(model, pad(model, [prompt]), [hook], stop_at_layer=3)[hook][0]
        alphas.append(pattern[:, :, 0].mean(1))
    for head, alpha in enumerate(torch.stack(alphas).mean(0).tolist()):
        assert found[2, head] == pytest.approx(alpha, rel=1e-5)


@pytest.mark.parametrize("arch", DECODERS)
def test_a_mask_changed_at_all_layers_is_that_of_a_view(arch: str, tiny: TinyFactory) -> None:
    """``origins`` compares the two, and refuses a model on which they differ."""
    model = tiny(arch)
    prompts = circuit_prompts(model, SENTENCES)
    act = made_act(model)
    shares = [origin.share for origin in origins(model, prompts, act)[:2]]
    for change, share in zip(("closed", "opened"), shares, strict=True):
        layers = mask_layers(model, prompts, act, change, range(act.peak + 1))
        assert layers.share == pytest.approx(share, rel=1e-4)
        one = mask_layers(model, prompts, act, change, [1])
        assert one.share != pytest.approx(share, rel=1e-3)
    doses = mask_doses(model, prompts, act, (0.0, 1.0))
    if arch == "gptj":
        assert doses == ()
    else:
        assert doses[1].share == pytest.approx(shares[0], rel=1e-4)
        assert doses[0].share != pytest.approx(shares[0], rel=1e-3)


def made_act(model: Model) -> Act:
    """Layer 2's mean first token, taken for a peak in a model without an anomaly."""
    state = read(model, circuit_prompts(model, SENTENCES)).states[2, :, 0].double().mean(0)
    return Act(
        start=2,
        end=2,
        peak=2,
        norm=float(state.norm()),
        ratio=1.0,
        dimension=0,
        dimension_share=0.0,
        entered=0.0,
        ups=(),
        downs=(),
        direction=state / state.norm(),
    )


@settings(deadline=None, max_examples=40)
@given(
    arch=st.sampled_from(ROTARY),
    ids=st.lists(st.integers(3, VOCABULARY - 1), min_size=2, max_size=12),
    data=st.data(),
)
def test_a_token_that_sees_itself_alone_has_the_states_of_a_first_one(
    arch: str, ids: list[int], data: st.DataObject, tiny: TinyFactory
) -> None:
    """At any place and depth of any rotary model; one with learned positions differs."""
    model = tiny(arch)
    place = data.draw(st.integers(1, len(ids) - 1))
    names = [model.site(layer).residual_hook for layer in range(model.n_layers)]

    def states(view: Model, tokens: list[int], at: int) -> torch.Tensor:
        batch = view.batch(torch.tensor([tokens]))
        seen = capture(view, batch, names, stop_at_layer=None)
        return torch.stack([seen[name][0, at] for name in names])

    alone = states(model.intervened(SeesItself(position=place)), ids, place)
    first = states(model, [ids[place]], 0)
    torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-4)


def test_under_learned_positions_it_does_not(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    hook = model.site(0).residual_hook
    view = model.intervened(SeesItself(position=2))
    alone = capture(view, view.batch(torch.tensor([[7, 8, 9]])), [hook], stop_at_layer=1)
    first = capture(model, model.batch(torch.tensor([[9]])), [hook], stop_at_layer=1)
    assert not torch.allclose(alone[hook][0, 2], first[hook][0, 0], rtol=1e-2)


def test_an_encoder_has_no_circuit(tiny: TinyFactory) -> None:
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        circuit(tiny("bert"), texts=SENTENCES)


def test_short_texts_are_refused(tiny: TinyFactory) -> None:
    with pytest.raises(BadInputError, match="of 2 texts have 5 tokens"):
        circuit(tiny("gpt2"), texts=["Hi", "The capital of France is Paris."])


def test_the_command_leaves_page_json_and_figure(
    planted_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([{"Text": text} for text in SENTENCES]), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["circuit", planted_model.name, "--texts", str(texts), "--out", str(out)]
    assert main(arguments) == 0
    plan = draw_plan(1)
    assert f"is written by layer {plan.writer}: neuron {plan.neuron}" in capsys.readouterr().out
    (folder,) = out.iterdir()
    assert {path.name for path in folder.iterdir()} >= {
        "circuit.json",
        "circuit.html",
        "circuit.svg",
    }
    record = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
    assert record["acts"][0]["neurons"][0]["index"] == plan.neuron
    page = (folder / "circuit.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 3
    assert "src=" not in page


def test_the_command_refuses_an_encoder_in_a_sentence(
    tiny: TinyFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["circuit", tiny("bert").name]) == 2
    error = capsys.readouterr().err
    assert "is no decoder with a final norm" in error
    assert "Traceback" not in error
