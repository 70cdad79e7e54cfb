"""Facts that cannot be used: refused before any work, or left out with a count and the reasons."""

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import PERPLEXITY, PUBLISHED
from safetensors.torch import load_file, save_file
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory, build

from firsttok.cli import main
from firsttok.data import Fact, check_facts, load_facts
from firsttok.editing import ROME, Edit
from firsttok.errors import BadInputError, CacheError, FactFormatError
from firsttok.evaluation import Perplexity, PreparedTexts
from firsttok.hyperparameters import Hyperparameters
from firsttok.measuring import measure_facts
from firsttok.models import Model, load
from firsttok.paper.cases import (
    choose_cases,
    load_collapse_ids,
    load_scan,
    save_scan,
    second_token_cases,
)
from firsttok.paper.experiment import ScriptOptions
from firsttok.prompts import fact_prompt
from firsttok.rows import FAILED, Row
from firsttok.second_moment import SecondMoment
from firsttok.sieve import FailedFact, each_or_reason, reason_against, usable_facts
from firsttok.storage import write_json
from firsttok.study import Study
from firsttok.sweep.results import read_run

GOOD = [replace(fact, case_id=20 + index).as_record() for index, fact in enumerate(FACTS)]
STRADDLES = Fact(subject="Arth", template="{}ur left", target_new="it", case_id=30).as_record()
LONG = Fact(subject="Arth", template="I know " * 400 + "{}", target_new="a", case_id=31).as_record()
SAME = [STRADDLES | {"case_id": number} for number in (32, 33)]
UNREADABLE: list[Any] = [
    None,
    {},
    GOOD[0] | {"case_id": 40, "requested_rewrite": "x"},
    {"prompt": "What is it?", "subject": "it is", "target_new": "a"},
    {"prompt": "{} is", "subject": "Anna", "target_new": " "},
    {"prompt": "{} is", "subject": "Luc", "target_new": ""},
]


# --- files ---------------------------------------------------------------------------------------


def test_records_that_cannot_be_read_are_left_out_by_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "facts.json"
    write_json(path, [*UNREADABLE[:3], *GOOD, *UNREADABLE[3:]])
    with pytest.raises(FactFormatError, match=r"record 0 is not an object but null.*--skip-bad"):
        load_facts(path)
    facts = check_facts(path, skip_bad=True)
    assert [fact.as_record() for fact in facts] == GOOD
    # Two blank answers are one reason, whatever the prompts they quote.
    assert [each.count for each in facts.left_out] == [2, 1, 1, 1, 1]
    assert facts.left_out[0].first == "record 9"
    assert "field target_new: target_new of 'Anna is' is empty" in facts.left_out[0].reason
    assert "6 facts are left out, 2 because " in caplog.text
    assert load_facts(path, skip_bad=True) == tuple(facts)


def test_a_line_that_is_no_json_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps(record).encode() for record in GOOD]
    path.write_bytes(b"\n".join([lines[0], b'{"a": ', b'{"a": "\xff"}', b'{"a": NaN}', *lines[1:]]))
    facts = check_facts(path, skip_bad=True)
    assert [fact.as_record() for fact in facts] == GOOD
    assert sum(each.count for each in facts.left_out) == 3
    with pytest.raises(BadInputError, match=r"not valid JSON at line 2.*--skip-bad"):
        load_facts(path)


def test_a_list_that_breaks_off_is_refused_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(GOOD)[:-10], "utf-8")
    with pytest.raises(BadInputError, match="not valid JSON") as caught:
        load_facts(path, skip_bad=True)
    assert "--skip-bad" not in str(caught.value)


