"""The fingerprint of the weights: its definition, written out again, and what it refuses."""

import gc
import hashlib

import pytest
import torch
from tiny import TinyFactory, plain_model
from torch import nn

from firsttok.errors import NonFiniteError
from firsttok.models.fingerprint import hash_weights
from firsttok.models.libraries import collection_paused


class Weights(nn.Module):
    """A matrix and a scalar of one type."""

    matrix: torch.Tensor
    scalar: torch.Tensor

    def __init__(self, values: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.tensor([values, values], dtype=dtype).T)
        self.register_buffer("scalar", torch.tensor(2.5, dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "t5"])
def test_it_is_the_sha256_of_names_shapes_types_and_bytes(
    tiny: TinyFactory, arch: str, dtype: str
) -> None:
    model = tiny(arch, dtype)
    text = b""
    for name, weight in sorted(plain_model(model).state_dict().items()):
        text += f"{name} {tuple(weight.shape)} {weight.dtype}".encode()
        # NumPy has no bfloat16; its bytes are those of the 16-bit integers in the same place.
        bits = weight if weight.dtype == torch.float32 else weight.view(torch.int16)
        text += bits.numpy().tobytes(order="C")
    assert model.fingerprint == hashlib.sha256(text).hexdigest()


def test_a_scalar_and_a_transposed_matrix_are_read_row_by_row() -> None:
    weights = Weights([1.0, 2.0, 3.0], torch.float32)
    text = b"matrix (3, 2) torch.float32" + weights.matrix.numpy().tobytes(order="C")
    text += b"scalar () torch.float32" + weights.scalar.numpy().tobytes()
    assert hash_weights(weights).fingerprint == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    weights = Weights([largest, 1.0, largest], dtype)
    assert not torch.isfinite(weights.matrix.sum())
    assert len(hash_weights(weights).fingerprint) == 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [("nan",), ("inf",), ("-inf",), ("inf", "-inf")])
def test_nan_and_infinity_are_refused(values: tuple[str, ...], dtype: torch.dtype) -> None:
    weights = Weights([1.0, *map(float, values)], dtype)
    with pytest.raises(NonFiniteError, match="weight matrix holds NaN or infinity"):
        hash_weights(weights)


@pytest.mark.parametrize("running", [True, False])
def test_garbage_collection_is_put_off_and_goes_on_as_before(running: bool) -> None:
    def interrupted() -> None:
        with collection_paused():
            assert not gc.isenabled()
            raise KeyboardInterrupt

    assert gc.isenabled()
    if not running:
        gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert gc.isenabled() == running
    finally:
        gc.enable()
