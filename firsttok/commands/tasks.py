"""``firsttok tasks``: downstream tasks of a model, and of saved edits in it."""

import argparse
from pathlib import Path

from firsttok.commands.show import open_model_of
from firsttok.console import print_table, progress_bar, show_json
from firsttok.editing import load_edit
from firsttok.errors import BadInputError
from firsttok.evaluation import OWN_TASKS, check_tasks, score_tasks
from firsttok.models import BosPolicy, load

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Measure the model as it is, and with each edit alone.

    Raises:
        FirsttokError: If an input is unusable.
    """
    tasks = tuple(args.tasks or OWN_TASKS)
    check_tasks(tasks, args.task_data)
    paths = [each for each in args.what if Path(each).is_file()]
    models = [each for each in args.what if each not in paths]
    if len(models) > 1:
        raise BadInputError(f"{models[0]} and {models[1]} are no files of edits; give one model")
    edits = [load_edit(path) for path in paths]
    with progress_bar() as progress:
        if edits:
            name = models[0] if models else None
            model = open_model_of(edits[0], paths[0], name=name, device=args.device)
        else:
            model = load(models[0], bos=BosPolicy(args.bos), dtype=args.dtype, device=args.device)
        found = score_tasks(
            model, edits, tasks, folder=args.task_data, limit=args.limit, progress=progress
        )
    states = ["no edit", *(edit.title for edit in edits)]
    if args.json:
        rows = [
            {
                "edit": None if number == 0 else paths[number - 1],
                "tasks": {
                    name: {"items": each.items, "chance": each.chance, "metrics": each.metrics}
                    for name, each in scores.items()
                },
            }
            for number, scores in enumerate(found)
        ]
        show_json({"model": model.record(), "states": rows})
        return
    for name, first in found[0].items():
        lines: list[list[object]] = [
            [state, *scores[name].metrics.values()]
            for state, scores in zip(states, found, strict=True)
        ]
        if first.chance is not None:
            guess = [first.chance if metric == "acc" else None for metric in first.metrics]
            lines.insert(0, ["guessing", *guess])
        print_table(f"{name} ({first.items} items)", ("model", *first.metrics), lines)
