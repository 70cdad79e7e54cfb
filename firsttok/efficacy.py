"""Accuracies of many edits: the rows of Tables 4 and 5."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.progress import Progress

from firsttok.data import Fact
from firsttok.editing import Method
from firsttok.errors import BadInputError
from firsttok.evaluation import edit_accuracies
from firsttok.study import Study

__all__ = ["AccuracyRow", "draw_prefix", "measure_accuracy"]


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """One fact edited by one method, and what the edited model answers."""

    case_id: int
    """Number of the fact in its set."""
    subject: str
    """The fact's subject."""
    method: str
    """Label of the method."""
    prefix: str
    """Template the rewriting prompt was put into; ``"{}"`` for the bare prompt."""
    efficacy: float
    """As in :class:`~firsttok.evaluation.Accuracy`, a fraction of 1."""
    generalization: float | None
    """The same on the first paraphrase; None without one."""
    locality: float | None
    """Share of unchanged answers on the first neighbour; None without one."""


def measure_accuracy(
    study: Study,
    facts: Sequence[Fact],
    methods: Sequence[Method],
    *,
    prefix_of: Callable[[Fact], str],
    progress: Progress | None = None,
    label: str = "accuracies",
) -> list[AccuracyRow]:
    """Edit every fact by every method and measure efficacy, generalization and locality.

    Args:
        study: The study; values that are in its store are not optimised again.
        facts: The facts.
        methods: The methods.
        prefix_of: Template for a fact's rewriting prompt at test time (Table 5), ``"{}"`` for none.
        progress: Where to show progress.
        label: What the progress bar says.
    """
    task = None if progress is None else progress.add_task(label, total=len(facts))
    rows: list[AccuracyRow] = []
    for fact, edits in study.edits(facts, methods):
        prefix = prefix_of(fact)
        found = edit_accuracies(
            study.model, fact, [edits[method.name] for method in methods], context=prefix
        )
        rows += [
            AccuracyRow(
                case_id=fact.case_id,
                subject=fact.subject,
                method=method.label,
                prefix=prefix,
                efficacy=measured.efficacy,
                generalization=measured.generalization,
                locality=measured.locality,
            )
            for method, measured in zip(methods, found, strict=True)
        ]
        if progress is not None and task is not None:
            progress.advance(task)
    return rows


def draw_prefix(study: Study, fact: Fact, *, seed: int) -> str:
    """Draw one of the prefixes used for editing, as Section 4 does at test time.

    The draw depends on seed and fact alone, so that every method is tested behind the same one.

    Raises:
        BadInputError: If the contexts hold no prefix.
    """
    prefixes = study.contexts.prefixed
    if not prefixes:
        raise BadInputError("no context has a prefix that could be put before the prompt; give one")
    return random.Random(f"{seed} {fact.content_hash}").choice(prefixes)  # noqa: S311
