"""What a token may attend to, changed in the same causal weights.

The paper suspects that the first token is anomalous because it can attend to nothing but itself,
and shows it on another model, T5. Here the same model is asked: does the anomaly go when the first
token sees the others, does it come at each later place when the token there sees only itself, who
takes the role over once the first token has given it up, and does ROME collapse the model with a
k^u taken from such tokens? Of attention sinks the answers are known (docs/explanation/
related-work.md); of the keys of an MLP and of an edit they are not.
"""

from functools import partial
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok import probes
from firsttok.editing import ROME
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.paper.cases import first_token_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, crossed, grade, spread
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import dots, figure
from firsttok.paper.tables import Found, edit_cells
from firsttok.probes import MaskedKeys, PositionSwap, SeesAll, SeesItself, TokenStates
from firsttok.prompts import text_prompt
from firsttok.tensors import Intervention

LATER = tuple(range(1, 11))
SENTENCES = 20
USUAL, OPENED, CLOSED = "none", "first sees all", "later sees itself only"
SWAPPED = "first position id 1"
SOURCES = tuple(
    MaskedKeys(later=later, changed=changed) for later in (False, True) for changed in (False, True)
)
COLUMNS = (
    "",
    "residual norm",
    "D of keys",
    "cosine with usual key",
    "massive",
    "mean |denominator|",
    "max perplexity",
    "collapsed",
)
TENFOLD = 10.0


def changes(place: int) -> dict[str, tuple[Intervention, ...]]:
    """What is changed, to look at the token of a place."""
    named: dict[str, tuple[Intervention, ...]] = {USUAL: (), OPENED: (SeesAll(position=0),)}
    if place:
        return named | {CLOSED: (SeesItself(position=place),)}
    return named | {SWAPPED: (PositionSwap(name="position id 1", of=0, like=1),)}


def measure_states(options: ScriptOptions) -> list[dict[str, Any]]:
    study = options.study
    prompts = [text_prompt(study.model, text) for text in study.texts]
    prompts = [prompt for prompt in prompts if len(prompt.token_ids) > LATER[-1]][:SENTENCES]
    if not prompts:
        raise BadInputError(
            f"no sentence of --texts has a token at place {LATER[-1]}; give longer ones"
        )
    states: dict[tuple[str, int], TokenStates] = {}
    for place in (0, *LATER):
        at = [place] * len(prompts)
        for name, interventions in changes(place).items():
            view = study.model.intervened(*interventions)
            states[name, place] = probes.token_states(view, prompts, at, layer=study.layer)
    # The spike differs from sentence to sentence, so each is held against its own first token's.
    massive = states[USUAL, 0].residual_norms / TENFOLD
    common = {"layer": study.layer, "n": len(prompts)}
    rows: list[dict[str, Any]] = [
        {
            "part": "state",
            "intervention": name,
            "place": place,
            **common,
            "residual_norm": float(found.residual_norms.mean()),
            "concentration": probes.mean_distance(found.keys),
            "key_cosine": probes.cosine_with(found.keys, states[USUAL, place].keys),
            "massive": int((found.residual_norms >= massive).sum()),
        }
        for (name, place), found in states.items()
    ]
    for name in (USUAL, OPENED):
        largest = torch.stack([states[name, place].residual_norms for place in LATER]).amax(dim=0)
        rows.append(
            {
                "part": "largest later state",
                "intervention": name,
                **common,
                "residual_norm": float(largest.mean()),
                "massive": int((largest >= massive).sum()),
            }
        )
    return rows


def measure_edits(options: ScriptOptions, progress: Progress) -> list[dict[str, Any]]:
    study = options.study
    facts = first_token_cases(options.halved(), progress=progress)
    rows: list[dict[str, Any]] = []
    for source in SOURCES:
        ordinary = not (source.later or source.changed)
        changed = study if ordinary else study.varied(key_source=source)
        own: dict[str, Any] = {"part": "edit", "key_from": source.name}
        own["original_perplexity"] = study.original_perplexity.mean
        edits = measure_facts(changed, facts, [ROME], progress=progress, label=source.name)
        rows += [own | dict(row) for row in edits]
    return rows


def measure(options: ScriptOptions, progress: Progress) -> Found:
    states = measure_states(options)
    edits = measure_edits(options, progress)
    measured = ("residual_norm", "concentration", "key_cosine")
    lines: list[list[object]] = []
    order = (SWAPPED, USUAL, CLOSED, OPENED)
    for row in sorted(states, key=lambda row: order.index(row["intervention"])):
        later = f"largest of tokens {LATER[0]} to {LATER[-1]}"
        token = f"token {row['place']}" if row["part"] == "state" else later
        cells = [row.get(column) for column in measured]
        count = f"{row['massive']} of {row['n']}"
        lines.append([f"{token}, {row['intervention']}", *cells, count, *[None] * 3])
    for source in SOURCES:
        cells = edit_cells(edits, key_from=source.name)
        lines.append([f"ROME, k^u from {source.name}", *[None] * 4, *cells])
    return Found(
        title=f"Attention mask: states at layer {options.study.layer}, and ROME with such a k^u",
        columns=COLUMNS,
        lines=lines,
        rows=[*states, *edits],
        draw=partial(plot, states, edits),
    )


