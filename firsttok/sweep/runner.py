"""The run itself: which chunks are open, and each one written as soon as it is done."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.progress import Progress

from firsttok.data import Fact
from firsttok.errors import BadInputError
from firsttok.options import folder_name
from firsttok.sweep.engine import Chunk, Engine
from firsttok.sweep.shards import finished_chunks, write_shard

__all__ = ["CHUNK", "Share", "chunks_of", "model_folder", "sweep"]


CHUNK = 24
"""Facts in a chunk: as many as are looked at together to fill batches."""


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
    """Only chunks that begin within the first so many facts."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 1 <= self.number <= self.of:
            raise BadInputError(
                f"--shard is {self.number}/{self.of}; give I/N with I from 1 to N, such as 1/4"
            )
        if self.limit is not None and self.limit < 1:
            raise BadInputError(f"--limit is {self.limit}; give at least 1")

    @staticmethod
    def parse(text: str | None, *, limit: int | None = None) -> "Share":
        """Read ``I/N``; None for everything.

        Raises:
            BadInputError: If it reads otherwise.
        """
        if text is None:
            return Share(limit=limit)
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal()):
            raise BadInputError(f"--shard is {text!r}; give I/N with I from 1 to N, such as 1/4")
        return Share(number=int(number), of=int(of), limit=limit)

    def has(self, chunk: Chunk, size: int) -> bool:
        """Whether a chunk is to be done here.

        Args:
            chunk: The chunk.
            size: Facts in a chunk.
        """
        within = self.limit is None or chunk.index * size < self.limit
        return within and chunk.index % self.of == self.number - 1


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
    """Do every chunk that is not done yet, and write each as soon as it is.

    A kill loses what is in flight and nothing else; the next run goes on.

    Args:
        folder: Folder of the model's shards.
        facts: All facts of the run, in order.
        engine: Who does them.
        size: Facts in a chunk.
        share: Which part is done here; everything if None.
        retry_failed: Do chunks that hold a failed case again.
        progress: Where to show progress.
        label: What the progress bar says.
        total: Number of facts, for the estimate.

    Returns:
        Number of chunks that were done now.

    Raises:
        CacheError: If a shard cannot be written.
    """
    share = share or Share()
    done = finished_chunks(folder, retry_failed=retry_failed)
    task = None if progress is None else progress.add_task(label, total=total)

    def advance(count: float) -> None:
        if progress is not None and task is not None:
            progress.advance(task, count)

    def open_chunks() -> Iterator[Chunk]:
        for chunk in chunks_of(facts, size):
            if not share.has(chunk, size) or chunk.index in done:
                advance(float(len(chunk.facts)))
            else:
                yield chunk

    count = 0
    for finished in engine.run(open_chunks(), on_facts=advance):
        write_shard(folder, finished.index, finished.rows, finished.seconds)
        count += 1
    return count
