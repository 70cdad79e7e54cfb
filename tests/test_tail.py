"""A replay of the upper blocks is the full pass, with and without a cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import DECODERS, LAYERS, TinyFactory, fact_prompts, relative, sentence_prompts

from firsttok.errors import UnsupportedModelError
from firsttok.models import Model, capture_tail, logits
from firsttok.models.forward import call_arguments
from firsttok.prompts import Prompt, pad, positions
from firsttok.tensors import TokenBatch

Hook = Callable[[torch.Tensor, object], torch.Tensor]


def batch_with_cut(model: Model, prompts: list[Prompt]) -> tuple[TokenBatch, int]:
    """Prompts aligned at their subjects, and the column of these."""
    return pad(model, prompts, side="subject"), int(positions(prompts).max())


def some_prompts(model: Model) -> list[Prompt]:
    """Subjects at position 0 beside subjects behind long prefixes."""
    return fact_prompts(model)[::2]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_equals_the_full_pass(tiny: TinyFactory, arch: str, layer: int) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model))
    where = batch.attention_mask.bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=layer).run(model, where)
    assert relative(found, logits(model, batch)[where]) < 1e-5


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_behind_a_cut_equals_the_full_pass(tiny: TinyFactory, arch: str, layer: int) -> None:
    model = tiny(arch)
    batch, cut = batch_with_cut(model, some_prompts(model))
    assert cut > 0
    assert int(batch.starts.max()) in (cut, cut - len(model.leading_ids))
    where = batch.attention_mask[:, cut:].bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=layer, cut=cut).run(model, where)
    assert relative(found, logits(model, batch)[:, cut:][where]) < 1e-5


@pytest.mark.parametrize("cut", [0, None])
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_of_some_rows_equals_the_full_pass(
    tiny: TinyFactory, arch: str, cut: int | None
) -> None:
    model = tiny(arch)
    prompts = some_prompts(model)
    batch, first = batch_with_cut(model, prompts)
    cut = first if cut is None else cut
    rows = torch.tensor([0, 3, 4])
    where = batch.attention_mask[rows, cut:].bool()
    with torch.no_grad():
        tail = capture_tail(model, batch, layer=1, cut=cut)
        found = tail.rows(rows).run(model, where)
    assert relative(found, logits(model, batch)[rows, cut:][where]) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_rows_are_told_from_columns_when_there_are_as_many(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    prompts = sentence_prompts(model)
    width = max(len(prompt.token_ids) for prompt in prompts)
    square = [prompts[i % len(prompts)] for i in range(width)]
    batch = pad(model, square)
    assert batch.tokens.shape == (width, width)
    rows = torch.tensor([1, 4, 2])
    where = batch.attention_mask[rows].bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=1).rows(rows).run(model, where)
    assert relative(found, logits(model, batch)[rows][where]) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_a_tail_of_one_row_can_be_narrowed(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model)[:1])
    rows = torch.tensor([0])
    where = batch.attention_mask.bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=2).rows(rows).run(model, where)
    assert relative(found, logits(model, batch)[where]) < 1e-5


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_follows_a_hook_at_the_cut(tiny: TinyFactory, arch: str, layer: int) -> None:
    model = tiny(arch)
    batch, cut = batch_with_cut(model, some_prompts(model))
    site = model.site(layer)
    delta = torch.linspace(-2, 2, site.d_model)

    def at(column: int) -> Hook:
        def add(output: torch.Tensor, hook: object) -> torch.Tensor:
            output = output.clone()
            output[:, column] += delta
            return output

        return add

    where = batch.attention_mask[:, cut:].bool()
    bridge: Any = model.bridge
    with torch.no_grad():
        full = bridge.run_with_hooks(
            batch.tokens,
            fwd_hooks=[(site.value_hook, at(cut))],
            **call_arguments(model, batch),
        )[:, cut:][where]
        tail = capture_tail(model, batch, layer=layer, cut=cut)
        found = tail.run(model, where, [(site.value_hook, at(0))])
        without = tail.run(model, where)
    assert relative(found, full) < 1e-5
    assert relative(without, full) > 1e-3


@pytest.mark.parametrize("arch", DECODERS)
def test_a_tail_can_be_replayed_again(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch, cut = batch_with_cut(model, some_prompts(model))
    where = batch.attention_mask[:, cut:].bool()
    with torch.no_grad():
        tail = capture_tail(model, batch, layer=1, cut=cut)
        first = tail.run(model, where)
        second = tail.run(model, where)
    assert torch.equal(first, second)


@pytest.mark.parametrize("arch", DECODERS)
def test_replay_follows_a_changed_weight(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model))
    where = batch.attention_mask.bool()
    weight = model.site(2).weight
    before = weight.detach().clone()
    with torch.no_grad():
        tail = capture_tail(model, batch, layer=2)
        weight.mul_(-1.5)
        try:
            found = tail.run(model, where)
            expected = logits(model, batch)[where]
        finally:
            weight.copy_(before)
    assert relative(found, expected) < 1e-5
    assert relative(logits(model, batch)[where], expected) > 1e-2


@pytest.mark.parametrize("arch", DECODERS)
def test_capture_leaves_no_hook_behind(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    bridge: Any = model.bridge
    before = [len(block._forward_pre_hooks) for block in bridge.blocks]
    capture_tail(model, pad(model, sentence_prompts(model)), layer=0)
    assert [len(block._forward_pre_hooks) for block in bridge.blocks] == before


def test_an_encoder_decoder_has_no_tail(tiny: TinyFactory) -> None:
    model = tiny("t5")
    with pytest.raises(UnsupportedModelError, match="not a decoder"):
        capture_tail(model, pad(model, sentence_prompts(model)), layer=0)


def test_a_tail_keeps_no_graph(tiny: TinyFactory) -> None:
    model = tiny("llama")
    batch, cut = batch_with_cut(model, some_prompts(model))
    tail = capture_tail(model, batch, layer=1, cut=cut)
    assert not tail.residual.requires_grad
    assert not any(part.requires_grad for pair in tail.past for part in pair)
