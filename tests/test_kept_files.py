"""What is kept is checked: no damage gives other content, and none ends in a traceback."""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory

from firsttok.contexts import load_contexts, sample_contexts
from firsttok.data.downloads import _read_state
from firsttok.data.pulls import _read_record
from firsttok.editing import ROME, ValueStore, compute_edit, load_edit
from firsttok.errors import BadInputError, CacheError, DamagedFileError, FirsttokError
from firsttok.measuring import measure_facts
from firsttok.models import Model
from firsttok.paper.cases import load_scan, save_scan
from firsttok.rows import Row, read_rows, read_table, seconds_of, write_rows
from firsttok.second_moment import SecondMoment, compute_second_moment, load_second_moment
from firsttok.storage import (
    locked,
    read_json,
    read_record,
    read_safetensors,
    read_tensors,
    write_json,
    write_record,
    write_tensors,
)
from firsttok.study import Study
from firsttok.sweep.manifest import read_manifest

FLIPS = int(os.environ.get("FIRSTTOK_FLIPS", "300"))
"""Single-bit flips of each file; 1500 for the long run."""
SHARD_ROWS = [
    Row(
        {
            "model": "tiny",
            "case_id": number,
            "layer": 2,
            "method": "rome",
            "status": "done",
            "reason": None,
            "subject": f"subject {number}",
            "prompt": "{} is",
            "target_new": "Berlin",
            "target_true": "London",
            "first_token": True,
            "one_token": True,
            "perplexity": 70.5 + number,
            "collapsed": number % 2 == 0,
        }
    )
    for number in range(40)
]
NUMBERED = tuple(replace(fact, case_id=index) for index, fact in enumerate(FACTS))

SHARD_FLIPS = 1500
"""Of a shard always so many: they take a second."""

Read = Callable[[Path], Any]


# --- the files ---------------------------------------------------------------------------------


def study_of(model: Model, folder: Path, moment: SecondMoment) -> Study:
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=moment,
        layer=2,
        hyperparameters=replace(model.hyperparameters, steps=2),
        texts=SENTENCES,
        work=folder / "work",
    )


