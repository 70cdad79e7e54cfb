"""Collapse cases: found by editing every fact with ROME, kept as a list, verified when used."""

import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress

from firsttok.data import SKIP_HINT, Fact, LeftOut, spread_evenly
from firsttok.editing import ROME, Editor, Method
from firsttok.errors import BadInputError
from firsttok.escapes import finite
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.paper.experiment import FULL, ScriptOptions
from firsttok.paper.tables import MEASURES
from firsttok.prompts import fact_prompt
from firsttok.rows import COLUMNS, Row
from firsttok.sieve import FailedFact, reason_against
from firsttok.storage import content_hash, read_json, write_record
from firsttok.study import Study

__all__ = [
    "CaseSelection",
    "all_listed_cases",
    "choose_cases",
    "collapse_cases",
    "first_token_cases",
    "fresh_cases",
    "load_collapse_ids",
    "load_scan",
    "measure_accuracy",
    "measure_selection",
    "save_scan",
    "second_token_cases",
    "select_cases",
]

logger = logging.getLogger(__name__)
_PERPLEXITIES = ("perplexity", "corpus_perplexity")


@dataclass(frozen=True, kw_only=True)
class CaseSelection:
    """Facts to compare: those a list says ROME collapses on, and random others."""

    collapse: tuple[Fact, ...]
    """Facts of the list, in its order (highest perplexity first)."""
    normal: tuple[Fact, ...]
    """Facts drawn from the rest of the set (Section 3: a random sample of the remaining part)."""
    borrowed: bool = False
    """Whether the list was made on another model, so that nothing need collapse here."""


def save_scan(
    path: Path,
    study: Study,
    facts: Iterable[Fact],
    rows: Sequence[Row],
    *,
    failed: Sequence[FailedFact] = (),
    left_out: Sequence[LeftOut] = (),
) -> None:
    """Write the list of collapse cases with all scanned rows and their provenance as JSON.

    The list is known by the facts as their file holds them. Facts whose edit failed stand in it,
    and those that were left out of the scan.
    """
    # A perplexity that is no number is worse than any.
    collapsed = sorted(
        (row for row in rows if row.collapsed),
        key=lambda row: -math.inf if math.isnan(row.perplexity) else -row.perplexity,
    )
    first = [row for row in rows if row.first_token]
    alone = [row for row in first if row.one_token]
    write_record(
        path,
        {
            "what": f"facts on which one ROME edit lifts the perplexity above "
            f"{COLLAPSE_THRESHOLD:g}, highest first",
            "provenance": study.provenance()
            | {
                "facts": _facts_hash(facts),
                "original_perplexity": finite(study.original_perplexity.mean),
            },
            "summary": {
                "facts": len(rows),
                "collapsed": len(collapsed),
                "first_token_facts": len(first),
                "first_token_collapsed": sum(row.collapsed for row in first),
                "one_token_first_token_facts": len(alone),
                "one_token_first_token_collapsed": sum(row.collapsed for row in alone),
                "other_collapsed": sum(row.collapsed and not row.first_token for row in rows),
            }
            | ({"failed": len(failed)} if failed else {}),
            "collapse": [row.case_id for row in collapsed],
            "rows": [_without_nan(row) for row in rows],
        }
        | ({"failed": [asdict(fact) for fact in failed]} if failed else {})
        | ({"left_out": [asdict(each) for each in left_out]} if left_out else {}),
    )


def load_scan(path: str | Path) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Read every scanned row of a list, and the provenance that they share.

    Raises:
        BadInputError: If the file is missing or malformed.
    """
    path = Path(path)
    content = read_json(path, "collapse cases")
    try:
        record = cast(dict[str, Any], content)
        rows = tuple(_scanned(row) for row in record["rows"])
        return rows, {**record["provenance"], "model": {**record["provenance"]["model"]}}
    except (BadInputError, KeyError, TypeError, ValueError):
        raise BadInputError(f"{path} is no list written by firsttok scan; make it again") from None


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON takes it: a perplexity that is not finite is a text."""
    odd = {name: str(row[name]) for name in _PERPLEXITIES if not math.isfinite(row[name])}
    return {**row, **odd}


def _scanned(record: Mapping[str, Any]) -> Row:
    """A row of a list; columns that a rule reads are there and of their kinds."""
    row = {**record, **{name: float(record[name]) for name in _PERPLEXITIES}}
    for name in ("case_id", "subject", "prompt", "method", "denominator", "collapsed"):
        if not isinstance(row[name], COLUMNS[name]):
            raise TypeError(f"{name} is {row[name]!r}")
    return Row(row)


def load_collapse_ids(path: str | Path, facts: Sequence[Fact]) -> list[int]:
    """Read a list written by :func:`save_scan`.

    Raises:
        BadInputError: If the file is missing or malformed, or was made from other facts.
    """
    return _load_list(Path(path), facts)[0]


