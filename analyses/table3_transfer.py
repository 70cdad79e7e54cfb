"""Table 3: one model's collapse cases, edited by ROME on other models.

The paper's claim: the collapse cases of Llama2-7b do not collapse other models (Section 3.2). The
other models are those of --others that can be had; by default gemma3-270m, if it has been pulled.
"""

import argparse
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.data import Fact
from firsttok.editing import ROME
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.inputs import open_study
from firsttok.measuring import measure_facts
from firsttok.models import BosPolicy, is_pulled
from firsttok.options import folder_name
from firsttok.paper.cases import choose_cases, collapse_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, fixed, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import dots, figure, perplexity_axis, plain
from firsttok.paper.tables import Found, pick, printed
from firsttok.study import Study

DEFAULT_OTHERS = ("gemma3-270m",)
UNCHANGED, NO_SHARP_RISE = 1.1, 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--others",
        nargs="*",
        metavar="MODEL",
        help="models to edit the same cases on (default: gemma3-270m if it has been pulled)",
    )


def measure_on(
    study: Study, facts: tuple[Fact, ...], progress: Progress, *, source: bool
) -> list[dict[str, Any]]:
    # The papers measure perplexity without BOS; a model that is no language model without one
    # (as Gemma) is measured with it.
    if study.original_perplexity.mean > COLLAPSE_THRESHOLD:
        study = replace(study, text_bos=BosPolicy.AS_TOKENIZER)
    made_with = {
        "model": study.model.label,
        "source": source,
        "bos": bool(study.model.leading_ids),
        "text_bos": study.text_bos.value,
        "original_perplexity": study.original_perplexity.mean,
    }
    rows = measure_facts(study, facts, [ROME], progress=progress, label=study.model.label)
    return [made_with | dict(row) for row in rows]


def other_study(name: str, options: ScriptOptions, progress: Progress) -> Study:
    own: dict[str, Any] = {"model": name, "layer": None, "bos": "as_tokenizer", "contexts": None}
    own["second_moment"] = "identity" if options.args.second_moment == "identity" else None
    changed = argparse.Namespace(**vars(options.args) | own)
    return open_study(changed, options.out.parent / folder_name(name), progress)


def measure(options: ScriptOptions, progress: Progress) -> Found:
    facts = collapse_cases(options.halved(), progress=progress)
    # A list made on another model makes this one one of the others.
    own = not choose_cases(options).borrowed
    rows = measure_on(options.study, facts, progress, source=own)
    asked: list[str] | None = options.args.others
    given = DEFAULT_OTHERS if asked is None else asked
    given = [name for name in given if name != options.study.model.name]
    others = [name for name in given if asked is not None or is_pulled(name)]
    for name in others:
        study = other_study(name, options, progress)
        rows += measure_on(study, facts, progress, source=False)
    lines: list[list[Any]] = []
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        of = partial(pick, rows, model=model)
        values, original = of("perplexity"), of("original_perplexity")[0]
        name = f"{model} (source of the cases)" if any(of("source")) else model
        bos = "yes" if of("bos")[0] else "no"
        lines.append([name, bos, original, max(values), mean(values), int(sum(of("collapsed")))])
    models, paper = printed("Table 3")
    for model in models:
        cells = [paper[row, model] for row in ("Ori PPL", "Max PPL")]
        lines.append([f"paper, {model}", "-", *cells, None, None])
    made_on = options.provenance()["case_list"]["model"]
    return Found(
        title=f"Table 3. ROME on {len(facts)} collapse cases of {made_on}",
        columns=["model", "BOS", "original", "max", "mean", "collapsed"],
        lines=lines,
        rows=rows,
        provenance={"missing": [name for name in given if name not in others]},
        draw=partial(plot, rows),
    )


def plot(rows: list[dict[str, Any]]) -> Figure:
    drawn, (axis,) = figure(1)
    named = [row | {"model": plain(row["model"])} for row in rows]
    dots(axis, named, x="model", y="perplexity", hue="model", legend=False, alpha=None)
    perplexity_axis(axis, "perplexity after one edit")
    return drawn


def no_transfer(result: Result) -> Verdict:
    own = result.values("collapsed", source=True)
    if not any(own):
        raise GapError("No case collapses the model they are said to come from.")
    names = list(dict.fromkeys(str(row["model"]) for row in result.chosen(source=False)))
    if not names:
        missing = ", ".join(map(str, result.provenance.get("missing", ()))) or "none was named"
        raise GapError(f"No other model was there to edit ({missing}).")
    factors: dict[str, float] = {}
    notes: list[str] = []
    for name in names:
        perplexities = result.values("perplexity", source=False, model=name)
        originals = result.values("original_perplexity", source=False, model=name)
        pairs = zip(perplexities, originals, strict=True)
        factors[name] = max(after / before for after, before in pairs)
        bos = all(row.get("bos") in (True, "with") for row in result.chosen(model=name))
        notes.append(
            f"{name} ({'with' if bos else 'without'} BOS): at most {fixed(factors[name])} times "
            f"the original, on {len(perplexities)} cases"
        )
    within = [factor <= UNCHANGED for factor in factors.values()]
    mild = all(factor <= NO_SHARP_RISE for factor in factors.values())
    return grade(all(within), any(within) or mild, f"{'; '.join(notes)}.")


CLAIMS = (
    Claim(
        id="table3-transfer",
        place="Table 3",
        sentence="The collapse cases of one model do not collapse other models.",
        rule=f"On every other model the highest perplexity is at most {UNCHANGED} times its "
        f"original (the paper's largest factor is 1.06). Partly: on some other model, or at most "
        f"{NO_SHARP_RISE:g} times on all of them. The paper's cases here end in a period; cases "
        "that begin with their subject are another kind, and the model's BOS policy decides on "
        "them (Figure 7).",
        decide=no_transfer,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, add_options=add_options))
