"""Token identity against position: "Arthur" and " Arthur", first and later.

Bare, the subject is the first token and carries no space; after a prefix it does. Each of the four
crossings gives a k^u, and ROME edits the model with it. That attention sinks belong to the place is
known (Xiao et al. 2023); what an edit does with such keys is not. Delimiters, which draw massive
activations in some models (Sun et al. 2024), are no subjects, and are not tried.
"""

from functools import partial
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.data import spread_evenly
from firsttok.editing import ROME
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.paper.cases import collapse_cases
from firsttok.paper.claims import Claim, Result, Verdict, crossed
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import dots, figure, perplexity_axis
from firsttok.paper.tables import Found, edit_cells, pick
from firsttok.probes import (
    IDENTITY_CELLS,
    IdentityCell,
    distinct_with_space,
    identity_prompt,
    token_states,
)

COLUMNS = (
    "k^u from",
    "residual norm",
    "key norm",
    "cosine with k_bar",
    "mean |denominator|",
    "max perplexity",
    "collapsed",
)


def crossing(cell: IdentityCell) -> dict[str, str]:
    """The columns of a row that say where its k^u was taken."""
    position, space = "later" if cell.later else "first", "with" if cell.space else "without"
    return {"position": position, "space": space}


def measure_edits(options: ScriptOptions, progress: Progress) -> list[dict[str, Any]]:
    study = options.study
    listed = collapse_cases(options, progress=progress)
    facts = spread_evenly(distinct_with_space(study.model, listed), options.halved().collapse)
    if not facts:
        raise BadInputError(
            "no collapse case is one token without a leading space and another with one in "
            f"{study.model.label}, so the two cannot be told apart here"
        )
    rows: list[dict[str, Any]] = []
    for cell in IDENTITY_CELLS:
        # The key of a bare prompt is the ordinary one, and so is its edit.
        ordinary = not cell.later and not cell.space
        changed = study if ordinary else study.varied(key_source=cell)
        prompts = [
            identity_prompt(study.model, fact, cell, prefix=study.contexts.first_prefix)
            for fact in facts
        ]
        places = [prompt.subject_position or 0 for prompt in prompts]
        states = token_states(study.model, prompts, places, layer=study.layer)
        edited = measure_facts(changed, facts, [ROME], progress=progress, label=cell.name)
        rows += [
            crossing(cell)
            | {
                "residual_norm": float(states.residual_norms[index]),
                "key_norm": float(states.keys[index].norm()),
                "cosine_with_mean": row.key_cosine,
                "original_perplexity": study.original_perplexity.mean,
            }
            | dict(row)
            for index, row in enumerate(edited)
        ]
    return rows


def measure(options: ScriptOptions, progress: Progress) -> Found:
    rows = measure_edits(options, progress)
    columns = ("residual_norm", "key_norm", "cosine_with_mean")
    lines: list[list[object]] = []
    for cell in IDENTITY_CELLS:
        states = [mean(pick(rows, column, **crossing(cell))) for column in columns]
        lines.append([cell.name, *states, *edit_cells(rows, **crossing(cell))])
    return Found(
        title="Token identity: k^u from four places, k_bar as usual, then ROME",
        columns=COLUMNS,
        lines=lines,
        rows=rows,
        draw=partial(plot, rows),
    )


def plot(rows: list[dict[str, Any]]) -> Figure:
    named = [
        row
        | {"k^u from": f"{row['position']}, {row['space']} space"}
        | {"denominator": abs(float(row["denominator"]))}
        for row in rows
    ]
    drawn, axes = figure(2)
    for axis, column in zip(axes, ("denominator", "perplexity"), strict=True):
        dots(axis, named, x="k^u from", y=column, hue="position", legend=False)
        axis.tick_params(axis="x", rotation=20)
    perplexity_axis(axes[1])
    axes[0].set_yscale("log")
    axes[0].set_xlabel("")
    axes[0].set_ylabel("|denominator|")
    return drawn


def place_makes_the_collapse(result: Result) -> Verdict:
    def kinds(position: str) -> dict[str, dict[str, str]]:
        spaces = ("without", "with")
        return {f"{position}, {s} space": {"position": position, "space": s} for s in spaces}

    return crossed(result, bad=kinds("first"), good=kinds("later"))


CLAIMS = (
    Claim(
        id="own-token-identity",
        place="known for sinks by Xiao et al. 2023; here for edits",
        sentence="For a subject it is the place and not the token: with and without its leading "
        "space, it collapses the model from the first place and from no later one.",
        rule=f"Every edit with a k^u from the first place ends above {COLLAPSE_THRESHOLD:g}, in "
        "either spelling, and none with a k^u from a later place. Partly: at least half, and fewer "
        "than half, in each of the four crossings.",
        decide=place_makes_the_collapse,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
