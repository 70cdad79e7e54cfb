"""Results of a sweep: every cell against plain arithmetic, queries that reach nothing else."""

import io
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from firsttok import rows as stored
from firsttok.cli import main
from firsttok.data import paper_values
from firsttok.data.paper import REBUILDING
from firsttok.editing import METHODS
from firsttok.errors import BadInputError
from firsttok.paper.tables import accuracy_line
from firsttok.rows import DONE, FAILED, Row, table_of, write_rows
from firsttok.sweep.groups import COLUMNS, method_label
from firsttok.sweep.results import RunResults, read_run
from firsttok.sweep.tables import ResultTable

NAMES = ("rome", "c-rome", "p-rome", "fc-rome")
ACCURACIES = ("efficacy", "generalization", "locality")
SCORES = ("es", "em", "ps", "pm", "ns", "nm")
ORIGINAL = 72.17


def row_of(model: str, case: int, method: str, **columns: Any) -> Row:
    """A row with numbers from a seed; the first cases' ROME edits collapse the model."""
    draw = random.Random(f"{model} {case} {method}")
    collapsed = method == "rome" and case % 3 == 0
    values: dict[str, Any] = {
        "first_token": case % 3 == 0,
        "one_token": True,
        "numerator": draw.uniform(1, 100),
        "denominator": draw.choice((-1, 1)) * (0.004 if case % 3 == 0 else 3) * draw.random(),
        "mean_delta": draw.uniform(1e-7, 1e-3),
        "steps": draw.randint(5, 20),
        "perplexity": draw.uniform(2000, 5e6) if collapsed else draw.uniform(70, 900),
        "collapsed": collapsed,
        **{name: draw.choice((0.0, 0.5, 1.0)) for name in (*ACCURACIES, "prefixed_efficacy")},
        "prefix": "I know. {}",
        **{name: draw.uniform(-0.2 if name == "nm" else 0, 1) for name in SCORES},
        "entropy": draw.random(),
        "generated": "Rome",
        "generated_exact": case % 2 == 0,
        "generated_first_words": True,
    }
    record: dict[str, Any] = {
        "model": model,
        "case_id": case,
        "layer": 1,
        "method": method,
        "status": DONE,
        "reason": None,
        "subject": f"Subject {case}",
        "prompt": f"Subject {case} is",
        "target_new": "Berlin",
        "target_true": "London",
        **values,
        **columns,
    }
    return Row(record)


def failure(row: Row, reason: str) -> Row:
    """The same row if it could not be done."""
    kept = ("model", "case_id", "layer", "method", "subject", "prompt", "target_new", "target_true")
    return Row({name: row[name] for name in kept} | {"status": FAILED, "reason": reason})


REST: dict[str, Any] = {"format": 2, "metrics": ["perplexity"], "seed": 0, "chunk": 5}
"""What a manifest holds besides."""


