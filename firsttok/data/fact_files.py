"""Files of facts, checked as a whole before any work starts, then read as a stream."""

import gzip
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firsttok.arguments import taken
from firsttok.data.facts import LARGEST, Fact
from firsttok.data.joints import Join, Straddle
from firsttok.data.records import LINES, builtin_json, iter_records, plain_suffix
from firsttok.data.schemas import fact_from, rewrites_of
from firsttok.errors import BadInputError, FactFormatError
from firsttok.storage import atomic_path

__all__ = [
    "SKIP_HINT",
    "FactFile",
    "LeftOut",
    "builtin_facts",
    "check_facts",
    "load_facts",
    "write_facts",
]

logger = logging.getLogger(__name__)

SKIP_HINT = "; --skip-bad (in Python skip_bad=True) leaves out what cannot be used"
"""What a refusal of one fact ends with."""
_DIFFERING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
"""What differs between two reasons of one kind: what they quote, and numbers."""
_SHOWN = 5
"""Reasons that are logged; records have all."""
_LENIENT = "its new answer is blank, or its question does not hold the subject once"
_EXACT = 2**53


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Facts that are not used, for one reason."""

    reason: str
    """What it quotes, and its numbers, are those of the first such fact."""
    count: int
    first: str
    """Where the first one stands."""

    @staticmethod
    def grouped(refused: Iterable[tuple[str, str]]) -> "tuple[LeftOut, ...]":
        """Group pairs of reason and place by what reasons do not quote, the most frequent first."""
        groups: dict[str, LeftOut] = {}
        for reason, place in refused:
            kind = _DIFFERING.sub("", reason)
            group = groups.get(kind, LeftOut(reason=reason, count=0, first=place))
            groups[kind] = replace(group, count=group.count + 1)
        return tuple(sorted(groups.values(), key=lambda each: -each.count))


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """What came of one edit that a file asks for, whether it can be read or not."""

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


@dataclass(frozen=True, kw_only=True)
class FactFile:
    """Facts that were checked and are read from the file each time one goes through them.

    Raises:
        BadInputError: On going through them, if the file was changed since it was checked.
    """

    path: Path | None
    """The file; None for the built-in facts."""
    count: int
    content_hash: str
    """SHA-256 over the hashes of their records, in order."""
    left_out: tuple[LeftOut, ...] = ()
    """What is not used, by reason."""
    limit: int | None = None
    """Only the first so many; None for all."""
    join: Join | None = None
    """The ``join`` of all facts; None for what each record says, or the usual."""
    straddle: Straddle | None = None
    stamp: tuple[int, int] | None = None
    """Size and time of change of the file when it was checked."""
    numbered: bool = False
    """Whether case ids are the facts' places in the file, in place of its own (see
    :func:`check_facts`)."""
    skipped: frozenset[int] = frozenset()
    """Places of facts that can be read and are not used."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Fact]:
        # Only one of them is in memory.
        return (fact for _, fact in self._placed())

    def without(self, reason_against: Callable[[Fact], str | None]) -> "FactFile":
        """The facts that nothing speaks against; the others join :attr:`left_out`.

        Raises:
            FactFormatError: If no fact remains; the message says why.
        """
        digest, count = hashlib.sha256(), 0
        refused: dict[int, tuple[str, str]] = {}
        for place, fact in self._placed():
            reason = reason_against(fact)
            if reason is None:
                digest.update(fact.content_hash.encode())
                count += 1
            else:
                refused[place] = (reason, f"case {fact.case_id}")
        more = LeftOut.grouped(refused.values())
        _tell(self.name, count, more)
        return replace(
            self,
            count=count,
            content_hash=digest.hexdigest(),
            left_out=(*self.left_out, *more),
            skipped=self.skipped.union(refused),
        )

    @property
    def name(self) -> str:
        """What messages call it."""
        return "the built-in set" if self.path is None else str(self.path)

    def _placed(self) -> Iterator[tuple[int, Fact]]:
        """The facts with their places among all that the file holds."""
        if self.path is not None and _stamp(self.path) != self.stamp:
            self._refuse()
        digest = hashlib.sha256()
        read = seen = 0
        found = _attempts(self.path, join=self.join, straddle=self.straddle)
        for place, attempt in enumerate(found):
            if read == self.limit:
                break
            if attempt.fact is None:
                continue
            read += 1
            if place in self.skipped:
                continue
            fact = replace(attempt.fact, case_id=place) if self.numbered else attempt.fact
            digest.update(fact.content_hash.encode())
            seen += 1
            yield place, fact
        if (seen, digest.hexdigest()) != (self.count, self.content_hash):
            self._refuse()

    def _refuse(self) -> None:
        raise BadInputError(
            f"{self.name} was changed while it was in use; run the same command again"
        )


