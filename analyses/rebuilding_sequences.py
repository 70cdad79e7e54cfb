"""Table 2, Figures 3, 4 and 6 to 9 of "Rebuilding ROME": edit after edit, and what is left of it.

The paper's claim: in a sequence ROME destroys the model at one disabling edit, and r-ROME (C-ROME)
and p-ROME do not. Beside its scores, which are taken right after each edit, stand those of all
earlier facts at every checkpoint, perplexity, the state of the edited weight, and tasks.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.data import Fact
from firsttok.data.paper import REBUILDING
from firsttok.editing import C_ROME, FC_ROME, P_ROME, ROME, Method
from firsttok.evaluation import COLLAPSE_THRESHOLD, OWN_TASKS
from firsttok.metrics import Metric, TasksMetric
from firsttok.paper.cases import choose_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, fixed, grade, require
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import figure, perplexity_axis
from firsttok.paper.tables import SCORES, Found, matching, printed, score_cells
from firsttok.rows import FAILED
from firsttok.sequences import (
    EditSequence,
    Guard,
    SequencePlan,
    SequenceRun,
    order_facts,
    run_sequences,
)
from firsttok.sieve import reason_against
from firsttok.storage import content_hash

METHODS = (ROME, C_ROME, P_ROME, FC_ROME)
COLOURS = dict(
    zip((each.label for each in METHODS), ("#c0392b", "#2c6fbb", "#009e73", "#8e44ad"), strict=True)
)
ORDERS = ("seed:0", "seed:1", "seed:2")
STEP = (
    *("case_id", "subject", "step", "first_token", "denominator", "delta_norm", "mean_delta"),
    *("drift_norm", "mean_drift", "value_norm", "perplexity", "condition_number", "weight_norm"),
    *("singular_1", "guard", "status"),
)
LATE = tuple(f"task_{name}" for name in OWN_TASKS)
ITEMS = {"quick": 20, "full": 40}
"""Items of each shipped task at a checkpoint."""
JUMP, SMALL, LOST = 3.0, 0.1, 10.0
"""Factor of |delta| of a disabling edit over the median before it; share of ROME's largest |delta|
that is orders of magnitude smaller; points of a score that are a loss."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all",
        action="store_true",
        help="all facts in three orders, which takes hours (default: half the cases in one)",
    )
    parser.add_argument("--without-tasks", action="store_true", help="leave out downstream tasks")


def facts_of(options: ScriptOptions) -> tuple[Fact, ...]:
    """The facts of a sequence, in the order of their numbers."""
    study = options.study
    if options.args.all:
        templates = study.contexts.templates
        facts = [
            f for f in options.facts if reason_against(study.model, f, templates=templates) is None
        ]
    else:
        selection = choose_cases(options.halved())
        facts = [*selection.collapse, *selection.normal]
    return tuple(sorted(facts, key=lambda fact: fact.case_id))