def save(folder: Path, rows: Sequence[Row], *, chunk: int = 5, **manifest: Any) -> Path:
    """Write a run as a sweep does."""
    models = list(dict.fromkeys(row.model for row in rows)) or ["tiny"]
    content = {
        "models": {model: {"layer": 1, "original_perplexity": ORIGINAL} for model in models},
        "facts": {"hash": "abc", "count": len({row.case_id for row in rows})},
        "methods": {name: {} for name in NAMES if any(row.method == name for row in rows)},
        **REST,
        **manifest,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(content), "utf-8")
    for model in models:
        own = [row for row in rows if row.model == model]
        cases = sorted({row.case_id for row in own})
        place = folder / "rows" / model.replace("/", "--")
        place.mkdir(parents=True, exist_ok=True)
        for index in range(0, len(cases), chunk):
            chosen = set(cases[index : index + chunk])
            kept = [row for row in own if row.case_id in chosen]
            write_rows(stored.shard_path(place, index // chunk), kept, seconds=1.0)
    return folder


def grid(
    models: Sequence[str] = ("tiny",), methods: Sequence[str] = NAMES, cases: int = 17
) -> list[Row]:
    """Every case by every method."""
    return [row_of(m, case, name) for m in models for case in range(cases) for name in methods]


def table_named(results: RunResults, name: str, model: str = "tiny") -> ResultTable:
    (found,) = (t for t in results.tables() if (t.name, t.model) == (name, model))
    return found


def cells(table: ResultTable) -> dict[str, dict[str, Any]]:
    """A table's cells by the first word of a line and its column."""
    found = {
        line[0].partition(" (")[0]: dict(zip(table.columns, line, strict=True))
        for line in table.lines
    }
    assert len(found) == len(table.lines)
    return found


def plain_mean(values: Sequence[float | None], scale: float = 1.0) -> Any:
    known = [value for value in values if value is not None]
    return pytest.approx(scale * sum(known) / len(known), rel=1e-12) if known else None


def group(rows: Sequence[Row], cases: str, method: str, model: str) -> list[Row]:
    """The definition, word by word."""
    chosen: list[Row] = []
    for row in rows:
        judges = [
            other.get("collapsed")
            for other in rows
            if (other.model, other.case_id, other.method) == (row.model, row.case_id, "rome")
        ]
        verdict = {True: "collapse", False: "normal", None: "not judged"}[
            judges[0] if judges else None
        ]
        if (row.model, row.method, row.status, verdict) == (model, method, DONE, cases):
            chosen.append(row)
    return chosen


def mixed() -> list[Row]:
    """Two models; failed rows, missing metrics, a case without a ROME row."""
    rows = grid(("tiny", "org/other"))
    changed: list[Row] = []
    for row in rows:
        if row.model == "tiny" and row.case_id == 3:
            changed.append(failure(row, "subject 'A' straddles \"b's\""))
        elif row.model == "tiny" and row.case_id == 4:
            changed.append(failure(row, "subject 'B' straddles 'c'"))
        elif row.model == "tiny" and (row.case_id, row.method) == (6, "c-rome"):
            changed.append(failure(row, "NonFiniteError: a key is NaN"))
        elif row.model == "tiny" and (row.case_id, row.method) == (7, "rome"):
            continue
        elif row.case_id == 9:
            changed.append(
                Row({**row, **dict.fromkeys(("generalization", "locality", "ps", "ns", "entropy"))})
            )
        else:
            changed.append(row)
    return changed


@pytest.mark.parametrize("make", [grid, mixed])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_every_cell_is_the_plain_arithmetic(
    make: Callable[[], list[Row]], chunk: int, tmp_path: Path
) -> None:
    rows = make()
    results = read_run(save(tmp_path / "run", rows, chunk=chunk))
    # A column that was not measured is there, and empty.
    whole = [Row({**dict.fromkeys(stored.COLUMNS), **row}) for row in rows]
    assert sorted(results.rows, key=str) == sorted(whole, key=str)
    for model in results.models:
        groups = ["collapse", "normal"]
        if model == "tiny" and make is mixed:
            groups.append("not judged")
        first = cells(table_named(results, "Table 1", model))
        second = cells(table_named(results, "Table 2", model))
        fourth = cells(table_named(results, "Table 4", model))
        fifth = cells(table_named(results, "Table 5", model))
        scores = cells(table_named(results, "Table R1", model))
        sizes = cells(table_named(results, "Figure R2", model))
        assert second["original"]["mean"] == ORIGINAL
        assert [line for line in first if line.endswith("not judged")] == [
            f"{part}, not judged" for part in ("numerator", "denominator") if len(groups) == 3
        ]
        for method in NAMES:
            label = method_label(method)
            for cases in groups:
                own = group(rows, cases, method, model)
                line = f"{label}, {cases}"
                for part in ("numerator", "denominator"):
                    sizes_of = [abs(getattr(row, part)) for row in own]
                    assert first[f"{part}, {cases}"][label] == plain_mean(sizes_of)
                values: list[Any] = [row.perplexity for row in own]
                found = second[line]
                assert found["mean"] == plain_mean(values)
                if values:
                    assert (found["min"], found["max"]) == (min(values), max(values))
                    assert found["max / original"] == max(values) / ORIGINAL
                if cases != "normal":
                    for name in ACCURACIES:
                        assert fourth[line][name] == plain_mean(
                            [getattr(row, name) for row in own], 100
                        )
                told = "efficacy" if cases == "normal" else "prefixed_efficacy"
                for column, name in zip(ACCURACIES, (told, *ACCURACIES[1:]), strict=True):
                    assert fifth[line][column] == plain_mean(
                        [getattr(row, name) for row in own], 100
                    )
                deltas: list[Any] = [row.mean_delta for row in own]
                entropies: list[Any] = [row.entropy for row in own if row.entropy is not None]
                assert sizes[line]["with entropy"] == len(entropies)
                if deltas:
                    assert sizes[line]["|Delta|, median"] == statistics.median(deltas)
                    assert sizes[line]["|Delta|, max"] == max(deltas)
                if entropies:
                    assert sizes[line]["entropy, min"] == min(entropies)
                    assert sizes[line]["entropy, median"] == statistics.median(entropies)
                    assert sizes[line]["entropy, max"] == max(entropies)
            done = [
                row for row in rows if (row.model, row.method, row.status) == (model, method, DONE)
            ]
            means: dict[str, float] = {}
            for name in SCORES:
                known = [getattr(row, name) for row in done if getattr(row, name) is not None]
                means[name] = 100 * sum(known) / len(known)
                assert scores[label][name.upper()] == pytest.approx(means[name], rel=1e-12)
            expected = 3 / (1 / means["es"] + 1 / means["ps"] + 1 / means["ns"])
            assert scores[label]["Score"] == pytest.approx(expected, rel=1e-12)
            assert scores[label]["cases"] == len(done)


def test_counts_of_lines_are_those_of_their_values(tmp_path: Path) -> None:
    results = read_run(save(tmp_path / "run", mixed()))
    lines = [line[0] for line in table_named(results, "Table 1").lines]
    # Case 3 of six collapse cases failed; case 6 only by C-ROME; case 7 has no ROME row.
    assert lines[0] == "numerator, collapse (n=4 to 5)"
    assert lines[1] == "numerator, normal (n=9)"
    assert lines[2] == "numerator, not judged (n=0 to 1)"
    assert "FC-ROME, not judged (n=1)" in [
        line[0] for line in table_named(results, "Table 2").lines
    ]
    assert "ROME, normal (n=9)" in [line[0] for line in table_named(results, "Table 2").lines]
    for name in ("Table 1", "Table 2", "Table 4", "Table 5", "Figure R2"):
        assert "collapsed in this run" in table_named(results, name).title


def test_accuracies_agree_with_those_of_the_scripts(tmp_path: Path) -> None:
    rows = mixed()
    results = read_run(save(tmp_path / "run", rows))
    chosen = group(rows, "collapse", "fc-rome", "tiny")
    plain = [{name: getattr(row, name) for name in ACCURACIES} for row in chosen]
    line = next(
        own for own in table_named(results, "Table 4").lines if own[0].startswith("FC-ROME")
    )
    assert list(line) == ["FC-ROME, collapse", *accuracy_line("", plain)[1:]]


def test_failures_are_counted_by_reason_most_frequent_first(tmp_path: Path) -> None:
    results = read_run(save(tmp_path / "run", mixed()))
    table = table_named(results, "Failed cases")
    assert table.columns == ("reason", "rows", "cases", "first case")
    assert table.lines == (
        ("subject '...' straddles '...'", 8, 2, 3),
        ("NonFiniteError: a key is NaN", 1, 1, 6),
    )
    assert "n=3" in table.title
    assert "Failed cases" not in [t.name for t in results.of("org/other").tables()]


def test_many_reasons_are_cut_but_counted(tmp_path: Path) -> None:
    rows = [failure(row_of("tiny", case, "rome"), f"reason {case}") for case in range(40)]
    table = table_named(read_run(save(tmp_path / "run", rows)), "Failed cases")
    assert table.lines[-1] == ("25 other reasons", 25, None, None)
    assert sum(line[1] for line in table.lines) == 40


def test_printed_numbers_stand_beside(tmp_path: Path) -> None:
    results = read_run(save(tmp_path / "run", grid()))
    first, second = (cells(table_named(results, f"Table {n}")) for n in (1, 2))
    assert first["numerator, collapse"]["paper, gpt2-xl, ROME"] == 168.55
    assert second["C-ROME, normal"]["paper, llama2-7b, max"] == 33.55
    assert second["FC-ROME, normal"]["paper, llama2-7b, max"] is None
    assert cells(table_named(results, "Table 4"))["paper, gpt2-xl, C-ROME, collapse"][
        "efficacy"
    ] == pytest.approx(5.19)
    fifth = cells(table_named(results, "Table 5"))
    assert fifth["paper, llama2-7b, C-ROME, collapse"]["efficacy"] == 91.27
    assert fifth["paper, gpt2-xl, C-ROME, normal"]["locality"] == 97.34
    scores = {line[0]: line for line in table_named(results, "Table R1").lines}
    assert scores["paper, gpt-j-6b, r-ROME (C-ROME)"][2:] == (
        *(99.74, 97.79, 99.09, 70.86, 80.62, 26.0, 92.22),
    )
    assert scores["paper, gpt2-xl, ROME"][-1] == 89.35


def test_the_printed_scores_are_harmonic_means() -> None:
    """Which the papers do not say; one of their nine is off by 0.03."""
    differences: list[float] = []
    for table in ("Table 1", "Table 2", "Table 4"):
        printed = {value.row: value.value for value in paper_values(table, paper=REBUILDING)}
        assert len(printed) == 21
        for name in ("Original", "r-ROME", "p-ROME"):
            parts = [printed[f"{name}/{column}"] for column in ("ES", "PS", "NS")]
            differences.append(abs(statistics.harmonic_mean(parts) - printed[f"{name}/Score"]))
    assert sorted(differences)[-2] < 0.011
    assert max(differences) < 0.035


def test_labels_are_those_of_the_methods() -> None:
    assert [method_label(method.name) for method in METHODS] == [m.label for m in METHODS]
    assert method_label("my-own") == "my-own"
    assert set(COLUMNS) <= set(stored.COLUMNS)


def test_only_rome_and_no_collapse_case(tmp_path: Path) -> None:
    rows = [
        row_of("tiny", case, "rome", collapsed=False, perplexity=80.0 + case, entropy=None)
        for case in range(4)
    ]
    results = read_run(save(tmp_path / "run", rows))
    second = cells(table_named(results, "Table 2"))
    assert second["ROME, collapse"] | {"": ""} == {
        "": "",
        **dict.fromkeys(("min", "mean", "max", "max / original")),
        "paper, gpt2-xl, max": 26084.66,
        "paper, gpt-j-6b, max": 25909.24,
        "paper, llama2-7b, max": 10574.76,
    }
    assert second["ROME, normal"]["mean"] == 81.5
    assert table_named(results, "Table 4").lines[0] == ("ROME, collapse", 0, None, None, None)
    assert cells(table_named(results, "Figure R2"))["ROME, normal"]["entropy, max"] is None


def test_a_run_without_rome_judges_nothing(tmp_path: Path) -> None:
    results = read_run(save(tmp_path / "run", grid(methods=("c-rome",), cases=4)))
    second = cells(table_named(results, "Table 2"))
    assert second["C-ROME, normal"]["mean"] is None
    assert second["C-ROME, not judged"]["mean"] is not None


def test_a_perplexity_that_was_not_measured_is_no_number(tmp_path: Path) -> None:
    rows = [row_of("tiny", n, "rome", perplexity=None, collapsed=None) for n in range(3)]
    results = read_run(save(tmp_path / "run", rows))
    assert cells(table_named(results, "Table 2"))["ROME, not judged"]["max"] is None
    assert cells(table_named(results, "Table 1"))["numerator, not judged"]["ROME"] > 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_perplexity_of_nan_is_the_worst(
    order: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [
        row_of("tiny", case, "rome", perplexity=value, collapsed=True)
        for case, value in zip(order, (float("nan"), 2000.0), strict=True)
    ]
    run = save(tmp_path / "run", both)
    found = cells(table_named(read_run(run), "Table 2"))["ROME, collapse"]
    assert (found["min"], found["max"]) == (2000.0, math.inf)
    assert main(["results", str(run)]) == 0
    assert "inf" in capsys.readouterr().out
    assert main(["results", str(run), "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert tables[1]["lines"][1][3] is None


def test_an_original_perplexity_may_be_unknown(tmp_path: Path) -> None:
    run = save(tmp_path / "run", grid(), models={"tiny": {"layer": 1}})
    second = cells(table_named(read_run(run), "Table 2"))
    assert second["original"]["max"] is None
    assert second["ROME, normal"]["max / original"] is None


def test_a_score_of_zero_or_missing(tmp_path: Path) -> None:
    zero = [row_of("tiny", n, "rome", ps=0.0) for n in range(3)]
    run = save(tmp_path / "zero", zero)
    assert table_named(read_run(run), "Table R1").lines[0][-1] == 0.0
    missing = [row_of("tiny", n, "rome", **dict.fromkeys(SCORES)) for n in range(3)]
    run = save(tmp_path / "missing", missing)
    assert table_named(read_run(run), "Table R1").lines[0][1:] == (0, *[None] * 7)


def test_a_frame_in_one_call(tmp_path: Path) -> None:
    rows = mixed()
    results = read_run(save(tmp_path / "run", rows))
    frame = results.frame()
    assert list(frame.columns) == list(stored.COLUMNS)
    assert len(frame) == len(rows)
    assert frame["case_id"].dtype == frame["steps"].dtype == pd.Int64Dtype()
    # A failed row's missing truth value does not stop the selection.
    collapsed = frame[frame["collapsed"]]
    assert len(collapsed) == sum(row.get("collapsed") is True for row in rows)
    expected = [row.perplexity for row in rows if row.method == "p-rome" and row.get("perplexity")]
    assert frame[frame["method"] == "p-rome"]["perplexity"].mean() == plain_mean(expected)


def test_an_unfinished_run_says_how_much_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in mixed() if row.case_id < 10]
    run = save(tmp_path / "run", rows, facts={"hash": "abc", "count": 20})
    # What a writer has not finished is no shard yet.
    (run / "rows" / "tiny" / ".chunk-000009.parquet.x.part").write_bytes(b"half")
    progress = {each.model: each for each in read_run(run).progress()}
    tiny = progress["tiny"]
    assert (tiny.planned, tiny.done, tiny.failed) == (80, 30, 9)
    assert tiny.collapsed == 3
    assert str(tiny) == "tiny: 39 of 80 rows (48 %), 9 of them failed; 41 still to do"
    assert main(["results", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "org/other: 40 of 80 rows (50 %), 0 of them failed; 40 still to do" in printed
    html = read_run(run)._repr_html_()
    assert ">tiny</th><td>80</td><td>30</td><td>9</td><td>3</td>" in html


def test_a_run_that_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path / "run", [], facts={"hash": "abc", "count": 20}, methods={"rome": {}})
    results = read_run(run)
    assert results.tables() == ()
    assert results.rows == ()
    assert results.frame().empty
    assert results.sql("SELECT count(*) AS n FROM rows")["n"].tolist() == [0]
    assert main(["results", str(run), "--csv", str(tmp_path / "rows.csv")]) == 0
    assert "tiny: 0 of 20 rows (0 %), 0 of them failed; 20 still to do" in capsys.readouterr().out
    assert (tmp_path / "rows.csv").read_text("utf-8").startswith("model,case_id,layer,method")
    save(run, [], models={}, methods={})
    assert main(["results", str(run)]) == 0
    assert "no model has begun" in capsys.readouterr().out


def test_a_label_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = "[red]a<b>[/red]"
    rows = [
        row_of(label, 0, "rome"),
        failure(row_of(label, 1, "rome"), "[bold]no[/bold] [/nonsense] key"),
    ]
    run = save(tmp_path / "run", [Row({**row, "model": label}) for row in rows])
    assert main(["results", str(run)]) == 0
    printed = capsys.readouterr().out
    assert label in printed
    assert "[bold]no[/bold] [/nonsense] key" in printed
    html = read_run(run)._repr_html_()
    assert "<b>" not in html
    assert "a&lt;b&gt;" in html


# The command


def test_the_command_prints_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(tmp_path / "run", mixed())
    assert main(["results", str(run)]) == 0
    printed = capsys.readouterr().out
    for name in ("Table 1.", "Table 2.", "Table 4.", "Table 5.", "Table R1.", "Figure R2."):
        assert printed.count(name) == 2
    assert printed.count("Failed cases") == 1
    assert "26,084.66" in printed
    assert main(["results", str(run), "--model", "org/other"]) == 0
    only = capsys.readouterr().out
    assert only.count("Table 1.") == 1
    assert "tiny" not in only


def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = mixed()
    run = save(tmp_path / "run", rows)
    csv = tmp_path / "deep" / "rows.csv"
    assert main(["results", str(run), "--json", "--csv", str(csv)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content.keys() == {"progress", "tables", "manifest"}
    assert content["progress"][0]["model"] == "tiny"
    results = read_run(run)
    assert [t["name"] for t in content["tables"]] == [t.name for t in results.tables()]
    assert content["tables"][0]["lines"] == [list(line) for line in results.tables()[0].lines]
    written = pd.read_csv(csv)
    assert len(written) == len(rows)
    assert written["perplexity"].sum() == pytest.approx(results.frame()["perplexity"].sum())


def test_a_query_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = mixed()
    run = save(tmp_path / "run", rows)
    query = (
        'SELECT method, count(*) AS "rows", avg(abs(denominator)) AS d, sum(steps) AS s '
        "FROM \"rows\" AS r WHERE status = 'done' GROUP BY method ORDER BY method"
    )
    frame = read_run(run).sql(query)
    assert list(frame.columns) == ["method", "rows", "d", "s"]
    for line in frame.itertuples(index=False, name=None):
        own: list[Any] = [row for row in rows if (row.method, row.status) == (line[0], DONE)]
        assert line[1] == len(own)
        assert line[2] == plain_mean([abs(row.denominator) for row in own])
        assert line[3] == sum(row.steps for row in own)
    csv = tmp_path / "answer.csv"
    assert main(["results", str(run), "--sql", query, "--csv", str(csv)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["method", "rows", "d", "s"]
    assert len(printed) == 1 + 4 + 1
    assert list(pd.read_csv(csv)["rows"]) == list(frame["rows"])
    assert main(["results", str(run), "--model", "tiny", "--json", "--sql", query]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["columns"] == ["method", "rows", "d", "s"]
    assert sum(line[1] for line in content["rows"]) == 17 * 4 - 1 - 9


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        ("SELECT NULL AS a, 1 AS a, true, 0.5::DECIMAL(3,1)", [[None, 1, True, 0.5]]),
        (
            "SELECT 'inf'::DOUBLE, 'nan'::DOUBLE, [1, NULL], {'k': 2}",
            [[None, None, [1, None], {"k": 2}]],
        ),
        (
            "SELECT DATE '2024-01-02', TIMESTAMP '2024-01-02 03:04:05'",
            [["2024-01-02", "2024-01-02 03:04:05"]],
        ),
        ("SELECT case_id FROM rows WHERE false", []),
        ("WITH r AS (FROM rows) SELECT max(case_id) FROM r;", [[16]]),
        ("SELECT steps FROM rows WHERE status = 'failed' LIMIT 1", [[None]]),
        ("SELECT count(*) FROM (DESCRIBE rows)", [[len(stored.COLUMNS)]]),
    ],
)
def test_answers_of_all_kinds_are_json(
    query: str, answer: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run", mixed())
    assert main(["results", str(run), "--json", "--sql", query]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == answer
    assert main(["results", str(run), "--sql", query]) == 0
    assert answer or "no rows (case_id)" in capsys.readouterr().out


REACHING_OUT = (
    "SELECT * FROM 'secret.csv'",
    "SELECT * FROM read_csv('secret.csv')",
    "SELECT * FROM read_text('{folder}/secret.csv')",
    "SELECT * FROM read_blob('{folder}/*')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM read_parquet('{folder}/run/rows/*/*.parquet')",
    "SELECT * FROM parquet_metadata('{folder}/run/rows/tiny/chunk-000000.parquet')",
    "SELECT * FROM sniff_csv('secret.csv')",
    "SELECT * FROM read_json_auto('run/manifest.json')",
    "SELECT * FROM query('FROM ''secret.csv''')",
    "SELECT * FROM table",
    "SELECT * FROM fields",
    "SELECT getenv('HOME')",
    "SELECT * FROM read_csv('https://localhost/x.csv')",
    "SELECT * FROM enable_logging('QueryLog', storage='file', storage_path='{folder}/logs')",
    "COPY rows TO '{folder}/out.csv'",
    "COPY (SELECT 1) TO '{folder}/run/rows/tiny/chunk-000000.parquet'",
    "SELECT 1; COPY rows TO '{folder}/out.csv'",
    "SELECT 1; SELECT 2",
    "EXPORT DATABASE '{folder}/out'",
    "ATTACH '{folder}/out.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PRAGMA enable_profiling = 'json'",
    "CREATE TABLE t AS SELECT 1",
    "CREATE VIEW rows AS SELECT 1",
    "DROP VIEW rows",
    "DELETE FROM rows",
    "INSERT INTO rows SELECT * FROM rows",
    "UPDATE rows SET perplexity = 0",
    "EXPLAIN SELECT 1",
    "PREPARE p AS SELECT 1",
    "SELECT * FROM rows WHERE case_id = ?",
    "-- nothing",
    "SELEC",
    "SELECT 'it",
    "SELECT nosuch FROM rows",
    "SELECT * FROM tiny",
    "SELECT error('a\nb')",
    "SELECT TIME '12:00:00+01'::TIMETZ + 1",
    "SELECT list(a) FROM range(2000000000) t(a)",
)


@pytest.mark.parametrize("query", REACHING_OUT)
def test_a_query_reaches_nothing_else(
    query: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = save(tmp_path / "run", grid(cases=2))
    (tmp_path / "secret.csv").write_text("password\nsesame\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["results", str(run), "--sql", query.replace("{folder}", str(tmp_path))]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sesame" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("firsttok: the query ")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "run'; COPY rows TO 'stolen.csv'; --",
        'a"b',
        "model=other",
        "glob*[ab]?",
        "space and ünïcode",
    ],
)
def test_names_of_folders_mean_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [Row({**row, "model": name}) for row in grid(cases=3)]
    run = save(tmp_path / name, rows)
    results = read_run(run)
    assert results.models == (name,)
    assert results.sql("SELECT DISTINCT model FROM rows")["model"].tolist() == [name]
    assert len(results.of(name).rows) == len(rows)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_figures_are_drawn_where_there_is_an_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        Row({**row, "entropy": None}) if row.model == "tiny" else row
        for row in grid(("tiny", "org/other.5b", "org/other.7b"), ("rome", "c-rome"))
    ]
    run = save(tmp_path / "run", rows)
    out = tmp_path / "figures"
    assert main(["results", str(run), "--figures", str(out)]) == 0
    # A figure for each, though the names differ after a dot alone.
    assert sorted(path.name for path in out.iterdir()) == [
        f"org--other.{size}_delta_entropy.{kind}"
        for size in ("5b", "7b")
        for kind in ("png", "svg")
    ]
    assert "org--other.5b_delta_entropy.png" in capsys.readouterr().out
    assert "tiny: no entropy was measured" in caplog.text


# What is wrong with a run


def truncate(run: Path) -> None:
    path = run / "rows" / "tiny" / "chunk-000001.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def scramble(run: Path) -> None:
    path = run / "rows" / "tiny" / "chunk-000001.parquet"
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)


def empty(run: Path) -> None:
    (run / "rows" / "tiny" / "chunk-000001.parquet").write_bytes(b"")


def folder(run: Path) -> None:
    (run / "rows" / "tiny" / "chunk-000009.parquet").mkdir()


def renamed(run: Path) -> None:
    path = run / "rows" / "tiny" / "chunk-000001.parquet"
    path.rename(path.with_name("chunk-000007.parquet"))


def copy(run: Path) -> None:
    path = run / "rows" / "tiny" / "chunk-000001.parquet"
    (run / "rows" / "copy").mkdir()
    (run / "rows" / "copy" / path.name).write_bytes(path.read_bytes())


def write_table(path: Path, table: Any) -> None:
    """A whole file of any table, with its checksum."""
    written = io.BytesIO()
    pq.write_table(table, written)
    path.write_bytes(stored._with_digest(written.getvalue(), path.name))


def without_checksum(run: Path) -> None:
    path = run / "rows" / "tiny" / "chunk-000001.parquet"
    table: Any = pq.ParquetFile(path).read()
    pq.write_table(table, path)


def twice(run: Path) -> None:
    path = run / "rows" / "tiny" / "chunk-000001.parquet"
    table: Any = pq.ParquetFile(path).read()
    write_table(path, pa.concat_tables([table, table.slice(0, 1)]))


def other_columns(run: Path) -> None:
    path = run / "rows" / "tiny" / "chunk-000001.parquet"
    table: Any = pq.ParquetFile(path).read()
    write_table(path, table.drop_columns(["subject"]))


def stranger(run: Path) -> None:
    save(run / "inner", [row_of("stranger", 0, "rome")])
    (run / "inner" / "rows" / "stranger").rename(run / "rows" / "stranger")


def other_method(run: Path) -> None:
    write_table(
        run / "rows" / "tiny" / "chunk-000099.parquet", table_of([row_of("tiny", 99, "memit")])
    )


def other_status(run: Path) -> None:
    table = table_of([row_of("tiny", 99, "rome", status="perhaps")])
    write_table(run / "rows" / "tiny" / "chunk-000099.parquet", table)


def manifest(content: str) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        (run / "manifest.json").write_text(content, "utf-8")

    return write


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated": (truncate, ("chunk-000001.parquet is damaged", "run the sweep or sequence again")),
    "scrambled": (scramble, ("chunk-000001.parquet is damaged", "run the sweep or sequence again")),
    "empty": (empty, ("chunk-000001.parquet is damaged",)),
    "folder": (folder, ("chunk-000009.parquet is damaged",)),
    "renamed": (renamed, ("chunk-000007.parquet is damaged, or was not written under this name",)),
    "no checksum": (without_checksum, ("chunk-000001.parquet is damaged, or",)),
    "copied": (copy, ("case 5 by c-rome", "copy/chunk-000001.parquet and", "tiny/chunk-000001")),
    "a row twice": (twice, ("case 5 by rome on tiny occurs more than once", "(1 rows do)")),
    "other columns": (other_columns, ("chunk-000001.parquet has other columns",)),
    "stranger": (stranger, ("holds rows of model 'stranger'", "manifest.json does not know")),
    "other method": (other_method, ("chunk-000099.parquet holds rows of method 'memit'",)),
    "other status": (other_status, ("holds rows of status 'perhaps'",)),
    "no manifest": (lambda run: (run / "manifest.json").unlink(), ("holds no run",)),
    "no JSON": (manifest("{"), ("is not valid JSON at line 1",)),
    "a list": (manifest("[]"), ("is not the manifest of a run",)),
    "no methods": (manifest('{"models": {}, "facts": {"count": 1}}'), ("no field methods",)),
    "no count": (
        manifest(json.dumps({name: {} for name in ("models", "facts", "methods")} | REST)),
        ("facts.count",),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence_and_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run", grid())
    damage, expected = DAMAGES[name]
    damage(run)
    assert main(["results", str(run)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("firsttok: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    for part in expected:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gpt-9"], "no model 'gpt-9' takes part"),
        (["--sql", "SELECT 1", "--figures", "x"], "--figures draws the whole run"),
        (["--csv", "manifest/rows.csv"], "manifest is a file; name a folder"),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = save(tmp_path / "run", grid())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest").write_text("a file", "utf-8")
    assert main(["results", str(run), *words]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(BadInputError, match="holds no run"):
        read_run(tmp_path / "nowhere")
