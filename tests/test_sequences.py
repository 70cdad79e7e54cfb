"""Sequences of edits: their state, their files, what is measured along the way, their guards."""

import json
import random
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from running import starter
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory, build, relative

from firsttok.cli import main
from firsttok.editing import (
    C_ROME,
    FC_ROME,
    P_ROME,
    ROME,
    Edit,
    Method,
    Turn,
    edit_in_step,
    load_edit,
    optimise_values,
)
from firsttok.errors import BadInputError, CacheError
from firsttok.evaluation import edit_accuracies, edit_counterfact_scores, perplexity
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import Model
from firsttok.rows import write_rows
from firsttok.screening import screen
from firsttok.second_moment import SecondMoment
from firsttok.sequences import (
    EditSequence,
    Guard,
    SequencePlan,
    SequenceRun,
    lockstep,
    order_facts,
    record,
    run_sequences,
)
from firsttok.sequences import lane as lane_module
from firsttok.sequences.lane import Lane
from firsttok.storage import read_record, write_record
from firsttok.study import Study

LAYER = 1
NUMBERED = tuple(replace(fact, case_id=number) for number, fact in enumerate(FACTS))
QUICK = Hyperparameters(steps=3, learning_rate=0.5)


def study_of(model: Model, **changes: Any) -> Study:
    settings: dict[str, Any] = {
        "model": model,
        "contexts": CONTEXTS,
        "second_moment": SecondMoment.identity(model.site(LAYER).d_mlp),
        "layer": LAYER,
        "hyperparameters": QUICK,
        "texts": SENTENCES,
    }
    return Study(**settings | changes)


def sequences_of(*methods: Method) -> list[EditSequence]:
    return [EditSequence(name=each.name, facts=NUMBERED, editor=each) for each in methods]


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a run left, by path, but locks; edits by what they hold.

    The order of the fields in the header of a safetensors file is drawn anew by every process.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            edit = load_edit(path)
            found[str(path.relative_to(folder))] = (edit.content_hash, edit.losses, edit.report)
        elif path.is_file() and path.suffix != ".lock":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def same_runs(one: Mapping[str, SequenceRun], other: Mapping[str, SequenceRun]) -> bool:
    return one.keys() == other.keys() and all(
        [dict(row) for row in one[name].steps] == [dict(row) for row in other[name].steps]
        and [dict(row) for row in one[name].retained] == [dict(row) for row in other[name].retained]
        for name in one
    )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A run that nothing disturbed, for tests that go on from it."""

    study: Study
    runs: Mapping[str, SequenceRun]
    folder: Path

    def copied(self, folder: Path) -> Path:
        """A copy that may be damaged."""
        return Path(shutil.copytree(self.folder, folder))


@pytest.fixture(scope="module")
def whole(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Five edits by ROME."""
    study, folder = study_of(tiny("llama")), tmp_path_factory.mktemp("whole")
    runs = run_sequences(folder, study, sequences_of(ROME))
    return Whole(study=study, runs=runs, folder=folder)


def test_every_edit_is_made_on_the_weights_as_they_have_become(whole: Whole) -> None:
    study, model, folder = whole.study, whole.study.model, whole.folder
    (run,) = whole.runs.values()
    view, edit = model, None
    for step, fact in enumerate(NUMBERED, 1):
        edit = load_edit(folder / "rome" / "edits" / f"{step:04d}.safetensors")
        (editor,) = study.editors([ROME])
        expected = editor.edit(view, [fact])
        assert relative(edit.right, expected.right) < 1e-4
        assert relative(edit.left, expected.left) < 1e-6
        view = view.edited(edit)
        row = run.steps[step - 1]
        change = view.site(LAYER).matrix - model.site(LAYER).matrix
        assert row.drift_norm == pytest.approx(float(change.norm()), rel=1e-5)
        assert row.mean_drift == pytest.approx(float(change.norm()) / change.numel(), rel=1e-5)
        assert row.delta_norm == pytest.approx(float(edit.right.norm()), rel=1e-5)
        assert row.perplexity == pytest.approx(perplexity(view, SENTENCES).mean, rel=1e-4)
    # Later edits have other values than the same edits made alone.
    alone = study.editors([ROME])[0].edit(model, [NUMBERED[-1]])
    assert edit is not None
    assert relative(edit.right, alone.right) > 1e-3
    assert relative(edit.left, alone.left) < 1e-6
    assert torch.equal(run.edited(model).site(LAYER).matrix, view.site(LAYER).matrix)
    assert torch.equal(
        run.edited(model, until=1).site(LAYER).matrix,
        model.edited(load_edit(folder / "rome/edits/0001.safetensors")).site(LAYER).matrix,
    )


