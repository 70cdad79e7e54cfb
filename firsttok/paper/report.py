"""What a report shows, before it is a page: sections, verdicts, provenance, other models.

Nothing is measured or judged here. The report is put together from what the experiments left in
``figures/<model>/``, and equal files give an equal report.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, cast

from firsttok.errors import BadInputError
from firsttok.paper.claims import Judged, Result, Status
from firsttok.paper.inconsistencies import Inconsistency, find_inconsistencies
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS
from firsttok.paper.tables import MEASURES, printed
from firsttok.storage import read_json

__all__ = [
    "Compared",
    "ModelReport",
    "Section",
    "build_report",
    "load_result",
    "result_folders",
]

SWEEP = "sweep_"
"""How the file of a published sweep begins."""
SAME = ("model", "weights", "layer", "second moment", "sentences", "versions")
"""What should be the same for all scripts of one folder."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One experiment, and what it left."""

    script: str
    """Name of the script, without suffix."""
    heading: str
    part: str
    """The part of the report that it is in; empty for sweeps and a user's own."""
    result: Result | None
    """What the script left, verdicts included; None if it has not been run."""
    again: str
    """The command that makes it, or makes it again."""
    picture: Path | None
    """Its figure as PNG, beside which an SVG may lie; None if there is none."""
    printed: Result | None
    """The paper's own table, without rows; None where the paper prints no number."""
    facts: tuple[tuple[str, str], ...]
    """Provenance that is not the same for all scripts, by label."""

    @property
    def judged(self) -> tuple[Judged, ...]:
        """Its claims with their verdicts."""
        return (self.result and self.result.claims) or ()

    @property
    def outdated(self) -> bool:
        """Whether an older version left the result, without verdicts."""
        sweep = self.script.startswith(SWEEP)
        return self.result is not None and self.result.claims is None and not sweep


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A claim on several models."""

    claim: Judged
    """The claim, as it was judged on the first of them."""
    found: tuple[Judged | None, ...]
    """Verdicts by model; None where its script has not been run."""

    @property
    def differs(self) -> bool:
        """Whether it was judged on at least two models, with different verdicts."""
        known = {each.status for each in self.found if each is not None}
        return len(known - {Status.NOT_JUDGED}) > 1


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """Everything the pages on one model say."""

    model: str
    """Name of the model's folder."""
    sections: tuple[Section, ...]
    """In the order of the paper; our own come last."""
    facts: tuple[tuple[str, str], ...]
    """Provenance that all scripts share, by label."""
    mixed: tuple[str, ...]
    """Labels of provenance that should be the same for all scripts, and is not."""
    inconsistencies: tuple[Inconsistency, ...]
    models: tuple[str, ...]
    """Models that have results, this one first."""
    across: tuple[Compared, ...]
    """Claims that were judged on any of them."""

    @property
    def judged(self) -> tuple[Judged, ...]:
        """All verdicts on this model: those on the paper's claims, then on ours."""
        return tuple(each.found[0] for each in self.across if each.found[0] is not None)

    def count(self, *, own: bool) -> dict[Status, int]:
        """How many of the paper's claims, or of our own, got each verdict."""
        found = [judged.status for judged in self.judged if judged.own == own]
        return {status: found.count(status) for status in Status}

    @property
    def differing(self) -> tuple[Compared, ...]:
        """Claims that were judged on at least two models, with different verdicts."""
        return tuple(each for each in self.across if each.differs)


def result_folders(out: Path) -> list[Path]:
    """Folders of models in which a script or a sweep has left a result, in order of their names."""
    if not out.is_dir():
        return []
    return [folder for folder in sorted(out.iterdir()) if folder.is_dir() and _left_in(folder)]


