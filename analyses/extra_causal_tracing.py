"""Causal tracing: which layer carries a fact, and does an edit there do better? (Meng et al. 2022.)

ROME's layer comes from causal tracing: noise on the subject, then single states put back to what
they were without noise. Here that is done on this model, an average over facts that it answers
rightly; the layer whose MLPs bring most back at the subject's last token is proposed, and facts are
edited there, at its neighbours, and at the model's default layer. Does another layer keep ROME from
destroying the model?

Where the subject is the very first token, noise on it is noise on position 0, whose state is more
than a subject (see firsttok/probes/tracing.py); such facts are also shown by themselves.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok import probes
from firsttok.data import Fact
from firsttok.editing import C_ROME, ROME
from firsttok.errors import BadInputError
from firsttok.inspection.anomaly import ranges
from firsttok.measuring import measure_facts
from firsttok.paper.cases import choose_cases
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import effect_map, figure, strip_plot
from firsttok.paper.tables import Found, collapsed_of, pick
from firsttok.probes import LAST_SUBJECT, LayerProposal, Trace, average_total_effect
from firsttok.second_moment import SecondMoment, compute_second_moment

METHODS = (ROME, C_ROME)
NEIGHBOURS = 2
GROUPS = ("all facts", "subject first", "subject later")
SITES = {
    "mlp": ("mlp", LAST_SUBJECT),
    "mlp, not of layer 0": ("mlp", LAST_SUBJECT),
    "attention": ("attention", "last token"),
}
"""The two sites that the paper finds, an early and a late one. Layer 0 sees little but the token
itself: a window that holds its MLP may bring back no more than the token's name."""
COLUMNS = (
    "",
    "facts",
    "total effect",
    "layer",
    "AIE there",
    "95 %",
    "undecided layers",
    "efficacy",
    "median perplexity",
    "max perplexity",
    "collapsed, listed",
    "collapsed, others",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window", type=int, help="layers restored together (default: 10 of 48, to scale)"
    )
    parser.add_argument("--samples", type=int, default=10, help="noise samples (default: 10)")
    noise = "times the deviation of the subjects' embeddings (default: 3)"
    parser.add_argument("--noise", type=float, default=3.0, help=noise)
    every = "trace facts that are not answered rightly, too, by the answer that is given"
    parser.add_argument("--every-answer", action="store_true", help=every)


def facts_to_trace(options: ScriptOptions) -> tuple[list[Fact], int]:
    """The chosen facts that the model answers rightly, and how many it does not."""
    args = options.args
    if args.corpus or args.second_moment not in (None, "identity"):
        raise BadInputError(
            "this script takes a second moment at several layers and computes them; leave "
            "--second-moment and --corpus out, or give --second-moment identity"
        )
    cases = choose_cases(options.halved())
    chosen = [*cases.collapse, *cases.normal]
    right = probes.answered_facts(options.study.model, chosen)
    facts = chosen if args.every_answer else list(right)
    if not facts:
        raise BadInputError(
            f"{options.study.model.label} answers none of the {len(chosen)} facts rightly; give "
            "others, or trace its own answers with --every-answer"
        )
    return facts, len(chosen) - len(right)


def groups_of(traces: Sequence[Trace]) -> dict[str, list[Trace]]:
    """The traces by where the subject stands; a group without any is left out."""
    first = [trace for trace in traces if trace.first_token]
    later = [trace for trace in traces if not trace.first_token]
    groups = dict(zip(GROUPS, (list(traces), first, later), strict=True))
    return {name: members for name, members in groups.items() if members}


def proposals_of(
    groups: dict[str, list[Trace]], window: int, count: int
) -> dict[tuple[str, str], LayerProposal]:
    """The highest layer of each site in every group that has such tokens."""
    above = [layer for layer in range(count) if 0 not in probes.window_layers(layer, window, count)]
    found: dict[tuple[str, str], LayerProposal] = {}
    for name, members in groups.items():
        for site, (kind, role) in SITES.items():
            layers = above if "not of" in site else range(count)
            if layers and any(role in trace.roles for trace in members):
                found[name, site] = probes.propose_layer(
                    members, kind=kind, role=role, layers=layers
                )
    return found


def trace_rows(
    groups: dict[str, list[Trace]], proposals: dict[tuple[str, str], LayerProposal], layer: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "part": "fact",
            "case_id": trace.case_id,
            "subject": trace.subject,
            "first_token": trace.first_token,
            "clean": trace.clean,
            "corrupted": trace.corrupted,
            "total_effect": trace.total_effect,
            "norm_clean": float(trace.norms[0, layer]),
            "norm_corrupted": float(trace.norms[1, layer]),
        }
        for trace in groups[GROUPS[0]]
    ]
    for name, members in groups.items():
        total = average_total_effect(members)
        own = {"part": "total", "group": name, "facts": total.n}
        rows.append(own | total.columns("total_effect"))
        rows += [
            {"part": "effect", "group": name, "kind": row.kind, "role": row.role}
            | {"layer": row.layer, "facts": row.effect.n, **row.effect.columns("aie")}
            for row in probes.average_effects(members)
        ]
    for (name, site), proposal in proposals.items():
        kind, role = SITES[site]
        rows.append(
            {"part": "proposal", "group": name, "site": site, "kind": kind, "role": role}
            | {"layer": proposal.layer, "facts": proposal.effect.n}
            | proposal.effect.columns("aie")
            | {"undecided": ranges(proposal.undecided), "share": proposal.share}
        )
    return rows


