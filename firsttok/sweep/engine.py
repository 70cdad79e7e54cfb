"""Who does the chunks of a sweep: this process, one after the other, fact by fact."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, runtime_checkable

from firsttok.data import Fact
from firsttok.measuring import Plan, measure_each
from firsttok.rows import Row
from firsttok.study import Study

__all__ = ["Chunk", "DoneChunk", "Engine", "LocalEngine"]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Facts that are done together."""

    index: int
    """Number of the chunk in the run."""
    facts: tuple[Fact, ...]
    """Its facts, as far as they are asked for."""
    done: frozenset[int] = frozenset()
    """Case ids of those among them whose rows are there."""

    @property
    def missing(self) -> int:
        """How many facts are to be measured."""
        return len(self.facts) - len(self.done)


@dataclass(frozen=True, kw_only=True)
class DoneChunk:
    """What was found on facts of a chunk: on all that were to be done, or on some of them."""

    index: int
    """Number of the chunk in the run."""
    rows: tuple[Row, ...]
    """One row per fact and method."""
    seconds: float
    """Time they took where they were done."""


@runtime_checkable
class Engine(Protocol):
    """Something that does chunks, in whatever order they are finished."""

    def run(
        self, chunks: Iterable[Chunk], *, on_facts: Callable[[float], None]
    ) -> Iterator[DoneChunk]:
        """Do the chunks; each may be given back in several parts.

        Args:
            chunks: Taken one at a time, when there is somebody to do them.
            on_facts: Called with the number of facts (or parts of one) that were got through.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalEngine:
    """Does one chunk after the other in this process."""

    study: Study
    """The study."""
    plan: Plan
    """Methods and metrics."""

    def run(
        self, chunks: Iterable[Chunk], *, on_facts: Callable[[float], None]
    ) -> Iterator[DoneChunk]:
        """Do the chunks in order, and give back every fact as soon as it is measured."""
        steps = self.plan.steps(self.study)
        for chunk in chunks:
            reached = _Reached(facts=chunk.missing, steps=steps, report=on_facts)
            start = perf_counter()
            found = measure_each(
                self.study, chunk.facts, self.plan, done=chunk.done, on_step=reached.step
            )
            for number, rows in enumerate(found, 1):
                reached.to(float(number))
                now = perf_counter()
                yield DoneChunk(index=chunk.index, rows=tuple(rows), seconds=now - start)
                start = now


@dataclass(kw_only=True, eq=False)
class _Reached:
    """How far a chunk is; what is done again in parts, after a failure, counts once."""

    facts: int
    steps: int
    """Steps that a fact takes."""
    report: Callable[[float], None]
    seen: float = 0.0

    def step(self, count: int) -> None:
        self.to(self.seen + count / self.steps)

    def to(self, facts: float) -> None:
        now = min(max(facts, self.seen), float(self.facts))
        self.report(now - self.seen)
        self.seen = now
