"""How many floating-point operations the products of an edit need, counted from the weights.

With ``p_b`` the number of elements of block b's matrices, ``a = n_heads * d_head``, L the edited
layer, and S losses (so S - 1 updates), one fact needs

- once, for every token of its prompts: ``2 p_b`` in the blocks up to L, and ``4 a`` for every token
  it attends to; for those before the subject's last one, also in the blocks above L;
- per loss, for every token from the subject's last one on (in the KL prompt that one alone): the
  same in the blocks above L; and ``2 d_model vocab`` for every place whose logits are read;
- per update, backward: as much as forward for the frozen matrices, twice as much in attention.

Padding, norms, activations and softmax are not in it: this is what cannot be left out of ROME once
nothing is done twice that does not depend on delta.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.models import Model
from firsttok.prompts import Prompt, fact_prompt, subject_prompt, with_target

__all__ = ["Blocks", "blocks_of", "count_executed", "needed", "replayed_tokens"]


@dataclass(frozen=True, kw_only=True)
class _Row:
    length: int
    """Tokens that run."""
    subject: int
    """Position of the subject's last one."""
    places: int
    """Logits that are read."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Some blocks of a model."""

    elements: int
    """Elements of their matrices."""
    attention: int
    """``4 a`` in all of them."""

    def forward(self, tokens: range) -> float:
        """FLOPs of some tokens of one prompt."""
        return sum(self._one(position, 1) for position in tokens)

    def backward(self, tokens: range) -> float:
        """FLOPs of their backward pass."""
        return sum(self._one(position, 2) for position in tokens)

    def _one(self, position: int, times: int) -> float:
        return 2 * self.elements + times * self.attention * (position + 1)


def blocks_of(model: Model, network: nn.ModuleList, layers: range) -> Blocks:
    """Count some blocks of the plain network; TransformerLens has a matrix under several names."""
    elements = sum(
        parameter.numel()
        for layer in layers
        for parameter in network[layer].parameters()
        if parameter.ndim > 1
    )
    bridge: Any = model.bridge
    heads = int(bridge.cfg.n_heads) * int(bridge.cfg.d_head)
    return Blocks(elements=elements, attention=4 * heads * len(layers))


def needed(
    model: Model,
    network: nn.ModuleList,
    fact: Fact,
    contexts: ContextSet,
    *,
    layer: int,
    losses: int,
) -> float:
    """FLOPs of one fact whose optimisation took so many losses.

    Args:
        model: The model.
        network: The blocks of the plain network on the same weights.
        fact: The fact.
        contexts: The contexts of its prompts.
        layer: The edited layer.
        losses: How many losses were taken.
    """
    lower = blocks_of(model, network, range(layer + 1))
    upper = blocks_of(model, network, range(layer + 1, model.n_layers))
    bridge: Any = model.bridge
    unembed = 2 * model.site(layer).d_model * int(bridge.cfg.d_vocab)
    once = step = update = 0.0
    for row in _rows(model, fact, contexts):
        replayed = range(row.subject, row.length)
        once += lower.forward(range(row.length)) + upper.forward(range(row.subject))
        step += upper.forward(replayed) + unembed * row.places
        update += upper.backward(replayed) + unembed * row.places
    return once + losses * step + (losses - 1) * update


def replayed_tokens(model: Model, fact: Fact, contexts: ContextSet) -> int:
    """Tokens of one fact that run in every step."""
    return sum(row.length - row.subject for row in _rows(model, fact, contexts))


def count_executed(run: Callable[[], Any]) -> float:
    """FLOPs of the products that are really executed, padding and all."""
    from torch.utils.flop_counter import FlopCounterMode

    by_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    mapping: dict[Any, Any] = {} if by_onednn is None else {by_onednn: _linear_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return float(counter.get_total_flops())


def _linear_flops(inputs: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of one of oneDNN's products, from shapes."""
    return 2 * math.prod(inputs) * weight[0]


def _rows(model: Model, fact: Fact, contexts: ContextSet) -> list[_Row]:
    rows: list[_Row] = []
    for template in contexts.templates:
        bare = fact_prompt(model, fact, template)
        full: Prompt = with_target(model, bare, fact.target_new, join=fact.join)
        rows.append(
            _Row(
                length=len(full.token_ids) - 1,
                subject=full.subject_position or 0,
                places=full.target_length,
            )
        )
    span = (0, len(fact.subject))
    subject = subject_prompt(model, f"{fact.subject} is a", span, straddle=fact.straddle)
    position = subject.subject_position or 0
    return [*rows, _Row(length=position + 1, subject=position, places=1)]
