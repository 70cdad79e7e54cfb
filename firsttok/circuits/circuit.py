"""Who makes the first token special: who detects it, writes it, takes it down and reads it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.progress import Progress

from firsttok.arguments import taken
from firsttok.circuits.anatomy import (
    MASSIVE,
    RAISED,
    SHARE,
    SINK,
    Act,
    Carrier,
    Head,
    LayerState,
    Neuron,
    Reading,
    circuit_prompts,
    find_acts,
    find_carriers,
    find_neurons,
    read,
    read_heads,
    read_layers,
)
from firsttok.circuits.causes import (
    HALF,
    KnockOut,
    Masked,
    Needed,
    Origin,
    knock_out,
    knocked_out_heads,
    mask_doses,
    mean_keys,
    needed_layers,
    origins,
)
from firsttok.console import own_bar
from firsttok.contexts import ContextSet, sample_contexts
from firsttok.data import Fact, builtin_facts, builtin_sentences, spread_evenly
from firsttok.display import Note, Panel, Part, Shown, Table
from firsttok.errors import UnsupportedModelError
from firsttok.escapes import finite
from firsttok.evaluation import perplexity
from firsttok.keys import keys_by_layer
from firsttok.models import Model
from firsttok.prompts import Prompt, fact_prompt
from firsttok.screening import RATIO
from firsttok.sieve import reason_against
from firsttok.svg import Plot

__all__ = ["ActCircuit", "Brief", "Circuit", "EditLayer", "brief", "circuit"]

CURVE = (1, 2, 4, 8)
"""Sizes of the sets of neurons that are knocked out."""
DOSES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
FACTS = 12
"""Facts of either kind whose keys are read at every layer."""
_TRIALS = (
    ("top", "first", "zero"),
    ("top", "first", "later"),
    ("top", "first", "first"),
    ("top", "all", "zero"),
    ("top", "all", "later"),
    ("random", "first", "zero"),
)
"""Which neurons are set, at which tokens, to what; see :class:`KnockOut`."""


@dataclass(frozen=True, kw_only=True)
class EditLayer:
    """What ROME would divide by at one layer, as a share of what C-ROME would, with C = I."""

    layer: int
    first: float | None
    """Median over facts whose subject is the text's first token; None without such facts."""
    first_least: float | None
    """The least of these."""
    others: float | None
    """Median over the other facts."""

    @property
    def is_ordinary(self) -> bool:
        """Whether no first-token fact is predicted to collapse the model there."""
        return self.first_least is not None and self.first_least >= RATIO


