"""Facts and sentences: schemas, the built-in sets, and the paper's numbers."""

import json
import re
from pathlib import Path

import pytest

from firsttok.data import (
    SLIDES,
    builtin_facts,
    builtin_sentences,
    load_facts,
    load_texts,
    paper_values,
)
from firsttok.data.paper import FALL_OF_ROME
from firsttok.evaluation import score_targets
from firsttok.models import CATALOG, BosPolicy, Model
from firsttok.prompts import fact_prompt, with_target


def test_facts_round_trip_through_counterfact_schema(tmp_path: Path) -> None:
    facts = builtin_facts()
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([fact.as_record() for fact in facts]), "utf-8")
    again = load_facts(path)
    assert [fact.as_record() for fact in again] == [fact.as_record() for fact in facts]
    assert {fact.content_hash for fact in again} == {fact.content_hash for fact in facts}


@pytest.mark.parametrize("prompt", ["{} is located in", "Arthur is located in"])
def test_flat_records_of_hard_lists_are_read(tmp_path: Path, prompt: str) -> None:
    record = {
        "prompt": prompt,
        "subject": "Arthur",
        "target_new": " California",
        "ground_truth": "Illinois",
        "rephrase_prompt": "Arthur lies in",
        "locality_prompt": "Chicago is in",
    }
    path = tmp_path / "hard.json"
    path.write_text("\ufeff" + json.dumps([record]), "utf-8")
    (fact,) = load_facts(path)
    assert fact.template == "{} is located in"
    assert fact.prompt == "Arthur is located in"
    assert (fact.target_new, fact.target_true) == ("California", "Illinois")
    assert fact.paraphrases == ("Arthur lies in",)
    assert fact.neighbours == ("Chicago is in",)


def test_texts_of_both_schemas(tmp_path: Path) -> None:
    for content in (["One two.", " Three."], [{"Text": "One two."}, {"Text": " Three."}]):
        path = tmp_path / "texts.json"
        path.write_text(json.dumps(content), "utf-8")
        assert load_texts(path) == ("One two.", " Three.")


def test_paper_perplexity_data_is_read(shared: Path) -> None:
    assert len(load_texts(shared / "data" / "me-ppl" / "ME-PPL_50.json")) == 50
    assert len(load_texts(shared / "data" / "me-ppl" / "ME-PPL_1k.json")) == 1000


def test_builtin_sentences() -> None:
    sentences = builtin_sentences()
    lengths = [len(sentence.split()) for sentence in sentences]
    assert len(set(sentences)) == 50
    assert min(lengths) >= 10
    assert max(lengths) <= 60


def test_builtin_facts_are_complete() -> None:
    facts = builtin_facts()
    assert len(facts) >= 160
    assert len({fact.case_id for fact in facts}) == len(facts)
    for fact in facts:
        assert len(fact.paraphrases) == 2
        assert all(text.count(fact.subject) >= 1 for text in fact.paraphrases)
        assert len(set(fact.neighbours)) == 4
        assert all(fact.subject not in text for text in fact.neighbours)
        assert fact.target_new != fact.target_true


@pytest.mark.real_model
@pytest.mark.slow
def test_builtin_facts_on_the_embedded_model(real_model: Model) -> None:
    model = real_model.with_bos(BosPolicy.WITHOUT)
    facts = builtin_facts()
    prompts = [fact_prompt(model, fact) for fact in facts]
    first = [p for p in prompts if p.subject_position == 0 and p.subject_length == 1]
    second = [p for p in prompts if p.subject_position == 1 and p.subject_length == 1]
    assert len(first) >= 60
    assert len(second) >= 30
    scores = score_targets(
        model,
        [with_target(model, p, fact.target_true) for p, fact in zip(prompts, facts, strict=True)],
    )
    rightly = sum(score.accuracy == 1 for score in scores)
    # The page of conventions states this number; it changes only with the facts or the model.
    assert rightly == 170
    for fact, prompt in zip(facts, prompts, strict=True):
        new = with_target(model, prompt, fact.target_new)
        true = with_target(model, prompt, fact.target_true)
        assert new.target_ids[0] != true.target_ids[0]


def cells_of(table: str, paper: str = FALL_OF_ROME) -> dict[tuple[str, str], float]:
    return {(v.row, v.model): v.value for v in paper_values(table, paper=paper)}


def test_paper_values_are_the_printed_ones() -> None:
    table1, table2 = cells_of("Table 1"), cells_of("Table 2")
    assert table1["denominator/collapse", "llama2-7b"] == 0.01
    assert table1["numerator/normal", "gpt2-xl"] == 79.91
    assert table2["ROME/collapse", "gpt2-xl"] == 26084.66
    assert cells_of("Equation 4") == {("D(F)", "gpt2-xl"): 0.578, ("D(S)", "gpt2-xl"): 13.895}
    counts = [len(cells_of(f"Table {number}")) for number in range(1, 8)]
    assert counts == [12, 15, 8, 9, 18, 18, 18]
    assert cells_of("Table 2", SLIDES) == {}
    known = {spec.name for spec in CATALOG}
    for table in (*(f"Table {number}" for number in range(1, 8)), "Equation 4", "Text"):
        assert {model for _, model in cells_of(table)} <= known


