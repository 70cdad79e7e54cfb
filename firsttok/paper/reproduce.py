"""``firsttok reproduce``: run every analysis script, then write the report."""

import argparse
import itertools
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from firsttok.config import configured
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.errors import BadInputError, WorkerError
from firsttok.options import PASSED_ON, add_script_options, folder_name
from firsttok.paper.lanes import Job, cores, end_process, run_alone, run_in_lanes, start_process
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS, in_lanes

__all__ = ["run"]

BAD_INPUT = 2
"""Exit code of a script that does not apply to the model."""
IMPORTED = (
    "firsttok.paper.cases",
    "firsttok.models.loading",
    "firsttok.paper.figures",
    "firsttok.probes",
    "firsttok.paper.experiment",
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
        WorkerError: If a script was killed.
    """
    out = Path(args.out or ("figures" if args.profile == "full" else "figures/quick"))
    jobs = _jobs(args, out)
    lanes = _lanes(args)
    refused: list[str] = []
    with closing(_in_turn(jobs) if lanes == 1 else _side_by_side(jobs, lanes)) as ended:
        for name, code in ended:
            if code == BAD_INPUT:
                # The script has said why it does not apply to this model; the others may.
                refused.append(name)
            elif code:
                _stop(name, code)
    if len(refused) == len(jobs):
        raise BadInputError("no script could be run; each said why above")
    # Not before: with it comes torch, which this process would hold while the scripts run.
    from firsttok.paper.pages import write_reports

    for path in write_reports(out, folder_name(args.model)):
        show(f"\nfigures, numbers and verdicts: {path}")
    if refused:
        names = ", ".join(sorted(refused, key=SCRIPTS.index))
        raise BadInputError(f"these scripts did not apply, and said why: {names}")


def _stop(name: str, code: int) -> NoReturn:
    """End as a script did that cannot be passed over."""
    if code < 0:
        raise WorkerError(
            f"{name} was killed by signal {-code}, perhaps because memory ran out; run the same "
            "command again to resume, with --jobs 1"
        )
    raise SystemExit(code)


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
    flags = ["--skip-bad"] if args.skip_bad else []
    arguments = (*options, *flags, *itertools.chain(*given))
    # A value that every script would refuse is refused before the first one starts.
    parser = argparse.ArgumentParser(prog="firsttok reproduce", add_help=False)
    add_script_options(parser)
    configured(parser.parse_args(arguments), parser, arguments)
    jobs = [
        Job(
            name=each.name,
            script=folder / f"{each.name}.py",
            arguments=arguments,
            after=each.after,
        )
        for each in EXPERIMENTS
        if not each.alone
    ]
    for job in jobs:
        if not job.script.is_file():
            raise BadInputError(f"no script {job.script}; the checkout is incomplete")
    return jobs


def _lanes(args: argparse.Namespace) -> int:
    if args.jobs is None:
        # One device is not shared, and more lanes than two would each hold what an edit needs.
        return min(2, cores()) if (args.device or "cpu") == "cpu" else 1
    return int(args.jobs)


def _in_turn(jobs: list[Job]) -> Generator[tuple[str, int], None, None]:
    """One script after another, each with the terminal to itself."""
    for number, job in enumerate(jobs, start=1):
        show(f"\n{job.name} ({number} of {len(jobs)})")
        yield job.name, run_alone(job)


def _side_by_side(jobs: list[Job], lanes: int) -> Generator[tuple[str, int], None, None]:
    """Several scripts at a time; what one says is shown when it has ended."""
    # All of them need it, so it is made before with every core. What is wrong, the scripts say.
    preparing = start_process(_prepare, (jobs[0].arguments,), imported=IMPORTED)
    try:
        preparing.join()
    finally:
        end_process(preparing)
    if preparing.exitcode not in (0, BAD_INPUT):
        _stop("the preparation", preparing.exitcode or 0)
    with progress_bar(estimate_over=3600.0) as progress:
        task = progress.add_task(f"{len(jobs)} scripts, {lanes} at a time", total=len(jobs))
        order = [each.name for each in in_lanes()]
        ordered = sorted(jobs, key=lambda job: order.index(job.name))
        for ended in run_in_lanes(ordered, lanes=lanes, imported=IMPORTED):
            progress.advance(task)
            progress.stop()
            show(f"\n{ended.job.name} ({ended.seconds:.0f} s)\n{ended.output.rstrip()}")
            progress.start()
            yield ended.job.name, ended.code


def _prepare(options: tuple[str, ...]) -> None:
    """Fetch the model, and make contexts and second moment, as every script would."""
    from firsttok.paper.experiment import parse_script

    def prepare() -> None:
        with progress_bar() as progress:
            parse_script(argparse.ArgumentParser(), progress, argv=options)

    raise SystemExit(exit_on_error(prepare))
