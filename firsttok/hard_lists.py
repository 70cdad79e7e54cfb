"""Lists of facts whose ROME edit collapses the model, as HardCF and HardEdit are, and of others.

"The Butterfly Effect of Model Editing" edited every fact to find those that collapse a model. Here
a fact is screened first, by the denominator of its update, and only one that is taken for a
collapse case is edited. So each fact of a list is confirmed by an edit, and few others are edited.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from rich.progress import Progress

from firsttok.arguments import LARGEST, taken
from firsttok.data import Fact
from firsttok.editing import ROME
from firsttok.errors import BadInputError
from firsttok.escapes import finite
from firsttok.evaluation import COLLAPSE_THRESHOLD, Perplexity
from firsttok.measuring import TOGETHER, measure_facts
from firsttok.rows import Row
from firsttok.screening import WINDOW, ScreenRow, screen
from firsttok.sieve import FailedFact
from firsttok.storage import content_hash, read_record, write_record
from firsttok.study import Study

__all__ = ["FactSearch", "Verdict", "check_unedited", "find_hard_facts", "find_normal_facts"]

_FORMAT = 1
"""Goes up when a kept window is to be screened again."""
_TOGETHER_CUDA = 64
"""Facts that are edited together on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one fact: its screening and, where it was edited, what the edit did."""

    fact: Fact
    screened: ScreenRow | None
    """None if its keys cannot be read; ``reason`` says why."""
    predicted: bool = False
    """Whether it was taken for a collapse case by its denominator."""
    edited: Row | None = None
    """The row of its ROME edit; None if it was not edited, or could not be."""
    reason: str = ""
    """What went wrong, if anything did."""

    def as_record(self) -> dict[str, Any]:
        """The verdict as JSON; a perplexity that is no finite number is null."""
        row = self.edited
        screened = {} if self.screened is None else asdict(self.screened)
        return {
            "case_id": self.fact.case_id,
            "prompt": self.fact.prompt,
            **screened,
            "predicted": self.predicted,
            "perplexity": None if row is None else finite(row.perplexity),
            "collapsed": None if row is None else row.collapsed,
        } | ({"reason": self.reason} if self.reason else {})


@dataclass(frozen=True, kw_only=True)
class FactSearch:
    """What a search found, and what it looked at."""

    facts: tuple[Fact, ...]
    """The facts that were confirmed, in the order in which they were given or drawn."""
    verdicts: tuple[Verdict, ...]
    """Every fact that was screened, in the same order."""

    @property
    def edited(self) -> int:
        """How many facts were edited."""
        return sum(each.edited is not None for each in self.verdicts)

    @property
    def predicted(self) -> int:
        """How many were taken for collapse cases."""
        return sum(each.predicted for each in self.verdicts)


@taken
def find_hard_facts(
    study: Study,
    facts: Sequence[Fact],
    *,
    count: int | None = None,
    threshold: float | None = None,
    progress: Progress | None = None,
) -> FactSearch:
    """Find facts whose single ROME edit collapses the model.

    Each fact is screened (:func:`~firsttok.screening.screen`). One that is taken for a collapse
    case is edited, and is confirmed if the perplexity with the edit is above 1000. The search ends
    at ``count`` facts. Screened windows and edits are kept in the study's work folder, so that an
    interrupted search continues from there. A collapse case that screening does not predict is not
    found; to edit every fact, use :func:`~firsttok.measuring.measure_facts`.

    Args:
        study: The model and its settings.
        facts: The facts, with different case ids.
        count: How many to find, or fewer if there are no more; None for all.
        threshold: Size of the denominator ``u . k^u`` below which a fact is taken for a collapse
            case; None for the ratio to C-ROME's (:data:`~firsttok.screening.RATIO`).
        progress: Where to show progress.

    Raises:
        BadInputError: If there are no facts, two have one case id, the count is below 1, or the
            unedited model is as bad on the sentences as a collapsed one.
    """
    return _search(study, facts, True, count, threshold, {}, progress)


@taken
def find_normal_facts(
    study: Study,
    facts: Sequence[Fact],
    *,
    count: int | None = None,
    threshold: float | None = None,
    seed: int = 0,
    known: Sequence[Verdict] = (),
    progress: Progress | None = None,
) -> FactSearch:
    """Find facts whose single ROME edit does not collapse the model, to compare hard facts with.

    The facts are drawn at random. Those that screening takes for collapse cases are passed over,
    and the others are edited to confirm them.

    Args:
        study: As for :func:`find_hard_facts`.
        facts: As for :func:`find_hard_facts`.
        count: As for :func:`find_hard_facts`.
        threshold: As for :func:`find_hard_facts`.
        seed: Seed of the draw.
        known: Verdicts of an earlier search under the same study, whose screening is used again.
        progress: Where to show progress.

    Raises:
        BadInputError: As for :func:`find_hard_facts`.
    """
    drawn = Random(f"firsttok normal {seed}").sample(list(facts), len(facts))  # noqa: S311
    screened = {each.fact.content_hash: each.screened for each in known if each.screened}
    return _search(study, drawn, False, count, threshold, screened, progress)


def _search(
    study: Study,
    facts: Sequence[Fact],
    collapsing: bool,
    count: int | None,
    threshold: float | None,
    known: Mapping[str, ScreenRow],
    progress: Progress | None,
) -> FactSearch:
    """Screen in order, edit those of the wanted kind, and stop at the count."""
    _check(study, facts, count, threshold)
    shown = progress or Progress(disable=True)
    kind = "hard" if collapsing else "normal"
    # The first bar is what a log shows, and a search with a count does not go through all facts.
    bars = [(f"confirming {kind} facts", count), (f"screening for {kind} facts", len(facts))]
    added = {name: shown.add_task(name, total=total) for name, total in bars[:: 1 if count else -1]}
    confirming, screening = (added[name] for name, _ in bars)
    verdicts: dict[int, Verdict] = {}

    def wanted() -> Iterator[Fact]:
        for verdict in _screened(study, facts, threshold, known):
            verdicts[verdict.fact.case_id] = verdict
            shown.advance(screening)
            if verdict.screened is not None and verdict.predicted == collapsing:
                yield verdict.fact

    source = wanted()
    found: list[Fact] = []
    most = TOGETHER if study.model.device.type == "cpu" else _TOGETHER_CUDA

    def batch() -> tuple[Fact, ...]:
        # Few that are predicted do not collapse, so hardly more need be edited than are wanted.
        return tuple(islice(source, most if count is None else min(most, count - len(found))))

    while some := batch():
        rows, reasons = _edited(study, some, shown)
        for fact in some:
            row = rows.get(fact.case_id)
            before = verdicts[fact.case_id]
            verdicts[fact.case_id] = Verdict(
                fact=fact,
                screened=before.screened,
                predicted=before.predicted,
                edited=row,
                reason=reasons.get(fact.case_id, ""),
            )
            if row is not None and row.collapsed == collapsing:
                found.append(fact)
        shown.update(confirming, completed=len(found))
    return FactSearch(facts=tuple(found), verdicts=tuple(verdicts.values()))


def _check(study: Study, facts: Sequence[Fact], count: int | None, threshold: float | None) -> None:
    if threshold is not None and not 0 < threshold <= LARGEST:
        raise BadInputError(f"the threshold is {threshold}; give a number above 0")
    if count is not None and count < 1:
        raise BadInputError(f"the count of facts is {count}; give at least 1")
    if not facts:
        raise BadInputError("there are no facts to look through; give at least one")
    if len({fact.case_id for fact in facts}) < len(facts):
        raise BadInputError("two of the facts have one case_id; number each once")
    study.keep_original_perplexity()
    check_unedited(study.original_perplexity)


def check_unedited(original: Perplexity) -> None:
    """Refuse a model that no edit can be said to collapse.

    Args:
        original: Perplexity of the unedited model.

    Raises:
        BadInputError: If it is that of a collapsed one.
    """
    if original.collapsed:
        raise BadInputError(
            f"the unedited model has a perplexity of {original.mean:.0f} on these sentences, above "
            f"{COLLAPSE_THRESHOLD:g} itself, so nothing can be said to collapse it; give other "
            "--texts, or try --text-bos with"
        )


def _screened(
    study: Study,
    facts: Sequence[Fact],
    threshold: float | None,
    known: Mapping[str, ScreenRow],
) -> Iterator[Verdict]:
    """A verdict for each fact, in order, from its keys alone."""
    folder = _kept_in(study)
    for start in range(0, len(facts), WINDOW):
        window = facts[start : start + WINDOW]
        rows = {
            fact.case_id: known[fact.content_hash] for fact in window if fact.content_hash in known
        }
        new = [fact for fact in window if fact.case_id not in rows]
        reasons: dict[int, str] = {}
        if new:
            more, reasons = _screen_window(study, new, folder)
            rows |= more
        for fact in window:
            row = rows.get(fact.case_id)
            yield Verdict(
                fact=fact,
                screened=row,
                predicted=row is not None and row.is_hard(threshold),
                reason=reasons.get(fact.case_id, ""),
            )


def _screen_window(
    study: Study, facts: Sequence[Fact], folder: Path | None
) -> tuple[dict[int, ScreenRow], dict[int, str]]:
    """The rows of a window by case id, and why others have none.

    They are kept as a whole, so that what is read again is what was computed together.
    """
    path = None
    if folder is not None:
        path = folder / f"{content_hash([fact.content_hash for fact in facts])[:24]}.json"
        with suppress(BadInputError, KeyError, TypeError):
            record = read_record(path, "screened facts")
            kept = [ScreenRow(**row) for row in record["rows"]]
            return {row.case_id: row for row in kept}, {
                int(number): str(reason) for number, reason in record["reasons"]
            }
    failed: list[FailedFact] = []
    rows = _all_that_went_well(
        failed, facts, lambda told: list(screen(study, facts, on_failure=told))
    )
    reasons = {each.case_id: each.reason for each in failed}
    if path is not None:
        write_record(path, {"rows": list(map(asdict, rows)), "reasons": list(reasons.items())})
    return {row.case_id: row for row in rows}, reasons


def _edited(
    study: Study, facts: Sequence[Fact], shown: Progress
) -> tuple[dict[int, Row], dict[int, str]]:
    """The rows of ROME's edits by case id, and why others have none."""
    failed: list[FailedFact] = []
    before = set(shown.task_ids)
    rows = _all_that_went_well(
        failed,
        facts,
        lambda told: measure_facts(study, facts, [ROME], progress=shown, on_failure=told),
    )
    # Each batch has a bar of its own, and there may be hundreds of batches.
    for task in set(shown.task_ids) - before:
        shown.remove_task(task)
    return {row.case_id: row for row in rows}, {each.case_id: each.reason for each in failed}


def _all_that_went_well(
    failed: list[FailedFact],
    facts: Sequence[Fact],
    do: Callable[[Callable[[FailedFact], None]], list[Any]],
) -> list[Any]:
    """What came of some facts, none of which need go well: others follow."""
    try:
        return do(failed.append)
    except BadInputError:
        if len(failed) < len(facts):
            raise
        return []


def _kept_in(study: Study) -> Path | None:
    """The folder of windows that were screened under these settings; None if none can be kept."""
    if study.work is None or study.model.disturbance is not None:
        return None
    settings = [
        _FORMAT,
        study.model.identity(),
        study.layer,
        study.contexts.content_hash,
        study.second_moment.content_hash,
    ]
    return study.work / "screened" / content_hash(settings)[:24]
