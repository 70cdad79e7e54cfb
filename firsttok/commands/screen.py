"""``firsttok screen``: tell collapse cases from their keys, before any edit."""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from firsttok.cases import load_scan, scan
from firsttok.console import progress_bar
from firsttok.data import FactFile
from firsttok.errors import BadInputError
from firsttok.inputs import fact_file, open_study
from firsttok.options import folder_name
from firsttok.output import publish
from firsttok.plots import figure, save_figure, screen_curves
from firsttok.screening import Calibration, ScreenRow, calibrate, screen
from firsttok.storage import write_json
from firsttok.study import Study

__all__ = ["run"]

logger = logging.getLogger(__name__)
SHOWN = 10
"""Facts of the ranking that are printed; all are in the files."""


def run(args: argparse.Namespace) -> None:
    """Screen the facts, calibrate on edited ones, and leave ranking, curves and hard list.

    Raises:
        FirsttokError: If an input is unusable.
    """
    facts = _facts(args)
    out = Path(args.out) / folder_name(args.model)
    with progress_bar() as progress:
        study = open_study(args, out, progress)
        start = time.perf_counter()
        screened = screen(study, facts, progress=progress, total=len(facts))
        rows = sorted(screened, key=lambda row: abs(row.denominator))
        seconds = {"screen": round(time.perf_counter() - start, 2)}
        collapsed = _edited(args, study, rows, out)
        if args.measure:
            # In a folder of its own, where nothing is found finished, so that the time is true.
            with tempfile.TemporaryDirectory() as work:
                start = time.perf_counter()
                edited = scan(study.varied(work=Path(work)), tuple(facts), progress=progress)
                seconds["edit and evaluate"] = round(time.perf_counter() - start, 2)
            collapsed = {row.case_id: row.collapsed for row in edited}
    found = _calibrated(rows, collapsed, args.seed)
    limit = args.threshold if found is None or args.threshold is not None else found.threshold
    record = study.provenance() | {
        "seconds": seconds,
        "threshold": limit,
        "calibration": None if found is None else asdict(found),
    }
    flat = [asdict(row) | {"collapsed": collapsed.get(row.case_id)} for row in rows]
    stem = out / "screen"
    publish(
        stem,
        title=f"{len(rows)} facts by the size of ROME's denominator",
        columns=["", "prompt", "|denominator|", "cosine", "norm ratio", "first token", "collapsed"],
        lines=[_line(row) for row in flat[:SHOWN]],
        rows=flat,
        provenance=record,
    )
    _describe(found, seconds)
    if found is not None:
        drawn, axes = figure(2)
        screen_curves(axes, flat)
        save_figure(stem, drawn)
    if args.build_hard:
        if limit is None:
            raise BadInputError(
                "--build-hard needs a threshold: give --threshold, --measure, or a list of edited "
                "cases (firsttok scan) with --scan"
            )
        _save_hard(Path(args.build_hard), facts, rows, limit, record)


def _facts(args: argparse.Namespace) -> FactFile:
    facts = fact_file(args)
    if args.threshold is not None and not args.threshold > 0:
        raise BadInputError(f"--threshold is {args.threshold}; give a number above 0")
    if args.build_hard and not Path(args.build_hard).resolve().parent.is_dir():
        raise BadInputError(
            f"the folder of --build-hard {args.build_hard} does not exist; make it first"
        )
    if args.scan and not Path(args.scan).is_file():
        raise BadInputError(f"no list of edited cases at {args.scan}; make one with: firsttok scan")
    return facts


def _edited(
    args: argparse.Namespace, study: Study, rows: Sequence[ScreenRow], out: Path
) -> dict[int, bool]:
    """Whether each edited fact collapsed this very model; empty if nothing says."""
    if args.measure:
        return {}
    path = Path(args.scan) if args.scan else out / "collapse_cases.json"
    if not path.is_file():
        return {}
    known, fingerprint = load_scan(path)
    if fingerprint != study.model.fingerprint:
        reason = f"{path} was made on another model than {study.model.label}"
        if args.scan:
            raise BadInputError(f"{reason}; make it again with: firsttok scan")
        logger.warning("%s, so no threshold is taken from it", reason)
        return {}
    prompts = {row.case_id: row.prompt for row in rows}
    return {row.case_id: row.collapsed for row in known if prompts.get(row.case_id) == row.prompt}


def _calibrated(
    rows: Sequence[ScreenRow], collapsed: Mapping[int, bool], seed: int
) -> Calibration | None:
    judged = [row for row in rows if row.case_id in collapsed]
    if not judged:
        return None
    try:
        return calibrate(
            [row.denominator for row in judged],
            [collapsed[row.case_id] for row in judged],
            seed=seed,
        )
    except BadInputError as error:
        # The ranking is worth having without it.
        logger.warning("%s", error)
        return None


def _line(row: Mapping[str, Any]) -> list[object]:
    outcome = {None: None, True: "yes", False: "no"}[row["collapsed"]]
    place = "yes" if row["first_token"] else "no"
    return [
        row["case_id"],
        row["prompt"],
        abs(row["denominator"]),
        row["key_cosine"],
        row["key_norm_ratio"],
        place,
        outcome,
    ]


def _describe(found: Calibration | None, seconds: Mapping[str, float]) -> None:
    took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    sys.stdout.write(f"took: {took}\n")
    if found is None:
        sys.stdout.write("no edited cases to calibrate on: firsttok scan, or --measure\n")
        return
    sys.stdout.write(
        f"{found.collapsed} of {found.cases} edited cases collapsed; taken for one below "
        f"|denominator| {found.threshold:.4g}\n"
    )
    for name in ("auc", "average_precision", "recall", "precision"):
        value = getattr(found, name)
        label = name.replace("_", " ").replace("auc", "ROC AUC")
        sys.stdout.write(
            f"  {label}: {value.value:.3f} (95 %: {value.low:.3f} to {value.high:.3f})\n"
        )


def _save_hard(
    path: Path,
    facts: FactFile,
    rows: Sequence[ScreenRow],
    limit: float,
    record: Mapping[str, Any],
) -> None:
    chosen = [row.case_id for row in rows if abs(row.denominator) < limit]
    if not chosen:
        raise BadInputError(f"no fact has a denominator below {limit:g}; nothing was written")
    wanted = set(chosen)
    records = {fact.case_id: fact.as_record() for fact in facts if fact.case_id in wanted}
    write_json(path.with_suffix(".provenance.json"), dict(record))
    write_json(path, [records[case_id] for case_id in chosen])
    sys.stdout.write(f"{len(chosen)} facts below {limit:.4g}: {path}\n")
