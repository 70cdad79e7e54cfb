"""Causal tracing: which states of a prompt carry a fact (Meng et al. 2022, Section 2).

Every state from the subject's first token on is restored in turn (see
:mod:`firsttok.probes.restoration`), and :mod:`firsttok.probes.effects` averages over facts.

Noise is added to the subject's tokens alone. Where a prompt begins with its subject and there is no
BOS, position 0 is one of them, and there a state may be more than the subject's: in many models the
first token is what the others attend to where nothing calls for more, with a residual stream of a
size of its own. Noise can touch both, and a restored state can give both back, so effects on such
prompts need not be those of recall alone. ``Trace.norms`` tells whether the anomaly outlives the
noise, and ``Trace.first_token`` such facts from others. Behind a BOS position 0 is never touched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.errors import BadInputError, HyperparameterError
from firsttok.models import Model, logits
from firsttok.probes.restoration import KINDS, Corruption, Runs, State, subject_range
from firsttok.prompts import Prompt, batches, fact_prompt, pad, with_target
from firsttok.storage import content_hash, read_record, write_record
from firsttok.study import Study

__all__ = [
    "LAST_SUBJECT",
    "ROLES",
    "Trace",
    "answered_facts",
    "default_window",
    "token_roles",
    "trace_fact",
    "trace_facts",
    "window_layers",
]

LAST_SUBJECT = "last subject token"
ROLES = (
    "first subject token",
    "middle subject tokens",
    LAST_SUBJECT,
    "first subsequent token",
    "further tokens",
    "last token",
)
"""The roles of a prompt's tokens (Figure 2 of Meng et al.); tokens before the subject have none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One fact, with every state restored in turn from the subject's first token on."""

    case_id: int
    subject: str
    answer_id: int
    """The token that the model puts first, whose probability is traced."""
    positions: tuple[int, ...]
    """Absolute positions of the restored tokens; nothing before the subject is corrupted."""
    roles: tuple[str, ...]
    """What each of them is (see :func:`token_roles`)."""
    clean: float
    """P."""
    corrupted: float
    """P*, mean over the samples."""
    restored: Mapping[str, Float[Tensor, "layer pos"]]
    """By kind: P* with the state at a layer, or the window around it, and position restored."""
    norms: Float[Tensor, "2 layer"]
    """Norm of the residual stream at the subject's first token after each layer: clean, then
    corrupted (mean over the samples)."""

    @property
    def total_effect(self) -> float:
        """TE = P - P*."""
        return self.clean - self.corrupted

    @property
    def first_token(self) -> bool:
        """Whether the subject begins the whole sequence, so that position 0 is corrupted."""
        return self.positions[0] == 0

    def indirect_effects(self, kind: str) -> Float[Tensor, "layer pos"]:
        """IE = P*, restored, - P*, of one kind of state."""
        return self.restored[kind] - self.corrupted

    def as_record(self) -> dict[str, Any]:
        """The trace as JSON."""
        record = dict(vars(self))
        record["norms"] = self.norms.tolist()
        record["restored"] = {kind: values.tolist() for kind, values in self.restored.items()}
        return record

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> "Trace":
        """Read what :meth:`as_record` gave."""
        fields = dict(record)
        for name in ("positions", "roles"):
            fields[name] = tuple(fields[name])
        fields["norms"] = torch.tensor(fields["norms"], dtype=torch.float64)
        fields["restored"] = {
            kind: torch.tensor(values, dtype=torch.float64)
            for kind, values in fields["restored"].items()
        }
        return Trace(**fields)


@taken
def token_roles(prompt: Prompt) -> tuple[str, ...]:
    """Name the role of each token from the subject's first one on.

    Every token has one role: the one token of a subject is its last, and the one token after a
    subject is the prompt's last. (The released notebook counts such a token twice, once as the
    first, and with many one-token subjects the two rows would be the same.)

    Raises:
        BadInputError: If the prompt has no subject.
    """
    start, end = subject_range(prompt)
    roles: list[str] = []
    for position in range(start, prompt.last_position + 1):
        if position < end:
            last, first = position == end - 1, position == start
            roles.append(ROLES[2 if last else 0 if first else 1])
        else:
            last, first = position == prompt.last_position, position == end
            roles.append(ROLES[5 if last else 3 if first else 4])
    return tuple(roles)


@taken
def default_window(n_layers: int) -> int:
    """How many layers of MLP or attention are restored together: 10 of 48, as in GPT-2-XL."""
    return max(1, round(n_layers * 10 / 48))


@taken
def window_layers(layer: int, width: int, n_layers: int) -> range:
    """The layers of a window, cut off at the model's ends; of an even one, one more lies below.

    Raises:
        HyperparameterError: If the window holds no layer.
    """
    if width < 1:
        raise HyperparameterError(f"a window of {width} layers is empty; give at least 1")
    return range(max(0, layer - width // 2), min(n_layers, layer + (width + 1) // 2))


@taken
def answered_facts(model: Model, facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """Return the facts whose true target begins with the token that the model puts first.

    Facts whose true target is not known are none of them.
    """
    facts = [fact for fact in facts if fact.target_true]
    prompts = [fact_prompt(model, fact) for fact in facts]
    right: set[int] = set()
    for group in batches(prompts, max_tokens=512):
        batch = pad(model, [prompts[index] for index in group])
        ends = batch.columns(torch.tensor([prompts[index].last_position for index in group]))
        rows = torch.arange(len(group), device=model.device)
        found = logits(model, batch)[rows, ends].argmax(-1).tolist()
        for index, predicted in zip(group, found, strict=True):
            fact = facts[index]
            true = with_target(model, prompts[index], fact.target_true, join=fact.join)
            if true.target_ids[0] == predicted:
                right.add(index)
    return tuple(fact for index, fact in enumerate(facts) if index in right)


@taken
@torch.no_grad()
def trace_fact(
    model: Model,
    fact: Fact,
    corruption: Corruption,
    *,
    kinds: Sequence[str] = KINDS,
    window: int | None = None,
    max_tokens: int = 512,
    on_step: Callable[[float], None] | None = None,
) -> Trace:
    """Restore every state of a prompt in turn (Section 2.1 and Figure 1 of Meng et al.).

    Only what a restored state can change runs again: the blocks from its layer on, the tokens from
    its own on, all samples and several layers side by side.

    Args:
        model: A decoder; its interventions hold.
        fact: The fact; its prompt is the bare one.
        corruption: The noise.
        kinds: Kinds of states, of :data:`KINDS`.
        window: How many layers' MLPs or attentions are restored together, centred at each layer;
            None for :func:`default_window`. The residual stream is restored at one layer.
        max_tokens: Most tokens of a batch.
        on_step: Called with the share that was done since the last call.

    Raises:
        BadInputError: If there is no such kind.
        HyperparameterError: If the window holds no layer.
        NonFiniteError: If a probability is NaN.
        UnsupportedModelError: If the model is no decoder.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise BadInputError(f"no state is called {kind!r}; take {', '.join(KINDS)}")
    runs = Runs(model, fact, corruption)
    count = model.n_layers
    width = default_window(count) if window is None else window
    start, _ = subject_range(runs.prompt)
    places = range(start, runs.prompt.last_position + 1)
    plans = [
        tuple(
            State(kind=kind, layer=near, position=position)
            for near in window_layers(layer, 1 if kind == "hidden" else width, count)
        )
        for kind in kinds
        for layer in range(count)
        for position in places
    ]
    found = torch.empty(len(plans), dtype=torch.float64)
    for group, probabilities in runs.in_groups(plans, max_tokens=max_tokens):
        found[group] = probabilities
        if on_step is not None:
            on_step(len(group) / len(plans))
    table = rearrange(found, "(kind layer place) -> kind layer place", kind=len(kinds), layer=count)
    return Trace(
        case_id=fact.case_id,
        subject=fact.subject,
        answer_id=runs.answer_id,
        positions=tuple(places),
        roles=token_roles(runs.prompt),
        clean=runs.clean,
        corrupted=runs.corrupted,
        restored=dict(zip(kinds, table, strict=True)),
        norms=runs.norms(start),
    )