@pytest.fixture(scope="module")
def kept(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of every kind that firsttok reads again, by its name."""
    folder = tmp_path_factory.mktemp("kept")
    model = tiny("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTTOK_CACHE", str(folder / "cache"))
        moment = compute_second_moment(model, layer=2, corpus=SENTENCES)
    (cached,) = (folder / "cache" / "second_moments").glob("*.safetensors")
    partial = folder / "sum.partial"
    write_tensors(partial, {"sum": moment.matrix}, {"tokens": "7", "done": "10", "plan": "abc"})
    study = study_of(model, folder, SecondMoment.identity(48))
    rows = measure_facts(study, NUMBERED[:2], [ROME])
    study.keep_original_perplexity()
    edit = compute_edit(
        model,
        NUMBERED[0],
        method=ROME,
        contexts=CONTEXTS,
        second_moment=study.second_moment,
        layer=2,
        hyperparameters=study.hyperparameters,
    )
    edit.save(folder / "edit.safetensors")
    sample_contexts(model, path=folder / "contexts.json")
    save_scan(folder / "collapse_cases.json", study, NUMBERED[:2], rows)
    write_record(folder / "facts.json.pulled.json", {"name": "facts", "sha256": "0" * 64})
    manifest = {"format": 2, "metrics": ["perplexity"], "seed": 0, "chunk": 2, "methods": {}}
    manifest |= {"facts": {"hash": "abc", "count": 2}, "models": {"llama": {"layer": 2}}}
    write_record(folder / "manifest.json", manifest)
    begun = {"url": "http://localhost/facts.json", "validator": "one", "size": 7}
    write_record(folder / "facts.json.part.json", begun)
    write_rows(folder / "chunk-000003.parquet", SHARD_ROWS, seconds=1.5)
    return {
        "edit": folder / "edit.safetensors",
        "cached second moment": cached,
        "partial second moment": partial,
        "value": next((folder / "work" / "values").iterdir()),
        "row": next((folder / "work" / "rows").glob("*.parquet")),
        "perplexity": next((folder / "work" / "original").iterdir()),
        "contexts": folder / "contexts.json",
        "collapse cases": folder / "collapse_cases.json",
        "manifest": folder / "manifest.json",
        "pull": folder / "facts.json.pulled.json",
        "download": folder / "facts.json.part.json",
        "shard": folder / "chunk-000003.parquet",
    }


def plain(content: Any) -> Any:
    """Content as one can compare it; every bit of a tensor counts."""
    if isinstance(content, torch.Tensor):
        raw = content.reshape(-1).view(torch.uint8).tolist()
        return [str(content.dtype), list(content.shape), raw]
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return plain(vars(content)) if hasattr(content, "__dataclass_fields__") else content


def read_pull(path: Path) -> Any:
    found = _read_record(path.with_name(path.name.removesuffix(".pulled.json")))
    if found is None:
        raise DamagedFileError("counts as not there")
    return found


def read_begun(path: Path) -> Any:
    found = _read_state(path.with_suffix(""), "http://localhost/facts.json")
    if found is None:
        raise DamagedFileError("counts as not there")
    return found


@pytest.fixture(scope="module")
def readers(tiny: TinyFactory) -> dict[str, Read]:
    """What reads each kind; it raises where the file does not count."""

    def read_value(path: Path) -> Any:
        found = ValueStore(path.parent).read(path, tiny("llama"))
        if found is None:
            raise DamagedFileError("counts as not there")
        return found

    return {
        "edit": load_edit,
        "cached second moment": lambda path: read_tensors(path, "a second moment"),
        "partial second moment": lambda path: read_tensors(path, "a partial second moment"),
        "value": read_value,
        "row": read_rows,
        "perplexity": lambda path: read_record(path, "a kept perplexity"),
        "contexts": load_contexts,
        "collapse cases": load_scan,
        "manifest": lambda path: read_manifest(path.parent),
        "pull": read_pull,
        "download": read_begun,
        "shard": read_rows,
    }


STRICT = (
    "cached second moment",
    "partial second moment",
    "value",
    "row",
    "perplexity",
    "download",
    "shard",
)
"""Kinds that do not count without a digest: firsttok makes them again."""
LENIENT = ("edit", "contexts", "collapse cases", "manifest", "pull")
"""Kinds that are read without one, too: a user names them, or an older version wrote them."""
KINDS = (*STRICT, *LENIENT)


# --- single bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_gives_other_content(
    kind: str, kept: dict[str, Path], readers: dict[str, Read], tmp_path: Path
) -> None:
    path = tmp_path / kept[kind].name
    whole = kept[kind].read_bytes()
    path.write_bytes(whole)
    expected = plain(readers[kind](path))
    draw = random.Random(kind)
    refused = 0
    for _ in range(SHARD_FLIPS if kind == "shard" else FLIPS):
        bit = draw.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = readers[kind](path)
        except FirsttokError:
            refused += 1
        else:
            assert plain(found) == expected, f"bit {bit}"
    assert refused > FLIPS / 2


def test_a_shard_with_any_flipped_bit_is_not_finished(
    kept: dict[str, Path], tmp_path: Path
) -> None:
    whole = kept["shard"].read_bytes()
    path = tmp_path / kept["shard"].name
    path.write_bytes(whole)
    assert (len(read_rows(path)), seconds_of(read_table(path))) == (40, 1.5)
    for byte in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[byte] ^= 16
        path.write_bytes(flipped)
        with pytest.raises(BadInputError, match="does this part again"):
            read_rows(path)


# --- structured damage -------------------------------------------------------------------------


def leaves(content: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with every leaf changed, but for the digest."""
    if isinstance(content, dict):
        return {k: v if k == "digest" else leaves(v, change) for k, v in content.items()}
    if isinstance(content, list):
        return [leaves(value, change) for value in content]
    return change(content)


def without_digest(content: Any) -> Any:
    return {key: value for key, value in content.items() if key not in ("digest", "filed_as")}


JSON_DAMAGES: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda _: "",
    "no JSON": lambda _: "{",
    "truncated": lambda text: text[: len(text) // 2],
    "doubled": lambda text: text + text,
    "doubled in a list": lambda text: f"[{text}, {text}]",
    "inside itself": lambda text: f'{{"templates": {text}, "rows": {text}, "models": {text}}}',
    "scalar": lambda _: "7",
    "null": lambda _: "null",
    "text": lambda _: '"text"',
    "list": lambda _: "[1, 2]",
    "empty object": lambda _: "{}",
    "deep": lambda _: "[" * 100_000 + "]" * 100_000,
    "deep inside": lambda text: '{"a":' * 900 + text + "}" * 900,
    "long number": lambda text: text.replace(": ", f": {'9' * 5000}, " + '"x": ', 1),
    "not UTF-8": lambda text: b"\xff\xfe" + text.encode(),
    "half a surrogate": lambda text: text.replace(": ", ': "\\ud800", "x": ', 1),
    "nulls": lambda text: json.dumps(leaves(json.loads(text), lambda _: None)),
    "texts": lambda text: json.dumps(leaves(json.loads(text), lambda _: "x")),
    "lists": lambda text: json.dumps(leaves(json.loads(text), lambda leaf: [leaf])),
    "NaN": lambda text: json.dumps(leaves(json.loads(text), lambda _: float("nan"))),
    "infinity": lambda text: json.dumps(leaves(json.loads(text), lambda _: float("inf"))),
    "other digest": lambda text: text.replace("sha256:", "sha256:0"),
    "no digest": lambda text: json.dumps(without_digest(json.loads(text))),
    "no digest, nulls": lambda text: json.dumps(
        leaves(without_digest(json.loads(text)), lambda _: None)
    ),
    "no digest, lists": lambda text: json.dumps(
        leaves(without_digest(json.loads(text)), lambda leaf: [leaf])
    ),
    "no digest, NaN": lambda text: json.dumps(
        leaves(without_digest(json.loads(text)), lambda _: float("nan"))
    ),
}
Tensors = dict[str, torch.Tensor]


def swapped(tensors: Tensors) -> Tensors:
    """Each tensor under the next one's name; alone, with its ends exchanged."""
    names = sorted(tensors)
    if len(names) == 1:
        return {names[0]: tensors[names[0]].flip(0).contiguous()}
    return {name: tensors[names[index - 1]] for index, name in enumerate(names)}


TENSOR_DAMAGES: dict[str, Callable[[Tensors], Tensors]] = {
    "swapped": swapped,
    "doubled": lambda tensors: {k: torch.cat([v, v]) for k, v in tensors.items()},
    "scalar": lambda tensors: {k: v.reshape(-1)[0].clone() for k, v in tensors.items()},
    "no elements": lambda tensors: {k: v[:0] for k, v in tensors.items()},
    "deeper": lambda tensors: {k: v[None] for k, v in tensors.items()},
    "whole numbers": lambda tensors: {k: v.long() for k, v in tensors.items()},
    "half": lambda tensors: {k: v.half() for k, v in tensors.items()},
    "zeros": lambda tensors: {k: torch.zeros_like(v) for k, v in tensors.items()},
    "NaN": lambda tensors: {k: torch.full_like(v, float("nan")) for k, v in tensors.items()},
    "negative": lambda tensors: {k: -v for k, v in tensors.items()},
    "one more": lambda tensors: {**tensors, "more": torch.zeros(2)},
    "none": lambda _: {},
}


def damaged(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every damage of a file, by name; those without a digest begin with "no digest"."""
    if path.suffix == ".json":
        for name, change in JSON_DAMAGES.items():
            content = change(path.read_text("utf-8"))
            yield name, content if isinstance(content, bytes) else content.encode()
        return
    whole = path.read_bytes()
    yield "empty", b""
    yield "truncated", whole[: len(whole) // 2]
    yield "doubled bytes", whole + whole
    yield "text", b"text"
    yield "header alone", whole[: 8 + int.from_bytes(whole[:8], "little")]
    yield "endless header", b"\xff" * 8 + whole[8:]
    tensors = load_file(path)
    _, metadata = read_safetensors(path, "a test")
    with_digest = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    abouts = (("", with_digest), ("no digest, ", metadata))
    extra = path.with_suffix(".damaged")
    for name, spoil in TENSOR_DAMAGES.items():
        for label, about in (
            ("", with_digest),
            ("no digest, ", metadata),
            ("no digest, bare ", {}),
        ):
            changed = {name: tensor.clone() for name, tensor in spoil(tensors).items()}
            save_file(changed, extra, about)
            yield f"{label}{name}", extra.read_bytes()
    for label, about in abouts:
        for name, value in (("texts", "x"), ("lists", "[[1]]"), ("nulls", "null"), ("NaN", "NaN")):
            changed = {k: v if k == "digest" else value for k, v in about.items()}
            save_file(tensors, extra, changed)
            yield f"{label}{name}", extra.read_bytes()
    save_file(tensors, extra, metadata)
    yield "no digest", extra.read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("shard", "row")])
def test_structured_damage_is_one_sentence_and_never_taken(
    kind: str, kept: dict[str, Path], readers: dict[str, Read], tmp_path: Path
) -> None:
    source = tmp_path / "whole" / kept[kind].name
    source.parent.mkdir()
    shutil.copy(kept[kind], source)
    path = tmp_path / source.name
    sentences: set[str] = set()
    for name, content in damaged(source):
        path.write_bytes(content)
        try:
            readers[kind](path)
        except FirsttokError as error:
            sentences.add(str(error).partition("(")[0])
        else:
            assert kind in LENIENT, name
            assert name.startswith("no digest"), name
    assert sentences
    assert not any("\n" in sentence for sentence in sentences)


# --- and the numbers -----------------------------------------------------------------------------


def exchange(files: list[Path]) -> None:
    """Each file under the next one's name."""
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, [*contents[1:], contents[0]], strict=True):
        path.write_bytes(content)


def spoil_each(change: Callable[[bytes], bytes]) -> Callable[[list[Path]], None]:
    def spoil(files: list[Path]) -> None:
        for path in files:
            path.write_bytes(change(path.read_bytes()))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [exchange, spoil_each(lambda content: content[:-9]), spoil_each(lambda _: b"{}")],
    ids=["exchanged", "truncated", "emptied"],
)
@pytest.mark.parametrize("folder", ["rows", "values", "original"])
def test_a_damaged_work_folder_gives_the_same_numbers(
    folder: str, spoil: Callable[[list[Path]], None], tiny: TinyFactory, tmp_path: Path
) -> None:
    def measured() -> Any:
        study = study_of(tiny("llama"), tmp_path, SecondMoment.identity(48))
        study.keep_original_perplexity()
        return measure_facts(study, NUMBERED[:2], [ROME]), study.original_perplexity

    expected = measured()
    if folder == "values":
        # With its row there, no value is asked for.
        shutil.rmtree(tmp_path / "work" / "rows")
    files = sorted(p for p in (tmp_path / "work" / folder).iterdir() if p.suffix != ".lock")
    if len(files) == 1:
        # Another thing of the same kind.
        files.append(files[0].with_name("f" * 24 + files[0].suffix))
        write_record(files[1], asdict(replace(expected[1], mean=423.0)))
    spoil(files)
    assert measured() == expected


