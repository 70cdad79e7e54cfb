"""Whether fast and naive edits agree, and how near the fast ones come to the machine's limit."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from flops import count_executed, needed, replayed_tokens
from measuring import Table, matmul_rate
from naive import NaiveEdit
from setting import Setting

from firsttok.data import Fact
from firsttok.editing import RankOneEdit
from firsttok.keys import fact_keys

__all__ = ["agreement", "share"]


def agreement(
    setting: Setting,
    facts: Sequence[Fact],
    edits: Sequence[RankOneEdit],
    plain: Sequence[NaiveEdit],
) -> Table:
    """Largest differences between fast and naive edits, each with what is allowed."""
    of_loss = of_value = of_right = 0.0
    same = all(len(e.losses) == len(n.value.losses) for e, n in zip(edits, plain, strict=True))
    for fact, edit, naive in zip(facts, edits, plain, strict=True):
        pairs = zip(edit.losses, naive.value.losses, strict=False)
        of_loss = max(of_loss, *(abs(found / loss - 1) for found, loss in pairs))
        # v* from the closed form read backwards.
        key = fact_keys(setting.model, fact, setting.contexts, layer=setting.layer).unprefixed
        output = setting.model.site(setting.layer).values_of(key[None])[0]
        target = output + edit.report.denominator * edit.right
        of_value = max(of_value, _relative(target, naive.value.target))
        of_right = max(of_right, _relative(edit.right, naive.right))
    return Table(
        title=f"Largest relative difference from the naive side (facts: {len(facts)})",
        columns=("of", "difference", "allowed", "verdict"),
        rows=(
            ("a loss, any step", of_loss, 2e-3, _verdict(of_loss <= 2e-3)),
            ("v*", of_value, 1e-2, _verdict(of_value <= 1e-2)),
            ("the right vector", of_right, "-", "-"),
            ("the number of losses", "none" if same else "some", "none", _verdict(same)),
        ),
    )


def share(
    setting: Setting, edits: Sequence[RankOneEdit], seconds: float, run: Callable[[], Any]
) -> Table:
    """How much of the machine's measured rate of matrix products the fast side uses."""
    model, facts, contexts = setting.model, setting.facts, setting.contexts
    required = sum(
        needed(model, fact, contexts, layer=setting.layer, losses=len(edit.losses))
        for fact, edit in zip(facts, edits, strict=True)
    )
    executed = count_executed(run)
    rows = int(median(replayed_tokens(model, fact, contexts) for fact in facts))
    rates = matmul_rate(model, [rows, 4 * rows, 16 * rows])
    limit = max(rates.values())
    site = model.site(setting.layer)
    shape = f"{site.d_mlp} x {site.d_model}"
    cells: list[tuple[str | float | int, ...]] = [
        (f"measured product, [{count} x {shape}], GFLOP/s", rate) for count, rate in rates.items()
    ]
    cells += [
        ("the limit: the best of these, GFLOP/s", limit),
        ("FLOPs the edits need (the formula in benchmarks/flops.py), GFLOP", required / 1e9),
        ("FLOPs of the products that ran, padding and all, GFLOP", executed / 1e9),
        ("achieved, by what is needed, GFLOP/s", required / seconds / 1e9),
        ("share of the limit, by what is needed", required / seconds / 1e9 / limit),
        ("share of the limit, by what ran", executed / seconds / 1e9 / limit),
    ]
    return Table(
        title="Share of the machine's rate of matrix products (median time of the fast side)",
        columns=("quantity", "value"),
        rows=tuple(cells),
    )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"
