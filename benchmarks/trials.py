"""What else was tried to make an edit faster on a CPU, each beside the usual way in one run.

``python benchmarks/trials.py`` prints a table; `benchmarks/README.md` says what came of it. The
work is one forward and one backward pass of the blocks above the edited layer, at the shapes of the
value optimisation (22 rows of 6 tokens), on plain Hugging Face layers, so that each way can be
tried without writing it into firsttok first. The usual way multiplies as firsttok does.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import firsttok as ft
from firsttok.engine.products import fast_products, linear
from firsttok.models import embedded_folder

__all__ = ["main"]

ROWS, COLUMNS = 22, 6
Trial = Callable[[], None]


def main() -> None:
    """Time every way, alternating with the usual one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--skip-compile", action="store_true")
    args = parser.parse_args()
    layers = _layers(torch.float32, "eager")
    usual = _blocks_pass(layers)
    trials: dict[str, Trial] = {
        "PyTorch's own products": _blocks_pass(layers, own=True),
        "scaled dot-product attention": _blocks_pass(_layers(torch.float32, "sdpa")),
        "bfloat16": _blocks_pass(_layers(torch.bfloat16, "eager"), torch.bfloat16),
        "four facts in a batch (per fact)": _blocks_pass(layers, facts=4),
    }
    if not args.skip_compile:
        start = time.perf_counter()
        compiled = _blocks_pass([torch.compile(layer) for layer in layers], own=True)
        compiled()
        print(f"torch.compile took {time.perf_counter() - start:.0f} s before its first result")
        trials["torch.compile, own products"] = compiled
    for name, trial in trials.items():
        _report(name, usual, trial, args.repeats)
    if torch.get_num_threads() > 1:
        name = f"one thread instead of {torch.get_num_threads()}"
        _report(name, usual, _on_one_thread(usual), args.repeats)
    _report_products(args.repeats)


def _layers(dtype: torch.dtype, attention: str) -> list[Any]:
    """The upper half of the embedded model's blocks, with their rotary angles bound."""
    auto: Any = transformers.AutoModelForCausalLM
    model: Any = auto.from_pretrained(
        str(embedded_folder("smollm2-135m")), dtype=dtype, attn_implementation=attention
    )
    model.requires_grad_(False).eval()
    return [*model.model.layers[16:], model.model.rotary_emb]


def _blocks_pass(
    layers: list[Any],
    dtype: torch.dtype = torch.float32,
    *,
    facts: int = 1,
    own: bool = False,
) -> Trial:
    *blocks, rotary = layers
    generator = torch.Generator().manual_seed(0)
    width = 576
    hidden = torch.randn(facts * ROWS, COLUMNS, width, generator=generator).to(dtype)
    angles = rotary(hidden, torch.arange(COLUMNS)[None])
    mask = torch.full((COLUMNS, COLUMNS), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]

    def run() -> None:
        delta = torch.zeros(width, dtype=dtype, requires_grad=True)
        state = hidden + delta
        with contextlib.nullcontext() if own else fast_products(hidden.device):
            for block in blocks:
                output = block(state, attention_mask=mask, position_embeddings=angles)
                state = output[0] if isinstance(output, tuple) else output
        state.sum().backward()

    run.facts = facts  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _on_one_thread(trial: Trial) -> Trial:
    threads = torch.get_num_threads()

    def run() -> None:
        torch.set_num_threads(1)
        try:
            trial()
        finally:
            torch.set_num_threads(threads)

    return run


def _seconds(trial: Trial) -> float:
    start = time.perf_counter()
    trial()
    return (time.perf_counter() - start) / getattr(trial, "facts", 1)


def _report(name: str, usual: Trial, trial: Trial, repeats: int) -> None:
    trial()
    ratios = [_seconds(usual) / _seconds(trial) for _ in range(repeats)]
    quarter = len(ratios) // 4
    spread = sorted(ratios)
    print(
        f"{name:36} {statistics.median(ratios):5.2f} times as fast "
        f"({spread[quarter]:.2f} to {spread[-quarter - 1]:.2f})"
    )


def _report_products(repeats: int) -> None:
    """A matrix product as firsttok makes it, and with oneDNN's packed weights, beside PyTorch's."""
    model = ft.load()
    weight = model.site(15).matrix.T.contiguous()
    keys = torch.randn(ROWS * COLUMNS, weight.shape[1])
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight, len(keys))

    def repeated(multiply: Callable[[], Any]) -> Trial:
        def run() -> None:
            for _ in range(20):
                multiply()

        return run

    usual = repeated(lambda: torch.nn.functional.linear(keys, weight))
    ways = {
        "products.linear (product only)": lambda: linear(keys, weight),
        "oneDNN-packed weights (product only)": lambda: ops._linear_pointwise(
            keys, packed, None, "none", [], ""
        ),
    }
    for name, multiply in ways.items():
        _report(name, usual, repeated(multiply), repeats)


if __name__ == "__main__":
    main()