def test_a_second_moment_of_another_layer_under_this_name_is_computed_again(
    tiny: TinyFactory, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = (1, 2)
    model = tiny("llama")
    kept = {n: compute_second_moment(model, layer=n, corpus=SENTENCES) for n in layers}
    exchange(sorted((own_cache / "second_moments").glob("*.safetensors")))
    for number in layers:
        again = compute_second_moment(model, layer=number, corpus=SENTENCES)
        assert torch.equal(again.matrix, kept[number].matrix)
    assert caplog.text.count("is damaged and is computed again") == len(layers)


def test_contexts_changed_by_hand_do_not_pass_for_sampled_ones(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    path = tmp_path / "contexts.json"
    saved = sample_contexts(tiny("llama"), path=path)
    assert load_contexts(path) == saved
    record = json.loads(path.read_text("utf-8"))
    record["templates"][1] = "My own. {}"
    write_json(path, record)
    for read in (load_contexts, lambda path: sample_contexts(tiny("llama"), path=path)):
        with pytest.raises(DamagedFileError, match="give a plain JSON list"):
            read(path)
    write_json(path, record["templates"])
    own = load_contexts(path)
    assert (own.templates[1], own.seed) == ("My own. {}", None)


def test_a_file_may_be_renamed_by_its_user(kept: dict[str, Path], tmp_path: Path) -> None:
    for kind, read in (("edit", load_edit), ("contexts", load_contexts)):
        path = tmp_path / f"my own {kind}"
        shutil.copy(kept[kind], path)
        assert plain(read(path)) == plain(read(kept[kind]))
    moment = kept["cached second moment"]
    shutil.copy(moment, tmp_path / "mine.safetensors")
    found = load_second_moment(tmp_path / "mine.safetensors", d_mlp=48)
    assert found.content_hash == load_second_moment(moment, d_mlp=48).content_hash


def test_equal_content_has_an_equal_digest_and_any_change_another(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def digest(tensors: Tensors, **metadata: str) -> str:
        write_tensors(path, tensors, metadata)
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return str(header["__metadata__"]["digest"])

    one, two = torch.arange(6.0), torch.arange(6.0) + 1
    first = digest({"a": one, "b": two}, note="x")
    assert digest({"b": two, "a": one}, note="x") == first
    others = [
        digest({"a": two, "b": one}, note="x"),
        digest({"a": one, "c": two}, note="x"),
        digest({"a": one.reshape(2, 3), "b": two}, note="x"),
        digest({"a": one.double(), "b": two}, note="x"),
        digest({"a": one.view(torch.int32), "b": two}, note="x"),
        digest({"a": one, "b": two}, note="y"),
        digest({"a": one}, note="x"),
        digest({"a": one, "b": -two}, note="x"),
    ]
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("tensor", [torch.tensor(1.5), torch.zeros(0, 3), torch.eye(3).T[1:]])
def test_tensors_of_any_form_come_back(tensor: torch.Tensor, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        write_tensors(tmp_path / "x", {"x": tensor.to(dtype)}, {})
        found, _ = read_tensors(tmp_path / "x", "a test")
        assert torch.equal(found["x"], tensor.to(dtype))
        assert found["x"].dtype == dtype


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    content = {"a": (1, 2.5, None), "b": {3: "Zoë", "t": True}}
    write_record(tmp_path / "x.json", content)
    read = {"a": [1, 2.5, None], "b": {"3": "Zoë", "t": True}}
    assert read_record(tmp_path / "x.json", "a test") == read
    assert read_json(tmp_path / "x.json", "a test") == read


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CacheError, match="No space left on device"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_waits_for_another_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firsttok.storage._PATIENCE", 0.01)
    held, freed = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(f"{tmp_path / 'kept'}.lock"):
            held.set()
            time.sleep(0.3)
            freed.set()

    threading.Thread(target=hold).start()
    held.wait()
    with locked(tmp_path / "kept"):
        assert freed.is_set()
    assert "waiting for another process, which is at work on kept" in caplog.text
