"""The ``firsttok`` command: models, inspect, tokens, edit, scan, screen, sweep and more."""

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from firsttok.config import configured
from firsttok.console import exit_on_error, note, show
from firsttok.escapes import printable
from firsttok.options import (
    PASSED_ON,
    add_config_option,
    add_edit_options,
    add_facts_options,
    add_model_options,
    add_prompt_options,
)
from firsttok.sweep.query import SECONDS

__all__ = ["main"]

_SILENT = ("models", "data", "results", "report")
"""Commands that open no model, or say themselves what they fetch."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for bad input)."""

    def run() -> None:
        parser = _parser()
        args = configured(parser.parse_args(argv), parser, argv)
        _announce(args)
        # What a command needs takes seconds to import; --help and a mistyped option need not wait.
        import_module(f"firsttok.commands.{args.command}").run(args)

    return exit_on_error(run)


def _announce(args: argparse.Namespace) -> None:
    """Say what is begun, before the seconds in which torch is imported."""
    if args.command in _SILENT or getattr(args, "json", False) or "torch" in sys.modules:
        return
    if args.command == "sweep" and args.run[0] == "status":
        return
    names = ("edit",) if args.command in ("show", "export") else ("before", "name", "model")
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

    models = commands.add_parser("models", help="list the known models, or pull one")
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the catalog")
    pulling = actions.add_parser("pull", help="fetch a model into the cache")
    pulling.add_argument("name")
    pulling.add_argument(
        "--accept-terms",
        action="store_true",
        help="you have read and accept the model's terms, where it has some (gemma3-270m)",
    )

    data = commands.add_parser("data", help="list the published data sets, pull one, or make facts")
    _add_data_actions(data)

    inspect = commands.add_parser("inspect", help="look at a model, and propose how to edit it")
    _add_inspect_options(inspect)

    tokens = commands.add_parser("tokens", help="show a prompt's tokens, the looked-up one marked")
    add_model_options(tokens)
    add_prompt_options(tokens)
    _add_fact_options(tokens, target=False)
    tokens.add_argument(
        "--target", help="an answer, to see how it is joined (default: one in the prompt's script)"
    )

    _add_edit_command(commands.add_parser("edit", help="edit one fact and show before and after"))
    _add_show_options(
        commands.add_parser("show", help="show saved edits, and what they do to the model")
    )

    _add_export_options(
        commands.add_parser("export", help="write a model with saved edits in it for transformers")
    )
    _add_audit_options(
        commands.add_parser("audit", help="where two states of a model differ, and what it cost")
    )

    scan = commands.add_parser("scan", help="edit every fact with ROME and list the collapse cases")
    add_model_options(scan)
    add_edit_options(scan)
    add_facts_options(scan, limit="only the first so many facts")
    scan.add_argument("--out", metavar="DIR", default="figures", help="folder for the list")

    screen = commands.add_parser("screen", help="tell collapse cases from their keys, unedited")
    add_model_options(screen)
    add_edit_options(screen)
    add_facts_options(screen, limit="only the first so many facts")
    screen.add_argument("--out", metavar="DIR", default="figures", help="folder for the ranking")
    screen.add_argument(
        "--scan", metavar="FILE", help="edited cases to calibrate on (default: those of the model)"
    )
    screen.add_argument(
        "--measure", action="store_true", help="edit and evaluate every fact, too, and time both"
    )
    screen.add_argument(
        "--threshold",
        type=float,
        help="|denominator| below which a fact is taken for a case (default: from edited cases; "
        "without any, a twentieth of C-ROME's)",
    )
    screen.add_argument(
        "--build-hard",
        metavar="FILE",
        help="write those facts as a list in COUNTERFACT's schema (.json, .jsonl or .gz)",
    )

    sweep = commands.add_parser("sweep", help="facts x methods x models into a run folder")
    _add_sweep_options(sweep)

    results = commands.add_parser("results", help="the papers' tables from a sweep's run, or SQL")
    _add_results_options(results)

    reproduce = commands.add_parser("reproduce", help="run every analysis script")
    _add_reproduce_options(reproduce)

    report = commands.add_parser("report", help="write the report on what the scripts found")
    report.add_argument("--model", help="folder of one model (default: all that have results)")
    report.add_argument("--out", metavar="DIR", default="figures", help="folder of results")
    return parser


def _add_edit_command(edit: argparse.ArgumentParser) -> None:
    add_model_options(edit)
    add_edit_options(edit)
    _add_fact_options(edit, target=True)
    edit.add_argument(
        "--method",
        nargs="+",
        default=["rome"],
        help="rome, c-rome (= r-rome), p-rome, fc-rome; one of your own as "
        "NAME=direction:KEY,residual:KEY,denominator:KEY,anchor:KEY with KEY prefixed or bare; or "
        "a TOML file of them",
    )
    edit.add_argument("--save", metavar="FILE", help="write the edit as safetensors (one method)")
    edit.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    edit.add_argument(
        "--after",
        nargs="+",
        metavar="EDIT",
        help="saved edits to compute it on, put into the model in this order",
    )


