"""Figures 2, 4 and 5 (by --model): the elements of the denominator, and the two kinds of key.

The paper's claim: in collapse cases k^u lies elsewhere than C^-1 k_bar (a) and k_bar (b); in normal
cases it does not (Section 3.2, Appendix A.1). A t-SNE picture is drawn as in the paper, and each
distance is measured beside it. Nothing is edited, so all listed collapse cases are taken, and at
least as many normal ones.

C^-1 k_bar has another unit than a key. So pictures and separations are of vectors scaled to norm 1;
D and norms are of the vectors as they are. The paper does not say whether it scales.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from firsttok.cases import all_listed_cases
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.data import Fact
from firsttok.keys import TOGETHER, keys_of_facts
from firsttok.output import pick, publish
from firsttok.plots import PALETTE, figure, save_figure
from firsttok.probes import normalise, project, save_points, scatter, separation, spread
from firsttok.prompts import fact_prompt
from firsttok.script_options import parse_script
from firsttok.study import Study

SOLVED, MEAN, BARE = "C^-1 k_bar", "k_bar", "k^u"
PANELS = {"a": SOLVED, "b": MEAN}
SYMBOLS = {SOLVED: r"$C^{-1}\bar{k}$", MEAN: r"$\bar{k}$", BARE: "$k^u$"}
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


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress)
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
    columns = ["silhouette", "cosine_of_means", "cosine_of_pairs", "probe_accuracy", "d_first"]
    columns += ["d_second", "norm_first", "norm_second"]
    shown = ["silhouette", "cos of means", "cos of pairs", "probe", "D, 1st", "D, 2nd"]
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title=f"Figure 2. Keys of {study.model.label} at layer {study.layer}",
        columns=["", *shown, "norm, 1st", "norm, 2nd"],
        lines=[
            [f"({row['panel']}) {row['pair']}, {row['cases']}", *(row[name] for name in columns)]
            for row in rows
        ],
        rows=rows,
        provenance=options.provenance()
        | {"scale": "norm 1", "seconds": round(time.perf_counter() - start, 1)}
        | {"case_ids": {cases: [fact.case_id for fact in groups[cases]] for cases in groups}},
    )
    for cases, flags in first.items():
        show(f"{cases}: the subject is the first token in {sum(flags)} of {len(flags)} cases.")
    show(f"A probe that guesses is right in {rows[0]['probe_chance']:.2f} of the cases.")
    show("The paper prints no numbers here; it shows k^u of collapse cases apart from all else.")
    plot(stem, vectors, first, rows)


def plot(
    stem: Path, vectors: Vectors, first: dict[str, list[bool]], rows: list[dict[str, Any]]
) -> None:
    drawn, axes = figure(2, height=5.2)
    projections = {
        panel: project(
            {f"{cases} {n}": normalise(vectors[cases, n]) for cases in first for n in (name, BARE)}
        )
        for panel, name in PANELS.items()
    }
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
        axis.set_xlabel("\n".join(caption(rows, panel, cases) for cases in first), fontsize=9)
        note = "hollow: normal, yet the first token" if any(first["normal"]) else None
        axis.legend(
            fontsize=8,
            ncols=2,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            title=note,
            title_fontsize=8,
        )
    save_figure(stem, drawn)
    save_points(stem.with_name(f"{stem.name}_points.csv"), projections)


def caption(rows: list[dict[str, Any]], panel: str, cases: str) -> str:
    names = ("silhouette", "cosine_of_means", "probe_accuracy")
    values = [pick(rows, name, panel=panel, cases=cases)[0] for name in names]
    return "{}: silhouette {:.2f}, cosine {:.2f}, probe {:.2f}".format(cases, *values)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
