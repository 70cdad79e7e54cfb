"""Whether ROME would collapse a model: told from a dozen facts' keys, or tried on them.

ROME divides by ``u . k^u``, C-ROME by ``u . k_bar`` (Equation 3 with the keys of Section 3.1), and
their ratio tells (:data:`~firsttok.screening.RATIO`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.progress import Progress

from firsttok.data import Fact, builtin_facts, spread_evenly
from firsttok.display import Note, Panel, Shown, Table
from firsttok.editing import ROME
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.screening import RATIO, ScreenRow, screen
from firsttok.sieve import reason_against
from firsttok.study import Study

__all__ = ["CALIBRATED", "DOZEN", "FactForecast", "Forecast", "choose_facts", "forecast"]

CALIBRATED = "on SmolLM2-135M 61 of the 76 facts below that did, and none of the 94 above"
"""What ``firsttok scan`` found there; a test holds it to the committed scan."""
DOZEN = 12
"""How many built-in facts are tried, half of them with the subject first."""
GUESSING = 0.5
"""A perplexity above this share of the vocabulary is that of a model that has learnt nothing."""


@dataclass(frozen=True, kw_only=True)
class FactForecast:
    """One fact: what its keys say about ROME's edit, and what the edit did if it was made."""

    keys: ScreenRow
    """Denominators, cosine, norm ratio and place of the subject."""
    perplexity: float | None = None
    """Mean perplexity after the real edit; None if it was not made."""
    collapsed: bool | None = None
    """Whether that edit destroyed the model; None if it was not made."""

    @property
    def predicted(self) -> bool:
        """Whether the ratio foretells a collapse."""
        return self.keys.is_hard(None)


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecast(Shown):
    """What ROME would do, or did, to the model on some facts."""

    layer: int
    facts: tuple[FactForecast, ...]
    left_out: tuple[str, ...]
    """Facts that could not be used, each with its reason."""
    original_perplexity: float
    """Mean perplexity of the unedited model on the sentences."""
    doubt: str | None
    """Why nothing can be said to collapse on this model; None if it can."""
    not_edited: str | None = None
    """Why edits that were asked for were not made."""

    @property
    def edited(self) -> bool:
        """Whether the edits were made, so that nothing is only predicted."""
        return bool(self.facts) and all(fact.collapsed is not None for fact in self.facts)

    @property
    def predicted(self) -> int:
        """Facts that are predicted to collapse the model."""
        return sum(fact.predicted for fact in self.facts)

    @property
    def collapsed(self) -> int | None:
        """Facts that did; None if they were not edited."""
        return sum(bool(fact.collapsed) for fact in self.facts) if self.edited else None

    @property
    def verdict(self) -> tuple[str, ...]:
        """What is to be thought of it, a sentence each."""
        count = len(self.facts)
        if self.edited:
            found = (
                f"Edited: {self.collapsed} of {count} edits by ROME collapsed the model, "
                f"{self.predicted} were predicted to; its perplexity was "
                f"{self.original_perplexity:.4g} before"
            )
        else:
            found = (
                f"Predicted, not edited: {self.predicted} of {count} edits by ROME would collapse "
                f"the model, those with a ratio below {RATIO:g} ({CALIBRATED})"
            )
        failed = [] if self.not_edited is None else [f"Could not be edited: {self.not_edited}"]
        doubt = [] if self.doubt is None else [f"But {self.doubt}"]
        return (found, *failed, *doubt, *(f"Left out: {reason}" for reason in self.left_out))

    def panel(self) -> Panel:
        """The facts, and what became of the model."""
        lines = [
            [
                fact.keys.prompt,
                fact.keys.first_token,
                abs(fact.keys.denominator),
                abs(fact.keys.consistent_denominator),
                fact.keys.ratio,
                "collapse" if fact.predicted else "none",
                fact.perplexity,
                None if fact.collapsed is None else "collapsed" if fact.collapsed else "held",
            ]
            for fact in self.facts
        ]
        columns = ["prompt", "first token", "ROME |u.k|", "C-ROME |u.k|", "ratio", "predicted"]
        table = Table(columns=(*columns, "perplexity", "edited"), lines=lines)
        return Panel(
            title=f"ROME on {len(self.facts)} facts, layer {self.layer}",
            parts=[table, *(Note(text=text) for text in self.verdict)],
        )


