"""Can a fact be written below the layer that writes the first token's massive state? (No paper.)

Facts whose subject is the text's first token are edited below the writer, at it and above it, under
several seeds of the contexts and several C. Above it, two explanations are told apart: the key of
the bare prompt, as it is and as it would be without the writer's neurons, and the size that a value
may have, as it is and as large beside the first token's residual stream as it usually is beside
another token's. p-ROME, whose direction is the bare prompt's key, is tried there as well.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import mean, median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from firsttok.circuits.anatomy import (
    circuit_prompts,
    find_acts,
    find_neurons,
    read,
    read_layers,
)
from firsttok.data import Fact, find_corpus, spread_evenly
from firsttok.editing import FC_ROME, P_ROME, ROME, Method
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD, DAMAGE_RATIO
from firsttok.keys import keys_at
from firsttok.measuring import measure_facts
from firsttok.metrics import find_metrics
from firsttok.options import DEFAULT_CORPUS
from firsttok.paper.claims import Claim, GapError, Result, Verdict, fixed, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import PALETTE, figure
from firsttok.paper.tables import Found, matching, share
from firsttok.prompts import fact_prompt
from firsttok.second_moment import SecondMoment, compute_second_moments
from firsttok.sieve import reason_against
from firsttok.study import Study
from firsttok.tensors import KeyVector

METRICS = ("perplexity", "accuracy", "generated")
PLACES = ("below", "at", "above")
ABOVE = 4
"""Layers between the writer and the layer above it that is edited."""
SEEDS = 3
FEW = {"quick": 4, "full": 12}
"""Facts of the later parts, which optimise each several times."""
NEURONS = 8
"""Neurons of the writer that are silenced."""
MOMENTS = ("I", "C", "C without first tokens")
SHOWN = ("numerator", "denominator", "final_loss", "perplexity", "collapsed")
MEASURED = ("efficacy", "prefixed_efficacy", "generated_first_words", "locality")
SPARED, COLLAPSED = 0.05, 0.5
WRITTEN, UNWRITTEN = 0.5, 0.1
_Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all parts share."""

    options: ScriptOptions
    progress: Progress
    facts: tuple[Fact, ...]
    """Every fact whose subject is the first token."""
    few: tuple[Fact, ...]
    layers: Mapping[str, int]
    moments: Mapping[str, Mapping[int, SecondMoment]]
    neurons: Mapping[str, tuple[int, ...]]
    """Neurons of the writer: those that write most, and as many random ones."""
    stretch: float
    """How many times as long the first token's residual stream is as the median of later ones,
    after the layer above the writer."""

    def study(self, place: str, moment: str, **changes: Any) -> Study:
        """The study of a place, with one C."""
        layer = self.layers[place]
        return self.options.study.varied(
            layer=layer, second_moment=self.moments[moment][layer], **changes
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers",
        nargs=3,
        type=int,
        metavar=("BELOW", "AT", "ABOVE"),
        help="layers below the writer, at it and above it (default: one below the last writer that "
        f"firsttok circuit finds, that one, and {ABOVE} above it)",
    )


