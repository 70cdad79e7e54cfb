"""The chunks of a sweep done on a Ray cluster: one actor per GPU, or per share of the CPUs."""

import importlib.util
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from firsttok.errors import BadInputError, WorkerError
from firsttok.measuring import Plan, measure_chunk
from firsttok.models import BosPolicy, load
from firsttok.rows import Row, first_columns
from firsttok.study import Study
from firsttok.sweep.engine import Chunk, DoneChunk

__all__ = ["RayEngine", "Recipe", "check_cluster", "connected"]

logger = logging.getLogger(__name__)

LIVES = 3
"""Workers that may be lost over one chunk before its cases count as failed."""
PATIENCE = 300.0
"""Seconds without any worker before a sweep gives up."""
_SENT = (
    *("contexts", "second_moment", "second_moments", "layer", "hyperparameters", "given"),
    *("texts", "text_bos"),
)
"""Fields of a study that are the same for all workers."""


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
    settings: Mapping[str, Any]
    """Fields of the study besides the model; what they hold was computed once and is sent."""

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
            settings={name: getattr(study, name) for name in _SENT},
        )

    def study(self) -> Study:
        """Load the model and make the study.

        Raises:
            BadInputError: If the model is another one than where the run was begun.
        """
        model = load(self.source, bos=self.bos.value, dtype=self.dtype, device=self.device)
        if model.identity() != self.identity:
            raise BadInputError(
                f"{self.source} on a worker is another model than where the run was begun, by its "
                "weights, configuration or tokenizer; give every node the same one"
            )
        return Study(model=model, **self.settings)


class Worker:
    """What lives in an actor: a study, loaded once."""

    def __init__(self, recipe: Recipe, plan: Plan, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._recipe = recipe
        self._plan = plan

    def ready(self) -> None:
        """Load the model, and answer."""
        self._study = self._recipe.study()

    def do(self, chunk: Chunk) -> DoneChunk:
        """Do a chunk."""
        start = perf_counter()
        rows = measure_chunk(self._study, chunk.facts, self._plan, done=chunk.done)
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
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0}
        remote, shared = self.ray.remote(Worker).options(**options), self.ray.put(self.recipe)
        source, exhausted = iter(chunks), False
        again: deque[Chunk] = deque()
        idle: deque[Any] = deque()
        # The actor, and its chunk; None while it loads the model.
        at_work: dict[Any, tuple[Any, Chunk | None]] = {}
        losses: Counter[int] = Counter()

        def hire() -> None:
            actor = remote.remote(shared, self.plan, self.cpus)
            at_work[actor.ready.remote()] = (actor, None)

        for _ in range(self.actors):
            hire()
        while True:
            while idle and (again or not exhausted):
                chunk = again.popleft() if again else next(source, None)
                if chunk is None:
                    exhausted = True
                else:
                    actor = idle.popleft()
                    at_work[actor.do.remote(chunk)] = (actor, chunk)
            busy = any(chunk for _, chunk in at_work.values())
            if exhausted and not again and not busy:
                return
            ready, _ = self.ray.wait([*at_work], num_returns=1, timeout=PATIENCE)
            if not ready and not busy:
                raise WorkerError(
                    f"no worker with {self.cpus} CPUs and {self.gpus} GPUs could be started "
                    f"for {PATIENCE:.0f} s; see 'ray status', or ask for less"
                )
            for reference in ready:
                actor, chunk = at_work.pop(reference)
                answer = self._answer(reference, chunk)
                if not isinstance(answer, Exception):
                    idle.append(actor)
                else:
                    answer = self._lost(chunk, answer, losses)
                    hire()
                    if chunk and not answer:
                        again.append(chunk)
                if chunk and answer:
                    on_facts(float(chunk.missing))
                    yield answer

    def _answer(self, reference: Any, chunk: Chunk | None) -> Any:
        """What a worker gives back, or the exception that says that it was lost."""
        exceptions = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except exceptions.RayTaskError as error:
            reason = _first_line(error)
            raise WorkerError(
                f"a worker cannot load the model: {reason}"
                if chunk is None
                else f"chunk {chunk.index} cannot be done ({reason}); correct that and run the "
                "same command again to go on"
            ) from None
        except (
            exceptions.RayActorError,
            exceptions.ObjectLostError,
            exceptions.WorkerCrashedError,
        ) as error:
            return error

    def _lost(
        self, chunk: Chunk | None, error: Exception, losses: Counter[int]
    ) -> DoneChunk | None:
        """Count a lost worker; a chunk that cost too many of them is given up."""
        index = -1 if chunk is None else chunk.index
        losses[index] += 1
        if chunk is None:
            if losses[index] > LIVES * self.actors:
                raise WorkerError(
                    f"workers die while they load the model ({_first_line(error)}); is there "
                    "enough memory for so many?"
                )
            return None
        lost = losses[index]
        logger.warning("the worker of chunk %d was lost (%d of %d times)", index, lost, LIVES)
        if lost < LIVES:
            return None
        reason, layer = f"its worker was lost {LIVES} times", self.recipe.settings["layer"]
        rows = tuple(
            Row(first_columns(self.label, layer, fact, method.name, reason=reason))
            for fact in chunk.facts
            if fact.case_id not in chunk.done
            for method in self.plan.methods
        )
        return DoneChunk(index=index, rows=rows, seconds=0.0)


def _first_line(error: BaseException) -> str:
    """The cause in one line, without the trace of the worker."""
    cause: Any = getattr(error, "cause", None) or error
    return str(cause).strip().rpartition("\n")[2].strip() or type(cause).__name__
