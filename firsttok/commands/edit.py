"""``firsttok edit``: edit one fact, and show the model before and after."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from firsttok.console import print_table, progress_bar, show, show_json
from firsttok.data import Fact
from firsttok.editing import load_edit, shown_components
from firsttok.errors import BadInputError
from firsttok.escapes import finite
from firsttok.exploration import Comparison, Observation, WhatIf, compare_methods, state_lines
from firsttok.inputs import fact_from, methods_from, open_study
from firsttok.prompts import fact_prompt, with_target
from firsttok.storage import cache_folder
from firsttok.study import Study

__all__ = ["observation_record", "print_observations", "run"]


def run(args: argparse.Namespace) -> None:
    """Edit the fact by each method, and print what the model says then."""
    methods = methods_from(args)
    if args.save and len(methods) != 1:
        raise BadInputError(f"--save takes one method, not {len(methods)}; run it for each")
    fact = fact_from(args, target=args.target, true=args.true)
    earlier = [load_edit(path) for path in args.after or ()]
    with progress_bar() as progress:
        study = open_study(args, cache_folder("explorations"), progress, methods=methods)
        # C and contexts are those of the model as loaded, as in released sequences of edits.
        study = study.varied(model=study.model.edited(*earlier))
        found = compare_methods(study, fact, methods=methods, progress=progress)
    if args.save:
        found.results[0].edit.save(args.save)
    if args.json:
        show_json(finite(_record(study, found)))
        return
    strip = found.results[0].tokens
    show(f"{strip.lines}\nThe target is joined by {strip.joint}.\n")
    for number, edit in enumerate(earlier, 1):
        show(f"in the model already: edit {number}, {edit.title}")
    before = found.results[0].before
    states = {"before": before} | {each.method.name: each.after for each in found.results}
    print_observations(fact.prompt, states, _components(fact, before, found.results))
    show()
    for each in found.results:
        show(each.verdict)


def observation_record(seen: Observation) -> dict[str, Any]:
    """An observation as JSON has it."""
    return {
        "perplexity": seen.perplexity.mean,
        "corpus_perplexity": seen.perplexity.corpus,
        "target_probability": seen.target_probability,
        "target_probability_prefixed": seen.target_probability_prefixed,
        "top_predictions": list(seen.top_predictions),
        "continuation": seen.continuation,
    }


def print_observations(
    prompt: str, states: Mapping[str, Observation], lines: Sequence[Sequence[Any]]
) -> None:
    """Print what a model says to a prompt in several states; a line has a value for each."""
    print_table(prompt, ["", *states], [list(line) for line in lines])
    for name, seen in states.items():
        best = ", ".join(f"{token!r} {p:.2f}" for token, p in seen.top_predictions)
        show(f"\n{name}\n  next:   {best}\n  writes: {seen.continuation!r}")


def _record(study: Study, found: Comparison) -> dict[str, Any]:
    first = found.results[0]
    fact = first.fact
    prompt = fact_prompt(study.model, fact)
    prompt = with_target(study.model, prompt, fact.target_new, join=fact.join)
    states = {"before": observation_record(first.before)}
    for each in found.results:
        states[each.method.name] = {
            **observation_record(each.after),
            **each.report,
            "losses": list(each.edit.losses),
            "damage": None if each.damage is None else each.damage.value,
            "verdict": each.verdict,
        }
    return {
        "fact": fact.as_record(),
        "subject_position": prompt.subject_position,
        "token_ids": list(prompt.token_ids),
        "states": states,
        "provenance": study.provenance() | {"contexts": list(study.contexts.templates)},
    }


def _components(fact: Fact, before: Observation, results: Sequence[WhatIf]) -> list[list[Any]]:
    shown = [dict(shown_components(each.edit)) for each in results]
    labels = dict.fromkeys(label for each in shown for label in list(each)[:3])
    seen = [before, *(each.after for each in results)]
    return [
        *([label, None, *(each.get(label) for each in shown)] for label in labels),
        *state_lines(fact, seen),
        ["steps of the optimisation", None, *(len(each.edit.losses) for each in results)],
    ]
