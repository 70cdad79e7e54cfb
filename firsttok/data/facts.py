"""What a fact is, and the built-in ones."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from firsttok.display import Panel, Shown, Table
from firsttok.errors import EmptyTargetError, FactFormatError, TemplateError
from firsttok.storage import content_hash

__all__ = ["Fact", "builtin_records"]

_LARGEST = 2**63
"""Case ids are columns of 64 bits in the rows of a sweep."""


@dataclass(frozen=True, kw_only=True)
class Fact(Shown):
    """One fact to edit: ``(subject, relation, target_true)`` becomes ``(..., target_new)``.

    An edit needs no old answer. Without ``target_true``, what compares with it is not measured: the
    scores of the rewriting prompt and the paraphrases, and the neighbours that have no own answer.

    Raises:
        TemplateError: If the template does not hold exactly one ``{}``.
        EmptyTargetError: If the new target is empty.
        FactFormatError: If the subject is empty, the case id has more than 64 bits, or neighbours
            and their answers differ in number.
    """

    subject: str
    """What the fact is about."""
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
    """Where the record comes from."""
    case_id: int = 0
    """The number of the record in its set."""
    neighbour_answers: tuple[str, ...] = ()
    """One answer for each neighbour (ZsRE, KnowEdit, QAEdit), ``""`` for one that is not known;
    empty where all are ``target_true`` (COUNTERFACT)."""

    def __post_init__(self) -> None:
        """Check what cannot be mended later."""
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
        if not -_LARGEST <= self.case_id < _LARGEST:
            raise FactFormatError(
                f"the case_id of {self.prompt!r} has more than 64 bits; give a smaller number"
            )
        if len(self.neighbour_answers) not in (0, len(self.neighbours)):
            raise FactFormatError(
                f"{self.prompt!r} has {len(self.neighbours)} neighbours and "
                f"{len(self.neighbour_answers)} answers to them; give one for each, or none"
            )

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
            source={"": self.source, "case": self.case_id},
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
        return record

    @property
    def content_hash(self) -> str:
        """SHA-256 of the record."""
        return content_hash(self.as_record())


def builtin_records() -> list[Any]:
    """Return the records of the built-in facts."""
    text = resources.files("firsttok.data.builtin").joinpath("facts.json").read_text("utf-8")
    records: list[Any] = json.loads(text)
    return records
