"""The run itself: which facts are to be done, and their rows kept as they come."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from time import monotonic

from rich.progress import Progress

from firsttok.data import Fact
from firsttok.errors import BadInputError, CacheError
from firsttok.options import folder_name
from firsttok.rows import FAILED, Row, read_table, rows_of, seconds_of, shard_path, write_rows
from firsttok.sweep.engine import Chunk, DoneChunk, Engine

__all__ = ["CHUNK", "Share", "chunks_of", "model_folder", "sweep"]


logger = logging.getLogger(__name__)

CHUNK = 24
"""Facts in a chunk, which one file holds: as many as are looked at together to fill batches."""
_PERIOD = 1.0
"""Seconds after which the rows of a chunk that is not done yet are written."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a run's chunks is done here.

    Raises:
        BadInputError: If the numbers make no sense.
    """

    number: int = 1
    """This share, from 1."""
    of: int = 1
    """Number of shares."""
    limit: int | None = None
    """Only the first so many facts of the run."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.number <= self.of:
            raise _no_share(f"{self.number}/{self.of}")
        if self.limit is not None and self.limit < 1:
            raise BadInputError(f"--limit is {self.limit}; give at least 1")

    @staticmethod
    def parse(text: str | None, *, limit: int | None = None) -> "Share":
        """Read ``I/N``; None for everything.

        Raises:
            BadInputError: If it reads otherwise.
        """
        number, _, of = ("1/1" if text is None else text).partition("/")
        if not (number.isdecimal() and of.isdecimal()):
            raise _no_share(repr(text))
        return Share(number=int(number), of=int(of), limit=limit)

    def of_chunk(self, chunk: Chunk, size: int) -> tuple[Fact, ...]:
        """Those facts of a chunk, with so many in each, that are to be done here."""
        if chunk.index % self.of != self.number - 1:
            return ()
        within = None if self.limit is None else max(0, self.limit - chunk.index * size)
        return chunk.facts[:within]

    def count(self, total: int, size: int) -> int:
        """How many facts of a run are to be done here, with so many in a chunk."""
        end = total if self.limit is None else min(total, self.limit)
        starts = range((self.number - 1) * size, end, self.of * size)
        return sum(min(size, end - start) for start in starts)


def _no_share(given: str) -> BadInputError:
    return BadInputError(f"--shard is {given}; give I/N with I from 1 to N, such as 1/4")


def model_folder(run: Path, label: str) -> Path:
    """Where the shards of one model are."""
    return run / "rows" / folder_name(label)


def chunks_of(facts: Iterable[Fact], size: int) -> Iterator[Chunk]:
    """The facts, so many at a time; no more are in memory."""
    source = iter(facts)
    index = 0
    while chunk := tuple(islice(source, size)):
        yield Chunk(index=index, facts=chunk)
        index += 1


def sweep(
    folder: Path,
    facts: Iterable[Fact],
    engine: Engine,
    *,
    size: int = CHUNK,
    share: Share | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
    label: str = "sweep",
    total: int | None = None,
) -> int:
    """Do every fact that is not done yet, and keep its rows as they come.

    The file of a chunk is written again with the facts that were done since, at most once a second
    and when the chunk is done. So a kill loses what is in flight, and at most the rows of the last
    second.

    Args:
        folder: Folder of the model's shards.
        facts: All facts of the run, in order.
        engine: Who does them.
        size: Facts in a chunk.
        share: Which part is done here; everything if None.
        retry_failed: Do failed cases again.
        progress: Where to show progress.
        label: What the rows and the progress bar call the model.
        total: Number of facts, for the estimate.

    Returns:
        Number of chunks in which something was done now.

    Raises:
        CacheError: If a shard cannot be written.
    """
    share = share or Share()
    progress = progress or Progress(disable=True)
    task = progress.add_task(label, total=None if total is None else share.count(total, size))
    begun: dict[int, _Begun] = {}
    touched: set[int] = set()
    before = now = 0

    def advance(count: float) -> None:
        progress.advance(task, count)

    def open_chunks() -> Iterator[Chunk]:
        nonlocal before
        for chunk in chunks_of(facts, size):
            wanted = share.of_chunk(chunk, size)
            if not wanted:
                continue
            rows, seconds = _kept(shard_path(folder, chunk.index), chunk, retry_failed=retry_failed)
            done = frozenset(fact.case_id for fact in wanted if rows[fact.case_id])
            before += len(done)
            advance(float(len(done)))
            rest = replace(chunk, facts=wanted, done=done)
            if rest.missing:
                begun[chunk.index] = _Begun(rows=rows, seconds=seconds, missing=rest.missing)
                yield rest

    def write(index: int) -> None:
        chunk = begun[index]
        rows = (row for found in chunk.rows.values() for row in found)
        write_rows(shard_path(folder, index), rows, seconds=chunk.seconds)
        chunk.written, chunk.unwritten = monotonic(), False

    try:
        for part in engine.run(open_chunks(), on_facts=advance):
            chunk = begun[part.index]
            now += chunk.add(part, label)
            touched.add(part.index)
            if not chunk.missing:
                write(part.index)
                del begun[part.index]
            elif monotonic() - chunk.written > _PERIOD:
                write(part.index)
    except BaseException:
        for index, chunk in begun.items():
            # What ended the run is what is to be told.
            with suppress(CacheError):
                if chunk.unwritten:
                    write(index)
        raise
    # Parts of facts do not add up to whole ones.
    progress.update(task, completed=before + now)
    return len(touched)


@dataclass(kw_only=True, eq=False)
class _Begun:
    """A chunk that is being done, and what is there of it; lives as long as that takes."""

    rows: dict[int, list[Row]]
    """Rows by case id, in the order of the facts."""
    seconds: float
    missing: int
    """Facts without rows, as far as they are asked for."""
    unwritten: bool = False
    written: float = field(default_factory=monotonic)

    def add(self, part: DoneChunk, label: str) -> int:
        """Take up the rows of some facts; returns how many facts."""
        new: dict[int, list[Row]] = {}
        for row in part.rows:
            new.setdefault(row.case_id, []).append(Row({**row, "model": label}))
        self.rows |= new
        self.seconds += part.seconds
        self.missing -= len(new)
        self.unwritten = True
        return len(new)


def _kept(path: Path, chunk: Chunk, *, retry_failed: bool) -> tuple[dict[int, list[Row]], float]:
    """Rows of a chunk by case id, none of a damaged file, and the seconds they took."""
    rows: dict[int, list[Row]] = {fact.case_id: [] for fact in chunk.facts}
    seconds = 0.0
    if path.is_file():
        try:
            table = read_table(path)
        except BadInputError as error:
            logger.warning("%s", error)
        else:
            seconds = seconds_of(table)
            for row in rows_of(table):
                rows.get(row.case_id, []).append(row)
    for found in rows.values():
        if retry_failed and any(row.status == FAILED for row in found):
            found.clear()
    return rows, seconds
