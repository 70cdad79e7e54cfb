"""The embedded model's cache: repaired when damaged, safe when two processes pull at once."""

import json
import threading
from pathlib import Path

import pytest

from firsttok.models import embedded


@pytest.fixture
def builds(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace fetching and de-quantising; returns the folders that were built."""
    built: list[Path] = []

    def fetch(work: Path) -> Path:
        return work / "model.gguf"

    def dequantise(_gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        manifest = {"sizes": {"model.safetensors": 7}}
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        built.append(folder)

    monkeypatch.setattr(embedded, "_fetch_gguf", fetch)
    monkeypatch.setattr(embedded, "_dequantise", dequantise)
    return built


def test_a_complete_copy_is_used_again(builds: list[Path]) -> None:
    folder = embedded.embedded_folder()
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert embedded.embedded_folder() == folder
    assert embedded.pull() == folder
    assert len(builds) == 1


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest", "bad manifest"])
def test_a_damaged_copy_is_repaired(builds: list[Path], damage: str) -> None:
    folder = embedded.embedded_folder()
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if damage == "truncate":
        weights.write_bytes(b"weig")
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{", "utf-8")
    assert embedded.embedded_folder() == folder
    assert weights.read_bytes() == b"weights"
    assert len(builds) == 2


def test_two_pulls_at_once_build_once(builds: list[Path]) -> None:
    threads = [threading.Thread(target=embedded.pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_an_interrupted_pull_leaves_nothing(
    builds: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_dequantise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded.pull()
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []
    assert embedded.pull().is_dir()
