"""The ``firsttok`` command: models, tokens, edit, scan, screen, reproduce, report."""

import argparse
from importlib import import_module

from firsttok.options import PASSED_ON, add_edit_options, add_model_options

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for bad input)."""
    args = _parser().parse_args(argv)
    from firsttok.console import exit_on_error

    # What a command needs takes seconds to import; --help and a mistyped option need not wait.
    return exit_on_error(lambda: import_module(f"firsttok.commands.{args.command}").run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="firsttok",
        description="Find out why a single rank-one edit can destroy a language model.",
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

    tokens = commands.add_parser("tokens", help="show a prompt's tokens, the looked-up one marked")
    add_model_options(tokens)
    _add_fact_options(tokens, target=False)

    edit = commands.add_parser("edit", help="edit one fact and show before and after")
    add_model_options(edit)
    add_edit_options(edit)
    _add_fact_options(edit, target=True)
    edit.add_argument(
        "--method", nargs="+", default=["rome"], help="rome, c-rome (= r-rome), p-rome, fc-rome"
    )
    edit.add_argument("--save", metavar="FILE", help="write the edit as safetensors (one method)")
    edit.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    scan = commands.add_parser("scan", help="edit every fact with ROME and list the collapse cases")
    add_model_options(scan)
    add_edit_options(scan)
    scan.add_argument("--facts", metavar="FILE", help="facts in COUNTERFACT's schema")
    scan.add_argument("--limit", type=int, help="only the first so many facts")
    scan.add_argument("--out", metavar="DIR", default="figures", help="folder for the list")

    screen = commands.add_parser("screen", help="tell collapse cases from their keys, unedited")
    add_model_options(screen)
    add_edit_options(screen)
    screen.add_argument("--facts", metavar="FILE", help="facts in COUNTERFACT's schema")
    screen.add_argument("--limit", type=int, help="only the first so many facts")
    screen.add_argument("--out", metavar="DIR", default="figures", help="folder for the ranking")
    screen.add_argument(
        "--scan", metavar="FILE", help="edited cases to calibrate on (default: those of the model)"
    )
    screen.add_argument(
        "--measure", action="store_true", help="edit and evaluate every fact, too, and time both"
    )
    screen.add_argument(
        "--threshold", type=float, help="|denominator| below which a fact is taken for a case"
    )
    screen.add_argument(
        "--build-hard", metavar="FILE", help="write those facts as a list in COUNTERFACT's schema"
    )

    reproduce = commands.add_parser("reproduce", help="run every analysis script")
    reproduce.add_argument("--model", default="smollm2-135m")
    reproduce.add_argument("--profile", choices=["quick", "full"], default="quick")
    reproduce.add_argument("--analyses", metavar="DIR", default="analyses", help="the scripts")
    reproduce.add_argument("--out", metavar="DIR", help="folder for results")
    for name in PASSED_ON:
        reproduce.add_argument(f"--{name}", help="passed on to every script; see its --help")

    report = commands.add_parser("report", help="write the report on what the scripts found")
    report.add_argument("--model", help="folder of one model (default: all that have results)")
    report.add_argument("--out", metavar="DIR", default="figures", help="folder of results")
    return parser


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
