"""Screening: which facts will collapse the model, told from their keys before any edit.

ROME divides by ``u . k^u`` (Equation 3 with the keys of Section 3.1). That takes one pass up to the
edited layer for each prompt and no optimisation, so a data set is screened in a fraction of the
time it takes to edit it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float
from rich.progress import Progress

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.keys import FactKeys, keys_of_facts
from firsttok.prompts import fact_prompt
from firsttok.sieve import FailedFact, each_or_reason, nothing_done
from firsttok.study import Study

__all__ = [
    "RATIO",
    "WINDOW",
    "Calibration",
    "Estimate",
    "ScreenRow",
    "calibrate",
    "hard_rule",
    "screen",
    "screen_keys",
]

RATIO = 0.05
"""Without edited cases a collapse is predicted where ROME's denominator is less than this share of
C-ROME's. Their ratio has no unit, so that it can be compared between models.

On SmolLM2-135M, where it was set, no fact lies between 0.0085 and 0.28."""
WINDOW = 24
"""Facts whose prompts are run together; no more keys are in memory."""
RESAMPLES = 2000
_ScoreArray = Float[np.ndarray, "case"]
_FlagArray = Bool[np.ndarray, "case"]


@dataclass(frozen=True, kw_only=True)
class ScreenRow:
    """What the keys of one fact say about ROME's update, before there is one."""

    case_id: int
    """Number of the fact in its set."""
    subject: str
    prompt: str
    first_token: bool
    """Whether the looked-up token is the very first of the sequence (BOS counts as a token)."""
    one_token: bool
    """Whether the subject is a single token."""
    denominator: float
    """``u . k^u``, signed, u of unit norm: what ROME's update is divided by (Table 1)."""
    consistent_denominator: float
    """``u . k_bar``: what C-ROME's update is divided by."""
    key_cosine: float
    """Cosine of k_bar and k^u."""
    key_norm_ratio: float
    """``||k^u|| / ||k_bar||``."""

    @property
    def ratio(self) -> float:
        """ROME's denominator over C-ROME's, without sign."""
        return abs(self.denominator) / max(abs(self.consistent_denominator), 1e-300)

    def is_hard(self, threshold: float | None) -> bool:
        """Whether the fact is taken for a collapse case.

        It is if the denominator is smaller in size than the threshold, or, without one, than
        :data:`RATIO` of C-ROME's.
        """
        return self.ratio < RATIO if threshold is None else abs(self.denominator) < threshold


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number on all cases, with its 95 % interval: percentiles over resamples of the cases."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How well the size of the denominator foretells what the real edit did."""

    cases: int
    """Edited cases, of which some collapsed the model."""
    collapsed: int
    auc: Estimate
    """Area under the receiver operating characteristic."""
    average_precision: Estimate
    """Area under the precision-recall curve."""
    threshold: float
    """A case whose denominator is smaller in size than this is taken for a collapse case."""
    recall: Estimate
    """Share of the collapse cases found, each by a threshold made without it."""
    precision: Estimate
    """Share of collapse cases among those found, by the same thresholds."""


def hard_rule(threshold: float | None) -> str:
    """When a fact is taken for a collapse case, in words; see :meth:`ScreenRow.is_hard`."""
    if threshold is None:
        return f"|denominator| below {RATIO:g} times C-ROME's"
    return f"|denominator| below {threshold:.4g}"


@taken
def screen(
    study: Study,
    facts: Iterable[Fact],
    *,
    progress: Progress | None = None,
    total: int | None = None,
    on_failure: Callable[[FailedFact], None] | None = None,
) -> Iterator[ScreenRow]:
    """Read the keys of every fact; no value is optimised and no weight changed.

    Args:
        study: Its contexts, second moment and layer count.
        facts: A few at a time are in memory.
        progress: Where to show progress.
        total: Number of facts, for the estimate.
        on_failure: Told of each fact whose keys cannot be read or are not finite, which has no row
            then; None to raise what went wrong.

    Yields:
        One row per fact, in order.

    Raises:
        BadInputError: If there are no facts, or none of them has a row.
        NonFiniteError: If a denominator is not finite, and ``on_failure`` is None.
    """
    task = None if progress is None else progress.add_task("screening", total=total)
    source = iter(facts)
    seen = False
    failed: FailedFact | None = None

    def rows_of(some: Sequence[Fact]) -> Iterator[ScreenRow]:
        keys_of = keys_of_facts(study.model, some, study.contexts, layer=study.layer)
        return (screen_keys(study, fact, keys) for fact, keys in zip(some, keys_of, strict=True))

    while chunk := tuple(islice(source, WINDOW)):
        if on_failure is None:
            seen = True
            yield from rows_of(chunk)
        else:
            for _, row in each_or_reason(chunk, rows_of):
                if isinstance(row, FailedFact):
                    failed = row
                    on_failure(row)
                else:
                    seen = True
                    yield row
        if progress is not None and task is not None:
            progress.advance(task, len(chunk))
    if not seen:
        raise nothing_done("screen", failed)


