"""Models by hub id, served by a hub on this machine: pinned to a commit, safetensors only."""

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from running import Starter, in_a_process, starter
from tiny import build

from firsttok.errors import DownloadError, UnknownModelError
from firsttok.models.location import check_hub_copy, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "ffffffffffffffffffffffffffffffffffffffff"


class Hub(ThreadingHTTPServer):
    """The few routes of the hub that loading a model asks for."""

    folder: Path
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    """Serves one repository, ``lab/tiny``, at one commit."""

    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the terminal quiet."""

    def _answer(self, *, body: bool) -> None:
        self.server.asked.append(self.path)
        path = self.path.split("?")[0]
        names = sorted(file.name for file in self.server.folder.iterdir())
        if path.startswith("/api/models/lab/tiny"):
            if "/tree/" in path:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)
                return
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            info = {"id": "lab/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            return
        prefix = f"/lab/tiny/resolve/{COMMIT}/"
        if not path.startswith(prefix):
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            return
        name = path.removeprefix(prefix)
        if name not in names:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"", headers, body)
            return
        content = (self.server.folder / name).read_bytes()
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        self._send(200, content, headers, body)

    def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@dataclass(frozen=True, kw_only=True)
class Online:
    """The hub, and what starts a command that finds it."""

    hub: Hub
    own: Starter
    folder: Path
    """Of all that these commands keep."""
    environment: dict[str, str]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    server = Hub(("127.0.0.1", 0), Handler)
    folder = tmp_path_factory.mktemp("online")
    # Libraries read these once, when they are imported.
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "FIRSTTOK_CACHE": str(folder / "cache"),
    }
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with starter("tokens", environment) as own:
        yield Online(hub=server, own=own, folder=folder, environment=environment)
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(online: Online, tmp_path: Path) -> Hub:
    """The hub with the repository as it is at first, and nothing kept of it."""
    hub = online.hub
    hub.folder = tmp_path / "repository"
    hub.folder.mkdir()
    build("llama", hub.folder)
    for kept in ("hf", "cache"):
        shutil.rmtree(online.folder / kept, ignore_errors=True)
    hub.asked = []
    return hub


def tokens(
    online: Online, tmp_path: Path, model: str, *, offline: bool = False
) -> "subprocess.CompletedProcess[str]":
    words = ["tokens", "--model", model, "--subject", "England", "--template", "{} is far"]
    if offline:
        command = ["-m", "firsttok.cli", *words]
        return in_a_process(command, online.environment | {"HF_HUB_OFFLINE": "1"})
    return online.own.run(words, tmp_path)


def test_a_model_is_loaded_at_its_commit_and_no_other(
    hub: Hub, online: Online, tmp_path: Path
) -> None:
    result = tokens(online, tmp_path, f"lab/tiny@{COMMIT}")
    assert result.returncode == 0, result.stderr
    assert "^ lookup at 1" in result.stdout
    files = [path for path in hub.asked if "/resolve/" in path]
    assert files
    assert all(f"/resolve/{COMMIT}/" in path for path in files)


def test_without_a_commit_the_newest_is_pinned_and_named(
    hub: Hub, online: Online, tmp_path: Path
) -> None:
    result = tokens(online, tmp_path, "lab/tiny")
    assert result.returncode == 0, result.stderr
    assert COMMIT in result.stderr.replace("\n", "")
    assert all(f"/resolve/{COMMIT}/" in path for path in hub.asked if "/resolve/" in path)
    # Offline, the commit that was fetched is found again.
    hub.asked.clear()
    result = tokens(online, tmp_path, "lab/tiny", offline=True)
    assert result.returncode == 0, result.stderr
    assert COMMIT in result.stderr.replace("\n", "")
    assert hub.asked == []


def test_a_branch_is_pinned_to_its_commit(hub: Hub, online: Online, tmp_path: Path) -> None:
    result = tokens(online, tmp_path, "lab/tiny@main")
    assert result.returncode == 0, result.stderr
    assert all(f"/resolve/{COMMIT}/" in path for path in hub.asked if "/resolve/" in path)


@pytest.mark.parametrize(
    ("name", "commits", "main", "expected"),
    [
        ("lab/tiny", [COMMIT], None, COMMIT),
        ("lab/tiny", [COMMIT, OTHER], OTHER, OTHER),
        ("lab/tiny@main", [COMMIT, OTHER], COMMIT, COMMIT),
        ("lab/tiny", [COMMIT, OTHER], None, f"holds {COMMIT}, {OTHER} of lab/tiny"),
        ("lab/tiny", [], None, "holds no commit of lab/tiny"),
        (f"lab/tiny@{OTHER}", [COMMIT], COMMIT, OTHER),
    ],
)
def test_offline_a_commit_is_taken_from_the_hub_s_cache_or_asked_for(
    name: str,
    commits: list[str],
    main: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "models--lab--tiny"
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}", "utf-8")
    if main is not None:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main, "utf-8")
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if expected in (COMMIT, OTHER):
        assert locate(name, None).revision == expected
    else:
        with pytest.raises(UnknownModelError, match=expected):
            locate(name, None)


def test_a_pull_finds_damage_in_the_hub_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--lab--tiny"
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        blob = folder / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        blob.write_text(name, "utf-8")
        (folder / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    check_hub_copy("lab/tiny", COMMIT)
    blob.write_text("model.safetensorz", "utf-8")
    with pytest.raises(DownloadError, match=r"model\.safetensors of lab/tiny is damaged"):
        check_hub_copy("lab/tiny", COMMIT)


def test_an_adapter_is_refused(hub: Hub, online: Online, tmp_path: Path) -> None:
    (hub.folder / "adapter_config.json").write_text("{}", "utf-8")
    result = tokens(online, tmp_path, "lab/tiny")
    assert result.returncode == 2
    assert "holds an adapter (adapter_config.json)" in " ".join(result.stderr.split())
    assert not any("model.safetensors" in path for path in hub.asked)


@pytest.mark.parametrize("model", ["lab/other", f"lab/tiny@{OTHER}"])
def test_what_is_not_there_is_one_sentence(
    hub: Hub, online: Online, tmp_path: Path, model: str
) -> None:
    result = tokens(online, tmp_path, model)
    assert result.returncode == 2
    assert "cannot be loaded from the hub" in result.stderr
    assert "Traceback" not in result.stderr


def test_pickled_weights_are_refused(hub: Hub, online: Online, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    result = tokens(online, tmp_path, f"lab/tiny@{COMMIT}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert not any("pytorch_model.bin" in path for path in hub.asked if "/resolve/" in path)
