"""``firsttok edit``: edit one fact, and show the model before and after."""

import argparse
from typing import Any

from firsttok.console import progress_bar, show, show_json
from firsttok.data import Fact
from firsttok.editing import compute_edits, find_methods
from firsttok.errors import BadInputError
from firsttok.exploration import Observation, observe
from firsttok.inputs import open_study
from firsttok.output import print_table
from firsttok.prompts import fact_prompt, with_target
from firsttok.storage import cache_folder
from firsttok.token_strips import tokens

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Edit the fact by each method, and print what the model says then.

    Raises:
        FirsttokError: If an input is unusable.
    """
    methods = find_methods(args.method)
    if args.save and len(methods) != 1:
        raise BadInputError(f"--save takes one method, not {len(methods)}; run it for each")
    fact = Fact(
        subject=args.subject,
        template=args.template,
        target_new=args.target,
        target_true=args.true,
        source="command line",
        join=args.join or "auto",
        straddle=args.straddle or "refuse",
    )
    with progress_bar() as progress:
        study = open_study(args, cache_folder("explorations"), progress)
        prompt = fact_prompt(study.model, fact)
        prompt = with_target(study.model, prompt, fact.target_new, join=fact.join)
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
        states = {"before": _record(observe(study, fact, study.original_perplexity))}
        chosen = [edits[method.name] for method in methods]
        measured = study.prepared_texts.measure_edits(study.model, chosen)
        for method, edit, found in zip(methods, chosen, measured, strict=True):
            with edit.applied(study.model):
                states[method.name] = _record(observe(study, fact, found)) | edit.report.as_dict()
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
        show_json(record)
        return
    strip = tokens(study.model, fact)
    show(f"{strip.lines}\nThe target is joined by {strip.joint}.\n")
    _print_states(states, fact)


def _record(seen: Observation) -> dict[str, Any]:
    """An observation as JSON has it."""
    return {
        "perplexity": seen.perplexity.mean,
        "corpus_perplexity": seen.perplexity.corpus,
        "target_probability": seen.target_probability,
        "target_probability_prefixed": seen.target_probability_prefixed,
        "top_predictions": list(seen.top_predictions),
        "continuation": seen.continuation,
    }


def _print_states(states: dict[str, dict[str, Any]], fact: Fact) -> None:
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
        show(f"\n{name}\n  next: {best}")
        show(f"  {fact.prompt}{states[name]['continuation']!r}")
