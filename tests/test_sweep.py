"""Sweeps: the same numbers as one edit at a time, and whole after any stop."""

import errno
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from running import starter
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory, build, edits_of

from firsttok.cli import main
from firsttok.data import Fact
from firsttok.editing import C_ROME, FC_ROME, ROME
from firsttok.errors import BadInputError, CacheError
from firsttok.evaluation import counterfact_scores, edit_accuracy, generated_match
from firsttok.hyperparameters import Hyperparameters
from firsttok.measuring import Plan, measure_chunk, measure_facts
from firsttok.models import Model
from firsttok.rows import DONE, FAILED, Row, read_rows, shard_paths, write_rows
from firsttok.second_moment import SecondMoment, compute_second_moment
from firsttok.storage import read_json, write_json, write_record
from firsttok.study import Study
from firsttok.sweep.engine import Chunk, DoneChunk, LocalEngine
from firsttok.sweep.results import read_run
from firsttok.sweep.runner import Share, chunks_of, sweep

METHODS = (ROME, C_ROME, FC_ROME)
PLAN = Plan(methods=METHODS)
SHORT = Plan(methods=(ROME, C_ROME), metrics=("perplexity",))
ROME_ALONE = Plan(methods=(ROME,), metrics=("perplexity",))
"""Enough where the rows' places matter and not what is in them."""
NUMBERED = tuple(replace(fact, case_id=10 + index) for index, fact in enumerate(FACTS))


@cache
def moment_of(model: Model) -> SecondMoment:
    """The same for each test, though each has a cache of its own."""
    return compute_second_moment(model, layer=1, corpus=SENTENCES * 4)


def study_of(model: Model, folder: Path) -> Study:
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=moment_of(model),
        layer=1,
        hyperparameters=Hyperparameters(steps=3),
        texts=tuple(SENTENCES),
        work=folder / "work",
    )


def rows_in(folder: Path) -> list[Row]:
    return [row for path in shard_paths(folder) for row in read_rows(path)]


def same(one: Sequence[Row], other: Sequence[Row], rel: float) -> None:
    """Equal row for row: texts and flags exactly, numbers to a relative difference."""
    assert [(row.model, row.case_id, row.method) for row in one] == [
        (row.model, row.case_id, row.method) for row in other
    ]
    for row, expected in zip(one, other, strict=True):
        for name, value in expected.items():
            found = row.get(name)
            if isinstance(value, float):
                assert found == pytest.approx(value, rel=rel, abs=1e-9), (row.case_id, name)
            else:
                assert found == value, (row.case_id, name)


# One whose blocks run with padding, and two that run without, with norms at other places.
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_rows_are_those_of_one_edit_at_a_time(
    tiny: TinyFactory, arch: str, tmp_path: Path, own_cache: Path
) -> None:
    study = study_of(tiny(arch, "float64"), tmp_path)
    rows = measure_chunk(study, NUMBERED, PLAN)
    expected = measure_facts(study, NUMBERED, METHODS)
    assert [(row.case_id, row.method) for row in rows] == [
        (row.case_id, row.method) for row in expected
    ]
    edits = {
        (fact.case_id, name): (fact, edit)
        for fact, found in edits_of(
            study.model,
            NUMBERED,
            methods=METHODS,
            contexts=CONTEXTS,
            second_moment=study.second_moment,
            layer=1,
            hyperparameters=study.hyperparameters,
        )
        for name, edit in found.items()
    }
    for row, case in zip(rows, expected, strict=True):
        assert (row.status, row.reason) == (DONE, None)
        for name, value in case.items():
            wanted = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert row[name] == wanted, name
        fact, edit = edits[row.case_id, row.method]
        accuracy = edit_accuracy(study.model, fact, edit)
        assert (row.efficacy, row.generalization, row.locality) == (
            accuracy.efficacy,
            accuracy.generalization,
            accuracy.locality,
        )
        assert row.prefix in CONTEXTS.prefixed
        behind = edit_accuracy(study.model, fact, edit, context=row.prefix)
        assert row.prefixed_efficacy == behind.efficacy
        with edit.applied(study.model):
            scores = counterfact_scores(study.model, fact)
        for name in ("es", "ps", "ns", "em", "pm", "nm", "score"):
            assert row[name] == pytest.approx(getattr(scores, name), abs=1e-6), name


def test_a_chunk_and_nothing_else_determines_its_rows(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path
) -> None:
    study = study_of(tiny("llama"), tmp_path)
    rows = measure_chunk(study, NUMBERED, PLAN)
    # Values that an earlier run left change nothing.
    measure_facts(study, NUMBERED[:2], METHODS)
    assert measure_chunk(study, NUMBERED, PLAN) == rows


