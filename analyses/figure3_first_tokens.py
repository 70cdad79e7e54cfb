"""Figure 3: first tokens of normal prompts (a), and k^u of prefixed collapse prompts (b).

The paper's claim: first tokens of normal prompts lie where k^u of collapse cases lies, and after a
prefix k^u of collapse cases lies where that of normal cases lies (Section 3.3). So the place makes
the anomaly, and not the edit. Nothing is edited here: all listed collapse cases are taken, and at
least as many normal ones. Pictures and separations are of keys scaled to norm 1, as in Figure 2; D
and the distance of the means are of the keys as they are.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.keys import keys_at
from firsttok.paper.cases import all_listed_cases
from firsttok.paper.claims import (
    SILHOUETTE,
    Claim,
    GapError,
    Result,
    Verdict,
    fixed,
    grade,
    pair_of,
)
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import PALETTE, caption, figure, legend_below
from firsttok.paper.tables import Found
from firsttok.probes import Projection, normalise, project, scatter, separation, spread
from firsttok.prompts import Prompt, fact_prompt, positions

FIRST, COLLAPSE, NORMAL = "first token of normal", "k^u of collapse", "k^u of normal"
PREFIXED = "k^u of prefixed collapse"
PANELS = {"a": (NORMAL, COLLAPSE, FIRST), "b": (NORMAL, COLLAPSE, PREFIXED)}
PAIRS = {
    "a": ((FIRST, COLLAPSE), (FIRST, NORMAL)),
    "b": ((PREFIXED, NORMAL), (PREFIXED, COLLAPSE)),
}
TITLES = {"a": "(a) first tokens of normal prompts", "b": "(b) prefixed collapse prompts"}
STYLES: dict[str, dict[str, Any]] = {
    FIRST: {"marker": "D", "edgecolors": "#1e8449", "facecolors": "none", "s": 30},
    COLLAPSE: {"marker": "o", "facecolors": PALETTE["collapse"], "edgecolors": "white"},
    PREFIXED: {"marker": "s", "facecolors": "#f39c12", "edgecolors": "white"},
    NORMAL: {"marker": "o", "facecolors": PALETTE["normal"], "edgecolors": "white"},
}
COLUMNS = {
    "n": "n",
    "silhouette": "silhouette",
    "cosine_of_means": "cos of means",
    "probe_accuracy": "probe",
    "probe_chance": "chance",
    "distance_of_means": "means apart",
    "d_first": "D of 1st",
    "d_second": "D of 2nd",
}
TWOFOLD = 2.0
RULE = (
    "1 - cosine of the means to k^u of {joined} cases is at most half of that to k^u of {left} "
    f"cases, and the silhouette against the latter is at least {SILHOUETTE} and the larger one. "
    "Partly: the former is smaller. No probe is asked: some normal cases have their subject in the "
    "first place, where both groups are the same tokens."
)


def read(options: ScriptOptions) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Keys of each group, and what they were read from."""
    study = options.study
    chosen = all_listed_cases(options)
    prefixes = [study.contexts.draw_prefix(fact, seed=options.seed) for fact in chosen.collapse]
    facts = {COLLAPSE: chosen.collapse, NORMAL: chosen.normal}
    bare = {name: [fact_prompt(study.model, fact) for fact in own] for name, own in facts.items()}
    prefixed = [
        fact_prompt(study.model, fact, prefix)
        for fact, prefix in zip(chosen.collapse, prefixes, strict=True)
    ]

    def keys(prompts: list[Prompt], at: list[int]) -> torch.Tensor:
        return keys_at(study.model, prompts, at, layers=[study.layer]).at(study.layer)

    found = {name: keys(own, positions(own).tolist()) for name, own in bare.items()}
    found[PREFIXED] = keys(prefixed, positions(prefixed).tolist())
    found[FIRST] = keys(bare[NORMAL], [0] * len(bare[NORMAL]))
    return found, {
        "first_token_subjects": {
            name: sum(prompt.subject_position == 0 for prompt in own) for name, own in bare.items()
        },
        "distinct_first_tokens": len({prompt.token_ids[0] for prompt in bare[NORMAL]}),
        "case_ids": {
            "collapse": [fact.case_id for fact in chosen.collapse],
            "normal": [fact.case_id for fact in chosen.normal],
        },
        "prefixes": prefixes,
    }


