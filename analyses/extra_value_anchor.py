"""FC-ROME against C-ROME: does the new target come out behind prefixed prompts? (In no paper.)

The released C-ROME still takes the anchor of the value, v* = anchor + delta, and the norm that
clamps delta, from the bare prompt. FC-ROME takes both from the prefixed mean. Measured on collapse
cases over three context seeds: behind the prefixes used for editing (as in Table 5) and behind
prefixes of another seed, which the edit has not seen.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich.progress import Progress

from firsttok.cases import choose_cases
from firsttok.console import exit_on_error, progress_bar
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import C_ROME, FC_ROME, Edit
from firsttok.evaluation import target_probabilities
from firsttok.measuring import measure_facts
from firsttok.output import pick, publish
from firsttok.plots import figure, save_figure
from firsttok.script_options import ScriptOptions, parse_script
from firsttok.study import Study

METHODS = (C_ROME, FC_ROME)
SEEDS = 3
HELD_OUT_SEED = 1000
KINDS: tuple[str, ...] = ("editing_prefixes", "held_out_prefixes", "bare")


@dataclass(frozen=True)
class Probabilities:
    """Mean probability of the new target behind each kind of prompt."""

    tests: dict[str, ContextSet]
    """Contexts of each kind."""

    name = "probabilities"
    columns = dict.fromkeys(KINDS, float)

    def measure(self, study: Study, fact: Fact, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """Measure each edit; see :class:`~firsttok.metrics.Metric`."""
        rows: list[dict[str, Any]] = []
        for edit in edits:
            with edit.applied(study.model) as view:
                found = {
                    kind: mean(target_probabilities(view, fact, contexts))
                    for kind, contexts in self.tests.items()
                }
            rows.append(found)
        return rows


def measure(options: ScriptOptions, progress: Progress) -> list[dict[str, Any]]:
    facts = choose_cases(options.halved()).collapse
    unseen = options.sample_contexts(HELD_OUT_SEED)
    labels = {method.name: method.label for method in METHODS}
    rows: list[dict[str, Any]] = []
    for seed in range(options.seed, options.seed + SEEDS):
        contexts = options.sample_contexts(seed)
        probabilities = Probabilities(
            {
                "editing_prefixes": ContextSet(templates=contexts.prefixed),
                "held_out_prefixes": ContextSet(templates=unseen.prefixed),
                "bare": ContextSet(templates=("{}",)),
            }
        )
        measured = measure_facts(
            options.study.varied(contexts=contexts),
            facts,
            METHODS,
            metrics=["perplexity", probabilities],
            progress=progress,
            label=f"context seed {seed}",
        )
        rows += [
            {
                "seed": seed,
                "case_id": row.case_id,
                "subject": row.subject,
                "method": labels[row.method],
                **{kind: row[kind] for kind in KINDS},
                "perplexity": row.perplexity,
            }
            for row in measured
        ]
    return rows


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress, own_contexts=True)
        rows = measure(options, progress)
        original = options.study.original_perplexity.mean
    seeds = list(range(options.seed, options.seed + SEEDS))
    lines: list[list[object]] = []
    for method in METHODS:
        for kind in KINDS:
            values = pick(rows, kind, method=method.label)
            means = [mean(pick(rows, kind, method=method.label, seed=seed)) for seed in seeds]
            spread = f"{min(means):.3f} to {max(means):.3f}"
            name = f"{method.label}, {kind.replace('_', ' ')}"
            lines.append([name, mean(values), spread, min(values), median(values), max(values)])
        ratios = [value / original for value in pick(rows, "perplexity", method=method.label)]
        name = f"{method.label}, perplexity / original"
        lines.append([name, mean(ratios), "", min(ratios), median(ratios), max(ratios)])
    cases = len({row["case_id"] for row in rows})
    publish(
        options.out / "extra_value_anchor",
        title=f"Probability of the new target on {cases} collapse cases, {SEEDS} context seeds",
        columns=["", "mean", "means of the seeds", "min", "median", "max"],
        lines=lines,
        rows=rows,
        provenance=options.provenance()
        | {
            "context_seeds": seeds,
            "held_out_seed": HELD_OUT_SEED,
            "original_perplexity": original,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
    plot(options, rows)


def plot(options: ScriptOptions, rows: list[dict[str, Any]]) -> None:
    import pandas as pd
    import seaborn as sns

    long = [
        {"method": row["method"], "prompt": kind.replace("_", " "), "probability": row[kind]}
        for row in rows
        for kind in KINDS
    ]
    drawn, (axis,) = figure(1, height=4.0)
    frame = pd.DataFrame(long)
    sns.stripplot(
        data=frame, x="prompt", y="probability", hue="method", dodge=True, alpha=0.6, ax=axis
    )
    axis.set_xlabel("")
    axis.set_ylabel("probability of the new target")
    axis.legend(title=None)
    save_figure(options.out / "extra_value_anchor", drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
