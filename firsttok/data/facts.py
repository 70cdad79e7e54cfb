"""What a fact is, and the built-in ones."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from firsttok.arguments import take_fields
from firsttok.display import Panel, Shown, Table
from firsttok.errors import EmptyTargetError, FactFormatError, TemplateError
from firsttok.storage import content_hash

__all__ = ["Fact", "builtin_records"]


@dataclass(frozen=True, kw_only=True)
class Fact(Shown):
    """One fact to edit: ``(subject, relation, target_true)`` becomes ``(..., target_new)``.

    Raises:
        TemplateError: If the template does not hold exactly one ``{}``.
        EmptyTargetError: If a target is empty.
        FactFormatError: If the subject is empty.
    """

    subject: str
    """What the fact is about."""
    template: str
    """The prompt with ``{}`` where the subject goes; it ends where the target follows."""
    target_new: str
    """What the edited model shall answer, without a leading space."""
    target_true: str
    """What the model answers before the edit, without a leading space."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings, with the subject written in (COUNTERFACT's ``paraphrase_prompts``)."""
    neighbours: tuple[str, ...] = ()
    """Prompts about other subjects, whose answer is :attr:`neighbour_target`."""
    source: str = "python"
    """Where the record comes from."""
    case_id: int = 0
    """The number of the record in its set."""
    neighbour_answer: str = ""
    """The neighbours' answer where it is another one (ZsRE); empty where it is ``target_true``."""

    def __post_init__(self) -> None:
        """Check what cannot be mended later."""
        take_fields(self)
        if self.template.count("{}") != 1:
            raise TemplateError(
                f"template {self.template!r} holds {self.template.count('{}')} times '{{}}'; "
                "write '{}' exactly once, where the subject goes"
            )
        if not self.subject.strip():
            raise FactFormatError(f"the subject of {self.template!r} is empty; name one")
        for field in ("target_new", "target_true"):
            if not getattr(self, field).strip():
                raise EmptyTargetError(
                    f"{field} of {self.prompt!r} is empty; give at least one word"
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
            ["true target", self.target_true],
            ["paraphrases", len(self.paraphrases)],
            ["neighbours", len(self.neighbours)],
        ]
        return Panel(
            title=self.prompt,
            parts=[Table(columns=("", "value"), lines=lines)],
            source={"": self.source, "case": self.case_id},
        )

    @property
    def neighbour_target(self) -> str:
        """What the model answers to the neighbours before the edit."""
        return self.neighbour_answer or self.target_true

    def as_record(self) -> dict[str, Any]:
        """The fact in COUNTERFACT's schema, with ``neighborhood_answer`` where it has its own."""
        record: dict[str, Any] = {
            "case_id": self.case_id,
            "requested_rewrite": {
                "prompt": self.template,
                "target_new": {"str": self.target_new},
                "target_true": {"str": self.target_true},
                "subject": self.subject,
            },
            "paraphrase_prompts": list(self.paraphrases),
            "neighborhood_prompts": list(self.neighbours),
        }
        if self.neighbour_answer:
            # Not in every record: cached results are found by the hash of this one.
            record["neighborhood_answer"] = self.neighbour_answer
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
