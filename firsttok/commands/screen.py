"""``firsttok screen``: tell collapse cases from their keys, before any edit."""

import argparse
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from firsttok.console import print_table, progress_bar, show
from firsttok.data import FactFile, write_facts
from firsttok.editing import ROME, Editor, Method
from firsttok.errors import BadInputError
from firsttok.file_options import record_file
from firsttok.inputs import fact_file, methods_from, open_study_of
from firsttok.measuring import measure_facts
from firsttok.options import folder_name
from firsttok.paper.cases import load_scan
from firsttok.paper.figures import figure, save_figure, screen_curves
from firsttok.rows import Row
from firsttok.screening import Calibration, ScreenRow, calibrate, hard_rule, screen
from firsttok.sieve import FailedFact, warn_of_failures
from firsttok.storage import save_result, write_json
from firsttok.study import Study

__all__ = ["run"]

logger = logging.getLogger(__name__)
SHOWN = 10
"""Facts of the ranking that are printed; all are in the files."""


def run(args: argparse.Namespace) -> None:
    """Screen the facts, calibrate on edited ones, and leave ranking, curves and hard list."""
    facts = _facts(args)
    method = _measured_by(args)
    out = Path(args.out) / folder_name(args.model)
    failed: list[FailedFact] = []
    with progress_bar() as progress:
        study, usable = open_study_of(args, facts, out, progress, methods=[method])
        known = _edited(args, study, out)
        start = time.perf_counter()
        screened = screen(
            study, usable, progress=progress, total=len(usable), on_failure=failed.append
        )
        rows = sorted(screened, key=lambda row: abs(row.denominator))
        seconds = {"screen": round(time.perf_counter() - start, 2)}
        if args.measure:
            # In a folder of its own, where nothing is found finished, so that the time is true.
            with tempfile.TemporaryDirectory() as work:
                start = time.perf_counter()
                known = measure_facts(
                    study.varied(work=Path(work)),
                    tuple(usable),
                    [method],
                    progress=progress,
                    on_failure=failed.append,
                )
                seconds["edit and evaluate"] = round(time.perf_counter() - start, 2)
    prompts = {row.case_id: row.prompt for row in rows}
    collapsed = {
        row.case_id: row.collapsed for row in known if prompts.get(row.case_id) == row.prompt
    }
    found = _calibrated(rows, collapsed, args.seed)
    limit = args.threshold if found is None or args.threshold is not None else found.threshold
    record = study.provenance() | {
        "seconds": seconds,
        "threshold": limit,
        "rule": hard_rule(limit),
        "calibration": None if found is None else asdict(found),
        "failed": [asdict(fact) for fact in failed],
        "left_out": [asdict(each) for each in usable.left_out],
    }
    flat = [
        asdict(row) | {"hard": row.is_hard(limit), "collapsed": collapsed.get(row.case_id)}
        for row in rows
    ]
    stem = out / "screen"
    title = f"{len(rows)} facts by the size of ROME's denominator"
    columns = ["", "prompt", "|denominator|", "cosine", "norm ratio", "first token", "collapsed"]
    lines = [_line(row) for row in flat[:SHOWN]]
    print_table(title, columns, lines)
    table = {"title": title, "columns": columns, "lines": lines}
    save_result(stem, {**table, "provenance": record, "rows": flat})
    _describe(found, seconds)
    warn_of_failures(failed)
    if found is not None:
        drawn, axes = figure(2)
        screen_curves(axes, flat)
        save_figure(stem, drawn)
    if args.build_hard:
        _save_hard(Path(args.build_hard), usable, rows, limit, record)


def _facts(args: argparse.Namespace) -> FactFile:
    """The facts, once every other option has been looked at."""
    if args.scan:
        if not Path(args.scan).is_file():
            raise BadInputError(
                f"no list of edited cases at {args.scan}; make one with: firsttok scan"
            )
        load_scan(args.scan)
    return fact_file(args)


