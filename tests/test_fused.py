"""Blocks run packed and fused are the blocks as they are."""

from typing import Any

import pytest
import torch
from tiny import DECODERS, LAYERS, TinyFactory, fact_prompts, relative, sentence_prompts

from firsttok.engine import fusibility
from firsttok.engine import tail as tail_module
from firsttok.engine.blocks import block_arguments
from firsttok.engine.forward import call_arguments
from firsttok.engine.fused import PackedCall, Packing, run_packed
from firsttok.engine.fusibility import has_plain_arguments, is_fusible, plain_norm
from firsttok.engine.kernels import rms_norm, rotate
from firsttok.models import Model, capture, capture_tail, logits
from firsttok.prompts import pad, positions
from firsttok.tensors import TokenBatch

FUSED = ("llama", "mistral")
"""Architectures with Llama's kind of block."""


def blocks_of(model: Model) -> list[Any]:
    bridge: Any = model.bridge
    return list(bridge.blocks)


def ragged(model: Model) -> TokenBatch:
    return pad(model, sentence_prompts(model))


@pytest.mark.parametrize("arch", DECODERS)
def test_which_architectures_are_fused(tiny: TinyFactory, arch: str) -> None:
    assert is_fusible(blocks_of(tiny(arch))) == (arch in FUSED)
    assert not is_fusible(blocks_of(tiny(arch, "float64")))


@pytest.mark.parametrize("name", ["hook_resid_post", "attn.hook_pattern", "ln1.hook_scale"])
def test_with_a_hook_in_place_nothing_is_fused(tiny: TinyFactory, name: str) -> None:
    model = tiny("llama")
    batch = ragged(model)
    shapes: list[torch.Size] = []

    def look(activation: torch.Tensor, hook: Any) -> None:
        shapes.append(activation.shape)

    where = batch.attention_mask.bool()
    expected = capture_tail(model, batch, layer=1).logits(model.bridge, where)
    with model.bridge.hooks(fwd_hooks=[(f"blocks.2.{name}", look)]):
        assert not is_fusible(blocks_of(model))
        found = capture_tail(model, batch, layer=1).logits(model.bridge, where)
    assert is_fusible(blocks_of(model))
    assert shapes
    assert all(shape[0] == len(batch.tokens) for shape in shapes)
    assert relative(found, expected) < 1e-5


def test_a_hook_of_pytorch_is_seen_too(tiny: TinyFactory) -> None:
    blocks = blocks_of(tiny("mistral"))
    part = blocks[1].mlp
    for register in (
        part.register_forward_hook,
        part.register_forward_pre_hook,
        part.register_full_backward_hook,
        part.register_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert not is_fusible(blocks)
        handle.remove()
        assert is_fusible(blocks)


def test_hooks_that_hugging_face_leaves_do_not_count(tiny: TinyFactory) -> None:
    model = tiny("llama")
    hf_model: Any = model.bridge.original_model
    hf_model(ragged(model).tokens, output_hidden_states=True, output_attentions=True)
    assert is_fusible(blocks_of(model))


@pytest.mark.parametrize("arch", FUSED)
def test_a_packed_pass_is_the_padded_one(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = ragged(model)
    real = batch.attention_mask.bool()
    assert not bool(real.all())
    blocks = blocks_of(model)
    hidden, calls = block_arguments(model.bridge, batch.tokens, call_arguments(model.bridge, batch))
    assert has_plain_arguments(blocks, calls)
    packing = Packing(real)
    call = PackedCall(blocks, packing, packing.pack(hidden), calls)
    with torch.no_grad():
        states = run_packed(call)
        bridge: Any = model.bridge
        found = bridge.unembed(bridge.ln_final(states))
    assert relative(found, logits(model, batch)[real]) < 1e-5


@pytest.mark.parametrize("arch", FUSED)
@pytest.mark.parametrize("cut", [False, True])
def test_the_gradient_is_the_padded_ones(
    tiny: TinyFactory, arch: str, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    batch = pad(model, prompts, side="subject")
    start = int(positions(prompts).max()) if cut else 0

    runs: list[int] = []
    run = tail_module.run_packed

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        runs.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(tail_module, "run_packed", counted)

    def gradient() -> torch.Tensor:
        tail = capture_tail(model, batch, layer=1, cut=start)
        change = torch.zeros_like(tail.residual, requires_grad=True)
        where = batch.attention_mask[:, start:].bool()
        with torch.enable_grad():
            tail.logits(model.bridge, where, change).log_softmax(-1)[:, ::7].sum().backward()
        assert change.grad is not None
        return change.grad[where]

    fused = gradient()
    assert runs
    runs.clear()
    monkeypatch.setattr(fusibility, "_is_plain_attention", lambda _: False)
    assert not model.runs_packed
    assert relative(fused, gradient()) < 1e-4
    assert not runs


@pytest.mark.parametrize("arch", FUSED)
def test_captured_keys_are_those_of_a_full_pass(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = ragged(model)
    real = batch.attention_mask.bool()
    names = [model.site(layer).key_hook for layer in range(LAYERS)]
    packed = capture(model, batch, names, stop_at_layer=None)
    # A hook that is no key's makes the model run as it is.
    padded = capture(model, batch, [*names, "blocks.0.hook_resid_post"], stop_at_layer=None)
    for name in names:
        assert packed[name].shape == padded[name].shape
        assert relative(packed[name][real], padded[name][real]) < 1e-5


def test_a_norm_and_a_rotation_have_the_right_gradient() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states = random(3, 2, 8).requires_grad_()
    weight, cos, sin = random(8), random(3, 1, 8), random(3, 1, 8)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (states,))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (states,))


def test_a_norm_of_another_formula_is_left_alone(tiny: TinyFactory) -> None:
    model = tiny("llama")
    norm: Any = blocks_of(model)[0].ln1
    own = norm.original_component
    found = plain_norm(norm)
    assert found is not None
    assert found[0] is own.weight
    assert found[1] == own.variance_epsilon
    plain = own.forward
    own.forward = lambda hidden: plain(hidden) + own.weight
    try:
        assert plain_norm(norm) is None
    finally:
        del own.forward
    assert plain_norm(norm) is not None


def test_packing_and_unpacking() -> None:
    packing = Packing(torch.tensor([[True, True, False], [False, True, False]]))
    padded = torch.arange(12.0).view(2, 3, 2) + 1
    packed = packing.pack(padded)
    assert packed.tolist() == [[1, 2], [3, 4], [9, 10]]
    back = packing.unpack(packed)
    assert torch.equal(back[packing.real], packed)
    assert not bool(back[~packing.real].any())
    whole = Packing(torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(whole.unpack(whole.pack(padded)), padded)


@pytest.mark.filterwarnings("ignore:A forward hook edited")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_norm_runs_once_unless_somebody_looks_inside(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = ragged(model)
    plain = logits(model, batch)
    seen: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = activation

    names = [f"blocks.1.ln2.{point}" for point in ("hook_scale", "hook_normalized", "hook_out")]
    with model.bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        watched = logits(model, batch)
    assert torch.equal(plain, watched)
    assert list(seen) == names
    scaled = seen[names[1]] * blocks_of(model)[1].ln2.original_component.weight
    if arch == "llama":
        assert relative(scaled, seen[names[2]]) < 1e-5

    def halve(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation / 2

    with model.bridge.hooks(fwd_hooks=[(names[0], halve)]):
        assert relative(logits(model, batch), plain) > 1e-2