def test_a_file_of_bad_records_alone_says_why(tmp_path: Path) -> None:
    write_json(tmp_path / "facts.json", UNREADABLE[-2:])
    with pytest.raises(FactFormatError, match=r"no facts that can be used \(2 because field"):
        load_facts(tmp_path / "facts.json", skip_bad=True)


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_tell_which_facts_cannot_be_edited(tiny: TinyFactory, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, [GOOD[0], STRADDLES, *SAME, GOOD[1], LONG, *GOOD[2:]])
    facts, model = check_facts(path), tiny("gpt2")
    with pytest.raises(BadInputError, match=r"case 30 of .* cannot be edited: .*--skip-bad"):
        usable_facts(model, facts)
    usable = usable_facts(model, facts, skip_bad=True)
    for _ in range(2):
        assert [fact.as_record() for fact in usable] == GOOD
    assert [(each.count, each.first) for each in usable.left_out] == [
        (3, "case 30"),
        (1, "case 31"),
    ]
    assert "goes beyond subject" in usable.left_out[0].reason
    assert "reads at most 160" in usable.left_out[1].reason
    for fact in usable:
        assert reason_against(model, fact, templates=CONTEXTS.templates) is None
    few = usable_facts(model, check_facts(path, limit=3), skip_bad=True)
    assert [fact.case_id for fact in few] == [20]
    write_json(path, [STRADDLES, *SAME, STRADDLES | {"case_id": 50}])
    facts = check_facts(path)
    with pytest.raises(FactFormatError, match=r"no facts that can be used \(4 because"):
        usable_facts(model, facts, skip_bad=True)


# --- during the work -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[], [0], [4], [1, 2], [0, 1, 2, 3, 4]])
def test_what_fails_is_found_and_the_others_are_done_once(bad: list[int]) -> None:
    facts = [replace(FACTS[0], case_id=number) for number in range(5)]
    done: list[int] = []

    def do(some: Sequence[Fact]) -> list[int]:
        if any(fact.case_id in bad for fact in some):
            raise ZeroDivisionError("as bad\nas can be")
        done.extend(fact.case_id for fact in some)
        return [10 * fact.case_id for fact in some]

    found = list(each_or_reason(facts, do))
    assert [fact.case_id for fact, _ in found] == list(range(5))
    for fact, result in found:
        if fact.case_id in bad:
            assert isinstance(result, FailedFact)
            assert result.reason == "ZeroDivisionError: as bad as can be"
        else:
            assert result == 10 * fact.case_id
    assert sorted(done) == [number for number in range(5) if number not in bad]


@pytest.mark.parametrize("error", [CacheError("full"), MemoryError(), KeyboardInterrupt()])
def test_what_is_no_fault_of_a_fact_ends_the_work(error: BaseException) -> None:
    def do(_: Sequence[Fact]) -> list[int]:
        raise error

    with pytest.raises(type(error)):
        list(each_or_reason(FACTS, do))


