"""At which layers does an edit collapse the model, and at which does it write? (In no paper.)

Denominators of all facts are read at every layer; nothing is optimised for them. Then facts that no
table uses are edited at every layer, some whose subject is the text's first token and some others.
What is predicted of the first ones on SmolLM2-135M was written down before they were edited.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.data import Fact, find_corpus
from firsttok.editing import C_ROME, FC_ROME, ROME
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD, DAMAGE_RATIO
from firsttok.keys import keys_by_layer
from firsttok.measuring import measure_facts
from firsttok.options import DEFAULT_CORPUS
from firsttok.paper.cases import fresh_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import PALETTE, figure
from firsttok.paper.tables import Found, matching, share
from firsttok.prompts import fact_prompt
from firsttok.screening import RATIO, screen_keys
from firsttok.second_moment import SecondMoment, compute_second_moments
from firsttok.sieve import reason_against
from firsttok.storage import content_hash, read_json

METHODS = (ROME, C_ROME, FC_ROME)
KINDS = ("first", "other")
MEASURED = (
    "efficacy",
    "prefixed_efficacy",
    "generated_first_words",
    "generalization",
    "locality",
)
SHOWN = ("numerator", "denominator", "perplexity", "collapsed")
EDITED = {"quick": 3, "full": 12}
"""Facts of either kind that are edited at every layer."""
PREDICTED = {
    "collapse": tuple(range(12, 29)),
    "damage": tuple(range(3, 9)),
    "nothing": (0, 1, 9, 10),
}
"""Of ROME's edits of first-token facts on SmolLM2-135M, from where its first token is massive
(``firsttok circuit``), and from edits of three facts at five layers with C = I. Nothing was
predicted for layers 2 and 11, which write the two anomalies, and for the last one."""
PREDICTED_FOR = "smollm2-135m"
CELLS = ("collapsed", "median perplexity", "written")
SCORED = ("generated_first_words", "generalization", "locality")
NEAR = 10.0
TRIED = ("Germany", "Egypt", "Lincoln", "England")
"""Subjects of the trials behind the prediction: a first token's key is decided by it alone."""
_FORMAT = 1
"""Goes up when rows are measured otherwise."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="LAYER",
        help="layers at which facts are edited (default: every layer)",
    )


def moments_of(
    options: ScriptOptions, layers: Sequence[int], progress: Progress
) -> dict[int, SecondMoment]:
    model, given = options.study.model, options.args.second_moment
    if given == "identity":
        return {layer: SecondMoment.identity(model.site(layer).d_mlp) for layer in layers}
    if given is not None:
        raise BadInputError(
            "this script takes the second moment at every layer; leave --second-moment out, or "
            "give --second-moment identity"
        )
    corpus = find_corpus(options.args.corpus or DEFAULT_CORPUS)
    return compute_second_moments(
        model,
        layers=layers,
        corpus=corpus.documents,
        corpus_name=corpus.name,
        progress=progress,
    )


def read_denominators(
    options: ScriptOptions, moments: Mapping[int, SecondMoment], progress: Progress
) -> Iterator[dict[str, Any]]:
    """What the keys of all facts say at every layer, by where the subject is."""
    study = options.study
    model, templates = study.model, study.contexts.templates
    facts = [
        fact for fact in options.facts if reason_against(model, fact, templates=templates) is None
    ]
    by_layer = {
        layer: study.varied(layer=layer, second_moment=moment) for layer, moment in moments.items()
    }
    found: dict[tuple[int, str], list[Any]] = {}
    for fact in progress.track(facts, description="denominators"):
        kind = KINDS[fact_prompt(model, fact).subject_position != 0]
        keys = keys_by_layer(model, fact, study.contexts, layers=moments)
        for layer, own in by_layer.items():
            found.setdefault((layer, kind), []).append(screen_keys(own, fact, keys[layer]))
    for (layer, kind), rows in sorted(found.items()):
        ratios = [row.ratio for row in rows]
        yield {
            "part": "keys",
            "layer": layer,
            "kind": kind,
            "facts": len(rows),
            "ratio": median(ratios),
            "least_ratio": min(ratios),
            "hard": sum(row.is_hard(None) for row in rows),
            "denominator": median(abs(row.denominator) for row in rows),
            "key_cosine": median(row.key_cosine for row in rows),
            "key_norm_ratio": median(row.key_norm_ratio for row in rows),
        }


def drawn_facts(options: ScriptOptions, count: int) -> dict[str, tuple[Fact, ...]]:
    """Facts of either kind that no table uses; of those that come first, one for each subject."""
    everything = replace(options, normal=len(options.facts))
    first: dict[str, Fact] = {}
    for fact in fresh_cases(everything, first_token=True):
        if fact.subject not in TRIED:
            first.setdefault(fact.subject, fact)
    other = fresh_cases(everything, first_token=False)
    return {"first": tuple(first.values())[:count], "other": other[:count]}


def settings_of(options: ScriptOptions, moment: SecondMoment) -> str:
    """What decides a row besides its layer and fact."""
    record = options.study.provenance()
    record = {name: record[name] for name in ("model", "contexts", "hyperparameters", "texts")}
    facts = [fact.content_hash for fact in options.facts]
    methods = [method.slots for method in METHODS]
    columns = [*SHOWN, *MEASURED]
    bos = options.study.text_bos.value
    return content_hash(
        [_FORMAT, record, facts, methods, columns, moment.corpus_hash, bos, options.seed]
    )


def earlier_rows(options: ScriptOptions, settings: str) -> list[dict[str, Any]]:
    """Rows of an earlier run under these settings, on whatever machine; none without one.

    All layers take hours, so a run resumes from the file of its results.
    """
    path = options.out / f"{Path(__file__).stem}.json"
    try:
        record: Any = read_json(path, "an earlier map")
        same = record["provenance"]["settings"] == settings
        return [dict(row) for row in record["rows"]] if same else []
    except (BadInputError, KeyError, TypeError):
        return []


def measure(options: ScriptOptions, progress: Progress) -> Found:
    model, args = options.study.model, options.args
    every = range(model.n_layers)
    asked = dict.fromkeys(model.site(layer).layer for layer in args.layers or every)
    count = EDITED[args.profile] if args.normal is None else args.normal
    facts = drawn_facts(options, count)
    kinds = {fact.case_id: kind for kind in KINDS for fact in facts[kind]}
    labels = {method.name: method.label for method in METHODS}
    moments = moments_of(options, every, progress)
    settings = settings_of(options, moments[0])
    earlier = earlier_rows(options, settings)
    rows = [row for row in earlier if row["part"] == "keys"]
    rows = rows or list(read_denominators(options, moments, progress))
    # Facts that are not drawn now would make some layers others than the rest.
    earlier = [dict(row) for row in edits_of(earlier) if row["case_id"] in kinds]
    rows += earlier
    for layer in asked:
        done = {row["case_id"] for row in edits_of(earlier, layer=layer)}
        missing = [fact for kind in KINDS for fact in facts[kind] if fact.case_id not in done]
        if not missing:
            continue
        measured = measure_facts(
            options.study.varied(layer=layer, second_moment=moments[layer]),
            missing,
            METHODS,
            metrics=["perplexity", "accuracy", "generated"],
            seed=options.seed,
            progress=progress,
            label=f"edits of layer {layer}",
        )
        rows += [
            {"part": "edit", "layer": layer, "kind": kinds[row.case_id]}
            | {name: row[name] for name in ("case_id", "subject")}
            | {"method": labels[row.method]}
            | {name: row[name] for name in (*SHOWN, *MEASURED)}
            for row in measured
        ]
    order = {label: number for number, label in enumerate(labels.values())}
    edited = sorted(
        edits_of(rows),
        key=lambda row: (row["layer"], row["kind"], row["case_id"], order[row["method"]]),
    )
    rows = [row for row in rows if row["part"] == "keys"] + [dict(row) for row in edited]
    original = options.study.original_perplexity.mean
    counts = {kind: len({row["case_id"] for row in edits_of(rows, kind=kind)}) for kind in KINDS}
    return Found(
        title=f"Edits of each layer, {counts['first']} facts whose subject is the first token and "
        f"{counts['other']} others (perplexity {original:.4g} before; shares in percent)",
        columns=[
            "layer",
            "ratio, first",
            *(f"{label} first: {what}" for label in labels.values() for what in CELLS),
            *(f"{C_ROME.label} other: {what}" for what in ("written", *SCORED[1:], "score")),
        ],
        lines=[_line(rows, layer) for layer in dict.fromkeys(row["layer"] for row in edited)],
        rows=rows,
        notes=_notes(rows, options.study.layer),
        provenance={
            "settings": settings,
            "corpus_hash": moments[0].corpus_hash,
            "case_ids": {kind: [fact.case_id for fact in facts[kind]] for kind in KINDS},
        },
        draw=partial(plot, rows, original),
    )


def edits_of(rows: Sequence[Mapping[str, Any]], **match: Any) -> list[Mapping[str, Any]]:
    """Edited rows whose other columns have the given values."""
    return matching(rows, part="edit", **match)


def score(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Harmonic mean of what is written, generalised and left alone, each in percent."""
    shares = [each for each in (share(rows, column) for column in SCORED) if each is not None]
    return harmonic_mean(shares) if len(shares) == len(SCORED) else None