def build_report(folder: Path, others: Sequence[Path] = ()) -> ModelReport:
    """Put together what a model's folder holds, compared with the other models' folders.

    Raises:
        BadInputError: If the folder holds no result, or a file is not what a script writes.
    """
    folders = [folder, *(other for other in others if other.name != folder.name)]
    results = [{name: load_result(at, name) for name in _left_in(at)} for at in folders]
    own = results[0]
    # What scripts share is told once; a sweep, or a script run by itself, has settings of its own.
    ran = [own[name] for name in SCRIPTS if name in own] or list(own.values())
    if not ran:
        raise BadInputError(
            f"{folder} holds no result of a script; run: firsttok reproduce --model {folder.name}"
        )
    facts, mixed = _common_facts(ran)
    # What was not run has a section, too, but for what is run by itself or for another paper.
    left = _left_in(folder)
    shown = {e.name: e.heading for e in EXPERIMENTS if e.name in left or e.name in SCRIPTS} | left
    return ModelReport(
        model=folder.name,
        sections=tuple(
            _section(folder, name, heading, own.get(name), facts) for name, heading in shown.items()
        ),
        facts=facts,
        mixed=mixed,
        inconsistencies=find_inconsistencies(),
        models=tuple(each.name for each in folders),
        across=_compared(results),
    )


def load_result(folder: Path, name: str) -> Result:
    """Read what an experiment or a sweep left.

    Raises:
        BadInputError: If the file is missing, or not what is written there.
    """
    path = folder / f"{name}.json"
    content = read_json(path, "results")
    try:
        record = cast(dict[str, Any], content)
        claims = record.get("claims")
        result = Result(
            script=name,
            rows=tuple(dict(row) for row in record["rows"]),
            provenance=dict(record["provenance"]),
            title=str(record.get("title", "")),
            columns=tuple(map(str, record.get("columns", ()))),
            lines=tuple(tuple(line) for line in record.get("lines", ())),
            claims=None if claims is None else tuple(map(Judged.of, claims)),
        )
        if any(len(line) != len(result.columns) for line in result.lines):
            raise ValueError("a line has more or fewer cells than there are columns")
    except (AttributeError, KeyError, TypeError, ValueError):
        again = f"script; run python analyses/{name}.py again"
        what = "sweep; publish the run again" if name.startswith(SWEEP) else again
        raise BadInputError(f"{path} is not a result of a firsttok {what}") from None
    return result


def printed_table(name: str) -> Result:
    """A table of the paper, as it is printed: one column for each model."""
    models, numbers = printed(name)
    cells = {place: _as_printed(value) for place, value in numbers.items()}
    lines = tuple(
        (row, *(cells.get((row, model), "-") for model in models))
        for row in dict.fromkeys(row for row, _ in numbers)
    )
    percent = any(line[0].rpartition("/")[2] in MEASURES for line in lines)
    title = f"The paper's {name}{', in percent' if percent else ''}"
    columns = ("", *models)
    return Result(script=name, rows=(), provenance={}, title=title, columns=columns, lines=lines)


def _left_in(folder: Path) -> dict[str, str]:
    """What left a result in a model's folder: names with headings, empty where none is known."""
    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    known = {each.name: each.heading for each in EXPERIMENTS if each.name in files}
    sweeps = {
        name: f"A sweep: {name.removeprefix(SWEEP)}" for name in files if name.startswith(SWEEP)
    }
    others = [name for name in files if name not in known | sweeps]
    return known | {name: "" for name in others if _is_own(files[name])} | sweeps


