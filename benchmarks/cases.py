"""The benchmarks by name."""

from collections.abc import Callable
from dataclasses import dataclass

from edit_cases import fine_tuning, many_edits, one_edit, profile, spread
from growth_cases import growth_in_facts, growth_in_length, growth_in_size
from measuring import Plan
from pass_cases import keys, perplexity_of_edits, second_moment
from precision_cases import bfloat16
from process_cases import processes, reproduce
from setting import Setting
from state_cases import downstream_tasks, sequences

__all__ = ["CASES", "Case"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark."""

    title: str
    """Its heading."""
    plan: Callable[[Setting], Plan]
    """What it runs."""
    memory: tuple[str, ...] = ()
    """Sides whose peak memory is measured, each in a process of its own."""
    only_if_asked: bool = False
    """Whether it is left out unless named by ``--only``."""
    deaf_to: str | None = None
    """An option that it cannot follow."""


CASES: dict[str, Case] = {
    "edits": Case(title="Edits of a list of facts", plan=many_edits, memory=("fast", "naive")),
    "single": Case(title="One edit", plan=one_edit, memory=("fast", "naive")),
    "fine-tuning": Case(
        title="Fine-tuning of a list of facts", plan=fine_tuning, memory=("side by side", "naive")
    ),
    "memit": Case(
        title="MEMIT, EMMET and AlphaEdit of a list of facts",
        plan=spread,
        memory=("MEMIT", "naive MEMIT"),
    ),
    "perplexity": Case(
        title="Perplexity of edits",
        plan=perplexity_of_edits,
        memory=("with preparation", "batched", "one by one"),
    ),
    "keys": Case(title="Keys", plan=keys, memory=("bare", "naive bare")),
    "second-moment": Case(
        title="Second moment, against a full forward pass",
        plan=second_moment,
        memory=("fast", "naive"),
    ),
    "sequences": Case(title="Sequences of edits side by side", plan=sequences),
    "tasks": Case(title="Downstream tasks under many edits", plan=downstream_tasks),
    "bfloat16": Case(title="bfloat16 instead of float32", plan=bfloat16, deaf_to="dtype"),
    "processes": Case(title="Start, help, load", plan=processes),
    "growth-facts": Case(title="Growth with the number of facts", plan=growth_in_facts),
    "growth-length": Case(title="Growth with the length of the prompt", plan=growth_in_length),
    "growth-size": Case(title="Growth with the size of the model", plan=growth_in_size),
    "profile": Case(title="Where the time of an edit goes", plan=profile),
    "reproduce": Case(title="make reproduce", plan=reproduce, only_if_asked=True, deaf_to="size"),
}
"""All of them, in the order of the results."""