def compare(one: torch.Tensor, other: torch.Tensor, seed: int) -> dict[str, Any]:
    return {
        **asdict(separation(normalise(one), normalise(other), seed=seed)),
        "distance_of_means": float((one.mean(0) - other.mean(0)).norm()),
        **spread(one, seed=seed).columns("d_first"),
        **spread(other, seed=seed).columns("d_second"),
    }


def measure(options: ScriptOptions, _: Progress) -> Found:
    keys, made_from = read(options)
    rows: list[dict[str, Any]] = [
        {"panel": panel, "pair": f"{one} / {other}"} | compare(keys[one], keys[other], options.seed)
        for panel, pairs in PAIRS.items()
        for one, other in pairs
    ]
    projections = {
        panel: project({name: normalise(keys[name]) for name in names})
        for panel, names in PANELS.items()
    }
    study = options.study
    notes = [
        f"{name}: the subject is the first token in {count} of {len(keys[name])} cases."
        for name, count in made_from["first_token_subjects"].items()
    ]
    return Found(
        title=f"Figure 3. First tokens and subjects of {study.model.label}, layer {study.layer}",
        columns=["pair", *COLUMNS.values()],
        lines=[
            [f"({row['panel']}) {row['pair']}", *(row[column] for column in COLUMNS)]
            for row in rows
        ],
        rows=rows,
        provenance={**made_from, "scale": "norm 1"},
        notes=[
            *notes,
            "The paper prints no numbers here; its pictures show the first pair of (a) and of (b) "
            "as one cloud, and the second pair as two.",
        ],
        draw=partial(plot, projections, rows),
        points=projections,
    )


def plot(projections: dict[str, Projection], rows: list[dict[str, Any]]) -> Figure:
    drawn, axes = figure(2, height=5.2)
    for axis, (panel, names) in zip(axes, PANELS.items(), strict=True):
        scatter(axis, projections[panel], {name: STYLES[name] for name in names})
        axis.set_title(TITLES[panel])
        captions = [f"{row['pair']}:\n{caption(row)}" for row in rows if row["panel"] == panel]
        axis.set_xlabel("\n".join(captions).replace("k^u", "$k^u$"), fontsize=8)
        shown = [name.replace("k^u", "$k^u$") for name in names]
        legend_below(axis, 0.19, labels=shown, ncols=3, columnspacing=0.8, handletextpad=0.2)
    return drawn


def joins(result: Result, *, panel: str, joined: str, left: str) -> Verdict:
    """Whether a group lies with one of two others, by the angle between means."""
    pairs: dict[str, dict[str, float]] = {}
    for row in result.chosen(panel=panel):
        match = {"panel": panel, "pair": str(row.get("pair"))}
        for kind in (joined, left):
            if kind in match["pair"].rpartition(" / ")[2]:
                pairs[kind] = pair_of(result, **match)
                cosine = result.values("cosine_of_means", least=1, **match)[0]
                pairs[kind]["gap"] = 1 - cosine
    if len(pairs) < 2:
        raise GapError(
            f"{result.script} has no rows with panel = {panel} for both {joined} and {left} cases."
        )
    near, far = pairs[joined], pairs[left]
    closer = near["gap"] <= far["gap"] / TWOFOLD
    parted = far["silhouette"] >= SILHOUETTE and far["silhouette"] > near["silhouette"]
    return grade(
        closer and parted,
        near["gap"] < far["gap"],
        f"1 - cosine of the means is {fixed(near['gap'])} to k^u of {joined} cases (silhouette "
        f"{near['silhouette']:.2f}) and {fixed(far['gap'])} to that of {left} cases (silhouette "
        f"{far['silhouette']:.2f}), {near['n']:.0f} vectors each.",
    )


CLAIMS = (
    Claim(
        id="figure3-first-tokens",
        place="Figure 3a",
        sentence="First tokens of normal prompts lie where k^u of collapse cases lies.",
        rule=RULE.format(joined="collapse", left="normal"),
        decide=partial(joins, panel="a", joined="collapse", left="normal"),
        on_collapse=True,
    ),
    Claim(
        id="figure3-prefixed",
        place="Figure 3b",
        sentence="Behind a prefix, k^u of collapse cases lies where that of normal cases lies.",
        rule=RULE.format(joined="normal", left="collapse"),
        decide=partial(joins, panel="b", joined="normal", left="collapse"),
        on_collapse=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