def _is_own(path: Path) -> bool:
    """Whether a file is the result of a user's experiment: it holds verdicts."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "claims" in content


def _section(
    folder: Path,
    name: str,
    heading: str,
    result: Result | None,
    facts: Sequence[tuple[str, str]],
) -> Section:
    picture = folder / f"{name}.png"
    known = next((each for each in EXPERIMENTS if each.name == name), None)
    table = known and known.table
    given = result.provenance.get("command") if result else None
    return Section(
        script=name,
        heading=heading or (result and result.title) or name,
        part=known.part if known else "",
        result=result,
        again=str(given or f"python analyses/{name}.py --model {folder.name}"),
        picture=picture if result is not None and picture.is_file() else None,
        printed=printed_table(table) if table else None,
        facts=tuple(fact for fact in _script_facts(result) if fact not in facts) if result else (),
    )


def _compared(results: Sequence[Mapping[str, Result]]) -> tuple[Compared, ...]:
    """Claims by model, the papers' before our own, in the order of the scripts."""
    every = (each.name for each in EXPERIMENTS)
    scripts = dict.fromkeys((*every, *chain.from_iterable(results)))
    first: dict[str, Judged] = {}
    for name, found in product(scripts, results):
        for judged in (name in found and found[name].claims) or ():
            first.setdefault(judged.id, judged)
    known = [
        {judged.id: judged for result in found.values() for judged in result.claims or ()}
        for found in results
    ]
    compared = [
        Compared(claim=claim, found=tuple(found.get(claim.id) for found in known))
        for claim in first.values()
    ]
    return tuple(sorted(compared, key=lambda each: each.claim.own))


def _as_printed(value: float) -> str:
    """The paper prints two decimals, three in Equation 4, and 100 % without any."""
    if value == 100:
        return "100"
    return f"{value:,.2f}" if value == round(value, 2) else f"{value:,.3f}"


def _script_facts(result: Result) -> tuple[tuple[str, str], ...]:
    """A script's provenance by label; what it did not record is left out."""
    given = result.provenance
    names = ("model", "contexts", "second_moment", "texts", "hyperparameters", "versions")
    parts = [given.get(name) for name in names]
    model, contexts, moment, texts, hyperparameters, versions = (
        cast(Mapping[str, Any], part) if isinstance(part, Mapping) else {} for part in parts
    )
    facts = {
        "model": _join(model.get("name"), model.get("source")),
        "weights": model.get("fingerprint"),
        "dtype": model.get("dtype"),
        "BOS": _bos(model),
        "layer": given.get("layer"),
        "seed": given.get("seed"),
        "contexts": _join(_named("seed", contexts.get("seed")), _short(contexts.get("hash"))),
        "second moment": _join(
            moment.get("corpus"),
            _named("tokens", moment.get("tokens")),
            _short(moment.get("corpus_hash")),
            _named("ridge", moment.get("ridge")),
        ),
        "sentences": _join(texts.get("count"), _short(texts.get("hash"))),
        "hyperparameters": _pairs(hyperparameters),
        "versions": _pairs(versions),
        "seconds": given.get("seconds"),
        "command": given.get("command"),
    }
    return tuple((label, str(value)) for label, value in facts.items() if value not in (None, ""))


def _common_facts(
    results: Sequence[Result],
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Provenance that all results share, and labels on which they should agree and do not."""
    listed = [_script_facts(result) for result in results]
    # A duration is no setting, though two may be equal by chance.
    shared = [fact for fact in listed[0] if fact[0] not in ("seconds", "command")]
    mixed = tuple(label for label in SAME if _differs([dict(facts) for facts in listed], label))
    return tuple(fact for fact in shared if all(fact in facts for facts in listed)), mixed


def _differs(listed: Sequence[Mapping[str, str]], label: str) -> bool:
    # A second moment counts BOS as a token, and some scripts take BOS away on purpose.
    groups: dict[str | None, set[str | None]] = {}
    for facts in listed:
        group = facts.get("BOS") if label == "second moment" else None
        groups.setdefault(group, set()).add(facts.get(label))
    return any(len(found) > 1 for found in groups.values())


def _bos(model: Mapping[str, Any]) -> str | None:
    if "bos" not in model:
        return None
    ids = model.get("bos_token_ids") or "none"
    return f"{str(model['bos']).replace('_', ' ')} (token ids before a prompt: {ids})"


def _short(digest: Any) -> str | None:
    return f"SHA-256 {str(digest)[:12]}" if digest else None


def _named(name: str, value: Any) -> str | None:
    if isinstance(value, int):
        return f"{name} {value:,}"
    return None if value is None else f"{name} {value}"


def _pairs(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in part.items())


def _join(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))
