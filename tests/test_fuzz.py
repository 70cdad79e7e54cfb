"""Odd facts, files, paths, options and damaged caches: a right answer, or one sentence.

What is drawn follows from a seed. ``make fuzz MINUTES=600`` goes on with other seeds.
"""

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import KNOWEDIT_ZSRE, MQUAKE, QAEDIT, WIKI_RECENT, ZSRE
from tiny import FACTS, SENTENCES, TinyFactory, build

import firsttok as ft
from firsttok.cli import main
from firsttok.data import JOINS
from firsttok.errors import BadInputError, FirsttokError
from firsttok.paper.cases import load_scan
from firsttok.prompts import fact_prompt, with_target
from firsttok.second_moment import load_second_moment

pytestmark = pytest.mark.usefixtures("short_continuations")
SEED = os.environ.get("FIRSTTOK_FUZZ")
"""Set by the long run, which draws otherwise each time."""


def examples(number: int) -> Callable[[Any], Any]:
    """So many draws; the same ones in each run of the tests."""
    return settings(
        max_examples=number,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# --- facts -------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        "",
        "",
        " ",
        "\n",
        "\xa0",
        "\u200b",
        "\ufeff",
        "�",
        "é",
        "é",
        "中文",
        "{}",
        "{",
        "[/red]",
        "\x1b[31m",
        "\x00",
        "<s>",
        "'s",
        "F.C.",
        "\u202etxt",
        "😀",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    ]
)
TEXT = st.one_of(ODD, st.text(max_size=12), st.lists(ODD, max_size=3).map("".join))
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    TEXT,
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["str", "prompt", "x"]), inner)
    ),
    max_leaves=6,
)
RECORDS: list[Any] = [
    *(fact.as_record() for fact in FACTS[:3]),
    *(each[0] for each in (ZSRE, WIKI_RECENT, KNOWEDIT_ZSRE, MQUAKE, QAEDIT)),
]


@st.composite
def records(draw: st.DrawFn) -> Any:
    """A published record with one to three things in it that are odd, lacking or doubled."""
    record = json.loads(json.dumps(draw(st.sampled_from(RECORDS))))
    for _ in range(draw(st.integers(0, 3))):
        place = record
        while True:
            keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            change = draw(st.sampled_from(["odd", "gone", "list", "text"]))
            if change == "gone":
                del place[key]
            elif change == "list":
                place[key] = [inner, inner]
            elif change == "text" and isinstance(inner, str):
                place[key] = draw(TEXT) + inner + draw(TEXT)
            else:
                place[key] = draw(JSON)
            break
    return record


def written(folder: Path, content: Any, suffix: str) -> Path:
    """A file of records in one of the forms that are read."""
    path = folder / f"facts{suffix}"
    lines = ".jsonl" in suffix
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, "utf-8")
    return path


def check_sentence(error: FirsttokError) -> None:
    """An error says something, and where: it is more than another error's text."""
    assert len(str(error).split()) > 4
    assert "\n" not in str(error).strip()


@examples(250)
@given(
    content=st.lists(records(), min_size=1, max_size=3),
    suffix=st.sampled_from([".json", ".jsonl", ".json.gz", ".jsonl.gz"]),
)
def test_a_file_of_facts_is_read_or_refused(
    content: list[Any], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("facts"), content, suffix)
    try:
        facts = ft.load_facts(path)
    except FirsttokError as error:
        check_sentence(error)
    else:
        # What was read says the same when it is written and read again.
        again = written(path.parent, [fact.as_record() for fact in facts], ".json")
        assert [fact.content_hash for fact in ft.load_facts(again)] == [
            fact.content_hash for fact in facts
        ]
    try:
        some = ft.load_facts(path, skip_bad=True)
    except BadInputError as error:
        check_sentence(error)
    else:
        assert len({fact.case_id for fact in some}) == len(some)


@examples(150)
@given(subject=TEXT, before=TEXT, behind=TEXT, target=TEXT, join=st.sampled_from(JOINS))
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_fact_is_looked_up_at_its_subject_or_refused(
    tiny: TinyFactory, arch: str, subject: str, before: str, behind: str, target: str, join: Any
) -> None:
    model = tiny(arch)
    try:
        fact = ft.Fact(
            subject=subject, template=f"{before}{{}}{behind}", target_new=target, join=join
        )
        prompt = with_target(model, fact_prompt(model, fact), fact.target_new, join=join)
    except FirsttokError as error:
        check_sentence(error)
        return
    # The tokens up to the looked-up one hold the subject's last letter, those before it do not.
    tokenizer: Any = model.tokenizer
    begin = len(model.leading_ids)
    assert prompt.subject_position is not None
    upto = tokenizer.decode(prompt.token_ids[begin : prompt.subject_position + 1])
    less = tokenizer.decode(prompt.token_ids[begin : prompt.subject_position])
    end = len(fact.template.partition("{}")[0]) + len(fact.subject)
    if tokenizer.decode(prompt.token_ids[begin:]).startswith(fact.prompt):
        assert len(less.rstrip("\ufffd")) < end <= len(upto)


