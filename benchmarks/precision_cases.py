"""What bfloat16 does to the results of edits, and to their time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean, median
from typing import Any

from measuring import Extras, Plan, Side, Table
from setting import REPOSITORY, Setting

from firsttok.cases import CaseSelection, load_collapse_ids, select_cases
from firsttok.data import builtin_facts, builtin_sentences
from firsttok.editing import C_ROME, ROME, RankOneEdit, compute_edits
from firsttok.evaluation import (
    COLLAPSE_THRESHOLD,
    Perplexity,
    PreparedTexts,
    perplexity,
    prepare_texts,
)
from firsttok.second_moment import SecondMoment, compute_second_moment

__all__ = ["bfloat16"]

METHODS = (ROME, C_ROME)
TYPES = ("float32", "bfloat16")
_COLLAPSE = REPOSITORY / "figures" / "smollm2-135m" / "collapse_cases.json"

DENOMINATOR = "|denominator|"
IN_WEIGHTS = "perplexity, in the weights"

_Edits = dict[str, list[RankOneEdit]]
_Perplexities = dict[str, list[Perplexity]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """All that is done in one type."""

    setting: Setting
    """The model in that type."""
    cases: CaseSelection
    """The facts."""

    @cached_property
    def moment(self) -> SecondMoment:
        """C of the model in that type, as every command takes it."""
        return compute_second_moment(self.setting.model, layer=self.setting.layer)

    @cached_property
    def texts(self) -> PreparedTexts:
        """The sentences, up to the layer."""
        sentences = builtin_sentences()[: self.setting.amounts.sentences]
        return prepare_texts(self.setting.model, sentences, layer=self.setting.layer)

    def edits(self, count: int | None = None) -> _Edits:
        """The edits of the first facts, by method."""
        found = compute_edits(
            self.setting.model,
            [*self.cases.collapse, *self.cases.normal][:count],
            methods=METHODS,
            contexts=self.setting.contexts,
            second_moment=self.moment,
            layer=self.setting.layer,
            hyperparameters=self.setting.hyperparameters,
        )
        rows = [edits for _, edits in found]
        return {method.name: [edits[method.name] for edits in rows] for method in METHODS}

    def perplexities(self, edits: _Edits) -> _Perplexities:
        """Their perplexities."""
        return {
            name: self.texts.measure_edits(self.setting.model, some) for name, some in edits.items()
        }

    def in_weights(self, edits: _Edits) -> dict[str, list[float]]:
        """The same with each edit standing in the weights, rounded as they are."""
        found: dict[str, list[float]] = {}
        for name, some in edits.items():
            found[name] = []
            for edit in some:
                with edit.applied(self.setting.model):
                    found[name].append(self.perplexity())
        return found

    def perplexity(self) -> float:
        """That of the model as it stands."""
        sentences = builtin_sentences()[: self.setting.amounts.sentences]
        return perplexity(self.setting.model, sentences).mean


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcomes:
    """Edits of some facts by one method in one type, with what they did."""

    edits: Sequence[RankOneEdit]
    """The edits."""
    perplexities: Sequence[float]
    """The perplexity after each."""
    in_weights: Sequence[float]
    """The same, rounded into the weights."""

    @property
    def quantities(self) -> dict[str, Sequence[float]]:
        """What is compared, one number an edit."""
        return {
            "numerator": [edit.report.numerator for edit in self.edits],
            DENOMINATOR: [edit.report.denominator for edit in self.edits],
            "norm of the update": [edit.report.delta_norm for edit in self.edits],
            "last loss": [edit.losses[-1] for edit in self.edits],
            "perplexity": self.perplexities,
            IN_WEIGHTS: self.in_weights,
        }


def bfloat16(setting: Setting) -> Plan:
    """The same edits in float32 and with weights and activations in bfloat16."""
    facts = builtin_facts()
    count = setting.amounts.precision_cases
    listed = load_collapse_ids(_COLLAPSE, facts)
    cases = select_cases(facts, listed, collapse=count, normal=count, seed=0)
    works = {name: _Work(setting=replace(setting, dtype=name), cases=cases) for name in TYPES}
    edited: dict[str, _Edits] = {}

    def edit(name: str) -> _Edits:
        edited[name] = works[name].edits()
        return edited[name]

    def warm() -> None:
        for work in works.values():
            work.perplexities(work.edits(1))

    def check(results: Mapping[str, Any], seconds: Mapping[str, Sequence[float]]) -> Extras:
        standing = {name: works[name].in_weights(edited[name]) for name in TYPES}
        plain = [works[name].perplexity() for name in TYPES]
        rows: list[tuple[str | float, ...]] = [
            (
                "none",
                "-",
                "perplexity",
                *map(_cell, plain),
                _largest_difference([plain[0]], [plain[1]]),
            )
        ]
        groups = {"collapse": cases.collapse, "normal": cases.normal}
        for method in METHODS:
            start = 0
            for group, some in groups.items():
                part = slice(start, start + len(some))
                start += len(some)
                outcomes = [
                    _Outcomes(
                        edits=edited[name][method.name][part],
                        perplexities=[
                            one.mean for one in results[f"perplexity, {name}"][method.name][part]
                        ],
                        in_weights=standing[name][method.name][part],
                    )
                    for name in TYPES
                ]
                rows += [(method.label, group, *row) for row in _compare(*outcomes)]
        return Extras(
            tables=(
                Table(
                    title=f"What comes out (cases of either kind: {count})",
                    columns=("method", "cases", "quantity", *TYPES, "largest difference of a case"),
                    rows=tuple(rows),
                ),
                Table(
                    title="float32 over bfloat16, time",
                    columns=("what", "ratio"),
                    rows=tuple((what, _ratio(seconds, what)) for what in ("edits", "perplexity")),
                ),
            ),
            notes=(
                "Weights and activations are in bfloat16; delta, Adam and losses are in float32 "
                "all the same, and the second moment is summed in float64. Perplexities are "
                "medians, other quantities means of sizes; a difference is relative to float32, "
                "with the sign. A perplexity is measured with the edit added to the MLP's output, "
                "as in every script; in the weights, an edit is rounded with them.",
            ),
        )

    sides = [
        Side(
            label=f"{what}, {name}",
            run=partial(run, name),
            items=len(METHODS) * (len(cases.collapse) + len(cases.normal)),
            unit="edit",
        )
        for what, run in (
            ("edits", edit),
            ("perplexity", lambda name: works[name].perplexities(edited[name])),
        )
        for name in TYPES
    ]
    return Plan(sides=tuple(sides), warm=warm, check=check)


def _compare(plain: _Outcomes, half: _Outcomes) -> list[tuple[str | float, ...]]:
    """Rows of what came out in either type."""
    rows: list[tuple[str | float, ...]] = []
    for name, values in plain.quantities.items():
        others = half.quantities[name]
        average = median if name.startswith("perplexity") else _mean_size
        both = (_cell(average(values)), _cell(average(others)))
        rows.append((name, *both, _largest_difference(values, others)))
        if name == DENOMINATOR:
            rows.append(("denominator below 0", *_counts(values, others, lambda x: x < 0)))
    for name in ("perplexity", IN_WEIGHTS):
        found = _counts(
            plain.quantities[name], half.quantities[name], lambda x: not x <= COLLAPSE_THRESHOLD
        )
        rows.append((name.replace("perplexity", "collapsed"), *found))
    return rows


def _mean_size(values: Sequence[float]) -> float:
    return fmean(map(abs, values))


def _counts(
    plain: Sequence[float], half: Sequence[float], holds: Callable[[float], bool]
) -> tuple[str | float, ...]:
    """How many of either type something holds of, and of how many cases in one type only."""
    apart = sum(holds(a) != holds(b) for a, b in zip(plain, half, strict=True))
    return sum(map(holds, plain)), sum(map(holds, half)), f"{apart} cases"


def _largest_difference(plain: Sequence[float], half: Sequence[float]) -> str | float:
    """Relative to the first, signs and all."""
    pairs = [(a, b) for a, b in zip(plain, half, strict=True) if a != b]
    if not all(math.isfinite(b) and math.isfinite(a) and a for a, b in pairs):
        return "no number"
    return max((abs(b / a - 1) for a, b in pairs), default=0.0)


def _cell(value: float) -> str | float:
    """A number, or its name where JSON has none for it."""
    return value if math.isfinite(value) else str(value)


def _ratio(seconds: Mapping[str, Sequence[float]], what: str) -> float:
    pairs = zip(*(seconds[f"{what}, {name}"] for name in TYPES), strict=True)
    return median(plain / half for plain, half in pairs)
