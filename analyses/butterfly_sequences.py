"""Sequences of hard and of normal facts by every editor ("The Butterfly Effect", Sections 4 and 5).

The slides' claims: on hard facts nearly every editor destroys the model; FT and MEND do so on
normal facts as well; ROME and MEMIT do so on hard facts alone.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.progress import Progress

from firsttok.data import Fact
from firsttok.data.paper import SLIDES
from firsttok.editing import Editor, Method, find_editors
from firsttok.errors import BadInputError
from firsttok.evaluation import COLLAPSE_THRESHOLD, OWN_TASKS
from firsttok.measuring import slots_in
from firsttok.metrics import Metric, TasksMetric
from firsttok.paper.cases import choose_cases
from firsttok.paper.claims import Claim, GapError, Result, Verdict, fixed, grade, require
from firsttok.paper.experiment import ScriptOptions, run, usable_methods
from firsttok.paper.figures import figure, perplexity_axis
from firsttok.paper.tables import Found, matching, printed
from firsttok.sequences import EditSequence, SequencePlan, run_sequences
from firsttok.storage import content_hash

NAMES = ("rome", "c-rome", "fc-rome", "memit", "alphaedit", "ft", "mend")
METHODS: tuple[Method | Editor, ...] = find_editors(NAMES)
OF_THE_SLIDES = ("ROME", "MEMIT", "FT", "MEND")
KINDS = ("hard", "normal")
COLOURS = dict(
    zip(
        (method.label for method in METHODS),
        ("#c0392b", "#2c6fbb", "#8e44ad", "#e08214", "#009e73", "#7f7f7f", "#000000"),
        strict=True,
    )
)
LATE = tuple(f"task_{name}" for name in OWN_TASKS)
STEP = ("case_id", "subject", "step", "perplexity", "drift_norm", "status", "efficacy")
ITEMS = {"quick": 20, "full": 100}
"""Items of each shipped task at the end."""
NEARLY_ALL, ALIKE = 3, 10.0
"""Editors of the slides' four that are nearly all; factor within which two perplexities are."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs",
        type=int,
        help="facts of either kind (default: half the cases of the profile)",
    )
    parser.add_argument("--without-tasks", action="store_true", help="leave out downstream tasks")


def facts_of(options: ScriptOptions) -> dict[str, tuple[Fact, ...]]:
    """As many hard facts as normal ones, each in the order of their numbers."""
    selection = choose_cases(options.halved())
    most = options.args.pairs or len(selection.normal)
    count = min(most, len(selection.collapse), len(selection.normal))
    if not count:
        raise BadInputError("there is no hard fact, or no normal one; give a list by --cases")

    def ordered(facts: Sequence[Fact]) -> tuple[Fact, ...]:
        return tuple(sorted(facts[:count], key=lambda fact: fact.case_id))

    return {"hard": ordered(selection.collapse), "normal": ordered(selection.normal)}


def measure(options: ScriptOptions, progress: Progress) -> Found:
    facts = facts_of(options)
    count = len(facts["hard"])
    tasks: tuple[Metric, ...] = ()
    if not options.args.without_tasks and find_spec("lm_eval"):
        tasks = (TasksMetric(limit=ITEMS[options.args.profile]),)
    plan = SequencePlan(
        metrics=("perplexity", "accuracy"),
        retained=("accuracy",),
        checkpoint=tasks,
        every=count,
        seed=options.seed,
    )
    settings = options.study.provenance()
    del settings["versions"]
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    methods, missing = usable_methods(options.study, METHODS)
    sequences = {
        (kind, method.label): EditSequence(
            name=f"{kind}-{method.name}", facts=facts[kind], editor=method
        )
        for kind, method in product(KINDS, methods)
    }
    entries = [
        [each.name, [f.content_hash for f in each.facts], slots_in(options.study, each.editor)]
        for each in sequences.values()
    ]
    key = content_hash([settings, entries, plan.described()])
    runs = run_sequences(
        options.out / ".work" / "sequences" / key[:24],
        options.study,
        list(sequences.values()),
        plan=plan,
        progress=progress,
    )
    for (kind, label), sequence in sequences.items():
        found = runs[sequence.name]
        about = {"method": label, "cases": kind}
        own: list[dict[str, Any]] = [
            {"part": "step", **about} | {column: row.get(column) for column in (*STEP, *LATE)}
            for row in found.steps
        ]
        kept = [row["efficacy"] for row in found.retained if row["efficacy"] is not None]
        written = [row for row in own if row["perplexity"] is not None]
        reached = [_reached(row["perplexity"]) for row in written]
        end = written[-1] if written else {}
        tried = own[-1]
        rows += own
        lines.append(
            [
                f"{label}, {kind}",
                len(written),
                end.get("perplexity"),
                max(reached, default=None),
                100 * sum(kept) / len(kept) if kept else None,
                *(tried.get(column) for column in LATE),
            ]
        )
    return Found(
        title=f'"The Butterfly Effect", Sections 4 and 5: {count} hard and {count} normal facts in '
        "sequence",
        columns=[
            *("", "written", "perplexity at the end", "highest perplexity"),
            "efficacy retained, percent",
            *(name.removeprefix("own_") for name in OWN_TASKS),
        ],
        lines=[*lines, *printed_lines()],
        rows=rows,
        provenance={
            "original_perplexity": options.study.original_perplexity.mean,
            "facts": {kind: [fact.case_id for fact in own] for kind, own in facts.items()},
        },
        notes=[
            *missing,
            "The slides' lines are of Llama2-7b after 107 edits, and their tasks the published "
            "ones: PIQA, HellaSwag and LAMBADA stand in the columns of the shipped sets. FT edits "
            "the layer that ROME does, and there layer 21, without a bound.",
        ],
        draw=partial(plot, rows, options.study.original_perplexity.mean),
    )


