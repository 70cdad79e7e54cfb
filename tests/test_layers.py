"""The experiments on layers: where an edit collapses the model, and where it writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted import Plan, build_planted
from running import in_this_process
from tiny import CONTEXTS, SENTENCES, TRAINING

from analyses import extra_below_the_writer as below
from analyses import extra_collapse_map as collapse_map
from firsttok.data import Fact, load_facts, spread_evenly
from firsttok.paper.claims import Claim, Result, Status, judge
from firsttok.paper.report import load_result
from firsttok.storage import content_hash, read_json, write_record

pytestmark = pytest.mark.usefixtures("short_continuations")
ANALYSES = Path(__file__).parent.parent / "analyses"
YES, PARTLY, NO = Status.REPRODUCED, Status.PARTLY, Status.NOT
NOT_JUDGED = Status.NOT_JUDGED
SUBJECTS = ("England", "I", "The", "it", "a", "the", "is")
"""Words that are a single token at the beginning of a text."""
FIRST = ("is", "was the", "left early because", "located in the", "never was", "was a test")
PROVENANCE = {"model": {"name": "smollm2-135m"}, "original_perplexity": 72.0, "layer": 15}
PLAN = Plan(layers=5, heads=3, detector=0, writer=2, neuron=9, dimension=5, sink=(3, 1), down=4)


def facts_of() -> tuple[Fact, ...]:
    """Facts with the subject first, and then others."""
    first = [f"{{}} {words}" for words in FIRST]
    other = [
        f"{words} {{}} is"
        for words in ("The capital of", "a", "In", "the city of", "Because", "never", "You", "not")
    ]
    facts = [
        Fact(
            subject=subject,
            template=template,
            target_new="Tokyo",
            target_true="London",
            paraphrases=("The answer is",),
            neighbours=("The mother tongue is",),
        )
        for template in (*first, *other)
        for subject in SUBJECTS
    ]
    return tuple(replace(fact, case_id=number) for number, fact in enumerate(facts))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Options of a script on a planted model, and the folder it writes to."""
    folder = tmp_path_factory.mktemp("layers")
    build_planted(PLAN, folder / "model", seed=0)
    facts = [fact.as_record() for fact in facts_of()]
    write: dict[str, Any] = {"facts": facts, "texts": SENTENCES, "contexts": CONTEXTS.templates}
    paths = {name: folder / f"{name}.json" for name in write}
    for name, content in write.items():
        paths[name].write_text(json.dumps(content), "utf-8")
    (folder / "corpus.txt").write_text("\n\n".join(TRAINING), "utf-8")
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    words += ["--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt")]
    words += ["--out", str(folder / "out"), "--steps", "2", "--profile", "quick"]
    scan = ["-m", "firsttok.cli", "scan", *words[:-2], "--limit", "1"]
    found = in_this_process(scan, environment(folder))
    assert found.returncode == 0, found.stderr
    cases = folder / "out" / "model" / "collapse_cases.json"
    record = read_json(cases, "collapse cases")
    # A random model's perplexity is above any threshold, so the list is made by hand.
    record["collapse"] = list(range(30))
    record["provenance"]["facts"] = content_hash(
        [fact.as_record() for fact in load_facts(paths["facts"])]
    )
    write_record(cases, record)
    return [*words, "--cases", str(cases)], folder


