"""A user's program that is right: a strict checker has nothing to say."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

import firsttok as ft
from firsttok import probes
from firsttok.errors import BadInputError
from firsttok.keys import FactKeys, KeySource
from firsttok.tensors import Intervention, TokenBatch

MINE = ft.Method(
    name="mine",
    label="Mine",
    direction=ft.Slot.PREFIXED_MEAN,
    residual=ft.Slot.UNPREFIXED,
    denominator=ft.Slot.PREFIXED_MEAN,
    anchor=ft.Slot.UNPREFIXED,
)


@dataclass(frozen=True)
class FirstPrefix:
    """A key source of one's own: the first prefix only."""

    name: str = "first prefix"

    def keys(
        self, model: ft.Model, fact: ft.Fact, contexts: ft.ContextSet, *, layer: int
    ) -> FactKeys:
        """Take both keys from one prefix."""
        only = replace(contexts, templates=contexts.templates[:1])
        return ft.fact_keys(model, fact, only, layer=layer)


@dataclass(frozen=True)
class Unchanged:
    """An intervention of one's own that changes nothing."""

    name: str = "unchanged"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """Give the batch back."""
        return batch


def norms(model: ft.Model, facts: list[ft.Fact]) -> Tensor:
    """Norms of the keys of every layer."""
    keys = ft.capture_keys(model, facts, layers=range(30))
    assert_type(keys, ft.Keys)
    return keys.norms


def perplexities(model: ft.Model, fact: ft.Fact, folder: Path) -> Iterator[float]:
    """Edit by each method, keep the edit, and measure."""
    contexts = ft.sample_contexts(model, seed=0)
    moment = ft.compute_second_moment(model)
    for method in (ft.ROME, ft.C_ROME, ft.P_ROME, ft.FC_ROME, MINE):
        edit = ft.compute_edit(model, fact, method=method, contexts=contexts, second_moment=moment)
        assert_type(edit, ft.Edit)
        assert_type(edit.report, dict[str, float])
        ratio: float = edit.report["numerator"] / edit.report["denominator"]
        edit.save(folder / f"{method.name}-{ratio:.0f}.safetensors")
        applied: AbstractContextManager[ft.Model] = edit.applied(model)
        with applied:
            yield ft.perplexity(model).mean


def main() -> int:
    """Everything that README shows."""
    try:
        model = ft.load("smollm2-135m", dtype="float32")
    except BadInputError:
        return 2
    assert_type(model, ft.Model)
    fact = ft.Fact(
        subject="England",
        template="{}'s capital city is",
        target_new="Berlin",
        target_true="London",
    )
    source: KeySource = FirstPrefix()
    same: Intervention = Unchanged()
    views = [model, model.intervened(same), model.intervened(probes.SeesAll(position=0))]
    for view in views:
        assert_type(norms(view, [fact]), Tensor)
    worst: float = max(perplexities(model, fact, Path()))
    again = ft.load_edit("mine.safetensors")
    label: str = f"{source.name} {worst:.1f} {again.layer} {ft.__version__}"
    with torch.no_grad():
        return len(label)
