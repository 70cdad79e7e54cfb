"""An experiment, run as its command line asks: options, study, table, verdicts, figure.

A file of ``analyses/`` defines a function that measures and returns what it
:class:`~firsttok.paper.tables.Found`, and gives it to :func:`run`.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress

from firsttok.config import configured
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.contexts import ContextSet
from firsttok.data import Fact, LeftOut
from firsttok.editing import Editor, Method
from firsttok.errors import BadInputError
from firsttok.inputs import fact_file, kept_contexts, open_study
from firsttok.options import add_script_options, folder_name
from firsttok.paper.claims import Claim
from firsttok.paper.figures import save_figure
from firsttok.paper.tables import Found, publish
from firsttok.storage import read_json
from firsttok.study import Study

__all__ = ["FULL", "ScriptOptions", "parse_script", "run", "usable_methods"]

FULL = 24
"""Cases of either kind in the full profile."""


@dataclass(frozen=True, kw_only=True)
class ScriptOptions:
    """What an analysis script was asked for."""

    study: Study
    facts: tuple[Fact, ...]
    """The facts to choose from."""
    cases: Path
    """List of collapse cases."""
    out: Path
    """Folder the script leaves its files in."""
    collapse: int
    """Most collapse cases."""
    normal: int
    """Number of normal cases."""
    seed: int
    """Seed of contexts and of the draw of normal cases."""
    command: str
    """The command that repeats the run, without machine paths."""
    args: argparse.Namespace
    """Every option as it was parsed, the script's own among them."""
    left_out: tuple[LeftOut, ...] = ()
    """Records of the file of facts that could not be read, by reason."""

    def halved(self) -> "ScriptOptions":
        """Half as many cases, for a script that optimises each of them several times."""
        return replace(self, collapse=(self.collapse + 1) // 2, normal=(self.normal + 1) // 2)

    def provenance(self) -> dict[str, Any]:
        """What determines the numbers of a script that works on this study."""
        record = cast(dict[str, Any], read_json(self.cases, "collapse cases"))
        made_on = record["provenance"]["model"]
        found = self.study.provenance() | {
            "seed": self.seed,
            "command": self.command,
            "original_perplexity": self.study.original_perplexity.mean,
            "case_list": {"model": made_on["name"], "fingerprint": made_on["fingerprint"]},
        }
        if self.left_out:
            found["left_out"] = [asdict(each) for each in self.left_out]
        return found

    def sample_contexts(self, seed: int) -> ContextSet:
        """Contexts of a seed: those beside the list of cases, or else sampled and kept."""
        return kept_contexts(self.study.model, seed, look_in=[self.cases.parent], leave_in=self.out)


def usable_methods(
    study: Study, methods: Sequence[Method | Editor]
) -> tuple[tuple[Method | Editor, ...], list[str]]:
    """Those methods that a model takes, and a sentence on each that it does not.

    MEND needs a network that was trained on the model.
    """
    reasons = {method.name: _reason_against(study, method) for method in methods}
    left_out = [
        f"{method.label} is left out: {reasons[method.name]}"
        for method in methods
        if reasons[method.name]
    ]
    return tuple(method for method in methods if not reasons[method.name]), left_out


def _reason_against(study: Study, method: Method | Editor) -> str:
    try:
        study.editors([method])
    except BadInputError as error:
        return str(error)
    return ""


def run(
    file: str,
    summary: str | None,
    measure: Callable[[ScriptOptions, Progress], Found],
    *,
    claims: Sequence[Claim] = (),
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    without_bos: bool = False,
    own_contexts: bool = False,
    methods: Sequence[Method | Editor] = (),
) -> int:
    """Run an experiment; its files lie in the folder of the model, under the name of its script.

    Args:
        file: The script, ``__file__``.
        summary: Its docstring, whose first line its help shows.
        measure: Measures, and shows progress.
        claims: What the rows decide.
        add_options: Adds options of its own.
        without_bos: As for :func:`open_study`.
        own_contexts: Whether it samples contexts of several seeds, so that none can be given.
        methods: Methods that edit other layers than ``--layer``, whose second moments it needs.

    Returns:
        The exit code.
    """

    def main() -> None:
        start = time.perf_counter()
        parser = argparse.ArgumentParser(description=(summary or "").partition("\n")[0])
        if add_options is not None:
            add_options(parser)
        with progress_bar() as progress:
            options = parse_script(
                parser,
                progress,
                without_bos=without_bos,
                own_contexts=own_contexts,
                methods=methods,
            )
            found = measure(options, progress)
        stem = options.out / Path(file).stem
        seconds = {"seconds": round(time.perf_counter() - start, 1)}
        publish(stem, found, provenance=options.provenance() | seconds, claims=claims)
        for note in found.notes:
            show(note)
        if found.draw is not None:
            save_figure(stem, found.draw())
        if found.points is not None:
            from firsttok.probes import save_points

            save_points(stem.with_name(f"{stem.name}_points.csv"), found.points)

    return exit_on_error(main)


def parse_script(
    parser: argparse.ArgumentParser,
    progress: Progress,
    *,
    without_bos: bool = False,
    own_contexts: bool = False,
    methods: Sequence[Method | Editor] = (),
) -> ScriptOptions:
    """Parse a script's options, refuse what is unusable, and then open its study.

    Args:
        parser: The script's parser, with its own options.
        progress: Where to show progress.
        without_bos: As for :func:`run`.
        own_contexts: As for :func:`run`.
        methods: As for :func:`run`.

    Raises:
        FirsttokError: If an input is unusable.
    """
    add_script_options(parser)
    args = configured(parser.parse_args(), parser)
    if own_contexts and args.contexts:
        raise BadInputError("this script draws contexts of several seeds; leave --contexts out")
    facts = fact_file(args)
    label = folder_name(args.model)
    out = Path(args.out) / label
    cases = Path(args.cases) if args.cases else Path("figures") / label / "collapse_cases.json"
    if not cases.is_file():
        raise BadInputError(f"no list of collapse cases at {cases}; make one with: firsttok scan")
    count = 8 if args.profile == "quick" else FULL
    study = open_study(
        args,
        out,
        progress,
        methods=methods,
        contexts_folder=cases.parent,
        leave_in=out,
        without_bos=without_bos,
    )
    study.keep_original_perplexity()
    # Of absolute paths the names only.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return ScriptOptions(
        study=study,
        facts=tuple(facts),
        left_out=facts.left_out,
        cases=cases,
        out=out,
        collapse=count if args.collapse is None else args.collapse,
        normal=count if args.normal is None else args.normal,
        seed=args.seed,
        command=shlex.join(["python", f"analyses/{Path(sys.argv[0]).name}", *words]),
        args=args,
    )
