"""Figures 2, 4 and 5 (by --model): the elements of the denominator, and the two kinds of key.

The paper's claim: in collapse cases k^u lies elsewhere than C^-1 k_bar (a) and k_bar (b); in normal
cases it does not (Section 3.2, Appendix A.1). A t-SNE picture is drawn as in the paper, and each
distance is measured beside it. Nothing is edited, so all listed collapse cases are taken, and at
least as many normal ones.

C^-1 k_bar has another unit than a key. So pictures and separations are of vectors scaled to norm 1;
D and norms are of the vectors as they are. The paper does not say whether it scales.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.data import Fact
from firsttok.keys import TOGETHER, keys_of_facts
from firsttok.paper.cases import all_listed_cases
from firsttok.paper.claims import APART, Claim, Result, Verdict, grade, is_apart, pair_of
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import PALETTE, caption, figure, legend_below
from firsttok.paper.tables import Found
from firsttok.probes import Projection, normalise, project, scatter, separation, spread
from firsttok.prompts import fact_prompt
from firsttok.study import Study

SOLVED, MEAN, BARE = "C^-1 k_bar", "k_bar", "k^u"
PANELS = {"a": SOLVED, "b": MEAN}
SYMBOLS = {SOLVED: r"$C^{-1}\bar{k}$", MEAN: r"$\bar{k}$", BARE: "$k^u$"}
COLUMNS = {
    "silhouette": "silhouette",
    "cosine_of_means": "cos of means",
    "cosine_of_pairs": "cos of pairs",
    "probe_accuracy": "probe",
    "d_first": "D, 1st",
    "d_second": "D, 2nd",
    "norm_first": "norm, 1st",
    "norm_second": "norm, 2nd",
}
RULE = (
    f"Collapse cases: {APART}, measured on the vectors and not on the picture. Normal cases: not "
    "both. Partly: apart in collapse cases, but in normal ones as well."
)
Groups = dict[str, tuple[Fact, ...]]
Vectors = dict[tuple[str, str], torch.Tensor]


def read(study: Study, groups: Groups, progress: Progress) -> Vectors:
    task = progress.add_task("keys", total=sum(map(len, groups.values())))
    vectors: Vectors = {}
    for cases, facts in groups.items():
        found = {name: list[torch.Tensor]() for name in SYMBOLS}
        for start in range(0, len(facts), TOGETHER):
            some = facts[start : start + TOGETHER]
            for keys in keys_of_facts(study.model, some, study.contexts, layer=study.layer):
                found[MEAN].append(keys.prefixed_mean)
                found[BARE].append(keys.unprefixed)
                found[SOLVED].append(study.second_moment.solve(keys.prefixed_mean))
            progress.advance(task, len(some))
        vectors |= {(cases, name): torch.stack(rows) for name, rows in found.items()}
    return vectors


def compare(vectors: Vectors, cases: str, name: str, seed: int) -> dict[str, Any]:
    one, other = vectors[cases, name], vectors[cases, BARE]
    unit, unit_other = normalise(one), normalise(other)
    return {
        **asdict(separation(unit, unit_other, seed=seed)),
        # Of one fact's two vectors: for C^-1 k_bar, the denominator over the norm of k^u.
        "cosine_of_pairs": float((unit * unit_other).sum(1).mean()),
        **spread(one, seed=seed).columns("d_first"),
        **spread(other, seed=seed).columns("d_second"),
        "norm_first": float(one.norm(dim=1).mean()),
        "norm_second": float(other.norm(dim=1).mean()),
    }


def measure(options: ScriptOptions, progress: Progress) -> Found:
    study = options.study
    chosen = all_listed_cases(options)
    groups = {"collapse": chosen.collapse, "normal": chosen.normal}
    vectors = read(study, groups, progress)
    first = {
        cases: [fact_prompt(study.model, fact).subject_position == 0 for fact in facts]
        for cases, facts in groups.items()
    }
    rows: list[dict[str, Any]] = [
        {"panel": panel, "cases": cases, "pair": f"{name} / {BARE}"}
        | {"first_token_subjects": sum(first[cases])}
        | compare(vectors, cases, name, options.seed)
        for panel, name in PANELS.items()
        for cases in groups
    ]
    projections = {
        panel: project(
            {f"{cases} {n}": normalise(vectors[cases, n]) for cases in first for n in (name, BARE)}
        )
        for panel, name in PANELS.items()
    }
    notes = [
        f"{cases}: the subject is the first token in {sum(flags)} of {len(flags)} cases."
        for cases, flags in first.items()
    ]
    return Found(
        title=f"Figure 2. Keys of {study.model.label} at layer {study.layer}",
        columns=["", *COLUMNS.values()],
        lines=[
            [f"({row['panel']}) {row['pair']}, {row['cases']}", *(row[name] for name in COLUMNS)]
            for row in rows
        ],
        rows=rows,
        provenance={
            "scale": "norm 1",
            "case_ids": {cases: [fact.case_id for fact in groups[cases]] for cases in groups},
        },
        notes=[
            *notes,
            f"A probe that guesses is right in {rows[0]['probe_chance']:.2f} of the cases.",
            "The paper prints no numbers here; it shows k^u of collapse cases apart from all else.",
        ],
        draw=partial(plot, projections, first, rows),
        points=projections,
    )


def plot(
    projections: dict[str, Projection], first: dict[str, list[bool]], rows: list[dict[str, Any]]
) -> Figure:
    drawn, axes = figure(2, height=5.2)
    for axis, (panel, name) in zip(axes, PANELS.items(), strict=True):
        styles: dict[str, dict[str, Any]] = {}
        for cases, flags in first.items():
            colour = PALETTE[cases]
            fill = ["white" if flag and cases == "normal" else colour for flag in flags]
            for element, marker in ((name, "^"), (BARE, "o")):
                label = f"{SYMBOLS[element]}, {cases}"
                style = {"marker": marker, "facecolors": fill, "edgecolors": colour}
                styles[f"{cases} {element}"] = style | {"label": label}
        scatter(axis, projections[panel], styles)
        axis.set_title(f"({panel}) {SYMBOLS[name]} and {SYMBOLS[BARE]}")
        own = [f"{row['cases']}: {caption(row)}" for row in rows if row["panel"] == panel]
        axis.set_xlabel("\n".join(own), fontsize=9)
        note = "hollow: normal, yet the first token" if any(first["normal"]) else None
        legend_below(axis, 0.13, ncols=2, title=note, title_fontsize=8)
    return drawn


def collapse_only(result: Result, panel: str) -> Verdict:
    collapse, normal = (
        pair_of(result, panel=panel, cases=cases) for cases in ("collapse", "normal")
    )
    apart, others = is_apart(collapse), is_apart(normal)
    return grade(
        apart and not others,
        apart,
        f"Collapse cases: {measures_of(collapse)}. Normal cases: {measures_of(normal)}.",
    )


def measures_of(row: Mapping[str, Any]) -> str:
    side = "apart" if is_apart(row) else "not apart"
    return (
        f"{side} (probe accuracy {row['probe_accuracy']:.2f}, silhouette {row['silhouette']:.2f}, "
        f"{row['n']:.0f} vectors of each)"
    )


CLAIMS = (
    Claim(
        id="figure2-denominator",
        place="Figures 2a, 4a and 5a",
        sentence="The two elements of the denominator, C^-1 k_bar and k^u, lie apart in collapse "
        "cases and not in normal ones.",
        rule=RULE,
        decide=partial(collapse_only, panel="a"),
        on_collapse=True,
    ),
    Claim(
        id="figure2-keys",
        place="Figures 2b, 4b and 5b",
        sentence="The unprefixed key k^u lies apart from the prefixed k_bar in collapse cases and "
        "not in normal ones.",
        rule=RULE,
        decide=partial(collapse_only, panel="b"),
        on_collapse=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS))
