"""``firsttok reproduce``: run every analysis script, then write the report."""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

from firsttok.errors import BadInputError
from firsttok.options import PASSED_ON, model_label
from firsttok.report import write_reports
from firsttok.scripts import SCRIPTS

__all__ = ["run"]

BAD_INPUT = 2
"""Exit code of a script that does not apply to the model."""


def run(args: argparse.Namespace) -> None:
    """Run the scripts in order; one that does not apply is passed over and named at the end.

    Raises:
        BadInputError: If scripts are missing, or some did not apply.
        SystemExit: If a script fails, with its exit code.
    """
    folder = Path(args.analyses)
    if not folder.is_dir():
        raise BadInputError(
            f"no folder {folder} with the analysis scripts; run this in a checkout of firsttok"
        )
    out = args.out or ("figures" if args.profile == "full" else "figures/quick")
    given = [
        [f"--{name}", value]
        for name in PASSED_ON
        if (value := getattr(args, name.replace("-", "_")))
    ]
    refused: list[str] = []
    for number, name in enumerate(SCRIPTS, start=1):
        script = folder / f"{name}.py"
        if not script.is_file():
            raise BadInputError(f"no script {script}; the checkout is incomplete")
        command = [sys.executable, str(script), "--model", args.model]
        command += ["--profile", args.profile, "--out", out, *itertools.chain(*given)]
        sys.stdout.write(f"\n{name} ({number} of {len(SCRIPTS)})\n")
        sys.stdout.flush()
        code = subprocess.run(command, check=False, env=os.environ).returncode
        if code == BAD_INPUT:
            # The script has said why it does not apply to this model; the others may.
            refused.append(name)
        elif code:
            raise SystemExit(code)
    for path in write_reports(Path(out), model_label(args.model)):
        sys.stdout.write(f"\nfigures, numbers and verdicts: {path}\n")
    if refused:
        raise BadInputError(f"these scripts did not apply, and said why: {', '.join(refused)}")
