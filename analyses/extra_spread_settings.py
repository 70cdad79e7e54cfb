"""Which lambda, threshold and ridge suit MEMIT and AlphaEdit on this model? (In no paper.)

The released numbers follow the width of the model and the scale of its keys. Here every setting
edits the same facts, which no table uses; z does not depend on any of them and is optimised once.
"""

from dataclasses import replace
from functools import partial
from itertools import product
from statistics import harmonic_mean
from typing import Any

from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.editing import ALPHAEDIT, MEMIT, AlphaEditRule, MemitEditor, MemitRule
from firsttok.evaluation import DAMAGE_RATIO
from firsttok.measuring import measure_facts
from firsttok.paper.cases import fresh_cases
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import figure
from firsttok.paper.tables import MEASURES, Found, matching, share

WEIGHTS = (150.0, 500.0, 1500.0, 5000.0, 15_000.0)
THRESHOLDS, RIDGES = (1e-2, 2e-2, 5e-2), (0.1, 0.3, 1.0, 3.0, 10.0)
COLUMNS = ("case_id", "perplexity", "prefixed_efficacy", *MEASURES)


def editors() -> dict[str, MemitEditor]:
    """An editor for each setting, by its name."""
    found: dict[str, MemitEditor] = {}
    for weight in WEIGHTS:
        name = f"memit {weight:g}"
        found[name] = replace(MEMIT, name=name, label=name, rule=MemitRule(weight=weight))
    for threshold, ridge in product(THRESHOLDS, RIDGES):
        name = f"alphaedit {threshold:g} {ridge:g}"
        rule = AlphaEditRule(threshold=threshold, ridge=ridge)
        found[name] = replace(ALPHAEDIT, name=name, label=name, rule=rule)
    return found


def measure(options: ScriptOptions, progress: Progress) -> Found:
    facts, settings = fresh_cases(options), editors()
    measured = measure_facts(
        options.study,
        facts,
        tuple(settings.values()),
        metrics=("perplexity", "accuracy"),
        progress=progress,
    )
    rows = [{"setting": row["method"]} | {name: row[name] for name in COLUMNS} for row in measured]
    original = options.study.original_perplexity.mean
    lines: list[list[object]] = []
    best: dict[str, tuple[float, float, str]] = {}
    for name in settings:
        own = matching(rows, setting=name)
        highest = max(row["perplexity"] for row in own)
        cells = [share(own, column) for column in ("prefixed_efficacy", *MEASURES)]
        score = score_of(cells, sound=highest < DAMAGE_RATIO * original)
        lines.append([name, *cells, highest, score])
        # Of equal ones that which changes least: the largest lambda, or ridge.
        kind, *numbers = name.split()
        best[kind] = max(best.get(kind, (-1.0, 0.0, "")), (score, float(numbers[-1]), name))
    return Found(
        title=f"MEMIT and AlphaEdit by their settings, {len(facts)} facts that no table uses",
        columns=["", "prefixed efficacy", *MEASURES, "max perplexity", "Score"],
        lines=lines,
        rows=rows,
        notes=[
            "Score: harmonic mean of prefixed efficacy, efficacy, generalization and locality; 0 "
            f"where an edit multiplies the perplexity by {DAMAGE_RATIO:g} or more.",
            *(
                f"Best for {kind}: {name} ({score:.1f}); of equal ones that which changes least."
                for kind, (score, _, name) in best.items()
            ),
        ],
        draw=partial(plot, lines),
    )


def score_of(cells: list[float | None], *, sound: bool) -> float:
    known = [value for value in cells if value is not None]
    return float(harmonic_mean(known)) if sound and min(known) > 0 else 0.0


def plot(lines: list[list[Any]]) -> Figure:
    drawn, (axis,) = figure(1, height=5.0)
    names, scores = [line[0] for line in lines], [line[-1] for line in lines]
    axis.barh(names, scores, color="#2c6fbb")
    axis.invert_yaxis()
    axis.set_xlabel("Score")
    axis.tick_params(axis="y", labelsize=7)
    return drawn


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, methods=tuple(editors().values())))
