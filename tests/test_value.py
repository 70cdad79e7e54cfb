"""The value optimisation against a plain one: whole passes, one prompt and one fact at a time."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    BARE_ONLY,
    CONTEXTS,
    DECODERS,
    FACTS,
    PREFIXED_ONLY,
    TinyFactory,
    build,
    plain_model,
    relative,
    same_weights,
    weights,
)

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import Slot, Value, ValueStore, optimise_values
from firsttok.engine.tail import Replay
from firsttok.errors import BadInputError, HyperparameterError, NonFiniteError
from firsttok.evaluation import score_targets
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import capture_keys
from firsttok.models import BosPolicy, Model, load
from firsttok.prompts import fact_prompt, with_target

STRONG = Hyperparameters(steps=7, learning_rate=0.5)
CLAMPED = Hyperparameters(
    steps=7, learning_rate=2.0, clamp=0.2, kl=1.5, weight_decay=0.5, stop_below=0.0
)
TOLERANCES = {"gpt2": 1e-9, "gptj": 1e-6, "llama": 5e-6, "mistral": 5e-6, "gemma3": 5e-6}
"""GPT-2 is float64 throughout; the others take parts of attention and norm in float32."""


class NaiveModel:
    """A plain Hugging Face model whose MLP output can be shifted at one token."""

    def __init__(self, model: Model, layer: int) -> None:
        self.plain: Any = plain_model(model)
        self.tokenizer: Any = model.tokenizer
        self.leading = list(model.leading_ids)
        named: dict[str, Any] = dict(self.plain.named_modules())
        self.mlp: Any = next(m for name, m in named.items() if name.endswith(f".{layer}.mlp"))

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, without anything put before it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def position(self, text_up_to_subject: str) -> int:
        """Position of the subject's last token."""
        return len(self.leading) + len(self.tokens(text_up_to_subject)) - 1

    def mlp_output(self, text: str, position: int) -> torch.Tensor:
        """What the MLP puts out at one token."""
        seen: list[torch.Tensor] = []
        handle = self.mlp.register_forward_hook(lambda *a: seen.append(a[2][0, position]))
        with torch.no_grad():
            self.plain(torch.tensor([self.leading + self.tokens(text)]))
        handle.remove()
        return seen[0]

    def log_probs(self, ids: list[int], position: int, delta: torch.Tensor) -> torch.Tensor:
        """Log probabilities at every token with delta added at one."""

        def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(output.shape[1], 1, dtype=output.dtype)
            mask[position] = 1
            return output + mask * delta

        handle = self.mlp.register_forward_hook(add)
        logits: torch.Tensor = self.plain(torch.tensor([self.leading + ids])).logits[0]
        handle.remove()
        return logits.log_softmax(-1)


def naive_anchor(naive: NaiveModel, fact: Fact, contexts: ContextSet, slot: Slot) -> torch.Tensor:
    """MLP output at the subject: of the bare prompt, or the mean over the contexts."""
    templates = ("{}",) if slot is Slot.UNPREFIXED else contexts.templates
    before, _ = fact.template.split("{}")
    outputs = [
        naive.mlp_output(
            template.replace("{}", fact.prompt),
            naive.position(template.split("{}")[0] + before + fact.subject),
        )
        for template in templates
    ]
    return torch.stack(outputs).mean(0)


