"""Collapse cases: found by editing every fact with ROME, kept as a list, verified when used."""

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress

from firsttok.data import Fact
from firsttok.editing import ROME, Method
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.options import ScriptOptions
from firsttok.storage import content_hash, read_json, write_json
from firsttok.study import CaseRow, Study, measure_facts

__all__ = [
    "CaseSelection",
    "choose_cases",
    "load_collapse_ids",
    "measure_selection",
    "save_scan",
    "scan",
    "select_cases",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaseSelection:
    """Facts to compare: those a list says ROME collapses on, and random others."""

    collapse: tuple[Fact, ...]
    """Facts of the list, in its order (highest perplexity first)."""
    normal: tuple[Fact, ...]
    """Facts drawn from the rest of the set (Section 3: a random sample of the remaining part)."""


def scan(study: Study, facts: Sequence[Fact], *, progress: Progress | None = None) -> list[CaseRow]:
    """Edit every fact with ROME and measure; collapse cases are found, not assumed."""
    return measure_facts(study, facts, [ROME], progress=progress, label="scanning")


def save_scan(path: Path, study: Study, facts: Sequence[Fact], rows: Sequence[CaseRow]) -> None:
    """Write the list of collapse cases with all scanned rows and their provenance as JSON."""
    collapsed = sorted((row for row in rows if row.collapsed), key=lambda row: -row.perplexity)
    first = [row for row in rows if row.first_token]
    write_json(
        path,
        {
            "what": f"facts on which one ROME edit lifts the perplexity above "
            f"{COLLAPSE_THRESHOLD:g}, highest first",
            "provenance": study.provenance()
            | {"facts": _facts_hash(facts), "original_perplexity": study.original_perplexity.mean},
            "summary": {
                "facts": len(rows),
                "collapsed": len(collapsed),
                "first_token_facts": len(first),
                "first_token_collapsed": sum(row.collapsed for row in first),
                "one_token_first_token_facts": sum(row.one_token for row in first),
                "one_token_first_token_collapsed": sum(
                    row.collapsed and row.one_token for row in first
                ),
                "other_collapsed": sum(row.collapsed and not row.first_token for row in rows),
            },
            "collapse": [row.case_id for row in collapsed],
            "rows": [asdict(row) for row in rows],
        },
    )


def load_collapse_ids(path: str | Path, facts: Sequence[Fact]) -> list[int]:
    """Read a list written by :func:`save_scan`.

    Raises:
        BadInputError: If the file is missing or malformed, or was made from other facts.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInputError(f"no list of collapse cases at {path}; make one with: firsttok scan")
    content = read_json(path, "collapse cases")
    try:
        record = cast(dict[str, Any], content)
        ids, made_from = record["collapse"], record["provenance"]["facts"]
    except (KeyError, TypeError):
        raise BadInputError(f"{path} is no list written by firsttok scan; make it again") from None
    if made_from != _facts_hash(facts):
        raise BadInputError(
            f"{path} was made from other facts than these; make it again with: firsttok scan"
        )
    return [int(case_id) for case_id in ids]


def select_cases(
    facts: Sequence[Fact],
    collapse_ids: Sequence[int],
    *,
    collapse: int,
    normal: int,
    seed: int,
) -> CaseSelection:
    """Take collapse cases from a list and draw normal ones from all other facts.

    Args:
        facts: All facts.
        collapse_ids: The list, best first.
        collapse: Most collapse cases; they are spread evenly over the list.
        normal: Number of normal cases.
        seed: Seed of the draw.
    """
    by_id = {fact.case_id: fact for fact in facts}
    count = min(collapse, len(collapse_ids))
    chosen = [collapse_ids[i * len(collapse_ids) // count] for i in range(count)]
    listed = set(collapse_ids)
    rest = [fact for fact in facts if fact.case_id not in listed]
    drawn = random.Random(seed).sample(rest, min(normal, len(rest)))  # noqa: S311
    return CaseSelection(collapse=tuple(by_id[case_id] for case_id in chosen), normal=tuple(drawn))


def choose_cases(options: ScriptOptions) -> CaseSelection:
    """Choose the cases a script was asked for.

    Raises:
        BadInputError: If the list of collapse cases is unusable.
    """
    return select_cases(
        options.facts,
        load_collapse_ids(options.cases, options.facts),
        collapse=options.collapse,
        normal=options.normal,
        seed=options.seed,
    )


def measure_selection(
    study: Study,
    selection: CaseSelection,
    methods: Sequence[Method],
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure the chosen cases, and verify again that ROME collapses the model on the listed ones.

    A listed case that does not collapse now is kept out, with a warning that names it.

    Args:
        study: The study.
        selection: The cases.
        methods: The methods; ROME must be among them.
        progress: Where to show progress.

    Returns:
        One record per case and method, with ``cases`` being ``collapse`` or ``normal``.

    Raises:
        BadInputError: If no listed case collapses, or there is no normal one.
    """
    if not selection.normal:
        raise BadInputError(
            "there is no normal case to compare with; give facts that are not listed"
        )
    facts = [*selection.collapse, *selection.normal]
    rows = measure_facts(study, facts, methods, progress=progress)
    listed = {fact.case_id for fact in selection.collapse}
    verified = {row.case_id for row in rows if row.method == ROME.name and row.collapsed}
    for fact in selection.collapse:
        if fact.case_id not in verified:
            logger.warning(
                "case %d (%s) is listed as a collapse case but does not collapse here; left out",
                fact.case_id,
                fact.subject,
            )
    if not listed & verified:
        raise BadInputError(
            "no listed case collapses under these settings; make a list for them: firsttok scan"
        )
    return [
        {"cases": "collapse" if row.case_id in listed else "normal", **asdict(row)}
        for row in rows
        if row.case_id not in listed or row.case_id in verified
    ]


def _facts_hash(facts: Sequence[Fact]) -> str:
    return content_hash([fact.as_record() for fact in facts])
