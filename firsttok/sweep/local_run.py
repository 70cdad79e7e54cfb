"""A whole run in one call, from Python: facts by methods on one model, and what came of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.editing import Editor, Method, find_editors
from firsttok.errors import BadInputError
from firsttok.measuring import Plan, hashes_of_open
from firsttok.metrics import METRICS, Metric
from firsttok.study import Study
from firsttok.sweep.engine import LocalEngine
from firsttok.sweep.manifest import check_run, join_run, model_entry, run_entry
from firsttok.sweep.results import RunResults, read_run
from firsttok.sweep.runner import CHUNK, model_folder, sweep

__all__ = ["sweep_facts"]


@taken
def sweep_facts(
    folder: str | Path,
    study: Study,
    facts: Sequence[Fact],
    methods: Sequence[Method | str | Editor],
    *,
    metrics: Sequence[Metric | str] = METRICS[:3],
    seed: int = 0,
    label: str | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> RunResults:
    """Edit and measure every fact by every method, as ``firsttok sweep`` does, in this process.

    The run lies in the folder: it goes on where it was interrupted, other models may join it, and
    the command takes it up, too. Methods, editors and metrics may be your own.

    Args:
        folder: The run's folder, begun or resumed.
        study: The model and its settings; its work folder is not used.
        facts: The facts; if none has a number of its own they are numbered in order.
        methods: The methods, their names as ``--method`` takes them, or editors.
        metrics: What is measured: metrics, or names of :data:`~firsttok.metrics.METRICS`.
        seed: Seed of Table 5's prefixes and of the generations.
        label: What the run calls the model; None for its own name. A study of another layer or view
            of a model that takes part already needs another label.
        chunk: Facts that are done together.
        progress: Where to show progress.

    Raises:
        BadInputError: If there are no facts, two have one number, or the run was begun with
            something else.
        CacheError: If the folder cannot be written to.
    """
    if chunk < 1:
        raise BadInputError(f"chunk is {chunk}; give at least 1")
    numbered = _numbered(facts)
    plan = Plan(methods=find_editors(methods), metrics=tuple(metrics), seed=seed)
    run, label = Path(folder), label or study.model.label
    entry = run_entry(
        # As a file of these facts has it, so that the command goes on with the run.
        facts_hash=hashlib.sha256(
            "".join(fact.content_hash for fact in numbered).encode()
        ).hexdigest(),
        facts=len(numbered),
        facts_name="python",
        plan=plan,
        chunk=chunk,
    )
    check_run(run, entry)
    join_run(run, entry, label, model_entry(study, hashes_of_open(study, plan.methods)))
    sweep(
        model_folder(run, label),
        numbered,
        LocalEngine(study=study, plan=plan),
        size=chunk,
        progress=progress,
        label=label,
        total=len(numbered),
    )
    return read_run(run)


def _numbered(facts: Sequence[Fact]) -> list[Fact]:
    if not facts:
        raise BadInputError("there are no facts to sweep; give at least one")
    if len(facts) > 1 and not any(fact.case_id for fact in facts):
        return [replace(fact, case_id=index) for index, fact in enumerate(facts)]
    seen: set[int] = set()
    for fact in facts:
        if fact.case_id in seen:
            raise BadInputError(
                f"two facts have the case_id {fact.case_id}; number each once, or none at all"
            )
        seen.add(fact.case_id)
    return list(facts)
