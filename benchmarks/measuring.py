"""Sides that are timed in turn, and what comes out: seconds, memory, the machine's own limit."""

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firsttok.engine.products import linear
from firsttok.models import Model
from firsttok.provenance import versions

__all__ = [
    "MIB",
    "Comparison",
    "Extras",
    "Outcome",
    "Plan",
    "Report",
    "Samples",
    "Side",
    "Table",
    "environment",
    "matmul_rate",
    "measure_memory",
    "run_plan",
]

Report = Callable[[int, int, str], None]
"""Told how many steps are done, of how many, and what runs now."""
MIB = 2**20
_RESET_SLACK = 8 * MIB
"""How far a record that was just set back may lie above what is held."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to do a piece of work."""

    label: str
    """Name in the results."""
    run: Callable[[], Any]
    """Does all of it once."""
    items: float
    """How much work that is."""
    unit: str
    """What is counted."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the results."""

    title: str
    """What it shows."""
    columns: tuple[str, ...]
    """Heads."""
    rows: tuple[tuple[str | float | int, ...], ...]
    """Cells."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a benchmark says beside its times."""

    tables: tuple[Table, ...] = ()
    """More tables."""
    notes: tuple[str, ...] = ()
    """Sentences."""
    failures: tuple[str, ...] = ()
    """What was to hold and does not."""


def _nothing(_results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
    return Extras()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a benchmark runs in one process."""

    sides: tuple[Side, ...] = ()
    """Everything that is timed, in turn."""
    pairs: tuple[tuple[str, str, str], ...] = ()
    """A name, the fast side's label and the naive side's label."""
    model: str | None = None
    """What it runs on, if not on the model that was asked for."""
    warm: Callable[[], Any] | None = None
    """Runs once before the clock does: what is loaded on first use is not timed."""
    check: Callable[[Mapping[str, Any], Mapping[str, Sequence[float]]], Extras] = _nothing
    """Looks at what the sides returned last and at their seconds."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """All times of one side."""

    label: str
    """Name of the side."""
    seconds: tuple[float, ...]
    """Seconds of each repeat."""
    items: float
    """Work in each."""
    unit: str
    """What is counted."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A fast side against a naive one."""

    label: str
    """What is compared."""
    fast: Samples
    """The fast side."""
    naive: Samples
    """The naive side."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All of one benchmark."""

    comparisons: tuple[Comparison, ...] = ()
    """The pairs."""
    timings: tuple[Samples, ...] = ()
    """Sides that are in no pair."""
    extras: Extras = field(default_factory=Extras)
    """The rest."""


def run_plan(plan: Plan, *, repeats: int, device: torch.device, report: Report) -> Outcome:
    """Time every side of a plan in turn, several times over."""
    total = repeats * len(plan.sides) + 2
    report(0, total, "warming up")
    if plan.warm is not None:
        plan.warm()
    seconds: dict[str, list[float]] = {side.label: [] for side in plan.sides}
    results: dict[str, Any] = {}
    done = 1
    for _ in range(repeats):
        for side in plan.sides:
            report(done, total, side.label)
            _settle(device)
            start = time.perf_counter()
            results[side.label] = side.run()
            _settle(device)
            seconds[side.label].append(time.perf_counter() - start)
            done += 1
    report(done, total, "checking")
    extras = plan.check(results, seconds)
    samples = {
        side.label: Samples(
            label=side.label,
            seconds=tuple(seconds[side.label]),
            items=side.items,
            unit=side.unit,
        )
        for side in plan.sides
    }
    paired = {label for _, fast, naive in plan.pairs for label in (fast, naive)}
    return Outcome(
        comparisons=tuple(
            Comparison(label=label, fast=samples[fast], naive=samples[naive])
            for label, fast, naive in plan.pairs
        ),
        timings=tuple(sample for label, sample in samples.items() if label not in paired),
        extras=extras,
    )


def measure_memory(side: Side, device: torch.device) -> dict[str, float | None]:
    """Run a side once in this process; MiB held before and at most, None where not measured.

    Loading a model may take more than the run, so the kernel's record is first set back. Where it
    cannot be, it tells of the run only if the run raised it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # A refusal to reset shows in what is read next.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before, resident = _peak_rss(), _status("VmRSS")
    side.run()
    after = _peak_rss()
    reset = resident is not None and before <= resident + _RESET_SLACK
    found: dict[str, float | None] = {
        "rss_before": None if resident is None else resident / MIB,
        "rss_peak": after / MIB if reset or after > before else None,
    }
    if device.type == "cuda":
        found["cuda_peak"] = torch.cuda.max_memory_allocated(device) / MIB
    return found


@torch.no_grad()
def matmul_rate(model: Model, rows: Sequence[int], *, seconds: float = 0.5) -> dict[int, float]:
    """GFLOP/s of ``[rows, d_mlp] @ [d_mlp, d_model]`` with the model's own matrices, by rows.

    The fastest pass over all layers, PyTorch's usual product and firsttok's tried in turn.
    """
    ways: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (linear, torch.nn.functional.linear)
    weights = [model.site(layer).matrix for layer in range(model.n_layers)]
    rates: dict[int, float] = {}
    for count in rows:
        keys = torch.randn(count, weights[0].shape[0], device=model.device).to(model.dtype)
        best = 0.0
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for multiply in ways:
                _settle(model.device)
                start = time.perf_counter()
                for weight in weights:
                    multiply(keys, weight.T)
                _settle(model.device)
                elapsed = time.perf_counter() - start
                best = max(best, 2 * count * weights[0].numel() * len(weights) / elapsed / 1e9)
        rates[count] = best
    return rates


def environment(device: torch.device, dtype: str) -> dict[str, Any]:
    """What the numbers were measured on; neither paths nor names of machines."""
    return {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
    }


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_rss() -> int:
    known = _status("VmHWM")
    if known is not None:
        return known
    # Kibibytes on Linux, where it can never be set back; bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int | None:
    """A size that Linux tells of this process, in bytes; None where it does not."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(sizes[0]) * 1024 if sizes else None
