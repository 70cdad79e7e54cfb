"""Schemas of published facts: COUNTERFACT, ZsRE, KnowEdit, MQuAKE, QAEdit and the flat lists."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from firsttok.data.facts import CHOICES, Fact, check_choice
from firsttok.data.joints import Join, Straddle
from firsttok.data.records import kind_of
from firsttok.errors import EmptyTargetError, FactFormatError, TemplateError

__all__ = ["fact_from", "rewrites_of"]

_SUBJECT = ("subject", "concept")
_PROMPT = ("prompt", "src", "text")
_NEW = ("target_new", "target_false", "alt", "target", "labels")
_TRUE = ("target_true", "ground_truth", "answers")
_PARAPHRASES = ("paraphrase_prompts", "rephrase_prompt", "rephrase_prompts", "rephrase")
_NEIGHBOURS = ("neighborhood_prompts", "locality_prompt", "loc", "locality")
_ANSWER = ("neighborhood_answer", "locality_ground_truth", "loc_ans")
_NESTED_PROMPT = ("prompt", "loc", "question")
_NESTED_ANSWER = ("ground_truth", "loc_ans", "target", "answer")
"""Names of a field in the schemas; the first one that a record has, and that is not null, is read.
"""


def rewrites_of(record: Any, place: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Take a record apart into edits; a record of MQuAKE holds several.

    Returns:
        For each edit where it stands and a record of its own, for :func:`fact_from`. The chain of
        questions that joins MQuAKE's rewrites is left out, since nothing here measures it.

    Raises:
        FactFormatError: If the record is no object, or its rewrites are none.
    """
    if not isinstance(record, Mapping):
        raise FactFormatError(
            f"{place} is not an object but {kind_of(record)}; see COUNTERFACT's schema"
        )
    rewrites = record.get("requested_rewrite", record)
    if not isinstance(rewrites, list):
        return [(place, record)]
    if not rewrites:
        raise FactFormatError(f"{place}, field requested_rewrite is empty; give a rewrite")
    # The number is that of the whole chain, so none of its rewrites has it to itself.
    found: list[tuple[str, Mapping[str, Any]]] = []
    for number, rewrite in enumerate(rewrites):
        question = rewrite.get("question") if isinstance(rewrite, Mapping) else None
        parts = {"requested_rewrite": rewrite, "paraphrase_prompts": question}
        found.append((f"{place}, rewrite {number}", parts))
    return found


def fact_from(
    fields: Mapping[str, Any],
    number: int,
    place: str,
    source: str,
    *,
    join: Join | None = None,
    straddle: Straddle | None = None,
) -> Fact | None:
    """Make a fact of a record.

    A COUNTERFACT record holds ``requested_rewrite``; a flat one (HardCF, HardEdit, KnowEdit,
    QAEdit, EasyEdit) holds ``prompt``, ``subject``, ``target_new`` and perhaps ``ground_truth``
    directly; one of ZsRE holds ``src``, ``subject``, ``alt`` (the new answer) and ``answers`` (the
    old one first). A prompt holds ``{}`` or the subject. The old answer may be lacking; of a list,
    which is one of aliases, the first is taken. Blank paraphrases and neighbours are passed over.
    KnowEdit's and QAEdit's ``locality`` is read as neighbours, whatever its kinds.

    The fact gets the case id ``number`` and the ``source``; ``join`` and ``straddle`` hold whatever
    the record says. Messages call its place ``place``.

    Returns:
        The fact, or None for a record of ZsRE that cannot be edited: its alternative answer is
        blank, or its question does not hold the subject once.

    Raises:
        FactFormatError: If a field is missing or of a wrong type; names place and field.
        TemplateError: If the prompt does not hold ``{}`` once.
        EmptyTargetError: If the new target is empty.
    """
    rewrite = fields.get("requested_rewrite", fields)
    if not isinstance(rewrite, Mapping):
        raise _not_a("an object", rewrite, "requested_rewrite", place)
    subject = _checked(*_needed(rewrite, _SUBJECT, place), place)
    prompt_name, value = _needed(rewrite, _PROMPT, place)
    prompt = _checked(prompt_name, value, place)
    new_name, new = _new_answer(rewrite, place)
    true = next(_aliases(*_first(rewrite, _TRUE), place, strict=False), "")
    paraphrases = tuple(text for text in _texts(*_first(fields, _PARAPHRASES), place) if text)
    neighbours = _neighbours(fields, true, place)
    template = _template(prompt, subject.strip())
    own_join: Join = join or _choice(fields, "join", place)
    own_straddle: Straddle = straddle or _choice(fields, "straddle", place)
    if own_join != "none":
        new, true = new.strip(), true.strip()
        neighbours = [(text, answer.strip()) for text, answer in neighbours]
    if prompt_name == "src" and (not new or template.count("{}") != 1):
        return None
    try:
        return Fact(
            subject=subject,
            template=template,
            target_new=new,
            target_true=true,
            paraphrases=paraphrases,
            neighbours=tuple(text for text, _ in neighbours),
            source=source,
            case_id=number,
            neighbour_answers=()
            if all(answer == true for _, answer in neighbours)
            else tuple(answer for _, answer in neighbours),
            join=own_join,
            straddle=own_straddle,
        )
    except (TemplateError, EmptyTargetError, FactFormatError) as error:
        name, held = new_name if isinstance(error, EmptyTargetError) else "subject", ""
        if isinstance(error, TemplateError):
            name = prompt_name
            held = f" (it holds the subject {prompt.count(subject)} times)" if subject else ""
        raise type(error)(f"{place}, field {name}: {error}{held}") from None


