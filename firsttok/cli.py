"""The ``firsttok`` command: models, inspect, tokens, edit, scan, screen, sweep and more."""

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from firsttok.config import configured
from firsttok.console import exit_on_error, note, show
from firsttok.escapes import printable
from firsttok.options import (
    DEFAULT_MODEL,
    PASSED_ON,
    add_config_option,
    add_edit_options,
    add_facts_options,
    add_method_options,
    add_model_options,
    add_prompt_options,
    add_shared,
)
from firsttok.sweep.query import SECONDS

__all__ = ["main"]

_METRICS = ("perplexity", "accuracy", "scores", "generated", "entropy", "tasks")
_SILENT = ("models", "data", "results", "report")
"""Commands that open no model, or say themselves what they fetch."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for bad input)."""

    def run() -> None:
        parser = _parser()
        args = configured(parser.parse_args(argv), parser, argv)
        _announce(args)
        # What a command needs takes seconds to import; --help and a mistyped option need not wait.
        module = args.command.replace("-", "_")
        import_module(f"firsttok.commands.{module}").run(args)

    return exit_on_error(run)


def _announce(args: argparse.Namespace) -> None:
    """Say what is begun, before the seconds in which torch is imported."""
    if args.command in _SILENT or getattr(args, "json", False) or "torch" in sys.modules:
        return
    if args.command == "sweep" and args.run[0] == "status":
        return
    names = ("edit",) if args.command in ("show", "export") else ("what", "before", "name", "model")
    given = (getattr(args, name, None) for name in names)
    named = next(value for value in given if value)
    opened = named if isinstance(named, str) else ", ".join(named)
    note(f"{args.command}: opening {opened}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong without what a terminal would obey, and without endless digits."""

    def error(self, message: str) -> NoReturn:
        shown = printable(message, lines=False)
        super().error(shown if len(shown) <= 300 else f"{shown[:200]} ... {shown[-60:]}")


class _ShowVersion(argparse.Action):
    """Look the version up when it is asked for: every other start need not wait for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from firsttok import __version__

        show(f"firsttok {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="firsttok",
        description="Find out why a single rank-one edit can destroy a language model.",
    )
    parser.add_argument(
        "--version",
        action=_ShowVersion,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show the version, and nothing else",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, summary) in _COMMANDS.items():
        add_options(commands.add_parser(name, help=summary))
    return parser


def _models(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the catalog")
    pulling = actions.add_parser("pull", help="fetch a model into the cache")
    pulling.add_argument("name")
    pulling.add_argument(
        "--accept-terms",
        action="store_true",
        help="you have read and accept the model's terms (gemma3-270m)",
    )


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the model, as --model")
    _add_study_options(parser)
    parser.set_defaults(text_bos=None)
    parser.add_argument("--edit", action="store_true", help="edit the facts, not predict alone")
    parser.add_argument("--out", metavar="DIR", help="folder for <model>.json, .toml and a figure")
    add_shared(parser, "--json")


def _circuit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=DEFAULT_MODEL, help="name, hub id or folder"
    )
    add_shared(parser, "--bos", "--dtype", "--device", "--texts", "--json")
    parser.add_argument("--seed", type=int, default=0, help="of contexts and random neurons")
    parser.add_argument("--out", metavar="DIR", help="folder for JSON, a page and a figure")


def _tokens(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_prompt_options(parser)
    _add_fact_options(parser)
    parser.add_argument(
        "--target", help="an answer, to see how it is joined (default: one in the prompt's script)"
    )


def _edit(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_edit_options(parser)
    _add_fact_options(parser)
    parser.add_argument("--target", required=True, help="the new answer")
    parser.add_argument("--true", default="", help="the old answer, to be shown beside it")
    add_method_options(parser, "rome")
    parser.add_argument("--save", metavar="FILE", help="write the edit as safetensors (one method)")
    parser.add_argument(
        "--after",
        nargs="+",
        metavar="EDIT",
        help="saved edits to compute it on, put into the model in this order",
    )
    add_shared(parser, "--json")


def _show(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "edit", "--device", "--texts", "--text-bos", "--json")
    parser.add_argument(
        "--run", action="store_true", help="put the edits into the model, in this order"
    )
    parser.add_argument("--model", help="the model (default: the one the first edit names)")


def _tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="MODEL|EDIT",
        default=[DEFAULT_MODEL],
        help="a model, and files of edits, each alone",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="shipped sets, or tasks of lm-eval: NAME with --task-data, or NAME@COMMIT of the "
        "published data (default: the shipped sets)",
    )
    parser.add_argument(
        "--task-data", metavar="DIR", help="folder with the tasks' data in TASK/SPLIT.jsonl"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first items of each task")
    add_shared(parser, "--bos", "--dtype", "--device", "--json")


def _export(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, "edit")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--model", help="the model (default: the one the first edit names)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights that are written (default: that of the edits)",
    )


def _audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="BEFORE", help="a model: name, hub id or folder")
    parser.add_argument("second", metavar="AFTER", help="another state of it, or a file of an edit")
    add_shared(parser, "--dtype", "--device", "--texts", "--text-bos", "--json")


def _scan(parser: argparse.ArgumentParser) -> None:
    _add_study_options(parser)
    add_shared(parser, "--out")


def _screen(parser: argparse.ArgumentParser) -> None:
    _add_study_options(parser)
    add_shared(parser, "--out")
    parser.add_argument(
        "--scan", metavar="FILE", help="edited cases to calibrate on (default: those of the model)"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="edit and evaluate every fact, too, and time both ways",
    )
    add_method_options(parser, "rome")
    parser.add_argument(
        "--threshold",
        type=float,
        help="|denominator| below which a fact is taken for a case (default: from edited cases; "
        "without any, a twentieth of C-ROME's)",
    )
    parser.add_argument(
        "--build-hard",
        metavar="FILE",
        help="write those facts as a list in COUNTERFACT's schema (.json, .jsonl or .gz)",
    )


def _hard(parser: argparse.ArgumentParser) -> None:
    _add_study_options(parser)
    group = parser.add_argument_group("list")
    group.add_argument(
        "--generate",
        action="store_true",
        help="make the facts, in place of --facts: known ones with a false answer, whose subject "
        "is one word in the first place, as in HardEdit (--seed draws them)",
    )
    group.add_argument(
        "--count", type=int, help="how many facts to find (default: all that collapse the model)"
    )
    group.add_argument(
        "--normal",
        action="store_true",
        dest="with_normal",
        help="find as many facts that do not collapse it, too, for NAME.normal.json",
    )
    group.add_argument(
        "--threshold",
        type=float,
        help="|denominator| below which a fact is edited to see (default: a twentieth of C-ROME's)",
    )
    _add_exclude(group)
    group.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="the list in COUNTERFACT's schema (.json, .jsonl or .gz); NAME.provenance.json is "
        "written beside it",
    )
    group.add_argument(
        "--work",
        metavar="DIR",
        default="figures",
        help="where finished parts are kept, as by firsttok scan --out (default: %(default)s)",
    )


def _add_exclude(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--exclude", metavar="FILE", help="no fact about a subject of these facts (as --facts)"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder of one model (default: all that have results)")
    add_shared(parser, "--out")


def _add_study_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    add_model_options(parser, several=several)
    add_edit_options(parser)
    add_facts_options(parser)


def _add_fact_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subject", required=True, help="what the fact is about")
    parser.add_argument("--template", required=True, help="the prompt, '{}' for its subject")


def _data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the published data sets")
    pulling = actions.add_parser("pull", help="fetch a data set, or continue a broken download")
    pulling.add_argument("name", help="see: firsttok data list")
    pulling.add_argument("--url", help="another address of it")
    pulling.add_argument("--sha256", metavar="HEX", help="what its bytes must be")
    pulling.add_argument("--out", metavar="DIR", help="folder for it (default: the cache)")
    making = actions.add_parser("synthesize", help="put together facts from real words")
    making.add_argument("--count", type=int, required=True, help="how many")
    making.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    making.add_argument(
        "--kind",
        choices=["mixed", "hard", "normal"],
        default="mixed",
        help="mixed: answers are drawn, for load tests; hard: what is known of a subject that is "
        "one token in the first place, with a false answer; normal: the same of other subjects "
        "(default: mixed)",
    )
    _add_exclude(making)
    making.add_argument(
        "--model", default=DEFAULT_MODEL, help="whose tokenizer takes them (default: %(default)s)"
    )
    making.add_argument("--out", metavar="FILE", required=True, help=".json, .jsonl or .gz")
    writing = actions.add_parser("sample", help="let a model write a corpus, as --corpus takes it")
    writing.add_argument("--model", default=DEFAULT_MODEL, help="who writes (default: %(default)s)")
    add_shared(writing, "--device")
    writing.add_argument("--tokens", type=int, required=True, help="at least so many")
    writing.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    writing.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="what logits are divided by (default: %(default)g, the model's own entropy)",
    )
    writing.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        help="share of the probability that is drawn from (default: %(default)g)",
    )
    writing.add_argument("--out", metavar="FILE", required=True, help="a text file")


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="+",
        metavar="[status] RUN",
        help="folder of the run, to begin or to continue; after 'status', only looked at",
    )
    _add_study_options(parser, several=True)
    group = parser.add_argument_group("sweep")
    add_method_options(group, "rome", "c-rome")
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=_METRICS,
        default=["perplexity", "accuracy", "scores"],
        help="default: the first three; the others are slow, and tasks needs lm-eval",
    )
    group.add_argument("--chunk", type=int, default=24, help="facts edited together (default: 24)")
    group.add_argument("--shard", metavar="I/N", help="only every N-th chunk, for job arrays")
    group.add_argument("--retry-failed", action="store_true", help="do the cases again that failed")
    _add_engine(group)


def _add_engine(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--engine", choices=["local", "ray"], default="local", help="who edits")
    group.add_argument("--address", help="Ray cluster: auto or HOST:PORT (default: a local one)")
    group.add_argument("--actors", type=int, help="Ray workers (default: one per GPU or CPU share)")
    group.add_argument("--cpus-per-actor", type=int, default=1, help="of a Ray worker (default: 1)")


def _sequence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of the run, to begin or to continue")
    _add_study_options(parser)
    group = parser.add_argument_group("sequence")
    add_method_options(group, "rome", "c-rome")
    group.add_argument(
        "--order",
        nargs="+",
        default=["given"],
        help="given, seed:N or hard-first; each is a sequence of each method (default: given)",
    )
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=_METRICS,
        default=["perplexity", "scores"],
        help="of each fact right after its edit (default: perplexity scores)",
    )
    group.add_argument(
        "--retained",
        nargs="+",
        choices=_METRICS,
        default=["scores"],
        help="of all earlier facts at a checkpoint (default: scores)",
    )
    group.add_argument(
        "--checkpoint",
        nargs="+",
        choices=_METRICS,
        default=[],
        help="of the model at a checkpoint, such as tasks (default: none)",
    )
    group.add_argument(
        "--every", type=int, default=10, help="steps between checkpoints (default: 10)"
    )
    group.add_argument(
        "--guard",
        choices=["none", "screen", "rollback"],
        default="none",
        help="leave out facts whose denominator predicts a collapse, or take edits back that cause "
        "one (default: none)",
    )
    group.add_argument(
        "--jump",
        type=float,
        default=10.0,
        help="an edit disables a model that multiplies the perplexity by so much (default: 10)",
    )
    group.add_argument(
        "--retry-failed",
        action="store_true",
        help="do the steps again that failed, and what was written on their models",
    )
    group.add_argument("--shard", metavar="I/N", help="only every N-th sequence, for job arrays")
    _add_engine(group)


def _train_mend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=DEFAULT_MODEL, help="name, hub id or folder"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="safetensors file for the network; its curves and the state of the training are "
        "kept beside it, and the same command resumes it",
    )
    parser.add_argument(
        "--target",
        choices=["rephrase", "same"],
        default="rephrase",
        help="where the target is to be likely: after a rephrase of the prompt, as in the paper, "
        "or after the very prompt (default: %(default)s)",
    )
    parser.add_argument("--layers", nargs="+", type=int, help="layers to change (default: last 3)")
    parser.add_argument("--seed", type=int, default=0, help="of network, edits and text")
    for name, kind, default, what in (
        ("steps", int, 300, "most steps of Adam"),
        ("batch", int, 4, "edits of a step"),
        ("edits", int, 1000, "edits to train on"),
        ("windows", int, 500, "windows of text that is to stay as it was"),
        ("validation", int, 40, "edits to stop by"),
        ("rank", int, 64, "rank of the network's blocks"),
        ("lr", float, 1e-4, "learning rate of the networks"),
        ("rate", float, -1e-3, "what each matrix's learned rate begins with, as --rate=VALUE"),
        ("rate-lr", float, 1e-5, "learning rate of those"),
        ("edit-weight", float, 0.1, "weight of the edit in the loss"),
        ("locality-weight", float, 1.0, "weight of the divergence at other text"),
        ("every", int, 50, "steps between two looks at the validation edits"),
        ("patience", int, 10, "looks without a better one that end the training"),
    ):
        text = f"{what} (default: {default:g})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    add_shared(parser, "--bos", "--device", "--json")


def _results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of the run, ended or not")
    parser.add_argument("--model", metavar="LABEL", help="only this model")
    parser.add_argument(
        "--sql", metavar="QUERY", help="answer a SELECT over the view rows, and nothing else"
    )
    limit = "seconds a query may take (default: %(default)g)"
    parser.add_argument("--sql-seconds", type=float, default=SECONDS, metavar="N", help=limit)
    add_shared(parser, "--json")
    parser.add_argument("--csv", metavar="FILE", help="write all rows (with --sql: the answer)")
    parser.add_argument("--figures", metavar="DIR", help="draw |Delta| against entropy, per model")


def _reproduce(parser: argparse.ArgumentParser) -> None:
    add_config_option(parser)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--paper",
        choices=["fall", "rebuilding", "butterfly"],
        default="fall",
        help="The Fall of ROME, with what goes beyond it, Rebuilding ROME, or The Butterfly Effect "
        "(default: fall)",
    )
    parser.add_argument("--profile", choices=["quick", "full"], default="quick")
    parser.add_argument("--analyses", metavar="DIR", default="analyses", help="the scripts")
    parser.add_argument("--out", metavar="DIR", help="folder for results")
    parser.add_argument(
        "--jobs", type=int, help="scripts at a time (default: 2 on a CPU of several cores, else 1)"
    )
    for name in PASSED_ON:
        parser.add_argument(f"--{name}", help="passed on to every script; see its --help")
    parser.add_argument("--skip-bad", action="store_true", help="passed on, too")


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "models": (_models, "list the known models, or pull one"),
    "data": (_data, "list the published data sets, pull one, make facts or text"),
    "inspect": (_inspect, "look at a model, and propose how to edit it"),
    "circuit": (_circuit, "who makes the first token special, and who reads it"),
    "tokens": (_tokens, "show a prompt's tokens, the looked-up one marked"),
    "edit": (_edit, "edit one fact and show before and after"),
    "show": (_show, "show saved edits, and what they do to the model"),
    "tasks": (_tasks, "downstream tasks of a model, and of edits in it"),
    "export": (_export, "write a model with saved edits in it for transformers"),
    "audit": (_audit, "where two states of a model differ, and what it cost"),
    "scan": (_scan, "edit every fact with ROME and list the collapse cases"),
    "screen": (_screen, "tell collapse cases from their keys, unedited"),
    "hard": (_hard, "list facts that each collapse the model, confirmed by an edit"),
    "sweep": (_sweep, "facts x methods x models into a run folder"),
    "sequence": (_sequence, "edit after edit on the weights as they have become"),
    "train-mend": (_train_mend, "train the network of MEND on a model"),
    "results": (_results, "the papers' tables from a sweep's run, or SQL"),
    "reproduce": (_reproduce, "run every analysis script"),
    "report": (_report, "write the report on what the scripts found"),
}

if __name__ == "__main__":
    raise SystemExit(main())
