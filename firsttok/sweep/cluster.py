"""The chunks of a sweep done on a Ray cluster: one actor per GPU, or per share of the CPUs."""

import importlib.util
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

from firsttok.contexts import ContextSet
from firsttok.errors import BadInputError, WorkerError
from firsttok.hyperparameters import Hyperparameters
from firsttok.measuring import Plan, measure_chunk
from firsttok.models import BosPolicy, Model, load
from firsttok.rows import failed_row
from firsttok.second_moment import SecondMoment
from firsttok.study import Study
from firsttok.sweep.engine import Chunk, DoneChunk

__all__ = ["RayEngine", "Recipe", "check_cluster", "connected"]

logger = logging.getLogger(__name__)

LIVES = 3
"""Workers that may be lost over one chunk before its cases count as failed."""
PATIENCE = 300.0
"""Seconds without any worker before a sweep gives up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """What a worker needs to make the study that the manifest describes."""

    source: str
    """Name, hub id or folder the model is loaded by; a folder must be there on every node."""
    dtype: str
    """Type of the weights."""
    device: str
    """``cpu`` or ``cuda``; Ray shows each actor its own GPU."""
    bos: BosPolicy
    """The view's BOS policy."""
    identity: str
    """The model's, to be sure that every worker loads the same."""
    contexts: ContextSet
    """Contexts of Equation 1."""
    second_moment: SecondMoment
    """C, computed once and sent."""
    layer: int
    """Layer to edit."""
    hyperparameters: Hyperparameters
    """Settings of the value optimisation."""
    texts: tuple[str, ...]
    """Sentences of the perplexity."""
    text_bos: BosPolicy
    """BOS policy of the sentences."""

    @staticmethod
    def of(study: Study, *, source: str, device: str) -> "Recipe":
        """The recipe of a study that is loaded here.

        Args:
            study: The study; its model has no interventions.
            source: What the workers load the model by.
            device: Where they load it.
        """
        return Recipe(
            source=source,
            dtype=str(study.model.dtype).removeprefix("torch."),
            device=device,
            bos=study.model.bos,
            identity=study.model.identity(),
            contexts=study.contexts,
            second_moment=study.second_moment,
            layer=study.layer,
            hyperparameters=study.hyperparameters,
            texts=study.texts,
            text_bos=study.text_bos,
        )

    def study(self) -> Study:
        """Load the model and make the study.

        Raises:
            BadInputError: If the model is another one than where the run was begun.
        """
        model: Model = load(self.source, bos=self.bos.value, dtype=self.dtype, device=self.device)
        if model.identity() != self.identity:
            raise BadInputError(
                f"{self.source} on a worker is another model than where the run was begun, by its "
                "weights, configuration or tokenizer; give every node the same one"
            )
        return Study(
            model=model,
            contexts=self.contexts,
            second_moment=self.second_moment,
            layer=self.layer,
            hyperparameters=self.hyperparameters,
            texts=self.texts,
            text_bos=self.text_bos,
        )


