"""The numbers that README and the docs write out are those of the committed results."""

import json
import re
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from firsttok.paper.report import build_report

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "figures" / "smollm2-135m"
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = (ROOT / "docs" / "explanation" / "results.md").read_text("utf-8")
BENCHMARKS = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))["benchmarks"]
ROME = "smollm2-135m, ROME"
TRACING = "extra_causal_tracing"


def written_cell(row: str, column: int) -> str:
    """A cell of the page's tables, by the text that its row begins with."""
    (line,) = re.findall(rf"^\| {re.escape(row)} \|.*$", RESULTS, re.MULTILINE)
    return line.strip("| ").split(" | ")[column].strip()


def found(script: str, line: str, column: str) -> Any:
    result = json.loads((FIGURES / f"{script}.json").read_text("utf-8"))
    (cells,) = [cells for cells in result["lines"] if cells[0] == line]
    return cells[result["columns"].index(column)]


def agrees(written: str, value: float) -> bool:
    """Whether a number is the value, rounded to the digits it is written with."""
    number = Decimal(written.replace(" ", ""))
    half = Decimal(5).scaleb(int(number.as_tuple().exponent) - 1)
    return abs(number - Decimal(value)) <= half * Decimal("1.000001")


def test_rounding_is_told_from_another_number() -> None:
    assert agrees("5.9e9", 5_927_819_842.9)
    assert not agrees("5.8e9", 5_927_819_842.9)
    assert agrees("26 084.66", 26084.66)
    assert not agrees("9.91", 9.904)


def test_what_readme_says_it_found_is_among_the_results() -> None:
    _, _, rest = README.partition("## What it found")
    told = re.sub(r"`[^`]*`|\]\([^)]*\)", "", rest.partition("\nNumbers, intervals")[0])
    number = r"\d[\d ]*\d(?:\.\d+)?|\d+(?:\.\d+)?"
    known = {each.strip() for each in re.findall(number, " ".join(RESULTS.split()))}
    written = {each.strip() for each in re.findall(number, " ".join(told.split()))}
    assert len(written) > 12
    assert written <= known


def test_the_edit_that_readme_shows() -> None:
    (written,) = re.findall(
        r"ROME collapsed the model: perplexity [\d.]+ before, (\S+) after", README
    )
    rows = json.loads((FIGURES / "collapse_cases.json").read_text("utf-8"))["rows"]
    (row,) = [row for row in rows if row["prompt"] == "France is located on the continent of"]
    assert agrees(written, row["perplexity"])


@pytest.mark.parametrize(
    ("benchmark", "pattern"),
    [
        ("edits", r"24 facts was edited ([\d.]+) times"),
        ("single", r"one fact ([\d.]+) times"),
        ("perplexity", r"the perplexity of an edit was measured ([\d.]+) times"),
    ],
)
def test_speed(benchmark: str, pattern: str) -> None:
    pair = BENCHMARKS[benchmark]["comparisons"][0]
    fast, naive = (
        [seconds / pair[side]["items"] for seconds in pair[side]["seconds"]]
        for side in ("fast", "naive")
    )
    (written,) = re.findall(pattern, README)
    assert agrees(written, median(slow / own for slow, own in zip(naive, fast, strict=True)))


@pytest.mark.parametrize(
    ("row", "pattern"), [(0, r"takes ([\d.]+) minutes there"), (1, r"([\d ]+\d) MiB of memory")]
)
def test_the_whole_reproduction(row: int, pattern: str) -> None:
    _, value = BENCHMARKS["reproduce"]["extras"]["tables"][0]["rows"][row]
    (written,) = re.findall(pattern, README)
    assert agrees(written, value)


@pytest.mark.parametrize(
    ("cases", "pattern"),
    [
        ("normal", r"denominators moved by up to ([\d.]+) %"),
        ("collapse", r"by up to ([\d.]+) % on collapse cases"),
    ],
)
def test_bfloat16(cases: str, pattern: str) -> None:
    table, _ = BENCHMARKS["bfloat16"]["extras"]["tables"]
    rows = {tuple(row[:3]): row[3:] for row in table["rows"]}
    limits = (ROOT / "docs" / "explanation" / "limits.md").read_text("utf-8")
    (written,) = re.findall(pattern, limits)
    assert agrees(written, 100 * rows["ROME", cases, "|denominator|"][-1])
    for method in ("ROME", "C-ROME"):
        for count in ("denominator below 0", "collapsed", "collapsed, in the weights"):
            assert rows[method, cases, count][-1] == "0 cases"


