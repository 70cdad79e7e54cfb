"""Published files as they are: each schema and each form of a file gives the facts it holds."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import ANNA, COUNTERFACT, PERPLEXITY, PUBLISHED

from firsttok.data import Fact, check_facts, load_facts, load_texts, write_facts
from firsttok.errors import BadInputError, FactFormatError, TextFormatError

Writer = Callable[[Path, list[Any]], None]


def as_list(path: Path, records: list[Any]) -> None:
    path.write_text(json.dumps(records), "utf-8")


def as_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), "utf-8")


def as_indented_windows_list(path: Path, records: list[Any]) -> None:
    text = json.dumps(records, indent=4).replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())


def as_packed_list(path: Path, records: list[Any]) -> None:
    path.write_bytes(gzip.compress(json.dumps(records).encode()))


def as_packed_lines(path: Path, records: list[Any]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))


def as_parquet(path: Path, records: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)


def as_packed_parquet(path: Path, records: list[Any]) -> None:
    as_parquet(path, records)
    path.write_bytes(gzip.compress(path.read_bytes()))


FORMS: dict[str, Writer] = {
    "x.json": as_list,
    "windows.json": as_indented_windows_list,
    "x.jsonl": as_lines,
    "x.json.gz": as_packed_list,
    "x.JSONL.GZ": as_packed_lines,
    "x.parquet": as_parquet,
    "x.parquet.gz": as_packed_parquet,
}


def facts_in(path: Path) -> list[Fact]:
    """The facts without the name of their file."""
    return [replace(fact, source="python") for fact in load_facts(path)]


MIXED = ("KnowEdit, WikiBio", "EasyEdit's COUNTERFACT")
"""Fields that are now a text, now a list, which no column of Parquet can be."""


@pytest.mark.parametrize(
    ("name", "form"),
    [(n, f) for n in PUBLISHED for f in FORMS if not (n in MIXED and "parquet" in f)],
)
def test_each_schema_in_each_form_gives_its_facts(name: str, form: str, tmp_path: Path) -> None:
    records, expected = PUBLISHED[name]
    FORMS[form](tmp_path / form, records)
    assert facts_in(tmp_path / form) == list(expected)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("form", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz"])
def test_what_is_written_is_read_as_it_was(name: str, form: str, tmp_path: Path) -> None:
    _, facts = PUBLISHED[name]
    write_facts(tmp_path / form, facts)
    assert facts_in(tmp_path / form) == list(facts)


@pytest.mark.parametrize("form", FORMS)
def test_sentences_in_each_form(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / form, PERPLEXITY)
    texts = tuple(each["Text"] for each in PERPLEXITY)
    assert load_texts(tmp_path / form) == texts
    FORMS[form](tmp_path / form, [{"text": text} for text in texts])
    assert load_texts(tmp_path / form) == texts
    if "parquet" not in form:
        FORMS[form](tmp_path / form, list(texts))
        assert load_texts(tmp_path / form) == texts


def test_a_line_that_is_no_sentence_is_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"Text": "It rained."}\n{"Text": 3}\n', "utf-8")
    with pytest.raises(TextFormatError, match=r"record 1 \(line 2\) is no sentence"):
        load_texts(path)
    path.write_text('{"Text": "It rained."}\n{"Text"\n', "utf-8")
    with pytest.raises(BadInputError, match="is not valid JSON at line 2"):
        load_texts(path)


# --- what stands around the records --------------------------------------------------------------

AROUND: dict[str, Any] = {
    "a list under data": {"version": "1", "languages": ["en"], "data": COUNTERFACT},
    "a list under any name": {"item": COUNTERFACT, "n": 2},
    "by numbers": {str(each["case_id"]): each for each in COUNTERFACT},
    "by numbers alone": {
        str(each["case_id"]): {name: each[name] for name in each if name != "case_id"}
        for each in COUNTERFACT
    },
    "by names": {f"case {each['case_id']}": each for each in COUNTERFACT},
}


@pytest.mark.parametrize("name", AROUND)
def test_an_object_around_the_records_is_looked_through(name: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(AROUND[name]), "utf-8")
    assert facts_in(path) == list(PUBLISHED["COUNTERFACT"][1])


def test_one_record_alone_is_a_file_of_one(tmp_path: Path) -> None:
    path = tmp_path / "fact.json"
    path.write_text("\n" + json.dumps(COUNTERFACT[0], indent=1), "utf-8")
    assert facts_in(path) == [ANNA]


# --- fields that are lists, null, or not there ---------------------------------------------------

FLAT: dict[str, Any] = {
    "subject": "Luc",
    "prompt": "Luc works as",
    "target_new": "singer",
    "ground_truth": "actor",
    "rephrase_prompt": "Luc is a",
    "locality_prompt": "Rome is",
    "locality_ground_truth": "a city",
}
PLAIN = Fact(
    subject="Luc",
    template="{} works as",
    target_new="singer",
    target_true="actor",
    paraphrases=("Luc is a",),
    neighbours=("Rome is",),
    neighbour_answers=("a city",),
)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "old answer is a list": ({"ground_truth": ["actor", "player"]}, {}),
    "old answer is a list of lists": ({"ground_truth": [["", "actor"], ["player"]]}, {}),
    "old answer in an object in a list": ({"ground_truth": [{"str": "actor"}]}, {}),
    "old answer is null": ({"ground_truth": None}, {"target_true": ""}),
    "old answer is blank": ({"ground_truth": " "}, {"target_true": ""}),
    "old answer is an empty list": ({"ground_truth": []}, {"target_true": ""}),
    "old answer is null in an object": ({"ground_truth": {"str": None}}, {"target_true": ""}),
    "old answer by the other name": ({"ground_truth": None, "target_true": " actor"}, {}),
    "new answer is a list of one": ({"target_new": ["singer", "singer "]}, {}),
    "new answer by another name": ({"target_new": None, "target_false": " singer"}, {}),
    "no paraphrase": ({"rephrase_prompt": None}, {"paraphrases": ()}),
    "paraphrases": ({"rephrase_prompt": ["Luc is a", None, " "]}, {}),
    "paraphrases by another name": (
        {"rephrase_prompt": None, "rephrase": ["Luc is a", "Luc as"]},
        {"paraphrases": ("Luc is a", "Luc as")},
    ),
    "no neighbour": ({"locality_prompt": None}, {"neighbours": (), "neighbour_answers": ()}),
    "an answer for all": (
        {"locality_prompt": ["Rome is", "Paris is"]},
        {"neighbours": ("Rome is", "Paris is"), "neighbour_answers": ("a city", "a city")},
    ),
    "an answer for each": (
        {"locality_prompt": ["Rome is", "He is"], "locality_ground_truth": ["a city", ["a man"]]},
        {"neighbours": ("Rome is", "He is"), "neighbour_answers": ("a city", "a man")},
    ),
    "no answer to a neighbour": (
        {"locality_prompt": ["Rome is", "He is"], "locality_ground_truth": ["a city", None]},
        {"neighbours": ("Rome is", "He is"), "neighbour_answers": ("a city", "")},
    ),
    "no answer to any neighbour": ({"locality_ground_truth": " "}, {"neighbour_answers": ("",)}),
    "an empty list of answers": ({"locality_ground_truth": []}, {"neighbour_answers": ("",)}),
    "a blank neighbour has an answer, too": (
        {
            "locality_prompt": ["Rome is", "", None, "He is"],
            "locality_ground_truth": ["a city", "a", "b", "a man"],
        },
        {"neighbours": ("Rome is", "He is"), "neighbour_answers": ("a city", "a man")},
    ),
    "answers without neighbours": (
        {"locality_prompt": [], "locality_ground_truth": ["a", "b"]},
        {"neighbours": (), "neighbour_answers": ()},
    ),
    "the neighbour's answer is null": (
        {"locality_ground_truth": None},
        {"neighbour_answers": ()},
    ),
    "the neighbour's answer is the old one": (
        {"locality_ground_truth": " actor"},
        {"neighbour_answers": ()},
    ),
    "locality in an object": (
        {
            "locality_prompt": None,
            "locality": {"neighborhood": {"prompt": "Rome is", "ground_truth": "a city"}},
        },
        {},
    ),
    "neighbours in objects": (
        {"neighborhood_prompts": [{"prompt": "Rome is", "target": "a city"}]},
        {},
    ),
    "kinds that are empty": (
        {"locality_prompt": None, "locality": {"Relation_Specificity": [], "Forgetfulness": None}},
        {"neighbours": (), "neighbour_answers": ()},
    ),
    "case_id is null": ({"case_id": None}, {}),
    "case_id is negative": ({"case_id": -3}, {"case_id": -3}),
    "case_id is the largest": ({"case_id": 2**63 - 1}, {"case_id": 2**63 - 1}),
    "case_id is too large": ({"case_id": 2**63}, {}),
    "case_id is huge": ({"case_id": 10**40}, {}),
    "case_id is a text of digits": ({"case_id": "7"}, {"case_id": 7}),
    "case_id is the text 0": ({"case_id": "0"}, {"case_id": 0}),
    "case_id is a text": ({"case_id": "Q7"}, {}),
    "case_id is a whole float": ({"case_id": 7.0}, {"case_id": 7}),
    "case_id is a fraction": ({"case_id": 1.5}, {}),
    "case_id is true": ({"case_id": True}, {}),
    "case_id is a list": ({"case_id": [1]}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_field_in_another_form_is_read_for_what_it_is(name: str, tmp_path: Path) -> None:
    changes, expected = VARIANTS[name]
    as_list(tmp_path / "facts.json", [FLAT | changes])
    assert facts_in(tmp_path / "facts.json") == [replace(PLAIN, **expected)]


def test_neighbours_that_cannot_be_measured_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    as_list(tmp_path / "facts.json", PUBLISHED["KnowEdit, wiki_recent"][0])
    assert len(load_facts(tmp_path / "facts.json")[0].answered_neighbours) == 2
    assert "neighbours without an answer, not measured: 1" in caplog.text
    bare = FLAT | {"ground_truth": None, "locality_ground_truth": None}
    as_list(tmp_path / "facts.json", [bare, bare])
    (fact, _) = load_facts(tmp_path / "facts.json")
    assert (fact.neighbours, fact.answered_neighbours) == (("Rome is",), ())
    assert "neighbours without an answer, not measured: 2" in caplog.text


# --- numbers -------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[list[Any], list[int], str]] = {
    "kept": ([5, 3, -1], [5, 3, -1], ""),
    "none": ([None, None, None], [0, 1, 2], ""),
    "repeated": ([5, 6, 5], [0, 1, 2], "record 2 has the case_id 5 of another one"),
    "some": ([5, None, 7], [0, 1, 2], "1 facts have no case_id"),
    "one that is another's place": ([1, None], [0, 1], "1 facts have no case_id"),
    "one that no other has": ([None, 1], [0, 1], "1 facts have no case_id"),
    "one too large": ([5, 2**63], [0, 1], "record 1 has a case_id of more than 64 bits"),
    "names": (["a", "b"], [0, 1], "record 0 has the case_id 'a', which is no whole number"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_two_facts_of_a_file_have_one_number(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    given, expected, said = NUMBERS[name]
    as_list(tmp_path / "facts.json", [FLAT | {"case_id": number} for number in given])
    facts = check_facts(tmp_path / "facts.json")
    assert [fact.case_id for fact in facts] == expected
    assert (f"{said}, so the facts are numbered in order" in caplog.text) == bool(said)
    # The same numbers, whatever part is taken.
    few = check_facts(tmp_path / "facts.json", limit=1)
    assert [fact.case_id for fact in few] == expected[:1]


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**40])
def test_a_number_that_no_row_holds_is_refused_in_python(number: int) -> None:
    with pytest.raises(FactFormatError, match="more than 64 bits"):
        replace(PLAIN, case_id=number)


def test_facts_of_python_without_numbers_make_a_file(tmp_path: Path) -> None:
    as_list(tmp_path / "facts.json", [PLAIN.as_record(), ANNA.as_record()])
    assert facts_in(tmp_path / "facts.json") == [PLAIN, replace(ANNA, case_id=1)]