def measure_edits(
    options: ScriptOptions, layers: Sequence[int], progress: Progress
) -> list[dict[str, Any]]:
    cases = choose_cases(options.halved())
    facts = [*cases.collapse, *cases.normal]
    listed = {fact.case_id for fact in cases.collapse}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        moment = moment_at(options, layer, progress)
        study = options.study.varied(layer=layer, second_moment=moment)
        label = f"editing layer {layer}"
        metrics = ["perplexity", "accuracy"]
        rows += [
            {"part": "edit", "cases": "collapse" if row.case_id in listed else "normal", **row}
            for row in measure_facts(
                study, facts, METHODS, metrics=metrics, progress=progress, label=label
            )
        ]
    return rows


def moment_at(options: ScriptOptions, layer: int, progress: Progress) -> SecondMoment:
    study = options.study
    if layer == study.layer:
        return study.second_moment
    if options.args.second_moment == "identity":
        return SecondMoment.identity(study.model.site(layer).d_mlp)
    return compute_second_moment(study.model, layer=layer, progress=progress)


def lines_of(
    groups: dict[str, list[Trace]],
    proposals: dict[tuple[str, str], LayerProposal],
    edits: list[dict[str, Any]],
    default: int,
) -> list[list[object]]:
    lines: list[list[object]] = []
    for (name, site), found in proposals.items():
        total = average_total_effect(groups[name])
        interval = f"{found.effect.low:.3f} to {found.effect.high:.3f}"
        cells = [found.effect.n, total.value, found.layer, found.effect.value, interval]
        label = f"{site} at the {SITES[site][1]}, {name}"
        lines.append([label, *cells, ranges(found.undecided), *[None] * 5])
    proposed = proposals[GROUPS[0], "mlp"].layer
    for layer in dict.fromkeys(row["layer"] for row in edits):
        names = {proposed: ", proposed", default: ", default"}
        for method in METHODS:
            match = {"layer": layer, "method": method.name}
            values = pick(edits, "perplexity", **match)
            counts = [collapsed_of(edits, **match, cases=c) for c in ("collapse", "normal")]
            efficacy = 100 * mean(pick(edits, "efficacy", **match))
            site = f"{method.label}{names.get(layer, '')}"
            cells = [efficacy, median(values), max(values), *counts]
            lines.append([site, len(values), None, layer, *[None] * 3, *cells])
    return lines


def measure(options: ScriptOptions, progress: Progress) -> Found:
    study, args = options.study, options.args
    facts, wrong = facts_to_trace(options)
    noise = probes.corruption_for(
        study.model, facts, factor=args.noise, samples=args.samples, seed=options.seed
    )
    count = study.model.n_layers
    window = probes.default_window(count) if args.window is None else args.window
    traces = probes.trace_facts(study, facts, noise, window=window, progress=progress)
    groups = groups_of(traces)
    proposals = proposals_of(groups, window, count)
    proposed = proposals[GROUPS[0], "mlp"].layer
    near = range(max(0, proposed - NEIGHBOURS), min(count, proposed + NEIGHBOURS + 1))
    edits = measure_edits(options, sorted({*near, study.layer}), progress)
    rows = trace_rows(groups, proposals, study.layer)
    done = "traced by the answer given" if args.every_answer else "left out"
    notes = [f"{wrong} of the chosen facts are not answered rightly: {done}."]
    first = groups.get(GROUPS[1], [])
    if first:
        norms = [mean(float(trace.norms[row, study.layer]) for trace in first) for row in (0, 1)]
        notes.append(
            f"On {len(first)} facts the noise is on position 0 as well: the norm of its residual "
            f"stream behind layer {study.layer} is {norms[0]:,.0f} without noise and "
            f"{norms[1]:,.0f} with it."
        )
    return Found(
        title=f"Causal tracing on {study.model.label}, and edits at the layer it proposes",
        columns=COLUMNS,
        lines=lines_of(groups, proposals, edits, study.layer),
        rows=[*rows, *edits],
        provenance={
            "corruption": asdict(noise),
            "noise_factor": args.noise,
            "window": window,
            "proposed_layer": proposed,
            "every_answer": args.every_answer,
            "case_ids": [fact.case_id for fact in facts],
            "not_answered": wrong,
        },
        notes=notes,
        draw=partial(plot, rows, edits, proposed),
    )


def plot(rows: list[dict[str, Any]], edits: list[dict[str, Any]], proposed: int) -> Figure:
    drawn, _ = figure(3, height=7.0)
    drawn.clear()
    axes = list(drawn.subplots(2, 2).flat)
    shown = [row for row in rows if row["part"] == "effect" and row["group"] == GROUPS[0]]
    limit = max(abs(row["aie"]) for row in shown)
    titles = ("residual stream, one layer", "MLPs of a window", "attention of a window")
    for axis, kind, title in zip(axes, probes.KINDS, titles, strict=False):
        of_kind = [row for row in shown if row["kind"] == kind]
        marked = proposed if kind == "mlp" else None
        effect_map(axis, of_kind, roles=probes.ROLES, title=title, limit=limit, marked=marked)
    edited = [row | {"edited": str(row["layer"])} for row in edits if row["method"] == ROME.name]
    order = list(dict.fromkeys(row["edited"] for row in edited))
    strip_plot(axes[3], edited, x="edited", y="perplexity", label="after ROME", order=order)
    axes[3].set_title("perplexity")
    axes[3].set_xlabel("edited layer")
    return drawn


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, add_options=add_options))
