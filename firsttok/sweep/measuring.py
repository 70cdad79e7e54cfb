"""One chunk of a sweep: edit its facts together, measure them, and let no case stop the others."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from firsttok.arguments import take_fields
from firsttok.data import Fact
from firsttok.editing import Edit, Method, check_methods, compute_edits
from firsttok.efficacy import draw_prefix
from firsttok.errors import BadInputError
from firsttok.evaluation import (
    edit_accuracies,
    edit_counterfact_scores,
    generated_match,
    generation_entropy,
    sample_continuations,
    score_edits,
)
from firsttok.prompts import fact_prompt, with_target
from firsttok.sieve import FailedFact, each_or_reason, reason_against
from firsttok.study import Study, case_row
from firsttok.sweep.rows import DONE, SweepRow, failed_row

__all__ = ["METRICS", "TOGETHER", "Plan", "measure_chunk", "measure_each"]

TOGETHER = 8
"""Facts whose values are optimised together on a CPU, where few of them fill a batch. A sweep that
is killed loses no more than these; on a GPU, which is fast, those of its chunk.
"""
METRICS = ("perplexity", "accuracy", "scores", "generated", "entropy")
"""What can be measured after an edit; the last two generate text and are slow."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done with every fact.

    Raises:
        BadInputError: If there is no method, results could not tell two apart, or a metric is
            unknown.
    """

    methods: tuple[Method, ...]
    """The methods, each a row."""
    metrics: tuple[str, ...] = METRICS[:3]
    """Which of :data:`METRICS` are measured; columns of the others stay empty."""
    seed: int = 0
    """Seed of Table 5's prefixes and of the generations."""

    def __post_init__(self) -> None:
        """Check the methods and metrics."""
        take_fields(self)
        if not self.methods:
            raise BadInputError("a sweep needs at least one method; give one")
        check_methods(self.methods)
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise BadInputError(f"no metric is called {unknown[0]!r}; take {', '.join(METRICS)}")


def measure_chunk(
    study: Study,
    facts: Sequence[Fact],
    plan: Plan,
    *,
    done: Collection[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> list[SweepRow]:
    """Edit the facts of a chunk and measure every edit; arguments as of :func:`measure_each`.

    Returns:
        One row per fact and method, fact by fact, of the facts that are not done.

    Raises:
        CacheError: If a disk is full or cannot be written to; that is no fault of a case.
    """
    found = measure_each(study, facts, plan, done=done, on_step=on_step)
    return [row for rows in found for row in rows]


def measure_each(
    study: Study,
    facts: Sequence[Fact],
    plan: Plan,
    *,
    done: Collection[int] = (),
    on_step: Callable[[int], None] | None = None,
) -> Iterator[list[SweepRow]]:
    """Edit the facts of a chunk, and give the rows of each as soon as it is measured.

    The values of a few facts are optimised together (:data:`TOGETHER`), always of the same ones,
    and no finished part is read from the study's work folder. So a chunk's numbers depend on its
    facts alone, and not on which of them were done before. Facts that cannot be edited, as their
    tokens tell, and those that fail become rows with the reason.

    Args:
        study: The study.
        facts: The chunk.
        plan: Methods and metrics.
        done: Case ids of facts that are not measured, since their rows are there.
        on_step: Called with the number of facts that took one optimisation step.

    Yields:
        For each other fact, in order, a row per method.

    Raises:
        CacheError: If a disk is full or cannot be written to; that is no fault of a case.
    """
    size = TOGETHER if study.model.device.type == "cpu" else max(1, len(facts))
    for start in range(0, len(facts), size):
        part = facts[start : start + size]
        if any(fact.case_id not in done for fact in part):
            yield from _part(study, part, plan, done, on_step)


def _part(
    study: Study,
    facts: Sequence[Fact],
    plan: Plan,
    done: Collection[int],
    on_step: Callable[[int], None] | None,
) -> Iterator[list[SweepRow]]:
    """Facts that are optimised together."""
    reasons = {fact.case_id: _unusable(study, fact, plan) for fact in facts}
    sound = [fact for fact in facts if reasons[fact.case_id] is None]
    measured = each_or_reason(sound, lambda some: _together(study, some, plan, done, on_step))
    for fact in facts:
        reason, rows = reasons[fact.case_id], list[SweepRow]()
        if reason is None:
            _, found = next(measured)
            if isinstance(found, FailedFact):
                reason = found.reason
            else:
                rows = found
        if reason is not None:
            label = study.model.label
            rows = [failed_row(label, fact, method.name, reason) for method in plan.methods]
        if fact.case_id not in done:
            yield rows


def _unusable(study: Study, fact: Fact, plan: Plan) -> str | None:
    """Why a fact cannot be edited or measured, as far as its tokens tell."""
    asked: list[tuple[str, str]] = []
    if {"accuracy", "scores"} & set(plan.metrics):
        asked += [(text, fact.target_new) for text in fact.paraphrases]
        asked += fact.answered_neighbours
    return reason_against(study.model, fact, templates=study.contexts.templates, asked=asked)


def _together(
    study: Study,
    facts: Sequence[Fact],
    plan: Plan,
    done: Collection[int],
    on_step: Callable[[int], None] | None,
) -> Iterator[list[SweepRow]]:
    found = compute_edits(
        study.model,
        facts,
        methods=plan.methods,
        contexts=study.contexts,
        second_moment=study.second_moment,
        layer=study.layer,
        hyperparameters=study.hyperparameters,
        key_source=study.key_source,
        on_step=on_step,
    )
    for fact, edits in found:
        if fact.case_id in done:
            yield []
            continue
        yield _measured(study, fact, [edits[m.name] for m in plan.methods], plan)


def _measured(study: Study, fact: Fact, edits: Sequence[Edit], plan: Plan) -> list[SweepRow]:
    model = study.model
    found: list[dict[str, Any]] = [{} for _ in edits]
    perplexities = (
        study.perplexities(edits) if "perplexity" in plan.metrics else [None] * len(edits)
    )
    for columns, method, edit, perplexity in zip(
        found, plan.methods, edits, perplexities, strict=True
    ):
        columns.update(case_row(study, fact, method, edit, perplexity))
    if "accuracy" in plan.metrics:
        for columns, accuracy in zip(found, edit_accuracies(model, fact, edits), strict=True):
            columns.update(asdict(accuracy))
        if study.contexts.prefixed:
            prefix = draw_prefix(study, fact, seed=plan.seed)
            prompt = fact_prompt(model, fact, prefix)
            prompt = with_target(model, prompt, fact.target_new, join=fact.join)
            prefixed = score_edits(model, [prompt], edits)[1:]
            for columns, (found_there,) in zip(found, prefixed, strict=True):
                columns.update(prefix=prefix, prefixed_efficacy=found_there.accuracy)
    if "scores" in plan.metrics:
        scores = edit_counterfact_scores(model, fact, edits)[1:]
        for columns, each in zip(found, scores, strict=True):
            columns.update(asdict(each), score=each.score)
    if "generated" in plan.metrics:
        for columns, edit in zip(found, edits, strict=True):
            match = generated_match(model.edited(edit), fact)
            columns.update(
                generated=match.text,
                generated_exact=match.exact,
                generated_first_words=match.first_words,
            )
    if "entropy" in plan.metrics:
        for columns, edit in zip(found, edits, strict=True):
            with edit.applied(model):
                texts = sample_continuations(model, fact.prompt, seed=plan.seed)
            columns["entropy"] = generation_entropy(texts)
    return [
        SweepRow(model=model.label, status=DONE, target_true=fact.target_true, **columns)
        for columns in found
    ]
