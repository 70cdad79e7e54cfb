"""Sequences run side by side: each step of all of them together, and what is measured then."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.editing import Delta, Edit, Turn, edit_in_step, load_edit
from firsttok.editing.record import edit_record
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.escapes import finite
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import (
    columns_of,
    edit_columns,
    metric_columns,
    reason_against_measuring,
    slots_in,
)
from firsttok.metrics import Metric
from firsttok.models import Model
from firsttok.provenance import versions
from firsttok.rows import first_columns
from firsttok.screening import screen
from firsttok.sequences.lane import Lane
from firsttok.sequences.plan import OWN_COLUMNS, SINGULAR, EditSequence, Guard, SequencePlan
from firsttok.sequences.record import (
    ROLLED_BACK,
    SCREENED,
    SequenceRun,
    edit_path,
    is_sound,
    is_written,
)
from firsttok.storage import content_hash, locked, make_folder, read_record, write_record
from firsttok.study import Study

__all__ = ["run_sequences"]

_PERIOD = 1.0
"""Seconds after which new rows are written."""
_FORMAT = 1
_RECORD = "sequence.json"


@taken
def run_sequences(
    folder: str | Path,
    study: Study,
    sequences: Sequence[EditSequence],
    *,
    plan: SequencePlan | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> dict[str, SequenceRun]:
    """Run sequences of edits side by side, or resume them where they stopped.

    Every step is computed for all sequences together, those among them whose edit is there already
    included, so that the numbers of a resumed run are those of an undisturbed one. A step that
    fails is a row with its reason, and its sequence goes on without that edit. Where memory or a
    disk is used up the run ends, and no step has failed.

    Args:
        folder: Folder of the run; each sequence has one in it, with ``edits/0001.safetensors`` and
            so on, and the rows as Parquet files in ``steps`` and ``retained``.
        study: The study; its model is that before the first edit, and what scores compare with.
        sequences: The sequences.
        plan: What is measured, and the guard; None for the usual.
        retry_failed: Do steps again that failed in an earlier run. Where one succeeds now, the
            edits after it are computed again, on the weights as they have become with it.
        progress: Where to show progress.

    Returns:
        What became of each, by its name.

    Raises:
        BadInputError: If two sequences have one name, or the run was begun with something else, or
            by a version that kept its runs otherwise.
        CacheError: If a file cannot be written.
    """
    folder, plan = Path(folder), plan or SequencePlan()
    names = [each.name for each in sequences]
    for name in names:
        if names.count(name) > 1:
            raise BadInputError(f"two sequences are called {name!r}; give each its own name")
    if not sequences:
        raise BadInputError("there is no sequence; give at least one")
    if study.model.disturbance is not None:
        raise BadInputError(
            f"a run keeps its edits, and none of them would show that {study.model.disturbance}; "
            "take that away"
        )
    original = study.original_perplexity.mean
    if plan.guard is Guard.ROLLBACK and not is_sound(original):
        raise BadInputError(
            f"the unedited model has a perplexity of {original:.0f} on these sentences, "
            f"above {COLLAPSE_THRESHOLD:g} itself, so that the guard rollback would "
            "take every edit back; give other sentences, or --text-bos with"
        )
    progress = progress or Progress(disable=True)
    with ExitStack() as locks:
        ordered = sorted(sequences, key=lambda each: each.name)
        entries = {each.name: _entry(study, each, names, plan) for each in ordered}
        for name, entry in entries.items():
            _refuse_another(folder / name, entry)
        for name, entry in entries.items():
            _join(folder / name, entry, locks)
        lanes = [Lane(folder, study, each, plan, retry_failed=retry_failed) for each in sequences]
        longest = max(len(each.facts) for each in sequences)
        task = progress.add_task("sequences", total=sum(len(each.facts) for each in sequences))
        hard = _hard(study, sequences, progress) if plan.guard is Guard.SCREEN else frozenset[str]()
        try:
            for step in range(1, longest + 1):
                running = [lane for lane in lanes if step <= len(lane.sequence.facts)]
                _step(study, running, step, plan, hard)
                progress.advance(task, len(running))
                for lane in running:
                    lane.write(at_most_every=_PERIOD)
        finally:
            for lane in lanes:
                lane.write()
    return {lane.sequence.name: lane.result() for lane in lanes}


def _hard(study: Study, sequences: Sequence[EditSequence], progress: Progress) -> frozenset[str]:
    """Hashes of facts that a collapse is predicted for; keys do not change in a sequence."""
    facts = {fact.content_hash: fact for each in sequences for fact in each.facts}
    rows = screen(study, facts.values(), progress=progress, total=len(facts))
    return frozenset(key for key, row in zip(facts, rows, strict=True) if row.is_hard(None))


def _settings(study: Study) -> dict[str, Any]:
    """What decides the numbers of all sequences of a study."""
    provenance, moment = study.provenance(), study.second_moment
    del provenance["versions"]
    # Its condition number is computed in every run, and its last digits differ by machine.
    provenance["second_moment"] = {"corpus": moment.corpus, "hash": moment.content_hash}
    return provenance


def _entry(
    study: Study,
    sequence: EditSequence,
    together: Sequence[str],
    plan: SequencePlan,
) -> dict[str, Any]:
    """What decides the numbers of a sequence, as JSON."""
    entry: dict[str, Any] = {
        "format": _FORMAT,
        **_settings(study),
        "editor": {"name": sequence.editor.name, **slots_in(study, sequence.editor)},
        "facts": content_hash([fact.content_hash for fact in sequence.facts]),
        "plan": plan.described(),
        "side_by_side": list(together),
    }
    return json.loads(json.dumps(finite(entry)))


def _refuse_another(folder: Path, entry: Mapping[str, Any]) -> None:
    """Refuse a folder that was begun with something else."""
    path = folder / _RECORD
    if not path.exists():
        return
    known = read_record(path, "a sequence's record")
    if known.get("format") != _FORMAT:
        raise BadInputError(
            f"the sequence in {folder} was written by another version of firsttok; use that "
            "version, or another folder"
        )
    for name in entry:
        if known.get(name) != entry[name]:
            raise BadInputError(
                f"the sequence in {folder} was begun with something else ({name} differs); use "
                "the same settings (on Ray also --actors), or another folder"
            )


def _join(folder: Path, entry: Mapping[str, Any], locks: ExitStack) -> None:
    """Note what a sequence is made of, once no folder of the run is refused."""
    path = folder / _RECORD
    make_folder(folder)
    locks.enter_context(locked(path))
    _refuse_another(folder, entry)
    if not path.exists():
        write_record(path, {**entry, "versions": versions()})


def _step(
    study: Study, lanes: Sequence[Lane], step: int, plan: SequencePlan, hard: frozenset[str]
) -> None:
    """Do one step of all sequences, unless it is done."""
    for lane in lanes:
        lane.enter(step)
    metrics = (*plan.behind_each, *plan.at_checkpoints)
    reasons = [reason_against_measuring(study, lane.fact(step), metrics) for lane in lanes]
    turning = [
        lane
        for lane, reason in zip(lanes, reasons, strict=True)
        if reason is None and lane.fact(step).content_hash not in hard
    ]
    saved = [lane.saved(step) for lane in turning]
    if all(lane.is_complete(step) for lane in lanes) and all(
        lane.stands(step, edit) for lane, edit in zip(turning, saved, strict=True)
    ):
        for lane, edit in zip(turning, saved, strict=True):
            if edit is not None:
                lane.take(step, edit)
        return
    for lane, reason in zip(lanes, reasons, strict=True):
        if reason is not None:
            lane.keep(lane.columns(step, reason))
        elif lane not in turning:
            lane.keep(lane.columns(step) | {"guard": SCREENED})
    # Together or not at all: how a batch is made up decides the last bits of what it holds.
    known = [edit for edit in saved if edit is not None]
    edits = known if len(known) == len(turning) else _edits(turning, step)
    made = _saved(study, turning, edits, saved, step)
    asked = [(lane, lane.fact(step), in_all) for lane, _, in_all in made]
    measured = {id(lane): row for lane, _, row in _by_fact(study, asked, plan.behind_each)}
    taken_by = columns_of((*plan.behind_each, *plan.of_the_model))
    taken_by |= dict.fromkeys(OWN_COLUMNS, "a step")
    for lane, edit, in_all in made:
        row = edit_columns(study, lane.fact(step), lane.editor, edit, taken_by=taken_by)
        row |= measured[id(lane)]
        drift = in_all.report
        row |= {
            "step": step,
            "drift_norm": drift["delta_norm"],
            "mean_drift": drift["mean_delta"],
        }
        if plan.guard is Guard.ROLLBACK and not (
            is_sound(row["perplexity"]) and row["perplexity"] < plan.jump * lane.perplexity
        ):
            row["guard"] = ROLLED_BACK
        if lane.is_checkpoint(step):
            row |= _health(lane.model.edited(edit) if is_written(row) else lane.model, edit)
        lane.keep(row)
        lane.take(step, edit)
    at_checkpoint = [lane for lane in lanes if lane.is_checkpoint(step)]
    _measure_models(study, at_checkpoint, step, plan)
    _look_back(study, at_checkpoint, step, plan)


def _measure_models(study: Study, lanes: Sequence[Lane], step: int, plan: SequencePlan) -> None:
    """Measure the edited models of all sequences that are at a checkpoint, in one go."""
    lanes = [lane for lane in lanes if lane.inside]
    if not lanes or not plan.of_the_model:
        return
    edits = [_in_all(study.model, lane.model) for lane in lanes]
    found = metric_columns(study, lanes[0].fact(step), edits, plan.of_the_model)
    for lane, columns in zip(lanes, found, strict=True):
        lane.keep({**lane.rows[step], **columns})


def _saved(
    study: Study,
    lanes: Sequence[Lane],
    edits: Sequence[Edit | str],
    before: Sequence[Edit | None],
    step: int,
) -> list[tuple[Lane, Edit, Edit]]:
    """Edits as their files hold them, each with all edits of its sequence so far in one.

    A sequence without an edit, or whose weights would not be finite, has a row with the reason.
    """
    made: list[tuple[Lane, Edit, Edit]] = []
    for lane, computed, old in zip(lanes, edits, before, strict=True):
        if isinstance(computed, str):
            lane.keep(lane.columns(step, computed))
            continue
        edit = computed
        if old is None or old.content_hash != edit.content_hash:
            path = edit_path(lane.folder, step)
            edit.save(path)
            # What failed after another edit may not fail after this one.
            lane.redo = True
            # What later steps are made on is what a resumed run will read.
            edit = load_edit(path)
        try:
            made.append((lane, edit, _in_all(study.model, lane.model.edited(edit))))
        except NonFiniteError as error:
            lane.keep(lane.columns(step, str(error)))
    return made


def _edits(lanes: Sequence[Lane], step: int) -> list[Edit | str]:
    """The next edit of each sequence, or why there is none."""
    turns = [Turn(model=lane.model, fact=lane.fact(step), editor=lane.editor) for lane in lanes]
    return [
        made if isinstance(made, Edit) else " ".join(str(made).split())
        for made in edit_in_step(turns)
    ]


def _in_all(model: Model, view: Model) -> Edit:
    """All edits of a view as one edit of the model: what its weights have more than the model's."""
    places = dict.fromkeys(
        place for edit in view.edits[len(model.edits) :] for place in edit.places
    )
    deltas = [
        # Of 16-bit weights the difference is wider than they are.
        Delta(
            place=place,
            left=view.site_at(place).matrix.to(model.wide_dtype)
            - model.site_at(place).matrix.to(model.wide_dtype),
        )
        for place in places
    ]
    return Edit(
        deltas=tuple(deltas),
        provenance=edit_record(
            model.record(),
            (),
            editor={"name": "sequence"},
            parameters={str(place): model.weights.name_of(place) for place in places},
        ),
    )


