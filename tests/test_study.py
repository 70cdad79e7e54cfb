"""Many facts: resumed after an interruption, scanned, chosen, verified."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory

from firsttok import study as study_module
from firsttok.data import Fact
from firsttok.editing import C_ROME, METHODS, ROME, Edit, compute_edit
from firsttok.errors import BadInputError
from firsttok.evaluation import perplexity
from firsttok.measuring import measure_facts
from firsttok.metrics import AccuracyMetric, PerplexityMetric
from firsttok.models import BosPolicy
from firsttok.paper.cases import load_collapse_ids, measure_selection, save_scan, select_cases
from firsttok.probes import SECOND2FIRST, SeesAll
from firsttok.second_moment import SecondMoment
from firsttok.study import Study

NUMBERED = tuple(replace(fact, case_id=index) for index, fact in enumerate(FACTS))


@pytest.fixture
def study(tiny: TinyFactory, tmp_path: Path) -> Study:
    model = tiny("llama")
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(48),
        layer=2,
        hyperparameters=replace(model.hyperparameters, steps=4),
        texts=SENTENCES,
        work=tmp_path / "work",
    )


def work_of(study: Study) -> Path:
    assert study.work is not None
    return study.work


def test_rows_are_what_single_calls_give(study: Study) -> None:
    rows = measure_facts(study, NUMBERED, METHODS)
    assert [(row.case_id, row.method) for row in rows] == [
        (fact.case_id, method.name) for fact in NUMBERED for method in METHODS
    ]
    fact, method = NUMBERED[1], C_ROME
    edit = compute_edit(
        study.model,
        fact,
        method=method,
        contexts=study.contexts,
        second_moment=study.second_moment,
        layer=study.layer,
        hyperparameters=study.hyperparameters,
    )
    (row,) = [row for row in rows if (row.case_id, row.method) == (1, method.name)]
    assert row.denominator == pytest.approx(edit.report["denominator"], rel=1e-4)
    assert row.numerator == pytest.approx(edit.report["numerator"], rel=1e-3)
    with edit.applied(study.model):
        expected = perplexity(study.model, SENTENCES).mean
    assert row.perplexity == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_run_goes_on_and_repeats_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = measure_facts(replace(study, work=tmp_path / "other"), NUMBERED, METHODS)
    real = PerplexityMetric.measure
    computed: list[int] = []

    def interrupted(metric: PerplexityMetric, study: Study, fact: Fact, edits: Any) -> Any:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(fact.case_id)
        return real(metric, study, fact, edits)

    with monkeypatch.context() as patch:
        patch.setattr(PerplexityMetric, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_facts(study, NUMBERED, METHODS)
    assert computed == [fact.case_id for fact in NUMBERED[:3]]

    def counted(metric: PerplexityMetric, study: Study, fact: Fact, edits: Any) -> Any:
        computed.append(fact.case_id)
        return real(metric, study, fact, edits)

    with monkeypatch.context() as patch:
        patch.setattr(PerplexityMetric, "measure", counted)
        rows = measure_facts(study, NUMBERED, METHODS)
    assert computed == [fact.case_id for fact in NUMBERED]
    assert [row.case_id for row in rows] == [row.case_id for row in undisturbed]
    for row, other in zip(rows, undisturbed, strict=True):
        assert row.perplexity == pytest.approx(other.perplexity, rel=1e-3)


def test_what_is_missing_is_measured_and_nothing_else(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_facts(study, NUMBERED[:2], [ROME])
    measured: list[tuple[str, int, list[str]]] = []

    def told(kind: type[Any]) -> None:
        real = kind.measure

        def measure(metric: Any, study: Study, fact: Fact, edits: Sequence[Edit]) -> Any:
            names = [edit.provenance["method"]["name"] for edit in edits]
            measured.append((metric.name, fact.case_id, names))
            return real(metric, study, fact, edits)

        monkeypatch.setattr(kind, "measure", measure)

    told(PerplexityMetric)
    told(AccuracyMetric)
    rows = measure_facts(study, NUMBERED[:3], [ROME, C_ROME], metrics=["perplexity", "accuracy"])
    both = ["rome", "c-rome"]
    assert measured == [
        *(("accuracy", 0, ["rome"]), ("perplexity", 0, ["c-rome"]), ("accuracy", 0, ["c-rome"])),
        *(("accuracy", 1, ["rome"]), ("perplexity", 1, ["c-rome"]), ("accuracy", 1, ["c-rome"])),
        *(("perplexity", 2, both), ("accuracy", 2, both)),
    ]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    again = measure_facts(study, NUMBERED[:3], [ROME, C_ROME], metrics=["perplexity", "accuracy"])
    assert again == rows


def test_finished_values_are_not_optimised_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measure_facts(study, NUMBERED, [ROME])
    for path in (work_of(study) / "rows").iterdir():
        path.unlink()

    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("a value was optimised again")

    monkeypatch.setattr("firsttok.editing.edits.optimise_values", never)
    assert measure_facts(study, NUMBERED, [ROME]) == before


@pytest.mark.parametrize("content", [b"", b"{", b"PAR1"])
def test_a_damaged_row_is_measured_again(study: Study, content: bytes) -> None:
    rows = measure_facts(study, NUMBERED[:1], [ROME])
    (path,) = (work_of(study) / "rows").glob("*.parquet")
    path.write_bytes(content)
    again = measure_facts(study, NUMBERED[:1], [ROME])
    assert again == rows


def test_changed_settings_are_measured_anew(study: Study) -> None:
    measure_facts(study, NUMBERED[:1], [ROME])
    for changed in (
        replace(study, layer=1),
        replace(study, texts=SENTENCES[:2]),
        replace(study, hyperparameters=replace(study.hyperparameters, steps=3)),
        replace(study, contexts=replace(CONTEXTS, templates=CONTEXTS.templates[:2])),
        replace(study, second_moment=replace(study.second_moment, corpus_hash="other")),
    ):
        before = len(list((work_of(study) / "rows").glob("*.parquet")))
        measure_facts(changed, NUMBERED[:1], [ROME])
        assert len(list((work_of(study) / "rows").glob("*.parquet"))) == before + 1


def test_the_model_is_untouched(study: Study) -> None:
    before = study.model.site(2).weight.detach().clone()
    measure_facts(study, NUMBERED, METHODS)
    assert torch.equal(study.model.site(2).weight, before)


def test_scan_flags_and_list(study: Study, tmp_path: Path) -> None:
    bare = replace(study, model=study.model.with_bos(BosPolicy.WITHOUT))
    rows = measure_facts(bare, NUMBERED, [ROME])
    flags = {row.subject: (row.first_token, row.one_token) for row in rows}
    assert flags["England"] == (True, True)
    assert flags["Eiffel Tower"][0] is False
    assert not any(row.first_token for row in measure_facts(study, NUMBERED, [ROME]))
    path = tmp_path / "cases.json"
    save_scan(path, bare, NUMBERED, rows)
    record = json.loads(path.read_text("utf-8"))
    listed = load_collapse_ids(path, NUMBERED)
    assert set(listed) == {row.case_id for row in rows if row.perplexity > 1000}
    assert record["summary"]["facts"] == len(NUMBERED)
    assert record["provenance"]["original_perplexity"] == bare.original_perplexity.mean
    with pytest.raises(BadInputError, match="made from other facts"):
        load_collapse_ids(path, NUMBERED[:2])


def test_a_list_is_needed_and_checked(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="firsttok scan"):
        load_collapse_ids(tmp_path / "none.json", NUMBERED)
    (tmp_path / "odd.json").write_text("[1, 2]", "utf-8")
    with pytest.raises(BadInputError, match="make it again"):
        load_collapse_ids(tmp_path / "odd.json", NUMBERED)


def test_selection_is_seeded_spread_and_disjoint() -> None:
    facts = [replace(FACTS[0], case_id=index) for index in range(40)]
    ids = list(range(10, 22))
    one = select_cases(facts, ids, collapse=4, normal=8, seed=0)
    assert one == select_cases(facts, ids, collapse=4, normal=8, seed=0)
    assert one.normal != select_cases(facts, ids, collapse=4, normal=8, seed=1).normal
    assert [fact.case_id for fact in one.collapse] == [10, 13, 16, 19]
    assert not {fact.case_id for fact in one.normal} & set(ids)
    everything = select_cases(facts, ids, collapse=99, normal=99, seed=0)
    assert len(everything.collapse) == 12
    assert len(everything.normal) == 28


def test_a_listed_case_that_does_not_collapse_is_left_out(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = PerplexityMetric.measure

    def decided(metric: PerplexityMetric, study: Study, fact: Fact, edits: Any) -> Any:
        found = real(metric, study, fact, edits)
        rome = [edit.provenance["method"]["name"] == "rome" for edit in edits]
        return [
            row | {"collapsed": fact.case_id == 0 and own}
            for row, own in zip(found, rome, strict=True)
        ]

    monkeypatch.setattr(PerplexityMetric, "measure", decided)
    selection = select_cases(NUMBERED, [0, 1], collapse=2, normal=1, seed=0)
    records = measure_selection(study, selection, [ROME, C_ROME])
    assert {r["case_id"] for r in records if r["cases"] == "collapse"} == {0}
    assert 1 not in {r["case_id"] for r in records}
    assert "does not collapse here" in caplog.text
    selection = select_cases(NUMBERED, [1], collapse=1, normal=1, seed=0)
    with pytest.raises(BadInputError, match="no listed case collapses"):
        measure_selection(study, selection, [ROME, C_ROME])


def test_a_varied_study_measures_the_unedited_model_once(study: Study) -> None:
    expected, prepared = study.original_perplexity, study.prepared_texts
    contexts = replace(study.contexts, seed=7)
    for same in (
        study.varied(contexts=contexts),
        study.varied(model=study.model.with_bos(BosPolicy.WITH)),
        study.varied(model=study.model.intervened(SECOND2FIRST), judge=study.model),
    ):
        assert same.original_perplexity is expected
        assert same.prepared_texts is prepared
    for other in (
        study.varied(layer=1),
        study.varied(texts=study.texts[:2]),
        study.varied(text_bos=BosPolicy.WITH),
        study.varied(model=study.model.intervened(SECOND2FIRST)),
    ):
        assert other.prepared_texts is not prepared
    assert study.varied(layer=1).original_perplexity is expected
    other = study.varied(model=study.model.intervened(SeesAll(position=0)))
    assert other.original_perplexity is not expected


def test_facts_that_share_a_number_are_refused(study: Study) -> None:
    same = [replace(fact, case_id=7) for fact in NUMBERED[:2]]
    with pytest.raises(BadInputError, match="two facts have the case_id 7"):
        measure_facts(study, same, [ROME])


def test_the_original_perplexity_is_measured_once_for_a_work_folder(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.keep_original_perplexity()
    (kept,) = (work_of(study) / "original").iterdir()
    calls: list[int] = []

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return perplexity(*args, **settings)

    monkeypatch.setattr(study_module, "perplexity", counted)
    again = replace(study, memo={})
    again.keep_original_perplexity()
    assert again.original_perplexity == study.original_perplexity
    assert not calls
    other = replace(study, texts=SENTENCES[:2])
    other.keep_original_perplexity()
    assert len(calls) == 1
    assert other.original_perplexity != study.original_perplexity
    kept.write_text("[]", "utf-8")
    damaged = replace(study, memo={})
    damaged.keep_original_perplexity()
    assert len(calls) == 2
    assert damaged.original_perplexity == study.original_perplexity


def test_a_kept_row_names_the_model_as_it_is_called_now(study: Study) -> None:
    (row,) = measure_facts(study, NUMBERED[:1], [ROME])
    renamed = study.varied(model=replace(study.model, name="other"))
    (again,) = measure_facts(renamed, NUMBERED[:1], [ROME])
    assert (row.model, again.model) == (study.model.label, "other")
    assert {**again, "model": row.model} == dict(row)
    assert len(list((work_of(study) / "rows").glob("*.parquet"))) == 1


@pytest.mark.parametrize("ports", [("out", "out"), ("in", "out"), ("gate", "in")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_edits_of_any_matrices_are_measured_as_they_stand(
    study: Study, layer: int, ports: tuple[str, str]
) -> None:
    generator = torch.Generator().manual_seed(layer)

    def of(where: int, port: str) -> Edit:
        shape = (32, 48) if port != "out" else (48, 32)
        change = 0.5 * torch.randn(*shape, generator=generator)
        return Edit.of(study.model, where, change, port=port)

    edit = of(layer, ports[0]) + of(3, ports[1])
    (found,) = study.perplexities([edit])
    expected = perplexity(study.model.edited(edit), SENTENCES)
    assert found.mean == pytest.approx(expected.mean, rel=1e-5)
    assert found.mean != pytest.approx(study.original_perplexity.mean, rel=1e-3)
