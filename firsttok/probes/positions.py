"""Position swaps: Second2First and First2Second (Appendix A.4, Tables 6 and 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from rich.progress import Progress

from firsttok.arguments import take_fields, taken
from firsttok.data import Fact, PaperValue
from firsttok.editing import ROME
from firsttok.keys import IntervenedKeys, keys_at
from firsttok.measuring import measure_facts
from firsttok.models import Model
from firsttok.prompts import Prompt, fact_prompt, pad
from firsttok.study import Study
from firsttok.tensors import TokenBatch

__all__ = [
    "FIRST2SECOND",
    "SECOND2FIRST",
    "STAGES",
    "PositionShift",
    "PositionSwap",
    "first_key_change",
    "measure_stages",
    "stage_lines",
    "swapped_study",
]

STAGES: Mapping[str, str] = MappingProxyType(
    {
        "none": "ordinary positions everywhere",
        "keys": "the swap acts on k_bar and k^u only",
        "editing": "the swap acts on the keys and on the value optimisation",
        "everything": "the swap acts on keys, value optimisation and evaluation",
    }
)
"""The stages a swap can act in; the paper does not say which it used."""


@dataclass(frozen=True, kw_only=True)
class PositionSwap:
    """Give the token at one position the position embedding of another; an intervention.

    Positions count from the first token of the sequence, BOS included. The token stays where it
    is in the causal order: only its learned embedding, or its rotary angle, is another one. The
    mask is always passed, since transformers takes repeated positions for packed sequences when
    there is none, and cuts attention between them.
    """

    name: str
    of: int
    """Position of the token that is changed."""
    like: int
    """Position whose embedding it gets."""

    __post_init__ = take_fields

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """Change the position ids of every prompt that is long enough."""
        ids = batch.position_ids.clone()
        ids[batch.places(self.of)] = self.like
        return replace(batch, position_ids=ids)


@dataclass(frozen=True, kw_only=True)
class PositionShift:
    """Move every token of a prompt up by some positions; an intervention."""

    by: int

    __post_init__ = take_fields

    @property
    def name(self) -> str:
        """Name in provenance."""
        return f"positions from {self.by}"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """Add to the position ids."""
        return replace(batch, position_ids=batch.position_ids + self.by)


SECOND2FIRST = PositionSwap(name="Second2First", of=0, like=1)
"""The first token gets the second one's position embedding (Table 6)."""
FIRST2SECOND = PositionSwap(name="First2Second", of=1, like=0)
"""The second token gets the first one's position embedding (Table 7)."""


@taken
def swapped_study(study: Study, swap: PositionSwap, stage: str) -> Study:
    """Return a study in which a swap acts as one of :data:`STAGES` says.

    Raises:
        ValueError: If there is no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage is called {stage!r}; choose from {', '.join(STAGES)}")
    if stage == "none":
        return study
    source = IntervenedKeys(name=f"{swap.name} keys", interventions=(swap,))
    if stage == "keys":
        return study.varied(key_source=source)
    judge = study.model if stage == "editing" else None
    return study.varied(key_source=source, model=study.model.intervened(swap), judge=judge)


@taken
def first_key_change(
    model: Model, prompts: Sequence[Prompt], swap: PositionSwap, *, layer: int
) -> float:
    """Largest absolute change a swap makes to the keys of the prompts' first tokens.

    On rotary models it is exactly zero under :data:`SECOND2FIRST`: the first token attends to
    itself alone, with weight one, whatever its angle.
    """
    changed, usual = (
        keys_at(view, prompts, [0] * len(prompts), layers=[layer]).values
        for view in (model.intervened(swap), model)
    )
    return float((changed - usual).abs().max())


@taken
def measure_stages(
    study: Study,
    facts: Sequence[Fact],
    swap: PositionSwap,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Edit facts by ROME with a swap in one stage after another (Tables 6 and 7).

    Returns:
        One record per stage and fact, with the original perplexity under the same evaluation.

    Raises:
        UnsupportedModelError: If the model does not obey the swap; before anything is edited.
    """
    for fact in facts[:1]:
        pad(study.model.intervened(swap), [fact_prompt(study.model, fact)])
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        changed = swapped_study(study, swap, stage)
        original = changed.original_perplexity.mean
        rows += [
            {"stage": stage, "original_perplexity": original, **row}
            for row in measure_facts(
                changed, facts, [ROME], progress=progress, label=f"{swap.name}: {stage}"
            )
        ]
    return rows


@taken
def stage_lines(
    model: str, rows: Sequence[Mapping[str, Any]], printed: Sequence[PaperValue]
) -> list[list[object]]:
    """Lines of Table 6 or 7: min, average and max by stage, then what the paper prints."""
    lines: list[list[object]] = []
    for stage in dict.fromkeys(str(row["stage"]) for row in rows):
        chosen = [row for row in rows if row["stage"] == stage]
        values = [float(row["perplexity"]) for row in chosen]
        collapsed = f"{sum(bool(row['collapsed']) for row in chosen)} of {len(chosen)}"
        original = float(chosen[0]["original_perplexity"])
        spread = [min(values), sum(values) / len(values), max(values)]
        lines.append([f"{model}, swap in: {stage}", original, *spread, collapsed])
    for name in dict.fromkeys(value.model for value in printed):
        cells = {value.row: value.value for value in printed if value.model == name}
        for column in dict.fromkeys(row.partition("/")[0] for row in cells):
            spread = [cells[f"{column}/{which}"] for which in ("min", "avg", "max")]
            lines.append([f"paper, {name}, {column}", None, *spread, None])
    return lines