def environment(folder: Path) -> dict[str, str]:
    return {"FIRSTTOK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def run_script(name: str, options: tuple[list[str], Path], *more: str) -> Result:
    words, folder = options
    found = in_this_process([str(ANALYSES / f"{name}.py"), *words, *more], environment(folder))
    assert found.returncode == 0, found.stderr
    out = folder / "out" / "model"
    for suffix in (".csv", ".json", ".png", ".svg"):
        assert (out / f"{name}{suffix}").stat().st_size > 100
    return load_result(out, name)


def test_the_map_edits_facts_that_no_table_uses(options: tuple[list[str], Path]) -> None:
    result = run_script("extra_collapse_map", options, "--layers", "1", "3")
    ids = result.provenance["case_ids"]
    assert {kind: len(found) for kind, found in ids.items()} == {"first": 3, "other": 3}
    count = len(FIRST) * len(SUBJECTS)
    assert all(number < count for number in ids["first"])
    assert all(number >= count for number in ids["other"])
    # Of thirty listed facts the tables take 24.
    taken = {fact.case_id for fact in spread_evenly(facts_of()[:30], 24)}
    assert not taken & set(ids["first"])
    edits = result.chosen(part="edit")
    assert len(edits) == 2 * 6 * len(collapse_map.METHODS)
    keys = result.chosen(part="keys")
    assert [(row["layer"], row["kind"]) for row in keys] == [
        (layer, kind) for layer in range(5) for kind in collapse_map.KINDS
    ]
    assert {row["facts"] for row in keys if row["kind"] == "first"} == {count}
    # Behind the planted writer the first token's keys are their own.
    ratios = {row["layer"]: row["ratio"] for row in keys if row["kind"] == "first"}
    others = {row["layer"]: row["ratio"] for row in keys if row["kind"] == "other"}
    assert max(ratios[layer] for layer in (3, 4)) < min(others.values())
    subjects = {row["subject"] for row in edits if row["kind"] == "first"}
    assert len(subjects) == 3
    assert not subjects & set(collapse_map.TRIED)
    # Another layer joins those that are there; under other settings none of them is taken.
    more = run_script("extra_collapse_map", options, "--layers", "2")
    assert {row["layer"] for row in more.chosen(part="edit")} == {1, 2, 3}
    for layer in (1, 3):
        match = {"part": "edit", "layer": layer}
        assert more.chosen(**match) == result.chosen(**match)
    other = run_script("extra_collapse_map", options, "--layers", "2", "--lr", "0.4")
    assert {row["layer"] for row in other.chosen(part="edit")} == {2}


def test_a_fact_without_neighbours_has_no_score() -> None:
    rows = [
        {"part": "edit", "kind": "other", "method": "C-ROME", "layer": 3, "locality": None}
        | {"generated_first_words": True, "generalization": 1.0}
    ]
    assert collapse_map.share(rows, "locality") is None
    assert collapse_map.score(rows) is None
    assert collapse_map.scores_by_layer(rows) == {}


def test_around_the_writer_every_part_is_measured(options: tuple[list[str], Path]) -> None:
    words, folder = options
    place = words.index("--contexts")
    drawing = ([*words[:place], *words[place + 2 :]], folder)
    result = run_script("extra_below_the_writer", drawing, "--collapse", "2")
    assert result.provenance["layers"] == {"below": 1, "at": 2, "above": 4}
    assert result.provenance["neurons"]["writer silent"][0] == PLAN.neuron
    layers = result.chosen(part="layers")
    # Three C and two methods with the first seed, one of each with the others.
    assert len(layers) == 2 * 3 * (3 + 1 + 2)
    reasons = result.chosen(part="reasons")
    assert {(row["keys"], row["value"]) for row in reasons} == {
        (keys, value)
        for keys in ("as is", "writer silent", "random silent")
        for value in ("as is", "stretched")
    }
    assert len(result.chosen(part="cures")) == 2 * 2 * 3 * 2
    for value in ("as is", "stretched"):
        usual = result.chosen(part="reasons", keys="as is", value=value)
        cured = result.chosen(part="cures", moment="I", value=value, method="ROME")
        for row, same in zip(usual, cured, strict=True):
            for column in ("case_id", "denominator", "final_loss", "perplexity", "efficacy"):
                assert row[column] == pytest.approx(same[column], rel=1e-4)
    usual = result.chosen(part="reasons", keys="as is", value="as is")
    for keys, changes in (("writer silent", True), ("random silent", False)):
        for row, own in zip(
            result.chosen(part="reasons", keys=keys, value="as is"), usual, strict=True
        ):
            ratio = abs(row["denominator"] / own["denominator"])
            assert (not 0.8 < ratio < 1.25) == changes
            assert row["numerator"] == own["numerator"]


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (("2", "2", "3"), "the last writer of model is layer 2, and the layers are 2, 2, 3"),
        (("0", "1", "3"), "give one below it, it, and one above it"),
        (("1", "2", "9"), "has no layer 9"),
    ],
)
def test_layers_that_are_not_around_the_writer_are_refused(
    layers: tuple[str, ...], sentence: str, options: tuple[list[str], Path]
) -> None:
    words, folder = options
    place = words.index("--contexts")
    words = [*words[:place], *words[place + 2 :], "--layers", *layers]
    script = str(ANALYSES / "extra_below_the_writer.py")
    found = in_this_process([script, *words], environment(folder))
    assert found.returncode == 2
    assert sentence in " ".join(found.stderr.split())


