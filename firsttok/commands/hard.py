"""``firsttok hard``: a list of facts that each collapse the model, and one of facts that do not."""

import argparse
import logging
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import Progress

from firsttok.console import print_table, progress_bar, show
from firsttok.data import Fact, FactFile, write_facts
from firsttok.errors import BadInputError
from firsttok.file_options import normal_file, record_file
from firsttok.hard_lists import FactSearch, check_unedited, find_hard_facts, find_normal_facts
from firsttok.inputs import (
    excluded_subjects,
    fact_file,
    open_study,
    open_study_of,
    unedited_perplexity,
)
from firsttok.models import Model
from firsttok.options import folder_name
from firsttok.screening import hard_rule
from firsttok.sieve import FailedFact, warn_of_failures
from firsttok.storage import write_json
from firsttok.study import Study
from firsttok.synthetic import known_facts

__all__ = ["run"]

logger = logging.getLogger(__name__)
_NORMAL = 4
"""Normal candidates for each fact that is to be found; more need not be screened."""


def run(args: argparse.Namespace) -> None:
    """Search the facts, and leave the list, that of normal facts, and the record of both.

    Raises:
        FirsttokError: If an input is unusable, or no fact collapses the model.
    """
    out = Path(args.out)
    normal_out = normal_file(out)
    if args.generate and args.facts:
        raise BadInputError("--generate makes the facts itself; leave --facts or it out")
    if args.limit is not None and (args.count or 1) > args.limit:
        raise BadInputError(
            f"--count is {args.count}, and --limit takes the first {args.limit} facts alone; raise "
            "it, or leave it out"
        )
    excluded = excluded_subjects(args)
    file = None if args.generate else fact_file(args)
    with progress_bar() as progress:
        study, candidates, others, left_out = _open(args, file, excluded, progress)
        limits: dict[str, Any] = {"threshold": args.threshold, "progress": progress}
        hard = find_hard_facts(study, candidates, count=args.count, **limits)
        if not hard.facts:
            raise BadInputError(
                f"none of the {len(candidates)} facts collapses {study.model.label} by one ROME "
                f"edit ({hard.predicted} were taken for collapse cases, {hard.edited} edited), so "
                f"{out} was not written; give other facts"
            )
        searches = {"hard": hard}
        if args.with_normal:
            count = len(hard.facts)
            if args.generate:
                others = others[: _NORMAL * count]
            searches["normal"] = find_normal_facts(
                study, others, count=count, seed=args.seed, known=hard.verdicts, **limits
            )
    record = study.provenance() | {
        "original_perplexity": study.original_perplexity.mean,
        "rule": hard_rule(args.threshold),
        "facts": "generated" if file is None else file.name,
        "excluded_subjects": sorted(excluded),
        "seed": args.seed,
        "left_out": left_out,
    }
    record |= {
        kind: {
            "facts": [fact.case_id for fact in search.facts],
            "screened": [verdict.as_record() for verdict in search.verdicts],
        }
        for kind, search in searches.items()
    }
    write_json(record_file(out), record)
    for kind, path in (("normal", normal_out), ("hard", out)):
        if kind in searches:
            write_facts(path, searches[kind].facts)
    _tell(args, searches, {"hard": out, "normal": normal_out})


def _open(
    args: argparse.Namespace,
    file: FactFile | None,
    excluded: frozenset[str],
    progress: Progress,
) -> tuple[Study, tuple[Fact, ...], tuple[Fact, ...], list[dict[str, Any]]]:
    """The study, candidates for hard and for normal facts, and what is left out of the file."""
    folder = Path(args.work) / folder_name(args.model)

    def check(model: Model) -> None:
        # Before the minutes in which the second moment is taken.
        check_unedited(unedited_perplexity(args, folder, model))

    def without_excluded(given: FactFile) -> tuple[Fact, ...]:
        facts = tuple(fact for fact in given if fact.subject.casefold() not in excluded)
        if not facts:
            raise BadInputError("--exclude holds the subjects of all facts; give other facts")
        return facts

    if file is not None:
        if excluded:
            without_excluded(file)
        study, usable = open_study_of(args, file, folder, progress, on_model=check)
        facts = without_excluded(usable)
        return study, facts, facts, [asdict(each) for each in usable.left_out]
    made: dict[str, tuple[Fact, ...]] = {}

    def make(model: Model) -> None:
        for kind in ("hard", "normal") if args.with_normal else ("hard",):
            facts = known_facts(model, kind, seed=args.seed, exclude=excluded)
            made[kind] = tuple(islice(facts, args.limit))
            wanted = args.count or 1
            if len(made[kind]) < wanted:
                raise BadInputError(
                    f"{len(made[kind])} {kind} candidates can be made for {model.name}, not "
                    f"{wanted}; ask for fewer with --count, or exclude fewer subjects"
                )
        check(model)

    study = open_study(args, folder, progress, leave_in=folder, on_model=make)
    return study, made["hard"], made.get("normal", ()), []


def _tell(
    args: argparse.Namespace, searches: dict[str, FactSearch], paths: dict[str, Path]
) -> None:
    lines = [
        [kind, len(each.verdicts), each.predicted, each.edited, len(each.facts)]
        for kind, each in searches.items()
    ]
    columns = ["facts", "screened", "taken for collapse cases", "edited", "in the list"]
    print_table("One ROME edit each", columns, lines)
    for kind, search in searches.items():
        warn_of_failures(
            FailedFact(
                case_id=each.fact.case_id,
                subject=each.fact.subject,
                prompt=each.fact.prompt,
                reason=each.reason,
            )
            for each in search.verdicts
            if each.reason
        )
        wanted = len(searches["hard"].facts) if kind == "normal" else args.count or 0
        if len(search.facts) < wanted:
            logger.warning(
                "%d %s facts were found, not %d; give more facts", len(search.facts), kind, wanted
            )
        show(f"{len(search.facts)} {kind} facts: {paths[kind]}")
