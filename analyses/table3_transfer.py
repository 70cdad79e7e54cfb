"""Table 3: one model's collapse cases, edited by ROME on other models.

The paper's claim: the collapse cases of Llama2-7b do not collapse other models (Section 3.2). The
other models are those of --others that can be had; by default gemma3-270m, if it has been pulled.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import Progress

from firsttok.cases import choose_cases, collapse_cases
from firsttok.console import exit_on_error, progress_bar
from firsttok.data import Fact, paper_values
from firsttok.editing import ROME
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.inputs import open_study
from firsttok.measuring import measure_facts
from firsttok.models import BosPolicy, is_pulled
from firsttok.options import folder_name
from firsttok.output import pick, publish
from firsttok.plots import figure, plain, save_figure
from firsttok.script_options import ScriptOptions, parse_script
from firsttok.study import Study

DEFAULT_OTHERS = ("gemma3-270m",)


def measure(
    study: Study, facts: tuple[Fact, ...], progress: Progress, *, source: bool
) -> list[dict[str, Any]]:
    # The papers measure perplexity without BOS; a model that is no language model without one
    # (as Gemma) is measured with it.
    if study.original_perplexity.mean > COLLAPSE_THRESHOLD:
        study = replace(study, text_bos=BosPolicy.AS_TOKENIZER)
    rows = measure_facts(study, facts, [ROME], progress=progress, label=study.model.label)
    return [
        {
            "model": study.model.label,
            "source": source,
            "bos": bool(study.model.leading_ids),
            "text_bos": study.text_bos.value,
            "original_perplexity": study.original_perplexity.mean,
        }
        | dict(row)
        for row in rows
    ]


def other_study(name: str, options: ScriptOptions, progress: Progress) -> Study:
    own: dict[str, Any] = {"model": name, "layer": None, "bos": "as_tokenizer", "contexts": None}
    own["second_moment"] = "identity" if options.args.second_moment == "identity" else None
    changed = argparse.Namespace(**vars(options.args) | own)
    return open_study(changed, options.out.parent / folder_name(name), progress)


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--others",
        nargs="*",
        metavar="MODEL",
        help="models to edit the same cases on (default: gemma3-270m if it has been pulled)",
    )
    with progress_bar() as progress:
        options = parse_script(parser, progress)
        facts = collapse_cases(options.halved(), progress=progress)
        # A list made on another model makes this one one of the others.
        own = not choose_cases(options).borrowed
        rows = measure(options.study, facts, progress, source=own)
        asked: list[str] | None = options.args.others
        given = DEFAULT_OTHERS if asked is None else tuple(asked)
        given = tuple(name for name in given if name != options.study.model.name)
        others = [name for name in given if asked is not None or is_pulled(name)]
        for name in others:
            study = other_study(name, options, progress)
            rows += measure(study, facts, progress, source=False)

    paper = {(value.row, value.model): value.value for value in paper_values("Table 3")}
    lines: list[list[object]] = []
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        values = pick(rows, "perplexity", model=model)
        original = pick(rows, "original_perplexity", model=model)[0]
        collapsed = sum(pick(rows, "collapsed", model=model))
        bos = bool(pick(rows, "bos", model=model)[0])
        source = any(pick(rows, "source", model=model))
        name = f"{model} (source of the cases)" if source else model
        lines.append(
            [name, "yes" if bos else "no", original, max(values), mean(values), int(collapsed)]
        )
    for model in dict.fromkeys(value.model for value in paper_values("Table 3")):
        lines.append(
            [f"paper, {model}", "-", paper["Ori PPL", model], paper["Max PPL", model], None, None]
        )
    provenance = options.provenance()
    publish(
        options.out / Path(__file__).stem,
        title=f"Table 3. ROME on {len(facts)} collapse cases of {provenance['case_list']['model']}",
        columns=["model", "BOS", "original", "max", "mean", "collapsed"],
        lines=lines,
        rows=rows,
        provenance=provenance
        | {
            "missing": [name for name in given if name not in others],
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    plot(options.out / Path(__file__).stem, rows)


def plot(stem: Path, rows: list[dict[str, Any]]) -> None:
    import pandas as pd
    import seaborn as sns

    drawn, (axis,) = figure(1)
    named = pd.DataFrame([row | {"model": plain(row["model"])} for row in rows])
    sns.stripplot(data=named, x="model", y="perplexity", hue="model", legend=False, ax=axis)
    axis.axhline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("")
    axis.set_ylabel("perplexity after one edit")
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
