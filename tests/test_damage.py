"""Files with odd content and queries without an end: one sentence, whatever is in them."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_printing import obeyed
from test_results import grid, save
from tiny import BARE_ONLY, FACTS, TinyFactory

import firsttok as ft
from firsttok.cli import main
from firsttok.contexts import load_contexts
from firsttok.errors import BadInputError, FirsttokError
from firsttok.paper.cases import load_scan
from firsttok.rows import FACT, METRIC_COLUMNS, REPORT
from firsttok.sweep.query import select
from firsttok.sweep.results import read_run

ROOT = Path(__file__).parent.parent
_GONE: Any = object()
ODD: tuple[Any, ...] = (
    *(None, [], {}, "x", "", "[/red]\x1b", -1, 0, True, 1.5, 2**70),
    *(float("inf"), float("nan"), [[1]], {"a": {"b": None}}, _GONE),
)
"""What may stand in a file in place of anything."""


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested JSON."""
    yield place
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*place, key))


def with_odd(content: Any) -> Iterator[tuple[str, Any]]:
    """The content with each part in turn replaced by each odd thing, or gone."""
    for place in places(content):
        for odd in ODD:
            changed: Any = {"": copy.deepcopy(content)}
            inner = changed
            for key in ("", *place)[:-1]:
                inner = inner[key]
            if odd is _GONE:
                del inner[("", *place)[-1]]
            else:
                inner[("", *place)[-1]] = odd
            if changed:
                yield f"{'.'.join(map(str, place))}: {odd!r}", changed[""]


def test_every_part_is_replaced_by_everything() -> None:
    found = dict(with_odd({"a": [1]}))
    assert len(found) == 3 * len(ODD) - 1
    assert found[f"a.0: {2**70!r}"] == {"a": [2**70]}