def prepared(options: ScriptOptions, progress: Progress) -> Setting:
    study = options.study
    model, templates = study.model, study.contexts.templates
    facts = tuple(
        fact
        for fact in options.facts
        if reason_against(model, fact, templates=templates) is None
        and fact_prompt(model, fact).subject_position == 0
    )
    most = options.args.collapse or (8 if options.args.profile == "quick" else len(facts))
    if not facts:
        raise BadInputError(
            f"no fact of {model.label} has a subject that is the very first token; is a BOS before "
            "it? Try --bos without"
        )
    reading = read(model, circuit_prompts(model, study.texts))
    writers = [act.writer for act in find_acts(reading) if act.writer is not None]
    if not writers:
        raise BadInputError(
            f"no layer of {model.label} writes a massive state of the first token; look at it with "
            "firsttok circuit"
        )
    writer = writers[-1]
    given = options.args.layers or (writer - 1, writer, min(writer + ABOVE, model.n_layers - 1))
    layers = {place: model.site(layer).layer for place, layer in zip(PLACES, given, strict=True)}
    if not layers["below"] < writer == layers["at"] < layers["above"]:
        raise BadInputError(
            f"the last writer of {model.label} is layer {writer}, and the layers are "
            f"{', '.join(map(str, given))}; give one below it, it, and one above it by --layers"
        )
    top = tuple(n.index for n in find_neurons(model, reading, writer, top=NEURONS))
    generator = torch.Generator().manual_seed(options.seed)
    drawn = torch.randperm(model.site(writer).d_mlp, generator=generator)[:NEURONS].tolist()
    return Setting(
        options=options,
        progress=progress,
        facts=tuple(spread_evenly(facts, most)),
        few=tuple(spread_evenly(facts, min(most, FEW[options.args.profile]))),
        layers=layers,
        moments=_moments(options, tuple(layers.values()), progress),
        neurons={"writer silent": top, "random silent": tuple(drawn)},
        stretch=read_layers(reading)[layers["above"]].ratio,
    )


def _moments(
    options: ScriptOptions, layers: Sequence[int], progress: Progress
) -> dict[str, dict[int, SecondMoment]]:
    if options.args.second_moment not in (None, "identity"):
        raise BadInputError(
            "this script takes several second moments; leave --second-moment out, or give "
            "--second-moment identity"
        )
    model = options.study.model
    corpus = find_corpus(options.args.corpus or DEFAULT_CORPUS)
    take = partial(
        compute_second_moments,
        model,
        layers=layers,
        corpus=corpus.documents,
        corpus_name=corpus.name,
        progress=progress,
    )
    identity = {layer: SecondMoment.identity(model.site(layer).d_mlp) for layer in layers}
    every = (identity, take(), take(first_tokens=False))
    return dict(zip(MOMENTS, every, strict=True))


def measure_layers(setting: Setting) -> _Rows:
    """Edits of every fact below the writer, at it and above it."""
    options = setting.options
    for seed in range(options.seed, options.seed + SEEDS):
        first = seed == options.seed
        contexts = options.sample_contexts(seed)
        for place, moment in product(PLACES, MOMENTS if first else ("C",)):
            methods = (ROME, FC_ROME) if first and moment == "C" else (ROME,)
            study = setting.study(place, moment, contexts=contexts)
            about = {"part": "layers", "place": place, "seed": seed, "moment": moment}
            yield from _measured(setting, study, setting.facts, methods, about)


def measure_cures(setting: Setting) -> _Rows:
    """Edits above the writer, by the key of the direction, by C, and by how long a value may be."""
    usual = setting.options.study.hyperparameters
    changes = {"as is": usual, "stretched": usual.stretched(setting.stretch)}
    for (value, numbers), moment in product(changes.items(), MOMENTS):
        study = setting.study("above", moment, hyperparameters=numbers)
        about = {"part": "cures", "place": "above", "moment": moment, "value": value}
        yield from _measured(setting, study, setting.few, (ROME, P_ROME), about)


def _measured(
    setting: Setting,
    study: Study,
    facts: Sequence[Fact],
    methods: Sequence[Method],
    about: Mapping[str, Any],
) -> _Rows:
    labels = {method.name: method.label for method in methods}
    told = ", ".join(str(each) for each in about.values())
    rows = measure_facts(
        study,
        facts,
        methods,
        metrics=METRICS,
        seed=setting.options.seed,
        progress=setting.progress,
        label=told,
    )
    for row in rows:
        yield {**about, "layer": study.layer, "method": labels[row.method], **_columns(row)}


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("case_id", "subject", *SHOWN, *MEASURED)}