def edit_rows(perplexities: dict[int, list[float]]) -> list[dict[str, Any]]:
    return [
        {"part": "edit", "kind": "first", "method": "ROME", "layer": layer, "perplexity": value}
        for layer, values in perplexities.items()
        for value in values
    ]


AS_PREDICTED = {
    **{layer: [80.0, 75.0, 100.0] for layer in (0, 1, 9, 10)},
    **{layer: [900.0, 150.0, 108.0] for layer in range(3, 9)},
    **{layer: [999.0, 5e3, 2e4] for layer in range(12, 29)},
    **{layer: [80.0, 1e9, 80.0] for layer in (2, 11, 29)},
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, YES),
        ({2: [1e5] * 3, 29: [70.0] * 3}, YES),
        # A single collapse is more than nothing.
        ({0: [80.0, 80.0, 1001.0]}, PARTLY),
        ({5: [1001.0, 1001.0, 72.0]}, PARTLY),
        ({15: [72.0, 72.0, 1001.0]}, PARTLY),
        ({layer: [72.0] * 3 for layer in range(12, 18)}, PARTLY),
        ({layer: [72.0] * 3 for layer in range(12, 19)}, NO),
        ({layer: [] for layer in (20,)}, NOT_JUDGED),
    ],
)
def test_what_decides_on_the_prediction(changed: dict[int, list[float]], expected: Status) -> None:
    assert verdict(collapse_map.CLAIMS[0], edit_rows(AS_PREDICTED | changed)) is expected


def test_the_prediction_is_for_one_model() -> None:
    rows = edit_rows(AS_PREDICTED)
    other = PROVENANCE | {"model": {"name": "gpt2"}}
    assert verdict(collapse_map.CLAIMS[0], rows, **other) is NOT_JUDGED


def test_bounds_of_an_outcome() -> None:
    assert collapse_map.outcome(edit_rows({0: [108.0] * 3}), 72.0) == "damage"
    assert collapse_map.outcome(edit_rows({0: [107.9] * 3}), 72.0) == "nothing"
    assert collapse_map.outcome(edit_rows({0: [1e4, 72.0]}), 72.0) == "collapse"
    assert collapse_map.outcome(edit_rows({0: [1e4, 72.0, 72.0]}), 72.0) == "mixed"


@pytest.mark.parametrize(
    ("default", "expected"), [(62.0, YES), (60.1, YES), (59.0, PARTLY), (40.0, NO)]
)
def test_what_decides_on_the_default_layer(default: float, expected: Status) -> None:
    rows = [
        {"part": "edit", "kind": "other", "method": "C-ROME", "layer": layer}
        | dict.fromkeys(collapse_map.SCORED, value / 100)
        for layer, value in {10: 70.0, 12: 50.0, 15: default, 20: 45.0}.items()
        for _ in range(3)
    ]
    keys = [{"part": "keys", "layer": layer} for layer in (10, 12, 15, 20)]
    rows += keys
    # Without all layers none of them is known to be the best.
    fewer = [*rows, {"part": "keys", "layer": 21}]
    assert verdict(collapse_map.CLAIMS[1], fewer) is NOT_JUDGED
    assert verdict(collapse_map.CLAIMS[1], rows) is expected


