"""Schemas of published facts: COUNTERFACT, the flat lists (HardCF, HardEdit, EasyEdit), ZsRE."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from firsttok.data.facts import Fact
from firsttok.data.joints import JOINS, STRADDLES, Join, Straddle
from firsttok.data.records import kind_of
from firsttok.errors import EmptyTargetError, FactFormatError, TemplateError

__all__ = ["fact_from"]

_C = TypeVar("_C")


@dataclass(frozen=True, kw_only=True)
class _Schema:
    """The names of the fields; the first one of each that a record has is read."""

    prompt: tuple[str, ...] = ("prompt",)
    new: tuple[str, ...] = ("target_new",)
    true: tuple[str, ...] = ("target_true", "ground_truth")
    paraphrases: tuple[str, ...] = ("paraphrase_prompts", "rephrase_prompt")
    neighbours: tuple[str, ...] = ("neighborhood_prompts", "locality_prompt")
    answer: tuple[str, ...] = ("neighborhood_answer", "locality_ground_truth")
    lenient: bool = False
    """Whether records that cannot be edited are left out, as the publishers' own loaders do."""


_USUAL = _Schema()
_ZSRE = _Schema(
    prompt=("src",),
    new=("alt",),
    true=("answers",),
    paraphrases=("rephrase",),
    neighbours=("loc",),
    answer=("loc_ans",),
    lenient=True,
)


def fact_from(
    record: Any,
    index: int,
    place: str,
    source: str,
    *,
    join: Join | None = None,
    straddle: Straddle | None = None,
) -> Fact | None:
    """Make a fact of a record.

    A COUNTERFACT record holds ``requested_rewrite``; a flat one holds ``prompt``, ``subject``,
    ``target_new`` and ``ground_truth`` (or ``target_true``) directly; one of ZsRE holds ``src``,
    ``subject``, ``alt`` (the new answer) and ``answers`` (the old one first). A prompt holds ``{}``
    or the subject. Blank paraphrases and neighbours are passed over.

    Args:
        record: The record, as JSON gives it.
        index: Its number in the file, which is its case id unless it has one.
        place: Where it stands, for messages.
        source: What the fact shall say of where it comes from.
        join: The fact's ``join``, whatever the record says; None for the record's, or the usual.
        straddle: As ``join``.

    Returns:
        The fact, or None for a record of ZsRE that cannot be edited: its alternative answer is
        blank, or its question does not hold the subject once.

    Raises:
        FactFormatError: If a field is missing or of a wrong type; names place and field.
        TemplateError: If the prompt does not hold ``{}`` once.
        EmptyTargetError: If a target is empty.
    """
    if not isinstance(record, Mapping):
        raise FactFormatError(
            f"{place} is not an object but {kind_of(record)}; see COUNTERFACT's schema"
        )
    fields = cast(Mapping[str, Any], record)
    schema = _ZSRE if "src" in fields else _USUAL
    rewrite = fields.get("requested_rewrite", fields)
    if not isinstance(rewrite, Mapping):
        raise FactFormatError(
            f"{place}, field requested_rewrite is not an object but {kind_of(rewrite)}; mend it"
        )
    rewrite = cast(Mapping[str, Any], rewrite)
    subject = _text(rewrite, ("subject",), place)
    template = _template(_text(rewrite, schema.prompt, place), subject.strip())
    new = _text(rewrite, schema.new, place).strip()
    true = _text(rewrite, schema.true, place).strip()
    paraphrases = _texts(fields, schema.paraphrases, place)
    neighbours = _texts(fields, schema.neighbours, place)
    answer = _answer(fields, schema.answer, place)
    case_id = fields.get("case_id", index)
    if not isinstance(case_id, int) or isinstance(case_id, bool):
        shown = case_id if isinstance(case_id, float) else kind_of(case_id)
        raise FactFormatError(f"{place}, field case_id is {shown}; it should be a whole number")
    if schema.lenient and (not new or template.count("{}") != 1):
        return None
    try:
        return Fact(
            subject=subject,
            template=template,
            target_new=new,
            target_true=true,
            paraphrases=paraphrases,
            # Without an answer to the neighbour there is nothing to measure there.
            neighbours=() if answer == "" else neighbours,
            source=source,
            case_id=case_id,
            neighbour_answer=answer if neighbours and answer and answer != true else "",
            join=join or _choice(fields, "join", JOINS, place),
            straddle=straddle or _choice(fields, "straddle", STRADDLES, place),
        )
    except TemplateError as error:
        raise TemplateError(f"{place}, field {schema.prompt[0]}: {error}") from None
    except EmptyTargetError as error:
        raise EmptyTargetError(f"{place}, field {_blank(schema, new)}: {error}") from None
    except FactFormatError as error:
        raise FactFormatError(f"{place}, field subject: {error}") from None


def _template(prompt: str, subject: str) -> str:
    """The prompt with ``{}`` for its subject, if that stands there once (as a whole word)."""
    if "{}" in prompt or not subject.strip():
        return prompt
    if prompt.count(subject) == 1:
        return prompt.replace(subject, "{}")
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt))
    if len(whole) != 1:
        return prompt
    return prompt[: whole[0].start()] + "{}" + prompt[whole[0].end() :]


def _text(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> str:
    name, value = _first(fields, names)
    if name is None:
        raise FactFormatError(f"{place} has no field {names[0]}; add it")
    if isinstance(value, Mapping):
        value = cast(Mapping[str, Any], value).get("str")
        name = f"{name}.str"
    elif name == "answers" and isinstance(value, list):
        value = next(iter(cast(list[Any], value)), None)
    return _checked(value, name, place)


def _texts(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> tuple[str, ...]:
    name, value = _first(fields, names)
    if name is None:
        return ()
    if not isinstance(value, str | list):
        raise FactFormatError(
            f"{place}, field {name} is not a list of texts but {kind_of(value)}; mend it"
        )
    items = cast(list[Any], [value] if isinstance(value, str) else value)
    texts = [_checked(item, f"{name}[{i}]", place) for i, item in enumerate(items)]
    return tuple(text for text in texts if text.strip())


def _answer(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> str | None:
    """The neighbours' own answer, None where the schema gives none."""
    name, _ = _first(fields, names)
    if name is None:
        return None
    answers = {text.strip() for text in _texts(fields, names, place)}
    if len(answers) > 1:
        raise FactFormatError(
            f"{place}, field {name} holds {len(answers)} different answers; give one for all "
            "neighbours"
        )
    return next(iter(answers), "")


def _choice(fields: Mapping[str, Any], name: str, choices: tuple[_C, ...], place: str) -> _C:
    """One of some choices, the first where the record says nothing."""
    value = fields.get(name, choices[0])
    if value not in choices:
        raise FactFormatError(
            f"{place}, field {name} is {value!r}; choose one of {', '.join(map(str, choices))}"
        )
    return value


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str | None, Any]:
    return next(((name, fields[name]) for name in names if name in fields), (None, None))


def _checked(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise FactFormatError(f"{place}, field {name} is not a text but {kind_of(value)}; mend it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FactFormatError(
            f"{place}, field {name} holds half a character (a lone surrogate); mend it"
        ) from None
    return value


def _blank(schema: _Schema, new: str) -> str:
    return schema.true[0] if new else schema.new[0]