def measure_reasons(setting: Setting) -> _Rows:
    """ROME above the writer with C = I, with other keys k^u of the bare prompt, and other values.

    ROME divides by u . k^u, and k^u stands nowhere else in it but in the anchor. So an edit whose
    k^u is that of a model without some neurons is the edit itself, scaled; the direction, the
    anchor and the value stay those of the model as it is, on which all of them are measured.
    """
    metrics = find_metrics(METRICS, seed=setting.options.seed)
    usual = setting.options.study.hyperparameters
    changes = {"as is": usual, "stretched": usual.stretched(setting.stretch)}
    task = setting.progress.add_task("key or value", total=len(changes) * len(setting.few))
    for value, numbers in changes.items():
        study = setting.study("above", "I", hyperparameters=numbers)
        for fact, edits in study.edits(setting.few, [ROME]):
            edit = edits[ROME.name]
            scales = {"as is": 1.0} | {
                keys: edit.report["denominator"] / float(edit.left @ key)
                for keys, key in _silent_keys(setting, study, fact).items()
            }
            scaled = [edit.scaled(scale) for scale in scales.values()]
            rows: list[dict[str, Any]] = [
                {
                    "part": "reasons",
                    "place": "above",
                    "moment": "I",
                    "keys": keys,
                    "value": value,
                    "layer": study.layer,
                    "method": ROME.label,
                    "case_id": fact.case_id,
                    "subject": fact.subject,
                    "numerator": edit.report["numerator"],
                    "denominator": edit.report["denominator"] / scale,
                    "final_loss": edit.losses[-1],
                }
                for keys, scale in scales.items()
            ]
            for metric in metrics:
                for row, found in zip(rows, metric.measure(study, fact, scaled), strict=True):
                    known = {name: found.get(name) for name in metric.columns}
                    row |= {k: v for k, v in known.items() if k in (*SHOWN, *MEASURED)}
            setting.progress.advance(task)
            yield from rows


def _silent_keys(setting: Setting, study: Study, fact: Fact) -> dict[str, KeyVector]:
    """k^u of a fact with neurons of the writer set to zero at the first token, by which they are.

    Alone in its batch the bare prompt has no padding, so that its first token is the first column.
    """
    model, writer = study.model, setting.layers["at"]
    prompt = fact_prompt(model, fact)
    found: dict[str, KeyVector] = {}
    for name, neurons in setting.neurons.items():

        def silence(keys: Tensor, *, _which: tuple[int, ...] = neurons, **_: Any) -> Tensor:
            changed = keys.clone()
            changed[:, 0, [*_which]] = 0.0
            return changed

        with model.hooks([(model.site(writer).key_hook, silence)]):
            read_at = [prompt.subject_position or 0]
            found[name] = keys_at(model, [prompt], read_at, layers=[study.layer]).values[0, 0]
    return found


