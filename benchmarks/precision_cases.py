"""What bfloat16 does to the results of edits, and to their time."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean, median
from typing import Any

from measuring import Extras, Plan, Side, Table
from setting import REPOSITORY, Setting

from firsttok.data import builtin_facts, builtin_sentences
from firsttok.editing import C_ROME, ROME, Edit, RomeEditor, edit_each
from firsttok.evaluation import Perplexity, PreparedTexts, perplexity, prepare_texts
from firsttok.paper.cases import CaseSelection, load_collapse_ids, select_cases
from firsttok.second_moment import SecondMoment, compute_second_moment

__all__ = ["bfloat16"]

METHODS = (ROME, C_ROME)
TYPES = ("float32", "bfloat16")
_COLLAPSE = REPOSITORY / "figures" / "smollm2-135m" / "collapse_cases.json"

_Edits = dict[str, list[Edit]]
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

    @property
    def sentences(self) -> Sequence[str]:
        """What the perplexity is measured on."""
        return builtin_sentences()[: self.setting.amounts.sentences]

    @cached_property
    def texts(self) -> PreparedTexts:
        """The same, up to the layer."""
        return prepare_texts(self.setting.model, self.sentences, layer=self.setting.layer)

    def edits(self, count: int | None = None) -> _Edits:
        """The edits of the first facts, by method."""
        editors = [
            RomeEditor(
                method=method,
                contexts=self.setting.contexts,
                second_moment=self.moment,
                layer=self.setting.layer,
                hyperparameters=self.setting.hyperparameters,
            )
            for method in METHODS
        ]
        facts = [*self.cases.collapse, *self.cases.normal][:count]
        found = edit_each(self.setting.model, facts, editors)
        rows = [edits for _, edits in found]
        return {method.name: [edits[method.name] for edits in rows] for method in METHODS}

    def perplexities(self, edits: _Edits) -> _Perplexities:
        """Their perplexities."""
        return {
            name: self.texts.measure_edits(self.setting.model, some) for name, some in edits.items()
        }

    def in_weights(self, edits: _Edits) -> _Perplexities:
        """The same with each edit standing in the weights, rounded as they are."""
        found: _Perplexities = {name: [] for name in edits}
        for name, some in edits.items():
            for edit in some:
                with edit.applied(self.setting.model):
                    found[name].append(self.perplexity())
        return found

    def perplexity(self) -> Perplexity:
        """That of the model as it stands."""
        return perplexity(self.setting.model, self.sentences)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Outcomes:
    """Edits of some facts by one method in one type, with what they did."""

    edits: Sequence[Edit]
    """The edits."""
    perplexities: Sequence[Perplexity]
    """The perplexity after each."""
    in_weights: Sequence[Perplexity]
    """The same, rounded into the weights."""

    @property
    def quantities(self) -> dict[str, Sequence[float]]:
        """What is compared, one number an edit."""
        return {
            "numerator": [edit.report["numerator"] for edit in self.edits],
            "|denominator|": [edit.report["denominator"] for edit in self.edits],
            "norm of the update": [edit.report["delta_norm"] for edit in self.edits],
            "last loss": [edit.losses[-1] for edit in self.edits],
            "perplexity": [one.mean for one in self.perplexities],
            "perplexity, in the weights": [one.mean for one in self.in_weights],
        }

    @property
    def verdicts(self) -> dict[str, Sequence[bool]]:
        """What holds of some, one answer an edit."""
        return {
            "denominator below 0": [edit.report["denominator"] < 0 for edit in self.edits],
            "collapsed": [one.collapsed for one in self.perplexities],
            "collapsed, in the weights": [one.collapsed for one in self.in_weights],
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
        plain = [works[name].perplexity().mean for name in TYPES]
        rows: list[tuple[str | float, ...]] = [
            ("none", "-", *_row("perplexity", plain[:1], plain[1:]))
        ]
        count = len(cases.collapse)
        groups = {"collapse": slice(count), "normal": slice(count, None)}
        for method, (group, part) in itertools.product(METHODS, groups.items()):
            outcomes = [
                _Outcomes(
                    edits=edited[name][method.name][part],
                    perplexities=results[f"perplexity, {name}"][method.name][part],
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
    rows = [_row(name, values, half.quantities[name]) for name, values in plain.quantities.items()]
    for name, holds in plain.verdicts.items():
        others = half.verdicts[name]
        apart = sum(a != b for a, b in zip(holds, others, strict=True))
        rows.append((name, sum(holds), sum(others), f"{apart} cases"))
    return rows


def _row(name: str, plain: Sequence[float], half: Sequence[float]) -> tuple[str | float, ...]:
    both = [_average(name, values) for values in (plain, half)]
    return name, *map(_cell, both), _largest_difference(plain, half)


def _average(name: str, values: Sequence[float]) -> float:
    return median(values) if name.startswith("perplexity") else fmean(map(abs, values))


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