@taken
def trace_facts(
    study: Study,
    facts: Sequence[Fact],
    corruption: Corruption,
    *,
    window: int | None = None,
    progress: Progress | None = None,
) -> list[Trace]:
    """As :func:`trace_fact`; finished traces are kept in the study's folder and found there."""
    bar = progress or Progress(disable=True)
    task = bar.add_task("tracing", total=len(facts))
    on_step = partial(bar.advance, task)
    width = default_window(study.model.n_layers) if window is None else window
    traces: list[Trace] = []
    for fact in facts:
        path = _path(study, fact, corruption, width)
        trace = None if path is None else _read(path)
        if trace is None:
            trace = trace_fact(study.model, fact, corruption, window=width, on_step=on_step)
            if path is not None and _path(study, fact, corruption, width) == path:
                write_record(path, trace.as_record())
        traces.append(trace)
        bar.update(task, completed=len(traces))
    return traces


def _path(study: Study, fact: Fact, corruption: Corruption, window: int) -> Path | None:
    """Where a trace is kept; None without a folder, or while something disturbs the model."""
    if study.work is None or study.model.disturbance is not None:
        return None
    key = [
        study.model.identity(),
        [corruption.scale, corruption.samples, corruption.seed, window, list(KINDS)],
        fact.as_record(),
    ]
    return study.work / "traces" / f"{content_hash(key)[:24]}.json"


def _read(path: Path) -> Trace | None:
    try:
        return Trace.from_record(read_record(path, "a finished trace"))
    except (BadInputError, KeyError, TypeError, ValueError):
        return None