def _load_list(path: Path, facts: Sequence[Fact]) -> tuple[list[int], dict[str, Any]]:
    """Case ids, and the record of the model they collapse."""
    if not path.is_file():
        raise BadInputError(f"no list of collapse cases at {path}; make one with: firsttok scan")
    content = read_json(path, "collapse cases")
    try:
        record = cast(dict[str, Any], content)
        ids, made_from = record["collapse"], record["provenance"]["facts"]
        made_on = dict(record["provenance"]["model"])
        numbers = [int(case_id) for case_id in ids]
    except (KeyError, TypeError, ValueError):
        raise BadInputError(f"{path} is no list written by firsttok scan; make it again") from None
    if made_from != _facts_hash(facts):
        raise BadInputError(
            f"{path} was made from other facts than these; make it again with: firsttok scan"
        )
    known = {fact.case_id for fact in facts}
    if not known.issuperset(numbers):
        raise BadInputError(f"{path} names cases that are not among the facts; make it again")
    return numbers, made_on


def select_cases(
    facts: Sequence[Fact], collapse_ids: Sequence[int], *, collapse: int, normal: int, seed: int
) -> CaseSelection:
    """Take collapse cases, spread evenly over a list, and draw normal ones from all other facts.

    There are at most ``collapse`` and ``normal`` of them, fewer where there are no more.
    """
    by_id = {fact.case_id: fact for fact in facts}
    chosen = spread_evenly(collapse_ids, collapse)
    listed = set(collapse_ids)
    rest = [fact for fact in facts if fact.case_id not in listed]
    drawn = _drawn(rest, normal, seed)
    return CaseSelection(collapse=tuple(by_id[case_id] for case_id in chosen), normal=drawn)


def _drawn(facts: Sequence[Fact], most: int, seed: int) -> tuple[Fact, ...]:
    return tuple(random.Random(seed).sample(facts, min(most, len(facts))))  # noqa: S311


def choose_cases(options: ScriptOptions) -> CaseSelection:
    """Choose the cases a script was asked for, among the facts that can be edited.

    Raises:
        BadInputError: If the list of collapse cases is unusable; if a chosen fact cannot be edited
            and ``--skip-bad`` is not given.
    """
    ids, made_on = _load_list(options.cases, options.facts)
    bad: set[int] = set()
    while True:
        selection = select_cases(
            [fact for fact in options.facts if fact.case_id not in bad],
            [case_id for case_id in ids if case_id not in bad],
            collapse=options.collapse,
            normal=options.normal,
            seed=options.seed,
        )
        chosen = [*selection.collapse, *selection.normal]
        found = _unusable(options, chosen, options.study.contexts.templates)
        if not found:
            break
        # Others take their place, which may be such facts, too.
        bad |= found
    return replace(selection, borrowed=not options.study.model.is_of(made_on))


def all_listed_cases(options: ScriptOptions) -> CaseSelection:
    """Choose every listed collapse case and as many normal ones, or ``options.normal`` if more.

    This is for scripts that edit nothing: reading keys is cheap, and more cases say more.
    """
    listed = len(load_collapse_ids(options.cases, options.facts))
    return choose_cases(replace(options, collapse=listed, normal=max(listed, options.normal)))


def collapse_cases(options: ScriptOptions, *, progress: Progress) -> tuple[Fact, ...]:
    """Return the chosen collapse cases that collapse in this run too; the others are named.

    Raises:
        BadInputError: If the list is unusable, or none of it collapses.
    """
    selection, study = choose_cases(options), options.study
    rows = measure_facts(study, selection.collapse, [ROME], progress=progress, label="verifying")
    kept = _verified(selection, rows)
    return tuple(fact for fact in selection.collapse if fact.case_id in kept)


def first_token_cases(options: ScriptOptions, *, progress: Progress) -> tuple[Fact, ...]:
    """Return those of :func:`collapse_cases` whose subject is the very first token.

    Raises:
        BadInputError: If there is none.
    """
    model = options.study.model
    found = collapse_cases(options, progress=progress)
    chosen = tuple(fact for fact in found if fact_prompt(model, fact).subject_position == 0)
    if not chosen:
        raise BadInputError(
            f"no collapse case of {model.label} has a subject that is the very first token; is a "
            "BOS before it? Try --bos without"
        )
    return chosen


def second_token_cases(options: ScriptOptions) -> tuple[Fact, ...]:
    """Draw facts, none of them listed, whose subject is the second token and nothing else.

    Raises:
        BadInputError: If there is none.
    """
    passed_over = set(load_collapse_ids(options.cases, options.facts))
    passed_over |= _unusable(options, options.facts, ("{}",))
    facts = [fact for fact in options.facts if fact.case_id not in passed_over]
    prompts = [fact_prompt(options.study.model, fact) for fact in facts]
    chosen = [
        fact
        for fact, prompt in zip(facts, prompts, strict=True)
        if prompt.subject_position == 1 and prompt.subject_length == 1
    ]
    if not chosen:
        raise BadInputError(
            "no fact has a subject that is the second token of its prompt; give facts as "
            '"In {}, people speak"'
        )
    return _drawn(chosen, options.normal, options.seed)