def _by_fact(
    study: Study, asked: Sequence[tuple[Lane, Fact, Edit]], metrics: Sequence[Metric]
) -> Iterator[tuple[Lane, Fact, dict[str, Any]]]:
    """Metrics of facts under edits; edits that are asked for the same fact share its passes."""
    groups: dict[str, list[tuple[Lane, Fact, Edit]]] = {}
    for each in asked:
        groups.setdefault(each[1].content_hash, []).append(each)
    for group in groups.values():
        rows = metric_columns(study, group[0][1], [edit for _, _, edit in group], metrics)
        for (lane, fact, _), row in zip(group, rows, strict=True):
            yield lane, fact, row


def _health(view: Model, edit: Edit) -> dict[str, float]:
    """The edited weight as it has become; of several, that of the last layer."""
    weight = view.site_at(max(edit.places)).matrix.double()
    values = torch.linalg.svdvals(weight)
    found = {"weight_norm": float(weight.norm())}
    found |= {f"singular_{n}": float(value) for n, value in enumerate(values[:SINGULAR], 1)}
    return found | {"condition_number": float(values[0] / values[-1])}


def _look_back(study: Study, lanes: Sequence[Lane], step: int, plan: SequencePlan) -> None:
    """Measure all facts that were written so far, in every sequence that is at a checkpoint."""
    asked: list[tuple[Lane, Fact, Edit]] = []
    for lane in lanes:
        lane.forget_retained(step)
        if lane.inside:
            in_all = _in_all(study.model, lane.model)
            asked += [(lane, fact, in_all) for fact in lane.facts]
    for lane, fact, row in _by_fact(study, asked, plan.at_checkpoints):
        label, name = study.model.label, lane.editor.name
        lane.keep_retained(first_columns(label, study.layer, fact, name) | {"step": step} | row)
    for lane in lanes:
        lane.write_retained(step)
