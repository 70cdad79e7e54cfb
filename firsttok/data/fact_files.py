"""Files of facts, checked as a whole before any work starts, then read as a stream."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from firsttok.arguments import taken
from firsttok.data.facts import Fact, builtin_records
from firsttok.data.joints import Join, Straddle
from firsttok.data.records import iter_records
from firsttok.data.schemas import fact_from
from firsttok.errors import BadInputError, FactFormatError

__all__ = ["FactFile", "builtin_facts", "check_facts", "iter_facts", "load_facts"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FactFile:
    """Facts that were checked and are read anew each time one goes through them.

    Raises:
        BadInputError: On going through them, if the file was changed since it was checked.
    """

    path: Path | None
    """The file; None for the built-in facts."""
    count: int
    """How many facts one gets."""
    content_hash: str
    """SHA-256 over the hashes of their records, in order."""
    left_out: int = 0
    """Records of ZsRE that cannot be edited (see :func:`~firsttok.data.schemas.fact_from`)."""
    limit: int | None = None
    """Only the first so many; None for all."""
    join: Join | None = None
    """The ``join`` of all facts; None for what each record says, or the usual."""
    straddle: Straddle | None = None
    """The ``straddle`` of all facts, likewise."""
    stamp: tuple[int, int] | None = None
    """Size and time of change of the file when it was checked."""

    def __len__(self) -> int:
        """How many facts one gets."""
        return self.count

    def __iter__(self) -> Iterator[Fact]:
        """Go through the facts; only one of them is in memory."""
        if self.path is not None and _stamp(self.path) != self.stamp:
            self._refuse()
        digest = hashlib.sha256()
        seen = 0
        for fact in islice(self._all(), self.limit):
            digest.update(fact.content_hash.encode())
            seen += 1
            yield fact
        if (seen, digest.hexdigest()) != (self.count, self.content_hash):
            self._refuse()

    def _all(self) -> Iterator[Fact]:
        facts = _all(self.path, join=self.join, straddle=self.straddle)
        return (fact for fact in facts if fact is not None)

    def _refuse(self) -> None:
        raise BadInputError(
            f"{self.path or 'the built-in set'} was changed while it was in use; run the same "
            "command again"
        )


def check_facts(
    path: str | Path | None = None,
    *,
    limit: int | None = None,
    join: Join | None = None,
    straddle: Straddle | None = None,
) -> FactFile:
    """Go through a whole file of facts once, so that no mistake in it comes up during the work.

    Args:
        path: The file, as for :func:`load_facts`; None for the built-in facts.
        limit: Take only the first so many facts; the file is checked as a whole all the same.
        join: As in :class:`FactFile`.
        straddle: As in :class:`FactFile`.

    Raises:
        BadInputError: If the file is missing or not JSON, or the limit is below 1.
        FactFormatError: If a record is malformed or the set is empty; names file, record, field.
    """
    if limit is not None and limit < 1:
        raise BadInputError(f"the limit of facts is {limit}; give at least 1")
    file = None if path is None else Path(path)
    stamp = None if file is None else _stamp(file)
    digest = hashlib.sha256()
    count = left_out = stray = 0
    first = ""
    for fact in _all(file, join=join, straddle=straddle):
        if fact is not None and fact.notice:
            stray += 1
            first = first or fact.notice
        if fact is None:
            left_out += 1
        elif limit is None or count < limit:
            digest.update(fact.content_hash.encode())
            count += 1
    if left_out:
        logger.warning(
            "%s: %d records are left out, whose new answer is blank or whose question does not "
            "hold the subject once",
            path,
            left_out,
        )
    if stray:
        logger.warning("%s: %d facts have stray characters; the first: %s", path, stray, first)
    return FactFile(
        path=file,
        count=count,
        content_hash=digest.hexdigest(),
        left_out=left_out,
        limit=limit,
        stamp=stamp,
        join=join,
        straddle=straddle,
    )


def iter_facts(path: str | Path) -> Iterator[Fact]:
    """Read facts one by one; what is wrong is found when it is reached (see :func:`check_facts`).

    Args:
        path: The file, as for :func:`load_facts`.

    Raises:
        BadInputError: If the file is missing or not JSON.
        FactFormatError: If a record is malformed or the set is empty; names file, record, field.
    """
    return _facts(Path(path))


@taken
def load_facts(path: str | Path) -> tuple[Fact, ...]:
    """Read facts from a JSON list, or from JSON Lines where the name ends in ``.jsonl``.

    The schema is COUNTERFACT's, the flat one of HardCF, HardEdit and EasyEdit, or ZsRE's; see
    :func:`~firsttok.data.schemas.fact_from`.

    Raises:
        BadInputError: If the file is missing or not JSON.
        FactFormatError: If a record is malformed or the set is empty; names file, record, field.
    """
    return tuple(iter_facts(path))


def builtin_facts() -> tuple[Fact, ...]:
    """Return the built-in facts, which the embedded model answers rightly or nearly so."""
    return tuple(_facts(None))


def _facts(path: Path | None) -> Iterator[Fact]:
    return (fact for fact in _all(path) if fact is not None)


def _all(
    path: Path | None, *, join: Join | None = None, straddle: Straddle | None = None
) -> Iterator[Fact | None]:
    """Every record's fact, None for one that is left out; their numbers are distinct."""
    if path is None:
        where, source = "the built-in facts", "built-in"
        records = ((f"{where}, record {i}", each) for i, each in enumerate(builtin_records()))
    else:
        where, source = str(path), path.name
        records = iter_records(path)
    seen: set[int] = set()
    found = False
    for index, (place, record) in enumerate(records):
        fact = fact_from(record, index, place, source, join=join, straddle=straddle)
        if fact is not None:
            if fact.case_id in seen:
                raise FactFormatError(
                    f"{place}, field case_id repeats {fact.case_id}; number each once"
                )
            seen.add(fact.case_id)
            found = True
        yield fact
    if not found:
        raise FactFormatError(f"{where} holds no facts; give at least one")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        # Opening it says what is wrong.
        return None
    return status.st_size, status.st_mtime_ns