def fresh_cases(options: ScriptOptions, *, first_token: bool | None = None) -> tuple[Fact, ...]:
    """Draw facts that no table uses: what is chosen by them is not chosen by a table.

    Args:
        options: What the script was asked for; ``normal`` is how many are drawn.
        first_token: Whether the subject is the text's very first token. None for facts that are
            not listed as collapse cases, wherever the subject is.

    Raises:
        BadInputError: If the list of collapse cases is unusable, or if no fact is left.
    """
    used = set[int]() if first_token else set(load_collapse_ids(options.cases, options.facts))
    whole = replace(options, collapse=FULL, normal=FULL)
    for each in (whole, whole.halved()):
        chosen = choose_cases(each)
        used |= {fact.case_id for fact in (*chosen.collapse, *chosen.normal)}
    try:
        used |= {fact.case_id for fact in second_token_cases(whole)}
    except BadInputError:
        logger.debug("no fact has a subject that is the second token")
    left = [fact for fact in options.facts if fact.case_id not in used]
    passed_over = _unusable(options, left, options.study.contexts.templates)
    left = [fact for fact in left if fact.case_id not in passed_over]
    if first_token is not None:
        model = options.study.model
        places = {fact.case_id: fact_prompt(model, fact).subject_position for fact in left}
        left = [fact for fact in left if (places[fact.case_id] == 0) == first_token]
    chosen = _drawn(left, options.normal, options.seed)
    if not chosen:
        kind = "normal" if first_token is None else "first-token" if first_token else "other"
        raise BadInputError(f"the tables use every {kind} fact; give more facts by --facts")
    return chosen


def _unusable(options: ScriptOptions, facts: Sequence[Fact], templates: Sequence[str]) -> set[int]:
    """Numbers of the facts that cannot be edited; raises unless they are to be left out."""
    found: set[int] = set()
    for fact in facts:
        reason = reason_against(options.study.model, fact, templates=templates)
        if reason is None:
            continue
        if not options.args.skip_bad:
            raise BadInputError(f"case {fact.case_id} cannot be edited: {reason}{SKIP_HINT}")
        logger.warning("case %d is left out: %s", fact.case_id, reason)
        found.add(fact.case_id)
    return found


def measure_selection(
    study: Study,
    selection: CaseSelection,
    methods: Sequence[Method | Editor],
    *,
    metrics: Sequence[str] = ("perplexity",),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure the chosen cases, and verify again that ROME collapses the model on the listed ones.

    A listed case that does not collapse now is kept out, with a warning that names it; a list made
    on another model is kept whole. ROME must be among the methods, and the perplexity among the
    metrics.

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
    rows = measure_facts(study, facts, methods, metrics=metrics, progress=progress)
    listed = {fact.case_id for fact in selection.collapse}
    kept = _verified(selection, rows)
    return [
        {"cases": "collapse" if row.case_id in listed else "normal", **row}
        for row in rows
        if row.case_id not in listed or row.case_id in kept
    ]


def measure_accuracy(
    study: Study,
    facts: Sequence[Fact],
    methods: Sequence[Method],
    *,
    prefixed: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    label: str = "accuracies",
) -> list[dict[str, Any]]:
    """Edit every fact by every method and measure efficacy, generalization and locality.

    Where asked, a prefix drawn by the seed stands before the rewriting prompt at test time, as in
    Table 5. What is in the study's work folder is not measured again.

    Returns:
        A row for each fact and method, by the method's label.
    """
    names = {method.name: method.label for method in methods}
    rows = measure_facts(
        study, facts, methods, metrics=["accuracy"], seed=seed, progress=progress, label=label
    )
    return [
        {
            "case_id": row.case_id,
            "subject": row.subject,
            "method": names[row.method],
            "prefix": row.prefix if prefixed else "{}",
            **{column: row[column] for column in MEASURES},
        }
        | ({"efficacy": row.prefixed_efficacy} if prefixed else {})
        for row in rows
    ]


def _verified(selection: CaseSelection, rows: Sequence[Row]) -> set[int]:
    """Case ids of the listed facts that ROME collapses, or all of a borrowed list."""
    listed = {fact.case_id: fact.subject for fact in selection.collapse}
    collapsed = {row.case_id for row in rows if row.method == ROME.name and row.collapsed}
    kept = collapsed & set(listed)
    if selection.borrowed:
        said = "the list was made on another model; of its %d cases %d collapse here"
        logger.warning(said, len(listed), len(kept))
        return set(listed)
    for case_id, subject in listed.items():
        if case_id not in kept:
            said = "case %d (%s) is listed as a collapse case but does not collapse here; left out"
            logger.warning(said, case_id, subject)
    if not kept:
        raise BadInputError(
            "no listed case collapses under these settings; make a list for them: firsttok scan"
        )
    return kept


def _facts_hash(facts: Iterable[Fact]) -> str:
    return content_hash([fact.as_record() for fact in facts])
