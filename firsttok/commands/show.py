"""``firsttok show``: what saved edits are, and what they do to the model they were made for."""

import argparse
from itertools import accumulate
from typing import Any

from firsttok.commands.edit import observation_record, print_observations
from firsttok.console import progress_bar, show, show_json
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.display import Note, Panel, Table
from firsttok.editing import Edit, load_edit
from firsttok.errors import BadInputError
from firsttok.escapes import finite
from firsttok.evaluation import Perplexity, perplexity
from firsttok.exploration import Observation, observe, state_lines, verdict
from firsttok.inputs import texts_from
from firsttok.models import BosPolicy, Model, load

__all__ = ["open_model_of", "run"]


def run(args: argparse.Namespace) -> None:
    """Print each edit's record; with ``--run`` put them into the model, one after another."""
    edits = [load_edit(path) for path in args.edit]
    if not args.run:
        if args.json:
            show_json(finite({"edits": [_as_json(edit) for edit in edits]}))
        else:
            show("\n\n".join(_panel(edit).text for edit in edits))
        return
    facts = [_fact(path, edit) for path, edit in zip(args.edit, edits, strict=True)]
    contexts = [_contexts(path, edit) for path, edit in zip(args.edit, edits, strict=True)]
    texts = texts_from(args)
    model = open_model_of(edits[0], args.edit[0], name=args.model, device=args.device)
    views = list(accumulate(edits, lambda view, edit: view.edited(edit), initial=model))
    names = ["before", "with edit 1", *(f"with edits 1 to {n}" for n in range(2, len(views)))]
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(views) + 2 * len(edits))
        measured: list[Perplexity] = []
        for view in views:
            measured.append(perplexity(view, texts, bos=BosPolicy(args.text_bos)))
            progress.advance(task)
        seen: list[dict[str, Observation]] = []
        for fact, templates in zip(facts, contexts, strict=True):
            seen.append({})
            for which in (0, -1):
                found = observe(views[which], fact, measured[which], contexts=templates)
                seen[-1][names[which]] = found
                progress.advance(task)
    verdicts = [
        verdict(name.removeprefix("with "), measured[0], found)
        for name, found in zip(names[1:], measured[1:], strict=True)
    ]
    if args.json:
        record = {
            "edits": [_as_json(edit) for edit in edits],
            "perplexity": dict(zip(names, (each.mean for each in measured), strict=True)),
            "verdicts": verdicts,
            "facts": [
                {name: observation_record(each) for name, each in states.items()} for states in seen
            ],
            "model": views[-1].record(),
        }
        show_json(finite(record))
        return
    for number, (edit, fact, states) in enumerate(zip(edits, facts, seen, strict=True), 1):
        show(f"edit {number}: {edit.title}\n")
        print_observations(fact.prompt, states, state_lines(fact, list(states.values())))
        show()
    show("\n".join(verdicts))


def open_model_of(edit: Edit, path: str, *, name: str | None, device: str) -> Model:
    """Open the model that a saved edit names, or another, in its type and under its BOS policy."""
    made = edit.provenance.get("model", {})
    name = name or made.get("name")
    if not name:
        raise BadInputError(f"{path} does not name its model; give --model")
    return load(
        name,
        bos=made.get("bos", BosPolicy.AS_TOKENIZER),
        dtype=made.get("dtype", "float32"),
        device=device,
    )


def _fact(path: str, edit: Edit) -> Fact:
    try:
        facts = edit.facts
    except BadInputError as error:
        raise BadInputError(f"{path} does not say which fact it writes ({error})") from None
    if not facts:
        raise BadInputError(f"{path} does not say which fact it writes; compute the edit again")
    return facts[0]


def _contexts(path: str, edit: Edit) -> ContextSet:
    templates = edit.provenance.get("contexts", {}).get("templates", ["{}"])
    try:
        return ContextSet(templates=tuple(templates))
    except (BadInputError, TypeError) as error:
        raise BadInputError(f"{path} names no contexts ({error}); compute the edit again") from None


def _as_json(edit: Edit) -> dict[str, Any]:
    return {
        "title": edit.title,
        "layers": list(edit.layers),
        "report": edit.report,
        "losses": list(edit.losses),
        "provenance": edit.provenance,
    }


def _panel(edit: Edit) -> Panel:
    """The edit's own panel, and what it stands on and was computed with."""
    panel = edit.panel()
    below = edit.provenance.get("model", {}).get("edits", [])
    settings = edit.provenance.get("hyperparameters", {})
    lines = [[name.replace("_", " "), value] for name, value in settings.items()]
    notes = [Note(text=f"It was computed after: {each['title']}.") for each in below]
    parts = [*panel.parts, *notes, Table(columns=("setting", "value"), lines=lines)]
    return Panel(title=panel.title, parts=parts, source=panel.source)
