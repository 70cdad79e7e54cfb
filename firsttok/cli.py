"""The ``firsttok`` command: models, tokens, edit, scan, reproduce, report."""

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from firsttok.errors import BadInputError
from firsttok.scripts import SCRIPTS

__all__ = ["main"]

logger = logging.getLogger(__name__)
BAD_INPUT = 2
PASSED_ON = ("bos", "dtype", "device", "facts", "cases", "texts", "text-bos")
"""Options of ``reproduce`` that go to every script."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for bad input)."""
    args = _parser().parse_args(argv)
    from firsttok.options import exit_on_error

    return exit_on_error(lambda: args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="firsttok",
        description="Find out why a single rank-one edit can destroy a language model.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    models = commands.add_parser("models", help="list the known models, or pull one")
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the catalog")
    listing.set_defaults(run=_list_models)
    pulling = actions.add_parser("pull", help="fetch a model into the cache")
    pulling.add_argument("name")
    pulling.add_argument(
        "--accept-terms",
        action="store_true",
        help="you have read and accept the model's terms, where it has some (gemma3-270m)",
    )
    pulling.set_defaults(run=_pull)

    tokens = commands.add_parser("tokens", help="show a prompt's tokens, the looked-up one marked")
    _add_options(tokens, model=True)
    _add_fact_options(tokens, target=False)
    tokens.set_defaults(run=_tokens)

    edit = commands.add_parser("edit", help="edit one fact and show before and after")
    _add_options(edit, model=True, edit=True)
    _add_fact_options(edit, target=True)
    edit.add_argument(
        "--method", nargs="+", default=["rome"], help="rome, c-rome (= r-rome), p-rome, fc-rome"
    )
    edit.add_argument("--save", metavar="FILE", help="write the edit as safetensors (one method)")
    edit.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    edit.set_defaults(run=_edit)

    scan = commands.add_parser("scan", help="edit every fact with ROME and list the collapse cases")
    _add_options(scan, model=True, edit=True)
    scan.add_argument("--facts", metavar="FILE", help="facts in COUNTERFACT's schema")
    scan.add_argument("--limit", type=int, help="only the first so many facts")
    scan.add_argument("--out", metavar="DIR", default="figures", help="folder for the list")
    scan.set_defaults(run=_scan)

    reproduce = commands.add_parser("reproduce", help="run every analysis script")
    reproduce.add_argument("--model", default="smollm2-135m")
    reproduce.add_argument("--profile", choices=["quick", "full"], default="quick")
    reproduce.add_argument("--analyses", metavar="DIR", default="analyses", help="the scripts")
    reproduce.add_argument("--out", metavar="DIR", help="folder for results")
    for name in PASSED_ON:
        reproduce.add_argument(f"--{name}", help="passed on to every script; see its --help")
    reproduce.set_defaults(run=_reproduce)

    report = commands.add_parser("report", help="write the report on what the scripts found")
    report.add_argument("--model", help="folder of one model (default: all that have results)")
    report.add_argument("--out", metavar="DIR", default="figures", help="folder of results")
    report.set_defaults(run=_report)
    return parser


def _add_options(parser: argparse.ArgumentParser, *, model: bool, edit: bool = False) -> None:
    from firsttok.options import add_edit_options, add_model_options

    if model:
        add_model_options(parser)
    if edit:
        add_edit_options(parser)


def _add_fact_options(parser: argparse.ArgumentParser, *, target: bool) -> None:
    parser.add_argument("--subject", required=True, help="what the fact is about")
    parser.add_argument(
        "--template", required=True, help="the prompt, with '{}' where the subject goes"
    )
    if target:
        parser.add_argument("--target", required=True, help="the new answer")
        parser.add_argument("--true", default="", help="the old answer, to be shown beside it")


def _list_models(_args: argparse.Namespace) -> None:
    from firsttok.models import CATALOG
    from firsttok.output import print_table

    rows = [
        [
            spec.name,
            spec.hub_id or "package index",
            spec.layer,
            spec.hyperparameters.steps,
            f"{spec.hyperparameters.weight_decay:g}",
        ]
        for spec in CATALOG
    ]
    print_table("Models", ["name", "from", "layer", "steps", "weight decay"], rows)
    for spec in CATALOG:
        sys.stdout.write(f"{spec.name}: {spec.note}\n")


def _pull(args: argparse.Namespace) -> None:
    from firsttok.models import find_spec, load, pull
    from firsttok.options import stderr

    spec = find_spec(args.name)
    if spec is None:
        raise BadInputError(
            f"no model is called {args.name!r}; see the names with: firsttok models list"
        )
    if spec.hub_id is None:
        folder = pull(spec.name, accept_terms=args.accept_terms)
        stderr.print(f"{spec.name} is in {folder}")
    else:
        model = load(spec.name)
        stderr.print(f"{spec.name} is in the hub's cache ({model.source})")


def _tokens(args: argparse.Namespace) -> None:
    from firsttok.data import Fact
    from firsttok.options import model_from
    from firsttok.prompts import show_tokens

    fact = Fact(subject=args.subject, template=args.template, target_new="new", target_true="true")
    sys.stdout.write(show_tokens(model_from(args), fact) + "\n")


def _edit(args: argparse.Namespace) -> None:
    from firsttok.data import Fact
    from firsttok.editing import compute_edits, find_method
    from firsttok.options import open_study, progress_bar
    from firsttok.prompts import fact_prompt, show_tokens, with_target
    from firsttok.storage import cache_folder

    methods = list(dict.fromkeys(find_method(name) for name in args.method))
    if args.save and len(methods) != 1:
        raise BadInputError(f"--save takes one method, not {len(methods)}; run it for each")
    if args.save and not Path(args.save).resolve().parent.is_dir():
        raise BadInputError(f"the folder of --save {args.save} does not exist; make it first")
    fact = Fact(
        subject=args.subject,
        template=args.template,
        target_new=args.target,
        target_true=args.true or "(not given)",
        source="command line",
    )
    with progress_bar() as progress:
        study = open_study(args, cache_folder("contexts", _safe(args.model)), progress)
        prompt = with_target(study.model, fact_prompt(study.model, fact), fact.target_new)
        slots = len({method.anchor for method in methods})
        task = progress.add_task("editing", total=slots * study.hyperparameters.steps)
        ((_, edits),) = compute_edits(
            study.model,
            [fact],
            methods=methods,
            contexts=study.contexts,
            second_moment=study.second_moment,
            layer=study.layer,
            hyperparameters=study.hyperparameters,
            on_step=lambda count: progress.advance(task, count),
        )
        progress.update(task, completed=slots * study.hyperparameters.steps)
        states: dict[str, dict[str, Any]] = {"before": _observe(study, fact)}
        for method in methods:
            edit = edits[method.name]
            with edit.applied(study.model):
                states[method.name] = _observe(study, fact) | edit.report.as_dict()
            states[method.name]["losses"] = list(edit.losses)
    if args.save:
        edits[methods[0].name].save(args.save)
    if args.json:
        record = {
            "fact": fact.as_record(),
            "subject_position": prompt.subject_position,
            "token_ids": list(prompt.token_ids),
            "states": states,
            "provenance": study.provenance() | {"contexts": list(study.contexts.templates)},
        }
        sys.stdout.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        return
    sys.stdout.write(show_tokens(study.model, fact) + "\n\n")
    _print_states(states, fact)


def _observe(study: Any, fact: Any) -> dict[str, Any]:
    from firsttok.evaluation import continuation, target_probabilities, top_predictions

    contexts = study.contexts
    probabilities = target_probabilities(study.model, fact, contexts)
    bare = [p for p, text in zip(probabilities, contexts.templates, strict=True) if text == "{}"]
    prefixed = [
        p for p, text in zip(probabilities, contexts.templates, strict=True) if text != "{}"
    ]
    measured = study.prepared_texts.measure(study.model)
    return {
        "perplexity": measured.mean,
        "corpus_perplexity": measured.corpus,
        "target_probability": bare[0] if bare else None,
        "target_probability_prefixed": sum(prefixed) / len(prefixed) if prefixed else None,
        "top_predictions": top_predictions(study.model, fact.prompt),
        "continuation": continuation(study.model, fact.prompt),
    }


def _print_states(states: dict[str, dict[str, Any]], fact: Any) -> None:
    from firsttok.output import print_table

    names = list(states)
    lines: list[list[Any]] = [
        [label, *(states[name].get(key) for name in names)]
        for label, key in (
            ("numerator ||v* - W k||", "numerator"),
            ("denominator u . k", "denominator"),
            ("||Delta W||", "delta_norm"),
            ("perplexity", "perplexity"),
            (f"P({fact.target_new})", "target_probability"),
            (f"P({fact.target_new}) behind prefixes", "target_probability_prefixed"),
        )
    ]
    lines.append(["losses", *(len(states[name].get("losses", [])) or None for name in names)])
    print_table(fact.prompt, ["", *names], lines)
    for name in names:
        best = ", ".join(f"{token!r} {p:.2f}" for token, p in states[name]["top_predictions"])
        sys.stdout.write(f"\n{name}\n  next: {best}\n")
        sys.stdout.write(f"  {fact.prompt}{states[name]['continuation']!r}\n")


def _scan(args: argparse.Namespace) -> None:
    from firsttok.cases import save_scan, scan
    from firsttok.data import builtin_facts, load_facts
    from firsttok.evaluation import COLLAPSE_THRESHOLD
    from firsttok.options import model_label, open_study, progress_bar
    from firsttok.output import print_table

    facts = load_facts(args.facts) if args.facts else builtin_facts()
    if args.limit is not None:
        if args.limit < 1:
            raise BadInputError(f"--limit is {args.limit}; give at least 1")
        facts = facts[: args.limit]
    out = Path(args.out) / model_label(args.model)
    with progress_bar() as progress:
        study = open_study(args, out, progress)
        original = study.original_perplexity.mean
        if original > COLLAPSE_THRESHOLD:
            logger.warning(
                "the unedited model has a perplexity of %.0f on these sentences, above %g "
                "itself, so nothing can be said to collapse; try --text-bos with",
                original,
                COLLAPSE_THRESHOLD,
            )
        rows = scan(study, facts, progress=progress)
    path = out / "collapse_cases.json"
    save_scan(path, study, facts, rows)
    groups = {
        "first token, one token": [row for row in rows if row.first_token],
        "not the first token": [row for row in rows if not row.first_token],
    }
    lines = [
        [
            name,
            len(chosen),
            sum(row.collapsed for row in chosen),
            max((row.perplexity for row in chosen), default=None),
            min((abs(row.denominator) for row in chosen), default=None),
            max((abs(row.denominator) for row in chosen), default=None),
        ]
        for name, chosen in groups.items()
    ]
    print_table(
        f"ROME on {len(rows)} facts (original perplexity {study.original_perplexity.mean:.2f})",
        ["subject is", "facts", "collapsed", "max perplexity", "min |denominator|", "max"],
        lines,
    )
    sys.stdout.write(f"{path}\n")


def _reproduce(args: argparse.Namespace) -> None:
    from firsttok.options import model_label
    from firsttok.report import write_reports

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


def _report(args: argparse.Namespace) -> None:
    from firsttok.options import model_label
    from firsttok.report import write_reports

    model = None if args.model is None else model_label(args.model)
    for path in write_reports(Path(args.out), model):
        sys.stdout.write(f"{path}\n")


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name)


if __name__ == "__main__":
    raise SystemExit(main())