@pytest.mark.parametrize("part", ["numerator", "denominator"])
@pytest.mark.parametrize("cases", ["collapse", "normal"])
def test_table_1(part: str, cases: str) -> None:
    row = f"{'mean norm of' if part == 'numerator' else 'mean absolute'} {part}, {cases}"
    for column, name in ((1, ROME), (2, "paper, gpt2-xl")):
        value = found("table1_update_components", f"{part}, {cases} (n=24)", name)
        assert agrees(written_cell(row, column), value), (row, name)


@pytest.mark.parametrize("method", ["ROME", "C-ROME", "p-ROME", "FC-ROME"])
def test_table_2(method: str) -> None:
    for column, cases in ((1, "collapse"), (2, "normal")):
        line = f"{method}, {cases} (n=24)"
        value = found("table2_perplexity", line, "smollm2-135m, max")
        assert agrees(written_cell_of_table_2(method, column), value), line
        printed = found("table2_perplexity", line, "paper, gpt2-xl")
        written = written_cell_of_table_2(method, column + 2)
        assert written == "-" if printed is None else agrees(written, printed), line


def written_cell_of_table_2(method: str, column: int) -> str:
    _, _, rest = RESULTS.partition("| Table 2, maximum perplexity |")
    (line,) = re.findall(rf"^\| {method} \|.*$", rest.partition("\n\n")[0], re.MULTILINE)
    return line.strip("| ").split(" | ")[column].strip()


def test_causal_tracing() -> None:
    words = " ".join(RESULTS.split())
    ((facts, layer, default, moved, usual),) = re.findall(
        r"On (\d+) facts it proposes layer (\d+), not (\d+); there ROME collapses the model on "
        r"(\d+ of \d+) listed cases, at layer \d+ on (\d+ of \d+)",
        words,
    )
    assert int(facts) == found(TRACING, "mlp at the last subject token, all facts", "facts")
    for line, number, collapsed in (("proposed", layer, moved), ("default", default, usual)):
        assert int(number) == found(TRACING, f"ROME, {line}", "layer")
        assert collapsed == found(TRACING, f"ROME, {line}", "collapsed, listed")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("with the prefixes used for editing", "editing prefixes"),
        ("with prefixes of another seed", "held out prefixes"),
        ("bare", "bare"),
    ],
)
def test_probability_of_the_target(row: str, line: str) -> None:
    for column, method in ((1, "C-ROME"), (2, "FC-ROME")):
        ((mean, seeds),) = re.findall(r"^([\d.]+) \((?:seeds )?(.*)\)$", written_cell(row, column))
        assert agrees(mean, found("extra_value_anchor", f"{method}, {line}", "mean")), row
        assert seeds == found("extra_value_anchor", f"{method}, {line}", "means of the seeds")


def test_what_is_written_freely() -> None:
    ((*ours, cases, one, two, three),) = re.findall(
        r"begins with the target in (\d+), (\d+) and (\d+) of (\d+) cases after FC-ROME, "
        r"and in (\d+), (\d+) and (\d+) after C-ROME",
        " ".join(RESULTS.split()),
    )
    for method, counts in {"FC-ROME": ours, "C-ROME": [one, two, three]}.items():
        for kind, count in zip(
            ("editing prefixes", "held out prefixes", "bare"), counts, strict=True
        ):
            written = found("extra_value_anchor", f"{method}, {kind}", "written freely")
            assert written == f"{count} of {cases}"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("the first token, as it is", "first token"),
        ("the first token, allowed to attend to all others", "first token sees all"),
        ("the subject as a later token", "later token"),
        ("that later token, allowed to attend to itself only", "later token sees itself only"),
    ],
)
def test_where_the_key_comes_from(row: str, line: str) -> None:
    columns = ("mean |denominator|", "max perplexity", "collapsed")
    values = [found("extra_attention_mask", f"ROME, k^u from {line}", name) for name in columns]
    for column, value in enumerate(values[:2], start=1):
        assert agrees(written_cell(row, column), value), (row, column)
    assert written_cell(row, 3) == values[2]


