"""Synthetic facts: distinct, repeatable, taken by the tokenizer, written as a stream."""

import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from tiny import DECODERS, TinyFactory, build

from firsttok.cli import main
from firsttok.data import Fact, check_facts
from firsttok.errors import BadInputError
from firsttok.models import Model
from firsttok.prompts import fact_prompt, with_target
from firsttok.synthetic import _lists, synthetic_facts


def test_the_words_are_distinct() -> None:
    lists = _lists()
    for name, items in lists.items():
        if name != "relations":
            assert len(set(items)) == len(items), name
            assert all(item == item.strip() for item in items), name
    kinds = {"people", "places", "companies", "goods"}
    assert {relation["of"] for relation in lists["relations"]} == kinds
    pairs = [(r["of"], text) for r in lists["relations"] for text in r["clauses"]]
    assert len(set(pairs)) == len(pairs)
    assert all(text.startswith("{} ") and text.count("{}") == 1 for _, text in pairs)
    assert all(relation["answers"] in lists for relation in lists["relations"])


@pytest.mark.parametrize("arch", DECODERS)
def test_every_fact_fits_the_model(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    facts = list(synthetic_facts(model, 40, seed=0))
    assert [fact.case_id for fact in facts] == list(range(40))
    assert len({fact.prompt for fact in facts}) == 40
    positions: set[bool] = set()
    lengths: set[int] = set()
    for fact in facts:
        prompt = fact_prompt(model, fact)
        new, true = (
            with_target(model, prompt, text) for text in (fact.target_new, fact.target_true)
        )
        assert new.target_ids[0] != true.target_ids[0]
        assert fact.target_new != fact.target_true
        assert len(set(fact.paraphrases)) == 2
        assert all(text.count(fact.subject) == 1 for text in fact.paraphrases)
        assert len(set(fact.neighbours)) == 4
        assert all(fact.prompt != text for text in fact.neighbours)
        positions.add(prompt.subject_position == len(model.leading_ids))
        lengths |= {new.target_length, true.target_length}
    assert positions == {True, False}
    assert len(lengths) > 1


def test_seeds_repeat_and_fewer_are_the_first_of_more(tiny: TinyFactory) -> None:
    model = tiny("llama")
    more = list(synthetic_facts(model, 30, seed=3))
    assert list(synthetic_facts(model, 10, seed=3)) == more[:10]
    assert list(synthetic_facts(model, 10, seed=4)) != more[:10]


def test_neighbours_have_the_true_answer(tiny: TinyFactory) -> None:
    # Whatever a subject is asked, it always answers the same.
    answers: dict[str, str] = {}
    for fact in synthetic_facts(tiny("gpt2"), 150, seed=1):
        for prompt in (fact.prompt, *fact.neighbours):
            assert answers.setdefault(prompt, fact.target_true) == fact.target_true


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_is_at_least_one(tiny: TinyFactory, count: int) -> None:
    with pytest.raises(BadInputError, match=f"count of facts is {count}"):
        synthetic_facts(tiny("gpt2"), count, seed=0)


def test_words_that_run_out_are_named(tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    few = _lists() | {
        "given": ["Anna", "Arthur"],
        "family": ["Berg", "Marino"],
        "openings": ["They say that", "I know that", "Once"],
        "relations": [
            {"of": "people", "answers": "cities", "clauses": ["{} was born in the city of"]}
        ],
    }
    monkeypatch.setattr("firsttok.synthetic._lists", lambda: few)
    facts = synthetic_facts(tiny("gpt2"), 100, seed=0)
    prompts: list[str] = []
    with pytest.raises(BadInputError, match=r"make (\d+) facts that .* takes, not 100") as caught:
        prompts.extend(fact.prompt for fact in facts)
    # Four full names bare, and six names after three openings; what is one token alone besides.
    assert len(set(prompts)) == len(prompts)
    assert 22 <= len(prompts) <= 24
    assert f"make {len(prompts)} facts" in str(caught.value)


def test_facts_come_one_by_one(tiny: TinyFactory) -> None:
    facts = synthetic_facts(tiny("gpt2"), 10**9, seed=0)
    assert isinstance(facts, Iterator)
    next(facts)
    tracemalloc.start()
    try:
        for _ in islice(facts, 40):
            pass
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl"])
def test_the_command_writes_a_list_that_is_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder, out = tmp_path / "model", tmp_path / name
    folder.mkdir()
    build("gpt2", folder)
    options = ["--count", "30", "--seed", "5", "--model", str(folder), "--out", str(out)]
    assert main(["data", "synthesize", *options]) == 0
    assert capsys.readouterr().out == f"30 facts: {out}\n"
    facts = check_facts(out)
    assert len(facts) == 30
    assert len({fact.prompt for fact in facts}) == 30
    assert {path.name for path in tmp_path.iterdir()} == {"model", name}
    first = out.read_bytes()
    assert main(["data", "synthesize", *options]) == 0
    assert out.read_bytes() == first


def test_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "facts.json"
    folder.mkdir()
    build("gpt2", folder)
    out.write_text("before", "utf-8")

    def few(*_arguments: object, **_options: object) -> Iterator[Fact]:
        yield Fact(subject="a", template="{} b", target_new="c", target_true="d")
        raise BadInputError("the words make 1 fact; ask for fewer")

    monkeypatch.setattr("firsttok.synthetic.synthetic_facts", few)
    options = ["--count", "3", "--model", str(folder)]
    assert main(["data", "synthesize", *options, "--out", str(out)]) == 2
    assert out.read_text("utf-8") == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "facts.json"}
    capsys.readouterr()

    def refuse(*_arguments: object, **_options: object) -> None:
        pytest.fail("a model was loaded before the options were checked")

    monkeypatch.setattr("firsttok.models.load", refuse)
    for changed, message in (
        (["--count", "0", "--out", str(out)], "--count is 0"),
        (["--count", "3", "--out", str(tmp_path)], "is a folder"),
        (["--count", "3", "--out", str(tmp_path / "no" / "facts.json")], "does not exist"),
    ):
        assert main(["data", "synthesize", "--model", str(folder), *changed]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("firsttok: ") == 1


@pytest.mark.real_model
@pytest.mark.slow
def test_the_embedded_model_gets_many_first_tokens(real_model: Model) -> None:
    facts = list(synthetic_facts(real_model, 1000, seed=0))
    prompts = [fact_prompt(real_model, fact) for fact in facts]
    alone = sum(p.subject_position == 0 and p.subject_length == 1 for p in prompts)
    assert 250 < alone < 450
    assert len({fact.prompt for fact in facts}) == 1000
