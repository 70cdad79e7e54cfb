"""Products with a weight by oneDNN, where PyTorch's usual library leaves half the processor idle.

PyTorch's CPU builds multiply with Intel's MKL, which on processors of other makers keeps to AVX2
even if they have AVX-512. oneDNN, in the same builds, asks the processor itself what it has.
"""

import contextlib
import os
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["fast_products", "linear", "linear_into", "runs_plain"]

_LEAST = 2**22
"""Multiplications below which setting up a product by oneDNN costs more than it saves.

Neither does it pay for one row, where a product is as fast as the weight is read.
"""
_FEWEST_ROWS, _MOST_ROWS, _COLUMNS = 16, 256, 2048
"""Rows and columns of one call.

oneDNN compiles each shape anew and keeps the code, so that rows go in few sizes, powers of two, the
last ones with zeros below. Columns are few enough that a call's outputs are still in the cache when
they are copied to their place.
"""


def fast_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While it is entered, modules multiply as :func:`linear` does: ``nn.Linear`` and ``Conv1D``.

    What they put out differs in the last bits at most.

    Args:
        device: Where the modules are; nothing changes but on a CPU.
    """
    return _FastProducts() if device.type == "cpu" and _is_on() else contextlib.nullcontext()


def linear(
    inputs: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, "d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """Return ``inputs @ weight.T + bias``, by oneDNN where it pays.

    It does for large products in float32 on a CPU with AVX-512 that is not Intel's, where no
    gradient of the weight is asked for. ``torch.backends.mkldnn.flags(enabled=False)`` turns it
    off, as it does whatever else PyTorch leaves to oneDNN.
    """
    if _pays(inputs, weight, bias):
        return _Linear.apply(inputs, weight, bias)
    return torch.nn.functional.linear(inputs, weight, bias)


def linear_into(
    out: Float[Tensor, "place d_out"],
    inputs: Float[Tensor, "place d_in"],
    weight: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, "place d_out"]:
    """Overwrite ``out`` with ``inputs @ weight.T`` and return it.

    Raises:
        RuntimeError: If a gradient is asked for: what is overwritten has none.
    """
    if torch.is_grad_enabled() and any(each.requires_grad for each in (out, inputs, weight)):
        raise RuntimeError("a product that overwrites a tensor has no gradient; use linear")
    fits = _is_plain(out) and out.shape == (len(inputs), len(weight))
    if not (fits and _pays(inputs, weight)):
        return torch.mm(inputs, weight.T, out=out)
    _fill(out, inputs, weight, None)
    return out


class _FastProducts(TorchFunctionMode):
    """Stands in for the two functions that modules multiply with."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Given types are those of subclasses, which have a way of their own.
        if not types and not kwargs:
            if func is torch.nn.functional.linear and _pays(*args):
                return _Linear.apply(*args, *[None] * (3 - len(args)))
            # GPT-2's Conv1D keeps its weight as [in, out].
            if func is torch.addmm and len(args) == 3 and _pays(args[1], args[2].T, args[0]):
                return _Linear.apply(args[1], args[2].T, args[0])
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """A product whose weight stays as it is: the only gradient is that of the inputs."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return linear(gradient, weight.T), None, None


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = inputs.new_empty(*inputs.shape[:-1], len(weight))
    _fill(out.view(-1, len(weight)), inputs.reshape(-1, inputs.shape[-1]), weight, bias)
    return out


def _fill(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for left in range(0, len(weight), _COLUMNS):
        columns = slice(left, left + _COLUMNS)
        part, shift = weight[columns], None if bias is None else bias[columns]
        start = 0
        while start < len(rows):
            rest = len(rows) - start
            size = max(_FEWEST_ROWS, min(_MOST_ROWS, 1 << (rest.bit_length() - 1)))
            some = rows[start : start + size]
            if rest < size:
                some = torch.nn.functional.pad(some, (0, 0, 0, size - rest))
            out[start : start + size, columns] = _by_onednn(some, part, shift)[:rest]
            start += size


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    ops: Any = torch.ops.mkldnn
    return ops._linear_pointwise(rows, weight, bias, "none", [], "")


def _pays(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    trained = (weight,) if bias is None else (weight, bias)
    return (
        weight.ndim == 2
        and inputs.numel() > weight.shape[1]
        and inputs.numel() * len(weight) >= _LEAST
        and inputs.shape[-1] == weight.shape[1]
        and all(map(_is_plain, (inputs, weight)))
        and (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1]))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in trained))
        and _is_on()
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
    )


def runs_plain() -> bool:
    """Whether ``FIRSTTOK_PLAIN=1`` turns every fast path off: products, packing, replays, norms.

    What they compute is what the plain model does, up to rounding; this is how to check it.
    """
    return os.environ.get("FIRSTTOK_PLAIN", "0") not in ("", "0")


def _is_on() -> bool:
    return not runs_plain() and torch.backends.mkldnn.enabled and _is_faster()


@cache
def _is_faster() -> bool:
    """Whether this build has oneDNN, and this processor AVX-512 that MKL makes no use of."""
    try:
        maker = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        maker = platform.processor()
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in maker
    )