def test_states_under_the_mask() -> None:
    words, script = " ".join(RESULTS.split()), "extra_attention_mask"
    ((first, last, layer, sentences, *norms, usual, opened, handed, all_sentences),) = re.findall(
        r"at each of the places (\d+) to (\d+) \(layer (\d+), (\d+) sentences\): .* "
        r"from between (\d+) and (\d+) to between ([\d ]+) and ([\d ]+), "
        r"as large as the first token's ([\d ]+), .* norm falls to (\d+) once .* "
        r"in (\d+) of (\d+) sentences one of tokens 1 to 10 becomes massive",
        words,
    )
    rows = json.loads((FIGURES / f"{script}.json").read_text("utf-8"))["rows"]
    states = [row for row in rows if row["part"] == "state"]
    assert {(row["layer"], row["n"]) for row in states} == {(int(layer), int(sentences))}
    for name, (low, high) in {"none": norms[:2], "later sees itself only": norms[2:]}.items():
        found_norms = {
            row["place"]: row["residual_norm"]
            for row in states
            if row["intervention"] == name and row["place"]
        }
        assert list(found_norms) == list(range(int(first), int(last) + 1))
        assert agrees(low, min(found_norms.values()))
        assert agrees(high, max(found_norms.values()))
    assert agrees(usual, found(script, "token 0, none", "residual norm"))
    assert agrees(opened, found(script, "token 0, first sees all", "residual norm"))
    largest = "largest of tokens 1 to 10"
    assert f"{handed} of {all_sentences}" == found(script, f"{largest}, first sees all", "massive")
    assert found(script, f"{largest}, none", "massive") == f"0 of {all_sentences}"


def test_spike_and_collapse_are_two_things() -> None:
    rows = json.loads((FIGURES / "figure7_without_bos.json").read_text("utf-8"))["rows"]
    at = {(row["subject"], row["bos"]): row for row in rows}
    ((norm, perplexity),) = re.findall(
        r"Google as a first token has ([\d ]+) and ends at a perplexity of (\d+)",
        " ".join(RESULTS.split()),
    )
    assert agrees(norm, at["Google", "without"]["residual_norm"])
    assert agrees(perplexity, at["Google", "without"]["perplexity"])
    plants = at["Plants", "with"]
    assert plants["collapsed"]
    assert plants["residual_norm"] < at["Google", "without"]["residual_norm"] / 100


def test_where_gemma_is_massive() -> None:
    ((bos, layer, others),) = re.findall(
        r"a norm of ([\d ]+) after layer (\d+), where other tokens have ([\d ]+)\)",
        " ".join(RESULTS.split()),
    )
    record = json.loads((FIGURES.parent / "inspect" / "gemma3-270m.json").read_text("utf-8"))
    views = {view["what"]: view for view in record["first_tokens"]}
    row = views["BOS itself"]["layers"][int(layer)]
    assert record["provenance"]["layer"] == row["layer"] == int(layer)
    assert agrees(bos, row["residual_first"])
    assert agrees(others, row["residual_subsequent"])
    assert row["layer"] in views["BOS itself"]["massive"]
    assert not any(view["massive"] for what, view in views.items() if what != "BOS itself")


def test_norms_of_both_acts() -> None:
    ((low, first, high, second),) = re.findall(
        r"a norm of (\d+) after layer (\d+), and of ([\d ]+) after layer (\d+) \(\[figure",
        " ".join(RESULTS.split()),
    )
    for written, line in ((low, f"layer {first}"), (high, f"layer {second}, edited")):
        assert agrees(written, found("figure8_concentration", line, "norm, first"))


def test_counts_of_the_scan() -> None:
    summary = json.loads((FIGURES / "collapse_cases.json").read_text("utf-8"))["summary"]
    others = summary["facts"] - summary["first_token_facts"]
    text = " ".join(RESULTS.split())
    assert f"edits all {summary['facts']} built-in facts" in text
    assert (
        f"on {summary['first_token_collapsed']} of the {summary['first_token_facts']} whose "
        f"subject is the first token, and on none of the {others} others"
    ) in text
    assert summary["other_collapsed"] == 0


def test_ratios_in_words() -> None:
    report = build_report(FIGURES)
    reasons = {judged.id: judged.reason for judged in report.judged}
    (written,) = re.findall(r"denominator is (\d+) times larger on normal cases", RESULTS)
    assert f"{written} times smaller by the mean" in reasons["table1-denominator"]
    shares = re.findall(r"(\d+) % (?:of tokens )?for (C-ROME|FC-ROME)", RESULTS)
    assert len(shares) == 2
    for share, method in shares:
        assert agrees(share, found("table4_efficacy", f"smollm2-135m, {method}", "efficacy"))


