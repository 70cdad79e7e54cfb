"""What a report shows, before it is a page: sections, verdicts, provenance, other models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firsttok.claims import (
    CLAIMS,
    Claim,
    Inconsistency,
    ScriptResult,
    Status,
    Verdict,
    find_inconsistencies,
    judge,
    load_result,
    load_sweep,
)
from firsttok.data import paper_values
from firsttok.errors import BadInputError
from firsttok.report.provenance import common_facts, script_facts
from firsttok.scripts import ALONE, HEADINGS, SCRIPTS

__all__ = [
    "Judged",
    "ModelReport",
    "PrintedTable",
    "Section",
    "build_report",
    "result_folders",
]

PRINTED = {
    "table1_update_components": "Table 1",
    "table2_perplexity": "Table 2",
    "table3_transfer": "Table 3",
    "table4_efficacy": "Table 4",
    "table5_prefixed_efficacy": "Table 5",
    "table6_second2first": "Table 6",
    "table7_first2second": "Table 7",
    "figure8_concentration": "Equation 4",
}
PERCENT = ("Table 4", "Table 5")
SWEEP = "sweep_"
"""How the file of a published sweep begins."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim with its verdict on one model."""

    claim: Claim
    """The claim."""
    verdict: Verdict
    """What became of it."""


@dataclass(frozen=True, kw_only=True)
class PrintedTable:
    """A table of the paper."""

    title: str
    """Its name, with its unit."""
    columns: tuple[str, ...]
    """Row labels' column (empty), then the models."""
    lines: tuple[tuple[str, ...], ...]
    """Row label, then a cell for each model."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One script: what it left, and the verdicts on the claims it decides."""

    script: str
    """Name of the script, without suffix."""
    heading: str
    """Heading."""
    judged: tuple[Judged, ...]
    """Claims and verdicts."""
    result: ScriptResult | None
    """What the script left; None if it has not been run."""
    picture: Path | None
    """Its figure as PNG, beside which an SVG may lie; None if there is none."""
    printed: PrintedTable | None
    """The paper's table; None where the paper prints no number."""
    facts: tuple[tuple[str, str], ...]
    """Provenance that is not the same for all scripts, by label."""


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """Everything the pages on one model say."""

    model: str
    """Name of the model's folder."""
    folder: Path
    """The folder."""
    sections: tuple[Section, ...]
    """Sections in the order of the paper; our own come last."""
    facts: tuple[tuple[str, str], ...]
    """Provenance that all scripts share, by label."""
    mixed: tuple[str, ...]
    """Labels of provenance that should be the same for all scripts, and is not."""
    inconsistencies: tuple[Inconsistency, ...]
    """Where the paper contradicts itself or its code."""
    across: Mapping[str, tuple[Judged, ...]]
    """Verdicts by model, this one first; this one only if no other has results."""

    @property
    def judged(self) -> tuple[Judged, ...]:
        """All verdicts on this model: those on the paper's claims, then on ours."""
        return self.across[self.model]

    def count(self, *, own: bool) -> dict[Status, int]:
        """How many of the paper's claims, or of our own, got each verdict."""
        found = [item.verdict.status for item in self.judged if item.claim.own == own]
        return {status: found.count(status) for status in Status}

    @property
    def differing(self) -> tuple[Claim, ...]:
        """Claims that were judged on at least two models, with different verdicts."""
        chosen: list[Claim] = []
        for index, claim in enumerate(CLAIMS):
            found = {verdicts[index].verdict.status for verdicts in self.across.values()}
            if len(found - {Status.NOT_RUN, Status.NOT_JUDGED}) > 1:
                chosen.append(claim)
        return tuple(chosen)


def result_folders(out: Path) -> list[Path]:
    """Folders of models in which a script or a sweep has left a result, in order of their names."""
    if not out.is_dir():
        return []
    return [
        folder
        for folder in sorted(out.iterdir())
        if folder.is_dir()
        and (
            any((folder / f"{name}.json").is_file() for name in (*SCRIPTS, *ALONE))
            or _sweeps(folder)
        )
    ]


def build_report(folder: Path, others: Sequence[Path] = ()) -> ModelReport:
    """Judge what lies in a model's folder.

    Args:
        folder: The folder.
        others: Folders of all models, for the comparison; this one may be among them.

    Raises:
        BadInputError: If the folder holds no result, or a file is not what a script writes.
    """
    results = {name: load_result(folder, name) for name in SCRIPTS}
    alone = [result for name in ALONE if (result := load_result(folder, name)) is not None]
    alone += [load_sweep(folder, name) for name in _sweeps(folder)]
    # What scripts share is told once; a sweep, or a script run by itself, has settings of its own.
    ran = [result for result in results.values() if result is not None] or alone
    if not ran:
        raise BadInputError(
            f"{folder} holds no result of a script; run: firsttok reproduce --model {folder.name}"
        )
    facts, mixed = common_facts(ran)
    across = {folder.name: _verdicts(results)}
    for other in others:
        if other.name != folder.name:
            across[other.name] = _verdicts({name: load_result(other, name) for name in SCRIPTS})
    return ModelReport(
        model=folder.name,
        folder=folder,
        sections=(
            *(
                _section(folder, name, results[name], across[folder.name], facts)
                for name in SCRIPTS
            ),
            *(_section(folder, result.script, result, (), facts) for result in alone),
        ),
        facts=facts,
        mixed=mixed,
        inconsistencies=find_inconsistencies(),
        across=across,
    )


def printed_table(name: str) -> PrintedTable:
    """A table of the paper, as it is printed: one column for each model."""
    values = paper_values(name)
    models = list(dict.fromkeys(value.model for value in values))
    cells = {(value.row, value.model): _as_printed(value.value) for value in values}
    lines = [
        (row, *(cells.get((row, model), "-") for model in models))
        for row in dict.fromkeys(value.row for value in values)
    ]
    unit = ", in percent" if name in PERCENT else ""
    return PrintedTable(
        title=f"The paper's {name}{unit}", columns=("", *models), lines=tuple(lines)
    )


def _section(
    folder: Path,
    name: str,
    result: ScriptResult | None,
    judged: Sequence[Judged],
    facts: Sequence[tuple[str, str]],
) -> Section:
    picture = folder / f"{name}.png"
    return Section(
        script=name,
        heading={**HEADINGS, **ALONE}.get(name) or f"A sweep: {name.removeprefix(SWEEP)}",
        judged=tuple(item for item in judged if item.claim.script == name),
        result=result,
        picture=picture if result is not None and picture.is_file() else None,
        printed=printed_table(PRINTED[name]) if name in PRINTED else None,
        facts=tuple(fact for fact in script_facts(result) if fact not in facts) if result else (),
    )


def _sweeps(folder: Path) -> list[str]:
    """Names of the sweeps that were published into a model's folder, without suffix."""
    return sorted(path.stem for path in folder.glob(f"{SWEEP}*.json"))


def _verdicts(results: Mapping[str, Any]) -> tuple[Judged, ...]:
    return tuple(
        Judged(claim=claim, verdict=judge(claim, results[claim.script])) for claim in CLAIMS
    )


def _as_printed(value: float) -> str:
    """The paper prints two decimals, three in Equation 4, and 100 % without any."""
    if value == round(value) and value == 100:
        return "100"
    return f"{value:,.2f}" if value == round(value, 2) else f"{value:,.3f}"