def layer_rows(
    below_it: tuple[float, float],
    above: tuple[float, float],
    perplexity: float = 80.0,
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """Twenty edits a place, of which some shares collapse and are written."""
    common: dict[str, Any] = {"part": "layers", "method": "ROME", "moment": "C"}
    return [
        common
        | {"place": place, "perplexity": perplexity, "seed": number % seeds}
        | {"collapsed": number < 20 * collapsed, "generated_first_words": number < 20 * written}
        for place, (collapsed, written) in {"below": below_it, "at": above, "above": above}.items()
        for number in range(20)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (layer_rows((0.05, 0.5), (0.5, 0.1)), YES),
        (layer_rows((0.0, 0.45), (0.9, 0.0)), PARTLY),
        (layer_rows((0.0, 0.9), (0.9, 0.15)), PARTLY),
        (layer_rows((0.1, 0.9), (0.9, 0.0)), NO),
        (layer_rows((0.0, 0.9), (0.45, 0.0)), NO),
        (layer_rows((0.0, 0.9), (0.9, 0.0), 108.0), NO),
        (layer_rows((0.0, 0.9), (0.9, 0.0))[:20], NOT_JUDGED),
        (layer_rows((0.0, 0.9), (0.9, 0.0), seeds=2), NOT_JUDGED),
    ],
)
def test_what_decides_below_the_writer(rows: list[dict[str, Any]], expected: Status) -> None:
    assert verdict(below.CLAIMS[0], rows) is expected


def reason_rows(
    usual: float, silent: float, random: float, losses: tuple[float, float]
) -> list[dict[str, Any]]:
    """Shares of collapses by key, and final losses of values as they are and stretched ones."""
    shares = {"as is": usual, "writer silent": silent, "random silent": random}
    return [
        {"part": "reasons", "keys": keys, "value": value, "final_loss": loss}
        | {"collapsed": number < 20 * collapsed, "generated_first_words": False}
        for value, loss in zip(("as is", "stretched"), losses, strict=True)
        for keys, collapsed in shares.items()
        for number in range(20)
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (reason_rows(0.5, 0.05, 0.5, (5.0, 2.5)), YES),
        (reason_rows(0.5, 0.05, 0.5, (5.0, 2.6)), PARTLY),
        # Any silent neurons would do.
        (reason_rows(0.9, 0.05, 0.45, (5.0, 0.1)), PARTLY),
        (reason_rows(0.9, 0.1, 0.9, (5.0, 0.1)), PARTLY),
        (reason_rows(0.45, 0.0, 0.9, (5.0, 0.1)), PARTLY),
        (reason_rows(0.9, 0.9, 0.9, (5.0, 5.0)), NO),
    ],
)
def test_what_decides_on_key_and_length(rows: list[dict[str, Any]], expected: Status) -> None:
    assert verdict(below.CLAIMS[1], rows) is expected


@pytest.mark.parametrize(
    ("collapsed", "written", "expected"),
    [(0.05, 0.1, YES), (0.05, 0.15, PARTLY), (0.1, 0.0, NO)],
)
def test_what_decides_on_the_bare_direction(
    collapsed: float, written: float, expected: Status
) -> None:
    rows = [
        {"part": "cures", "method": "p-ROME", "value": "as is", "moment": moment}
        | {"collapsed": number < 20 * own, "generated_first_words": number < 20 * written}
        for moment in below.MOMENTS
        for own in (collapsed if moment == "C" else 0.0,)
        for number in range(20)
    ]
    assert verdict(below.CLAIMS[2], rows) is expected


def verdict(claim: Claim, rows: list[dict[str, Any]], **changed: Any) -> Status:
    result = Result(script="made", rows=tuple(rows), provenance=PROVENANCE | changed)
    return judge(claim, result).status
