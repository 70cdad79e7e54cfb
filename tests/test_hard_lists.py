"""Known facts with false answers, and lists of facts that each collapse the model."""

import json
from collections import Counter
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny import CONTEXTS, DECODERS, FACTS, SENTENCES, TinyFactory, build

from firsttok.cli import main
from firsttok.data import Fact, builtin_facts, check_facts, load_facts, write_facts
from firsttok.data.records import builtin_json
from firsttok.editing import ROME
from firsttok.errors import BadInputError
from firsttok.hard_lists import find_hard_facts, find_normal_facts
from firsttok.hyperparameters import Hyperparameters
from firsttok.measuring import measure_facts
from firsttok.models import Model
from firsttok.prompts import fact_prompt, with_target
from firsttok.screening import screen
from firsttok.second_moment import compute_second_moment
from firsttok.storage import write_json
from firsttok.study import Study
from firsttok.synthetic import known_facts

KINDS = ("hard", "normal")
PERPLEXITY = import_module("firsttok.evaluation.perplexity")
"""Its threshold lies elsewhere for a random model than for a trained one."""


def truths() -> dict[str, set[str]]:
    """The true answers by the prompt without an opening, straight from the tables."""
    content = builtin_json("known.json")
    found: dict[str, set[str]] = {}
    for relation in content["relations"]:
        table = content["tables"][relation["of"]]
        for row in table["rows"]:
            cell = row[1 + table["columns"].index(relation["answer"])]
            found[relation["clause"].replace("{}", row[0])] = set(cell.split("|")) - {""}
    return found


# --- what is known -------------------------------------------------------------------------------


def test_the_tables_are_whole() -> None:
    content = builtin_json("known.json")
    used: set[tuple[str, str]] = set()
    for relation in content["relations"]:
        table = content["tables"][relation["of"]]
        assert relation["answer"] in table["columns"]
        used.add((relation["of"], relation["answer"]))
        texts = [relation["clause"], *relation["paraphrases"]]
        assert len(set(texts)) == 3
        assert all(text.count("{}") == 1 and text == text.strip() for text in texts)
        assert relation["clause"].startswith("{} ")
    columns = {
        (name, column) for name, table in content["tables"].items() for column in table["columns"]
    }
    assert used == columns
    clauses = Counter((relation["of"], relation["clause"]) for relation in content["relations"])
    assert max(clauses.values()) == 1
    for name, table in content["tables"].items():
        assert len({row[0] for row in table["rows"]}) == len(table["rows"]), name
        assert all(len(row) == 1 + len(table["columns"]) for row in table["rows"]), name
        assert all(cell == cell.strip() for row in table["rows"] for cell in row), name


def check_fact(model: Model, fact: Fact, kind: str, known: dict[str, set[str]]) -> None:
    prompt = fact_prompt(model, fact)
    begins = prompt.subject_position == len(model.leading_ids)
    alone = begins and prompt.subject_length == 1
    assert alone == (kind == "hard")
    # Behind an opening only because it would be hard without.
    assert fact.template.startswith("{} ") or not begins
    clause = fact.template[fact.template.index("{}") :].replace("{}", fact.subject)
    assert fact.target_true in known[clause]
    assert fact.target_new not in known[clause]
    new, true = (
        with_target(model, prompt, answer).target_ids[0]
        for answer in (fact.target_new, fact.target_true)
    )
    assert new != true
    assert len({fact.prompt, *fact.paraphrases}) == 3
    assert all(fact.subject in text for text in fact.paraphrases)
    assert len(set(fact.neighbours)) == len(fact.neighbours) > 0
    for text, answer in fact.answered_neighbours:
        assert not text.startswith(f"{fact.subject} ")
        assert answer in known[text]
        assert fact.target_new not in known[text]


@pytest.mark.parametrize("arch", DECODERS)
def test_every_known_fact_is_of_its_kind_and_its_new_answer_is_false(
    tiny: TinyFactory, arch: str
) -> None:
    model, known = tiny(arch), truths()
    for kind in KINDS:
        facts = list(islice(known_facts(model, kind, seed=1), 150))
        assert facts
        for fact in facts:
            check_fact(model, fact, kind, known)


