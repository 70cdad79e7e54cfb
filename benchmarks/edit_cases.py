"""Benchmarks of edits: many, one, and where the time goes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch
from edit_checks import agreement, both_ratios, share
from measuring import Extras, Plan, Side, Table
from naive import (
    NaiveEdit,
    naive_edit,
    naive_fine_tuning,
    naive_model,
    naive_projector,
    naive_spread,
)
from setting import Setting
from tolerances import ALLOWED, Difference, judge

from firsttok.data import Fact
from firsttok.editing import (
    ROME,
    AlphaEditRule,
    Edit,
    EmmetRule,
    FineTuningEditor,
    MemitEditor,
    MemitRule,
    RomeEditor,
    SpreadRule,
    edit_each,
)
from firsttok.hyperparameters import Hyperparameters

__all__ = [
    "edit_sides",
    "fast_edits",
    "fine_tuning",
    "fixed_steps",
    "many_edits",
    "one_edit",
    "profile",
    "spread",
    "warm",
]

OPERATIONS = 12
"""Operations the profile names."""
_THRESHOLD = 2.0
"""Of AlphaEdit: with C = I every direction may change."""


def many_edits(setting: Setting) -> Plan:
    """A list of facts in one call, against one naive edit after another of some of them."""
    setting.prepare()
    slow = setting.naive_facts

    def check(results: Mapping[str, Any], seconds: Mapping[str, Sequence[float]]) -> Extras:
        edits: list[Edit] = results["fast"]
        by_case = dict(zip([fact.case_id for fact in setting.facts], edits, strict=True))
        agreed = agreement(setting, slow, [by_case[f.case_id] for f in slow], results["naive"])
        shared = share(
            setting,
            edits,
            median(seconds["fast"]),
            lambda: fast_edits(setting, setting.facts, setting.hyperparameters),
        )
        steps = fmean(len(edit.losses) for edit in edits)
        plain = fmean(len(by_case[fact.case_id].losses) for fact in slow)
        note = (
            f"The fast side edits all {len(edits)} facts ({steps:.1f} losses each on average), the "
            f"naive side {len(slow)} of them, spread evenly ({plain:.1f} losses each). By facts, "
            "the ratio is that of throughputs; by losses, it is what that becomes when the naive "
            "time is extrapolated to all facts by their number of losses."
        )
        ratios = both_ratios(edits, results["naive"], seconds)
        return replace(agreed, tables=(ratios, *agreed.tables, shared), notes=(note,))

    return Plan(
        sides=edit_sides(setting, setting.facts, slow, setting.hyperparameters),
        pairs=(("edits of a list of facts", "fast", "naive"),),
        warm=lambda: warm(setting),
        check=check,
    )


def one_edit(setting: Setting) -> Plan:
    """One fact alone: what a user waits for."""
    setting.prepare()
    chosen = [setting.facts[len(setting.facts) // 2]]

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        losses = len(results["fast"][0].losses)
        note = f"Losses on the fast side: {losses}."
        agreed = agreement(setting, chosen, results["fast"], results["naive"])
        return replace(agreed, notes=(note,))

    return Plan(
        sides=edit_sides(setting, chosen, chosen, setting.hyperparameters),
        pairs=(("one edit", "fast", "naive"),),
        warm=lambda: warm(setting),
        check=check,
    )


def profile(setting: Setting) -> Plan:
    """Where the fast side's CPU time goes, by operation."""
    setting.prepare()
    settings = fixed_steps(setting)
    facts = setting.facts[: min(setting.amounts.growth_facts)]

    def check(_results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if setting.model.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            fast_edits(setting, facts, settings)
        events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        rows = tuple(
            (e.key, f"{100 * e.self_cpu_time_total / total:.1f} %", e.count)
            for e in events[:OPERATIONS]
        )
        title = f"Self CPU time (facts: {len(facts)}, losses of each: {settings.steps})"
        return Extras(
            tables=(Table(title=title, columns=("operation", "share", "calls"), rows=rows),)
        )

    return Plan(warm=lambda: warm(setting), check=check)


def fine_tuning(setting: Setting) -> Plan:
    """FT with its bound: a list of facts side by side, against some of them one by one."""
    setting.prepare()
    model, facts, slow = setting.model, setting.facts, setting.naive_facts
    editor = FineTuningEditor(layer=setting.layer, steps=setting.amounts.steps or 25, stop_at=0.0)

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        made = dict(zip([fact.case_id for fact in facts], results["side by side"], strict=True))
        first = loss = change = 0.0
        for fact, plain in zip(slow, results["naive"], strict=True):
            edit = made[fact.case_id]
            apart = [abs(a / b - 1) for a, b in zip(edit.losses, plain.losses, strict=True)]
            first, loss = max(first, apart[0]), max(loss, *apart)
            found, expected = edit.delta.matrix.double(), plain.change.double()
            change = max(change, float((found - expected).norm() / expected.norm()))
        allowed = ALLOWED[setting.dtype]
        return judge(
            f"Largest relative difference from the naive side (facts: {len(slow)})",
            Difference(of="the first loss", found=first, allowed=allowed.first_loss),
            Difference(of="a loss, any step", found=loss, allowed=allowed.loss),
            Difference(of="the change of the weight", found=change, allowed=allowed.value),
        )

    return Plan(
        sides=(
            Side(
                label="side by side",
                run=lambda: editor.edit_all(model, facts),
                items=len(facts),
                unit="fact",
            ),
            Side(
                label="naive",
                run=lambda: [naive_fine_tuning(setting.naive, [fact], editor) for fact in slow],
                items=len(slow),
                unit="fact",
            ),
        ),
        pairs=(("fine-tuning of a list of facts", "side by side", "naive"),),
        warm=lambda: replace(editor, steps=2).edit_all(model, facts[:1]),
        check=check,
    )


def spread(setting: Setting) -> Plan:
    """MEMIT, EMMET and AlphaEdit: a list of facts, each alone, against some of them one by one."""
    setting.prepare()
    model, facts = setting.model, setting.facts
    slow = setting.naive_facts[: setting.amounts.spread_facts]
    layers = tuple(range(max(0, setting.layer - 2), setting.layer + 1))
    moments = {layer: replace(setting.moment, layer=None) for layer in layers}
    for moment in moments.values():
        # As the projector of the naive side, they are made once for all edits.
        moment.solve(torch.ones(moment.matrix.shape[0]))
        moment.below(_THRESHOLD)
    rules: dict[str, SpreadRule] = {
        "MEMIT": MemitRule(weight=1.0),
        "EMMET": EmmetRule(),
        "AlphaEdit": AlphaEditRule(threshold=_THRESHOLD, ridge=10.0),
    }
    editors = {
        name: MemitEditor(
            contexts=setting.contexts,
            second_moments=moments,
            layers=layers,
            rule=rule,
            hyperparameters=setting.hyperparameters,
        )
        for name, rule in rules.items()
    }
    naives = {layer: naive_model(model, layer) for layer in layers}
    projector = naive_projector(_THRESHOLD, setting.moment.matrix)

    def plain(name: str) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        projectors = dict.fromkeys(layers, projector) if name == "AlphaEdit" else None
        return [naive_spread(naives, [fact], editors[name], projectors=projectors) for fact in slow]

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        largest = dict.fromkeys(editors, 0.0)
        for name in editors:
            made = dict(zip([fact.case_id for fact in facts], results[name], strict=True))
            for fact, expected in zip(slow, results[f"naive {name}"], strict=True):
                deltas = made[fact.case_id].deltas
                for delta, (left, right) in zip(deltas, expected, strict=True):
                    apart = float((delta.matrix - left @ right).norm() / (left @ right).norm())
                    largest[name] = max(largest[name], apart)
        allowed = ALLOWED[setting.dtype]
        return judge(
            f"Largest relative difference from the naive side (facts: {len(slow)})",
            *(
                Difference(of=f"a layer's update, {name}", found=value, allowed=allowed.value)
                for name, value in largest.items()
            ),
        )

    fast = [
        Side(
            label=name,
            run=lambda own=own: own.edit_all(model, facts),
            items=len(facts),
            unit="fact",
        )
        for name, own in editors.items()
    ]
    naive = [
        Side(
            label=f"naive {name}",
            run=lambda name=name: plain(name),
            items=len(slow),
            unit="fact",
        )
        for name in editors
    ]
    return Plan(
        sides=(*fast, *naive),
        pairs=tuple((f"{name} of a list of facts", name, f"naive {name}") for name in editors),
        warm=lambda: warm(setting),
        check=check,
    )


def fast_edits(setting: Setting, facts: Sequence[Fact], settings: Hyperparameters) -> list[Edit]:
    editor = RomeEditor(
        method=ROME,
        contexts=setting.contexts,
        second_moment=setting.moment,
        layer=setting.layer,
        hyperparameters=settings,
    )
    found = edit_each(setting.model, facts, [editor])
    return [edits[ROME.name] for _, edits in found]


def _naive(setting: Setting, facts: Sequence[Fact], settings: Hyperparameters) -> list[NaiveEdit]:
    return [
        naive_edit(
            setting.naive,
            fact,
            ROME,
            contexts=setting.contexts,
            inverse=setting.naive_inverse,
            hyperparameters=settings,
        )
        for fact in facts
    ]


def edit_sides(
    setting: Setting,
    facts: Sequence[Fact],
    slow: Sequence[Fact],
    settings: Hyperparameters,
    *,
    suffix: str = "",
) -> tuple[Side, Side]:
    fast = Side(
        label=f"fast{suffix}",
        run=lambda: fast_edits(setting, facts, settings),
        items=len(facts),
        unit="fact",
    )
    naive = Side(
        label=f"naive{suffix}",
        run=lambda: _naive(setting, slow, settings),
        items=len(slow),
        unit="fact",
    )
    return fast, naive


def warm(setting: Setting) -> None:
    settings = replace(setting.hyperparameters, steps=2)
    fast_edits(setting, setting.facts[:1], settings)
    _naive(setting, setting.facts[:1], settings)


def fixed_steps(setting: Setting) -> Hyperparameters:
    """Settings under which every fact takes the same number of losses."""
    return replace(setting.hyperparameters, steps=setting.amounts.growth_steps, stop_below=0.0)