def _template(prompt: str, subject: str) -> str:
    """The prompt with ``{}`` for its subject, if that stands there once (as a whole word)."""
    if "{}" in prompt or not subject.strip():
        return prompt
    if prompt.count(subject) == 1:
        return prompt.replace(subject, "{}")
    whole, count = re.subn(rf"(?<!\w){re.escape(subject)}(?!\w)", "{}", prompt)
    return whole if count == 1 else prompt


def _new_answer(rewrite: Mapping[str, Any], place: str) -> tuple[str, str]:
    """The name of the field, and the answer; a list of several does not say which to write."""
    name, value = _needed(rewrite, _NEW, place)
    answers = list(_aliases(name, value, place, strict=True))
    if len({answer.strip() for answer in answers}) > 1:
        raise FactFormatError(
            f"{place}, field {name} holds {len(answers)} different answers; give the one to write"
        )
    return name, answers[0] if answers else ""


def _aliases(name: str, value: Any, place: str, *, strict: bool) -> Iterator[str]:
    """The texts of an answer that are not blank: a text, ``{"str": text}``, or lists of such."""
    if isinstance(value, Mapping):
        name, value = f"{name}.str", value.get("str")
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _aliases(f"{name}[{number}]", item, place, strict=strict)
    elif (strict or value is not None) and (text := _checked(name, value, place)).strip():
        yield text


def _neighbours(fields: Mapping[str, Any], true: str, place: str) -> list[tuple[str, str]]:
    """Prompts with their answers, ``""`` for one that is not known."""
    name, value = _first(fields, _NEIGHBOURS)
    items = _listed(value)
    if any(isinstance(item, Mapping) for item in items):
        return [pair for item in items for pair in _nested(name, item, place)]
    texts = _texts(name, value, place)
    answer_name, answer = _first(fields, _ANSWER)
    if answer is None or not texts:
        return [(text, true) for text in texts if text]
    answers = [
        next(_aliases(answer_name, each, place, strict=False), "") for each in _listed(answer)
    ]
    if len(set(answers)) == 1:
        answers = answers[:1] * len(texts)
    if answers and len(answers) != len(texts):
        raise FactFormatError(
            f"{place}, field {answer_name} holds {len(answers)} different answers to {len(texts)} "
            "neighbours; give one for each, or one for all"
        )
    pairs = zip(texts, answers or [""] * len(texts), strict=True)
    return [(text, answer) for text, answer in pairs if text]


def _nested(name: str, value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Pairs in lists of objects, or in such lists by kind (``Relation_Specificity``)."""
    if value is None:
        return
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _nested(f"{name}[{number}]", item, place)
        return
    if not isinstance(value, Mapping):
        raise _not_a("an object with prompt and answer", value, name, place)
    prompt_name, prompts = _first(value, _NESTED_PROMPT)
    if prompts is None:
        for kind, inner in value.items():
            yield from _nested(f"{name}.{kind}", inner, place)
        return
    answer_name, answers = _first(value, _NESTED_ANSWER)
    each = _listed(prompts)
    apart = len(each) > 1 and isinstance(answers, list) and len(answers) == len(each)
    for number, prompt in enumerate(each):
        text = _checked(f"{name}.{prompt_name}", prompt, place)
        found = answers[number] if apart else answers
        answer = next(_aliases(f"{name}.{answer_name}", found, place, strict=False), "")
        if text.strip():
            yield text, answer


def _texts(name: str, value: Any, place: str) -> tuple[str, ...]:
    """A text or a list of texts; what is blank or null in it becomes ``""``."""
    if value is None:
        return ()
    if not isinstance(value, str | list):
        raise _not_a("a list of texts", value, name, place)
    items = enumerate(_listed(value))
    texts = ("" if item is None else _checked(f"{name}[{i}]", item, place) for i, item in items)
    return tuple(text if text.strip() else "" for text in texts)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _choice(fields: Mapping[str, Any], name: str, place: str) -> Any:
    given = fields.get(name)
    value = CHOICES[name][0] if given is None else given
    check_choice(name, value, f"{place}, field {name}")
    return value


def _needed(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> tuple[str, Any]:
    """As :func:`_first`, of a field that no record may lack."""
    name, value = _first(fields, names)
    if name not in fields:
        raise FactFormatError(f"{place} has no field {name}; add it")
    return name, value


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first field that is there and not null; the first name, and null, if there is none."""
    here = [name for name in names if name in fields]
    name = next((name for name in here if fields[name] is not None), (*here, names[0])[0])
    return name, fields.get(name)


def _checked(name: str, value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _not_a("a text", value, name, place)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FactFormatError(
            f"{place}, field {name} holds half a character (a lone surrogate); correct it"
        ) from None
    return value


def _not_a(wanted: str, value: Any, name: str, place: str) -> FactFormatError:
    return FactFormatError(
        f"{place}, field {name} is not {wanted} but {kind_of(value)}; correct it"
    )