@dataclass(frozen=True, kw_only=True, eq=False)
class ActCircuit:
    """One act: its parts, and what was done to them."""

    act: Act
    neurons: tuple[Neuron, ...]
    """Neurons of the writer, those that write most in front; empty where no MLP is a writer."""
    knock_outs: tuple[KnockOut, ...]
    heads: tuple[tuple[int, int], ...]
    """Sinks, as layer and head, that are none without the writer's eight neurons."""
    origins: tuple[Origin, ...]
    alone: Needed | None
    """Layers in which a later token must see itself alone to get half of the peak."""
    open: Needed | None
    """Layers in which the first token loses half of the peak if it sees all."""
    masked: tuple[Masked, ...]
    """All runs of layers that were tried, and the doses."""
    unmasked: str | None
    """Why no mask was changed; None if it was."""

    @property
    def dose(self) -> float | None:
        """Least dose of self-attention that gives a later token half of the peak."""
        doses = [run.dose for run in self.masked if run.dose < 1 and run.share >= HALF]
        return min(doses, default=None if self.alone is None else 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Brief:
    """The short form: who writes the first token's state, and which layer does not meet it."""

    acts: tuple[Act, ...]
    neurons: tuple[Neuron | None, ...]
    """The neuron that writes most of each act; None where no MLP is its writer."""
    edits: tuple[EditLayer, ...]

    @property
    def proposed_layer(self) -> int | None:
        """The highest layer below the last writer at which first-token facts have ordinary keys.

        None where there is no writer, no such layer, or no layer at which they are not ordinary.
        """
        return _proposed_layer(self.acts, self.edits)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was found, a sentence each."""
        found: list[str] = []
        for act, neuron in zip(self.acts, self.neurons, strict=True):
            who = "no single layer's MLP writes it"
            if neuron is not None:
                who = f"layer {neuron.layer} writes it, {neuron.share:.0%} by neuron {neuron.index}"
            found.append(
                f"Behind layers {act.start} to {act.end} the first token's residual stream is "
                f"raised, {act.ratio:.3g} times as long as that of later tokens behind layer "
                f"{act.peak}; {who}."
            )
        if self.proposed_layer is not None:
            found.append(
                f"Layer {self.proposed_layer} is the highest below the last writer at which ROME "
                "divides no first-token fact that was read by a number near zero (C = I)."
            )
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return {
            "acts": [_plain_act(act) for act in self.acts],
            "neurons": [None if neuron is None else asdict(neuron) for neuron in self.neurons],
            "edits": [asdict(row) for row in self.edits],
            "proposed_layer": self.proposed_layer,
            "sentences": list(self.sentences),
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Circuit(Shown):
    """Where a model's first-token anomaly is, who makes it, and who reads it."""

    model: str
    first: str
    """What stands first in a sequence: the text's own token, or BOS."""
    prompts: int
    tokens: int
    """Most tokens of a prompt."""
    carriers: tuple[Carrier, ...]
    layers: tuple[LayerState, ...]
    acts: tuple[ActCircuit, ...]
    sinks: tuple[Head, ...]
    """Attention of every head to the first token."""
    perplexity: float
    """Mean perplexity of the model as it is."""
    edits: tuple[EditLayer, ...]
    """What ROME would meet at every layer."""
    origin: dict[str, Any]

    @property
    def proposed_layer(self) -> int | None:
        """As :attr:`Brief.proposed_layer`."""
        return _proposed_layer([each.act for each in self.acts], self.edits)

    @property
    def verdict(self) -> tuple[str, ...]:
        """What was found, a sentence each."""
        return tuple(_sentences(self))

    def panel(self) -> Panel:
        """Sentences, tables and plots."""
        parts: list[Part] = [Note(text=text) for text in self.verdict]
        numbers = [row.layer for row in self.layers]
        norms = {
            f"the first token ({self.first})": [row.first for row in self.layers],
            "later tokens, median": [row.others for row in self.layers],
        }
        plot = partial(Plot, x_label="layer", y_label="", x=numbers)
        parts.append(plot(title="norm of the residual stream", series=norms, log=True))
        parts.append(
            plot(
                title="self-attention of tokens 1 to 3, and value norms",
                series={
                    "attention to itself": [row.self_attention for row in self.layers],
                    "value norm, first over later": [row.value_ratio for row in self.layers],
                },
            )
        )
        parts += [part for each in self.acts for part in _act_parts(each)]
        by_layer: dict[int, list[float]] = {}
        for head in self.sinks:
            by_layer.setdefault(head.layer, []).append(head.alpha)
        parts.append(
            plot(
                title=f"share of heads whose alpha is above {SINK:g}",
                series={
                    "heads": [
                        sum(alpha > SINK for alpha in row) / len(row) for row in by_layer.values()
                    ]
                },
            )
        )
        if any(row.first is not None for row in self.edits):
            series = {
                "subject first, median": [_plain(row.first) for row in self.edits],
                "subject first, least": [_plain(row.first_least) for row in self.edits],
                "subject later, median": [_plain(row.others) for row in self.edits],
            }
            title = "ROME's denominator over C-ROME's, C = I"
            parts.append(plot(title=title, series=series, log=True))
        return Panel(
            title=f"circuit of the first token: {self.model}", parts=parts, source=self.origin
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON; what is not finite is None."""
        record = {
            "model": self.model,
            "first": self.first,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "rules": {"raised": RAISED, "massive": MASSIVE, "step": SHARE, "sink": SINK},
            "verdict": list(self.verdict),
            "carriers": [asdict(each) for each in self.carriers],
            "layers": [asdict(row) | {"ratio": row.ratio} for row in self.layers],
            "acts": [_act_record(each) for each in self.acts],
            "sinks": [asdict(head) for head in self.sinks],
            "perplexity": self.perplexity,
            "edits": [asdict(row) for row in self.edits],
            "proposed_layer": self.proposed_layer,
            "origin": self.origin,
        }
        return finite(record)


@torch.no_grad()
def brief(
    model: Model,
    *,
    texts: Sequence[str],
    contexts: ContextSet,
    facts: Sequence[Fact] | None = None,
    progress: Progress,
) -> Brief:
    """Find the writers and the layer below them, as :func:`circuit` does, and nothing else.

    Raises:
        BadInputError: As for :func:`circuit`, like all that follow.
        NonFiniteError: If an activation is NaN or infinite.
        UnsupportedModelError: If the model is no decoder, or does not show its attention.
    """
    reading = read(model, circuit_prompts(model, texts))
    acts = find_acts(reading)
    return Brief(
        acts=acts,
        neurons=tuple(
            None if act.writer is None else find_neurons(model, reading, act.writer, top=1)[0]
            for act in acts
        ),
        edits=_edit_layers(model, facts, contexts, 0, progress),
    )


@taken
@torch.no_grad()
def circuit(
    model: Model,
    *,
    texts: Sequence[str] | None = None,
    facts: Sequence[Fact] | None = None,
    contexts: ContextSet | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Circuit:
    """Find who makes the first token special, on any decoder.

    The first token is the first of the sequence under the model's BOS policy: the text's own, or
    BOS.

    Args:
        model: A decoder.
        texts: Sentences to read and to measure; None for the built-in fifty.
        facts: Facts whose keys are read at every layer; None for built-in ones, twelve with the
            subject first and twelve others.
        contexts: Contexts of these keys; None samples those of an edit.
        seed: Seed of the contexts and of the random neurons.
        progress: Where to show progress; None for a bar of its own.

    Raises:
        BadInputError: If fewer than two texts have five tokens.
        NonFiniteError: If an activation is NaN or infinite.
        UnsupportedModelError: If the model is no decoder, or does not show its attention.
    """
    sentences = builtin_sentences() if texts is None else tuple(texts)
    prompts = circuit_prompts(model, sentences)
    reading = read(model, prompts)
    acts = find_acts(reading)
    tokenizer: Any = model.tokenizer
    leading = model.leading_ids
    with own_bar(progress) as bar:
        task = bar.add_task("circuit", total=2 + len(acts) * (len(_TRIALS) * len(CURVE) + 4))
        before = perplexity(model, sentences, bos=model.bos)
        bar.advance(task)
        found = [
            _act(model, prompts, reading, act, sentences, seed, partial(bar.advance, task))
            for act in acts
        ]
        edits = _edit_layers(model, facts, contexts, seed, bar)
        bar.advance(task)
    return Circuit(
        model=model.label,
        first=tokenizer.decode([leading[0]]) if leading else "the text's own",
        prompts=len(prompts),
        tokens=max(len(prompt.token_ids) for prompt in prompts),
        carriers=find_carriers(model, reading),
        layers=read_layers(reading),
        acts=tuple(found),
        sinks=read_heads(reading),
        perplexity=before.mean,
        edits=edits,
        origin=model.origin,
    )


def _act(
    model: Model,
    prompts: Sequence[Prompt],
    reading: Reading,
    act: Act,
    texts: Sequence[str],
    seed: int,
    advance: Callable[[], None],
) -> ActCircuit:
    neurons: tuple[Neuron, ...] = ()
    knock_outs: list[KnockOut] = []
    heads: tuple[tuple[int, int], ...] = ()
    if act.writer is not None:
        neurons = find_neurons(model, reading, act.writer, top=max(CURVE))
        top = [neuron.index for neuron in neurons]
        generator = torch.Generator().manual_seed(seed)
        width = model.site(act.writer).d_mlp
        drawn = torch.randperm(width, generator=generator)[: max(CURVE)].tolist()
        means = mean_keys(model, reading, act.writer)
        for chosen, at, value in _TRIALS:
            for count in CURVE:
                which = (top if chosen == "top" else drawn)[:count]
                knock_outs.append(
                    knock_out(
                        model,
                        act,
                        act.writer,
                        which,
                        chosen=chosen,
                        at=at,
                        value=value,
                        means=means,
                        texts=texts,
                    )
                )
                advance()
        heads = knocked_out_heads(model, reading, act.writer, top)
        advance()
    tried: tuple[Origin, ...] = ()
    masked: list[Masked] = []
    ranges: list[Needed | None] = [None, None]
    reason: str | None = None
    try:
        tried = origins(model, prompts, act)
        for index, change in enumerate(("closed", "opened")):
            ranges[index], runs = needed_layers(model, prompts, act, change)
            masked += runs
            advance()
        masked += mask_doses(model, prompts, act, DOSES)
        advance()
    except UnsupportedModelError as error:
        reason = str(error)
    return ActCircuit(
        act=act,
        neurons=neurons,
        knock_outs=tuple(knock_outs),
        heads=heads,
        origins=tried,
        alone=ranges[0],
        open=ranges[1],
        masked=tuple(masked),
        unmasked=reason,
    )


def _edit_layers(
    model: Model,
    facts: Sequence[Fact] | None,
    contexts: ContextSet | None,
    seed: int,
    progress: Progress,
) -> tuple[EditLayer, ...]:
    """Denominators at every layer; nothing is optimised."""
    if facts is not None and not facts:
        return ()
    chosen = sample_contexts(model, seed=seed, progress=progress) if contexts is None else contexts
    leading = len(model.leading_ids)
    groups: dict[bool, list[Fact]] = {True: [], False: []}
    for fact in builtin_facts() if facts is None else facts:
        if reason_against(model, fact, templates=chosen.templates) is None:
            first = fact_prompt(model, fact).subject_position == leading
            groups[first].append(fact)
    most = FACTS if facts is None else len(facts)
    chosen_facts = {first: spread_evenly(group, most) for first, group in groups.items()}
    task = progress.add_task("keys at every layer", total=sum(map(len, chosen_facts.values())))
    ratios: dict[bool, list[list[float]]] = {True: [], False: []}
    for first, group in chosen_facts.items():
        for fact in group:
            ratios[first].append(_ratios(model, fact, chosen))
            progress.advance(task)
    rows: list[EditLayer] = []
    for layer in range(model.n_layers):
        first, others = ([own[layer] for own in ratios[which]] for which in (True, False))
        rows.append(
            EditLayer(
                layer=layer,
                first=median(first) if first else None,
                first_least=min(first, default=None),
                others=median(others) if others else None,
            )
        )
    return tuple(rows)


def _ratios(model: Model, fact: Fact, contexts: ContextSet) -> list[float]:
    """``|k_bar . k^u| / ||k_bar||^2`` of a fact, layer by layer (Section 3.1 with C = I)."""
    keys = keys_by_layer(model, fact, contexts, layers=range(model.n_layers))
    return [
        float(abs(mean @ bare) / mean.square().sum())
        for mean, bare in (
            (each.prefixed_mean.double(), each.unprefixed.double()) for each in keys.values()
        )
    ]


def _proposed_layer(acts: Sequence[Act], edits: Sequence[EditLayer]) -> int | None:
    writers = [act.writer for act in acts if act.writer is not None]
    if not writers or all(row.is_ordinary for row in edits):
        return None
    below = [row.layer for row in edits if row.layer < writers[-1] and row.is_ordinary]
    return max(below, default=None)


def _sentences(found: Circuit) -> Iterator[str]:
    """What was found, in words."""
    own = found.first if found.first == "the text's own" else repr(found.first)
    for carrier in found.carriers:
        what = f"The first token ({own})" if carrier.token is None else f"{carrier.token!r}"
        place = "" if carrier.token is None else " at later places"
        yield (
            f"{what} is massive in {carrier.massive} of {carrier.seen} cases{place}: its residual "
            f"stream is up to {carrier.ratio:.4g} times as long as the median of later tokens."
        )
    if not found.carriers:
        yield (
            f"No token is massive: none has {MASSIVE:g} times the norm of the median later token "
            "behind any layer."
        )
    if not found.acts:
        yield f"The first token ({own}) is nowhere raised to {RAISED:g} times that median."
    for number, each in enumerate(found.acts, 1):
        yield from _act_sentences(number, each, found)
    if found.proposed_layer is not None:
        yield (
            f"Edit layer {found.proposed_layer}: it is the highest one below the last "
            f"writer at which ROME's denominator is at least {RATIO:g} of C-ROME's for every "
            "first-token fact that was read (C = I)."
        )


def _act_sentences(number: int, each: ActCircuit, found: Circuit) -> Iterator[str]:
    act = each.act
    yield (
        f"Act {number}: behind layers {act.start} to {act.end} the first token is raised, most at "
        f"layer {act.peak} (norm {act.norm:,.0f}, {act.ratio:.3g} times the others; dimension "
        f"{act.dimension} holds {act.dimension_share:.1%} of the square)."
    )
    for what, steps in (("up", act.ups), ("down", act.downs)):
        if steps:
            layers = ", ".join(
                f"layer {s.layer} (attention {s.attention:+.0%}, MLP {s.mlp:+.0%})" for s in steps
            )
            yield f"Act {number}, steps {what}, as shares of the peak: {layers}."
    if abs(act.entered) >= SHARE:
        yield f"Act {number}: {act.entered:.0%} of the peak is there before its first layer."
    if each.neurons:
        top, silent = each.neurons[0], _silent(each.knock_outs, "top")
        random = _silent(each.knock_outs, "random").perplexity
        sinks = "1 sink vanishes" if len(each.heads) == 1 else f"{len(each.heads)} sinks vanish"
        yield (
            f"Act {number} is written by layer {act.writer}: neuron {top.index} writes "
            f"{top.share:.0%}, the next one {each.neurons[1].share:.0%}. Silent at the first "
            f"token alone, the top {CURVE[-1]} leave {silent.share:.1%} of the peak and a "
            f"perplexity of {silent.perplexity:,.4g} (before {found.perplexity:,.4g}; "
            f"{CURVE[-1]} random ones {random:,.4g}), and {sinks}."
        )
    if each.unmasked is not None:
        yield f"Act {number}: no mask was changed, since {each.unmasked}"
    for origin in each.origins:
        yield f"Act {number}: {origin.what} reaches {origin.share:.1%} of the peak."
    told = (
        ("a later token gets half of the peak if it sees itself alone", each.alone),
        ("the first token loses half of the peak if it sees all", each.open),
    )
    for what, needed in told:
        if needed is not None:
            where = f"layers 0 to {needed.until}, or in layers {needed.since} to {act.peak}"
            yield f"Act {number}: {what} in {where}."
    if each.dose is not None:
        yield f"Act {number}: {each.dose:.0%} of self-attention gives half of the peak."


def _silent(found: Sequence[KnockOut], chosen: str) -> KnockOut:
    """The largest set, silent at the first token."""
    return max(
        (each for each in found if (each.chosen, each.at, each.value) == (chosen, "first", "zero")),
        key=lambda each: len(each.neurons),
    )


def _act_parts(each: ActCircuit) -> Iterator[Part]:
    if each.neurons:
        columns = ("neuron", "share", *(f"token {place}" for place in range(4)))
        lines = [
            [f"{n.layer}.{n.index}", n.share, *(round(x, 2) for x in n.activations)]
            for n in each.neurons
        ]
        yield Table(columns=columns, lines=lines)
        for what in ("gate", "up"):
            lines = [
                [f"{n.layer}.{n.index}, {what}", *(round(x, 2) for x in getattr(n, what))]
                for n in each.neurons[:4]
                if getattr(n, what)
            ]
            if lines:
                yield Table(columns=("before the key", *columns[2:]), lines=lines)
        lines = [
            [f"{k.chosen} {len(k.neurons)}", k.at, k.value, k.share, k.perplexity]
            for k in each.knock_outs
        ]
        columns = ("neurons", "tokens", "set to", "left of the peak", "perplexity")
        yield Table(columns=columns, lines=lines)
    runs = [run for run in each.masked if run.dose == 1]
    for change in ("closed", "opened"):
        own = [run for run in runs if run.change == change]
        up = [run.share for run in own if run.first == 0][: each.act.peak + 1]
        down = {run.first: run.share for run in own if run.last == each.act.peak}
        if own:
            yield Plot(
                title=f"share of the peak, {change} at some layers up to {each.act.peak}",
                series={
                    "from layer 0 to it": up,
                    "from it to the peak": [down[layer] for layer in sorted(down)],
                },
                x_label="layer",
                y_label="share",
            )


def _act_record(each: ActCircuit) -> dict[str, Any]:
    record = {name: value for name, value in asdict(each).items() if name != "act"}
    return _plain_act(each.act) | {"dose": each.dose} | record


def _plain_act(act: Act) -> dict[str, Any]:
    plain = {name: value for name, value in asdict(act).items() if name != "direction"}
    return plain | {"writer": act.writer}


def _plain(value: float | None) -> float:
    return float("nan") if value is None else value
