"""Causal tracing: held to plain hooks on the Hugging Face model, exact where it must be."""

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from running import in_this_process
from tiny import (
    BARE_ONLY,
    CONTEXTS,
    DECODERS,
    FACTS,
    LAYERS,
    SENTENCES,
    TinyFactory,
    alone,
    build,
    load_tiny,
    naive_logits,
    plain_model,
    same_weights,
    weights,
)

from firsttok.console import progress_bar
from firsttok.data import Fact
from firsttok.errors import (
    BadInputError,
    HyperparameterError,
    UnsupportedModelError,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model, logits
from firsttok.paper.figures import effect_map, figure, save_figure
from firsttok.probes import (
    KINDS,
    ROLES,
    Corruption,
    SeesAll,
    Trace,
    answered_facts,
    average_effects,
    average_total_effect,
    corruption_for,
    default_window,
    propose_layer,
    token_roles,
    trace_fact,
    trace_facts,
    tracing,
    window_layers,
)
from firsttok.probes.restoration import Runs, State, subject_range
from firsttok.prompts import Prompt, fact_prompt, pad, with_target
from firsttok.second_moment import SecondMoment
from firsttok.storage import read_json, write_record
from firsttok.study import Study
from firsttok.tensors import TokenBatch

ROOT = Path(__file__).parent.parent
NOISE = Corruption(scale=0.8, samples=3, seed=5)
WINDOW = 3
EXACT = 1e-12
ROUNDING = dict.fromkeys(DECODERS, 1e-11) | {"gptj": 1e-7}
"""Of probabilities in float64; GPT-J computes its attention scores in float32 even then."""


def plain_modules(arch: str, plain: Any) -> dict[str, list[Any]]:
    """The modules whose outputs are states, of a model that TransformerLens never touched."""
    first = arch in ("gpt2", "gptj")
    blocks = list(plain.transformer.h if first else plain.model.layers)
    return {
        "embedding": [plain.transformer.wte if first else plain.model.embed_tokens],
        "hidden": blocks,
        "mlp": [block.mlp for block in blocks],
        "attention": [block.attn if first else block.self_attn for block in blocks],
    }


def tensor_of(output: Any) -> torch.Tensor:
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def in_place_of(output: Any, tensor: torch.Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


class Naive:
    """Causal tracing in two passes with forward hooks, every token of every sample in each."""

    def __init__(self, arch: str, model: Model, fact: Fact, corruption: Corruption) -> None:
        self.plain = plain_model(model)
        self.modules = plain_modules(arch, self.plain)
        self.tokens = alone(fact_prompt(model, fact))
        self.span = slice(*subject_range(fact_prompt(model, fact)))
        width = self.modules["embedding"][0].weight.shape[1]
        count = self.span.stop - self.span.start
        self.noise = corruption.noise(fact, count, width)
        self.states: dict[tuple[str, int], torch.Tensor] = {}
        self.noisy: dict[tuple[str, int], torch.Tensor] = {}
        handles = [
            module.register_forward_hook(self.keep(self.states, (kind, layer)))
            for kind in KINDS
            for layer, module in enumerate(self.modules[kind])
        ]
        clean = self.run()
        for handle in handles:
            handle.remove()
        self.answer = int(clean.argmax())
        self.clean = float(clean[self.answer])

    def keep(
        self, states: dict[tuple[str, int], torch.Tensor], key: tuple[str, int]
    ) -> Callable[..., None]:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            states[key] = tensor_of(output).clone()

        return hook

    def run(self, copies: int = 1) -> torch.Tensor:
        tokens = self.tokens.repeat(copies, 1)
        with torch.no_grad():
            output = self.plain(tokens, attention_mask=torch.ones_like(tokens))
        result: torch.Tensor = output.logits[:, -1].double().softmax(-1).mean(0)
        return result

    def restored(self, states: Sequence[State]) -> float:
        def corrupt(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            for row, noise in enumerate(self.noise):
                changed[row, self.span] += noise.to(output)
            return changed

        handles = [self.modules["embedding"][0].register_forward_hook(corrupt)]
        for state in states:
            module = self.modules[state.kind][state.layer]
            handles.append(module.register_forward_hook(self.put_back(state)))
        for layer, block in enumerate(self.modules["hidden"]):
            handles.append(block.register_forward_hook(self.keep(self.noisy, ("hidden", layer))))
        found = self.run(len(self.noise))
        for handle in handles:
            handle.remove()
        return float(found[self.answer])

    def put_back(self, state: State) -> Callable[..., Any]:
        def hook(_module: Any, _arguments: Any, output: Any) -> Any:
            changed = tensor_of(output).clone()
            clean = self.states[state.kind, state.layer]
            for row in range(len(changed)):
                changed[row, state.position] = clean[0, state.position]
            return in_place_of(output, changed)

        return hook


@torch.no_grad()
def restore_states(model: Model, fact: Fact, states: Sequence[State]) -> tuple[Runs, float]:
    """The runs of a fact, and P* with any states restored at once in one whole pass."""
    runs = Runs(model, fact, NOISE)
    return runs, float(runs.whole([tuple(states)]))


def study_of(model: Model, folder: Path) -> Study:
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=Hyperparameters(steps=2),
        texts=SENTENCES,
        work=folder,
    )


def same(one: Trace, other: Trace, tolerance: float = EXACT) -> bool:
    names = ("case_id", "subject", "answer_id", "positions", "roles")
    close = [
        torch.allclose(one.restored[kind], other.restored[kind], rtol=0, atol=tolerance)
        for kind in one.restored
    ]
    numbers = (one.clean, one.corrupted), (other.clean, other.corrupted)
    return (
        all(getattr(one, name) == getattr(other, name) for name in names)
        and list(one.restored) == list(other.restored)
        and all(close)
        and torch.allclose(torch.tensor(numbers[0]), torch.tensor(numbers[1]), atol=tolerance)
        and torch.allclose(one.norms, other.norms, rtol=1e-6)
    )


def made_trace(case_id: int, effects: list[float], roles: tuple[str, ...] = ROLES[2:3]) -> Trace:
    """A trace whose effects are given by layer, the same at all its tokens."""
    column = torch.tensor(effects, dtype=torch.float64)[:, None].repeat(1, len(roles))
    return Trace(
        case_id=case_id,
        subject="subject",
        answer_id=0,
        positions=tuple(range(len(roles))),
        roles=roles,
        clean=0.9,
        corrupted=0.1,
        restored={"mlp": column + 0.1},
        norms=torch.ones(2, len(effects), dtype=torch.float64),
    )


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("fact", FACTS[:2], ids=lambda fact: fact.subject)
def test_every_effect_is_that_of_plain_hooks_on_the_plain_model(
    fact: Fact, arch: str, tiny: TinyFactory
) -> None:
    model = tiny(arch, "float64").with_bos(BosPolicy.WITHOUT)
    naive = Naive(arch, model, fact, NOISE)
    trace = trace_fact(model, fact, NOISE, window=WINDOW)
    start, corrupted = trace.positions[0], naive.restored([])
    assert trace.answer_id == naive.answer
    assert abs(trace.clean - naive.clean) < ROUNDING[arch]
    assert abs(trace.corrupted - corrupted) < ROUNDING[arch]
    assert abs(trace.total_effect) > 1e-4
    for layer in range(LAYERS):
        clean, noisy = (each["hidden", layer][:, start] for each in (naive.states, naive.noisy))
        expected = torch.stack([clean.norm(), noisy.norm(dim=1).mean()])
        torch.testing.assert_close(trace.norms[:, layer], expected)
    for kind in KINDS:
        width = 1 if kind == "hidden" else WINDOW
        for layer in range(LAYERS):
            for column, position in enumerate(trace.positions):
                states = [
                    State(kind=kind, layer=near, position=position)
                    for near in window_layers(layer, width, LAYERS)
                ]
                expected = naive.restored(states)
                found = float(trace.restored[kind][layer, column])
                assert abs(found - expected) < ROUNDING[arch]
        # The effects are not all naught, so that something was compared.
        assert float(trace.indirect_effects(kind).abs().max()) > 1e-5


@pytest.mark.parametrize("arch", [*DECODERS, "gemma2"])
def test_restoring_any_states_in_whole_passes_agrees(
    arch: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    if arch == "gemma2":
        # Its capped logits cannot be replayed, so that every pass is a whole one.
        build(arch, tmp_path, seed=1)
        model = load_tiny(tmp_path, "float64")
    else:
        model = tiny(arch, "float64")
    fact = FACTS[1]
    naive = Naive(arch, model, fact, NOISE)
    end = fact_prompt(model, fact).last_position
    mixed = [
        State(kind="mlp", layer=3, position=end),
        State(kind="hidden", layer=1, position=2),
        State(kind="attention", layer=2, position=end),
        State(kind="mlp", layer=0, position=3),
        State(kind="mlp", layer=3, position=1),
    ]
    runs, restored = restore_states(model, fact, mixed)
    assert abs(restored - naive.restored(mixed)) < ROUNDING.get(arch, EXACT)
    trace = trace_fact(model, fact, NOISE, window=1)
    for column, position in enumerate(trace.positions):
        state = State(kind="mlp", layer=2, position=position)
        _, alone = restore_states(model, fact, [state])
        difference = alone - float(trace.restored["mlp"][2, column])
        assert abs(difference) < ROUNDING.get(arch, EXACT)
    _, nothing = restore_states(model, fact, [])
    assert abs(nothing - runs.corrupted) < ROUNDING.get(arch, EXACT)


@pytest.mark.parametrize("arch", DECODERS)
def test_without_noise_every_effect_is_naught(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch, "float64")
    for fact in (FACTS[0], FACTS[4]):
        trace = trace_fact(model, fact, Corruption(scale=0.0, samples=2))
        assert abs(trace.total_effect) < ROUNDING[arch]
        for kind in KINDS:
            assert float(trace.indirect_effects(kind).abs().max()) < ROUNDING[arch]
        torch.testing.assert_close(trace.norms[0], trace.norms[1])


@pytest.mark.parametrize("arch", DECODERS)
def test_all_positions_of_a_layer_bring_the_clean_probability_back(
    arch: str, tiny: TinyFactory
) -> None:
    model = tiny(arch)
    for fact in (FACTS[1], FACTS[4]):
        end = fact_prompt(model, fact).last_position
        for layer in range(LAYERS):
            every = [
                State(kind="hidden", layer=layer, position=position) for position in range(end + 1)
            ]
            runs, restored = restore_states(model, fact, every)
            assert abs(restored - runs.clean) < 1e-6
            assert abs(runs.clean - runs.corrupted) > 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_the_last_state_of_all_is_the_clean_answer(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch, "float64")
    for fact in (FACTS[1], FACTS[4]):
        trace = trace_fact(model, fact, NOISE, kinds=["hidden"])
        last = trace.restored["hidden"][-1]
        assert abs(float(last[-1]) - trace.clean) < ROUNDING[arch]
        # And no other token's last state is read by anything.
        assert float((last[:-1] - trace.corrupted).abs().sum()) < ROUNDING[arch]


def test_tokens_before_the_subject_carry_nothing(tiny: TinyFactory) -> None:
    model = tiny("llama", "float64")
    fact = FACTS[2]
    start, _ = subject_range(fact_prompt(model, fact))
    assert trace_fact(model, fact, NOISE).positions[0] == start > 2
    for position in range(start):
        states = [
            State(kind=kind, layer=layer, position=position) for kind in KINDS for layer in range(2)
        ]
        runs, restored = restore_states(model, fact, states)
        assert abs(restored - runs.corrupted) < EXACT


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_batch_size_does_not_matter(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch, "float64")
    usual = trace_fact(model, FACTS[3], NOISE)
    for max_tokens in (1, 100, 100_000):
        found = trace_fact(model, FACTS[3], NOISE, max_tokens=max_tokens)
        assert same(found, usual, ROUNDING[arch])


@dataclass(frozen=True)
class Causal:
    """Spells the ordinary causal mask out, so that nothing is replayed."""

    name: str = "causal, spelt out"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return replace(batch, visible=batch.causally_visible())


@pytest.mark.parametrize("arch", DECODERS)
def test_what_runs_again_is_enough(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch, "float64")
    for fact in (FACTS[3], FACTS[4]):
        whole = trace_fact(model.intervened(Causal()), fact, NOISE)
        assert same(trace_fact(model, fact, NOISE), whole, ROUNDING[arch])


def test_a_view_is_traced_as_it_is(tiny: TinyFactory) -> None:
    model = tiny("llama", "float64").with_bos(BosPolicy.WITHOUT)
    view = model.intervened(SeesAll(position=0))
    usual, opened = (trace_fact(each, FACTS[0], NOISE) for each in (model, view))
    assert abs(usual.clean - opened.clean) > 1e-6
    state = State(kind="mlp", layer=1, position=2)
    window = trace_fact(view, FACTS[0], NOISE, window=1)
    column = window.positions.index(2)
    _, alone = restore_states(view, FACTS[0], [state])
    assert abs(alone - float(window.restored["mlp"][1, column])) < EXACT


def test_a_seed_repeats_and_every_fact_has_noise_of_its_own(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float64")
    usual = trace_fact(model, FACTS[3], NOISE)
    assert same(trace_fact(model, FACTS[3], NOISE), usual, 0.0)
    other = trace_fact(model, FACTS[3], replace(NOISE, seed=6))
    assert other.clean == usual.clean
    assert abs(other.corrupted - usual.corrupted) > 1e-6
    one, two = (NOISE.noise(fact, 2, 8) for fact in FACTS[:2])
    assert one.shape == (3, 2, 8)
    assert not torch.equal(one, two)
    many = replace(NOISE, samples=400).noise(FACTS[3], 3, 50)
    assert abs(float(many.std()) - NOISE.scale) < 0.01


def test_a_trace_is_the_same_behind_json_and_in_any_kinds(tiny: TinyFactory) -> None:
    model = tiny("mistral", "float64")
    usual = trace_fact(model, FACTS[3], NOISE)
    assert same(Trace.from_record(json.loads(json.dumps(usual.as_record()))), usual, 0.0)
    shares: list[float] = []
    one = trace_fact(model, FACTS[3], NOISE, kinds=["mlp"], on_step=shares.append)
    assert list(one.restored) == ["mlp"]
    assert torch.allclose(one.restored["mlp"], usual.restored["mlp"], rtol=0, atol=EXACT)
    assert abs(sum(shares) - 1) < EXACT


def test_windows_are_centred_and_cut_off_at_the_edges() -> None:
    assert [default_window(count) for count in (1, 4, 30, 48)] == [1, 1, 6, 10]
    assert list(window_layers(20, 10, 48)) == list(range(15, 25))
    assert list(window_layers(2, 6, 30)) == [0, 1, 2, 3, 4]
    assert list(window_layers(29, 6, 30)) == [26, 27, 28, 29]
    for count in (1, 4, 7):
        for width in (1, 2, 3, 10):
            for layer in range(count):
                layers = window_layers(layer, width, count)
                assert layer in layers
                assert len(layers) == width or layers[0] == 0 or layers[-1] == count - 1
    with pytest.raises(HyperparameterError, match="a window of 0 layers is empty"):
        window_layers(1, 0, 4)


@pytest.mark.parametrize(
    ("length", "position", "count", "roles"),
    [
        (1, 0, 3, [2, 3, 5]),
        (2, 1, 2, [0, 2]),
        (4, 5, 10, [0, 1, 1, 2, 3, 4, 4, 5]),
        (1, 2, 4, [2, 5]),
    ],
)
def test_every_token_has_one_role(length: int, position: int, count: int, roles: list[int]) -> None:
    prompt = Prompt(
        text="", token_ids=tuple(range(count)), subject_position=position, subject_length=length
    )
    assert token_roles(prompt) == tuple(ROLES[role] for role in roles)


def test_a_prompt_without_a_subject_has_no_roles() -> None:
    with pytest.raises(BadInputError, match="has no subject position"):
        token_roles(Prompt(text="plain", token_ids=(1, 2)))


@pytest.mark.parametrize("arch", DECODERS)
def test_the_noise_is_scaled_to_the_subjects_embeddings(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch, "float64")
    embedding = plain_modules(arch, plain_model(model))["embedding"][0]
    ids: list[int] = []
    for fact in FACTS:
        prompt = fact_prompt(model, fact)
        ids += prompt.token_ids[slice(*subject_range(prompt))]
    deviation = float(embedding(torch.tensor(ids)).std())
    found = corruption_for(model, FACTS, samples=4, seed=7)
    assert math.isclose(found.scale, 3 * deviation, rel_tol=1e-5)
    assert (found.samples, found.seed) == (4, 7)
    half = corruption_for(model, FACTS, factor=1.5)
    assert math.isclose(half.scale, found.scale / 2, rel_tol=1e-5)


def answerable(model: Model) -> Fact:
    """A fact that a random model answers rightly, by a target made from its own answer."""
    tokenizer: Any = model.tokenizer
    for text in SENTENCES:
        for word in ("England", "Japan", "France", "Berlin", "Paris", "Rome"):
            fact = Fact(
                subject=word, template="{} " + text.strip(), target_new="so", target_true="so"
            )
            token = int(naive_logits(model, fact_prompt(model, fact).token_ids)[-1].argmax())
            target = tokenizer.decode([token])
            if target.startswith(" ") and target.strip().isalpha():
                made = replace(fact, target_true=target.strip())
                with_one = with_target(model, fact_prompt(model, fact), made.target_true)
                if with_one.target_ids[0] == token:
                    return made
    raise AssertionError("no prompt has an answer that is a word")


def test_facts_that_are_not_answered_rightly_are_left_out(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    right = answerable(model)
    wrong = replace(right, target_true="Microsoft")
    unknown = replace(right, target_true="")
    assert answered_facts(model, [wrong, right, unknown, FACTS[0], right]) == (right, right)
    assert answered_facts(model, []) == ()
    trace = trace_fact(model, right, NOISE)
    prompt = with_target(model, fact_prompt(model, right), right.target_true)
    assert trace.answer_id == prompt.target_ids[0]


def test_an_interrupted_run_goes_on(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tiny("llama"), tmp_path)
    traced: list[str] = []
    real = tracing.trace_fact

    def counted(model: Model, fact: Fact, *args: Any, **kwargs: Any) -> Trace:
        if len(traced) == 2:
            raise KeyboardInterrupt
        traced.append(fact.subject)
        return real(model, fact, *args, **kwargs)

    monkeypatch.setattr(tracing, "trace_fact", counted)
    with pytest.raises(KeyboardInterrupt):
        trace_facts(study, FACTS[2:], NOISE)
    assert len(list((tmp_path / "traces").iterdir())) == 2
    traced.clear()
    with progress_bar() as progress:
        found = trace_facts(study, FACTS[2:], NOISE, progress=progress)
        assert all(task.finished for task in progress.tasks)
    assert traced == [FACTS[4].subject]
    for trace, fact in zip(found, FACTS[2:], strict=True):
        assert same(trace, real(study.model, fact, NOISE), 1e-6)
    # A damaged file is no finished trace.
    traced.clear()
    for path in (tmp_path / "traces").iterdir():
        path.write_text("{}", "utf-8")
    trace_facts(study, FACTS[3:4], NOISE)
    assert traced == [FACTS[3].subject]


def test_a_kept_trace_is_taken_for_no_other(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("llama"), tmp_path)
    model = study.model
    fact = FACTS[3]
    cases: list[tuple[Study, Fact, Corruption, int | None]] = [
        (study, fact, NOISE, None),
        (study, fact, NOISE, 2),
        (study, fact, replace(NOISE, scale=0.81), None),
        (study, fact, replace(NOISE, samples=2), None),
        (study, fact, replace(NOISE, seed=1), None),
        (study, replace(fact, case_id=1), NOISE, None),
        (study.varied(model=model.with_bos(BosPolicy.WITHOUT)), fact, NOISE, None),
        (study.varied(model=model.intervened(SeesAll(position=1))), fact, NOISE, None),
        (study.varied(model=tiny("llama", "float64")), fact, NOISE, None),
    ]
    for count, (changed, one, noise, window) in enumerate(cases, 1):
        trace_facts(changed, [one], noise, window=window)
        assert len(list((tmp_path / "traces").iterdir())) == count
    # What an edit needs besides changes nothing.
    trace_facts(study.varied(layer=2, contexts=BARE_ONLY), [fact], NOISE)
    assert len(list((tmp_path / "traces").iterdir())) == len(cases)


def test_averages_are_over_facts_and_layers_by_role() -> None:
    several = (ROLES[0], ROLES[1], ROLES[1], ROLES[2])
    traces = [made_trace(0, [0.1, 0.3]), made_trace(1, [0.3, 0.5], several)]
    effects = {(row.role, row.layer): row for row in average_effects(traces)}
    assert list(effects) == [(role, layer) for role in ROLES[:3] for layer in (0, 1)]
    assert effects[ROLES[2], 0].effect.n == 2
    assert math.isclose(effects[ROLES[2], 1].effect.value, 0.4)
    assert math.isclose(effects[ROLES[1], 0].effect.value, 0.3)
    assert effects[ROLES[1], 0].effect.n == 1
    low, high = effects[ROLES[2], 0].effect.low, effects[ROLES[2], 0].effect.high
    assert math.isclose(low, 0.1)
    assert math.isclose(high, 0.3)
    total = average_total_effect(traces)
    assert math.isclose(total.value, 0.8)
    assert math.isclose(total.high, total.low)
    assert total.columns("ate") == {
        "ate": total.value,
        "ate_low": total.low,
        "ate_high": total.high,
    }


def test_a_role_s_tokens_are_averaged_within_their_fact() -> None:
    trace = made_trace(0, [0.0, 0.0], (ROLES[4], ROLES[4], ROLES[5]))
    trace.restored["mlp"][1] += torch.tensor([0.2, 0.4, 1.0], dtype=torch.float64)
    found = {(row.role, row.layer): row.effect.value for row in average_effects([trace])}
    assert math.isclose(found[ROLES[4], 1], 0.3)
    assert math.isclose(found[ROLES[5], 1], 1.0)


def test_the_interval_is_that_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    traces = [made_trace(index, [value]) for index, value in enumerate(values.tolist())]
    (row,) = average_effects(traces)
    error = 1.96 * float(values.std()) / len(values) ** 0.5
    assert abs(row.effect.high - row.effect.value - error) < 0.15 * error
    assert abs(row.effect.value - row.effect.low - error) < 0.15 * error
    assert average_effects(traces, seed=1) == average_effects(traces, seed=1)


def test_the_proposed_layer_is_the_highest_and_names_its_rivals() -> None:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(30, generator=generator, dtype=torch.float64).tolist()
    noise = torch.randn(30, generator=generator, dtype=torch.float64).tolist()
    # Facts differ far more than layers do, but layers are compared fact by fact.
    traces = [
        made_trace(index, [base, base + 0.05, base + 0.04 + 0.1 * wobble, base - 1])
        for index, (base, wobble) in enumerate(zip(common, noise, strict=True))
    ]
    found = propose_layer(traces)
    best = max(range(4), key=lambda layer: mean(float(t.restored["mlp"][layer]) for t in traces))
    assert found.layer == best
    assert found.layer in (1, 2)
    assert found.undecided == (1, 2)
    assert 0.2 < found.share < 1
    assert found.effect.low < found.effect.value < found.effect.high
    clear = propose_layer([made_trace(0, [0.1, 0.2, 0.3]), made_trace(1, [0.5, 0.6, 0.8])])
    assert (clear.layer, clear.undecided, clear.share) == (2, (2,), 1.0)
    some = propose_layer([made_trace(0, [0.1, 0.2, 0.3])], layers=range(2))
    assert (some.layer, some.undecided, some.share) == (1, (1,), 1.0)
    assert math.isclose(some.effect.value, 0.2)


def test_average_and_proposal_say_what_is_missing() -> None:
    for average in (average_effects, average_total_effect, propose_layer):
        with pytest.raises(BadInputError, match="no traces to average"):
            average([])
    trace = made_trace(0, [0.1])
    with pytest.raises(BadInputError, match="'hidden' was not traced, but mlp"):
        propose_layer([trace], kind="hidden")
    with pytest.raises(BadInputError, match="no traced fact has a 'last token'"):
        propose_layer([trace], role="last token")
    for layers in ([], [1], [-1]):
        with pytest.raises(BadInputError, match="not all traced; choose from 0 to 0"):
            propose_layer([trace], layers=layers)


def test_what_cannot_be_traced_is_refused(tiny: TinyFactory) -> None:
    with pytest.raises(BadInputError, match="no state is called 'keys'"):
        trace_fact(tiny("llama"), FACTS[0], NOISE, kinds=["keys"])
    with pytest.raises(HyperparameterError, match="a window of 0 layers"):
        trace_fact(tiny("llama"), FACTS[0], NOISE, window=0)
    for arch in ("t5", "bert"):
        with pytest.raises(UnsupportedModelError, match="predicts the answer"):
            trace_fact(tiny(arch), FACTS[0], NOISE)
    with pytest.raises(BadInputError, match="no facts whose subjects"):
        corruption_for(tiny("llama"), [])
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(HyperparameterError, match="the scale of the noise"):
            Corruption(scale=scale)
    with pytest.raises(HyperparameterError, match="0 samples of noise"):
        Corruption(scale=1.0, samples=0)


def test_weights_and_hooks_are_left_as_they_were(tiny: TinyFactory) -> None:
    model = tiny("gemma3")
    before, prompt = weights(model), fact_prompt(model, FACTS[0])
    usual = logits(model, pad(model, [prompt]))
    trace_fact(model, FACTS[0], NOISE)
    restore_states(model, FACTS[0], [State(kind="mlp", layer=0, position=0)])
    assert same_weights(weights(model), before)
    assert torch.equal(logits(model, pad(model, [prompt])), usual)


def test_the_map_shows_roles_by_layers(tmp_path: Path) -> None:
    rows = [
        {"role": role, "layer": layer, "aie": 0.1 * layer - 0.05}
        for role in (ROLES[2], ROLES[5], ROLES[0])
        for layer in range(4)
    ]
    drawn, (axis,) = figure(1)
    effect_map(axis, rows, roles=ROLES, title="mlp", limit=0.3, marked=2)
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [ROLES[0], ROLES[2], ROLES[5]]
    assert axis.get_title() == "mlp"
    mesh = axis.collections[0]
    assert mesh.get_clim() == (-0.3, 0.3)
    cells = mesh.get_array()
    assert cells is not None
    assert cells.size == 12
    save_figure(tmp_path / "map", drawn)
    assert (tmp_path / "map.png").stat().st_size > 100


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("causal_tracing")
    build("llama", folder / "llama")
    facts = [replace(fact, case_id=index) for index, fact in enumerate(FACTS)]
    contents = {
        "facts": [fact.as_record() for fact in facts],
        "texts": list(SENTENCES),
        "contexts": list(CONTEXTS.templates),
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    options = ["--second-moment", "identity", "--steps", "2", "--bos", "without"]
    scan_study = [*options, *given(folder)]
    result = command(folder, "-m", "firsttok.cli", "scan", *scan_study)
    assert result.returncode == 0, result.stderr
    cases = folder / "out" / "llama" / "collapse_cases.json"
    record = read_json(cases, "collapse cases")
    # A random model is never good, so a few facts have to stand for the normal ones.
    record["collapse"] = [fact.case_id for fact in facts if fact.template.startswith("{}")]
    write_record(cases, record)
    return {"folder": folder, "cases": cases}


def given(folder: Path) -> list[str]:
    options = ["--model", str(folder / "llama"), "--out", str(folder / "out")]
    for name in ("facts", "texts", "contexts"):
        options += [f"--{name}", str(folder / f"{name}.json")]
    return options


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return in_this_process(list(words), {"FIRSTTOK_CACHE": str(folder / "cache")})


def run_script(setting: dict[str, Path], *own: str) -> subprocess.CompletedProcess[str]:
    options = ["--steps", "2", "--bos", "without", "--cases", str(setting["cases"])]
    options += [*given(setting["folder"]), "--collapse", "4", "--normal", "4", *own]
    return command(setting["folder"], str(ROOT / "analyses" / "extra_causal_tracing.py"), *options)


def test_the_script_leaves_its_files_and_goes_on(setting: dict[str, Path]) -> None:
    own = ["--second-moment", "identity", "--every-answer", "--samples", "2"]
    result = run_script(setting, *own)
    assert result.returncode == 0, result.stderr
    stem = setting["folder"] / "out" / "llama" / "extra_causal_tracing"
    for suffix in (".csv", ".json", ".png", ".svg"):
        assert stem.with_suffix(suffix).stat().st_size > 100
    record = json.loads(stem.with_suffix(".json").read_text("utf-8"))
    rows, provenance = record["rows"], record["provenance"]
    assert str(setting["folder"]) not in json.dumps(provenance)
    assert all(len(line) == len(record["columns"]) for line in record["lines"])
    values = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in values)
    parts = {row["part"] for row in rows}
    assert parts == {"fact", "total", "effect", "proposal", "edit"}
    effects = [row for row in rows if row["part"] == "effect" and row["group"] == "all facts"]
    found = {(row["kind"], row["layer"]) for row in effects}
    assert found == {(kind, layer) for kind in KINDS for layer in range(LAYERS)}
    proposed = provenance["proposed_layer"]
    highest = [row for row in effects if (row["kind"], row["role"]) == ("mlp", ROLES[2])]
    assert proposed == max(highest, key=lambda row: row["aie"])["layer"]
    edited = {row["layer"] for row in rows if row["part"] == "edit"}
    near = {proposed + step for step in range(-2, 3)} & set(range(LAYERS))
    assert edited == near | {provenance["layer"]}
    assert "on position 0 as well" in " ".join(result.stdout.split())
    kept = sorted((stem.parent / ".work" / "traces").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 4
    again = run_script(setting, *own)
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert json.loads(stem.with_suffix(".json").read_text("utf-8"))["rows"] == rows


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        (["--second-moment", "identity"], "answers none of the 4 facts rightly"),
        (["--corpus", "{texts}"], "leave --second-moment and --corpus out"),
    ],
)
def test_the_script_says_what_it_cannot_do(
    own: list[str], sentence: str, setting: dict[str, Path]
) -> None:
    words = [word.format(texts=setting["folder"] / "texts.json") for word in own]
    result = run_script(setting, *words)
    assert result.returncode == 2
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