def _add_show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("edit", nargs="+", metavar="EDIT", help="a file of firsttok edit --save")
    parser.add_argument(
        "--run",
        action="store_true",
        help="load the model and put the edits into it, in this order",
    )
    parser.add_argument("--model", help="the model (default: the one the first edit names)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--texts", metavar="FILE", help="sentences for perplexity, as for firsttok edit"
    )
    parser.add_argument(
        "--text-bos",
        choices=["as_tokenizer", "with", "without"],
        default="without",
        help="BOS of those sentences (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("edit", nargs="+", metavar="EDIT", help="a file of firsttok edit --save")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--model", help="the model (default: the one the first edit names)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights that are written (default: that of the edits)",
    )


def _add_audit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="BEFORE", help="a model: name, hub id or folder")
    parser.add_argument(
        "second", metavar="AFTER", help="another state of it: the same, or a file of an edit"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16", "float16"],
        default="float32",
        help="type that both are opened in (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--texts", metavar="FILE", help="sentences for keys and perplexity, as for firsttok edit"
    )
    parser.add_argument(
        "--text-bos",
        choices=["as_tokenizer", "with", "without"],
        default="without",
        help="BOS of those sentences (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def _add_inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="MODEL", help="the model, in place of the option --model"
    )
    add_model_options(parser)
    add_edit_options(parser, text_bos=None)
    group = parser.add_argument_group("inspection")
    add_facts_options(
        parser, limit="only the first so many facts", default=" (default: a dozen built-in ones)"
    )
    group.add_argument(
        "--edit", action="store_true", help="edit those facts, where else collapse is predicted"
    )
    group.add_argument(
        "--out", metavar="DIR", help="folder for <model>.json, .toml and a figure (default: none)"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="+",
        metavar="[status] RUN",
        help="folder of the run, to begin or to continue; after 'status', only looked at",
    )
    add_model_options(parser, several=True)
    add_edit_options(parser)
    group = parser.add_argument_group("sweep")
    add_facts_options(parser, limit="only the first so many facts")
    group.add_argument(
        "--method",
        nargs="+",
        default=["rome", "c-rome"],
        help="as for firsttok edit (default: rome c-rome)",
    )
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=["perplexity", "accuracy", "scores", "generated", "entropy"],
        default=["perplexity", "accuracy", "scores"],
        help="default: all but generated and entropy, which generate text",
    )
    group.add_argument(
        "--chunk", type=int, default=24, help="facts that are edited together (default: 24)"
    )
    group.add_argument("--shard", metavar="I/N", help="only every N-th chunk, for job arrays")
    group.add_argument("--retry-failed", action="store_true", help="do the cases again that failed")
    group.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="who does the chunks"
    )
    group.add_argument("--address", help="Ray cluster: auto or HOST:PORT (default: a local one)")
    group.add_argument("--actors", type=int, help="Ray workers (default: one per GPU or CPU share)")
    group.add_argument(
        "--cpus-per-actor", type=int, default=1, help="CPUs of a Ray worker (default: 1)"
    )


def _add_results_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of the run, ended or not")
    parser.add_argument("--model", metavar="LABEL", help="only this model")
    parser.add_argument(
        "--sql", metavar="QUERY", help="answer a SELECT over the view rows, and nothing else"
    )
    parser.add_argument(
        "--sql-seconds",
        type=float,
        default=SECONDS,
        metavar="N",
        help="seconds a query may take (default: %(default)g)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.add_argument("--csv", metavar="FILE", help="write all rows (with --sql: the answer)")
    parser.add_argument(
        "--figures", metavar="DIR", help="draw |Delta| against entropy, a figure per model"
    )


def _add_reproduce_options(parser: argparse.ArgumentParser) -> None:
    add_config_option(parser)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--profile", choices=["quick", "full"], default="quick")
    parser.add_argument("--analyses", metavar="DIR", default="analyses", help="the scripts")
    parser.add_argument("--out", metavar="DIR", help="folder for results")
    parser.add_argument(
        "--jobs", type=int, help="scripts at a time (default: 2 on a CPU of several cores, else 1)"
    )
    for name in PASSED_ON:
        parser.add_argument(f"--{name}", help="passed on to every script; see its --help")
    parser.add_argument("--skip-bad", action="store_true", help="passed on, too")


def _add_data_actions(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the published data sets")
    pulling = actions.add_parser(
        "pull", help="fetch a data set into the cache, or continue a broken download"
    )
    pulling.add_argument("name", help="see: firsttok data list")
    pulling.add_argument("--url", help="another address of it")
    pulling.add_argument("--sha256", metavar="HEX", help="what its bytes must be")
    pulling.add_argument("--out", metavar="DIR", help="folder for it (default: the cache)")
    making = actions.add_parser(
        "synthesize", help="write facts of any number, put together from real words"
    )
    making.add_argument("--count", type=int, required=True, help="how many")
    making.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    making.add_argument(
        "--model", default="smollm2-135m", help="whose tokenizer takes them (default: %(default)s)"
    )
    making.add_argument(
        "--out", metavar="FILE", required=True, help="the list: .json, .jsonl or .gz"
    )


def _add_fact_options(parser: argparse.ArgumentParser, *, target: bool) -> None:
    parser.add_argument("--subject", required=True, help="what the fact is about")
    parser.add_argument(
        "--template", required=True, help="the prompt, with '{}' where the subject goes"
    )
    if target:
        parser.add_argument("--target", required=True, help="the new answer")
        parser.add_argument("--true", default="", help="the old answer, to be shown beside it")


if __name__ == "__main__":
    raise SystemExit(main())