def check_facts(
    path: str | Path | None = None,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    join: Join | None = None,
    straddle: Straddle | None = None,
) -> FactFile:
    """Go through a whole file of facts once, so that no mistake in it comes up during the work.

    The file's own case ids are kept if each fact has one and they are different whole numbers of 64
    bits. Otherwise all facts are numbered by their places in the file, from 0, and a message says
    why. So no two facts of a file have one number.

    The built-in facts have no ``path``. Only the first ``limit`` facts are taken, but the file is
    checked as a whole. With ``skip_bad`` what cannot be read is left out; a message and
    ``left_out`` say how much, and why. ``join`` and ``straddle`` are as in :class:`FactFile`.

    Raises:
        BadInputError: If the file is missing or not JSON, or the limit is below 1.
        FactFormatError: If a record is malformed and not skipped, or no fact is found; names file,
            record, field.
    """
    if limit is not None and limit < 1:
        raise BadInputError(f"the limit of facts is {limit}; give at least 1")
    file = None if path is None else Path(path)
    stamp = None if file is None else _stamp(file)
    own_digest, placed_digest = hashlib.sha256(), hashlib.sha256()
    refused: list[tuple[str, str]] = []
    seen: set[int] = set()
    unnumbered = readable = count = unanswered = stray = 0
    odd = notice = ""
    for place, attempt in enumerate(_attempts(file, join=join, straddle=straddle)):
        if attempt.error is not None and not skip_bad:
            raise type(attempt.error)(f"{attempt.error}{SKIP_HINT}")
        if attempt.fact is None:
            refused.append((attempt.reason, attempt.place))
            continue
        fact, case_id = attempt.fact, attempt.fact.case_id
        odd = odd or attempt.odd
        readable += 1
        stray += bool(fact.notice)
        notice = notice or fact.notice
        unnumbered += attempt.own is None
        if attempt.own in seen:
            odd = odd or f"{attempt.place} has the case_id {case_id} of another one"
        seen.add(case_id)
        unanswered += len(fact.neighbours) - len(fact.answered_neighbours)
        if limit is None or count < limit:
            own = placed = fact.content_hash
            if case_id != place:
                placed = replace(fact, case_id=place).content_hash
            own_digest.update(own.encode())
            placed_digest.update(placed.encode())
            count += 1
    left_out = LeftOut.grouped(refused)
    name = "the built-in set" if file is None else str(file)
    _tell(name, count, left_out)
    if stray:
        logger.warning("%s: %d facts have stray characters; the first: %s", name, stray, notice)
    if unanswered:
        logger.info("%s: neighbours without an answer, not measured: %d", name, unanswered)
    if 0 < unnumbered < readable:
        odd = odd or f"{unnumbered} facts have no case_id"
    if odd:
        logger.info("%s: %s, so the facts are numbered in order, from 0", name, odd)
    return FactFile(
        path=file,
        count=count,
        content_hash=(placed_digest if odd else own_digest).hexdigest(),
        left_out=left_out,
        limit=limit,
        stamp=stamp,
        join=join,
        straddle=straddle,
        numbered=bool(odd),
    )


@taken
def load_facts(path: str | Path, *, skip_bad: bool = False) -> tuple[Fact, ...]:
    """Read facts from a file: a JSON list, JSON Lines (``.jsonl``) or Parquet, perhaps in gzip.

    The schema is COUNTERFACT's, ZsRE's, KnowEdit's, MQuAKE's (each rewrite is a fact), QAEdit's, or
    a flat one as of HardCF, HardEdit and EasyEdit; see :func:`~firsttok.data.schemas.fact_from`.
    With ``skip_bad`` records that cannot be read are left out, with a message.

    Raises:
        BadInputError: If the file is missing or not JSON.
        FactFormatError: If a record is malformed and not skipped, or no fact is found; names file,
            record, field.
    """
    return tuple(check_facts(path, skip_bad=skip_bad))


def builtin_facts() -> tuple[Fact, ...]:
    """Return the built-in facts, which the embedded model answers rightly or nearly so."""
    return tuple(attempt.fact for attempt in _attempts(None) if attempt.fact is not None)


def write_facts(path: Path, facts: Iterable[Fact]) -> None:
    """Write facts as they come, in a form that :func:`load_facts` reads.

    It is JSON Lines if the name ends in ``.jsonl``, else a JSON list; in gzip if in ``.gz``.

    Raises:
        CacheError: If the file cannot be written.
    """
    lines = plain_suffix(path) in LINES
    with atomic_path(path) as temporary:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(temporary, "wt", encoding="utf-8") as file:
            file.write("" if lines else "[\n")
            for index, fact in enumerate(facts):
                if index:
                    file.write("\n" if lines else ",\n")
                file.write(json.dumps(fact.as_record(), ensure_ascii=False))
            file.write("\n" if lines else "\n]\n")


def _attempts(
    path: Path | None, *, join: Join | None = None, straddle: Straddle | None = None
) -> Iterator[_Attempt]:
    """Read every edit that a file asks for, in order; a record of MQuAKE asks for several."""
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
            where = part_place.removeprefix(f"{path}, ")
            own, odd = _own_number(fields.get("case_id"), where)
            case_id = number if own is None else own
            number += 1
            try:
                fact = fact_from(fields, case_id, part_place, source, join=join, straddle=straddle)
            except BadInputError as error:
                yield _failed(path, part_place, error)
                continue
            reason = _LENIENT if fact is None else ""
            yield _Attempt(place=where, fact=fact, own=own, odd=odd, reason=reason)


def _failed(path: Path | None, place: str, error: BadInputError) -> _Attempt:
    reason = str(error).removeprefix(place).removeprefix(str(path)).lstrip(", ")
    return _Attempt(place=place.removeprefix(f"{path}, "), reason=reason, error=error)


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


def _tell(name: str, count: int, left_out: Sequence[LeftOut]) -> None:
    """Say what is left out; raise if nothing else is there."""
    told = [f"{each.count} because {each.reason} (first {each.first})" for each in left_out]
    if not count:
        why = f" that can be used ({told[0]})" if told else "; give at least one"
        raise FactFormatError(f"{name} holds no facts{why}")
    if told:
        more = [f"and {len(told) - _SHOWN} reasons more"] if len(told) > _SHOWN else []
        total = sum(each.count for each in left_out)
        logger.warning(
            "%s: %d facts are left out, %s", name, total, "; ".join(told[:_SHOWN] + more)
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        # Opening it says what is wrong.
        return None
    return status.st_size, status.st_mtime_ns
