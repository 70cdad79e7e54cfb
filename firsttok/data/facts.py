"""Facts in COUNTERFACT's JSON schema, and the built-in set."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from firsttok.errors import EmptyTargetError, FactFormatError, TemplateError
from firsttok.storage import content_hash, read_json

__all__ = ["Fact", "builtin_facts", "load_facts"]


@dataclass(frozen=True, kw_only=True)
class Fact:
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
    """Prompts about other subjects whose answer is ``target_true``."""
    source: str = "python"
    """Where the record comes from."""
    case_id: int = 0
    """The number of the record in its set."""

    def __post_init__(self) -> None:
        """Check what cannot be mended later."""
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

    def as_record(self) -> dict[str, Any]:
        """The fact in COUNTERFACT's schema."""
        return {
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

    @property
    def content_hash(self) -> str:
        """SHA-256 of the record."""
        return content_hash(self.as_record())


def load_facts(path: str | Path) -> tuple[Fact, ...]:
    """Read facts from a JSON list, in COUNTERFACT's schema or the flat one of HardCF and HardEdit.

    A COUNTERFACT record holds ``requested_rewrite``; a flat one holds ``prompt``, ``subject``,
    ``target_new`` and ``ground_truth`` (or ``target_true``) directly, the prompt with ``{}`` or
    with the subject written in.

    Raises:
        BadInputError: If the file is missing or not JSON.
        FactFormatError: If a record is malformed or the set is empty; names file, record, field.
    """
    path = Path(path)
    content = read_json(path, "facts")
    if not isinstance(content, list):
        raise FactFormatError(
            f"{path} holds a JSON {type(content).__name__}; it should hold a list of facts"
        )
    records = cast(list[Any], content)
    if not records:
        raise FactFormatError(f"{path} holds no facts; give at least one")
    facts = tuple(
        _fact_from(record, index, str(path), path.name) for index, record in enumerate(records)
    )
    _check_distinct(facts, str(path))
    return facts


def builtin_facts() -> tuple[Fact, ...]:
    """Return the built-in facts, which the embedded model answers rightly or nearly so."""
    text = resources.files("firsttok.data.builtin").joinpath("facts.json").read_text("utf-8")
    return tuple(
        _fact_from(record, index, "the built-in facts", "built-in")
        for index, record in enumerate(json.loads(text))
    )


def _fact_from(record: Any, index: int, where: str, source: str) -> Fact:
    place = f"{where}, record {index}"
    if not isinstance(record, Mapping):
        raise FactFormatError(f"{place} is not an object; see COUNTERFACT's schema")
    fields = cast(Mapping[str, Any], record)
    rewrite = fields.get("requested_rewrite", fields)
    if not isinstance(rewrite, Mapping):
        raise FactFormatError(f"{place}, field requested_rewrite is not an object")
    rewrite = cast(Mapping[str, Any], rewrite)
    subject = _text(rewrite, ("subject",), place)
    template = _text(rewrite, ("prompt",), place)
    if "{}" not in template and template.count(subject) == 1:
        template = template.replace(subject, "{}")
    case_id = fields.get("case_id", index)
    if not isinstance(case_id, int) or isinstance(case_id, bool):
        raise FactFormatError(f"{place}, field case_id is {case_id!r}; it should be a whole number")
    try:
        return Fact(
            subject=subject,
            template=template,
            target_new=_text(rewrite, ("target_new",), place).strip(),
            target_true=_text(rewrite, ("target_true", "ground_truth"), place).strip(),
            paraphrases=_texts(fields, ("paraphrase_prompts", "rephrase_prompt"), place),
            neighbours=_texts(fields, ("neighborhood_prompts", "locality_prompt"), place),
            source=source,
            case_id=case_id,
        )
    except (TemplateError, EmptyTargetError, FactFormatError) as error:
        raise type(error)(f"{place}: {error}") from None


def _text(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> str:
    for name in names:
        if name in fields:
            value: Any = fields[name]
            if isinstance(value, Mapping):
                value = cast(Mapping[str, Any], value).get("str")
            if not isinstance(value, str):
                raise FactFormatError(f"{place}, field {name} is not a text")
            return value
    raise FactFormatError(f"{place} has no field {names[0]}")


def _texts(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> tuple[str, ...]:
    for name in names:
        if name in fields:
            value = fields[name]
            if isinstance(value, str):
                return (value,)
            if not isinstance(value, list):
                raise FactFormatError(f"{place}, field {name} is not a list of texts")
            items = cast(list[Any], value)
            if not all(isinstance(item, str) for item in items):
                raise FactFormatError(f"{place}, field {name} is not a list of texts")
            return tuple(cast(list[str], items))
    return ()


def _check_distinct(facts: tuple[Fact, ...], where: str) -> None:
    seen: set[int] = set()
    for index, fact in enumerate(facts):
        if fact.case_id in seen:
            raise FactFormatError(
                f"{where}, record {index}, field case_id repeats {fact.case_id}; number each once"
            )
        seen.add(fact.case_id)
