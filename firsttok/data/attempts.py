"""Every edit that a file of facts asks for, whether it can be read or not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firsttok.data.facts import LARGEST, Fact
from firsttok.data.joints import Join, Straddle
from firsttok.data.records import builtin_json, iter_records
from firsttok.data.schemas import fact_from, rewrites_of
from firsttok.errors import BadInputError

__all__ = ["Attempt", "attempts"]

_LENIENT = "its new answer is blank, or its question does not hold the subject once"
_EXACT = 2**53


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What came of one edit that a file asks for."""

    place: str
    fact: Fact | None = None
    own: int | None = None
    """The file's own number of it, which is its case id."""
    odd: str = ""
    """Why the file's own number cannot be used."""
    reason: str = ""
    """Why there is no fact."""
    error: BadInputError | None = None
    """What is raised unless bad records are skipped."""


def attempts(
    path: Path | None, *, join: Join | None = None, straddle: Straddle | None = None
) -> Iterator[Attempt]:
    """Read every edit that a file asks for, in order; a record of MQuAKE asks for several.

    The arguments are as in :class:`~firsttok.data.fact_files.FactFile`.

    Raises:
        BadInputError: If the file itself cannot be read; what a record lacks is in its attempt.
    """
    if path is None:
        records = ((f"record {i}", each) for i, each in enumerate(builtin_json("facts.json")))
    else:
        records = iter_records(path)
    source = "built-in" if path is None else path.name
    number = 0
    for place, record in records:
        try:
            if isinstance(record, BadInputError):
                raise record
            parts = rewrites_of(record, place)
        except BadInputError as error:
            yield _failed(path, place, error)
            number += 1
            continue
        for part_place, fields in parts:
            own, odd = _own_number(fields.get("case_id"), _short(path, part_place))
            case_id = number if own is None else own
            number += 1
            try:
                fact = fact_from(fields, case_id, part_place, source, join=join, straddle=straddle)
            except BadInputError as error:
                yield _failed(path, part_place, error)
                continue
            reason = _LENIENT if fact is None else ""
            where = _short(path, part_place)
            yield Attempt(place=where, fact=fact, own=own, odd=odd, reason=reason)


def _failed(path: Path | None, place: str, error: BadInputError) -> Attempt:
    reason = str(error).removeprefix(place).removeprefix(str(path)).lstrip(", ")
    return Attempt(place=_short(path, place), reason=reason, error=error)


def _short(path: Path | None, place: str) -> str:
    return place.removeprefix(f"{path}, ")


def _own_number(value: Any, place: str) -> tuple[int | None, str]:
    """A record's case id, or why it cannot be used; neither if it has none."""
    if value is None:
        return None, ""
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        # As pandas writes whole numbers of which some are missing.
        value = int(value)
    if isinstance(value, str) and re.fullmatch("0|[1-9][0-9]*", value):
        value = int(value[:20])
    if isinstance(value, bool) or not isinstance(value, int):
        return None, f"{place} has the case_id {str(value)[:40]!r}, which is no whole number"
    if not -LARGEST <= value < LARGEST:
        return None, f"{place} has a case_id of more than 64 bits"
    return value, ""