# --- files -------------------------------------------------------------------------------------


def damaged(content: bytes, draw: Any) -> bytes:
    """The bytes with something flipped, cut, doubled, or another file's in their place."""
    kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "other"]))
    if kind == "other" or not content:
        return draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"PK\x03\x04", b"\xff" * 40]))
    at = draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        flipped = bytearray(content)
        flipped[at] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if kind == "cut":
        return content[:at]
    if kind == "double":
        return content[:at] + content
    return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a cache that was used, and a file of every kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    build("llama", folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTTOK_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        (folder / "corpus.txt").write_text("\n".join(SENTENCES), "utf-8")
        (folder / "texts.json").write_text(json.dumps(SENTENCES[:2]), "utf-8")
        (folder / "facts.json").write_text(
            json.dumps([replace(f, case_id=i).as_record() for i, f in enumerate(FACTS)]), "utf-8"
        )
        assert main([*EDIT, "--save", "edit.safetensors"]) == 0
        assert (
            main(["scan", *OPTIONS, "--facts", "facts.json", "--limit", "2", "--out", "out"]) == 0
        )
        (folder / "settings.toml").write_text('layer = 1\ndtype = "float32"\n', "utf-8")
        pq.write_table(
            pa.Table.from_pylist([{"prompt": "{} is", "subject": "England", "target_new": "Rome"}]),
            folder / "facts.parquet",
        )
        moment = ft.compute_second_moment(ft.load("./model"), layer=1, corpus=SENTENCES)
        moment.save(folder / "moment.safetensors")
    return folder


OPTIONS = [
    *("--model", "./model", "--layer", "1", "--steps", "1", "--corpus", "corpus.txt"),
    *("--texts", "texts.json"),
]
FACT = ["--subject", "England", "--template", "{} is called", "--target", "Rome"]
EDIT = ["edit", *OPTIONS, *FACT]
READ: dict[str, Callable[[Path], Any]] = {
    "edit.safetensors": lambda path: ft.load_edit(path).right.tolist(),
    "moment.safetensors": lambda path: load_second_moment(path, d_mlp=48).matrix.tolist(),
    "facts.json": lambda path: [fact.content_hash for fact in ft.load_facts(path)],
    "facts.parquet": lambda path: [fact.content_hash for fact in ft.load_facts(path)],
    "texts.json": ft.load_texts,
    "out/model/collapse_cases.json": load_scan,
    "out/model/contexts-seed0.json": lambda path: ft.load_contexts(path).templates,
}
PLAIN = ("facts.json", "facts.parquet", "texts.json")
"""Files of other hands, which may hold anything."""


@examples(60)
@given(data=st.data())
@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_is_read_or_refused(place: Path, name: str, data: st.DataObject) -> None:
    path = place / name
    whole, right = path.read_bytes(), READ[name](path)
    try:
        path.write_bytes(damaged(whole, data.draw))
        try:
            found = READ[name](path)
        except FirsttokError as error:
            check_sentence(error)
        else:
            assert name in PLAIN or found == right
    finally:
        path.write_bytes(whole)


# --- the command line --------------------------------------------------------------------------

NUMBER = st.sampled_from(
    ["-1", "0", "1", "2", "3", "1e3", "nan", "inf", "-inf", "9" * 5000, "", "x"]
)
PATH = st.sampled_from(
    [
        "",
        " ",
        ".",
        "/proc/x",
        "/dev/null",
        "/dev/full",
        "no/such",
        "model",
        "facts.json",
        "~x/y",
        "a\x00b",
        "�",
        "edit.safetensors",
        "texts.json",
        "settings.toml",
        "-",
        "loop",
        "cache",
        "moment.safetensors",
        "facts.parquet",
    ]
)
OPTION = st.one_of(
    st.tuples(
        st.sampled_from(["--layer", "--steps", "--lr", "--clamp", "--kl", "--seed", "--limit"]),
        NUMBER,
    ),
    st.tuples(
        st.sampled_from(
            [
                "--facts",
                "--texts",
                "--contexts",
                "--second-moment",
                "--corpus",
                "--config",
                "--save",
                "--out",
                "--after",
                "--model",
                "--build-hard",
                "--scan",
            ]
        ),
        PATH,
    ),
    st.tuples(st.sampled_from(["--subject", "--template", "--target", "--true"]), TEXT),
    st.tuples(
        st.sampled_from(["--bos", "--text-bos", "--dtype", "--device", "--join", "--method"]),
        st.sampled_from(
            ["with", "without", "float16", "bfloat16", "meta", "mps", "cuda:99", "none"]
        )
        | TEXT,
    ),
)
COMMANDS: dict[str, list[str]] = {
    "edit": EDIT,
    "tokens": ["tokens", "--model", "./model", *FACT[:4]],
    "show": ["show", "edit.safetensors"],
    "scan": ["scan", *OPTIONS, "--facts", "facts.json", "--limit", "1", "--out", "out2"],
    "screen": ["screen", *OPTIONS, "--facts", "facts.json", "--limit", "1", "--out", "out2"],
    "hard": [
        "hard",
        *OPTIONS,
        "--facts",
        "facts.json",
        "--limit",
        "1",
        "--out",
        "h.json",
        "--work",
        "out2",
    ],
    "data": ["data", "synthesize", "--count", "1", "--model", "./model", "--out", "made.json"],
    "results": ["results", "out"],
}


@examples(40)
@given(extra=st.lists(OPTION, min_size=1, max_size=2))
@pytest.mark.parametrize("command", COMMANDS)
def test_odd_options_end_well_or_in_a_sentence(
    place: Path, command: str, extra: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch, as_it_was(place):
        patch.setenv("FIRSTTOK_CACHE", str(place / "cache"))
        patch.chdir(place)
        try:
            code = main([*COMMANDS[command], *(part for option in extra for part in option)])
        except SystemExit as error:
            code = error.code
    said = capsys.readouterr()
    assert code in (0, 2), said.err
    assert "Traceback" not in said.err
    assert "\x1b" not in said.out + said.err
    if code == 2:
        last = said.err.strip().splitlines()[-1]
        assert last.startswith("firsttok"), said.err
        assert len(last) < 2500


@contextlib.contextmanager
def as_it_was(folder: Path) -> Generator[None, None, None]:
    """A block after which the folder's files are as they were."""
    kept = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    try:
        yield
    finally:
        for path in folder.iterdir():
            if path.is_file() and path not in kept:
                path.unlink()
        for path, content in kept.items():
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        shutil.rmtree(folder / "out2", ignore_errors=True)


# --- damaged caches ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(place: Path) -> ft.Model:
    return ft.load(place / "model")


@pytest.fixture(scope="module")
def kept(
    place: Path, model: ft.Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float]]:
    """A cache that holds all of some numbers, and these."""
    cache = tmp_path_factory.mktemp("kept") / "cache"
    shutil.copytree(place / "cache", cache)
    return cache, numbers(model, cache)


@examples(20)
@given(data=st.data())
def test_a_damaged_cache_gives_the_same_numbers(
    kept: tuple[Path, list[float]],
    model: ft.Model,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    whole, right = kept
    cache = tmp_path_factory.mktemp("cache") / "kept"
    shutil.copytree(whole, cache)
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3)):
        path.write_bytes(damaged(path.read_bytes(), data.draw))
    assert numbers(model, cache) == right


def numbers(model: ft.Model, cache: Path) -> list[float]:
    """An edit's vector and what it does, with all that a cache can give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTTOK_CACHE", str(cache))
        study = ft.prepare_study(
            model,
            layer=1,
            texts=SENTENCES[:2],
            hyperparameters=replace(model.hyperparameters, steps=1),
            second_moment=ft.compute_second_moment(model, layer=1, corpus=SENTENCES),
        )
        found = ft.what_if(study, FACTS[0])
        return [*found.edit.right.tolist(), found.after.perplexity.mean]


def go_on(minutes: float) -> int:
    """Draw with one seed after another; ends with the first that finds something."""
    end = time.monotonic() + 60 * minutes
    seed = int(time.time())
    while time.monotonic() < end:
        print(f"seed {seed}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            [*command, f"--hypothesis-seed={seed}"],
            check=False,
            env={**os.environ, "FIRSTTOK_FUZZ": str(seed)},
        )
        if done.returncode:
            return done.returncode
        seed += 1
    return 0


if __name__ == "__main__":
    raise SystemExit(go_on(float(sys.argv[1])))
