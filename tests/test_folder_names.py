"""Folders of results: one for each label of a model, inside the folder they belong in."""

import string
from itertools import product
from pathlib import Path

import pytest
from tiny import CONTEXTS, FACTS, SENTENCES, build

from firsttok.cli import main
from firsttok.errors import BadInputError
from firsttok.options import folder_name, model_label
from firsttok.storage import write_json
from firsttok.sweep.manifest import join_run
from firsttok.sweep.results import read_run

KEPT = {
    "smollm2-135m": "smollm2-135m",
    "gemma3-270m": "gemma3-270m",
    "gpt2-xl": "gpt2-xl",
    "EleutherAI/gpt-j-6b": "EleutherAI--gpt-j-6b",
    "org/name@0a1b2c": "org--name@0a1b2c",
    "/models/my-model": "my-model",
    "./my_model.v2": "my_model.v2",
    "data/of/mine": "mine",
}
"""Names that existing runs and folders of results go by."""


@pytest.mark.parametrize("name", KEPT)
def test_usual_names_are_as_they_were(name: str) -> None:
    assert folder_name(name) == KEPT[name]


ODD = (
    *("x/y", "x--y", "x/y-", "x-/y", "x---y", "x/-y", "x--y/z", "x/y--z", "x_y", "x y", "x  y"),
    *("x\ty", "x:y", "x\\y", "x*y", "modèle", "mode\u0300le", "modèle/x", "模型", "模 型", "x\0y"),
    *("." * 3, "....", ".hidden", "x.", "-x", "--", "x" * 300, "x" * 301, "ü" * 150),
    *("\udcff", "\udcfe", "x/y@main", "x--y@main", "x/y@v1", "CON", "~nouser"),
)


def test_different_labels_have_different_folders_that_any_file_system_takes() -> None:
    pieces = ("a", "b", "-", "--", "/", ".", "_", " ")
    made = {"".join(parts) for parts in product(pieces, repeat=4)}
    labels = {model_label(name) for name in {*ODD, *made, *KEPT}}
    folders = {folder_name(label) for label in labels}
    assert len(folders) == len(labels)
    letters = set(string.ascii_letters + string.digits + "_.@+-")
    for folder in folders:
        assert set(folder) <= letters
        assert folder not in (".", "..")
        assert folder == Path(folder).name
        assert 0 < len(folder) <= 120


@pytest.mark.parametrize("name", ["..", ".", "../..", "/", "~", "a/..", "./", "x/../..", "../", ""])
def test_no_name_leads_out_of_the_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    (inner / "a").mkdir(parents=True)
    monkeypatch.chdir(inner)
    out = tmp_path / "out"
    folder = out / folder_name(name)
    assert folder.resolve().parent == out
    assert model_label(name)


@pytest.mark.parametrize(
    ("name", "label"), [(".", "inner"), ("..", "outer"), ("./a/..", "inner"), ("x/", "x")]
)
def test_a_folder_is_called_by_its_own_name(
    name: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    (inner / "a").mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert model_label(name) == folder_name(name) == label


def test_a_name_and_its_label_have_one_folder() -> None:
    for name in {*KEPT, *ODD} - {"~nouser"}:
        assert folder_name(model_label(name)) == folder_name(name)


@pytest.fixture
def settings(tmp_path: Path, own_cache: Path) -> list[str]:
    write_json(tmp_path / "facts.json", [FACTS[0].as_record()])
    write_json(tmp_path / "texts.json", list(SENTENCES))
    write_json(tmp_path / "contexts.json", list(CONTEXTS.templates))
    files = [f"--{name}={tmp_path / f'{name}.json'}" for name in ("facts", "texts", "contexts")]
    return [*files, "--second-moment", "identity", "--steps", "1", "--layer", "1"]


@pytest.mark.parametrize("name", [".", "..", "../inner"])
def test_results_of_a_folder_without_a_name_are_in_the_folder_asked_for(
    name: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    (inner / "a").mkdir(parents=True)
    build("gpt2", inner)
    monkeypatch.chdir(inner / "a" if name == ".." else inner)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert main(["scan", "--model", name, "--out", str(tmp_path / "out"), *settings]) == 0
    made = {path for path in tmp_path.rglob("*") if "cache" not in path.parts} - before
    assert tmp_path / "out" / "inner" / "collapse_cases.json" in made
    assert all(path.is_relative_to(tmp_path / "out") for path in made)


def test_models_that_differ_in_a_slash_are_both_swept(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("x/y", "x--y")
    for seed, name in enumerate(names):
        (tmp_path / name).mkdir(parents=True)
        build("gpt2", tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "run", "--model", *names, *settings, "--method", "rome"]) == 0
    results = read_run("run")
    assert results.models == names
    assert [(each.model, each.done) for each in results.progress()] == [(n, 1) for n in names]
    one, other = (results.of(name).rows[0].perplexity for name in names)
    assert one != other


def test_labels_that_differ_in_case_alone_are_not_in_one_run(tmp_path: Path) -> None:
    entry = {
        "format": 2,
        "facts": {"hash": "0", "count": 1},
        "methods": {},
        "metrics": [],
        "seed": 0,
        "chunk": 1,
    }
    join_run(tmp_path, entry, "org/Name", {})
    join_run(tmp_path, entry, "org--name", {})
    join_run(tmp_path, entry, "org/Name", {})
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(BadInputError, match="of org/name would be in the folder of org/Name"):
        join_run(tmp_path, entry, "org/name", {})
    assert (tmp_path / "manifest.json").read_bytes() == before