def printed_lines() -> list[list[object]]:
    """The slides' own lines."""
    (model,), cells = printed("Sequential editing", paper=SLIDES)
    names = dict.fromkeys(row.rpartition("/")[0] for row, _ in cells)
    tasks = ("PIQA", "Hellaswag", "LAMBADA")
    return [
        [
            f"slides, {model}, {name}",
            *(None, cells.get((f"{name}/perplexity", model)), None, None),
            *(cells.get((f"{name}/{task}", model)) for task in tasks),
            None,
        ]
        for name in names
    ]


def plot(rows: Sequence[Mapping[str, Any]], original: float) -> Figure:
    drawn, axes = figure(len(KINDS), height=3.8)
    axes[1].sharey(axes[0])
    for axis, kind in zip(axes, KINDS, strict=True):
        for label, colour in COLOURS.items():
            own = matching(rows, method=label, cases=kind)
            points = [(row["step"], row["perplexity"]) for row in own if row["perplexity"]]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=label)
        axis.axhline(original, color="black", linewidth=1, linestyle="--")
        perplexity_axis(axis, "perplexity")
        axis.set_title(f"{kind} facts")
        axis.set_xlabel("edits")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=7)
    return drawn


def highest(result: Result) -> dict[tuple[str, str], float]:
    """The highest perplexity of each sequence of the slides' editors.

    One that is no number counts as infinite; what fails after it was attempted all the same.
    """
    found: dict[tuple[str, str], float] = {}
    for label, kind in product(OF_THE_SLIDES, KINDS):
        rows = result.chosen(part="step", method=label, cases=kind)
        require(len(rows), f"a sequence of {label} has {len(rows)} steps")
        known = [_reached(row["perplexity"]) for row in rows if row["perplexity"] is not None]
        if not known:
            raise GapError(f"No edit of {label} was measured on {kind} facts.")
        found[label, kind] = max(known)
    return found


def _reached(perplexity: float) -> float:
    return math.inf if math.isnan(perplexity) else perplexity


def _told(found: Mapping[tuple[str, str], float]) -> str:
    return "Highest perplexity along the sequence, hard and normal: " + ", ".join(
        f"{label} {fixed(found[label, 'hard'])} and {fixed(found[label, 'normal'])}"
        for label in OF_THE_SLIDES
    )


def collapse_on_hard(result: Result) -> Verdict:
    found = highest(result)
    count = sum(found[label, "hard"] > COLLAPSE_THRESHOLD for label in OF_THE_SLIDES)
    return grade(count >= NEARLY_ALL, count > 1, f"{_told(found)}.")


def alike(result: Result) -> Verdict:
    found = highest(result)
    good: list[bool] = []
    for label in ("FT", "MEND"):
        one, other = (found[label, kind] for kind in KINDS)
        same = (one > COLLAPSE_THRESHOLD) == (other > COLLAPSE_THRESHOLD)
        good.append(same and max(one, other) <= ALIKE * min(one, other))
    return grade(all(good), any(good), f"{_told(found)}.")


def only_on_hard(result: Result) -> Verdict:
    found = highest(result)
    good = [
        found[label, "hard"] > COLLAPSE_THRESHOLD >= found[label, "normal"]
        for label in ("ROME", "MEMIT")
    ]
    return grade(all(good), any(good), f"{_told(found)}.")


CLAIMS = (
    Claim(
        id="butterfly-hard",
        place="Butterfly Effect, slides, Section 4",
        sentence="Nearly all editing methods cause a collapse in a sequence of hard facts.",
        rule=f"The perplexity crosses {COLLAPSE_THRESHOLD:g} for at least {NEARLY_ALL} of "
        f"{', '.join(OF_THE_SLIDES)}. Partly: for two.",
        decide=collapse_on_hard,
        on_collapse=True,
    ),
    Claim(
        id="butterfly-alike",
        place="Butterfly Effect, slides, Section 4",
        sentence="FT and MEND behave alike on hard and on normal facts.",
        rule="For both, the highest perplexities of the two sequences are on one side of "
        f"{COLLAPSE_THRESHOLD:g}, and at most a factor of {ALIKE:g} apart. Partly: for one.",
        decide=alike,
        on_collapse=True,
    ),
    Claim(
        id="butterfly-only-hard",
        place="Butterfly Effect, slides, Section 4",
        sentence="ROME and MEMIT collapse on hard facts only.",
        rule=f"For both, the sequence of hard facts crosses {COLLAPSE_THRESHOLD:g} and that of "
        "normal ones does not. Partly: for one.",
        decide=only_on_hard,
        on_collapse=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(
        run(
            __file__,
            __doc__,
            measure,
            claims=CLAIMS,
            add_options=add_options,
            methods=find_editors(NAMES[:-1]),
        )
    )
