"""What a token may attend to, changed in the same causal weights. (In no paper.)

The paper suspects that the first token is anomalous because it can attend to nothing but itself,
and shows it on another model, T5. Here the same model is asked: does the anomaly go when the first
token sees the others, does it come when a later token sees only itself, and does ROME collapse the
model with a k^u taken from either?
"""

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import Progress

from firsttok.cases import first_token_cases
from firsttok.console import exit_on_error, progress_bar
from firsttok.editing import ROME
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.output import pick, publish
from firsttok.plots import figure, save_figure
from firsttok.probes import (
    MaskedKeys,
    PositionSwap,
    SeesAll,
    SeesItself,
    cosine_with,
    mean_distance,
    token_states,
)
from firsttok.prompts import text_prompt
from firsttok.script_options import ScriptOptions, parse_script
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


def measure_states(options: ScriptOptions) -> list[dict[str, Any]]:
    study = options.study
    prompts = [text_prompt(study.model, text) for text in study.texts]
    prompts = [prompt for prompt in prompts if len(prompt.token_ids) > max(PLACES)][:SENTENCES]
    rows: list[dict[str, Any]] = []
    for place in PLACES:
        at = [place] * len(prompts)
        usual = token_states(study.model, prompts, at, layer=study.layer)
        for name, interventions in STATES:
            view = study.model.intervened(*interventions)
            states = token_states(view, prompts, at, layer=study.layer)
            rows.append(
                {
                    "part": "state",
                    "intervention": name,
                    "place": place,
                    "layer": study.layer,
                    "n": len(prompts),
                    "residual_norm": float(states.residual_norms.mean()),
                    "concentration": mean_distance(states.keys),
                    "key_cosine": cosine_with(states.keys, usual.keys),
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
        rows += [
            {
                "part": "edit",
                "key_from": source.name,
                "original_perplexity": study.original_perplexity.mean,
            }
            | dict(row)
            for row in measure_facts(changed, facts, [ROME], progress=progress, label=source.name)
        ]
    return rows


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress, without_bos=True)
        states = measure_states(options)
        edits = measure_edits(options, progress)
    lines: list[list[object]] = []
    for row in states:
        name = f"token {row['place']}, {row['intervention']}"
        cells = [row[column] for column in ("residual_norm", "concentration", "key_cosine")]
        lines.append([name, *cells, None, None, None])
    for source in SOURCES:
        match = {"key_from": source.name}
        values = pick(edits, "perplexity", **match)
        denominators = [abs(value) for value in pick(edits, "denominator", **match)]
        collapsed = f"{int(sum(pick(edits, 'collapsed', **match)))} of {len(values)}"
        line: list[object] = [f"ROME, k^u from {source.name}", None, None, None]
        lines.append([*line, mean(denominators), max(values), collapsed])
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title=f"Attention mask: states at layer {options.study.layer}, and ROME with such a k^u",
        columns=[
            "",
            "residual norm",
            "D of keys",
            "cosine with usual key",
            "mean |denominator|",
            "max perplexity",
            "collapsed",
        ],
        lines=lines,
        rows=[*states, *edits],
        provenance=options.provenance() | {"seconds": round(time.perf_counter() - start, 1)},
    )
    plot(stem, states, edits)


def plot(stem: Path, states: list[dict[str, Any]], edits: list[dict[str, Any]]) -> None:
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
    sns.stripplot(data=pd.DataFrame(edits), y="key_from", x="perplexity", alpha=0.75, ax=axes[1])
    axes[1].axvline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("perplexity after ROME")
    for axis in axes:
        axis.set_ylabel("")
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
