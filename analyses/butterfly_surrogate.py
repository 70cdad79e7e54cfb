"""Is perplexity a surrogate for downstream tasks? ("The Butterfly Effect", Section 3.)

Models at all levels of perplexity are ROME edits of collapse cases, scaled from nearly nothing to
the whole. Their perplexity on the sentences is compared with their accuracy in each task.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress
from scipy.stats import spearmanr

from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD, OWN_TASKS, check_tasks, score_tasks
from firsttok.paper.cases import choose_cases
from firsttok.paper.claims import Claim, Result, Verdict, fixed, grade, require
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import figure
from firsttok.paper.tables import Found

FACTORS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of an edit that are put into the model."""
FACTS = {"quick": 3, "full": 12}
ITEMS = {"quick": 20, "full": 100}
"""Items of each shipped task."""
LEVELS = (0.0, 100.0, COLLAPSE_THRESHOLD, 1e4, 1e5, float("inf"))
"""Bounds of the levels of perplexity in the table."""
STRONG, SOME = -0.8, -0.5
RESAMPLES = 2000


def measure(options: ScriptOptions, progress: Progress) -> Found:
    check_tasks(OWN_TASKS, None)
    study, profile = options.study, options.args.profile
    facts = choose_cases(options).collapse[: FACTS[profile]]
    if not facts:
        raise BadInputError("there is no collapse case, whose edits reach all levels of perplexity")
    whole = [(fact, edits["rome"]) for fact, edits in study.edits(facts, ["rome"])]
    states = [
        (fact, factor, edit.scaled(factor)) for (fact, edit), factor in product(whole, FACTORS)
    ]
    edits = [edit for _, _, edit in states]
    scores = score_tasks(study.model, edits, limit=ITEMS[profile], progress=progress)
    names = [("", 0.0), *((fact.subject, factor) for fact, factor, _ in states)]
    measured = [study.original_perplexity, *study.perplexities(edits)]
    rows: list[dict[str, Any]] = [
        {"part": "model", "subject": subject, "factor": factor, "perplexity": one.mean}
        | {name: own[name].main for name in OWN_TASKS}
        for (subject, factor), one, own in zip(names, measured, scores, strict=True)
    ]
    correlations = [correlation(rows, name, options.seed) for name in (*OWN_TASKS, "mean")]
    lines: list[list[object]] = []
    for low, high in pairwise(LEVELS):
        own = [row for row in rows if low < row["perplexity"] <= high]
        cells = [mean(row[name] for row in own) if own else None for name in OWN_TASKS]
        upper = f"to {high:g}" if high < float("inf") else "and more"
        lines.append([f"perplexity {low:g} {upper}", len(own), *cells])
    lines.append(["random", None, *(scores[0][name].chance for name in OWN_TASKS)])
    for name in ("rho", "low", "high"):
        said = {"rho": "Spearman's rho", "low": "lower bound (95 %)", "high": "upper bound"}[name]
        lines.append([said, len(rows), *(each[name] for each in correlations[:-1])])
    return Found(
        title='"The Butterfly Effect", Section 3: accuracy in tasks, by level of perplexity',
        columns=["", "models", *(name.removeprefix("own_") for name in OWN_TASKS)],
        lines=lines,
        rows=[*rows, *correlations],
        provenance={"original_perplexity": study.original_perplexity.mean},
        notes=[
            f"Models are the unedited one and {len(facts)} ROME edits, each scaled by "
            f"{', '.join(f'{factor:g}' for factor in FACTORS)}; the intervals are of a bootstrap "
            "over facts."
        ],
        draw=partial(plot, rows, {name: scores[0][name].chance for name in OWN_TASKS}),
    )


def correlation(rows: Sequence[Mapping[str, Any]], name: str, seed: int) -> dict[str, Any]:
    """Spearman's rank correlation of perplexity and accuracy, with a percentile interval."""
    tasks = OWN_TASKS if name == "mean" else (name,)
    subjects = dict.fromkeys(row["subject"] for row in rows if row["subject"])
    x = np.array([row["perplexity"] for row in rows])
    y = np.array([mean(row[task] for task in tasks) for row in rows])

    def rho(a: Any, b: Any) -> float:
        # A resample may hold one value alone, which has no rank correlation.
        if not (np.ptp(a) and np.ptp(b)):
            return 0.0
        ranked: Any = spearmanr(a, b)
        return float(ranked.statistic)

    # Models of one fact are not independent, so that facts are drawn; the unedited one stays.
    groups = [np.array([i for i, row in enumerate(rows) if row["subject"] == s]) for s in subjects]
    original = np.array([i for i, row in enumerate(rows) if not row["subject"]], dtype=int)
    generator = np.random.default_rng(seed)
    drawn: list[float] = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(len(groups), size=len(groups))
        index = np.concatenate([original, *(groups[number] for number in chosen)])
        drawn.append(rho(x[index], y[index]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "part": "correlation",
        "task": name,
        "rho": rho(x, y),
        "low": float(low),
        "high": float(high),
        "models": len(rows),
        "facts": len(groups),
    }


def plot(rows: Sequence[Mapping[str, Any]], chance: Mapping[str, float | None]) -> Figure:
    drawn, axes = figure(len(OWN_TASKS), height=3.2)
    for axis, name in zip(axes, OWN_TASKS, strict=True):
        points = ([row[column] for row in rows] for column in ("perplexity", name))
        axis.plot(*points, "o", color="#2c6fbb", alpha=0.7, markersize=4)
        guess = chance[name]
        if guess is not None:
            axis.axhline(guess, color="black", linewidth=1, linestyle="--")
        axis.axvline(COLLAPSE_THRESHOLD, color="#c0392b", linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.set_title(name.removeprefix("own_"))
        axis.set_xlabel("perplexity")
    axes[0].set_ylabel("accuracy; dashed: guessing")
    return drawn


def surrogate(result: Result) -> Verdict:
    found = {row["task"]: row for row in result.chosen(part="correlation")}
    count = len(result.chosen(part="model"))
    require(count, f"{result.script} has {count} models")
    highest = [found[name]["high"] for name in OWN_TASKS]
    told = ", ".join(
        f"{name.removeprefix('own_')} {fixed(row['rho'])} ({fixed(row['low'])} to "
        f"{fixed(row['high'])})"
        for name, row in found.items()
    )
    return grade(
        max(found[name]["rho"] for name in OWN_TASKS) <= STRONG and max(highest) < SOME,
        found["mean"]["rho"] <= SOME and found["mean"]["high"] < 0,
        f"Spearman's rho of perplexity and accuracy over {count} models (95 %): {told}.",
    )


CLAIMS = (
    Claim(
        id="butterfly-surrogate",
        place="Butterfly Effect, slides, Section 3",
        sentence="Models with different levels of perplexity differ in downstream tasks, so that "
        "perplexity is a surrogate for them.",
        rule=f"Spearman's rho of perplexity and accuracy is at most {STRONG:g} in each shipped "
        f"task, and its 95 % interval below {SOME:g}. Partly: rho with the mean accuracy is at "
        f"most {SOME:g}, and its interval below 0.",
        decide=surrogate,
        on_collapse=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS))