def plan_of(options: ScriptOptions, count: int, *, guard: Guard) -> SequencePlan:
    tasks: tuple[Metric, ...] = ()
    if guard is Guard.NONE and not options.args.without_tasks and find_spec("lm_eval"):
        tasks = (TasksMetric(limit=ITEMS[options.args.profile]),)
    return SequencePlan(
        metrics=("perplexity", "scores"),
        retained=("scores",),
        checkpoint=tasks,
        every=max(1, count // 4),
        guard=guard,
        seed=options.seed,
    )


def sequences_of(
    options: ScriptOptions, facts: Sequence[Fact], methods: Sequence[Method]
) -> dict[str, tuple[str, EditSequence]]:
    """Every method in every order, by its name, with the order."""
    found: dict[str, tuple[str, EditSequence]] = {}
    for order, method in product(ORDERS if options.args.all else ORDERS[:1], methods):
        name = f"{method.name}-{order.replace(':', '')}"
        ordered = order_facts(options.study, facts, order)
        found[name] = order, EditSequence(name=name, facts=ordered, editor=method)
    return found


def measure(options: ScriptOptions, progress: Progress) -> Found:
    facts = facts_of(options)
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    notes: list[str] = []
    # A model that counts as destroyed already would have every edit taken back.
    sound = options.study.original_perplexity.mean <= COLLAPSE_THRESHOLD
    for guard in Guard if sound else (Guard.NONE, Guard.SCREEN):
        # A guard is there for the sequence that dies without.
        methods = METHODS if guard is Guard.NONE else (ROME,)
        asked = sequences_of(options, facts, methods)
        plan = plan_of(options, len(facts), guard=guard)
        settings = options.study.provenance()
        del settings["versions"]
        key = content_hash([settings, [fact.content_hash for fact in facts], plan.described()])
        folder = options.out / ".work" / "sequences" / key[:24]
        runs = run_sequences(
            folder,
            options.study,
            [each for _, each in asked.values()],
            plan=plan,
            progress=progress,
        )
        for name, found in runs.items():
            order, sequence = asked[name]
            about = {"method": sequence.editor.label, "order": order, "guard_of": guard.value}
            rows += _rows(found, about)
            lines.append(_line(found, about))
            if found.verdict is not None:
                notes.append(f"{_name(about)}: {found.verdict}")
    return Found(
        title=f'"Rebuilding ROME", Table 2: {len(facts)} facts in sequence, scores in percent',
        columns=[
            *("", "written", "disabling edit", "above 1000 from", "perplexity at the end"),
            *(f"{name} right behind" for name in (*SCORES, "Score")),
            *("Score retained", "drift", "condition number", "tasks"),
        ],
        lines=[*lines, *printed_lines()],
        rows=rows,
        provenance={"facts": [fact.case_id for fact in facts]},
        notes=[
            "Scores right behind each edit are the paper's; those retained are of all facts that "
            "were written, on the last model. tasks: mean accuracy in the shipped sets.",
            *notes,
        ],
        draw=partial(plot, rows, options.study.original_perplexity.mean),
    )


def _name(about: Mapping[str, Any]) -> str:
    guard = "" if about["guard_of"] == "none" else f", guard {about['guard_of']}"
    return f"{about['method']}, {about['order']}{guard}"


def _rows(found: SequenceRun, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Steps, and at each checkpoint the mean scores of all facts that were written until then."""
    rows: list[dict[str, Any]] = []
    for row in found.steps:
        rows.append(
            {"part": "step", **about}
            | {name: row.get(name) for name in STEP}
            | {name.lower(): row.get(name.lower()) for name in SCORES}
            | {name: row.get(name) for name in LATE}
        )
    for step in found.checkpoints:
        kept = [dict(row) for row in found.retained_at(step)]
        cells = dict(zip((*SCORES, "Score"), score_cells(kept), strict=True))
        rows.append(
            {"part": "retained", **about, "step": step, "facts": len(kept)}
            | {name.lower(): value for name, value in cells.items()}
        )
    return rows


def _line(found: SequenceRun, about: Mapping[str, Any]) -> list[object]:
    crossing, disabling = found.first_crossing, found.disabling_edit
    written = [dict(row) for row in found.written]
    rows = _rows(found, about)
    kept = matching(rows, part="retained")
    end = written[-1] if written else {}
    last = found.steps[-1]
    tasks = [last.get(name) for name in LATE]
    known = [value for value in tasks if value is not None]
    return [
        _name(about),
        f"{len(written)} of {len(found.steps)}",
        None if disabling is None else disabling.step,
        None if crossing is None else crossing.step,
        end.get("perplexity"),
        *score_cells([{name.lower(): row.get(name.lower()) for name in SCORES} for row in written]),
        kept[-1]["score"] if kept else None,
        end.get("drift_norm"),
        last.get("condition_number"),
        sum(known) / len(known) if known else None,
    ]


def printed_lines() -> list[list[object]]:
    """The paper's own lines, which have scores alone."""
    (model,), cells = printed("Table 2", paper=REBUILDING)
    names = dict.fromkeys(row.partition("/")[0] for row, _ in cells)
    return [
        [
            *(f"paper, {model}, 5000 facts, {name}", None, None, None, None),
            *(cells.get((f"{name}/{column}", model)) for column in (*SCORES, "Score")),
            *(None, None, None, None),
        ]
        for name in names
    ]


def plot(rows: Sequence[Mapping[str, Any]], original: float) -> Figure:
    drawn, axes = figure(5, height=3.6)
    steps = [row for row in rows if row["part"] == "step" and row["guard_of"] == "none"]
    kept = [row for row in rows if row["part"] == "retained" and row["guard_of"] == "none"]
    perplexity, size, scores, left, tasks = axes
    for label, order in dict.fromkeys((row["method"], row["order"]) for row in steps):
        own = matching(steps, method=label, order=order)
        colour = COLOURS[label]
        style = {"color": colour, "linewidth": 1.2, "alpha": 0.8}
        named = {"label": label} if order == steps[0]["order"] else {}
        _line_of(perplexity, own, "perplexity", **style, **named)
        _line_of(size, own, "mean_delta", **style, **named)
        _line_of(size, own, "mean_drift", **style, linestyle=":")
        _running(scores, own, **style, **named)
        _line_of(left, matching(kept, method=label, order=order), "score", **style, marker="o")
        means = [
            {"step": row["step"], "tasks": sum(row[name] for name in LATE) / len(LATE)}
            for row in own
            if all(row[name] is not None for name in LATE)
        ]
        _line_of(tasks, means, "tasks", **style, marker="o")
    perplexity.axhline(original, color="black", linewidth=1, linestyle="--")
    perplexity_axis(perplexity, "perplexity")
    perplexity.legend(fontsize=8)
    size.set_yscale("log")
    titles = ("perplexity", "|Δ| of the update; dotted: drift", "ES so far, right behind, %")
    for axis, title in zip(
        axes, (*titles, "Score retained, %", "mean accuracy in tasks"), strict=True
    ):
        axis.set_title(title)
        axis.set_xlabel("edits")
    return drawn


def _line_of(axis: Axes, rows: Sequence[Mapping[str, Any]], column: str, **style: Any) -> None:
    known = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
    if known:
        axis.plot(*zip(*known, strict=True), **style)


def _running(axis: Axes, rows: Sequence[Mapping[str, Any]], **style: Any) -> None:
    """Mean of ES over the edits so far."""
    total, points = 0.0, list[tuple[int, float]]()
    for row in rows:
        if row["es"] is not None:
            total += 100 * row["es"]
            points.append((row["step"], total / (len(points) + 1)))
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def steps_of(result: Result, method: str, guard: str = "none") -> list[list[Mapping[str, Any]]]:
    """The written steps of each of a method's sequences, in order."""
    rows = result.chosen(part="step", method=method, guard_of=guard)
    found = [
        [row for row in rows if row["order"] == order and row["perplexity"] is not None]
        for order in dict.fromkeys(row["order"] for row in rows)
    ]
    fewest = min(map(len, found), default=0)
    require(fewest, f"a sequence of {method} has {fewest} measured steps")
    return found


def rome_dies(result: Result) -> Verdict:
    original = result.number("original_perplexity")
    sudden = 0
    told: list[str] = []
    runs = steps_of(result, "ROME")
    for rows in runs:
        before, sizes = original, list[float]()
        for row in rows:
            if row["perplexity"] > COLLAPSE_THRESHOLD and before <= COLLAPSE_THRESHOLD:
                usual = median(sizes) if sizes else row["delta_norm"]
                sudden += row["delta_norm"] >= JUMP * usual
                told.append(
                    f"step {row['step']} ({row['subject']}) from {fixed(before)} to "
                    f"{fixed(row['perplexity'])} with {row['delta_norm'] / usual:.1f} times the "
                    "median |delta| before it"
                )
                break
            before = row["perplexity"]
            sizes.append(row["delta_norm"])
    return grade(
        sudden == len(runs),
        len(told) >= len(runs) / 2,
        f"{len(told)} of {len(runs)} sequences cross {COLLAPSE_THRESHOLD:g}"
        + (f": {'; '.join(told)}." if told else "."),
    )


def survives(result: Result, methods: Sequence[str]) -> Verdict:
    rome = max(row["delta_norm"] for rows in steps_of(result, "ROME") for row in rows)
    runs = {name: [row for rows in steps_of(result, name) for row in rows] for name in methods}
    highest = {name: max(row["perplexity"] for row in rows) for name, rows in runs.items()}
    sizes = {name: max(row["delta_norm"] for row in rows) / rome for name, rows in runs.items()}
    told = ", ".join(
        f"{name}: highest perplexity {fixed(highest[name])}, largest |delta| {sizes[name]:.1%} of "
        "ROME's"
        for name in methods
    )
    sound = max(highest.values()) <= COLLAPSE_THRESHOLD
    return grade(sound and max(sizes.values()) <= SMALL, sound, f"{told}.")


def scores_in_order(result: Result) -> Verdict:
    found: dict[str, float] = {}
    for name in ("ROME", "p-ROME", "C-ROME"):
        rows = [row for rows in steps_of(result, name) for row in rows]
        *_, score = score_cells(rows)
        if score is None:
            raise GapError("The facts have no paraphrases or no neighbours with answers.")
        found[name] = score
    rome, prompt, mean = found.values()
    return grade(
        mean > prompt > rome,
        min(mean, prompt) > rome,
        f"Score right behind each edit: {fixed(mean)} for r-ROME, {fixed(prompt)} for p-ROME, "
        f"{fixed(rome)} for ROME.",
    )


def not_retained(result: Result) -> Verdict:
    lost: dict[str, float] = {}
    for method in COLOURS:
        for rows in steps_of(result, method):
            order = rows[0]["order"]
            kept = result.chosen(part="retained", method=method, order=order, guard_of="none")
            right = [row["es"] for row in rows if row["es"] is not None]
            if not kept or kept[-1]["es"] is None or not right:
                raise GapError("ES was not measured.")
            gap = 100 * sum(right) / len(right) - kept[-1]["es"]
            lost[method] = max(lost.get(method, gap), gap)
    return grade(
        min(lost.values()) >= LOST,
        max(lost.values()) >= LOST,
        "ES right behind each edit less ES retained at the end, in points: "
        + ", ".join(f"{fixed(gap)} for {name}" for name, gap in lost.items())
        + ".",
    )


def guards_save(result: Result) -> Verdict:
    told: list[str] = []
    good: list[bool] = []
    for guard in ("screen", "rollback"):
        for rows in steps_of(result, "ROME", guard):
            written = [row for row in rows if row["guard"] is None]
            order = rows[0]["order"]
            every = result.chosen(part="step", method="ROME", order=order, guard_of=guard)
            left_out = sum(row["guard"] is not None for row in every)
            failed = sum(row["status"] == FAILED for row in every)
            highest = max((row["perplexity"] for row in written), default=float("nan"))
            good.append(highest <= COLLAPSE_THRESHOLD)
            told.append(
                f"{guard} ({order}) leaves {left_out} of {len(every)} facts out"
                + (f", {failed} fail" if failed else "")
                + f", and the perplexity stays at or below {fixed(highest)}"
            )
    return grade(all(good), any(good), f"{'; '.join(told)}.")


CLAIMS = (
    Claim(
        id="rebuilding-sequence-rome",
        place="Rebuilding ROME, Figures 3 and 7",
        sentence="In a sequence of ROME's edits one disabling edit destroys the model at once.",
        rule=f"In every sequence the perplexity first crosses {COLLAPSE_THRESHOLD:g} at an edit "
        f"whose |delta| is at least {JUMP:g} times the median of those before. Partly: at least "
        "half of the sequences cross it.",
        decide=rome_dies,
    ),
    Claim(
        id="rebuilding-sequence-r-rome",
        place="Rebuilding ROME, Figures 4 and 8",
        sentence="With r-ROME |delta| is orders of magnitude smaller, and the model does not "
        "collapse.",
        rule=f"No sequence crosses {COLLAPSE_THRESHOLD:g}, and the largest |delta| is at most "
        f"{SMALL:.0%} of ROME's largest. Partly: none crosses.",
        decide=partial(survives, methods=("C-ROME",)),
    ),
    Claim(
        id="rebuilding-sequence-p-rome",
        place="Rebuilding ROME, Figures 6 and 9",
        sentence="The same holds for p-ROME.",
        rule="As for r-ROME.",
        decide=partial(survives, methods=("p-ROME",)),
    ),
    Claim(
        id="rebuilding-table2",
        place="Rebuilding ROME, Table 2",
        sentence="Over a sequence r-ROME has the highest Score, then p-ROME, then ROME.",
        rule="Scores right behind each edit, over all sequences, in that order. Partly: both are "
        "above ROME's.",
        decide=scores_in_order,
    ),
    Claim(
        id="own-retained",
        place="beside Table 2 of Rebuilding ROME",
        sentence="Scores right behind each edit hide what later edits take away again.",
        rule=f"For each of ROME, C-ROME, p-ROME and FC-ROME the mean ES right behind the edits is "
        f"at least {LOST:g} points above the ES of all written facts at the end, in at least one "
        "order. Partly: for one of the methods.",
        decide=not_retained,
        own=True,
    ),
    Claim(
        id="own-guards",
        place="beside Figure 3 of Rebuilding ROME",
        sentence="A guard that reads denominators, or takes a step back, lets a sequence of ROME's "
        "edits go on.",
        rule=f"With either guard no edit that stays in the model lifts the perplexity above "
        f"{COLLAPSE_THRESHOLD:g}. Partly: with one. The rollback cannot fail by its own rule, so "
        "it is the screen that is tested.",
        decide=guards_save,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, add_options=add_options))