@pytest.fixture(scope="module")
def explosive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on which a single fact overflows: a token of its subject has huge embeddings."""
    folder = tmp_path_factory.mktemp("explosive")
    build("gptj", folder)
    model = load(str(folder))
    others = [text for f in (*FACTS[:2], *FACTS[3:]) for text in (f.prompt, *f.neighbours)]
    others += [f" {text}" for f in FACTS for text in (f.target_new, f.target_true)]
    tokenizer: Any = model.tokenizer
    taken = {
        i for text in (*others, *SENTENCES, *CONTEXTS.templates) for i in tokenizer(text).input_ids
    }
    own = set(fact_prompt(model, FACTS[2]).token_ids) - taken
    assert own
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"][list(own)] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def options(tmp_path: Path, own_cache: Path) -> list[str]:
    write_json(tmp_path / "texts.json", list(SENTENCES))
    write_json(tmp_path / "contexts.json", list(CONTEXTS.templates))
    words = ["--second-moment", "identity", "--steps", "2", "--layer", "1"]
    return [
        *("--texts", str(tmp_path / "texts.json"), "--contexts", str(tmp_path / "contexts.json")),
        *words,
    ]


def test_a_fact_that_overflows_is_a_failed_row_and_stops_nobody(
    explosive: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "facts.json", GOOD)
    words = ["--model", str(explosive), "--facts", str(tmp_path / "facts.json"), *options]
    others = [20, 21, 23, 24]
    folder = tmp_path / "out" / explosive.name

    assert main(["scan", *words, "--out", str(tmp_path / "out")]) == 0
    rows, _ = load_scan(folder / "collapse_cases.json")
    assert [row.case_id for row in rows] == others
    scanned = json.loads((folder / "collapse_cases.json").read_text("utf-8"))
    (failed,) = scanned["failed"]
    assert (failed["case_id"], failed["subject"]) == (22, "Zoë Quux")
    assert "NaN" in failed["reason"] or "finite" in failed["reason"]
    assert scanned["summary"]["failed"] == 1
    assert load_collapse_ids(folder / "collapse_cases.json", load_facts(tmp_path / "facts.json"))

    assert main(["screen", *words, "--out", str(tmp_path / "out")]) == 0
    screened = json.loads((folder / "screen.json").read_text("utf-8"))
    assert sorted(row["case_id"] for row in screened["rows"]) == others
    (failed,) = screened["provenance"]["failed"]
    assert failed["case_id"] == 22
    assert all(np.isfinite(row["denominator"]) for row in screened["rows"])

    run = tmp_path / "run"
    assert main(["sweep", str(run), *words, "--method", "rome"]) == 0
    status = {row.case_id: row.status for row in read_run(run).rows}
    assert [case for case, found in status.items() if found == FAILED] == [22]
    assert "Traceback" not in capsys.readouterr().err


def test_an_edit_that_leaves_no_perplexity_is_a_collapse(
    on_tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = PreparedTexts.measure_edits

    def broken(texts: PreparedTexts, model: Model, edits: Sequence[Edit]) -> list[Perplexity]:
        odd = {22: float("nan"), 23: float("inf")}
        cases = [edit.provenance["facts"][0]["case_id"] for edit in edits]
        return [
            replace(found, mean=odd.get(case, 5.0 + case), corpus=odd.get(case, 5.0))
            for case, found in zip(cases, plain(texts, model, edits), strict=True)
        ]

    monkeypatch.setattr(PreparedTexts, "measure_edits", broken)
    write_json(tmp_path / "facts.json", GOOD)
    words = ["--facts", str(tmp_path / "facts.json"), *on_tiny, "--out", str(tmp_path / "out")]
    for _ in ("measured", "found finished"):
        assert main(["scan", *words]) == 0
        path = tmp_path / "out" / on_tiny[1] / "collapse_cases.json"
        assert load_collapse_ids(path, load_facts(tmp_path / "facts.json")) == [22, 23]
        rows, _ = load_scan(path)
        found = {row.case_id: row.perplexity for row in rows}
        assert math.isnan(found.pop(22))
        assert found == {20: 25.0, 21: 26.0, 23: float("inf"), 24: 29.0}
        assert "failed" not in json.loads(path.read_text("utf-8"))
    assert main(["screen", *words]) == 0
    assert "2 of 5 edited cases collapsed" in capsys.readouterr().out


def test_if_no_fact_goes_well_nothing_is_written(
    explosive: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "facts.json", GOOD[2:3])
    words = ["--model", str(explosive), "--facts", str(tmp_path / "facts.json"), *options]
    for command in ("scan", "screen"):
        assert main([command, *words, "--out", str(tmp_path / "out")]) == 2
        assert "no fact that went well; case 22 did not because" in capsys.readouterr().err
        assert not (tmp_path / "out" / explosive.name / "screen.json").exists()
        assert not (tmp_path / "out" / explosive.name / "collapse_cases.json").exists()


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def on_tiny(tiny: TinyFactory, options: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of every command, on one tiny model that is loaded once."""
    model = tiny("gpt2")
    monkeypatch.setattr("firsttok.inputs.load", lambda *_, **__: model)
    monkeypatch.setattr("firsttok.commands.sweep.check_name", lambda _: None)
    return ["--model", model.label, *options]


def out_of(command: str, folder: Path) -> list[str]:
    return [command, str(folder)] if command == "sweep" else [command, "--out", str(folder)]


