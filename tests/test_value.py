"""The value optimisation against a plain one: whole passes, one prompt and one fact at a time."""

from collections.abc import Sequence
from importlib import import_module
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
    plain_model,
    relative,
)

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import Slot, Value, ValueStore, optimise_values
from firsttok.errors import BadInputError, HyperparameterError, NonFiniteError
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model

STRONG = Hyperparameters(steps=9, learning_rate=0.5)
CLAMPED = Hyperparameters(
    steps=7, learning_rate=0.2, clamp=0.3, kl=1.5, weight_decay=0.5, stop_below=0.0
)
TOLERANCE = 1e-6


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
            nlls.append(-sum(log_probs[i, t] for i, t in zip(places, target, strict=True)))
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
        assert value.losses == pytest.approx(losses, rel=TOLERANCE)
        assert value.steps == len(losses)
        assert relative(value.target, target) < TOLERANCE
        assert torch.equal(value.anchor, anchor)
        assert value.slot is slot
    return values


@pytest.mark.parametrize(
    ("contexts", "slot", "layer"),
    [
        (CONTEXTS, Slot.UNPREFIXED, 1),
        (PREFIXED_ONLY, Slot.PREFIXED_MEAN, 2),
        (BARE_ONLY, Slot.UNPREFIXED, 3),
    ],
)
@pytest.mark.parametrize("arch", DECODERS)
def test_values_equal_the_naive_ones(
    tiny: TinyFactory, arch: str, contexts: ContextSet, slot: Slot, layer: int
) -> None:
    model = tiny(arch, "float64").with_bos(BosPolicy.WITHOUT)
    compare(model, FACTS, contexts=contexts, slot=slot, layer=layer, settings=STRONG)