class Worker:
    """What lives in an actor: a study, loaded once."""

    def __init__(self, recipe: Recipe, plan: Plan, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._recipe = recipe
        self._plan = plan

    @cached_property
    def study(self) -> Study:
        """The study."""
        return self._recipe.study()

    def ready(self) -> None:
        """Load the model, and answer."""
        _ = self.study

    def do(self, chunk: Chunk) -> DoneChunk:
        """Do a chunk."""
        start = perf_counter()
        rows = measure_chunk(self.study, chunk.facts, self._plan, done=chunk.done)
        return DoneChunk(index=chunk.index, rows=tuple(rows), seconds=perf_counter() - start)


@contextmanager
def connected(address: str | None) -> Generator[Any, None, None]:
    """Connect to a Ray cluster, or start one on this machine.

    Args:
        address: ``auto`` or ``HOST:PORT`` of a running cluster; None for one of this machine's own.

    Yields:
        The ray module.

    Raises:
        BadInputError: If Ray is not installed, or no cluster answers.
    """
    check_cluster(address)
    # A cluster that is started here tells nobody of it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    already = ray.is_initialized()
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        if not already:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise _silent(address, error) from None
    try:
        yield ray
    finally:
        if not already:
            ray.shutdown()


def check_cluster(address: str | None) -> None:
    """See that Ray is there, and that something listens: Ray itself would go on asking for minutes.

    Args:
        address: As for :func:`connected`.

    Raises:
        BadInputError: If Ray is not installed, or nothing listens.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInputError("--engine ray needs Ray; install it with: pip install 'firsttok[ray]'")
    if address is None or address == "auto":
        return
    host, colon, port = address.rpartition(":")
    try:
        if not (host and colon and port.isdecimal() and int(port) < 2**16):
            raise ValueError(f"{address} is not HOST:PORT")
        with socket.create_connection((host, int(port)), timeout=10):
            pass
    except (OSError, ValueError) as error:
        raise _silent(address, error) from None


def _silent(address: str | None, error: Exception) -> BadInputError:
    first = " ".join(str(error).split())[:200]
    return BadInputError(
        f"no Ray cluster answers at {address or 'this machine'} ({first}); start one with: "
        "ray start --head, or leave --address out"
    )


@dataclass(kw_only=True, eq=False)
class _Crew:
    """The actors and what each is at; lives as long as one run."""

    make: Callable[[], Any]
    starting: dict[Any, Any] = field(default_factory=dict)
    """Reference of ``ready`` to its actor."""
    working: dict[Any, tuple[Any, Chunk]] = field(default_factory=dict)
    """Reference of ``do`` to its actor and chunk."""
    idle: deque[Any] = field(default_factory=deque)

    def hire(self) -> None:
        actor = self.make()
        self.starting[actor.ready.remote()] = actor

    def assign(self, chunk: Chunk) -> None:
        actor = self.idle.popleft()
        self.working[actor.do.remote(chunk)] = (actor, chunk)


@dataclass(frozen=True, kw_only=True, eq=False)
class RayEngine:
    """Does chunks on the actors of a Ray cluster; whoever is idle takes the next one.

    A chunk whose worker is lost goes to another one, and a new worker is asked for.
    """

    ray: Any
    """The connected ray module, see :func:`connected`."""
    recipe: Recipe
    """What the workers load."""
    plan: Plan
    """Methods and metrics."""
    label: str
    """Label of the model, for rows of cases that failed with their workers."""
    actors: int
    """Number of workers."""
    cpus: int = 1
    """CPUs of each, which are its threads."""
    gpus: int = 0
    """GPUs of each."""

    def run(
        self, chunks: Iterable[Chunk], *, on_facts: Callable[[float], None]
    ) -> Iterator[DoneChunk]:
        """Do the chunks, in the order they are finished.

        Raises:
            WorkerError: If no worker can be started, or the model cannot be loaded there.
        """
        ray = self.ray
        remote = ray.remote(Worker)
        shared = ray.put(self.recipe)
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0}
        crew = _Crew(make=lambda: remote.options(**options).remote(shared, self.plan, self.cpus))
        again: deque[Chunk] = deque()
        losses: dict[int, int] = {}
        source = iter(chunks)
        for _ in range(self.actors):
            crew.hire()
        exhausted = False
        while True:
            while crew.idle and not (exhausted and not again):
                chunk = again.popleft() if again else next(source, None)
                if chunk is None:
                    exhausted = True
                else:
                    crew.assign(chunk)
            if exhausted and not again and not crew.working:
                break
            waiting = [*crew.working, *crew.starting]
            ready, _ = ray.wait(waiting, num_returns=1, timeout=PATIENCE)
            if not ready and not crew.working:
                raise WorkerError(
                    f"no worker with {self.cpus} CPUs and {self.gpus} GPUs could be started "
                    f"for {PATIENCE:.0f} s; see 'ray status', or ask for less"
                )
            for reference in ready:
                yield from self._take(reference, crew, again, losses, on_facts)

    def _take(
        self,
        reference: Any,
        crew: _Crew,
        again: deque[Chunk],
        losses: dict[int, int],
        on_facts: Callable[[float], None],
    ) -> Iterator[DoneChunk]:
        """Look at an answer: a worker that is there, a chunk that is done, or a loss."""
        exceptions = self.ray.exceptions
        lost = (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.WorkerCrashedError)
        if reference in crew.starting:
            actor = crew.starting.pop(reference)
            try:
                self.ray.get(reference)
            except exceptions.RayTaskError as error:
                raise WorkerError(f"a worker cannot load the model: {_first_line(error)}") from None
            except lost as error:
                losses[-1] = losses.get(-1, 0) + 1
                if losses[-1] > LIVES * self.actors:
                    raise WorkerError(
                        f"workers die while they load the model ({_first_line(error)}); is there "
                        "enough memory for so many?"
                    ) from None
                crew.hire()
            else:
                crew.idle.append(actor)
            return
        actor, chunk = crew.working.pop(reference)
        try:
            done: DoneChunk = self.ray.get(reference)
        except exceptions.RayTaskError as error:
            raise WorkerError(
                f"chunk {chunk.index} cannot be done ({_first_line(error)}); correct that and run "
                "the same command again to go on"
            ) from None
        except lost:
            losses[chunk.index] = losses.get(chunk.index, 0) + 1
            logger.warning(
                "the worker of chunk %d was lost (%d of %d times)",
                chunk.index,
                losses[chunk.index],
                LIVES,
            )
            crew.hire()
            if losses[chunk.index] < LIVES:
                again.append(chunk)
                return
            done = self._given_up(chunk)
        else:
            crew.idle.append(actor)
        on_facts(float(chunk.missing))
        yield done

    def _given_up(self, chunk: Chunk) -> DoneChunk:
        reason = f"its worker was lost {LIVES} times"
        rows = [
            failed_row(self.label, self.recipe.layer, fact, method.name, reason)
            for fact in chunk.facts
            if fact.case_id not in chunk.done
            for method in self.plan.methods
        ]
        return DoneChunk(index=chunk.index, rows=tuple(rows), seconds=0.0)


def _first_line(error: BaseException) -> str:
    """The cause in one line, without the trace of the worker."""
    cause: Any = getattr(error, "cause", None) or error
    lines: Sequence[str] = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