def _measured_by(args: argparse.Namespace) -> Method | Editor:
    """Whose edits are measured; only those of ROME are in a list of edited cases."""
    first, *others = methods_from(args)
    if others:
        count = 1 + len(others)
        raise BadInputError(f"--method takes one method here, not {count}; run it for each")
    if first is not ROME and not args.measure:
        raise BadInputError(
            f"--method {first.name} is for --measure, which edits every fact by it; add that"
        )
    return first


def _edited(args: argparse.Namespace, study: Study, out: Path) -> Sequence[Row]:
    """Facts that were edited on this model with these settings; none if nothing says."""
    path = Path(args.scan) if args.scan else out / "collapse_cases.json"
    if args.measure or not path.is_file():
        return ()
    known, made = load_scan(path)
    if not study.model.is_of(made["model"]):
        reason = f"{path} was made on another model than {study.model.label}"
    elif other := _other_settings(made, study.provenance()):
        reason = f"{path} was made with another {', another '.join(other)}"
    else:
        return known
    if args.scan:
        raise BadInputError(f"{reason}; make it again with: firsttok scan")
    logger.warning("%s, so no threshold is taken from it", reason)
    return ()


def _other_settings(made: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What decides denominators or perplexities, and is not the same in two provenances."""
    deciding = {
        "layer": lambda record: record["layer"],
        "set of contexts": lambda record: record["contexts"]["hash"],
        "value optimisation": lambda record: record["hyperparameters"],
        "set of sentences": lambda record: record["texts"]["hash"],
        "BOS policy of sentences, or keys": lambda record: record.get("stages"),
    }
    try:
        found = [what for what, of in deciding.items() if of(made) != of(own)]
        one, other = made["second_moment"], own["second_moment"]
        # A record of an older version has no hash of the matrix itself.
        names = ("hash",) if "hash" in one else ("corpus_hash", "tokens")
        return found + ["second moment"] * any(one[name] != other[name] for name in names)
    except (KeyError, TypeError):
        return ["format"]


def _calibrated(
    rows: Sequence[ScreenRow], collapsed: Mapping[int, bool], seed: int
) -> Calibration | None:
    judged = [row for row in rows if row.case_id in collapsed]
    if not judged:
        return None
    outcomes = [collapsed[row.case_id] for row in judged]
    try:
        return calibrate([row.denominator for row in judged], outcomes, seed=seed)
    except BadInputError as error:
        # The ranking is worth having without it.
        logger.warning("%s", error)
        return None


def _line(row: Mapping[str, Any]) -> list[object]:
    said = {None: None, True: "yes", False: "no"}
    numbers = (abs(row["denominator"]), row["key_cosine"], row["key_norm_ratio"])
    answers = (said[row["first_token"]], said[row["collapsed"]])
    return [row["case_id"], row["prompt"], *numbers, *answers]


def _describe(found: Calibration | None, seconds: Mapping[str, float]) -> None:
    show("took: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    if found is None:
        show("no edited cases to calibrate on: firsttok scan, or --measure")
        return
    show(
        f"{found.collapsed} of {found.cases} edited cases collapsed; taken for one below "
        f"|denominator| {found.threshold:.4g}"
    )
    for name in ("auc", "average_precision", "recall", "precision"):
        value = getattr(found, name)
        label = name.replace("_", " ").replace("auc", "ROC AUC")
        show(f"  {label}: {value.value:.3f} (95 %: {value.low:.3f} to {value.high:.3f})")


def _save_hard(
    path: Path,
    facts: FactFile,
    rows: Sequence[ScreenRow],
    limit: float | None,
    record: Mapping[str, Any],
) -> None:
    chosen = [row.case_id for row in rows if row.is_hard(limit)]
    if not chosen:
        raise BadInputError(
            f"no fact has a denominator that makes it hard ({hard_rule(limit)}), so {path} was not "
            "written; try other facts or --threshold"
        )
    wanted = set(chosen)
    by_number = {fact.case_id: fact for fact in facts if fact.case_id in wanted}
    write_json(record_file(path), dict(record))
    write_facts(path, [by_number[case_id] for case_id in chosen])
    show(f"{len(chosen)} facts with {hard_rule(limit)}: {path}")
