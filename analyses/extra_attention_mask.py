"""What a token may attend to, changed in the same causal weights. (In no paper.)

The paper suspects that the first token is anomalous because it can attend to nothing but itself,
and shows it on another model, T5. Here the same model is asked: does the anomaly go when the first
token sees the others, does it come when a later token sees only itself, and does ROME collapse the
model with a k^u taken from either?
"""

from functools import partial
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok import probes
from firsttok.editing import ROME
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.paper.cases import first_token_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, crossed, fixed, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import dots, figure
from firsttok.paper.tables import Found, edit_cells
from firsttok.probes import MaskedKeys, PositionSwap, SeesAll, SeesItself
from firsttok.prompts import text_prompt
from firsttok.tensors import Intervention

PLACES = (0, 3)
SENTENCES = 20
STATES: tuple[tuple[str, tuple[Intervention, ...]], ...] = (
    ("none", ()),
    ("first sees all", (SeesAll(position=0),)),
    ("later sees itself only", (SeesItself(position=PLACES[1]),)),
    ("first position id 1", (PositionSwap(name="position id 1", of=0, like=1),)),
)
SOURCES = tuple(
    MaskedKeys(later=later, changed=changed) for later in (False, True) for changed in (False, True)
)
COLUMNS = (
    "",
    "residual norm",
    "D of keys",
    "cosine with usual key",
    "mean |denominator|",
    "max perplexity",
    "collapsed",
)
TENFOLD = 10.0


def measure_states(options: ScriptOptions) -> list[dict[str, Any]]:
    study = options.study
    prompts = [text_prompt(study.model, text) for text in study.texts]
    prompts = [prompt for prompt in prompts if len(prompt.token_ids) > max(PLACES)][:SENTENCES]
    rows: list[dict[str, Any]] = []
    for place in PLACES:
        at = [place] * len(prompts)
        usual = probes.token_states(study.model, prompts, at, layer=study.layer)
        for name, interventions in STATES:
            view = study.model.intervened(*interventions)
            states = probes.token_states(view, prompts, at, layer=study.layer)
            rows.append(
                {
                    "part": "state",
                    "intervention": name,
                    "place": place,
                    "layer": study.layer,
                    "n": len(prompts),
                    "residual_norm": float(states.residual_norms.mean()),
                    "concentration": probes.mean_distance(states.keys),
                    "key_cosine": probes.cosine_with(states.keys, usual.keys),
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
    lines: list[list[object]] = [
        [f"token {row['place']}, {row['intervention']}", *(row[x] for x in measured), *[None] * 3]
        for row in states
    ]
    for source in SOURCES:
        cells = edit_cells(edits, key_from=source.name)
        lines.append([f"ROME, k^u from {source.name}", *[None] * 3, *cells])
    return Found(
        title=f"Attention mask: states at layer {options.study.layer}, and ROME with such a k^u",
        columns=COLUMNS,
        lines=lines,
        rows=[*states, *edits],
        draw=partial(plot, states, edits),
    )


def plot(states: list[dict[str, Any]], edits: list[dict[str, Any]]) -> Figure:
    import pandas as pd
    import seaborn as sns

    drawn, axes = figure(2, height=4.2)
    frame = pd.DataFrame([row | {"token": f"token {row['place']}"} for row in states])
    sns.barplot(data=frame, y="intervention", x="residual_norm", hue="token", ax=axes[0])
    axes[0].set_xscale("log")
    # A bar on a logarithmic axis begins somewhere; 10 is below all norms of such models.
    axes[0].set_xlim(left=10)
    axes[0].set_xlabel("norm of the residual stream")
    axes[0].legend(title=None, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    dots(axes[1], edits, y="key_from", x="perplexity")
    axes[1].axvline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("perplexity after ROME")
    for axis in axes:
        axis.set_ylabel("")
    return drawn


def mask_makes_the_state(result: Result) -> Verdict:
    def norm(intervention: str, place: int) -> float:
        match: dict[str, Any] = {"part": "state", "intervention": intervention, "place": place}
        found = mean(result.values("residual_norm", least=1, **match))
        if found <= 0:
            raise GapError("A residual norm is zero, so no ratio can be formed.")
        return found

    later = int(max(result.values("place", least=2, part="state")))
    first, other = norm("none", 0), norm("none", later)
    opened, closed = norm("first sees all", 0), norm("later sees itself only", later)
    anomaly = first >= TENFOLD * other
    held = [opened <= first / TENFOLD, closed >= TENFOLD * other]
    return grade(
        anomaly and all(held),
        anomaly and any(held),
        f"Mean residual norm: {fixed(first)} at the first token and {fixed(other)} at token "
        f"{later}; {fixed(opened)} at the first when it may attend to all, {fixed(closed)} at "
        f"token {later} when it may attend to itself only.",
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
        place="in no paper",
        sentence="A token that may attend to itself only becomes the anomaly wherever it stands, "
        "and a first token that may attend to others is none.",
        rule=f"By mean residual norm at the edited layer: the first token's is at least "
        f"{TENFOLD:g} times a later one's; it falls to a tenth or less when it may attend to all; "
        f"the later one's rises at least {TENFOLD:g}-fold when it may attend to itself only. "
        "Partly: the first and one of the others.",
        decide=mask_makes_the_state,
        own=True,
    ),
    Claim(
        id="own-mask-edit",
        place="in no paper",
        sentence="ROME destroys the model with the k^u of a token that saw only itself, wherever "
        "it stands, and with no other.",
        rule=f"Every edit with k^u of the first token, and of a later token that sees itself only, "
        f"ends above {COLLAPSE_THRESHOLD:g}; none with k^u of a later token, or of a first token "
        "that sees all. Partly: at least half, and fewer than half.",
        decide=mask_makes_the_collapse,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