def _line(rows: Sequence[Mapping[str, Any]], layer: int) -> list[object]:
    ratios = {row["kind"]: row["ratio"] for row in rows if row["layer"] == layer and "ratio" in row}
    line: list[object] = [layer, ratios["first"]]
    for method in METHODS:
        found = edits_of(rows, layer=layer, kind="first", method=method.label)
        collapsed = sum(row["collapsed"] for row in found)
        line += [collapsed, _middle(found), share(found, SCORED[0])]
    found = edits_of(rows, layer=layer, kind="other", method=C_ROME.label)
    return [*line, *(share(found, column) for column in SCORED), score(found)]


def _middle(rows: Sequence[Mapping[str, Any]]) -> float:
    return median(row["perplexity"] for row in rows)


def scores_by_layer(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """C-ROME's score on other facts, by layer; without layers that have none."""
    found = edits_of(rows, kind="other", method=C_ROME.label)
    layers = dict.fromkeys(row["layer"] for row in found)
    scores = {layer: score([row for row in found if row["layer"] == layer]) for layer in layers}
    return {layer: value for layer, value in scores.items() if value is not None}


def _notes(rows: Sequence[Mapping[str, Any]], default: int) -> list[str]:
    scores = scores_by_layer(rows)
    best = sorted(scores, key=lambda layer: -scores[layer])[:5]
    if not scores:
        return []
    told = ", ".join(f"{layer} ({scores[layer]:.1f})" for layer in best)
    own = f"; the default, {default}, has {scores[default]:.1f}" if default in scores else ""
    return [f"Layers with the highest score of C-ROME on other facts: {told}{own}."]


def plot(rows: Sequence[Mapping[str, Any]], original: float) -> Figure:
    drawn, (keys, perplexity, first, other) = figure(4, height=3.6)
    colours = {"first": PALETTE["collapse"], "other": PALETTE["normal"]}
    words = {"first": "subject is the first token", "other": "subject is later"}
    for kind in KINDS:
        found = [row for row in rows if row["part"] == "keys" and row["kind"] == kind]
        layers = [row["layer"] for row in found]
        keys.plot(layers, [row["ratio"] for row in found], color=colours[kind], label=words[kind])
    keys.axhline(RATIO, color="black", linewidth=1, linestyle=":")
    keys.set_yscale("log")
    keys.set_title("ROME's denominator over C-ROME's")
    keys.legend(fontsize=7)
    styles = dict(zip((method.label for method in METHODS), ("-", "--", ":"), strict=True))
    for kind in KINDS:
        for method, style in styles.items():
            found = edits_of(rows, kind=kind, method=method)
            label = f"{method}, {kind}"
            _medians(perplexity, found, color=colours[kind], linestyle=style, label=label)
    points = edits_of(rows, kind="first", method=ROME.label)
    perplexity.plot(
        [row["layer"] for row in points],
        [row["perplexity"] for row in points],
        ".",
        color=colours["first"],
        alpha=0.4,
        markersize=4,
    )
    for height in (original, COLLAPSE_THRESHOLD):
        perplexity.axhline(height, color="black", linewidth=1, linestyle=":")
    perplexity.set_yscale("log")
    perplexity.set_title("perplexity after one edit")
    perplexity.legend(fontsize=6)
    for method, style in styles.items():
        found = edits_of(rows, kind="first", method=method)
        _shares(first, found, "generated_first_words", "black", style, f"{method}, written")
        _shares(first, found, "locality", PALETTE["collapse"], style, f"{method}, locality")
    first.set_title("subject first, %")
    found = edits_of(rows, kind="other", method=C_ROME.label)
    colours_of = ("black", PALETTE["normal"], PALETTE["collapse"])
    for column, word, colour in zip(SCORED, ("written", *SCORED[1:]), colours_of, strict=True):
        _shares(other, found, column, colour, "-", word)
    scores = scores_by_layer(rows)
    other.plot([*scores], [*scores.values()], color="#009e73", linewidth=2, label="score")
    other.set_title("subject later, C-ROME, %")
    for axis in (first, other):
        axis.set_ylim(-3, 103)
        axis.legend(fontsize=6)
    for axis in (keys, perplexity, first, other):
        axis.set_xlabel("layer")
    return drawn


def _medians(axis: Axes, rows: Sequence[Mapping[str, Any]], **style: Any) -> None:
    layers = sorted({row["layer"] for row in rows})
    heights = [_middle([row for row in rows if row["layer"] == layer]) for layer in layers]
    axis.plot(layers, heights, linewidth=1.2, **style)


def _shares(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    column: str,
    color: str,
    linestyle: str,
    label: str,
) -> None:
    layers = sorted({row["layer"] for row in rows})
    heights = [share([row for row in rows if row["layer"] == layer], column) for layer in layers]
    drawn = [nan if height is None else height for height in heights]
    style: dict[str, Any] = {"color": color, "linestyle": linestyle, "linewidth": 1.2}
    axis.plot(layers, drawn, label=label, **style)


def outcome(rows: Sequence[Mapping[str, Any]], original: float) -> str:
    """What edits of one layer did: ``collapse``, ``damage``, ``nothing``, or ``mixed``."""
    perplexities = [row["perplexity"] for row in rows]
    collapsed = sum(value > COLLAPSE_THRESHOLD for value in perplexities)
    if 2 * collapsed >= len(perplexities):
        return "collapse"
    if median(perplexities) >= DAMAGE_RATIO * original:
        return "damage"
    return "mixed" if collapsed else "nothing"


def as_predicted(result: Result) -> Verdict:
    name = result.provenance["model"]["name"]
    if name != PREDICTED_FOR:
        raise GapError(f"the prediction is for {PREDICTED_FOR}, and not for {name}.")
    result.values("perplexity", part="edit", kind="first", method=ROME.label)
    found = result.chosen(part="edit", kind="first", method=ROME.label)
    original = result.provenance["original_perplexity"]
    layers = {row["layer"] for row in found}
    if missing := {layer for those in PREDICTED.values() for layer in those} - layers:
        raise GapError(f"{result.script} has no edits of layer {min(missing)}.")
    told = {
        layer: outcome([row for row in found if row["layer"] == layer], original)
        for layer in sorted(layers)
    }
    judged = {layer: what for what, those in PREDICTED.items() for layer in those}
    wrong = [layer for layer in sorted(judged) if told[layer] != judged[layer]]
    exceptions = ", ".join(f"{layer} ({told[layer]})" for layer in wrong) or "none"
    rest = ", ".join(f"{layer} {what}" for layer, what in told.items() if layer not in judged)
    return grade(
        not wrong,
        4 * len(wrong) <= len(judged),
        f"{len(judged) - len(wrong)} of {len(judged)} layers are as predicted; otherwise: "
        f"{exceptions}. Where nothing was predicted: {rest}.",
    )


def default_is_near_the_best(result: Result) -> Verdict:
    for column in SCORED:
        result.known(column, part="edit", kind="other", method=C_ROME.label)
    scores = scores_by_layer(result.rows)
    default = result.provenance["layer"]
    if missing := {row["layer"] for row in result.chosen(part="keys")} - scores.keys():
        raise GapError(f"{result.script} has no edits of layer {min(missing)}.")
    best = max(scores, key=lambda layer: scores[layer])
    return grade(
        scores[best] - scores[default] <= NEAR,
        scores[default] >= median(scores.values()),
        f"Layer {default} has {scores[default]:.1f}; the best is layer {best} with "
        f"{scores[best]:.1f}, the median {median(scores.values()):.1f}.",
    )


CLAIMS = (
    Claim(
        id="own-collapse-layers",
        place="in no paper found",
        sentence="On SmolLM2-135M, ROME's edits of first-token facts collapse the model at layers "
        "12 to 28, damage it at 3 to 8, and do nothing of the kind at 0, 1, 9 and 10.",
        rule="Written down before these edits, of subjects that no trial used; of layer 15 the "
        "outcome was known (firsttok scan). By ROME's edits of a layer, with the default C: a "
        "collapse where at least "
        f"half lift the perplexity above {COLLAPSE_THRESHOLD:g}; damage where fewer do, and the "
        f"median is at least {DAMAGE_RATIO:g} times the original; nothing where the median is "
        "below that and none collapses. It holds if all these layers are so. Partly: three in "
        "four.",
        decide=as_predicted,
        own=True,
    ),
    Claim(
        id="own-default-layer",
        place="in no paper",
        sentence="The layer that is edited by default writes facts whose subject is not the first "
        "token about as well as any other.",
        rule="C-ROME's score, the harmonic mean of free generations that begin with the target, "
        f"generalization and locality in percent, is at most {NEAR:g} below that of the best "
        "layer. Partly: not below the median of the layers.",
        decide=default_is_near_the_best,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(
        run(__file__, __doc__, measure, claims=CLAIMS, add_options=add_options, without_bos=True)
    )