def plot(states: list[dict[str, Any]], edits: list[dict[str, Any]]) -> Figure:
    drawn, axes = figure(2, height=4.2)
    styles = {
        USUAL: ("as it is", "o-"),
        CLOSED: ("sees itself only", "s--"),
        OPENED: ("the first token sees all", "^:"),
    }
    for name, (label, style) in styles.items():
        found = [row for row in states if row["part"] == "state" and row["intervention"] == name]
        places, norms = ([row[key] for row in found] for key in ("place", "residual_norm"))
        axes[0].plot(places, norms, style, markersize=5, label=label)
    axes[0].set_yscale("log")
    axes[0].set_xticks([0, *LATER])
    axes[0].set_xlabel("place of the token")
    axes[0].set_ylabel("mean norm of its residual stream")
    axes[0].legend(title=None, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    dots(axes[1], edits, y="key_from", x="perplexity")
    axes[1].axvline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("perplexity after ROME")
    axes[1].set_ylabel("")
    return drawn


def mask_makes_the_state(result: Result) -> Verdict:
    def state(column: str, intervention: str, place: int) -> float:
        match: dict[str, Any] = {"part": "state", "intervention": intervention, "place": place}
        found = mean(result.values(column, least=1, **match))
        if found <= 0:
            raise GapError(f"The {column} of a token is zero, so no ratio can be formed.")
        return found

    def anomalous(here: tuple[str, int], there: tuple[str, int]) -> bool:
        longer = state("residual_norm", *here) >= TENFOLD * state("residual_norm", *there)
        return longer and state("concentration", *there) >= TENFOLD * state("concentration", *here)

    def shown(intervention: str, places: list[int]) -> str:
        norms, distances = (
            spread([state(column, intervention, place) for place in places])
            for column in ("residual_norm", "concentration")
        )
        return f"{norms} ({distances})"

    places = sorted({int(place) for place in result.values("place", least=2, part="state")} - {0})
    if not places:
        raise GapError(f"{result.script} has no later token.")
    ordinary = [anomalous((USUAL, 0), (USUAL, place)) for place in places]
    falls = anomalous((USUAL, 0), (OPENED, 0))
    rises = [anomalous((CLOSED, place), (USUAL, place)) for place in places]
    one = len(places) == 1
    later = f"token {places[0]}" if one else f"tokens {places[0]} to {places[-1]}"
    who = "it" if one else "each"
    return grade(
        all(ordinary) and falls and all(rises),
        all(ordinary) and (falls or any(rises)),
        f"Mean residual norm (and D of keys): {shown(USUAL, [0])} at the first token and "
        f"{shown(USUAL, places)} at {later}; {shown(OPENED, [0])} at the first when it may attend "
        f"to all, {shown(CLOSED, places)} at {later} when {who} may attend to itself only.",
    )


def mask_makes_the_collapse(result: Result) -> Verdict:
    def kinds(*names: str) -> dict[str, dict[str, str]]:
        return {name: {"part": "edit", "key_from": name} for name in names}

    return crossed(
        result,
        bad=kinds("first token", "later token sees itself only"),
        good=kinds("first token sees all", "later token"),
    )


CLAIMS = (
    Claim(
        id="own-mask-state",
        place="known for sinks by Gu et al. 2024 and Li et al. 2026; here for MLP keys",
        sentence="A token that may attend to itself only becomes the anomaly at every place tried, "
        "and a first token that may attend to others is none.",
        rule="At the edited layer, one token is anomalous against another if its mean residual "
        f"norm is at least {TENFOLD:g} times the other's and D of its keys at most a tenth of the "
        f"other's, over {SENTENCES} sentences. The first token is so against every later one "
        "measured, and against itself when it may attend to all; each later token is, when it may "
        "attend to itself only, against itself as it is. Partly: the first, and one of the others "
        "at one place or more.",
        decide=mask_makes_the_state,
        own=True,
    ),
    Claim(
        id="own-mask-edit",
        place="in no paper found",
        sentence="ROME destroys the model with the k^u of a token that saw itself only, be it the "
        "first or a later one; once the same token sees others, it does not.",
        rule=f"Every edit with k^u of the first token, and of a later token that sees itself only, "
        f"ends above {COLLAPSE_THRESHOLD:g}; none with k^u of that later token as it is, or of the "
        "first token when it sees all. No other k^u is tried. Partly: at least half, and fewer "
        "than half.",
        decide=mask_makes_the_collapse,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
