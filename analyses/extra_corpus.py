"""How much text, and which, does the second moment need? (In no paper.)

C decides in which direction an edit is made. Here the same values are written with several C: the
identity, that of the documentation inside Python, and that of growing parts of the corpus that the
embedded model wrote. The facts are normal ones that no table uses, so that a corpus chosen by them
is not chosen by what the tables show.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.data import find_corpus, load_texts, resolve_data
from firsttok.editing import C_ROME, ROME
from firsttok.errors import BadInputError
from firsttok.measuring import measure_facts
from firsttok.models import Model
from firsttok.paper.cases import fresh_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import figure, plain
from firsttok.paper.tables import MEASURES, Found, accuracy_line, pick
from firsttok.prompts import text_prompt
from firsttok.second_moment import SecondMoment, compute_second_moment
from firsttok.storage import content_hash

METHODS = (ROME, C_ROME)
"""They share the optimised value, which C does not change; FC-ROME has another one."""
SIZES = (10_000, 25_000, 50_000, 100_000)
"""Tokens of the parts of the sampled corpus; the whole is one more."""
NEAR = 0.05
FEWEST = 20
"""Facts that the claim is judged by: locality asks one neighbour of each, right or wrong."""
SHOWN = ("numerator", "denominator", "perplexity")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--others",
        nargs="+",
        default=[],
        metavar="FILE",
        help="more texts to take C over, as --texts reads them (ME-PPL, ...)",
    )


def parts_of(model: Model, documents: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """Documents that follow each other, cut where they have so many tokens together; the rest."""
    parts: list[list[str]] = [[]]
    total, wanted = 0, list(sizes)
    for text in documents:
        if wanted and total >= wanted[0]:
            parts.append([])
            wanted.pop(0)
        parts[-1].append(text)
        total += len(text_prompt(model, text).token_ids)
    return [tuple(part) for part in parts]


def growing(
    model: Model, documents: Sequence[str], *, name: str, layer: int, progress: Progress
) -> list[SecondMoment]:
    """C over the first documents of a corpus, more and more of them; each is run once."""
    found: list[SecondMoment] = []
    for part in parts_of(model, documents, SIZES):
        endless = 10**9
        own = compute_second_moment(
            model, layer=layer, corpus=part, max_tokens=endless, progress=progress
        )
        if found:
            both = (found[-1], own)
            tokens = sum(each.tokens for each in both)
            total = sum(each.matrix * each.tokens for each in both)
            hashes = content_hash([each.corpus_hash for each in both])
            own = replace(own, matrix=total / tokens, tokens=tokens, corpus_hash=hashes)
        found.append(replace(own, corpus=name))
    return found


def moments_of(options: ScriptOptions, progress: Progress) -> list[SecondMoment]:
    study, args = options.study, options.args
    if args.corpus or args.second_moment not in (None, "identity"):
        raise BadInputError(
            "this script takes the second moment over several corpora; leave --second-moment and "
            "--corpus out, or give --second-moment identity"
        )
    take = partial(compute_second_moment, study.model, layer=study.layer, progress=progress)
    pydoc, sampled = find_corpus("pydoc"), find_corpus("sampled")
    others = [
        take(corpus=load_texts(resolve_data(file, "texts")), corpus_name=file.rpartition("/")[2])
        for file in args.others
    ]
    return [
        SecondMoment.identity(study.model.site(study.layer).d_mlp),
        take(corpus=pydoc.documents, corpus_name=pydoc.name),
        *growing(
            study.model, sampled.documents, name="sampled", layer=study.layer, progress=progress
        ),
        *others,
    ]


def measure(options: ScriptOptions, progress: Progress) -> Found:
    facts = fresh_cases(options)
    labels = {method.name: method.label for method in METHODS}
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    moments = moments_of(options, progress)
    for moment in moments:
        own = {"corpus": moment.corpus, "tokens": moment.tokens}
        measured = measure_facts(
            options.study.varied(second_moment=moment),
            facts,
            METHODS,
            metrics=["perplexity", "accuracy"],
            progress=progress,
            label=f"C over {moment.tokens} tokens, {moment.corpus}",
        )
        rows += [
            own
            | {name: row[name] for name in ("case_id", "subject", *MEASURES, *SHOWN)}
            | {"method": labels[row.method]}
            for row in measured
        ]
        for method in labels.values():
            name, count, *accuracies = accuracy_line(
                f"{moment.corpus}, {method}", rows, method=method, **own
            )
            denominators = [abs(x) for x in pick(rows, "denominator", method=method, **own)]
            highest = max(pick(rows, "perplexity", method=method, **own))
            lines.append([name, moment.tokens, count, *accuracies, mean(denominators), highest])
    return Found(
        title="Edits of normal facts that no table uses, by the corpus of C",
        columns=["", "tokens", "facts", *MEASURES, "mean |denominator|", "max perplexity"],
        lines=lines,
        rows=rows,
        provenance={
            "corpora": [
                {"corpus": each.corpus, "tokens": each.tokens, "hash": each.corpus_hash}
                for each in moments
            ],
            "case_ids": [fact.case_id for fact in facts],
        },
        draw=partial(plot, rows),
    )


def plot(rows: list[dict[str, Any]]) -> Figure:
    import pandas as pd
    import seaborn as sns

    drawn, axes = figure(len(MEASURES))
    sampled = pd.DataFrame([row for row in rows if row["corpus"] == "sampled"])
    rest = [row for row in rows if row["corpus"] != "sampled"]
    for axis, column in zip(axes, MEASURES, strict=True):
        sns.lineplot(
            data=sampled, x="tokens", y=column, hue="method", marker="o", errorbar=None, ax=axis
        )
        for index, name in enumerate(dict.fromkeys(row["corpus"] for row in rest)):
            _, _, *means = accuracy_line(name, rest, corpus=name, method=C_ROME.label)
            height = means[MEASURES.index(column)]
            style: dict[str, Any] = {
                "color": "black",
                "linewidth": 1,
                "ls": (0, (1 + 2 * index, 2)),
            }
            if isinstance(height, float):
                label = f"{C_ROME.label}, {plain(name)}"
                axis.axhline(height / 100, label=label, **style)
        axis.set_xscale("log")
        axis.set_ylim(-0.05, 1.05)
        axis.set_title(column)
        axis.set_ylabel("")
        axis.set_xlabel("tokens of the sampled corpus")
    axes[0].legend(title=None, fontsize="small")
    for axis in axes[1:]:
        axis.legend([], [], frameon=False)
    return drawn


def text_is_enough(result: Result) -> Verdict:
    sizes = sorted({row["tokens"] for row in result.chosen(corpus="sampled")})
    halves = [size for size in sizes if 2 * size <= sizes[-1]]
    if not halves:
        raise GapError(f"{result.script} has no part of the sampled corpus that is half or less.")

    def locality(**match: Any) -> float:
        return mean(result.known("locality", least=FEWEST, method="C-ROME", **match))

    whole = locality(corpus="sampled", tokens=sizes[-1])
    half = locality(corpus="sampled", tokens=halves[-1])
    usual = locality(corpus="pydoc topics")
    return grade(
        abs(half - whole) <= NEAR and whole >= usual,
        whole >= usual,
        f"C-ROME's mean locality is {whole:.1%} with C over all {sizes[-1]} tokens, {half:.1%} "
        f"with {halves[-1]} of them, and {usual:.1%} with pydoc's topics.",
    )


CLAIMS = (
    Claim(
        id="own-corpus-enough",
        place="in no paper",
        sentence="The sampled corpus is text enough for the second moment, and keeps more of the "
        "other facts than pydoc's topics do.",
        rule="C-ROME's mean locality over normal facts that no table uses, with C over all of the "
        f"sampled corpus, is at most {100 * NEAR:g} points from that with the largest measured "
        "part of at most half of it, and not below that with C over pydoc's topics. Partly: not "
        f"below. It takes {FEWEST} facts, since locality asks one neighbour of each.",
        decide=text_is_enough,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, add_options=add_options))