def test_only_the_metrics_asked_for_are_measured(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path
) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    (row,) = measure_chunk(study, NUMBERED[:1], Plan(methods=(ROME,), metrics=("entropy",)))
    assert row.denominator is not None
    assert not {"perplexity", "collapsed", "efficacy", "es"} & set(row)
    assert 0.0 <= row.entropy <= 1.0
    (row,) = measure_chunk(study, NUMBERED[:1], Plan(methods=(ROME,), metrics=("generated",)))
    ((_, edits),) = study.edits(NUMBERED[:1], [ROME])
    with edits["rome"].applied(study.model):
        expected = generated_match(study.model, NUMBERED[0])
    assert (row.generated, row.generated_exact) == (expected.text, expected.exact)
    assert row.generated_first_words == expected.first_words


POISON = {
    "a token straddles the subject's end": Fact(
        subject="Arth", template="{}ur left", target_new="Rome", target_true="it", case_id=99
    ),
    "a text is longer than the model's window": Fact(
        subject="Arthur",
        template="I know " * 400 + "{}",
        target_new="a",
        target_true="b",
        case_id=99,
    ),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_poison_case_is_a_row_and_stops_nobody(
    tiny: TinyFactory, kind: str, tmp_path: Path, own_cache: Path
) -> None:
    study = study_of(tiny("gpt2", "float64"), tmp_path)
    facts = (*NUMBERED[:2], POISON[kind], *NUMBERED[2:])
    rows = measure_chunk(study, facts, PLAN)
    assert [row.case_id for row in rows] == [f.case_id for f in facts for _ in METHODS]
    failed = [row for row in rows if row.status == FAILED]
    assert [row.case_id for row in failed] == [99] * len(METHODS)
    assert all(row.reason and "\n" not in row.reason and "denominator" not in row for row in failed)
    same(
        [row for row in rows if row.status == DONE], measure_chunk(study, NUMBERED, PLAN), rel=1e-6
    )


def test_an_error_nobody_foresaw_fails_its_case_alone(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    plain = Study.edits

    def broken(study: Study, facts: Sequence[Fact], *args: Any, **settings: Any) -> Any:
        if any(fact.case_id == 12 for fact in facts):
            raise ZeroDivisionError("as bad\nas can be")
        return plain(study, facts, *args, **settings)

    monkeypatch.setattr(Study, "edits", broken)
    rows = measure_chunk(study, NUMBERED, SHORT)
    reasons = {row.case_id: row.reason for row in rows}
    assert reasons[12] == "ZeroDivisionError: as bad as can be"
    assert [reason for case, reason in reasons.items() if case != 12] == [None] * 4


def test_a_full_disk_is_not_the_fault_of_a_case(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    folder = tmp_path / "rows"
    engine = LocalEngine(study=study, plan=SHORT)
    plain = Path.write_bytes
    written: list[str] = []

    def full(path: Path, content: bytes) -> int:
        if len(written) == 1:
            plain(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(str(path))
        return plain(path, content)

    # One write for each chunk, however long it takes.
    monkeypatch.setattr("firsttok.sweep.runner._PERIOD", 1e9)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CacheError, match=r"cannot be written \(No space left on device\)"):
        sweep(folder, NUMBERED, engine, size=2)
    assert [path.name for path in folder.iterdir()] == ["chunk-000000.parquet"]
    monkeypatch.setattr(Path, "write_bytes", plain)
    assert sweep(folder, NUMBERED, engine, size=2) == 2
    sweep(tmp_path / "other", NUMBERED, engine, size=2)
    assert rows_in(folder) == rows_in(tmp_path / "other")


def test_shares_do_each_chunk_once_and_together_all(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path
) -> None:
    engine = LocalEngine(study=study_of(tiny("gpt2"), tmp_path), plan=ROME_ALONE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sweep(whole, NUMBERED, engine, size=1) == 5
    counts = [
        sweep(parts, NUMBERED, engine, size=1, share=Share(number=i, of=3)) for i in (1, 2, 3)
    ]
    assert counts == [2, 2, 1]
    assert rows_in(parts) == rows_in(whole)
    limited = tmp_path / "limited"
    assert sweep(limited, NUMBERED, engine, size=2, share=Share(limit=3)) == 2
    assert [row.case_id for row in rows_in(limited)] == [10, 11, 12]
    assert sweep(limited, NUMBERED, engine, size=2, share=Share(limit=2)) == 0
    assert sweep(limited, NUMBERED, engine, size=2) == 2
    same(rows_in(limited), rows_in(whole), rel=1e-5)


def test_shares_and_limits_count_what_they_do() -> None:
    numbers = range(1, 8)
    for total, size, of in product(numbers, (1, 2, 3, 5), (1, 2, 3)):
        facts = [replace(NUMBERED[0], case_id=number) for number in range(total)]
        chunks = list(chunks_of(facts, size))
        for limit in (None, *numbers):
            shares = [Share(number=number + 1, of=of, limit=limit) for number in range(of)]
            taken = [[f for chunk in chunks for f in s.of_chunk(chunk, size)] for s in shares]
            assert [share.count(total, size) for share in shares] == [len(each) for each in taken]
            ids = sorted(fact.case_id for each in taken for fact in each)
            assert ids == list(range(total))[:limit]


@dataclass(frozen=True)
class Interrupted:
    """An engine that is stopped after so many facts."""

    engine: LocalEngine
    after: int

    def run(
        self, chunks: Iterable[Chunk], *, on_facts: Callable[[float], None]
    ) -> Iterator[DoneChunk]:
        parts = self.engine.run(chunks, on_facts=on_facts)
        yield from islice(parts, self.after)
        raise KeyboardInterrupt


def test_a_run_that_is_stopped_keeps_every_fact_and_ends_as_one_that_was_not(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path
) -> None:
    engine = LocalEngine(study=study_of(tiny("gpt2"), tmp_path), plan=SHORT)
    whole = tmp_path / "whole"
    sweep(whole, NUMBERED, engine, size=3)
    for after in range(1, 5):
        folder = tmp_path / f"stopped {after}"
        with pytest.raises(KeyboardInterrupt):
            sweep(folder, NUMBERED, Interrupted(engine, after), size=3)
        assert rows_in(folder) == rows_in(whole)[: 2 * after]
        with pytest.raises(KeyboardInterrupt):
            sweep(folder, NUMBERED, Interrupted(engine, 1), size=3)
        assert rows_in(folder) == rows_in(whole)[: 2 * (after + 1)]
        sweep(folder, NUMBERED, engine, size=3)
        assert rows_in(folder) == rows_in(whole)
        assert [p.name for p in shard_paths(folder)] == [p.name for p in shard_paths(whole)]


def test_rows_are_on_disk_while_their_chunk_is_being_done(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firsttok.sweep.runner._PERIOD", 0.0)
    engine = LocalEngine(study=study_of(tiny("gpt2"), tmp_path), plan=ROME_ALONE)
    folder = tmp_path / "rows"
    seen: list[int] = []

    class Watched:
        def run(
            self, chunks: Iterable[Chunk], *, on_facts: Callable[[float], None]
        ) -> Iterator[DoneChunk]:
            for part in engine.run(chunks, on_facts=on_facts):
                yield part
                # What a kill at this moment leaves.
                seen.append(len(rows_in(folder)))

    sweep(folder, NUMBERED, Watched(), size=5)
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("share", "asked"),
    [
        (Share(), 5),
        (Share(limit=3), 3),
        (Share(limit=99), 5),
        (Share(number=2, of=2), 2),
        (Share(number=1, of=2, limit=1), 1),
    ],
)
def test_progress_ends_at_what_was_asked(
    tiny: TinyFactory, share: Share, asked: int, tmp_path: Path, own_cache: Path
) -> None:
    engine = LocalEngine(study=study_of(tiny("gpt2"), tmp_path), plan=ROME_ALONE)
    for _ in ("begun", "done before"):
        progress = Progress(disable=True)
        sweep(tmp_path / "rows", NUMBERED, engine, size=2, share=share, progress=progress, total=5)
        (task,) = progress.tasks
        assert (task.completed, task.total) == (asked, asked)
    assert len(rows_in(tmp_path / "rows")) == asked


def test_what_is_done_again_in_parts_does_not_count_twice(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Study.edits

    def broken(study: Study, facts: Sequence[Fact], *args: Any, **settings: Any) -> Any:
        for found in plain(study, facts, *args, **settings):
            if found[0].case_id == 13:
                raise ZeroDivisionError
            yield found

    monkeypatch.setattr(Study, "edits", broken)
    engine = LocalEngine(study=study_of(tiny("gpt2"), tmp_path), plan=ROME_ALONE)
    counted: list[float] = []
    chunk = Chunk(index=0, facts=NUMBERED)
    parts = list(engine.run([chunk], on_facts=counted.append))
    assert sum(counted) == pytest.approx(5)
    assert all(count >= 0 for count in counted)
    rows = [row for part in parts for row in part.rows]
    assert [row.case_id for row in rows if row.status == FAILED] == [13]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_share_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match=r"give I/N"):
        Share.parse(text)


def test_a_damaged_shard_is_done_again_and_a_failed_case_on_request(
    tiny: TinyFactory, tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = LocalEngine(study=study_of(tiny("gpt2"), tmp_path), plan=ROME_ALONE)
    folder = tmp_path / "rows"
    sweep(folder, NUMBERED, engine, size=2)
    expected = rows_in(folder)
    first, second, third = shard_paths(folder)
    # In its body: the footer, with the number of rows, is as it was.
    content = bytearray(first.read_bytes())
    content[40] ^= 1
    first.write_bytes(content)
    (row, *rest) = read_rows(second)
    lost = Row({**row, "status": FAILED, "reason": "lost"})
    write_rows(second, [lost, *rest])
    with pytest.raises(BadInputError, match="is damaged"):
        read_rows(first)
    assert sweep(folder, NUMBERED, engine, size=2, retry_failed=True) == 2
    assert "is damaged" in caplog.text
    assert rows_in(folder) == expected
    assert third.is_file()


def command_in(folder: Path) -> list[str]:
    build("gpt2", folder / "model")
    write_json(folder / "facts.json", [fact.as_record() for fact in NUMBERED])
    write_json(folder / "texts.json", list(SENTENCES))
    write_json(folder / "contexts.json", list(CONTEXTS.templates))
    words = ["sweep", str(folder / "run"), "--chunk", "2", "--second-moment", "identity"]
    for name in ("model", "facts", "texts", "contexts"):
        path = folder / (name if name == "model" else f"{name}.json")
        words += [f"--{name}", str(path)]
    return [*words, "--steps", "2", "--layer", "1"]


@pytest.fixture
def command(tmp_path: Path, own_cache: Path) -> list[str]:
    return command_in(tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A sweep of which one fact is done; who refuses it leaves it as it was."""
    folder = tmp_path_factory.mktemp("begun")
    command = command_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTTOK_CACHE", str(folder / "cache"))
        assert main([*command, "--limit", "1"]) == 0
    return command


def test_a_run_goes_on_and_tells_how_far_it_is(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "1"]) == 0
    assert "1 of 5" in (printed := capsys.readouterr().out)
    assert "0 of 3" in printed
    assert main([*command, "--limit", "2"]) == 0
    assert "2 of 5" in (printed := capsys.readouterr().out)
    assert "1 of 3" in printed
    shard = tmp_path / "run" / "rows" / "model" / "chunk-000000.parquet"
    before = shard.stat().st_mtime_ns
    assert main(command) == 0
    assert "5 of 5" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == before
    assert main(["sweep", "status", str(tmp_path / "run")]) == 0
    assert "5 of 5" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert manifest["facts"]["count"] == 5
    assert set(manifest["models"]["model"]["versions"]) >= {"torch", "firsttok"}


def test_several_layers_take_part_side_by_side(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ["--limit", "2", "--metrics", "perplexity"]
    assert main([*command, *metrics]) == 0
    (alone,) = read_run(tmp_path / "run").models
    run = tmp_path / "layers"
    several = [str(run) if word == str(tmp_path / "run") else word for word in command]
    assert main([*several, "0", *metrics]) == 0
    found = read_run(run)
    assert found.models == (f"{alone}-layer1", f"{alone}-layer0")
    expected = {(row.case_id, row.method): row for row in read_run(tmp_path / "run").rows}
    for row in found.of(f"{alone}-layer1").rows:
        same_case = expected[row.case_id, row.method]
        assert {**row, "model": alone} == dict(same_case)
    assert {(row.model, row.layer) for row in found.rows} == {
        (f"{alone}-layer{layer}", layer) for layer in (0, 1)
    }
    assert "layer0" in capsys.readouterr().out
    assert main([*several, "9", *metrics]) == 2
    assert "layer 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--steps", "3"], "hyperparameters.steps: 2, now 3"),
        (["--chunk", "3"], "chunk: 2, now 3"),
        (["--seed", "1"], "seed: 0, now 1"),
        (["--method", "rome"], "methods.c-rome"),
        (["--metrics", "perplexity"], "metrics: ['perplexity', 'accuracy', 'scores']"),
        (["--layer", "0"], "layer: 1, now 0"),
        (["--bos", "with"], "model.bos: as_tokenizer, now with"),
        (["--dtype", "float64"], "model.dtype: float32, now float64"),
    ],
)
def test_another_manifest_is_refused_with_the_difference(
    begun: list[str],
    words: list[str],
    difference: str,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(begun[1])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / "manifest.json" in before
    assert main([*begun, *words]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert difference in message
    assert "use the same settings, or another folder" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_weights_facts_contexts_and_versions_are_another_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--limit", "1"]) == 0
    manifest = tmp_path / "run" / "manifest.json"
    kept = manifest.read_text("utf-8")
    record = read_json(manifest, "a run's manifest")
    record["models"]["model"]["versions"]["torch"] = "0.1"
    write_record(manifest, record)
    assert main(command) == 2
    assert "versions.torch: 0.1, now" in capsys.readouterr().err
    manifest.write_text(kept, "utf-8")
    write_json(tmp_path / "contexts.json", list(CONTEXTS.templates[:2]))
    assert main(command) == 2
    assert "contexts.hash" in capsys.readouterr().err
    write_json(tmp_path / "contexts.json", list(CONTEXTS.templates))
    write_json(tmp_path / "facts.json", [fact.as_record() for fact in NUMBERED[:4]])
    assert main(command) == 2
    assert "facts.count: 5, now 4" in capsys.readouterr().err
    write_json(tmp_path / "facts.json", [fact.as_record() for fact in NUMBERED])
    build("gpt2", tmp_path / "model", seed=1)
    assert main(command) == 2
    assert "model.fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "--limit is 0"),
        (["--shard", "2/1"], "--shard is 2/1"),
        (["--chunk", "0"], "--chunk is 0"),
        (["--method", "memoir"], "no method is called 'memoir'"),
        (["--actors", "2"], "--actors is for --engine ray"),
        (["--address", "auto"], "--address is for --engine ray"),
        (["--facts", "missing.json"], "missing.json"),
        (["--texts", "missing.json"], "missing.json"),
        (["--model", "./a/model", "./b/model"], "rows would be in one folder"),
        (["--model", "gpt2-xl", "gpt2-xl"], "rows would be in one folder"),
        (["--model", "x/y", "X/Y"], "rows would be in one folder"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    command: list[str],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["status"], ["status", "nowhere"], ["a", "b"]])
def test_a_run_that_is_not_there_is_told(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if words == ["status"]:
        words = ["status", "a", "b"]
    assert main(["sweep", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def begun_in(folder: Path) -> int:
    return len(list(folder.glob("chunk-*")))


@pytest.mark.slow
def test_kills_lose_and_repeat_nothing(command: list[str], tmp_path: Path, own_cache: Path) -> None:
    facts = [
        replace(FACTS[index % 5], case_id=index, target_new=f"Rome {index}").as_record()
        for index in range(30)
    ]
    write_json(tmp_path / "facts.json", facts)
    command = [
        "5" if word == "2" and command[i - 1] == "--chunk" else word
        for i, word in enumerate(command)
    ]
    environment = {"FIRSTTOK_CACHE": str(own_cache), "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    folder = run / "rows" / "model"
    done = 0
    with starter("sweep", environment) as own:
        # Before any row is there; as soon as a file of rows is; in the middle of what follows.
        for file, delay in ((run / "manifest.json", 0.0), (None, 0.0), (None, 0.3)):
            begun = begun_in(folder)
            process = own.start(command)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                if file.is_file() if file else begun_in(folder) > begun:
                    break
                time.sleep(0.01)
            time.sleep(delay)
            ended = process.kill()
            assert ended.code == -signal.SIGKILL, "it was done before the last kill"
            # Each of them is whole.
            done = len([read_rows(path) for path in shard_paths(folder)])
            assert done >= begun
    assert 0 < done < 6
    torch.set_num_threads(1)
    assert main(command) == 0
    rows = rows_in(folder)
    keys = [(row.case_id, row.method) for row in rows]
    assert keys == [(case, method) for case in range(30) for method in ("rome", "c-rome")]
    other = [str(tmp_path / "undisturbed") if word == str(run) else word for word in command]
    assert main(other) == 0
    same(rows, rows_in(tmp_path / "undisturbed" / "rows" / "model"), rel=1e-5)
    assert all(row.status == DONE for row in rows)
    # What a kill left half-written is nobody's row.
    assert not [
        path for path in folder.iterdir() if path.suffix == ".parquet" and path.name[0] == "."
    ]
