"""``firsttok reproduce``: run every analysis script, then write the report."""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from firsttok.console import exit_on_error, progress_bar
from firsttok.errors import BadInputError
from firsttok.lanes import Job, cores, process_context, run_in_lanes
from firsttok.options import PASSED_ON, folder_name
from firsttok.scripts import AFTER, LANE_ORDER, SCRIPTS

__all__ = ["run"]

BAD_INPUT = 2
"""Exit code of a script that does not apply to the model."""
IMPORTED = (
    "firsttok.cases",
    "firsttok.models.loading",
    "firsttok.plots",
    "firsttok.probes",
    "firsttok.script_options",
    "matplotlib.pyplot",
    "seaborn",
    "transformer_lens.model_bridge",
    "transformers.models.llama.modeling_llama",
)
"""What takes long to import, and every script needs."""


def run(args: argparse.Namespace) -> None:
    """Run the scripts; one that does not apply is passed over and named at the end.

    Raises:
        BadInputError: If scripts are missing, or some did not apply.
        SystemExit: If a script fails, with its exit code.
    """
    out = Path(args.out or ("figures" if args.profile == "full" else "figures/quick"))
    jobs = _jobs(args, out)
    lanes = _lanes(args)
    ended = _in_turn(jobs) if lanes == 1 else _side_by_side(jobs, lanes)
    refused: list[str] = []
    for name, code in ended:
        if code == BAD_INPUT:
            # The script has said why it does not apply to this model; the others may.
            refused.append(name)
        elif code:
            raise SystemExit(code)
    if len(refused) == len(jobs):
        raise BadInputError("no script could be run; each said why above")
    # Not before: with it comes torch, which this process would hold while the scripts run.
    from firsttok.report import write_reports

    for path in write_reports(out, folder_name(args.model)):
        sys.stdout.write(f"\nfigures, numbers and verdicts: {path}\n")
    if refused:
        names = ", ".join(sorted(refused, key=SCRIPTS.index))
        raise BadInputError(f"these scripts did not apply, and said why: {names}")


def _jobs(args: argparse.Namespace, out: Path) -> list[Job]:
    folder = Path(args.analyses)
    if not folder.is_dir():
        raise BadInputError(
            f"no folder {folder} with the analysis scripts; run this in a checkout of firsttok"
        )
    given = [
        [f"--{name}", value]
        for name in ("config", *PASSED_ON)
        if (value := getattr(args, name.replace("-", "_")))
    ]
    options = ["--model", args.model, "--profile", args.profile, "--out", str(out)]
    options += ["--skip-bad"] if args.skip_bad else []
    jobs: list[Job] = []
    for name in SCRIPTS:
        script = folder / f"{name}.py"
        if not script.is_file():
            raise BadInputError(f"no script {script}; the checkout is incomplete")
        arguments = (*options, *itertools.chain(*given))
        jobs.append(Job(name=name, script=script, arguments=arguments, after=AFTER.get(name, ())))
    return jobs


def _lanes(args: argparse.Namespace) -> int:
    if args.jobs is None:
        # One device is not shared, and more lanes than two would each hold what an edit needs.
        return min(2, cores()) if (args.device or "cpu") == "cpu" else 1
    if args.jobs < 1:
        raise BadInputError(f"--jobs is {args.jobs}; give at least 1")
    return int(args.jobs)


def _in_turn(jobs: list[Job]) -> Iterator[tuple[str, int]]:
    """One script after another, each with the terminal to itself."""
    for number, job in enumerate(jobs, start=1):
        sys.stdout.write(f"\n{job.name} ({number} of {len(jobs)})\n")
        sys.stdout.flush()
        command = [sys.executable, str(job.script), *job.arguments]
        yield job.name, subprocess.run(command, check=False).returncode


def _side_by_side(jobs: list[Job], lanes: int) -> Iterator[tuple[str, int]]:
    """Several scripts at a time; what one says is shown when it has ended."""
    # All of them need it, so it is made before with every core. What is wrong, the scripts say.
    preparing = process_context(IMPORTED).Process(target=_prepare, args=(jobs[0].arguments,))
    preparing.start()
    preparing.join()
    if preparing.exitcode not in (0, BAD_INPUT):
        raise SystemExit(preparing.exitcode)
    with progress_bar(estimate_over=3600.0) as progress:
        task = progress.add_task(f"{len(jobs)} scripts, {lanes} at a time", total=len(jobs))
        ordered = sorted(jobs, key=lambda job: LANE_ORDER.index(job.name))
        for ended in run_in_lanes(ordered, lanes=lanes, imported=IMPORTED):
            progress.advance(task)
            progress.stop()
            sys.stdout.write(f"\n{ended.job.name} ({ended.seconds:.0f} s)\n{ended.output}")
            sys.stdout.flush()
            progress.start()
            yield ended.job.name, ended.code


def _prepare(options: tuple[str, ...]) -> None:
    """Fetch the model, and make contexts and second moment, as every script would."""
    from firsttok.script_options import parse_script

    def prepare() -> None:
        with progress_bar() as progress:
            parse_script(argparse.ArgumentParser(), progress, argv=options)

    raise SystemExit(exit_on_error(prepare))
