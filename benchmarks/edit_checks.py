"""Whether fast and naive edits agree, and how near the fast ones come to the machine's limit."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from flops import count_executed, needed, replayed_tokens
from measuring import Extras, Table, matmul_rate
from naive import NaiveEdit
from setting import Setting
from tolerances import ALLOWED, Difference, judge

from firsttok.data import Fact
from firsttok.editing import Edit
from firsttok.keys import fact_keys

__all__ = ["agreement", "both_ratios", "share"]


def agreement(
    setting: Setting,
    facts: Sequence[Fact],
    edits: Sequence[Edit],
    plain: Sequence[NaiveEdit],
) -> Extras:
    """Largest differences between fast and naive edits, each with what the weights' type allows."""
    first = of_loss = of_value = of_right = 0.0
    of_count = 0
    for fact, edit, naive in zip(facts, edits, plain, strict=True):
        pairs = zip(edit.losses, naive.value.losses, strict=False)
        of_losses = [abs(found / loss - 1) for found, loss in pairs]
        first, of_loss = max(first, of_losses[0]), max(of_loss, *of_losses)
        of_count = max(of_count, abs(len(edit.losses) - len(naive.value.losses)))
        # v* from the closed form read backwards.
        key = fact_keys(setting.model, fact, setting.contexts, layer=setting.layer).unprefixed
        output = setting.model.site(setting.layer).values_of(key[None])[0]
        target = output + edit.report["denominator"] * edit.right
        of_value = max(of_value, _relative(target, naive.value.target))
        of_right = max(of_right, _relative(edit.right, naive.right))
    allowed = ALLOWED[setting.dtype]
    return judge(
        f"Largest relative difference from the naive side (facts: {len(facts)})",
        Difference(of="the first loss", found=first, allowed=allowed.first_loss),
        Difference(of="a loss, any step", found=of_loss, allowed=allowed.loss),
        Difference(of="v*", found=of_value, allowed=allowed.value),
        Difference(of="the right vector", found=of_right, allowed=None),
        Difference(
            of="the number of losses (absolute)", found=float(of_count), allowed=allowed.losses
        ),
    )


def both_ratios(
    edits: Sequence[Edit],
    plain: Sequence[NaiveEdit],
    seconds: Mapping[str, Sequence[float]],
) -> Table:
    """Naive over fast by facts and by losses: facts stop early, each at a step of its own."""
    losses = sum(len(edit.losses) for edit in edits)
    plain_losses = sum(len(edit.value.losses) for edit in plain)
    pairs = list(zip(seconds["fast"], seconds["naive"], strict=True))
    ratio = [(slow / len(plain)) / (quick / len(edits)) for quick, slow in pairs]
    by_loss = [(slow / plain_losses) / (quick / losses) for quick, slow in pairs]
    return Table(
        title="Naive over fast, by what is counted (medians; time before the first loss included)",
        columns=("counted", "fast", "naive", "fast, s each", "naive, s each", "naive over fast"),
        rows=(
            (
                "facts",
                len(edits),
                len(plain),
                median(seconds["fast"]) / len(edits),
                median(seconds["naive"]) / len(plain),
                median(ratio),
            ),
            (
                "losses",
                losses,
                plain_losses,
                median(seconds["fast"]) / losses,
                median(seconds["naive"]) / plain_losses,
                median(by_loss),
            ),
        ),
    )


def share(setting: Setting, edits: Sequence[Edit], seconds: float, run: Callable[[], Any]) -> Table:
    """How much of the machine's measured rate of matrix products the fast side uses."""
    model, facts, contexts = setting.model, setting.facts, setting.contexts
    blocks = setting.naive.blocks
    required = sum(
        needed(model, blocks, fact, contexts, layer=setting.layer, losses=len(edit.losses))
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
