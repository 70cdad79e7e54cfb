"""``firsttok scan``: edit every fact with ROME, and list the facts that collapse the model."""

import argparse
from pathlib import Path

from firsttok.console import print_table, progress_bar, show
from firsttok.editing import ROME
from firsttok.inputs import fact_file, open_study_of
from firsttok.measuring import measure_facts
from firsttok.options import folder_name
from firsttok.paper.cases import save_scan
from firsttok.sieve import FailedFact, warn_of_failures

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Scan the facts, leave the list in the model's folder, and print a summary."""
    facts = fact_file(args)
    out = Path(args.out) / folder_name(args.model)
    failed: list[FailedFact] = []
    with progress_bar() as progress:
        study, usable = open_study_of(args, facts, out, progress)
        study.warn_if_collapsed()
        rows = measure_facts(
            study,
            tuple(usable),
            [ROME],
            progress=progress,
            label="scanning",
            on_failure=failed.append,
        )
    path = out / "collapse_cases.json"
    save_scan(path, study, facts, rows, failed=failed, left_out=usable.left_out)
    groups = {
        "first token, one token": [row for row in rows if row.first_token],
        "not the first token": [row for row in rows if not row.first_token],
    }
    lines: list[list[object]] = []
    for name, chosen in groups.items():
        sizes = [abs(row.denominator) for row in chosen]
        worst = max((row.perplexity for row in chosen), default=None)
        collapsed = sum(row.collapsed for row in chosen)
        ends = (min(sizes, default=None), max(sizes, default=None))
        lines.append([name, len(chosen), collapsed, worst, *ends])
    print_table(
        f"ROME on {len(rows)} facts (original perplexity {study.original_perplexity.mean:.2f})",
        ["subject is", "facts", "collapsed", "max perplexity", "min |denominator|", "max"],
        lines,
    )
    warn_of_failures(failed)
    show(str(path))