def test_scores_are_right_behind_an_edit_and_retained_at_checkpoints(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    plan = SequencePlan(metrics=("scores", "accuracy"), retained=("scores", "accuracy"), every=3)
    (run,) = run_sequences(tmp_path, study_of(model), sequences_of(FC_ROME), plan=plan).values()
    count = len(NUMBERED)
    assert sorted({row.step for row in run.retained}) == sorted({*range(3, count + 1, 3), count})
    for row in run.retained:
        assert row.case_id < row.step
    for step in (2, count):
        view = run.edited(model, until=step)
        fact = NUMBERED[step - 1]
        expected = edit_counterfact_scores(view, fact, [])[0]
        for name in ("es", "ps", "ns", "em"):
            found, wanted = run.steps[step - 1].get(name), getattr(expected, name)
            assert found == (None if wanted is None else pytest.approx(wanted, abs=1e-4))
    view = run.edited(model)
    for row in run.retained:
        if row.step == count:
            expected = edit_counterfact_scores(view, NUMBERED[row.case_id], [])[0]
            assert row.get("em") == pytest.approx(expected.em, abs=1e-4)
    means = [row.em for row in run.retained if row.step == count]
    assert run.mean("em", step=count) == pytest.approx(sum(means) / len(means))
    assert run.mean("em") == pytest.approx(sum(row.em for row in run.steps) / count)
    assert run.mean("entropy") is None


def test_a_model_is_measured_at_checkpoints_alone(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("gpt2")
    study = study_of(model)
    plan = SequencePlan(
        metrics=("scores",), retained=("scores",), checkpoint=("perplexity",), every=2
    )
    runs = run_sequences(tmp_path, study, sequences_of(ROME, C_ROME), plan=plan)
    for run in runs.values():
        for row in run.steps:
            found = row.get("perplexity")
            if row.step % 2 == 0 or row.step == len(NUMBERED):
                whole = perplexity(run.edited(model, until=row.step), study.texts).mean
                assert found == pytest.approx(whole, rel=1e-4)
            else:
                assert found is None


def test_locality_is_against_the_model_before_the_first_edit(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    model = tiny("llama")
    study = study_of(model)
    plan = SequencePlan(metrics=("accuracy",), retained=("accuracy",), every=100)
    (run,) = run_sequences(tmp_path, study, sequences_of(ROME), plan=plan).values()
    view = run.edited(model)
    change = view.site(LAYER).matrix - model.site(LAYER).matrix
    whole = Edit.of(model, LAYER, change)
    for row in run.retained:
        expected = edit_accuracies(model, NUMBERED[row.case_id], [whole])[0]
        assert row.locality == expected.locality
        assert row.efficacy == pytest.approx(expected.efficacy)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.usefixtures("softmax_in_float64")
def test_side_by_side_is_one_after_another(arch: str, tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny(arch, "float64"))
    # Behind the first edit no two of them are in one state.
    some = [
        replace(each, facts=NUMBERED[:3]) for each in sequences_of(ROME, C_ROME, P_ROME, FC_ROME)
    ]
    some.append(EditSequence(name="back", facts=NUMBERED[2::-1], editor=ROME))
    together = run_sequences(tmp_path / "together", study, some)
    alone: dict[str, SequenceRun] = {}
    for each in some:
        alone |= run_sequences(tmp_path / "alone", study, [each])
    for name, run in together.items():
        assert len(run.steps) == 3
        for row, own in zip(run.steps, alone[name].steps, strict=True):
            for column in ("numerator", "denominator", "final_loss", "drift_norm", "perplexity"):
                assert row[column] == pytest.approx(own[column], rel=1e-9)
        for row, own in zip(run.retained, alone[name].retained, strict=True):
            assert row.em == pytest.approx(own.em, abs=1e-9)


def test_sequences_in_one_state_share_a_value(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tiny("llama"))
    editors = study.editors([ROME, C_ROME, P_ROME])
    turns = [Turn(model=study.model, fact=NUMBERED[0], editor=each) for each in editors]
    steps: list[int] = []
    edits = edit_in_step(turns, on_step=steps.append)
    assert len(steps) <= QUICK.steps
    for edit, editor in zip(edits, editors, strict=True):
        assert isinstance(edit, Edit)
        assert relative(edit.right, editor.edit(study.model, [NUMBERED[0]]).right) < 1e-4


def test_an_editor_of_ones_own_takes_part(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("gpt2")

    class Small:
        name = label = "small"

        def edit(self, model: Model, facts: Any) -> Edit:
            site = model.site(2)
            left = torch.full((site.d_mlp,), 1e-3 * len(model.edits))
            return Edit.of(model, 2, left, torch.ones(site.d_model), name="small", facts=facts)

    each = EditSequence(name="own", facts=NUMBERED[:4], editor=Small())
    (run,) = run_sequences(tmp_path, study_of(model), [each]).values()
    assert [row.status for row in run.steps] == ["done"] * 4
    assert run.steps[0].delta_norm == 0
    assert run.steps[3].delta_norm == pytest.approx(3 * run.steps[1].delta_norm, rel=1e-5)
    view = run.edited(model)
    assert run.steps[-1].perplexity == pytest.approx(perplexity(view, SENTENCES).mean, rel=1e-4)


@pytest.fixture(scope="module")
def paired(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The same of two methods, measured along the way."""
    study, folder = study_of(tiny("llama")), tmp_path_factory.mktemp("paired")
    runs = run_sequences(folder, study, sequences_of(ROME, FC_ROME), plan=SequencePlan(every=3))
    return Whole(study=study, runs=runs, folder=folder)


@pytest.mark.parametrize("kills", range(3))
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one(
    kills: int, paired: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, plan = paired.study, SequencePlan(every=3)
    draw = random.Random(kills)
    for _ in range(6):
        left = draw.randrange(1, 40)

        def count(*_: Any, **__: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            for module, name in (
                *((lockstep, name) for name in ("edit_in_step", "_in_all", "_by_fact", "_health")),
                (lockstep, "metric_columns"),
                (lane_module, "write_rows"),
            ):
                original = getattr(module, name)

                def interrupted(*args: Any, _original: Any = original, **more: Any) -> Any:
                    count()
                    found = _original(*args, **more)
                    count()
                    return found

                patch.setattr(module, name, interrupted)
            try:
                run_sequences(tmp_path / "run", study, sequences_of(ROME, FC_ROME), plan=plan)
            except KeyboardInterrupt:
                continue
            break
    found = run_sequences(tmp_path / "run", study, sequences_of(ROME, FC_ROME), plan=plan)
    assert same_runs(found, paired.runs)
    whole, again = contents(paired.folder), contents(tmp_path / "run")
    assert whole.keys() == again.keys()
    for name in whole:
        assert whole[name] == again[name], name


def test_a_finished_run_computes_nothing(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(whole.folder)
    for name in ("edit_in_step", "_by_fact", "_in_all"):
        monkeypatch.setattr(lockstep, name, lambda *_: pytest.fail("computed again"))
    again = run_sequences(whole.folder, whole.study, sequences_of(ROME))
    assert same_runs(again, whole.runs)
    assert contents(whole.folder) == before


@pytest.mark.parametrize(
    "damage", ["edit", "steps", "retained", "no edit", "later edit", "earlier edit"]
)
def test_what_is_damaged_is_done_again(
    damage: str, whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = whole.copied(tmp_path / "run")
    before = contents(run)
    edits = run / "rome" / "edits"
    if damage == "no edit":
        (edits / "0002.safetensors").unlink()
    elif damage == "later edit":
        shutil.copy(edits / "0003.safetensors", edits / "0002.safetensors")
    elif damage == "earlier edit":
        shutil.copy(edits / "0001.safetensors", edits / "0002.safetensors")
    else:
        parts = sorted((run / "rome" / damage).glob("*.parquet"))
        path = edits / "0002.safetensors" if damage == "edit" else parts[-1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    assert same_runs(run_sequences(run, whole.study, sequences_of(ROME)), whole.runs)
    assert contents(run) == before


def test_a_full_disk_loses_nothing(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = whole.study
    saved = Edit.save
    with monkeypatch.context() as patch:

        def full(self: Edit, path: Path) -> None:
            if path.name == "0003.safetensors":
                raise CacheError("no space left")
            saved(self, path)

        patch.setattr(Edit, "save", full)
        with pytest.raises(CacheError, match="no space left"):
            run_sequences(tmp_path / "run", study, sequences_of(ROME))
    found = run_sequences(tmp_path / "run", study, sequences_of(ROME))
    assert same_runs(found, whole.runs)
    assert contents(tmp_path / "run") == contents(whole.folder)


def test_a_folder_of_another_run_is_refused(whole: Whole) -> None:
    study, folder = whole.study, whole.folder
    before = contents(folder)
    other = replace(sequences_of(ROME)[0], facts=NUMBERED[::-1])
    changes: list[tuple[Study, EditSequence, SequencePlan, str]] = [
        (study, other, SequencePlan(), "facts"),
        (study, replace(other, facts=NUMBERED, editor=C_ROME), SequencePlan(), "editor"),
        (study, sequences_of(ROME)[0], SequencePlan(every=3), "plan"),
        (
            study_of(study.model, hyperparameters=replace(QUICK, steps=4)),
            sequences_of(ROME)[0],
            SequencePlan(),
            "hyperparameters",
        ),
    ]
    for varied, each, plan, what in changes:
        with pytest.raises(BadInputError, match=f"begun with something else \\({what} differs"):
            run_sequences(folder, varied, [each], plan=plan)
    with pytest.raises(BadInputError, match="side_by_side differs"):
        run_sequences(folder, study, sequences_of(ROME, C_ROME))
    assert contents(folder) == before


def test_a_model_that_is_bad_already_is_not_rolled_back(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("llama"))
    plan = SequencePlan(guard=Guard.ROLLBACK)
    with pytest.raises(BadInputError, match="above 1000 itself"):
        run_sequences(tmp_path / "run", study, sequences_of(ROME), plan=plan)
    assert not (tmp_path / "run").exists()
    (run,) = run_sequences(tmp_path / "plain", study, sequences_of(ROME)).values()
    # No step crosses what was crossed before the first.
    assert run.first_crossing is not None
    assert run.disabling_edit is None


def test_the_screen_leaves_out_facts_that_are_predicted_to_collapse(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tiny("llama"))
    ratios = {row.case_id: row.ratio for row in screen(study, NUMBERED)}
    bound = sorted(ratios.values())[2]
    monkeypatch.setattr("firsttok.screening.RATIO", bound)
    hard = {number for number, ratio in ratios.items() if ratio < bound}
    assert len(hard) == 2
    plan = SequencePlan(guard=Guard.SCREEN, every=3)
    (run,) = run_sequences(tmp_path, study, sequences_of(ROME), plan=plan).values()
    assert {row.case_id for row in run.left_out("screened")} == hard
    assert {row.case_id for row in run.written} == {f.case_id for f in NUMBERED} - hard
    rest = tuple(fact for fact in NUMBERED if fact.case_id not in hard)
    without = EditSequence(name="rest", facts=rest, editor=ROME)
    (plain,) = run_sequences(tmp_path, study, [without]).values()
    for row, own in zip(run.written, plain.steps, strict=True):
        assert row.perplexity == own.perplexity
    assert same_runs(run_sequences(tmp_path, study, sequences_of(ROME), plan=plan), {"rome": run})


def test_a_rollback_takes_a_step_back_to_the_bit(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    study = study_of(model)

    class Wild:
        """Every third edit makes the model several times as bad."""

        name = label = "wild"

        def edit(self, model: Model, facts: Any) -> Edit:
            site = model.site(LAYER)
            wild = facts[0].case_id % 3 == 1
            original: Any = model.weights.bridge.original_model
            right = original.get_output_embeddings().weight.detach()[7]
            left = torch.full((site.d_mlp,), 1e3 if wild else 1e-6)
            return Edit.of(model, LAYER, left, right, name="wild", facts=facts)

    each = EditSequence(name="wild", facts=NUMBERED, editor=Wild())
    original = study.original_perplexity.mean
    plan = SequencePlan(guard=Guard.ROLLBACK, jump=1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "COLLAPSE_THRESHOLD", 1.5 * original)
        (run,) = run_sequences(tmp_path, study, [each], plan=plan).values()
        gone = {row.case_id for row in run.left_out("rolled back")}
        assert gone == {fact.case_id for fact in NUMBERED if fact.case_id % 3 == 1}
        assert run.disabling_edit is None
        kept = tuple(fact for fact in NUMBERED if fact.case_id not in gone)
        rest = EditSequence(name="kept", facts=kept, editor=Wild())
        (plain,) = run_sequences(tmp_path, study, [rest]).values()
        assert torch.equal(
            run.edited(model).site(LAYER).matrix, plain.edited(model).site(LAYER).matrix
        )
        (unguarded,) = run_sequences(tmp_path / "un", study, [each]).values()
        found = unguarded.disabling_edit
        assert found is not None
        assert found.case_id == 1
        assert unguarded.first_crossing is not None
        assert unguarded.first_crossing.step == 2
        assert "Step 2 disables the model" in unguarded.panel().text


def spoil(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let ROME's optimisation of the third fact be NaN; gives the evaluations of each pass."""
    passes: list[list[int]] = []

    def spoilt(model: Model, facts: Any, anchors: torch.Tensor, **more: Any) -> Any:
        wrong = [more["slot"] is ROME.anchor and fact.case_id == 2 for fact in facts]
        anchors = anchors.masked_fill(torch.tensor(wrong)[:, None], torch.nan)
        passes.append([])
        more["on_step"] = passes[-1].append
        return optimise_values(model, facts, anchors, **more)

    monkeypatch.setattr("firsttok.editing.edits.optimise_values", spoilt)
    return passes


def test_a_fact_that_cannot_be_written_fails_alone(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tiny("llama"))
    turned = EditSequence(name="turned", facts=(*NUMBERED[1:], NUMBERED[0]), editor=ROME)
    each = [*sequences_of(ROME, FC_ROME), turned]
    passes = spoil(monkeypatch)
    found = run_sequences(tmp_path / "run", study, each)
    failed = {
        name: [row.case_id for row in run.steps if row.status == "failed"]
        for name, run in found.items()
    }
    assert failed == {"rome": [2], "fc-rome": [], "turned": [2]}
    assert "became nan at step 0" in found["rome"].steps[2].reason
    # The two of ROME share a pass, and the one that is sound is computed once.
    assert len(passes) == 2 * len(NUMBERED)
    most = QUICK.steps
    assert sorted(map(sum, passes)) == sorted(
        [most] * len(NUMBERED) + [2 * most] * (len(NUMBERED) - 2) + [most + 1] * 2
    )
    before = contents(tmp_path / "run")
    assert same_runs(run_sequences(tmp_path / "run", study, each), found)
    assert contents(tmp_path / "run") == before


def test_what_failed_is_tried_again_when_asked(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, each = study_of(tiny("llama")), sequences_of(ROME, FC_ROME)
    plan = SequencePlan(every=2)
    expected = run_sequences(tmp_path / "whole", study, each, plan=plan)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch)
        failed = run_sequences(run, study, each, plan=plan)
        assert [row.status for row in failed["rome"].steps].count("failed") == 1
        # What fails again changes nothing.
        before = contents(run)
        run_sequences(run, study, each, plan=plan, retry_failed=True)
        assert contents(run) == before
    kept = run_sequences(run, study, each, plan=plan)
    assert [row.status for row in kept["rome"].steps].count("failed") == 1
    again = run_sequences(run, study, each, plan=plan, retry_failed=True)
    assert same_runs(again, expected)
    assert contents(run) == contents(tmp_path / "whole")


def test_memory_that_is_used_up_ends_a_run_and_no_step_failed(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        passes: list[int] = []

        def full(*args: Any, **more: Any) -> Any:
            passes.append(1)
            if len(passes) == 3:
                raise torch.OutOfMemoryError("out of memory")
            return optimise_values(*args, **more)

        patch.setattr("firsttok.editing.edits.optimise_values", full)
        with pytest.raises(torch.OutOfMemoryError):
            run_sequences(tmp_path / "run", whole.study, sequences_of(ROME))
    found = run_sequences(tmp_path / "run", whole.study, sequences_of(ROME))
    assert same_runs(found, whole.runs)
    assert contents(tmp_path / "run") == contents(whole.folder)


def test_rows_held_and_written_do_not_grow_along_a_sequence(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lane_module, record):
        monkeypatch.setattr(module, "PART", 2)
    written: list[tuple[str, int]] = []
    lanes: list[Lane] = []
    original, begun = lane_module.write_rows, Lane.__init__

    def write(path: Path, rows: Any) -> None:
        written.append((str(path.relative_to(tmp_path)), len(rows)))
        assert all(len(lane.rows) <= 2 and len(lane.retained) <= 2 for lane in lanes)
        original(path, rows)

    def begin(self: Lane, *args: Any, **more: Any) -> None:
        lanes.append(self)
        begun(self, *args, **more)

    monkeypatch.setattr(lane_module, "write_rows", write)
    monkeypatch.setattr(Lane, "__init__", begin)
    # Rows of steps are written at every step, so that each part is seen as it grows.
    monkeypatch.setattr(lockstep, "_PERIOD", 0.0)
    plan = SequencePlan(every=1)
    (run,) = run_sequences(tmp_path, whole.study, sequences_of(ROME), plan=plan).values()
    count = len(NUMBERED)
    assert max(rows for _, rows in written) == 2
    steps = [path for path, _ in written if "steps" in path]
    retained = [path for path, _ in written if "retained" in path]
    assert len(steps) == count
    assert len(retained) == len(set(retained)) == sum(-(-step // 2) for step in range(1, count + 1))
    assert run.checkpoints == tuple(range(1, count + 1))
    for step in run.checkpoints:
        assert [row.case_id for row in run.retained_at(step)] == [*range(step)]
    assert [row.step for row in run.steps] == [*run.checkpoints]
    before = contents(tmp_path)
    for name in ("edit_in_step", "_by_fact", "_in_all"):
        monkeypatch.setattr(lockstep, name, lambda *_: pytest.fail("computed again"))
    run_sequences(tmp_path, whole.study, sequences_of(ROME), plan=plan)
    assert contents(tmp_path) == before


def test_a_run_of_an_earlier_version_opens_or_is_named(whole: Whole, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    before = contents(run)
    (found,) = whole.runs.values()
    tables = {"steps": found.steps, "retained": found.retained}
    for name, rows in tables.items():
        shutil.rmtree(run / "rome" / name)
        write_rows(run / "rome" / f"{name}.parquet", rows)
    assert same_runs(run_sequences(run, whole.study, sequences_of(ROME)), whole.runs)
    assert contents(run) == before
    path = run / "rome" / "sequence.json"
    known = read_record(path, "a sequence's record")
    write_record(path, {**known, "format": 0})
    with pytest.raises(BadInputError, match="was written by another version of firsttok"):
        run_sequences(run, whole.study, sequences_of(ROME))


def test_orders(tiny: TinyFactory) -> None:
    study = study_of(tiny("llama"))
    assert order_facts(study, NUMBERED, "given") == NUMBERED
    mixed = order_facts(study, NUMBERED, "seed:1")
    assert mixed != NUMBERED
    assert set(mixed) == set(NUMBERED)
    assert mixed == order_facts(study, NUMBERED, "seed:1") != order_facts(study, NUMBERED, "seed:2")
    ratios = {row.case_id: row.ratio for row in screen(study, NUMBERED)}
    found = [ratios[fact.case_id] for fact in order_facts(study, NUMBERED, "hard-first")]
    assert found == sorted(found)
    for wrong in ("seed:", "seed:x", "hard", ""):
        with pytest.raises(BadInputError, match="give given, seed:N or hard-first"):
            order_facts(study, NUMBERED, wrong)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"every": 0}, "every is 0"),
        ({"jump": 1.0}, "jump is 1; give a number above 1"),
        ({"guard": Guard.ROLLBACK, "metrics": ("scores",)}, "needs the perplexity"),
        ({"metrics": ("none",)}, "no metric is called 'none'"),
        ({"checkpoint": ("perplexity",)}, "after every edit, and so at every checkpoint"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInputError, match=sentence):
        SequencePlan(**settings)


def test_a_sequence_writes_each_fact_once() -> None:
    with pytest.raises(BadInputError, match="case_id 0 comes twice"):
        EditSequence(name="x", facts=(NUMBERED[0], NUMBERED[0]), editor=ROME)
    for name in ("", "../x", "a/b", "a b"):
        with pytest.raises(BadInputError, match="cannot be the name of a folder"):
            EditSequence(name=name, facts=NUMBERED, editor=ROME)
    with pytest.raises(BadInputError, match="has no fact"):
        EditSequence(name="x", facts=(), editor=ROME)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("command")
    build("llama", folder / "model")
    write: dict[str, Any] = {
        "facts": [fact.as_record() for fact in NUMBERED],
        "texts": list(SENTENCES),
        "contexts": list(CONTEXTS.templates),
    }
    words: list[str] = []
    for name, content in write.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content), "utf-8")
        words += [f"--{name}", str(path)]
    words += ["--model", str(folder / "model"), "--second-moment", "identity", "--steps", "3"]
    words += ["--layer", str(LAYER), "--bos", "without"]
    return [*words, "--method", "rome", "fc-rome", "--order", "given", "seed:1"], folder


def test_the_command_tells_what_became_of_each(
    command: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, _ = command
    assert main(["sequence", str(tmp_path / "run"), *words, "--every", "4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in ("rome-given", "fc-rome-given", "rome-seed1", "fc-rome-seed1"):
        assert name in said
        assert list((tmp_path / "run" / name / "steps").glob("*.parquet"))
    assert f"{len(NUMBERED)} of {len(NUMBERED)}" in said
    shards = tmp_path / "shards"
    for number in (1, 2):
        part = ["--limit", "1", "--shard", f"{number}/2"]
        assert main(["sequence", str(shards), *words, *part]) == 0
    assert {path.name for path in shards.iterdir()} >= {"rome-given", "fc-rome-seed1"}


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.slow
@pytest.mark.release
def test_workers_of_a_cluster_find_what_one_process_finds(
    command: tuple[list[str], Path], tmp_path: Path
) -> None:
    words, _ = command
    more = [*words, "--every", "3", "--limit", "3"]
    # Each worker has one method in both orders.
    for number in (1, 2):
        assert main(["sequence", str(tmp_path / "here"), *more, "--shard", f"{number}/2"]) == 0
    assert main(["sequence", str(tmp_path / "ray"), *more, "--engine", "ray", "--actors", "2"]) == 0
    for name in ("rome-given", "fc-rome-seed1"):
        here, there = (contents(tmp_path / run / name) for run in ("here", "ray"))
        assert here == there


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--actors", "2"], "--actors is for --engine ray"),
        (["--every", "0"], "every is 0"),
        (["--jump", "1"], "jump is 1"),
        (["--shard", "3/2"], "--shard is 3/2"),
        (["--shard", "9/9"], "there are 2 sequences; give at most 2 shares"),
        (["--order", "given", "hard"], "the order is 'hard'"),
        (["--method", "none"], "none"),
        (["--guard", "rollback", "--metrics", "scores"], "needs the perplexity"),
    ],
)
def test_the_command_refuses_bad_options_before_a_model_is_loaded(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["sequence", str(tmp_path / "run"), "--model", "/no/such", *options])
    assert code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_kills_change_nothing(command: tuple[list[str], Path], tmp_path: Path) -> None:
    words, folder = command
    environment = {"OMP_NUM_THREADS": "1", "FIRSTTOK_CACHE": str(folder / "cache")}
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = [*words, "--every", "2", "--limit", "3"]
    draw = random.Random(0)
    killed = 0

    def same() -> None:
        one, other = contents(whole), contents(run)
        # What a kill left half written has another name.
        names = [name for name in one if not name.startswith("models")]
        assert [name for name in other if name in names] == names
        for name in names:
            assert one[name] == other[name], name

    with starter("sequence", environment) as own:
        undisturbed = own.start(["sequence", str(whole), *more])
        assert undisturbed.wait().code == 0
        took = time.monotonic() - undisturbed.begun
        while killed < 5:
            process = own.start(["sequence", str(run), *more])
            time.sleep(took * draw.random())
            code = process.kill().code
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            if code == 0:
                same()
                shutil.rmtree(run)
        assert own.start(["sequence", str(run), *more]).wait().code == 0
    same()


def test_a_state_holds_factors_and_no_weight_for_each_step(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    study = study_of(tiny("llama"))
    each = sequences_of(ROME)[0]
    run_sequences(tmp_path, study, [each])
    lane = Lane(tmp_path, study, each, SequencePlan())
    for step in range(1, len(NUMBERED) + 1):
        lane.enter(step)
        edit = lane.saved(step)
        assert edit is not None
        lane.take(step, edit)
        assert len(lane.model.contents) <= 1
        assert all("edits" not in e.provenance["model"] for e in cast(Any, lane.model.edits))
    sizes = {
        sum(d.left.numel() + d.right.numel() for d in e.deltas) for e in cast(Any, lane.model.edits)
    }
    site = study.model.site(LAYER)
    assert sizes == {site.d_mlp + site.d_model}


def test_views_side_by_side_add_each_edit_once(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view begins with what the one before holds, also while another's edits are in place."""
    model = tiny("llama")
    site = model.site(LAYER)
    changed: list[str] = []
    original = Edit.changed

    def count(self: Edit, *args: Any) -> Any:
        changed.append(self.title)
        return original(self, *args)

    monkeypatch.setattr(Edit, "changed", count)
    views = [model, model]
    for number in range(4):
        for place, view in enumerate(views):
            left = torch.full((site.d_mlp,), 1e-3 * (number + 1) * (place + 1))
            edit = Edit.of(view, LAYER, left, torch.ones(site.d_model))
            views[place] = view.edited(edit)
        for view in views:
            _ = view.site(LAYER)
        with views[0].standing():
            expected = views[1].site(LAYER).matrix
        assert torch.equal(views[1].site(LAYER).matrix, expected)
    assert len(changed) == 8


def test_a_fact_whose_neighbour_cannot_be_asked_fails_before_it_is_edited(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    study = study_of(tiny("llama"))
    long = replace(NUMBERED[1], neighbours=("The " * 500,))
    facts = (NUMBERED[0], long, NUMBERED[2])
    each = EditSequence(name="long", facts=facts, editor=ROME)
    (run,) = run_sequences(tmp_path, study, [each]).values()
    assert [row.status for row in run.steps] == ["done", "failed", "done"]
    assert "reads at most" in run.steps[1].reason
    assert not (tmp_path / "long" / "edits" / "0002.safetensors").exists()
    assert same_runs(run_sequences(tmp_path, study, [each]), {"long": run})


def test_a_report_that_would_hide_a_column_is_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("gpt2")

    class Hiding:
        name = label = "hiding"

        def edit(self, model: Model, facts: Any) -> Edit:
            site = model.site(2)
            left, right = torch.zeros(site.d_mlp), torch.ones(site.d_model)
            return Edit.of(model, 2, left, right, facts=facts, components={"guard": 1.0})

    each = EditSequence(name="hiding", facts=NUMBERED[:1], editor=Hiding())
    with pytest.raises(
        BadInputError, match="'hiding' reports 'guard', which is a column of 'a step'"
    ):
        run_sequences(tmp_path, study_of(model), [each])
