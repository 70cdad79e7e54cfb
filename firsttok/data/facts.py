"""What a fact is."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from firsttok.arguments import take_fields
from firsttok.data.joints import JOINS, STRADDLES, Join, Straddle
from firsttok.display import Panel, Shown, Table
from firsttok.errors import EmptyTargetError, FactFormatError, TemplateError
from firsttok.storage import content_hash

__all__ = ["CHOICES", "LARGEST", "Fact", "check_choice", "spread_evenly"]

logger = logging.getLogger(__name__)
_Item = TypeVar("_Item")

_UNSEEN = (
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
    "\u2060\u2061\u2062\u2063\u2064\u2065\u2066\u2067\u2068\u2069\u2800\u3164\ufeff\uffa0"
)
"""Characters that show nothing; joiners are not among them, since letters and emoji need them."""
_BOUND = "\u00a0\u202f"
"""Spaces at which no line is broken."""
_SPACES = f" {_BOUND}\u205f{''.join(map(chr, range(0x2000, 0x200B)))}{_UNSEEN}"
"""What is left out at the ends of a prompt: line ends and tabs there are meant."""
_AROUND_WORDS = "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + _UNSEEN
_TYPED = ("python", "command line")
"""Sources that are told at once; a file is read many times, and its reader counts."""
LARGEST = 2**63
"""Case ids are columns of 64 bits in the rows of a sweep."""
CHOICES: dict[str, tuple[str, ...]] = {"join": JOINS, "straddle": STRADDLES}
"""Fields of a fact with their values, the usual one first."""


@dataclass(frozen=True, kw_only=True)
class Fact(Shown):
    """One fact to edit: ``(subject, relation, target_true)`` becomes ``(..., target_new)``.

    White space and invisible characters at the ends of the subject are left out with a warning,
    since the subject's last token would be a bare space. So are spaces and invisible characters at
    the ends of prompts and targets, since the target would follow two. With ``join="none"`` prompts
    and targets stay as given.

    An edit needs no old answer. Without ``target_true``, what compares with it is not measured: the
    scores of the rewriting prompt and the paraphrases, and the neighbours that have no own answer.

    Raises:
        TemplateError: If the template does not hold exactly one ``{}``.
        EmptyTargetError: If the new target is empty.
        FactFormatError: If the subject is empty, the case id has more than 64 bits, neighbours and
            their answers differ in number, or ``join`` or ``straddle`` is none of its choices.
        BadInputError: If a field is no text, or one that is not UTF-8.
    """

    subject: str
    template: str
    """The prompt with ``{}`` where the subject goes; it ends where the target follows."""
    target_new: str
    """What the edited model shall answer, without a leading space."""
    target_true: str = ""
    """What the model answers before the edit, without a leading space; empty if unknown."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings, with the subject written in (COUNTERFACT's ``paraphrase_prompts``)."""
    neighbours: tuple[str, ...] = ()
    """Prompts whose answers the edit should not change."""
    source: str = "python"
    case_id: int = 0
    neighbour_answers: tuple[str, ...] = ()
    """One answer for each neighbour (ZsRE, KnowEdit, QAEdit), ``""`` for one that is not known;
    empty where all are ``target_true`` (COUNTERFACT)."""
    join: Join = "auto"
    """What stands between a prompt and its target (:func:`~firsttok.data.joints.text_joint`)."""
    straddle: Straddle = "refuse"
    """Where a token holds the subject's end and a mark after it (``F.C.'s``): refuse the prompt,
    or look that ``token`` up, as the released code does."""
    notice: str = field(default="", init=False, compare=False, repr=False)
    """What was left out of the texts as they were given; empty if nothing was."""

    def __post_init__(self) -> None:
        take_fields(self)
        for name in CHOICES:
            check_choice(name, getattr(self, name), f"{name} of {self.template!r}")
        self._tidy()
        if self.template.count("{}") != 1:
            raise TemplateError(
                f"template {self.template!r} holds {self.template.count('{}')} times '{{}}'; "
                "write '{}' exactly once, where the subject goes"
            )
        if not self.subject.strip():
            raise FactFormatError(f"the subject of {self.template!r} is empty; name one")
        if not self.target_new.strip():
            raise EmptyTargetError(
                f"target_new of {self.prompt!r} is empty; give at least one word"
            )
        if not -LARGEST <= self.case_id < LARGEST:
            raise FactFormatError(
                f"the case_id of {self.prompt!r} has more than 64 bits; give a smaller number"
            )
        if len(self.neighbour_answers) not in (0, len(self.neighbours)):
            raise FactFormatError(
                f"{self.prompt!r} has {len(self.neighbours)} neighbours and "
                f"{len(self.neighbour_answers)} answers to them; give one for each, or none"
            )

    def _tidy(self) -> None:
        subject = self.subject.strip(_AROUND_WORDS)
        changes: dict[str, str | tuple[str, ...]] = {"subject": subject}
        if self.join != "none":
            changes["template"] = _tidied(self.template)
            for name in ("paraphrases", "neighbours"):
                texts: tuple[str, ...] = getattr(self, name)
                changes[name] = tuple(map(_tidied, texts))
            for name in ("target_new", "target_true"):
                changes[name] = _tidied_target(getattr(self, name))
            changes["neighbour_answers"] = tuple(map(_tidied_target, self.neighbour_answers))
        stray = [name for name, value in changes.items() if value != getattr(self, name)]
        if not stray:
            return
        before, _, after = self.template.partition("{}")
        if subject and (
            (before[-1:].isalnum() and not self.subject.startswith(subject))
            or (after[:1].isalnum() and not self.subject.endswith(subject))
        ):
            raise FactFormatError(
                f"subject {self.subject!r} brings the space that {self.template!r} lacks; write "
                "that space in the template"
            )
        notice = (
            f"{self.prompt!r}: spaces or invisible characters at the ends of {', '.join(stray)} "
            "are left out"
        )
        for name, value in {**changes, "notice": notice}.items():
            object.__setattr__(self, name, value)
        if self.source in _TYPED:
            logger.warning("%s", notice)

    @property
    def prompt(self) -> str:
        """The template with the subject written in."""
        return self.template.replace("{}", self.subject)

    def panel(self) -> Panel:
        """The prompt with both answers, and what belongs to it."""
        lines = [
            ["subject", self.subject],
            ["new target", self.target_new],
            ["true target", self.target_true or None],
            ["paraphrases", len(self.paraphrases)],
            ["neighbours", len(self.neighbours)],
        ]
        return Panel(
            title=self.prompt,
            parts=[Table(columns=("", "value"), lines=lines)],
            source={"": self.source, "case": self.case_id, "left out": self.notice},
        )

    @property
    def answered_neighbours(self) -> tuple[tuple[str, str], ...]:
        """Each neighbour with the answer to it; without those whose answer is not known."""
        answers = self.neighbour_answers or (self.target_true,) * len(self.neighbours)
        pairs = zip(self.neighbours, answers, strict=True)
        return tuple((prompt, answer) for prompt, answer in pairs if answer.strip())

    def as_record(self) -> dict[str, Any]:
        """The fact in COUNTERFACT's schema.

        It has no ``target_true`` where that is not known, and ``neighborhood_answer`` (a text, or a
        list with one for each) where the neighbours have answers of their own.
        """
        rewrite: dict[str, Any] = {
            "prompt": self.template,
            "target_new": {"str": self.target_new},
            "subject": self.subject,
        }
        record: dict[str, Any] = {
            "case_id": self.case_id,
            "requested_rewrite": rewrite,
            "paraphrase_prompts": list(self.paraphrases),
            "neighborhood_prompts": list(self.neighbours),
        }
        # Not in every record: cached results are found by the hash of this one.
        if self.target_true:
            rewrite["target_true"] = {"str": self.target_true}
        if self.neighbour_answers:
            same = len(set(self.neighbour_answers)) == 1
            record["neighborhood_answer"] = (
                self.neighbour_answers[0] if same else list(self.neighbour_answers)
            )
        chosen = {name: getattr(self, name) for name in CHOICES}
        return record | {n: value for n, value in chosen.items() if value != CHOICES[n][0]}

    @property
    def content_hash(self) -> str:
        """SHA-256 of the record."""
        return content_hash(self.as_record())


def _tidied(prompt: str) -> str:
    """A prompt without stray characters at its ends."""
    begun = prompt.lstrip(_SPACES)
    kept = begun.rstrip(_SPACES)
    behind = begun[len(kept) : len(kept) + 1]
    # French puts a no-break space between an opening quote and its word.
    return kept + behind if kept.endswith(("\u00ab", "\u2039")) and behind in _BOUND else kept


def _tidied_target(target: str) -> str:
    """A target without stray characters at its ends; white space alone counts for nothing there."""
    tidied = target.strip(_AROUND_WORDS)
    return target if tidied == target.strip() else tidied


def check_choice(name: str, value: Any, what: str) -> None:
    """Refuse a value that is none of the field's :data:`CHOICES`; the message calls it ``what``."""
    if value not in CHOICES[name]:
        raise FactFormatError(f"{what} is {value!r}; choose one of {', '.join(CHOICES[name])}")


def spread_evenly(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` items, evenly over a list."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
