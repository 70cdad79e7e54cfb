"""Products by oneDNN are PyTorch's own but for the last bits, and are made only where they pay."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, DECODERS, LAYERS, TinyFactory, relative, sentence_prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from firsttok.engine import products
from firsttok.engine.products import fast_products, linear, linear_into
from firsttok.engine.replay import keys_behind
from firsttok.engine.tail import Replay
from firsttok.evaluation import sample_continuations
from firsttok.models import Model, capture, capture_tail, logits
from firsttok.prompts import pad

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of all calls of oneDNN; small products make them, too, on any processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    plain: Callable[..., Tensor] = vars(products)["_by_onednn"]
    seen: list[tuple[int, int]] = []

    def by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((len(rows), len(weight)))
        return plain(rows, weight, bias)

    monkeypatch.setattr(products, "_by_onednn", by_onednn)
    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(products, "_is_faster", lambda: True)
    return seen


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lies", ["rows", "columns"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (17,), (45,), (700,), (2, 150), (0,), ()])
def test_it_is_the_plain_product(
    calls: list[tuple[int, int]], shape: tuple[int, ...], biased: bool, lies: str
) -> None:
    inputs = noise(*shape, 24)
    # More columns than one call makes, and not a multiple of them.
    weight = noise(2100, 24, seed=1) if lies == "rows" else noise(24, 2100, seed=1).T
    bias = noise(2100, seed=2) if biased else None
    found = linear(inputs, weight, bias)
    wide = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(inputs.double(), weight.double(), wide)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert bool(calls) == (inputs.numel() > 24)


def test_few_shapes_are_asked_for(calls: list[tuple[int, int]]) -> None:
    for rows in range(1, 600, 7):
        linear(noise(rows, 24), noise(5000, 24, seed=1))
    assert {rows for rows, _ in calls} == {16, 32, 64, 128, 256}
    assert {columns for _, columns in calls} == {2048, 5000 - 2 * 2048}


@pytest.mark.parametrize("rows", [1, 16, 45, 300])
def test_its_gradients_are_the_plain_ones(calls: list[tuple[int, int]], rows: int) -> None:
    inputs, weight = noise(2, rows, 40).requires_grad_(), noise(24, 40, seed=1)
    gradient = noise(2, rows, 24, seed=2).requires_grad_()
    output = linear(inputs, weight, noise(24, seed=3))
    forward = len(calls)
    (found,) = torch.autograd.grad(output, inputs, gradient, create_graph=True)
    assert relative(found.detach(), gradient.detach().double() @ weight.double()) < 1e-6
    assert len(calls) == 2 * forward
    further = noise(2, rows, 40, seed=4)
    (second,) = torch.autograd.grad(found, gradient, further)
    assert relative(second, further.double() @ weight.double().T) < 1e-6


def test_what_it_returns_can_be_changed_in_place(calls: list[tuple[int, int]]) -> None:
    inputs, weight = noise(3, 20, 40).requires_grad_(), noise(24, 40, seed=1)
    output = linear(inputs, weight)
    output[:, 0] *= 2
    output.sum().backward()
    expected = weight.sum(0).expand(3, 20, 40).clone()
    expected[:, 0] *= 2
    assert inputs.grad is not None
    assert relative(inputs.grad, expected) < 1e-6
    assert calls


@pytest.mark.parametrize("rows", [1, 16, 45])
def test_what_is_overwritten_holds_the_product(calls: list[tuple[int, int]], rows: int) -> None:
    out = torch.full((rows, 2100), torch.nan)
    inputs, weight = noise(rows, 24), noise(2100, 24, seed=1)
    assert linear_into(out, inputs, weight) is out
    assert relative(out, inputs.double() @ weight.double().T) < 1e-6
    assert bool(calls) == (rows > 1)


def test_what_is_overwritten_has_to_be_of_the_type(calls: list[tuple[int, int]]) -> None:
    with pytest.raises(RuntimeError, match="type"):
        linear_into(torch.zeros(20, 30).double(), noise(20, 24), noise(30, 24))
    assert not calls


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_overwritten_where_a_gradient_is_asked_for(enabled: bool) -> None:
    out = torch.zeros(20, 30)
    with (
        torch.backends.mkldnn.flags(enabled=enabled),
        pytest.raises(RuntimeError, match="gradient"),
    ):
        linear_into(out, noise(20, 24).requires_grad_(), noise(30, 24))
    assert not out.any()


@pytest.mark.parametrize(
    "why",
    ["small", "one row", "float64", "trained weight", "trained bias", "off", "vector", "sparse"],
)
def test_where_it_does_not_pay_the_product_is_pytorchs_own(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    module = torch.nn.Linear(24, 30, bias=why != "vector").requires_grad_(False)
    inputs = noise(1 if why == "one row" else 20, 24)
    if why == "small":
        monkeypatch.setattr(products, "_LEAST", 20 * 24 * 30 + 1)
    if why == "float64":
        module, inputs = module.double(), inputs.double()
    if why == "vector":
        module.weight = torch.nn.Parameter(module.weight[0], False)
    if why == "sparse":
        module.weight = torch.nn.Parameter(module.weight.to_sparse_csr(), False)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(why == f"trained {name}")
    expected = module(inputs)
    with torch.backends.mkldnn.flags(enabled=why != "off"), fast_products(CPU):
        found = module(inputs)
    assert torch.equal(found, expected)
    assert found.requires_grad == why.startswith("trained")
    assert not calls
    if why.startswith("trained"):
        with torch.no_grad(), fast_products(CPU):
            module(inputs)
        assert calls


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_modules_take_it_only_while_it_is_entered(calls: list[tuple[int, int]], kind: str) -> None:
    module = torch.nn.Linear(24, 30) if kind == "Linear" else Conv1D(30, 24)
    module.requires_grad_(False)
    inputs = noise(2, 20, 24)
    before = module(inputs)
    assert not calls
    with contextlib.suppress(KeyboardInterrupt), fast_products(CPU):
        assert relative(module(inputs), before) < 1e-6
        assert calls
        calls.clear()
        raise KeyboardInterrupt
    assert torch.equal(module(inputs), before)
    with fast_products(torch.device("cuda")):
        assert torch.equal(module(inputs), before)
    assert not calls


@pytest.mark.parametrize("changed", ["beta", "bias of one", "matrix to add"])
def test_another_sum_of_a_product_is_left_alone(calls: list[tuple[int, int]], changed: str) -> None:
    inputs, matrix = noise(20, 24), noise(24, 30, seed=1)
    added = {"bias of one": noise(1), "matrix to add": noise(20, 30)}.get(changed, noise(30))
    beta = 2.0 if changed == "beta" else 1.0

    def run() -> Tensor:
        # As modules call it, but for beta.
        if beta == 1:
            return torch.addmm(added, inputs, matrix)
        return torch.addmm(added, inputs, matrix, beta=beta)

    expected = run()
    with fast_products(CPU):
        assert torch.equal(run(), expected)
    assert not calls


@pytest.mark.parametrize(
    ("maker", "capability", "mkl", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("GenuineIntel", "AVX512", True, False),
        ("AuthenticAMD", "AVX512", False, False),
    ],
)
def test_which_processors_it_is_for(
    monkeypatch: pytest.MonkeyPatch, maker: str, capability: str, mkl: bool, expected: bool
) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    is_faster = vars(products)["_is_faster"].__wrapped__
    monkeypatch.setattr(products.Path, "read_text", lambda *_, **__: f"vendor_id : {maker}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert is_faster() == expected


class Plain(TorchDispatchMode):
    """Notes the products of two matrices that PyTorch makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(each.shape for each in args))
        return func(*args, **(kwargs or {}))