def naive_value(
    naive: NaiveModel,
    fact: Fact,
    anchor: torch.Tensor,
    contexts: ContextSet,
    settings: Hyperparameters,
) -> tuple[torch.Tensor, list[float]]:
    """v* and the loss trace, step by step as the papers write it."""
    before, _ = fact.template.split("{}")
    target = naive.tokens(f" {fact.target_new}")
    rows: list[tuple[list[int], int]] = []
    for template in contexts.templates:
        prompt = naive.tokens(template.replace("{}", fact.prompt))
        position = naive.position(template.split("{}")[0] + before + fact.subject)
        rows.append((prompt + target, position))
    kl_ids, kl_position = naive.tokens(f"{fact.subject} is a"), naive.position(fact.subject)
    delta = torch.zeros_like(anchor, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    original = naive.log_probs(kl_ids, kl_position, torch.zeros_like(anchor))[kl_position].detach()
    losses: list[float] = []
    for step in range(settings.steps):
        adam.zero_grad()
        nlls: list[torch.Tensor] = []
        for ids, position in rows:
            log_probs = naive.log_probs(ids, position, delta)
            places = range(len(log_probs) - len(target) - 1, len(log_probs) - 1)
            nlls.append(-log_probs[list(places), target].sum())
        nll = torch.stack(nlls).mean() / len(target)
        edited = naive.log_probs(kl_ids, kl_position, delta)[kl_position]
        divergence = (edited.exp() * (edited - original)).sum()
        decay = delta.norm() / anchor.norm() ** 2
        loss = nll + settings.kl * divergence + settings.weight_decay * decay
        losses.append(float(loss.detach()))
        if losses[-1] < settings.stop_below or step == settings.steps - 1:
            break
        loss.backward()
        adam.step()
        with torch.no_grad():
            most = settings.clamp * anchor.norm()
            if delta.norm() > most:
                delta.mul_(most / delta.norm())
    return (anchor + delta).detach(), losses


def compare(
    model: Model,
    tolerance: float,
    facts: Sequence[Fact],
    *,
    contexts: ContextSet,
    slot: Slot,
    layer: int,
    settings: Hyperparameters,
) -> list[Value]:
    """Hold optimise_values against the naive one."""
    naive = NaiveModel(model, layer)
    anchors = torch.stack([naive_anchor(naive, fact, contexts, slot) for fact in facts])
    values = optimise_values(
        model,
        facts,
        anchors,
        contexts=contexts,
        slot=slot,
        layer=layer,
        hyperparameters=settings,
    )
    for fact, anchor, value in zip(facts, anchors, values, strict=True):
        target, losses = naive_value(naive, fact, anchor, contexts, settings)
        assert value.losses == pytest.approx(losses, rel=tolerance)
        assert value.steps == len(losses)
        assert relative(value.target, target) < tolerance
        assert torch.equal(value.anchor, anchor)
        assert value.slot is slot
    return values


@pytest.mark.parametrize(
    ("contexts", "slot", "layer"),
    [
        (CONTEXTS, Slot.UNPREFIXED, 1),
        (PREFIXED_ONLY, Slot.PREFIXED_MEAN, 2),
        (BARE_ONLY, Slot.UNPREFIXED, 0),
    ],
)
@pytest.mark.parametrize("arch", DECODERS)
def test_values_equal_the_naive_ones(
    tiny: TinyFactory, arch: str, contexts: ContextSet, slot: Slot, layer: int
) -> None:
    model = tiny(arch, "float64").with_bos(BosPolicy.WITHOUT)
    values = compare(
        model,
        TOLERANCES[arch],
        FACTS,
        contexts=contexts,
        slot=slot,
        layer=layer,
        settings=STRONG,
    )
    for value in values:
        assert value.losses[-1] < value.losses[0]


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.parametrize("arch", DECODERS)
def test_clamped_values_equal_the_naive_ones(tiny: TinyFactory, arch: str, bos: BosPolicy) -> None:
    values = compare(
        tiny(arch, "float64").with_bos(bos),
        TOLERANCES[arch],
        FACTS[:3],
        contexts=CONTEXTS,
        slot=Slot.PREFIXED_MEAN,
        layer=1,
        settings=CLAMPED,
    )
    ratios = [float((v.target - v.anchor).norm() / v.anchor.norm()) for v in values]
    assert max(ratios) == pytest.approx(CLAMPED.clamp, rel=1e-9)


def anchors_of(model: Model, facts: Sequence[Fact], layer: int) -> torch.Tensor:
    """Unprefixed anchors."""
    site = model.site(layer)
    return site.values_of(capture_keys(model, facts, layers=[layer]).at(layer))


def optimise(
    model: Model, facts: Sequence[Fact], settings: Hyperparameters, **options: Any
) -> list[Value]:
    """Optimise values at layer 1 with the usual anchors."""
    return optimise_values(
        model,
        facts,
        anchors_of(model, facts, 1),
        contexts=CONTEXTS,
        slot=Slot.UNPREFIXED,
        layer=1,
        hyperparameters=settings,
        **options,
    )


def stopping_at_different_steps(model: Model) -> Hyperparameters:
    """A threshold that the facts cross at as many different steps as possible."""
    settings = Hyperparameters(steps=10, stop_below=0.0)
    traces = [value.losses for value in optimise(model, FACTS, settings)]

    def lengths(threshold: float) -> set[int]:
        return {
            next((i for i, loss in enumerate(trace) if loss < threshold), len(trace))
            for trace in traces
        }

    crossings = sorted((a + b) / 2 for t in traces for a, b in itertools.pairwise(t))
    return replace(settings, stop_below=max(crossings, key=lambda c: len(lengths(c))))


@pytest.mark.parametrize("arch", DECODERS)
def test_facts_that_stop_at_different_steps_do_not_disturb_each_other(
    tiny: TinyFactory, arch: str
) -> None:
    model = tiny(arch, "float64").with_bos(BosPolicy.WITHOUT)
    settings = stopping_at_different_steps(model)
    values = compare(
        model,
        TOLERANCES[arch],
        FACTS,
        contexts=CONTEXTS,
        slot=Slot.UNPREFIXED,
        layer=1,
        settings=settings,
    )
    assert len({value.steps for value in values}) >= (2 if arch == "gemma3" else 3)
    assert min(value.steps for value in values) < settings.steps
    for value in values:
        assert all(loss >= settings.stop_below for loss in value.losses[:-1])


@pytest.mark.parametrize("arch", DECODERS)
def test_facts_side_by_side_or_one_by_one_give_the_same(
    tiny: TinyFactory, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(arch, "float64").with_bos(BosPolicy.WITHOUT)
    settings = stopping_at_different_steps(model)
    module = import_module("firsttok.editing.value")
    expected = optimise(model, FACTS, settings)
    # Whichever facts share a batch, padded or not.
    for group_size in (1, 3, len(FACTS)):

        def groups(*_: object, size: int = group_size) -> list[list[int]]:
            order = list(reversed(range(len(FACTS))))
            return [order[start : start + size] for start in range(0, len(FACTS), size)]

        monkeypatch.setattr(module, "_groups", groups)
        for value, other in zip(optimise(model, FACTS, settings), expected, strict=True):
            assert relative(value.target, other.target) < TOLERANCES[arch]
            assert value.losses == pytest.approx(other.losses, rel=TOLERANCES[arch])


@pytest.mark.parametrize("arch", DECODERS)
def test_one_evaluation_makes_no_update(tiny: TinyFactory, arch: str) -> None:
    (value,) = optimise(tiny(arch), FACTS[:1], Hyperparameters(steps=1))
    assert value.steps == 1
    assert torch.equal(value.target, value.anchor)
    (again,) = optimise(tiny(arch), FACTS[:1], Hyperparameters(steps=30, stop_below=1e9))
    assert again.losses == value.losses
    assert torch.equal(again.target, value.anchor)


@pytest.mark.parametrize("kl", [0.0, 5.0])
def test_the_first_loss_is_the_targets_nll(tiny: TinyFactory, kl: float) -> None:
    model = tiny("gpt2", "float64")
    settings = Hyperparameters(steps=1, kl=kl)
    for fact, value in zip(FACTS, optimise(model, FACTS, settings), strict=True):
        scores = score_targets(
            model,
            [
                with_target(model, fact_prompt(model, fact, template), fact.target_new)
                for template in CONTEXTS.templates
            ],
        )
        assert value.losses[0] == pytest.approx(sum(s.nll for s in scores) / len(scores), rel=1e-5)


@pytest.mark.parametrize("arch", DECODERS)
def test_optimisation_leaves_the_model_and_the_gradient_switch_alone(
    tiny: TinyFactory, arch: str
) -> None:
    model = tiny(arch)
    before = weights(model)
    with torch.no_grad():
        optimise(model, FACTS[:2], Hyperparameters(steps=3))
        assert not torch.is_grad_enabled()
    assert same_weights(weights(model), before)
    assert not any(parameter.requires_grad for parameter in model.bridge.parameters())
    assert all(parameter.grad is None for parameter in model.bridge.parameters())


def test_every_evaluation_is_reported(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    counts: list[int] = []
    values = optimise(model, FACTS, Hyperparameters(steps=4), on_step=counts.append)
    assert sum(counts) == sum(value.steps for value in values) == 4 * len(FACTS)


def test_a_loss_that_is_not_finite_is_refused(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    anchors = torch.full((1, model.site(1).d_model), torch.nan)
    with pytest.raises(NonFiniteError, match=r'"England.s capital city is" became nan at step 0'):
        optimise_values(
            model,
            FACTS[:1],
            anchors,
            contexts=CONTEXTS,
            slot=Slot.UNPREFIXED,
            layer=1,
            hyperparameters=Hyperparameters(),
        )


def test_a_fact_whose_loss_is_not_finite_leaves_the_others_alone(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    settings: dict[str, Any] = {
        "contexts": CONTEXTS,
        "slot": Slot.UNPREFIXED,
        "layer": 1,
        "hyperparameters": Hyperparameters(steps=4),
    }
    anchors = anchors_of(model, FACTS[:3], 1)
    expected = optimise_values(model, FACTS[:3], anchors, **settings)
    anchors[1] = torch.nan
    failed: dict[int, NonFiniteError] = {}
    counts: list[int] = []
    values = optimise_values(
        model,
        FACTS[:3],
        anchors,
        **settings,
        on_step=counts.append,
        on_failure=failed.__setitem__,
    )
    assert list(failed) == [1]
    # Nothing is computed twice.
    assert sum(counts) == 4 * 2 + 1
    for value, other in zip(values, (expected[0], expected[2]), strict=True):
        assert relative(value.target, other.target) < 1e-4


def test_facts_and_anchors_are_counted(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with pytest.raises(BadInputError, match="2 facts need as many anchors, not 1"):
        optimise_values(
            model,
            FACTS[:2],
            anchors_of(model, FACTS[:1], 1),
            contexts=CONTEXTS,
            slot=Slot.UNPREFIXED,
            layer=1,
            hyperparameters=Hyperparameters(),
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"clamp": 0.0},
        {"kl": float("nan")},
        {"stop_below": float("inf")},
    ],
)
def test_hyperparameters_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(HyperparameterError, match=f"{name} is "):
        Hyperparameters(**wrong)


def test_a_stored_value_comes_back_and_a_damaged_one_does_not(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    settings = Hyperparameters(steps=3)
    (value,) = optimise(model, FACTS[:1], settings)
    store = ValueStore(tmp_path / "values")

    def path(
        used: Model = model, fact: Fact = FACTS[0], steps: int = 3, slot: Slot = Slot.UNPREFIXED
    ) -> Path:
        return store.path(
            used.identity(),
            fact,
            contexts=CONTEXTS,
            slot=slot,
            layer=1,
            hyperparameters=Hyperparameters(steps=steps),
        )

    assert store.read(path(), model) is None
    store.write(path(), value)
    found = store.read(path(), model)
    assert found is not None
    assert torch.equal(found.target, value.target)
    assert torch.equal(found.anchor, value.anchor)
    assert (found.losses, found.slot) == (value.losses, value.slot)
    others = {
        path(used=model.with_bos(BosPolicy.WITH)),
        path(used=tiny("gptj")),
        path(fact=FACTS[1]),
        path(steps=4),
        path(slot=Slot.PREFIXED_MEAN),
    }
    assert len(others) == 5
    assert path() not in others
    path().write_bytes(path().read_bytes()[:-5])
    assert store.read(path(), model) is None


def test_a_model_that_runs_whole_gives_the_naive_values(tmp_path: Path) -> None:
    build("gemma2", tmp_path)
    model = load(str(tmp_path), dtype="float64").with_bos(BosPolicy.WITHOUT)
    assert model.replay is Replay.WHOLE
    compare(
        model,
        5e-6,
        FACTS,
        contexts=CONTEXTS,
        slot=Slot.UNPREFIXED,
        layer=1,
        settings=Hyperparameters(steps=4),
    )


def test_every_fact_is_in_one_batch_and_the_budget_is_kept(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    module: Any = import_module("firsttok.editing.value")
    long = replace(FACTS[0], template="It is well known to all of us here that {} is in", case_id=9)
    facts = [*FACTS, *FACTS, long]
    rows = [module._fact_rows(model, fact, CONTEXTS) for fact in facts]

    def cost(groups: list[list[int]]) -> int:
        padded = [max(rows[i].width for i in group) for group in groups]
        counts = [sum(len(rows[i].prompts) for i in group) for group in groups]
        return sum(a * b for a, b in zip(padded, counts, strict=True))

    groups = module._groups(model, rows, 1)
    assert sorted(itertools.chain(*groups)) == list(range(len(facts)))
    alone = [[index] for index in range(len(facts))]
    extra = module.BATCH_COST["cpu"]
    assert cost(groups) + extra * len(groups) <= cost(alone) + extra * len(alone)
    held = partial(module._bytes_of, model, layer=1, packed=model.runs_packed)
    largest = max(held([row]) for row in rows)
    for budget in (1, largest, 3 * largest):
        monkeypatch.setattr(module, "CPU_BUDGET", budget)
        for group in module._groups(model, rows, 1):
            assert len(group) == 1 or held([rows[i] for i in group]) <= budget
    # A long prefix costs the memory of all that share its batch.
    short = [rows[0]] * 4
    assert held([*short, rows[-1]]) > held(short) + held([rows[-1]])