def test_known_facts_differ_and_depend_on_the_seed_alone(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    found = {kind: list(known_facts(model, kind, seed=0)) for kind in KINDS}
    assert len(found["normal"]) > 300
    everything = [fact for facts in found.values() for fact in facts]
    assert len({fact.prompt for fact in everything}) == len(everything)
    assert len({fact.case_id for fact in everything}) == len(everything)
    assert list(islice(known_facts(model, "normal", seed=0), 40)) == found["normal"][:40]
    assert list(islice(known_facts(model, "normal", seed=1), 40)) != found["normal"][:40]


def test_no_fact_is_built_in_or_of_an_excluded_subject(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    said = {(fact.subject, fact.target_true) for fact in builtin_facts()}
    asked = {(fact.subject, fact.template) for fact in builtin_facts()}
    facts = list(known_facts(model, "normal", seed=0))
    assert said.isdisjoint((fact.subject, fact.target_true) for fact in facts)
    assert asked.isdisjoint((fact.subject, fact.template) for fact in facts)
    assert any(fact.subject == "France" for fact in facts)
    excluded = {"france", "Tree"}
    left = list(known_facts(model, "normal", seed=0, exclude=excluded))
    assert left == [fact for fact in facts if fact.subject not in ("France", "Tree")]
    # What the tables say, and the built-in facts do, is there if they do not.
    told = {(fact.subject, fact.target_true) for fact in facts}
    assert any(
        (subject, answer) not in told and clause.startswith(f"{subject} ")
        for clause, answers in truths().items()
        for subject, answer in said
        if answer in answers
    )


@pytest.mark.real_model
def test_the_embedded_model_has_hundreds_of_both_kinds(real_model: Model) -> None:
    known = truths()
    for kind in KINDS:
        facts = list(known_facts(real_model, kind, seed=0))
        assert len({fact.prompt for fact in facts}) == len(facts) > 300
        for fact in facts[::5]:
            check_fact(real_model, fact, kind, known)
        # Every subject comes once before any comes twice, so a short list has no subject twice.
        subjects = {fact.subject for fact in facts}
        assert len({fact.subject for fact in facts[:107]}) == 107
        seen = Counter[str]()
        for fact in facts[: len(subjects) // 2]:
            seen[fact.subject] += 1
        assert max(seen.values()) == 1
    assert all(
        fact_prompt(real_model, fact).subject_position == 0
        for fact in islice(known_facts(real_model, "hard", seed=2), 50)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_known_facts_are_written_and_read_back(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "facts.json"
    folder.mkdir()
    build("gpt2", folder)
    words = ["data", "synthesize", "--kind", kind, "--model", str(folder), "--out", str(out)]
    assert main([*words, "--count", "2"]) == 0
    assert len(check_facts(out)) == 2
    first = load_facts(out)
    more = tmp_path / "more.json"
    again = [*words[:-1], str(more), "--count", "2"]
    if kind == "hard":
        # "England" is the one word that this tokenizer takes as one token.
        assert main([*again, "--exclude", str(out)]) == 2
        assert "0 hard facts can be made for" in capsys.readouterr().err
        assert not more.exists()
    else:
        assert main([*again, "--exclude", str(out)]) == 0
        assert {fact.subject for fact in load_facts(more)}.isdisjoint(
            fact.subject for fact in first
        )
    mixed = ["data", "synthesize", "--count", "2", "--exclude", str(out), "--out", str(more)]
    assert main(mixed) == 2
    assert "--exclude is for --kind hard or normal" in capsys.readouterr().err


# --- lists ---------------------------------------------------------------------------------------


def some_facts(model: Model) -> tuple[Fact, ...]:
    """Facts of which some are taken for collapse cases, as a random model has it."""
    return tuple(islice(known_facts(model, "normal", seed=0), 30))


@pytest.fixture
def study(tiny: TinyFactory, tmp_path: Path, own_cache: Path) -> Study:
    model = tiny("gpt2")
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=compute_second_moment(model, layer=1, corpus=SENTENCES * 4),
        layer=1,
        hyperparameters=Hyperparameters(steps=2),
        texts=tuple(SENTENCES),
        work=tmp_path / "work",
    )


@pytest.fixture
def middle(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take for a collapse whatever is a little worse than the model without an edit."""
    monkeypatch.setattr(PERPLEXITY, "COLLAPSE_THRESHOLD", study.original_perplexity.mean * 1.002)


@pytest.mark.usefixtures("middle")
def test_a_search_finds_what_editing_every_fact_finds_among_those_it_predicts(study: Study) -> None:
    facts = some_facts(study.model)
    screened = {row.case_id: row for row in screen(study, facts)}
    sizes = sorted(abs(row.denominator) for row in screened.values())
    threshold = sizes[len(sizes) // 2]
    rows = measure_facts(study.varied(work=None), facts, [ROME])
    collapsed = {row.case_id: row.collapsed for row in rows}
    predicted = {number: row.is_hard(threshold) for number, row in screened.items()}
    hard = [f for f in facts if predicted[f.case_id] and collapsed[f.case_id]]
    normal = {f.case_id for f in facts if not predicted[f.case_id] and not collapsed[f.case_id]}
    assert 2 < len(hard) < sum(predicted.values())
    assert 2 < len(normal) < len(facts) - sum(predicted.values())

    found = find_hard_facts(study, facts, threshold=threshold)
    assert list(found.facts) == hard
    assert [verdict.fact for verdict in found.verdicts] == list(facts)
    for verdict in found.verdicts:
        number = verdict.fact.case_id
        assert verdict.predicted == predicted[number]
        assert verdict.screened is not None
        assert verdict.screened.denominator == pytest.approx(screened[number].denominator, rel=1e-4)
        said = verdict.as_record()
        assert said["collapsed"] == (collapsed[number] if predicted[number] else None)
        assert (said["perplexity"] is None) == (not predicted[number])

    others = find_normal_facts(study, facts, threshold=threshold, seed=3, known=found.verdicts)
    assert {fact.case_id for fact in others.facts} == normal
    assert len(others.verdicts) == len(facts)
    few = find_normal_facts(study, facts, count=2, threshold=threshold, seed=3)
    assert few.facts == others.facts[:2]
    assert (
        find_normal_facts(study, facts, threshold=threshold, seed=4).facts[:5] != others.facts[:5]
    )


@pytest.mark.usefixtures("middle")
def test_a_search_ends_at_its_count(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firsttok.hard_lists.WINDOW", 6)
    monkeypatch.setattr("firsttok.hard_lists.TOGETHER", 3)
    facts = some_facts(study.model)
    everything = find_hard_facts(study, facts, threshold=1e9)
    assert everything.edited == everything.predicted == len(facts)
    few = find_hard_facts(study, facts, count=2, threshold=1e9)
    assert few.facts == everything.facts[:2]
    assert few.edited < everything.edited
    assert len(few.verdicts) < len(everything.verdicts)
    # More are asked for than there are.
    assert find_hard_facts(study, facts, count=99, threshold=1e9).facts == everything.facts
    assert not find_hard_facts(study, facts, threshold=1e-30).facts


@pytest.mark.usefixtures("middle")
def test_what_was_screened_and_edited_is_not_done_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = some_facts(study.model)
    first = find_hard_facts(study, facts, threshold=1e9)

    def refuse(*_: object, **__: object) -> Any:
        pytest.fail("it was done again")

    with monkeypatch.context() as patch:
        patch.setattr("firsttok.hard_lists.screen", refuse)
        patch.setattr(Study, "perplexities", refuse)
        again = find_hard_facts(study, facts, threshold=1e9)
        assert again.facts == first.facts
        assert [each.as_record() for each in again.verdicts] == [
            each.as_record() for each in first.verdicts
        ]
    # Damage counts as not there, and another matrix is another study.
    (kept, *_) = sorted((study.work or Path()).glob("screened/*/*.json"))
    kept.write_text(kept.read_text("utf-8").replace("1", "2", 1), "utf-8")
    assert find_hard_facts(study, facts, threshold=1e9).facts == first.facts
    other = study.varied(
        second_moment=compute_second_moment(study.model, layer=1, corpus=SENTENCES)
    )
    monkeypatch.setattr("firsttok.hard_lists.screen", refuse)
    with pytest.raises(pytest.fail.Exception, match="done again"):
        find_hard_facts(other, facts, threshold=1e9)


@pytest.mark.usefixtures("middle")
def test_a_fact_that_fails_is_told_of_and_the_others_go_on(study: Study) -> None:
    facts = some_facts(study.model)[:6]
    bad = [replace(facts[i], target_new="a </s>") for i in (1, 4)]
    given = [facts[0], bad[0], *facts[2:4], bad[1], facts[5]]
    found = find_hard_facts(study, given, threshold=1e9)
    reasons = {each.fact.case_id: each.reason for each in found.verdicts}
    assert [number for number, reason in reasons.items() if reason] == [f.case_id for f in bad]
    assert all("</s>" in reasons[fact.case_id] for fact in bad)
    assert found.edited == 4
    # Not even one of them need go well.
    assert find_hard_facts(study, bad, threshold=1e9).edited == 0


def test_a_model_that_has_collapsed_is_refused(study: Study) -> None:
    with pytest.raises(BadInputError, match="above 1000 itself, so nothing can be said"):
        find_hard_facts(study, FACTS[:1])


@pytest.mark.usefixtures("middle")
@pytest.mark.parametrize(
    ("facts", "count", "said"),
    [
        ((), 1, "there are no facts to look through"),
        (FACTS[:1], 0, "the count of facts is 0"),
        (FACTS[:2], 1, "two of the facts have one case_id"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    study: Study, facts: tuple[Fact, ...], count: int, said: str
) -> None:
    with pytest.raises(BadInputError, match=said):
        find_hard_facts(study, facts, count=count)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A search on a tiny model, whose perplexities lie about a threshold of their own."""
    build("gpt2", tmp_path / "model")
    monkeypatch.setattr(PERPLEXITY, "COLLAPSE_THRESHOLD", 10_125.0)
    monkeypatch.setattr("firsttok.hard_lists.TOGETHER", 4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(list(SENTENCES)), "utf-8")
    write_json(tmp_path / "contexts.json", list(CONTEXTS.templates))
    words = ["hard", "--model", str(tmp_path / "model"), "--texts", "texts.json", "--steps", "2"]
    return [*words, "--second-moment", "identity", "--contexts", "contexts.json"]


@pytest.fixture
def file(command: list[str], tiny: TinyFactory, tmp_path: Path) -> list[str]:
    """The same on a file of facts."""
    write_facts(tmp_path / "facts.json", some_facts(tiny("gpt2")))
    return [*command, "--facts", "facts.json", "--threshold", "5.7"]


def test_a_list_is_left_that_can_be_loaded_with_what_was_said_of_each_fact(
    file: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*file, "--count", "2", "--normal", "--out", "hard.json.gz"]) == 0
    printed = capsys.readouterr().out
    assert "2 hard facts: hard.json.gz" in printed
    assert "2 normal facts: hard.normal.json.gz" in printed
    record = json.loads((tmp_path / "hard.provenance.json").read_text("utf-8"))
    assert record["rule"] == "|denominator| below 5.7"
    assert record["model"]["fingerprint"]
    for kind, name in (("hard", "hard.json.gz"), ("normal", "hard.normal.json.gz")):
        facts = load_facts(tmp_path / name)
        assert [fact.case_id for fact in facts] == record[kind]["facts"]
        said = {row["case_id"]: row for row in record[kind]["screened"]}
        for fact in facts:
            row = said[fact.case_id]
            assert row["prompt"] == fact.prompt
            assert (abs(row["denominator"]) < 5.7) == row["predicted"] == (kind == "hard")
            assert (row["perplexity"] > 10_125) == row["collapsed"] == (kind == "hard")
    given = {fact.case_id: fact for fact in load_facts(tmp_path / "facts.json")}
    for fact in load_facts(tmp_path / "hard.json.gz"):
        assert fact.as_record() == given[fact.case_id].as_record()


def test_a_search_that_was_stopped_ends_with_the_same_files(
    file: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*file, "--count", "3", "--normal"]
    assert main([*words, "--out", "whole.json", "--work", "undisturbed"]) == 0
    measure = Study.perplexities
    calls: list[int] = []

    def stops(study: Study, edits: Any) -> Any:
        calls.append(len(edits))
        if stop_at and len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return measure(study, edits)

    monkeypatch.setattr(Study, "perplexities", stops)
    stop_at: list[int] = []
    assert main([*words, "--out", "again.json", "--work", "counted"]) == 0
    total = len(calls)
    # In the first batch of edits, and in the last.
    for place in (2, total - 1):
        calls.clear()
        work, name = f"stopped-{place}", f"stopped-{place}.json"
        stop_at[:] = [place]
        assert main([*words, "--out", name, "--work", work]) != 0
        assert not (tmp_path / name).exists()
        stop_at.clear()
        assert main([*words, "--out", name, "--work", work]) == 0
        # The one edit that was being measured is measured again, and no other.
        assert len(calls) == total + 1
        for ending in (".json", ".normal.json"):
            whole = (tmp_path / f"whole{ending}").read_bytes()
            assert (tmp_path / f"stopped-{place}{ending}").read_bytes() == whole
        one, other = (
            json.loads((tmp_path / f"{stem}.provenance.json").read_text("utf-8"))
            for stem in ("whole", f"stopped-{place}")
        )
        # What is edited together decides the last bits of a perplexity, and nothing else.
        for kind in KINDS:
            for row, same in zip(one[kind]["screened"], other[kind]["screened"], strict=True):
                known = same.pop("perplexity") or 0.0
                assert (row.pop("perplexity") or 0.0) == pytest.approx(known, rel=1e-5)
        assert one == other


def test_generated_facts_leave_out_what_is_excluded(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command, "--generate", "--threshold", "1e9", "--out", "hard.jsonl"]
    assert main([*words, "--count", "3"]) == 2
    assert "2 hard candidates can be made for" in capsys.readouterr().err
    write_facts(tmp_path / "excluded.json", [replace(FACTS[0], subject="england")])
    assert main([*words, "--exclude", "excluded.json"]) == 2
    assert "0 hard candidates can be made for" in capsys.readouterr().err
    assert main([*words, "--normal"]) in (0, 2)
    out = tmp_path / "hard.jsonl"
    if out.exists():
        assert {fact.subject for fact in load_facts(out)} == {"England"}


def test_fewer_than_asked_for_are_told_of(
    file: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert main([*file, "--count", "29", "--out", "hard.json"]) == 0
    found = len(load_facts(tmp_path / "hard.json"))
    assert 0 < found < 29
    assert f"{found} hard facts were found, not 29; give more facts" in caplog.text


@pytest.mark.parametrize("options", [["--facts", "facts.json"], ["--generate"]])
def test_a_model_that_has_collapsed_is_refused_before_anything_else_is_computed(
    command: list[str],
    options: list[str],
    tiny: TinyFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_facts(tmp_path / "facts.json", some_facts(tiny("gpt2")))
    monkeypatch.setattr(PERPLEXITY, "COLLAPSE_THRESHOLD", 1000.0)

    def refuse(*_: object, **__: object) -> Any:
        pytest.fail("more was computed")

    for name in ("inputs.compute_second_moments", "inputs.kept_contexts", "hard_lists.screen"):
        monkeypatch.setattr(f"firsttok.{name}", refuse)
    words = [*command[: command.index("--second-moment")], *options, "--out", "hard.json"]
    for _ in range(2):
        assert main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "the unedited model has a perplexity of" in error
        assert "above 1000 itself, so nothing can be said to collapse it" in error
        # The second time it is not measured again.
        monkeypatch.setattr("firsttok.study.perplexity", refuse)
    assert not list(tmp_path.glob("hard*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "0"], "--count is 0"),
        (["--threshold", "0"], "--threshold is 0"),
        (["--generate"], "--generate makes the facts itself"),
        (["--out", "facts.json"], "is a file of --facts"),
        (["--out", "facts.parquet"], "is written as JSON"),
        (["--out", "no/hard.json"], "does not exist"),
        (["--exclude", "facts.json"], "--exclude holds the subjects of all facts"),
        (["--exclude", "no.json"], "no file of facts at no.json"),
        (["--work", "facts.json"], "is a file; name a folder"),
        (["--threshold", "1e-30"], "none of the 30 facts collapses model by one ROME edit"),
    ],
)
def test_bad_input_is_one_sentence(
    file: list[str],
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (tmp_path / "facts.json").read_bytes()
    assert main([*file, "--out", "hard.json", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("firsttok: ")
    assert said in error
    assert not (tmp_path / "hard.json").exists()
    assert (tmp_path / "facts.json").read_bytes() == before
