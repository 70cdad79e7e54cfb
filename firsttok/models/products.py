"""Products with a weight by oneDNN, where that is faster than what PyTorch multiplies with.

PyTorch's CPU builds multiply with Intel's MKL, which on processors of other makers keeps to AVX2
even if they have AVX-512. oneDNN, in the same builds, asks the processor what it has.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FastProducts", "linear", "linear_into"]

_LEAST = 2**22
"""Multiplications below which setting up a product by oneDNN costs more than it saves."""
_FEWEST_ROWS, _MOST_ROWS, _COLUMNS = 16, 256, 2048
"""Rows and columns of one call.

oneDNN compiles each shape anew and keeps more than half a megabyte of code for it, so rows go in
powers of two, the last ones with zeros below. So many outputs are still in the cache when they are
copied to their place.
"""


class FastProducts(TorchFunctionMode):
    """While it is entered, modules multiply as :func:`linear` does: ``nn.Linear`` and ``Conv1D``.

    Both give what they gave before but for the last bits.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Stand in for two of PyTorch's functions."""
        if not kwargs:
            if func is torch.nn.functional.linear:
                return linear(*args)
            # The released GPT-2 keeps its weights as [in, out].
            if func is torch.addmm and len(args) == 3 and args[0].ndim == 1:
                bias, inputs, matrix = args
                if _pays(inputs, matrix.T, bias):
                    return linear(inputs, matrix.T, bias)
        return func(*args, **(kwargs or {}))


def linear(
    inputs: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, "d_out"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """Return ``inputs @ weight.T + bias``, by oneDNN where it pays.

    It pays for large products in float32 on a CPU with AVX-512, where no gradient of the weight is
    asked for. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off.
    """
    if not _pays(inputs, weight, bias):
        return torch.nn.functional.linear(inputs, weight, bias)
    if inputs.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(inputs, weight, bias)
    return _product(inputs, weight, bias)


@torch.no_grad()
def linear_into(
    out: Float[Tensor, "place d_out"],
    inputs: Float[Tensor, "place d_in"],
    weight: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, "place d_out"]:
    """Overwrite ``out`` with ``inputs @ weight.T`` and return it; no gradient flows."""
    if not _pays(inputs, weight, None):
        return torch.mm(inputs, weight.T, out=out)
    return _fill(out, inputs, weight, None)


class _Linear(torch.autograd.Function):
    """A product whose weight stays as it is: the only gradient is that of the inputs."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(inputs, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return _product(gradient, weight.T, None), None, None


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1])
    out = _fill(rows.new_empty(len(rows), len(weight)), rows, weight, bias)
    return out.view(*inputs.shape[:-1], len(weight))


def _fill(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    ops: Any = torch.ops.mkldnn
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
            found = ops._linear_pointwise(some, part, shift, "none", [], "")
            out[start : start + size, columns] = found[:rest]
            start += size
    return out


def _pays(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        inputs.numel() * weight.shape[0] >= _LEAST
        and inputs.dtype is weight.dtype is torch.float32
        and inputs.device.type == weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and _is_trained(weight, bias))
        and torch.backends.mkldnn.enabled
        and _is_offered()
    )


def _is_trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


@cache
def _is_offered() -> bool:
    """Whether this build of PyTorch has oneDNN and this processor AVX-512."""
    ops: Any = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(ops, "_linear_pointwise")
    )
