"""Figure 3: first tokens of normal prompts (a), and k^u of prefixed collapse prompts (b).

The paper's claim: first tokens of normal prompts lie where k^u of collapse cases lies, and behind a
prefix k^u of collapse cases lies where that of normal cases lies (Section 3.3). So the place makes
the anomaly, and not the edit. Nothing is edited here: all listed collapse cases are taken, and at
least as many normal ones. Pictures and separations are of keys scaled to norm 1, as in Figure 2; D
and the distance of the means are of the keys as they are.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from firsttok.cases import all_listed_cases
from firsttok.console import exit_on_error, progress_bar, show
from firsttok.keys import keys_at
from firsttok.output import pick, publish
from firsttok.plots import PALETTE, figure, save_figure
from firsttok.probes import normalise, project, save_points, scatter, separation, spread
from firsttok.prompts import Prompt, fact_prompt, positions
from firsttok.script_options import ScriptOptions, parse_script

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


def read(options: ScriptOptions) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Keys of each group, and what they were read from."""
    study = options.study
    chosen = all_listed_cases(options)
    prefixes = [study.contexts.draw_prefix(fact, seed=options.seed) for fact in chosen.collapse]
    bare = {
        COLLAPSE: [fact_prompt(study.model, fact) for fact in chosen.collapse],
        NORMAL: [fact_prompt(study.model, fact) for fact in chosen.normal],
    }
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


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress, without_bos=True)
        keys, made_from = read(options)
    rows: list[dict[str, Any]] = [
        {"panel": panel, "pair": f"{one} / {other}"} | compare(keys[one], keys[other], options.seed)
        for panel, pairs in PAIRS.items()
        for one, other in pairs
    ]
    columns = ["n", "silhouette", "cosine_of_means", "probe_accuracy", "probe_chance"]
    columns += ["distance_of_means", "d_first", "d_second"]
    shown = ["n", "silhouette", "cos of means", "probe", "chance", "means apart", "D of 1st"]
    stem = options.out / Path(__file__).stem
    study = options.study
    publish(
        stem,
        title=f"Figure 3. First tokens and subjects of {study.model.label}, layer {study.layer}",
        columns=["pair", *shown, "D of 2nd"],
        lines=[
            [f"({row['panel']}) {row['pair']}", *(row[column] for column in columns)]
            for row in rows
        ],
        rows=rows,
        provenance=options.provenance()
        | made_from
        | {"scale": "norm 1", "seconds": round(time.perf_counter() - start, 1)},
    )
    for name, count in made_from["first_token_subjects"].items():
        show(f"{name}: the subject is the first token in {count} of {len(keys[name])} cases.")
    show("The paper prints no numbers here; its pictures show the first pair of (a) and of (b) as")
    show("one cloud, and the second pair as two.")
    plot(stem, keys, rows)


def plot(stem: Path, keys: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> None:
    drawn, axes = figure(2, height=5.2)
    projections = {
        panel: project({name: normalise(keys[name]) for name in names})
        for panel, names in PANELS.items()
    }
    for axis, (panel, names) in zip(axes, PANELS.items(), strict=True):
        scatter(axis, projections[panel], {name: STYLES[name] for name in names})
        axis.set_title(TITLES[panel])
        captions = [caption(rows, f"{one} / {other}") for one, other in PAIRS[panel]]
        axis.set_xlabel("\n".join(captions).replace("k^u", "$k^u$"), fontsize=8)
        axis.legend(
            [name.replace("k^u", "$k^u$") for name in names],
            fontsize=8,
            loc="upper center",
            ncols=3,
            columnspacing=0.8,
            handletextpad=0.2,
            bbox_to_anchor=(0.5, -0.19),
        )
    save_figure(stem, drawn)
    save_points(stem.with_name(f"{stem.name}_points.csv"), projections)


def caption(rows: list[dict[str, Any]], pair: str) -> str:
    names = ("silhouette", "cosine_of_means", "probe_accuracy")
    values = [pick(rows, name, pair=pair)[0] for name in names]
    return "{}:\nsilhouette {:.2f}, cosine {:.2f}, probe {:.2f}".format(pair, *values)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
