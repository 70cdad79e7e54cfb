"""One chunk of a sweep: edit its facts together, measure them, and let no case stop the others."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from firsttok.data import Fact
from firsttok.editing import Method, RankOneEdit, check_methods, compute_edits
from firsttok.efficacy import draw_prefix
from firsttok.errors import BadInputError, CacheError, FirsttokError
from firsttok.evaluation import (
    edit_accuracies,
    edit_counterfact_scores,
    generation_entropy,
    sample_continuations,
    score_edits,
)
from firsttok.prompts import fact_prompt, text_prompt, with_target
from firsttok.study import Study, case_row
from firsttok.sweep.rows import DONE, SweepRow, failed_row

__all__ = ["METRICS", "Plan", "measure_chunk"]

logger = logging.getLogger(__name__)

METRICS = ("perplexity", "accuracy", "scores", "entropy")
"""What can be measured after an edit; ``entropy`` generates text and is slow."""


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
    on_step: Callable[[int], None] | None = None,
) -> list[SweepRow]:
    """Edit the facts of a chunk and measure every edit.

    The values of a chunk are optimised together and no finished part is read from the study's work
    folder, so that a chunk's numbers depend on the chunk alone. If something in it fails, its facts
    are done one by one, and those that fail again become rows with the reason.

    Args:
        study: The study.
        facts: The chunk.
        plan: Methods and metrics.
        on_step: Called with the number of facts that took one optimisation step.

    Returns:
        One row per fact and method, fact by fact.

    Raises:
        CacheError: If a disk is full or cannot be written to; that is no fault of a case.
    """
    reasons = {fact.case_id: _unusable(study, fact, plan) for fact in facts}
    sound = [fact for fact in facts if reasons[fact.case_id] is None]
    rows: dict[int, list[SweepRow]] = {}
    try:
        rows = _together(study, sound, plan, on_step)
    except (CacheError, MemoryError):
        raise
    except Exception as error:
        logger.warning("a chunk failed (%s); its facts are done one by one", _reason(error))
        for fact in sound:
            found = _alone(study, fact, plan)
            if isinstance(found, str):
                reasons[fact.case_id] = found
            else:
                rows[fact.case_id] = found
    label = study.model.label
    for fact in facts:
        reason = reasons[fact.case_id]
        if reason is not None:
            rows[fact.case_id] = [
                failed_row(label, fact, method.name, reason) for method in plan.methods
            ]
    return [row for fact in facts for row in rows[fact.case_id]]


def _alone(study: Study, fact: Fact, plan: Plan) -> list[SweepRow] | str:
    """A fact's rows, or why there are none."""
    try:
        return _together(study, [fact], plan, None)[fact.case_id]
    except (CacheError, MemoryError):
        raise
    except Exception as error:
        return _reason(error)


def _unusable(study: Study, fact: Fact, plan: Plan) -> str | None:
    """Why a fact cannot be edited or measured, as far as its tokens tell."""
    model = study.model
    asked: list[tuple[str, str]] = []
    if {"accuracy", "scores"} & set(plan.metrics):
        asked += [(text, fact.target_new) for text in fact.paraphrases]
        asked += fact.answered_neighbours
    try:
        for template in study.contexts.templates:
            with_target(model, fact_prompt(model, fact, template), fact.target_new)
        for text, target in asked:
            with_target(model, text_prompt(model, text), target)
    except FirsttokError as error:
        return _reason(error)
    return None


def _together(
    study: Study, facts: Sequence[Fact], plan: Plan, on_step: Callable[[int], None] | None
) -> dict[int, list[SweepRow]]:
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
    return {
        fact.case_id: _measured(study, fact, [edits[m.name] for m in plan.methods], plan)
        for fact, edits in found
    }


def _measured(study: Study, fact: Fact, edits: Sequence[RankOneEdit], plan: Plan) -> list[SweepRow]:
    model = study.model
    found: list[dict[str, Any]] = [{} for _ in edits]
    perplexities = (
        study.prepared_texts.measure_edits(study.evaluated, edits)
        if "perplexity" in plan.metrics
        else [None] * len(edits)
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
            prompt = with_target(model, fact_prompt(model, fact, prefix), fact.target_new)
            prefixed = score_edits(model, [prompt], edits)[1:]
            for columns, (found_there,) in zip(found, prefixed, strict=True):
                columns.update(prefix=prefix, prefixed_efficacy=found_there.accuracy)
    if "scores" in plan.metrics:
        scores = edit_counterfact_scores(model, fact, edits)[1:]
        for columns, each in zip(found, scores, strict=True):
            columns.update(asdict(each), score=each.score)
    if "entropy" in plan.metrics:
        for columns, edit in zip(found, edits, strict=True):
            with edit.applied(model):
                texts = sample_continuations(model, fact.prompt, seed=plan.seed)
            columns["entropy"] = generation_entropy(texts)
    return [
        SweepRow(model=model.label, status=DONE, target_true=fact.target_true, **columns)
        for columns in found
    ]


def _reason(error: Exception) -> str:
    """One line on an error; one that is not the user's goes with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FirsttokError) else f"{type(error).__name__}: {text}"