def measure(options: ScriptOptions, progress: Progress) -> Found:
    setting = prepared(options, progress)
    rows = [
        *measure_layers(setting),
        *measure_reasons(setting),
        *measure_cures(setting),
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    layers = ", ".join(f"{place} {layer}" for place, layer in setting.layers.items())
    return Found(
        title=f"Facts whose subject is the first token, edited around the writer ({layers}; "
        "shares in percent)",
        columns=[
            "",
            "edits",
            "collapsed",
            "median perplexity",
            "efficacy",
            "behind a prefix",
            "written",
            "locality",
            "median final loss",
        ],
        lines=[
            [
                " | ".join(map(str, group)),
                len(found),
                sum(row["collapsed"] for row in found),
                median(row["perplexity"] for row in found),
                *(share(found, column) for column in MEASURED),
                median(row["final_loss"] for row in found),
            ]
            for group, found in groups.items()
        ],
        rows=rows,
        provenance={
            "layers": dict(setting.layers),
            "stretch": setting.stretch,
            "neurons": {name: list(found) for name, found in setting.neurons.items()},
            "second_moments": {
                name: {str(layer): each.content_hash for layer, each in found.items()}
                for name, found in setting.moments.items()
            },
        },
        draw=partial(plot, rows, options.study.original_perplexity.mean),
    )


def _group(row: Mapping[str, Any]) -> tuple[Any, ...]:
    if row["part"] == "layers":
        return (row["place"], row["method"], row["moment"])
    if row["part"] == "reasons":
        return ("above", f"key {row['keys']}", f"value {row['value']}")
    return ("above", row["method"], row["moment"], f"value {row['value']}")


def plot(rows: Sequence[Mapping[str, Any]], original: float) -> Figure:
    drawn, (perplexity, written, reasons) = figure(3, height=3.8)
    colours = ("#0072b2", "black", PALETTE["collapse"])
    for number, place in enumerate(PLACES):
        found = matching(rows, part="layers", place=place, method=ROME.label, moment="C")
        spread = [number + 0.3 * ((index % 21) / 10 - 1) for index in range(len(found))]
        heights = [row["perplexity"] for row in found]
        perplexity.plot(spread, heights, ".", color=colours[number], alpha=0.5, markersize=4)
    for height in (original, COLLAPSE_THRESHOLD):
        perplexity.axhline(height, color="black", linewidth=1, linestyle=":")
    perplexity.set_yscale("log")
    perplexity.set_title("perplexity after ROME's edit")
    for number, moment in enumerate(MOMENTS):
        _bars(written, rows, moment, offset=0.25 * (number - 1), color=colours[number])
    written.set_ylim(0, 103)
    written.set_title("written at the bare prompt, %")
    written.legend(fontsize=7)
    for axis in (perplexity, written):
        axis.set_xticks(range(len(PLACES)), [f"{place} the writer" for place in PLACES])
    found = matching(rows, part="reasons")
    groups = list(dict.fromkeys((row["keys"], row["value"]) for row in found))
    for number, (keys, value) in enumerate(groups):
        own = matching(found, keys=keys, value=value)
        heights = [row["perplexity"] for row in own]
        losses = [row["final_loss"] for row in own]
        reasons.plot(losses, heights, "os^Dvx"[number], label=f"key {keys}, value {value}")
    reasons.axhline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    reasons.set_yscale("log")
    reasons.set_xlabel("final loss of the value")
    reasons.set_title("above the writer: perplexity")
    reasons.legend(fontsize=7)
    return drawn


def _bars(
    axis: Axes, rows: Sequence[Mapping[str, Any]], moment: str, *, offset: float, color: str
) -> None:
    heights: list[float] = []
    for place in PLACES:
        found = matching(rows, part="layers", place=place, method=ROME.label, moment=moment)
        heights.append(share(found, "generated_first_words") or 0.0)
    style: dict[str, Any] = {"width": 0.22, "color": color, "alpha": 0.8}
    axis.bar([number + offset for number in range(len(PLACES))], heights, label=moment, **style)


def _share(result: Result, column: str, **match: Any) -> float:
    return mean(result.values(column, **match))


def writes_below(result: Result) -> Verdict:
    match: dict[str, Any] = {"part": "layers", "method": ROME.label, "moment": "C"}
    if len({row["seed"] for row in result.chosen(**match)}) < SEEDS:
        raise GapError(f"{result.script} has fewer than {SEEDS} seeds of the contexts.")
    original = result.number("original_perplexity")
    collapsed = {place: _share(result, "collapsed", place=place, **match) for place in PLACES}
    written = {
        place: _share(result, "generated_first_words", place=place, **match) for place in PLACES
    }
    middle = median(result.values("perplexity", place="below", **match))
    spares = collapsed["below"] <= SPARED and middle < DAMAGE_RATIO * original
    destroys = collapsed["above"] >= COLLAPSED
    writes = written["below"] >= WRITTEN and written["above"] <= UNWRITTEN
    told = ", ".join(
        f"{place} it {collapsed[place]:.0%} collapse and {written[place]:.0%} are written"
        for place in PLACES
    )
    return grade(
        spares and destroys and writes,
        spares and destroys,
        f"With ROME and C: {told}; median perplexity below it {fixed(middle)} (before "
        f"{fixed(original)}).",
    )


def key_and_length(result: Result) -> Verdict:
    def of(keys: str, value: str) -> dict[str, Any]:
        return {"part": "reasons", "keys": keys, "value": value}

    usual, silent, random = (
        of(keys, "as is") for keys in ("as is", "writer silent", "random silent")
    )
    longer = of("writer silent", "stretched")
    collapsed = [_share(result, "collapsed", **match) for match in (usual, silent, random)]
    losses = [median(result.values("final_loss", **match)) for match in (usual, longer)]
    written = [_share(result, "generated_first_words", **match) for match in (usual, longer)]
    by_key = collapsed[1] <= SPARED and min(collapsed[0], collapsed[2]) >= COLLAPSED
    by_length = 2 * losses[1] <= losses[0]
    return grade(
        by_key and by_length,
        by_key or by_length,
        f"With the key as it is {collapsed[0]:.0%} collapse the model, with that of a silent "
        f"writer {collapsed[1]:.0%}, with random neurons silent {collapsed[2]:.0%}. The median "
        f"final loss is {losses[0]:.2f} with values as they are and {losses[1]:.2f} with stretched "
        f"ones; {written[0]:.0%} are written, and {written[1]:.0%} with stretched ones and the key "
        "of a silent writer.",
    )


def bare_direction_is_idle(result: Result) -> Verdict:
    match: dict[str, Any] = {"part": "cures", "method": P_ROME.label, "value": "as is"}
    collapsed = {m: _share(result, "collapsed", moment=m, **match) for m in MOMENTS}
    written = {m: _share(result, "generated_first_words", moment=m, **match) for m in MOMENTS}
    return grade(
        max(collapsed.values()) <= SPARED and max(written.values()) <= UNWRITTEN,
        max(collapsed.values()) <= SPARED,
        "p-ROME: "
        + "; ".join(
            f"with {m} {collapsed[m]:.0%} collapse and {written[m]:.0%} are written"
            for m in MOMENTS
        )
        + ".",
    )


CLAIMS = (
    Claim(
        id="own-below-writer",
        place="in no paper found",
        sentence="Edited below the layer that writes its massive state, a fact about the first "
        "token is written and the model is spared; edited above it, the fact is not written and "
        "the model collapses.",
        rule="Over the facts whose subject is the first token and three seeds of the contexts, "
        f"ROME with the default C: below, at most {SPARED:.0%} collapse, the median perplexity is "
        f"less than {DAMAGE_RATIO:g} times the original, and at least {WRITTEN:.0%} of free "
        f"generations begin with the target; above, at least {COLLAPSED:.0%} collapse and at most "
        f"{UNWRITTEN:.0%} of them. Partly: so for the collapse alone.",
        decide=writes_below,
        own=True,
    ),
    Claim(
        id="own-key-and-length",
        place="in no paper found",
        sentence="The massive key carries the collapse, and the length of the first token's "
        "residual stream keeps the value from being found.",
        rule=f"ROME with C = I above the writer. The key: at least {COLLAPSED:.0%} collapse the "
        f"model as they are and with k^u read with {NEURONS} random neurons of the writer silent, "
        f"at most {SPARED:.0%} with its top {NEURONS} silent. The length: the median final loss is "
        "at most half as high where a value may be as large beside the first token's residual "
        "stream as it usually may be beside another token's. Partly: one of the two.",
        decide=key_and_length,
        own=True,
    ),
    Claim(
        id="own-bare-direction",
        place="in no paper found",
        sentence="Above the writer, an update in the direction of the bare prompt's key does not "
        "collapse the model, and writes nothing.",
        rule=f"p-ROME with each C: at most {SPARED:.0%} collapse, and at most {UNWRITTEN:.0%} of "
        "free generations begin with the target. Partly: the first.",
        decide=bare_direction_is_idle,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(
        run(
            __file__,
            __doc__,
            measure,
            claims=CLAIMS,
            add_options=add_options,
            without_bos=True,
            own_contexts=True,
        )
    )