@pytest.mark.parametrize("command", ["scan", "screen", "sweep"])
def test_a_bad_fact_is_refused_before_work_and_left_out_on_request(
    command: str,
    on_tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "facts.json"
    words = [*out_of(command, tmp_path / "out"), "--facts", str(path), *on_tiny]
    for bad, where in ((UNREADABLE[2], "record 1"), (STRADDLES, "case 30")):
        write_json(path, [GOOD[0], bad, *GOOD[1:]])
        if command == "sweep" and bad is STRADDLES:
            continue
        with monkeypatch.context() as patch:
            patch.setattr("firsttok.inputs._second_moments", lambda *_: pytest.fail("was at work"))
            assert main(words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert where in error
        assert "--skip-bad" in error
        assert not (tmp_path / "out").exists()
    write_json(path, [GOOD[0], UNREADABLE[2], STRADDLES, *SAME, UNREADABLE[5], *GOOD[1:]])
    assert main([*words, "--skip-bad"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    good = [record["case_id"] for record in GOOD]
    folder = tmp_path / "out" / words[words.index("--model") + 1]
    if command == "sweep":
        results = read_run(tmp_path / "out")
        done = {row.case_id: row.status for row in results.rows}
        assert [case for case, status in done.items() if status != FAILED] == good
        assert [case for case, status in done.items() if status == FAILED] == [30, 32, 33]
        left_out = results.manifest["told"]["left_out"]
        assert [each["count"] for each in left_out] == [1, 1]
    elif command == "scan":
        record = json.loads((folder / "collapse_cases.json").read_text("utf-8"))
        assert [row["case_id"] for row in record["rows"]] == good
        assert [each["count"] for each in record["left_out"]] == [1, 1, 3]
        # Scripts know the list by the facts of the file, with the same option.
        load_collapse_ids(folder / "collapse_cases.json", load_facts(path, skip_bad=True))
    else:
        record = json.loads((folder / "screen.json").read_text("utf-8"))
        assert sorted(row["case_id"] for row in record["rows"]) == good
        assert [each["count"] for each in record["provenance"]["left_out"]] == [1, 1, 3]


def test_scripts_choose_among_the_facts_that_can_be_edited(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    study = Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=Hyperparameters(steps=1),
        texts=tuple(SENTENCES),
        work=tmp_path,
    )
    write_json(tmp_path / "facts.json", [*GOOD, STRADDLES, *SAME])
    facts = load_facts(tmp_path / "facts.json")
    rows = [
        Row({**row, "collapsed": row.case_id != 24})
        for row in measure_facts(study, facts[:5], [ROME])
    ]
    listed = [*rows, Row({**rows[0], "case_id": 32, "collapsed": True})]
    save_scan(tmp_path / "cases.json", study, facts, listed)
    chosen: dict[bool, ScriptOptions] = {
        skip: ScriptOptions(
            study=study,
            facts=facts,
            cases=tmp_path / "cases.json",
            out=tmp_path,
            collapse=9,
            normal=9,
            seed=0,
            command="",
            args=Namespace(skip_bad=skip),
        )
        for skip in (False, True)
    }
    with pytest.raises(BadInputError, match=r"case 3\d cannot be edited: .*--skip-bad"):
        choose_cases(chosen[False])
    selection = choose_cases(chosen[True])
    assert sorted(fact.case_id for fact in selection.collapse) == [20, 21, 22, 23]
    assert [fact.case_id for fact in selection.normal] == [24]
    with pytest.raises(BadInputError, match=r"case 30 cannot be edited: .*--skip-bad"):
        second_token_cases(chosen[False])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_go_through_every_command(
    name: str, on_tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, facts = PUBLISHED[name]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, PERPLEXITY)), "utf-8")
    texts = ["--texts", str(tmp_path / "texts.jsonl")]
    for command in ("scan", "screen", "sweep"):
        words = [*out_of(command, tmp_path / command), "--facts", str(path), *on_tiny, *texts]
        assert main(words) == 0, capsys.readouterr().err
    label = on_tiny[1]
    rows, _ = load_scan(tmp_path / "scan" / label / "collapse_cases.json")
    assert [(row.case_id, row.prompt) for row in rows] == [(f.case_id, f.prompt) for f in facts]
    screened = json.loads((tmp_path / "screen" / label / "screen.json").read_text("utf-8"))
    assert {row["case_id"] for row in screened["rows"]} == {fact.case_id for fact in facts}
    swept = {row.case_id: row for row in read_run(tmp_path / "sweep").rows if row.method == "rome"}
    for fact in facts:
        row = swept[fact.case_id]
        assert row.target_true == fact.target_true
        assert row.perplexity is not None
        assert row.efficacy is not None
        # What needs an old answer, a paraphrase or a neighbour is empty without, and only then.
        assert (row.es is not None) == (row.em is not None) == bool(fact.target_true)
        assert (row.ps is not None) == bool(fact.target_true and fact.paraphrases)
        assert (row.generalization is not None) == bool(fact.paraphrases)
        assert (row.ns is not None) == (row.locality is not None) == bool(fact.answered_neighbours)
        assert (row.score is None) == (None in (row.es, row.ps, row.ns))