def seed_text(shared: Path, number: str) -> str:
    (path,) = (shared / "seeds").glob(f"{number}_*.txt")
    return path.read_text("utf-8")


def printed_lines(text: str) -> set[tuple[float, ...]]:
    """The numbers at the end of every line of a table, in order."""
    found: set[tuple[float, ...]] = set()
    for line in text.splitlines():
        numbers: list[float] = []
        for cell in reversed(line.split("\t")):
            plain = cell.strip().replace(",", "").removesuffix("%")
            if not re.fullmatch(r"[\d.]+", plain):
                break
            numbers.insert(0, float(plain))
        found.add(tuple(numbers))
    return found


def expected_lines(table: str) -> list[tuple[float, ...]]:
    """The lines a table must have, in the paper's own arrangement of rows and columns."""
    cells = cells_of(table)
    rows = list(dict.fromkeys(row for row, _ in cells))
    models = list(dict.fromkeys(model for _, model in cells))
    if table in ("Table 1", "Table 2", "Table 3"):
        return [tuple(cells[row, model] for model in models) for row in rows]
    if table == "Table 4":
        return [tuple(cells[row, model] for row in rows) for model in models]
    heads, tails = [list(dict.fromkeys(r.split("/")[i] for r in rows)) for i in (0, 1)]
    if table == "Table 5":
        groups = [[f"{head}/{tail}" for tail in tails] for head in heads]
    else:
        groups = [[f"{head}/{tail}" for head in heads] for tail in tails]
    return [tuple(cells[row, model] for row in group) for model in models for group in groups]


@pytest.mark.parametrize("table", [f"Table {number}" for number in range(1, 8)])
def test_every_line_of_a_table_stands_in_the_paper(shared: Path, table: str) -> None:
    text = seed_text(shared, "000")
    assert f"{table}: " in text
    lines = expected_lines(table)
    assert sum(map(len, lines)) == len(cells_of(table))
    assert set(lines) <= printed_lines(text)


def test_numbers_of_the_running_text_stand_there(shared: Path) -> None:
    text = " ".join(seed_text(shared, "000").split())
    for sentence in (
        "yielding $D(F)$ being 0.578 and $D(S)$ being 13.895",
        "*normal cases*, comprising 1000 random samples",
        "amounting to just 21 out of 21,919 samples in the COUNTERFACT dataset",
        "an equal number (77) of subsequent tokens",
        "the edited layer (layer 17) in GPT-2-XL",
        "prior to layer 8, $D(F)$ and $D(S)$ exhibit no significant divergence",
    ):
        assert sentence in text
    assert sorted(cells_of("Text").values()) == [8, 17, 21, 77, 1000, 1000, 21919]


def test_numbers_of_the_slides_stand_there(shared: Path) -> None:
    text = " ".join(seed_text(shared, "002").split())
    counts = cells_of("HardCF", SLIDES)
    for sentence, model in (
        ("77 instances for GPT-2-XL", "gpt2-xl"),
        ("85 for GPT-J", "gpt-j-6b"),
        ("21 for Llama2-7b", "llama2-7b"),
    ):
        assert sentence in text
        assert counts["collapse cases", model] == int(sentence.split()[0])
    shown = [value.value for value in paper_values("Task performance", paper=SLIDES)]
    shown += [value.value for value in paper_values("Sequential editing", paper=SLIDES)]
    # Written with and without a power of ten, and some run into the next one.
    plain = text.replace(" ", "")
    numbers = {float(word) for word in re.findall(r"\d+\.\d\d(?!\d)|0\.\d{4}", plain)}
    powers = re.findall(r"(\d\.\d\d)\\times10\^\{?(\d+)", plain)
    numbers |= {round(float(digits) * 10 ** int(power), 2) for digits, power in powers}
    assert len(shown) == 24 + 63
    assert {round(value, 4) for value in shown} <= {round(value, 4) for value in numbers}


@pytest.mark.parametrize(
    ("name", "layer", "steps", "weight_decay"),
    [
        ("gpt2-xl", 17, 20, 0.5),
        ("gpt-j-6b", 5, 20, 0.5),
        ("llama2-7b", 5, 25, 1e-3),
        ("mistral-7b", 5, 25, 1e-3),
        ("smollm2-135m", 15, 25, 1e-3),
    ],
)
def test_catalog_has_the_released_settings(
    name: str, layer: int, steps: int, weight_decay: float
) -> None:
    (spec,) = [spec for spec in CATALOG if spec.name == name]
    settings = spec.hyperparameters
    assert spec.layer == layer
    assert (settings.steps, settings.weight_decay) == (steps, weight_decay)
    assert (settings.learning_rate, settings.clamp, settings.kl) == (0.5, 4.0, 0.0625)
    assert settings.stop_below == 5e-2


def test_every_hub_model_is_pinned_to_a_commit() -> None:
    for spec in CATALOG:
        if spec.hub_id is not None:
            assert spec.revision is not None
            assert len(spec.revision) == 40
