"""Token identity against position: "Arthur" and " Arthur", first and later. (In no paper.)

Bare, the subject is the first token and carries no space; behind a prefix it does. Each of the four
crossings gives a k^u, and ROME edits the model with it.
"""

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import Progress

from firsttok.cases import collapse_cases, spread_evenly
from firsttok.console import exit_on_error, progress_bar
from firsttok.editing import ROME
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.output import pick, publish
from firsttok.plots import figure, save_figure
from firsttok.probes import IDENTITY_CELLS, distinct_with_space, identity_prompt, token_states
from firsttok.script_options import ScriptOptions, parse_script


def measure(options: ScriptOptions, progress: Progress) -> list[dict[str, Any]]:
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
            {
                "position": "later" if cell.later else "first",
                "space": "with" if cell.space else "without",
                "residual_norm": float(states.residual_norms[index]),
                "key_norm": float(states.keys[index].norm()),
                "cosine_with_mean": row.key_cosine,
                "original_perplexity": study.original_perplexity.mean,
            }
            | dict(row)
            for index, row in enumerate(edited)
        ]
    return rows


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress, without_bos=True)
        rows = measure(options, progress)
    columns = ("residual_norm", "key_norm", "cosine_with_mean")
    lines: list[list[object]] = []
    for cell in IDENTITY_CELLS:
        match = {
            "position": "later" if cell.later else "first",
            "space": "with" if cell.space else "without",
        }
        values = pick(rows, "perplexity", **match)
        denominators = [abs(value) for value in pick(rows, "denominator", **match)]
        lines.append(
            [
                cell.name,
                *(mean(pick(rows, column, **match)) for column in columns),
                mean(denominators),
                max(values),
                f"{int(sum(pick(rows, 'collapsed', **match)))} of {len(values)}",
            ]
        )
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title="Token identity: k^u from four places, k_bar as usual, then ROME",
        columns=[
            "k^u from",
            "residual norm",
            "key norm",
            "cosine with k_bar",
            "mean |denominator|",
            "max perplexity",
            "collapsed",
        ],
        lines=lines,
        rows=rows,
        provenance=options.provenance() | {"seconds": round(time.perf_counter() - start, 1)},
    )
    plot(stem, rows)


def plot(stem: Path, rows: list[dict[str, Any]]) -> None:
    import pandas as pd
    import seaborn as sns

    named = [row | {"k^u from": f"{row['position']}, {row['space']} space"} for row in rows]
    frame = pd.DataFrame([row | {"denominator": abs(float(row["denominator"]))} for row in named])
    drawn, axes = figure(2)
    for axis, column in zip(axes, ("denominator", "perplexity"), strict=True):
        sns.stripplot(
            data=frame, x="k^u from", y=column, hue="position", legend=False, alpha=0.75, ax=axis
        )
        axis.set_yscale("log")
        axis.set_xlabel("")
        axis.tick_params(axis="x", rotation=20)
    axes[0].set_ylabel("|denominator|")
    axes[1].set_ylabel("perplexity after ROME")
    axes[1].axhline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
