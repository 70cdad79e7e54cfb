"""Files of facts: schemas, streams of any length, and one sentence for every kind of damage."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny import CONTEXTS, FACTS, TinyFactory

from firsttok.cli import main
from firsttok.data import (
    Fact,
    builtin_facts,
    check_facts,
    load_facts,
)
from firsttok.data.records import iter_records
from firsttok.editing import ROME, compute_edit
from firsttok.errors import BadInputError, FactFormatError
from firsttok.evaluation import counterfact_scores, edit_accuracy, score_targets
from firsttok.hyperparameters import Hyperparameters
from firsttok.prompts import text_prompt, with_target
from firsttok.second_moment import SecondMoment

ZSRE = {
    "subject": "Morfydd",
    "src": "What language is Morfydd in?",
    "pred": "Welsh",
    "rephrase": "Which language is Morfydd written in?",
    "alt": "Finnish",
    "answers": ["Welsh", "Cymraeg"],
    "loc": "nq question: who wrote the song",
    "loc_ans": "a singer",
    "cond": "Welsh >> Finnish || What language is Morfydd in?",
}
EASY_EDIT = {
    "case_id": 12,
    "prompt": "What language is Morfydd in?",
    "subject": "Morfydd",
    "target_new": "Finnish",
    "ground_truth": "Welsh",
    "rephrase_prompt": "Which language is Morfydd written in?",
    "locality_prompt": "nq question: who wrote the song",
    "locality_ground_truth": "a singer",
}


def record(number: Any = 0, **changes: Any) -> dict[str, Any]:
    rewrite: dict[str, Any] = {
        "prompt": "{}'s capital is",
        "subject": "England",
        "target_new": {"str": "Berlin"},
        "target_true": {"str": "London"},
    }
    whole: dict[str, Any] = {
        "case_id": number,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": ["The capital of England is"],
        "neighborhood_prompts": ["The capital of Kent is"],
    }
    for name, value in changes.items():
        (rewrite if name in rewrite else whole)[name] = value
    return whole


def without(name: str) -> dict[str, Any]:
    changed = record(1)
    del changed["requested_rewrite"][name]
    return changed


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def as_lines(records: list[Any]) -> str:
    return "".join(json.dumps(each) + "\n" for each in records)


PEAK = """
import sys, tracemalloc
from firsttok.data import check_facts
tracemalloc.start()
count = sum(1 for _ in check_facts(sys.argv[1]))
print(count, tracemalloc.get_traced_memory()[1])
"""


# --- damage ------------------------------------------------------------------------------------

GOOD = record(0)
LISTED = json.dumps([GOOD, record(1)])
PACKED = gzip.compress(LISTED.encode())
DEEP = "[" * 100_000

DAMAGES: dict[str, tuple[str | bytes | list[Any], tuple[str, ...]]] = {
    "cut off": (LISTED[:-40], ("is not valid JSON at line 1, column",)),
    "cut off behind a comma": ("[" + json.dumps(GOOD) + ",\n", ("at line 2, column 1",)),
    "a comma too many": ("[" + json.dumps(GOOD) + ",\n]", ("at line 2, column 1",)),
    "trailing garbage": (LISTED + "\nand so on", ("Extra data", "at line 2, column 1")),
    "two lists": (LISTED + LISTED, ("Extra data",)),
    "objects one after another": (as_lines([GOOD, record(1)]), ("end in .jsonl",)),
    "a number": ("3", ("holds a number",)),
    "nothing": (b"", ("is empty",)),
    "white space": (" \n\t\n", ("is empty",)),
    "an empty list": ([], ("holds no facts",)),
    "null": ([GOOD, None], ("record 1 is not an object but null",)),
    "texts": (["England"], ("record 0 is not an object but a text",)),
    "a list in the list": ([GOOD, [record(1)]], ("record 1 is not an object but a list",)),
    "an empty object": ([{}], ("record 0 has no field subject",)),
    "no prompt": ([GOOD, without("prompt")], ("record 1 has no field prompt",)),
    "no subject": ([GOOD, without("subject")], ("record 1 has no field subject",)),
    "no new target": ([GOOD, without("target_new")], ("record 1 has no field target_new",)),
    "rewrite is a text": (
        [record(requested_rewrite="x")],
        ("record 0, field requested_rewrite is not an object but a text",),
    ),
    "subject is a number": ([record(subject=3)], ("field subject is not a text but a number",)),
    "prompt is null": ([record(prompt=None)], ("field prompt is not a text but null",)),
    "prompt is a list": ([record(prompt=["{}"])], ("field prompt is not a text but a list",)),
    "target is true": (
        [record(target_new=True)],
        ("field target_new is not a text but true/false",),
    ),
    "target without str": (
        [record(target_new={"id": "Q1"})],
        ("field target_new.str is not a text but null",),
    ),
    "paraphrases are an object": (
        [record(paraphrase_prompts={"a": 1})],
        ("field paraphrase_prompts is not a list of texts but an object",),
    ),
    "a paraphrase is a number": (
        [record(paraphrase_prompts=["a", 7])],
        ("field paraphrase_prompts[1] is not a text",),
    ),
    "two answers of the neighbours": (
        [record(neighborhood_answer=["Kent", "Wien"])],
        ("field neighborhood_answer holds 2 different answers to 1 neighbours",),
    ),
    "number is NaN": (
        "[\n" + json.dumps(GOOD) + ',\n{"case_id": NaN}]',
        ("holds NaN at line 3, column 13",),
    ),
    "a number is infinite": (
        '[{"case_id": 0, "weight": -Infinity}]',
        ("holds -Infinity at line 1, column 27",),
    ),
    "no braces and no subject": (
        [record(prompt="The capital is")],
        ("record 0, field prompt", "0 times '{}'"),
    ),
    "two braces": ([record(prompt="{} and {}")], ("record 0, field prompt", "2 times '{}'")),
    "subject twice in the prompt": (
        [record(prompt="England and England")],
        ("record 0, field prompt", "0 times"),
    ),
    "empty subject": ([record(subject="")], ("record 0, field subject",)),
    "blank subject": ([record(subject=" \t")], ("record 0, field subject",)),
    "empty new target": ([record(target_new={"str": ""})], ("field target_new", "is empty")),
    "half a character": (
        '[{"subject": "\\udc00", "prompt": "{}", "target_new": "a", "ground_truth": "b"}]',
        ("record 0, field subject holds half a character",),
    ),
    "control character": (
        '[{"subject": "Eng\x01land"}]',
        ("Invalid control character", "line 1"),
    ),
    "single quotes": ("[{'subject': 'England'}]", ("at line 1, column 3",)),
    "a comment": ("[\n// facts\n" + json.dumps(GOOD) + "]", ("at line 2, column 1",)),
    "UTF-16": (LISTED.encode("utf-16"), ("is not UTF-8 text",)),
    "UTF-16 without mark": (LISTED.encode("utf-16-le"), ("line 1",)),
    "invalid UTF-8": (b'[{"subject": "\xff\xfe"}]', ("is not UTF-8 text at byte 14",)),
    "Latin-1": (
        json.dumps([record(subject="Zürich")], ensure_ascii=False).encode("latin-1"),
        ("is not UTF-8 text",),
    ),
    "too deep, cut off": (DEEP, ("is nested too deeply",)),
    "too deep": (DEEP + "]" * len(DEEP), ("is nested too deeply",)),
    "a field too deep": (
        '[{"case_id": ' + DEEP + "]" * len(DEEP) + "}]",
        ("is nested too deeply",),
    ),
    "gzip, cut off": (PACKED[:-12], ("is damaged or not all there",)),
    "gzip, of other bytes": (PACKED[:20] + b"zzzz" + PACKED[24:], ("is damaged or not all there",)),
    "zip": (b"PK\x03\x04rest", ("is compressed, not by gzip",)),
    "Parquet, cut off": (b"PAR1" + b"x" * 40, ("is no complete Parquet file of facts",)),
    "a pointer of Git LFS": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:d0\nsize 45108470\n",
        ("Git LFS pointer",),
    ),
    "a web page": ("<!DOCTYPE html><html>Sign in</html>", ("line 1, column 1",)),
    "CSV": ("case_id,subject\n0,England\n", ("line 1, column 1",)),
    "zeros": (b"\0" * 4096, ("line 1, column 1",)),
    "answers is a number": ([ZSRE | {"answers": 3}], ("field answers is not a text",)),
    "two new answers": (
        [record(target_new=["Berlin", "Wien"])],
        ("field target_new holds 2 different answers",),
    ),
    "locality is a number": (
        [EASY_EDIT | {"locality": {"kind": 3}, "locality_prompt": None}],
        ("field locality.kind is not an object with prompt and answer but a number",),
    ),
    "two lists in an object": (
        json.dumps({"train": [GOOD], "test": [GOOD]}),
        ("holds 2 lists (train, test)",),
    ),
    "an object of numbers": (json.dumps({"a": 1}), ("holds an object", "a list of facts")),
    "no rewrite": ([{"requested_rewrite": []}], ("field requested_rewrite is empty",)),
    "a rewrite is a text": (
        [{"requested_rewrite": [GOOD["requested_rewrite"], "x"]}],
        ("record 0, rewrite 1, field requested_rewrite is not an object but a text",),
    ),
    "a number of 5 000 digits": (
        f'[{{"case_id": {"7" * 5000}}}]',
        ("holds a number that cannot be read",),
    ),
    "ZsRE without src's subject": ([ZSRE | {"subject": None}], ("field subject",)),
    "ZsRE, nothing to edit": ([ZSRE | {"alt": ""}], ("holds no facts",)),
}
LINE_DAMAGES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "lines: cut off": (
        as_lines([GOOD]) + '{"case_id": 1',
        ("line 2, column", "should hold one record"),
    ),
    "lines: a list": (LISTED, ("record 0 (line 1) is not an object but a list",)),
    "lines: a record over several": (json.dumps(GOOD, indent=1), ("line 1, column",)),
    "lines: mixed": (as_lines([GOOD, 7]), ("record 1 (line 2) is not an object but a number",)),
    "lines: two in one": (json.dumps(GOOD) * 2, ("line 1", "Extra data")),
    "lines: NaN": ('\n{"case_id": NaN}\n', ("holds in line 2 what is no JSON (NaN)",)),
    "lines: not UTF-8": (as_lines([GOOD]).encode() + b'{"a": "\xff"}', ("UTF-8 text in line 2",)),
    "lines: a number of 5 000 digits": (
        f'{{"case_id": {"7" * 5000}}}',
        ("holds in line 1 what is no JSON",),
    ),
    "lines: nothing": ("\n \n", ("holds no facts",)),
    "lines: too deep": (DEEP, ("is nested too deeply",)),
}


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        pytest.fail("a model was loaded before the facts were checked")

    monkeypatch.setattr("firsttok.inputs.load", refuse)


@pytest.mark.parametrize("name", [*DAMAGES, *LINE_DAMAGES])
@pytest.mark.usefixtures("without_model", "own_cache")
def test_damage_is_one_sentence_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, expected = (DAMAGES | LINE_DAMAGES)[name]
    path = tmp_path / ("facts.jsonl" if name in LINE_DAMAGES else "facts.json")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    refused(path, expected, capsys)


def refused(path: Path, expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    out = path.parent / "out"
    assert main(["scan", "--facts", str(path), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("firsttok: ")]
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert all(part in lines[0] for part in expected), lines[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not out.exists()
    # The pass before the work and the whole list say the same.
    for read in (check_facts, load_facts):
        with pytest.raises(BadInputError) as caught:
            read(path)
        assert lines[0].startswith(f"firsttok: {caught.value}")


@pytest.mark.usefixtures("without_model", "own_cache")
def test_a_folder_and_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.json").mkdir()
    refused(tmp_path / "folder.json", ("cannot be read", "directory"), capsys)
    refused(tmp_path / "no.json", ("no file of facts", "check the path"), capsys)


@pytest.mark.usefixtures("without_model", "own_cache")
def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = write(tmp_path / "locked.json", [GOOD])
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        pytest.skip("this user may read any file")
    refused(locked, ("cannot be read", "denied"), capsys)


def test_a_mistake_at_the_end_is_found_before_any_fact_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [record(i) for i in range(50)] + [record(50, subject=1)])
    with pytest.raises(FactFormatError, match="record 50, field subject"):
        check_facts(path)
    with pytest.raises(FactFormatError, match="record 50, field subject"):
        check_facts(path, limit=3)


# --- what looks odd and works -------------------------------------------------------------------

ODD: dict[str, tuple[str | bytes, str]] = {
    "byte order mark": (b"\xef\xbb\xbf" + LISTED.encode(), "England"),
    "space around": (" \n\t" + LISTED + "\n\n", "England"),
    "Arabic": (json.dumps([record(subject="القاهرة")]), "القاهرة"),
    "Hebrew, not escaped": (json.dumps([record(subject="ירושלים")], ensure_ascii=False), "ירושלים"),
    "outside the basic plane": (json.dumps([record(subject="𓂀 🙂")]), "𓂀 🙂"),
    "combining marks": (json.dumps([record(subject="Zoe\u0308")]), "Zoe\u0308"),
    "a huge line": (
        json.dumps([record(note="x" * 3_000_000)]),
        "England",
    ),
    "a huge subject": (
        json.dumps([record(subject="Anna " * 50_000 + "X")]),
        "Anna " * 50_000 + "X",
    ),
    "a number of many digits": (json.dumps([record(10**40)]), "England"),
    "a negative number": (json.dumps([record(-3)]), "England"),
    "unknown fields": (
        json.dumps([record(weight=1.5, tags=[{"a": [None, True, 2e300]}], pararel_idx=2796)]),
        "England",
    ),
    "subject as a part of another word": (
        json.dumps([record(prompt="England, unlike Englanders, is in", subject="England")]),
        "England",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_looks_odd_is_read(name: str, tmp_path: Path) -> None:
    content, subject = ODD[name]
    path = tmp_path / "facts.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    first = load_facts(path)[0]
    assert first.subject == subject
    assert isinstance(first.case_id, int)
    assert [fact.as_record() for fact in check_facts(path)] == [
        fact.as_record() for fact in load_facts(path)
    ]


def test_blank_wordings_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [record(paraphrase_prompts=["", "It is"])])
    assert load_facts(path)[0].paraphrases == ("It is",)


@pytest.mark.parametrize("name", ["facts.jsonl", "FACTS.JSONL", "facts.ndjson"])
def test_json_lines_hold_the_same_facts(tmp_path: Path, name: str) -> None:
    records = [fact.as_record() for fact in builtin_facts()]
    plain = write(tmp_path / "facts.json", records)
    lines = tmp_path / name
    lines.write_bytes(b"\xef\xbb\xbf" + as_lines(records).replace("\n", "\r\n\n").encode())
    one, other = check_facts(plain), check_facts(lines)
    assert (one.count, one.content_hash) == (other.count, other.content_hash)
    assert [fact.as_record() for fact in other] == records


# --- schemas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [ZSRE, EASY_EDIT])
def test_both_forms_of_zsre(tmp_path: Path, published: dict[str, Any]) -> None:
    (fact,) = load_facts(write(tmp_path / "zsre.json", [published]))
    assert fact == Fact(
        subject="Morfydd",
        template="What language is {} in?",
        target_new="Finnish",
        target_true="Welsh",
        paraphrases=("Which language is Morfydd written in?",),
        neighbours=("nq question: who wrote the song",),
        neighbour_answers=("a singer",),
        source="zsre.json",
        case_id=published.get("case_id", 0),
    )
    assert fact.answered_neighbours == (("nq question: who wrote the song", "a singer"),)
    (again,) = load_facts(write(tmp_path / "again.json", [fact.as_record()]))
    assert again.as_record() == fact.as_record()


def test_zsre_leaves_out_what_its_own_loaders_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blank = ZSRE | {"alt": " "}
    vague = ZSRE | {"src": "Is it Morfydd or Morfydd?"}
    facts = check_facts(write(tmp_path / "zsre.json", [blank, ZSRE, vague, ZSRE]))
    (left_out,) = facts.left_out
    assert (len(facts), left_out.count, left_out.first) == (2, 2, "record 0")
    # The numbers are those of the records, as in the published code.
    assert [fact.case_id for fact in facts] == [1, 3]
    assert "2 facts are left out" in caplog.text


def test_a_neighbour_without_an_answer_is_not_measured(tmp_path: Path) -> None:
    (fact,) = load_facts(write(tmp_path / "zsre.json", [ZSRE | {"loc_ans": ""}]))
    assert fact.neighbours
    assert fact.answered_neighbours == ()


def test_records_of_usual_facts_are_as_they_were(tmp_path: Path) -> None:
    # Results in caches are found by these bytes.
    assert builtin_facts()[0].as_record()["neighborhood_prompts"]
    assert all("neighborhood_answer" not in fact.as_record() for fact in builtin_facts())
    same = EASY_EDIT | {"locality_ground_truth": " Welsh"}
    (fact,) = load_facts(write(tmp_path / "flat.json", [same]))
    assert fact.neighbour_answers == ()
    assert list(fact.as_record()) == [
        "case_id",
        "requested_rewrite",
        "paraphrase_prompts",
        "neighborhood_prompts",
    ]
    assert builtin_facts()[0].content_hash == (
        "5c7f7c5ee586b569bbc3d94dc5fd4c307ee0a34f6d6e09fe061c8dfc7992effe"
    )


def test_locality_reads_at_the_neighbours_own_answer(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    usual = replace(FACTS[0], neighbours=("The answer is",))
    own = replace(usual, neighbour_answers=("because it rained",))
    edit = compute_edit(
        model,
        usual,
        method=ROME,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=Hyperparameters(steps=12, learning_rate=2.0, clamp=20.0),
    )
    neighbour = text_prompt(model, "The answer is")
    asked = [with_target(model, neighbour, text) for text in ("because it rained", "Berlin")]
    with edit.applied(model):
        after = score_targets(model, asked)
        scores = counterfact_scores(model, own)
    before = score_targets(model, asked[:1])[0]
    pairs = list(zip(before.predicted_ids, after[0].predicted_ids, strict=True))
    agreed = sum(one == other for one, other in pairs) / len(pairs)
    assert edit_accuracy(model, own, edit).locality == pytest.approx(agreed)
    assert scores.nm == pytest.approx(after[0].probability - after[1].probability, rel=1e-4)


@pytest.mark.parametrize("own", [("it rained", "a test"), ()])
def test_without_an_old_answer_only_what_needs_it_is_empty(
    tiny: TinyFactory, own: tuple[str, ...]
) -> None:
    model = tiny("gpt2")
    full = replace(FACTS[0], neighbours=("The answer is", "Rome is"), neighbour_answers=own)
    bare = replace(full, target_true="")
    edit = compute_edit(
        model,
        bare,
        method=ROME,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=Hyperparameters(steps=2),
    )
    with edit.applied(model):
        scores, reference = counterfact_scores(model, bare), counterfact_scores(model, full)
    assert (scores.es, scores.em, scores.ps, scores.pm, scores.score) == (None,) * 5
    if own:
        assert scores.ns == reference.ns
        assert scores.nm == pytest.approx(reference.nm, rel=1e-5)
    else:
        assert (scores.ns, scores.nm) == (None, None)
    accuracy, known = edit_accuracy(model, bare, edit), edit_accuracy(model, full, edit)
    assert (accuracy.efficacy, accuracy.generalization) == (known.efficacy, known.generalization)
    assert accuracy.locality == (known.locality if own else None)


# --- streams ------------------------------------------------------------------------------------


def test_checked_facts_can_be_gone_through_again(tmp_path: Path) -> None:
    records = [record(i) for i in range(7)]
    facts = check_facts(write(tmp_path / "facts.json", records))
    assert len(facts) == facts.count == 7
    for _ in range(2):
        assert [fact.case_id for fact in facts] == list(range(7))
    assert [fact.case_id for fact in islice(facts, 2)] == [0, 1]
    one, other = iter(facts), iter(facts)
    assert next(one) == next(other)
    few = check_facts(tmp_path / "facts.json", limit=3)
    assert [fact.case_id for fact in few] == [0, 1, 2]
    assert len(few) == 3
    assert few.content_hash != facts.content_hash
    with pytest.raises(BadInputError, match="limit of facts is 0"):
        check_facts(tmp_path / "facts.json", limit=0)


def test_builtin_facts_go_through_the_same_door() -> None:
    facts = check_facts()
    assert facts.path is None
    assert tuple(facts) == builtin_facts()
    assert tuple(check_facts(limit=5)) == builtin_facts()[:5]


def test_the_hash_is_that_of_the_records_in_order(tmp_path: Path) -> None:
    one, two = record(0), record(1)
    hashes = {
        name: check_facts(write(tmp_path / f"{name}.json", content)).content_hash
        for name, content in {
            "usual": [one, two],
            "spaced": json.dumps([one, two], indent=3),
            "extended": [one | {"note": 1}, two],
            "swapped": [two, one],
            "other": [one, record(1, subject="Wales")],
        }.items()
    }
    assert hashes["usual"] == hashes["spaced"] == hashes["extended"]
    assert len(set(hashes.values())) == 3


def replaced(path: Path) -> None:
    other = write(path.with_name("other.json"), [record(i, subject="Wales") for i in range(40)])
    other.replace(path)


def lengthened(path: Path) -> None:
    write(path, [record(i) for i in range(41)])


def same_size(path: Path) -> None:
    status = path.stat()
    write(path, path.read_text("utf-8").replace("Berlin", "Dublin"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, lengthened, same_size, Path.unlink])
def test_a_change_between_two_passes_is_noticed(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = write(tmp_path / "facts.json", [record(i) for i in range(40)])
    facts = check_facts(path)
    change(path)
    with pytest.raises(BadInputError, match="was changed while it was in use"):
        list(facts)


def test_memory_stays_flat(tmp_path: Path) -> None:
    flat = {"prompt": "{} is", "subject": "Anna", "target_new": "a", "ground_truth": "b"}
    line = json.dumps(flat | {"note": "x" * 1500})
    path = write(tmp_path / "facts.json", "[" + ",\n".join([line] * 6_000) + "]")
    # In a Python of its own, where the checks of types that run in the tests make no objects.
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    count, peak = map(int, result.stdout.split())
    assert count == 6_000
    # What grows is the set of the numbers that were seen; the file has 10 megabytes.
    assert peak < 1_500_000


def test_no_record_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [record(i, note="x" * 100_000) for i in range(20)])
    with path.open("r+b") as file:
        # Behind the middle there is no JSON any more.
        file.seek(1_000_000)
        file.write(b"\xff" * 10)
    records = iter_records(path)
    assert [next(records)[1]["case_id"] for _ in range(8)] == list(range(8))
    with pytest.raises(BadInputError, match="not UTF-8 text at byte 1000000"):
        list(records)