def passes(model: Model) -> dict[str, Callable[[], Any]]:
    """What firsttok runs models by."""
    batch = pad(model, sentence_prompts(model))
    ones = torch.ones_like(batch.tokens, dtype=torch.bool)
    key_hook = model.sites[-1].key_hook
    found: dict[str, Callable[[], Any]] = {
        "keys": lambda: capture(model, batch, [key_hook], stop_at_layer=None),
        "any hook": lambda: capture(
            model, batch, [key_hook, model.sites[-1].value_hook], stop_at_layer=None
        ),
    }
    if not model.can_be_edited:
        return found
    found["logits"] = lambda: logits(model, batch)
    # In the last layer's tail all blocks run at once, and none again.
    found["capturing a tail"] = lambda: capture_tail(model, batch, layer=LAYERS - 1)
    found["capturing a whole pass"] = lambda: capture_tail(
        model, batch, layer=1, replay=Replay.WHOLE
    )
    for mode in {model.replay, Replay.FROM, Replay.WHOLE}:
        tail = capture_tail(model, batch, layer=0, replay=mode)
        found[f"replay, {mode.value}"] = lambda tail=tail: tail.logits(model.bridge, ones)
    found["a cut"] = lambda: capture_tail(model, batch, layer=0, cut=2)
    found["generation"] = lambda: sample_continuations(model, "The key", count=2, tokens=2)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_pass_takes_it(tiny: TinyFactory, calls: list[tuple[int, int]], arch: str) -> None:
    model = tiny(arch)
    for name, run in passes(model).items():
        calls.clear()
        with Plain() as plain:
            run()
        assert calls, name
        assert not plain.shapes, name
        calls.clear()
        with torch.backends.mkldnn.flags(enabled=False), Plain() as plain:
            run()
        assert not calls, name
        assert plain.shapes, name


def test_keys_behind_a_shared_beginning_take_it(
    tiny: TinyFactory, calls: list[tuple[int, int]]
) -> None:
    model = tiny("llama")
    batch = pad(model, sentence_prompts(model))
    assert keys_behind(model.bridge, batch, layer=1, cut=2) is not None
    assert len(calls) >= 8


@pytest.mark.parametrize("arch", DECODERS)
def test_a_replay_and_its_gradient_are_the_plain_ones(
    tiny: TinyFactory, calls: list[tuple[int, int]], arch: str
) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model))
    where = batch.attention_mask.bool()
    tail = capture_tail(model, batch, layer=1)
    found: list[Tensor] = []
    for enabled in (True, False):
        change = torch.zeros_like(tail.residual).requires_grad_()
        with torch.backends.mkldnn.flags(enabled=enabled):
            calls.clear()
            output = tail.logits(model.bridge, where, change)
            assert bool(calls) == enabled
            calls.clear()
            found += torch.autograd.grad(output.log_softmax(-1)[:, 7].sum(), change)
            assert bool(calls) == enabled
        found.append(output.detach())
    assert relative(found[0], found[2]) < 1e-4
    assert relative(found[1], found[3]) < 1e-5
