"""What a sequence of edits is: its facts, their order, what is measured, and its guard."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from firsttok.arguments import take_fields, taken, whole_number
from firsttok.data import Fact
from firsttok.editing import Editor, Method
from firsttok.errors import BadInputError
from firsttok.measuring import hash_of
from firsttok.metrics import Metric, find_metrics
from firsttok.options import folder_name
from firsttok.screening import screen
from firsttok.study import Study

__all__ = [
    "OWN_COLUMNS",
    "SINGULAR",
    "EditSequence",
    "Guard",
    "SequencePlan",
    "check_order",
    "order_facts",
]

SINGULAR = 3
"""Singular values of the edited weight that are kept."""
OWN_COLUMNS = (
    *("step", "guard", "drift_norm", "mean_drift", "weight_norm", "condition_number"),
    *(f"singular_{number}" for number in range(1, SINGULAR + 1)),
)
"""Columns of a step besides those of the fact, the editor's report and the metrics."""


class Guard(str, Enum):
    """What keeps a sequence from a disabling edit."""

    NONE = "none"
    SCREEN = "screen"
    """Leave out facts for which :meth:`~firsttok.screening.ScreenRow.is_hard` holds: ROME's
    denominator decides, whatever the editor."""
    ROLLBACK = "rollback"
    """Take an edit out again after which the perplexity is a collapse, or jumps."""


@dataclass(frozen=True, kw_only=True)
class EditSequence:
    """Facts that are written one after another by one editor.

    Raises:
        BadInputError: If there is no fact, or a fact comes twice.
    """

    name: str
    """Name of its folder in the run."""
    facts: tuple[Fact, ...]
    editor: Method | Editor

    def __post_init__(self) -> None:
        """Check the facts."""
        take_fields(self)
        if folder_name(self.name) != self.name:
            raise BadInputError(
                f"{self.name!r} cannot be the name of a folder; take letters, digits and -"
            )
        if not self.facts:
            raise BadInputError(f"the sequence {self.name!r} has no fact; give at least one")
        ids = [fact.case_id for fact in self.facts]
        for number in ids:
            if ids.count(number) > 1:
                raise BadInputError(
                    f"the case_id {number} comes twice in the sequence {self.name!r}; number each "
                    "fact once"
                )


@dataclass(frozen=True, kw_only=True)
class SequencePlan:
    """What is measured along the way, and what keeps a sequence from a disabling edit.

    Raises:
        BadInputError: If a number is out of its range, or a metric is unknown.
    """

    metrics: tuple[Metric | str, ...] = ("perplexity", "scores")
    """Measured after every edit, of the fact that it wrote, against the model before the first."""
    retained: tuple[Metric | str, ...] = ("scores",)
    """Measured at every checkpoint, of all facts that were written so far."""
    checkpoint: tuple[Metric | str, ...] = ()
    """Measured at every checkpoint, of the model as a whole, such as ``tasks``."""
    every: int = 10
    """Steps from one checkpoint to the next; the last step is one as well."""
    guard: Guard = Guard.NONE
    jump: float = 10.0
    """An edit disables a model where the perplexity is so many times that before it."""
    seed: int = 0
    """Seed of what metrics draw."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        take_fields(self)
        whole_number(self.every, "every", least=1)
        if not self.jump > 1:
            raise BadInputError(f"jump is {self.jump:g}; give a number above 1")
        names = {metric.name for metric in self.behind_each}
        behind = {column for metric in self.behind_each for column in metric.columns}
        for metric in (*self.behind_each, *self.at_checkpoints, *self.of_the_model):
            for column in metric.columns:
                if column in OWN_COLUMNS:
                    raise BadInputError(
                        f"the metric {metric.name!r} has a column {column!r}, which a row of a "
                        "sequence has already; give it another name"
                    )
        for metric in self.of_the_model:
            if not behind.isdisjoint(metric.columns):
                raise BadInputError(
                    f"{metric.name!r} is measured after every edit, and so at every checkpoint; "
                    "name it once"
                )
        if self.guard is Guard.ROLLBACK and "perplexity" not in names:
            raise BadInputError(
                "the guard rollback needs the perplexity; let it be among the metrics"
            )

    @cached_property
    def behind_each(self) -> tuple[Metric, ...]:
        """The metrics after every edit."""
        return find_metrics(self.metrics, seed=self.seed)

    @cached_property
    def at_checkpoints(self) -> tuple[Metric, ...]:
        """The metrics of earlier facts."""
        return find_metrics(self.retained, seed=self.seed)

    @cached_property
    def of_the_model(self) -> tuple[Metric, ...]:
        """The metrics of the model at checkpoints."""
        return find_metrics(self.checkpoint, seed=self.seed)

    def described(self) -> dict[str, Any]:
        """All of it as JSON.

        Raises:
            BadInputError: If a metric of the user's cannot be described.
        """
        return {
            "metrics": {each.name: hash_of(each) for each in self.behind_each},
            "retained": {each.name: hash_of(each) for each in self.at_checkpoints},
            "checkpoint": {each.name: hash_of(each) for each in self.of_the_model},
            "every": self.every,
            "guard": self.guard.value,
            "jump": self.jump,
            "seed": self.seed,
        }


@taken
def order_facts(study: Study, facts: Sequence[Fact], order: str) -> tuple[Fact, ...]:
    """Put facts into the order of a sequence.

    Args:
        study: The study; its keys say which facts are hard.
        facts: The facts.
        order: ``given``; ``seed:N`` for a random one; ``hard-first`` for those first at which ROME
            divides by the least share of what C-ROME divides by.

    Raises:
        BadInputError: If it is none of these.
    """
    check_order(order)
    if order == "hard-first":
        ratios = {row.case_id: row.ratio for row in screen(study, facts)}
        return tuple(sorted(facts, key=lambda fact: ratios[fact.case_id]))
    ordered = list(facts)
    if order != "given":
        random.Random(int(order.removeprefix("seed:"))).shuffle(ordered)  # noqa: S311
    return tuple(ordered)


def check_order(order: str) -> None:
    """Refuse an order that :func:`order_facts` does not know, before any work.

    Raises:
        BadInputError: If it is unknown.
    """
    name, _, number = order.partition(":")
    if order not in ("given", "hard-first") and not (name == "seed" and number.isdecimal()):
        raise BadInputError(f"the order is {order!r}; give given, seed:N or hard-first")