def forecast(
    study: Study,
    facts: Sequence[Fact] | None = None,
    *,
    original: float | None = None,
    edit: bool = False,
    progress: Progress | None = None,
) -> Forecast:
    """Screen facts by their denominators, and edit them if asked to.

    Args:
        study: The study.
        facts: The facts; None for a dozen built-in ones, half of them with the subject first.
        original: Perplexity of the unedited model, where it is known; None to measure it.
        edit: Whether to make ROME's edits, too, and measure the perplexity after each.
        progress: Where to show progress.

    Raises:
        BadInputError: If no fact can be used with this model's tokenizer.
    """
    chosen, left_out = _usable(study, facts)
    if not chosen:
        raise BadInputError(
            f"no fact can be used with the tokenizer of {study.model.label}: {left_out[0]}"
        )
    screened = screen(study, chosen, progress=progress, total=len(chosen))
    rows = [FactForecast(keys=row) for row in screened]
    if original is None:
        original = study.original_perplexity.mean
    not_edited: str | None = None
    if edit:
        try:
            measured = measure_facts(study, _numbered(chosen), [ROME], progress=progress)
            rows = [
                replace(row, perplexity=case.perplexity, collapsed=case.collapsed)
                for row, case in zip(rows, measured, strict=True)
            ]
        except NonFiniteError as error:
            not_edited = str(error)
    return Forecast(
        layer=study.layer,
        facts=tuple(rows),
        left_out=tuple(left_out),
        original_perplexity=original,
        doubt=_doubt(original, int(study.model.weights.bridge.cfg.d_vocab)),
        not_edited=not_edited,
    )


def choose_facts() -> list[list[Fact]]:
    """The built-in facts in two lists, subject first and subject later, best spread in front."""
    ordered: list[list[Fact]] = []
    for first in (True, False):
        group = [fact for fact in builtin_facts() if fact.template.startswith("{}") == first]
        front = spread_evenly(group, DOZEN // 2)
        ordered.append([*front, *(fact for fact in group if fact not in front)])
    return ordered


def _usable(study: Study, facts: Sequence[Fact] | None) -> tuple[list[Fact], list[str]]:
    """Facts whose tokens can be found in every context, and why others were left out."""
    groups = [list(facts)] if facts is not None else choose_facts()
    most = len(facts) if facts is not None else DOZEN // 2
    chosen: list[Fact] = []
    left_out: list[str] = []
    for group in groups:
        enough = len(chosen) + most
        for fact in group:
            if len(chosen) == enough:
                break
            reason = reason_against(study.model, fact, templates=study.contexts.templates)
            if reason is None:
                chosen.append(fact)
            else:
                left_out.append(f"{fact.subject}: {reason}")
    return chosen, left_out


def _numbered(facts: Sequence[Fact]) -> Sequence[Fact]:
    """The facts, each with a number of its own, by which rows are told apart."""
    if len({fact.case_id for fact in facts}) == len(facts):
        return facts
    return [replace(fact, case_id=number) for number, fact in enumerate(facts)]


def _doubt(perplexity: float, vocabulary: int) -> str | None:
    """Why a model is none that could collapse."""
    if perplexity > COLLAPSE_THRESHOLD:
        bound = f"above {COLLAPSE_THRESHOLD:g} itself, where a model counts as destroyed"
    elif perplexity > GUESSING * vocabulary:
        bound = f"and guessing among its {vocabulary} tokens has {vocabulary}"
    else:
        return None
    return (
        f"the unedited model has a perplexity of {perplexity:,.0f} on these sentences, {bound}: it "
        "is no language model there (random weights, or other text), so nothing can be said to "
        "collapse, and a prediction means nothing"
    )