def test_a_manifest_that_was_damaged_is_read_or_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run", grid(cases=2), told={"facts": "f", "labels": {"rome": "R"}})
    path = run / "manifest.json"
    refused = taken = 0
    # Each part with a third of what is odd, in turn: all of it takes half a minute.
    content_of = list(with_odd(json.loads(path.read_text("utf-8"))))[::3]
    for what, content in content_of:
        path.write_text(json.dumps(content), "utf-8")
        codes = [main(argv) for argv in (["sweep", "status", str(run)], ["results", str(run)])]
        captured = capsys.readouterr()
        assert set(codes) <= {0, 2}, what
        assert obeyed(captured.out + captured.err) == [], what
        assert len(captured.err.splitlines()) == codes.count(2), what
        assert captured.out or 0 not in codes, what
        refused += codes.count(2)
        taken += codes.count(0)
    assert min(refused, taken) > 50


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "\x00", "\ufffe", '{"models": ' + "1" * 5000 + "}", "nul", "{" * 9],
    ids=["empty", "deep", "NUL", "no character", "digits", "cut", "braces"],
)
@pytest.mark.parametrize("command", [["sweep", "status"], ["results"]])
def test_a_manifest_that_is_no_json_is_refused(
    command: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run", grid(cases=2))
    (run / "manifest.json").write_text(text, "utf-8")
    assert main([*command, str(run)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_an_edit_with_odd_metadata_is_read_or_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("gpt2")
    path = tmp_path / "edit.safetensors"
    edit = ft.compute_edit(
        model,
        FACTS[0],
        method="rome",
        contexts=BARE_ONLY,
        second_moment=ft.SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=ft.Hyperparameters(steps=2),
    )
    record = {
        "layer": edit.layer,
        "stack": "blocks",
        "report": dict(edit.report),
        "losses": list(edit.losses),
        "provenance": edit.provenance,
    }
    tensors = {"left": edit.left, "right": edit.right}
    taken = 0
    said: list[str] = []
    for what, content in with_odd(record):
        save_file(tensors, path, {"firsttok_edit": json.dumps(content)})
        try:
            read = ft.load_edit(path)
        except BadInputError as error:
            said.append(str(error))
            continue
        taken += 1
        shown = read.panel()
        assert obeyed(shown.text + shown.html) == [], what
        assert isinstance(read.layer, int), what
        try:
            with read.applied(model):
                pass
        except FirsttokError:
            continue
    assert all("is no edit saved by firsttok" in sentence for sentence in said)
    assert min(len(said), taken) > 50


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"layer": ' + "1" * 5000 + "}", "", "7", '"text"', "null"]
)
def test_metadata_that_are_no_record_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    tensors = {"left": torch.zeros(3), "right": torch.zeros(2)}
    save_file(tensors, path, {"firsttok_edit": text})
    with pytest.raises(BadInputError, match="is no edit saved by firsttok"):
        ft.load_edit(path)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_vectors_of_whole_numbers_are_no_edit(kind: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    report = dict.fromkeys(("numerator", "denominator"), 1.0)
    record = {"layer": 0, "stack": "blocks", "report": report, "losses": [], "provenance": {}}
    tensors = {"left": torch.zeros(3).to(kind), "right": torch.zeros(2).to(kind)}
    save_file(tensors, path, {"firsttok_edit": json.dumps(record)})
    with pytest.raises(BadInputError, match=r"wrong shape or type|is no edit"):
        ft.load_edit(path)


def test_a_list_of_cases_and_contexts_with_odd_content_are_read_or_refused(tmp_path: Path) -> None:
    columns = {**FACT, **REPORT, **METRIC_COLUMNS["perplexity"]}
    row = {name: {str: "a", bool: True}.get(kind, 1) for name, kind in columns.items()}
    scanned = {"rows": [row], "provenance": {"model": {"fingerprint": "f"}}, "collapse": [1]}
    saved = {"templates": ["{}"], "seed": 1, "model_fingerprint": "f", "leading_ids": [1]}
    path = tmp_path / "file.json"
    for read, content in ((load_scan, scanned), (load_contexts, saved)):
        said: list[str] = []
        for what, changed in with_odd(content):
            path.write_text(json.dumps(changed), "utf-8")
            try:
                found = read(path)
            except BadInputError as error:
                said.append(str(error))
                continue
            if isinstance(found, tuple):
                numbers = [abs(each.denominator) + each.steps for each in found[0]]
                assert all(isinstance(number, float) for number in numbers), what
        assert all(str(path) in sentence for sentence in said)
        assert len(said) > 10


COUNTING = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT {} FROM r"
ENDLESS = {
    "counted": COUNTING.format("count(*)"),
    "listed": COUNTING.format("n"),
    "the same again": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n FROM r) SELECT n FROM r",
    "a join": f"SELECT count(*) FROM {', '.join(f'rows r{i}' for i in range(9))}",
    "sorted": "SELECT * FROM range(100000000000) ORDER BY 1 DESC LIMIT 1",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_query_without_an_end_is_given_up(name: str, tmp_path: Path) -> None:
    results = read_run(save(tmp_path / "run", grid(cases=17)))
    start = time.monotonic()
    with pytest.raises(BadInputError, match=r"not answered in 0\.5 seconds.*--sql-seconds"):
        results.sql(ENDLESS[name], seconds=0.5)
    assert time.monotonic() - start < 10
    assert list(results.sql("SELECT count(*) AS n FROM rows")["n"]) == [4 * 17]


def test_an_answer_that_no_memory_holds_is_given_up(tmp_path: Path) -> None:
    results = read_run(save(tmp_path / "run", grid(cases=2)))
    with pytest.raises(BadInputError, match="more than a gigabyte"):
        results.sql("SELECT * FROM range(100000000000)")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_query_needs_some_time(seconds: float, tmp_path: Path) -> None:
    results = read_run(save(tmp_path / "run", grid(cases=2)))
    with pytest.raises(BadInputError, match="give more than 0"):
        results.sql("SELECT 1", seconds=seconds)
    assert main(["results", str(tmp_path / "run"), "--sql", "SELECT 1", "--sql-seconds", "0"]) == 2
    assert len(select(results.table, "SELECT 1", seconds=float("inf"))) == 1


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from firsttok.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_a_query(number: signal.Signals, code: int, tmp_path: Path) -> None:
    run = save(tmp_path / "run", grid(cases=17))
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "results", str(run), "--sql", ENDLESS["counted"]],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    # The thread that computes is there once DuckDB is.
    deadline = time.monotonic() + 60
    threads = Path(f"/proc/{process.pid}/task")
    while time.monotonic() < deadline and "duckdb" not in maps(process.pid):
        time.sleep(0.05)
    assert threads.parent.exists()
    time.sleep(1.0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in errors


def maps(pid: int) -> str:
    """Libraries of a process; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/maps").read_text("utf-8")
    except OSError:
        return "duckdb"