def calibrate(
    denominators: Sequence[float], collapsed: Sequence[bool], *, seed: int = 0
) -> Calibration:
    """Compare the denominators ``u . k^u`` of edited cases with what their edits did.

    The threshold is the one that separates best (Youden's J, midway between two cases). Recall and
    precision are those of ten-fold cross-validation, so that no case is judged by a threshold it
    helped to make.

    Raises:
        BadInputError: If the numbers of both differ, or there are not two cases of each kind.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if len(denominators) != len(collapsed):
        raise BadInputError(f"{len(denominators)} denominators for {len(collapsed)} edited cases")
    sizes = np.abs(np.asarray(denominators, dtype=np.float64))
    truth = np.asarray(collapsed, dtype=bool)
    if min(truth.sum(), (~truth).sum()) < 2:
        raise BadInputError(
            f"{int(truth.sum())} of {len(truth)} edited cases collapsed; a threshold needs at "
            "least two that do and two that do not"
        )
    found = _held_out(sizes, truth, seed)
    estimate = partial(_estimate, draws=_resamples(truth, seed))
    return Calibration(
        cases=len(truth),
        collapsed=int(truth.sum()),
        auc=estimate(lambda i: float(roc_auc_score(truth[i], -sizes[i]))),
        average_precision=estimate(lambda i: float(average_precision_score(truth[i], -sizes[i]))),
        threshold=_threshold(sizes, truth),
        recall=estimate(lambda i: float(found[i][truth[i]].mean())),
        precision=estimate(lambda i: float(truth[i][found[i]].mean()) if found[i].any() else 0.0),
    )


def screen_keys(study: Study, fact: Fact, keys: FactKeys) -> ScreenRow:
    """Return the row of one fact from keys that were read at the study's layer.

    Raises:
        NonFiniteError: If a denominator is not finite.
    """
    prompt = fact_prompt(study.model, fact)
    left = study.second_moment.solve(keys.prefixed_mean)
    unit = left / left.norm()
    denominator, consistent = float(unit @ keys.unprefixed), float(unit @ keys.prefixed_mean)
    if not (math.isfinite(denominator) and math.isfinite(consistent)):
        raise NonFiniteError(
            f"the denominator of ROME's update is {denominator}, that of C-ROME's {consistent}; "
            "load the model in float32"
        )
    return ScreenRow(
        case_id=fact.case_id,
        subject=fact.subject,
        prompt=fact.prompt,
        first_token=prompt.subject_position == 0,
        one_token=prompt.subject_length == 1,
        denominator=denominator,
        consistent_denominator=consistent,
        key_cosine=keys.cosine,
        key_norm_ratio=keys.norm_ratio,
    )


def _threshold(sizes: _ScoreArray, truth: _FlagArray) -> float:
    """The cut with the largest Youden's J: recall plus specificity."""
    order = np.argsort(sizes, kind="stable")
    hits = np.cumsum(truth[order]) / truth.sum()
    alarms = np.cumsum(~truth[order]) / (~truth).sum()
    best = int(np.argmax(hits - alarms))
    after = sizes[order[min(best + 1, len(sizes) - 1)]]
    # The middle on a logarithmic scale, where the two groups lie orders of magnitude apart.
    return float(np.sqrt(max(sizes[order[best]], 1e-300) * max(after, 1e-300)))


def _held_out(sizes: _ScoreArray, truth: _FlagArray, seed: int) -> _FlagArray:
    from sklearn.model_selection import StratifiedKFold

    folds = int(min(10, truth.sum(), (~truth).sum()))
    found = np.zeros(len(truth), dtype=bool)
    splitter = StratifiedKFold(n_splits=folds, shuffle=True, random_state=seed)
    for kept, held in splitter.split(sizes, truth):
        found[held] = sizes[held] < _threshold(sizes[kept], truth[kept])
    return found


def _resamples(truth: _FlagArray, seed: int) -> list[np.ndarray]:
    """Draws of as many cases with replacement; one with a single kind of case says nothing."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(truth), size=(RESAMPLES, len(truth)))
    return [draw for draw in draws if 0 < truth[draw].sum() < len(draw)]


def _estimate(measure: Callable[[np.ndarray], float], *, draws: Sequence[np.ndarray]) -> Estimate:
    values = [measure(draw) for draw in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    everything = np.arange(len(draws[0]))
    return Estimate(value=measure(everything), low=float(low), high=float(high))