def test_circuit() -> None:
    record = json.loads((FIGURES / "circuit.json").read_text("utf-8"))
    text = " ".join(RESULTS.split())
    first, second = record["acts"]
    pattern = (
        r"layer (\d+) raises the norm of the first token to ([\d ]+), and layers (\d+) and (\d+) "
        r"lower it; layer (\d+) raises it to ([\d ]+), and layers (\d+) and (\d+) lower it\. Two "
        r"neurons of layer \d+ write ([\d.]+) % of the second act"
    )
    (told,) = re.findall(pattern, text)
    assert agrees(told[1], first["norm"])
    assert agrees(told[5], second["norm"])
    assert [int(told[0]), int(told[4])] == [first["writer"], second["writer"]]
    assert [int(x) for x in told[2:4]] == [step["layer"] for step in first["downs"]]
    assert [int(x) for x in told[6:8]] == [step["layer"] for step in second["downs"]]
    assert agrees(told[8], 100 * sum(neuron["share"] for neuron in second["neurons"][:2]))
    ((before, after),) = re.findall(r"perplexity goes from ([\d.]+) to ([\d ]+)\. A later", text)
    assert agrees(before, record["perplexity"])
    wanted = {"chosen": "top", "at": "first", "value": "zero"}
    (silent,) = [
        trial["perplexity"]
        for trial in second["knock_outs"]
        if wanted.items() <= trial.items() and len(trial["neurons"]) == 2
    ]
    assert agrees(after, silent)
    ((until, since, peak),) = re.findall(
        r"in layers 0 to (\d+), or in layers (\d+) to (\d+);", text
    )
    assert second["alone"] == {"until": int(until), "since": int(since)}
    assert int(peak) == second["peak"]
    (layer,) = re.findall(r"proposes to edit layer (\d+)", text)
    assert int(layer) == record["proposed_layer"]


def test_circuit_of_a_model_with_bos() -> None:
    record = json.loads((FIGURES.parent / "gemma3-270m" / "circuit.json").read_text("utf-8"))
    (act,) = record["acts"]
    shares = {origin["what"]: 100 * origin["share"] for origin in act["origins"]}
    pattern = (
        r"BOS as the fourth token reaches ([\d.]+) % of the first token's peak, and BOS that "
        r"attends to all tokens ([\d.]+) %\. A fourth token that attends only to itself "
        r"reaches ([\d.]+) %\. One neuron of layer (\d+) writes (\d+) % of what .* with the top "
        r"eight neurons silenced at BOS, ([\d.]+) % of the peak remains, since six layers write "
        r"it\. Commas in later places are massive, too, up to ([\d.]+) times"
    )
    (told,) = re.findall(pattern, " ".join(RESULTS.split()))
    for written, what in zip(
        told[:3],
        (
            "BOS as the fourth token",
            "the first token that sees all",
            "the fourth token that sees itself alone",
        ),
        strict=True,
    ):
        assert agrees(written, shares[what])
    assert int(told[3]) == act["writer"]
    assert agrees(told[4], 100 * act["neurons"][0]["share"])
    wanted = {"chosen": "top", "at": "first", "value": "zero"}
    silent = [trial for trial in act["knock_outs"] if wanted.items() <= trial.items()]
    assert agrees(told[5], 100 * max(silent, key=lambda trial: len(trial["neurons"]))["share"])
    assert len(act["ups"]) == 6
    (comma,) = [each for each in record["carriers"] if each["token"] == ","]
    assert agrees(told[6], comma["ratio"])


def test_where_a_collapse_acts() -> None:
    rows = json.loads((FIGURES / "extra_where_it_acts.json").read_text("utf-8"))["rows"]
    where = [row for row in rows if row["part"] == "where"]
    text = " ".join(RESULTS.split())
    pattern = (
        r"`extra_where_it_acts`, (\d+) collapse cases\)\. Applied at first tokens alone, it leaves "
        r"the perplexity at ([\d.]+) or below\. Applied at later tokens alone, it causes at least "
        r"([\d.]+) % of the rise of the log-perplexity\. The vector that it adds is at most "
        r"([\d.]+) % as long as a first token's residual stream, and at least ([\d.]+) % as long "
        r"as a later token's"
    )
    (told,) = re.findall(pattern, text)
    assert int(told[0]) == len(where)
    assert agrees(told[1], max(row["perplexity_first"] for row in where))
    assert agrees(told[2], 100 * min(row["rise_later"] for row in where))
    assert agrees(told[3], 100 * max(row["ratio_first"] for row in where))
    assert agrees(told[4], 100 * min(row["ratio_later"] for row in where))
