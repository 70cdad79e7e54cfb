"""Pulls from a site on this machine that breaks off, lies, changes and refuses."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from published import PUBLISHED

from firsttok.cli import main
from firsttok.data import DATA_SETS, check_facts, is_pulled_data, resolve_data
from firsttok.errors import BadInputError, DownloadError
from firsttok.storage import read_json

FILE = "zsre_mend_eval.json"


def facts(count: int, answer: str = "Finnish") -> bytes:
    """A file with a kilobyte for each fact."""
    flat = {"prompt": "What language is {} in?", "target_new": answer, "ground_truth": "Welsh"}
    flat["note"] = "x" * 900
    records = [flat | {"subject": f"Book {number}"} for number in range(count)]
    return json.dumps(records).encode()


class Site(ThreadingHTTPServer):
    """Serves one file, whatever the path, and does what its plan says, request by request."""

    content: bytes
    validators: dict[str, str]
    plan: list[str]
    always: str
    asked: list[dict[str, str]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data/{FILE}"


class Handler(BaseHTTPRequestHandler):
    """Knows ``cut``, ``short``, a status, ``whole`` (no ranges), ``heedless`` and ``shift``."""

    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        site = self.server
        site.asked.append({name.lower(): value for name, value in self.headers.items()})
        act = site.plan.pop(0) if site.plan else site.always
        if act.isdigit():
            self._send(int(act), b"no", {}, 2)
            return
        begin = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        known = self.headers.get("If-Range") in site.validators.values()
        if act == "whole" or not (known or act == "heedless"):
            begin = 0
        rest = site.content[begin:]
        headers = dict(site.validators)
        if begin:
            shown = begin + (act == "shift")
            size = len(site.content)
            headers["Content-Range"] = f"bytes {shown}-{size - 1}/{size}"
        sent = {"cut": len(rest) // 2, "short": len(site.content) // 3 if not begin else 0}
        self._send(206 if begin else 200, rest, headers, sent.get(act, len(rest)))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the terminal quiet."""

    def _send(self, code: int, content: bytes, headers: dict[str, str], sent: int) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("firsttok.data.downloads._PAUSE", 0.0)
    server = Site(("127.0.0.1", 0), Handler)
    server.content = facts(300)
    server.validators = {"ETag": '"one"'}
    server.plan, server.always, server.asked = [], "serve", []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def pull(site: Site, *options: str, name: str = "zsre") -> int:
    return main(["data", "pull", name, "--url", site.url, *options])


def ranges(site: Site) -> list[str | None]:
    return [headers.get("range") for headers in site.asked]


def names(folder: Path) -> set[str]:
    """What lies there, but for locks."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("firsttok: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


def test_a_pull_is_kept_recorded_and_found_by_name(
    site: Site, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_pulled_data("zsre")
    assert pull(site) == 0
    path = own_cache / "data" / FILE
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == site.content
    record = read_json(own_cache / "data" / f"{FILE}.pulled.json", "a pull")
    assert record.pop("pulled").startswith("20")
    assert record == {
        "name": "zsre",
        "url": site.url,
        "sha256": hashlib.sha256(site.content).hexdigest(),
        "bytes": len(site.content),
        "records": 300,
    }
    assert names(own_cache / "data") == {FILE, f"{FILE}.pulled.json"}
    assert is_pulled_data("zsre")
    assert resolve_data("zsre", "facts") == resolve_data("ZsRE", "facts") == path
    assert len(check_facts(resolve_data("zsre", "facts"))) == 300
    # It is there now, and nobody is asked again.
    assert pull(site) == 0
    assert ranges(site) == [None]
    assert site.asked[0]["accept-encoding"] == "identity"


def test_a_connection_that_breaks_is_gone_on_with(site: Site, own_cache: Path) -> None:
    site.plan = ["cut", "cut"]
    assert pull(site) == 0
    half = len(site.content) // 2
    more = half + (len(site.content) - half) // 2
    assert ranges(site) == [None, f"bytes={half}-", f"bytes={more}-"]
    assert [headers.get("if-range") for headers in site.asked] == [None, '"one"', '"one"']
    assert (own_cache / "data" / FILE).read_bytes() == site.content


@pytest.mark.parametrize("act", ["500", "503", "429", "short"])
def test_what_has_arrived_is_kept_for_the_next_pull(
    site: Site, own_cache: Path, capsys: pytest.CaptureFixture[str], act: str
) -> None:
    site.plan, site.always = ["cut"], act
    assert pull(site) == 2
    half = len(site.content) // 2
    said = sentence(capsys)
    assert site.url in said
    assert f"goes on after the {half} bytes" in said
    assert names(own_cache / "data") == {f"{FILE}.part", f"{FILE}.part.json"}
    with pytest.raises(BadInputError, match="firsttok data pull zsre"):
        resolve_data("zsre", "facts")
    assert main([*PULL, "--url", "localhost/x"]) == 2
    site.asked.clear()
    site.always = "serve"
    assert pull(site) == 0
    assert ranges(site) == [f"bytes={half}-"]
    assert (own_cache / "data" / FILE).read_bytes() == site.content
    assert names(own_cache / "data") == {FILE, f"{FILE}.pulled.json"}


def test_an_interrupted_pull_goes_on(
    site: Site,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site.content = facts(1000)

    def stopped(have: int, _size: int | None) -> None:
        if have > 200_000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("firsttok.data.pulls._bar", lambda *_: stopped)
        assert pull(site) == 130
    assert "run the same command again to resume" in sentence(capsys)
    kept = (own_cache / "data" / f"{FILE}.part").stat().st_size
    assert 200_000 < kept < len(site.content)
    assert pull(site) == 0
    assert ranges(site) == [None, f"bytes={kept}-"]
    assert (own_cache / "data" / FILE).read_bytes() == site.content


def test_a_site_without_ranges_is_begun_anew(site: Site, own_cache: Path) -> None:
    site.plan, site.always = ["cut"], "whole"
    assert pull(site) == 0
    assert ranges(site) == [None, f"bytes={len(site.content) // 2}-"]
    assert (own_cache / "data" / FILE).read_bytes() == site.content


def test_one_error_of_the_site_is_forgiven(site: Site, own_cache: Path) -> None:
    site.plan = ["500", "502", "408"]
    assert pull(site) == 0
    assert (own_cache / "data" / FILE).read_bytes() == site.content


@pytest.mark.parametrize("heed", ["serve", "heedless", "shift"])
def test_two_versions_are_never_glued(
    site: Site, own_cache: Path, capsys: pytest.CaptureFixture[str], heed: str
) -> None:
    site.plan, site.always = ["cut"], "500"
    assert pull(site) == 2
    capsys.readouterr()
    if heed != "shift":
        site.content, site.validators = facts(300, "Klingon"), {"ETag": '"two"'}
    site.plan, site.always = [heed], "serve"
    assert pull(site) == 0
    assert (own_cache / "data" / FILE).read_bytes() == site.content


@pytest.mark.parametrize(
    ("validators", "sent"),
    [
        ({}, None),
        ({"ETag": 'W/"weak"'}, None),
        ({"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"}, "Sat, 01 Jan 2022 00:00:00 GMT"),
        ({"ETag": 'W/"a"', "Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"}, "Sat, 01"),
    ],
)
def test_only_a_part_that_can_be_told_is_gone_on_with(
    site: Site, own_cache: Path, validators: dict[str, str], sent: str | None
) -> None:
    site.validators = validators
    site.plan = ["cut"]
    assert pull(site) == 0
    asked = site.asked[1].get("if-range")
    assert (asked or "").startswith(sent or "")
    assert (asked is None) == (sent is None) == (ranges(site)[1] is None)
    assert (own_cache / "data" / FILE).read_bytes() == site.content


def test_a_part_of_another_address_is_not_used(site: Site, own_cache: Path) -> None:
    site.plan, site.always = ["cut"], "404"
    assert pull(site) == 2
    site.always = "serve"
    assert main(["data", "pull", "zsre", "--url", site.url + "?mirror"]) == 0
    assert ranges(site)[-1] is None
    assert (own_cache / "data" / FILE).read_bytes() == site.content


def test_a_part_that_is_whole_is_not_asked_for_again(
    site: Site, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("firsttok.data.pulls.file_sha256", stopped)
        assert pull(site) == 130
    assert names(own_cache / "data") == {f"{FILE}.part", f"{FILE}.part.json"}
    assert pull(site) == 0
    assert len(site.asked) == 1


def test_a_whole_file_that_cannot_take_its_name_is_kept(
    site: Site, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if self.name == f"{FILE}.part":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        assert pull(site) == 2
    assert f"{FILE}.part" in names(own_cache / "data")
    assert pull(site) == 0
    assert len(site.asked) == 1


def test_a_refused_range_is_begun_anew(site: Site, own_cache: Path) -> None:
    site.plan = ["cut", "416"]
    assert pull(site) == 0
    assert ranges(site) == [None, f"bytes={len(site.content) // 2}-", None]
    assert (own_cache / "data" / FILE).read_bytes() == site.content


# --- refusals -----------------------------------------------------------------------------------

Prepare = Callable[[Site], list[str]]
PULL = ["data", "pull", "zsre"]


def with_content(content: bytes) -> Prepare:
    def prepare(site: Site) -> list[str]:
        site.content = content
        return [*PULL, "--url", site.url]

    return prepare


def with_status(code: str) -> Prepare:
    def prepare(site: Site) -> list[str]:
        site.always = code
        return [*PULL, "--url", site.url]

    return prepare


REFUSALS: dict[str, tuple[Prepare, str]] = {
    "not found": (with_status("404"), "the server says 404 Not Found"),
    "forbidden": (with_status("403"), "the server says 403 Forbidden"),
    "gone": (with_status("410"), "--url"),
    "broken site": (with_status("500"), "500 Internal Server Error"),
    "another SHA-256": (
        lambda site: [*PULL, "--url", site.url, "--sha256", "0" * 64],
        "which is the one asked for",
    ),
    "another than the pinned one": (
        lambda site: ["data", "pull", "counterfact", "--url", site.url],
        "which is the published one",
    ),
    "a web page": (with_content(b"<html>Sign in</html>"), "is not valid JSON at line 1"),
    "no facts in it": (with_content(b"[]"), "holds no facts"),
    "a mistake in it": (
        with_content(facts(9)[:-1] + b', {"subject": 3}]'),
        "record 9, field subject is not a text",
    ),
    "cut off before it was sent": (with_content(facts(9)[:-7]), "is not valid JSON"),
    "half of a gzip file": (with_content(b"\x1f\x8b\x08" + b"\0" * 50), "not all there"),
    "compressed otherwise": (with_content(b"PK\x03\x04" + b"\0" * 50), "not by gzip"),
    "no bytes": (with_content(b""), "is empty"),
    "unknown name": (lambda _: ["data", "pull", "zebra"], "firsttok data list"),
    "no address": (lambda _: ["data", "pull", "hardcf"], "firsttok hard --facts counterfact"),
    "no address, either": (lambda _: ["data", "pull", "hardedit"], "firsttok hard --generate"),
    "no SHA-256": (lambda site: [*PULL, "--url", site.url, "--sha256", "0f"], "64 hexadecimal"),
    "a path for an address": (lambda _: [*PULL, "--url", "/etc/hosts"], "is not a web address"),
    "another protocol": (lambda _: [*PULL, "--url", "file:///etc/hosts"], "is not a web address"),
    "half an address": (lambda _: [*PULL, "--url", "https://"], "is not a web address"),
    "a broken address": (lambda _: [*PULL, "--url", "http://[::1"], "is not a web address"),
    "nobody there": (lambda _: [*PULL, "--url", f"http://127.0.0.1:{closed_port()}/"], "refused"),
}


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_sentence_and_leaves_nothing(
    name: str, site: Site, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, expected = REFUSALS[name]
    assert main(prepare(site)) == 2
    assert expected in sentence(capsys)
    folder = own_cache / "data"
    assert not folder.exists() or names(folder) == set()
    if name in ("not found", "forbidden", "gone"):
        assert len(site.asked) == 1
    if name == "broken site":
        assert len(site.asked) == 4


def test_the_first_hash_binds_all_later_ones(
    site: Site, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(site) == 0
    path = own_cache / "data" / FILE
    path.write_bytes(site.content.replace(b"Welsh", b"Irish", 1))
    with pytest.raises(DownloadError, match="was changed since it was pulled"):
        resolve_data("zsre", "facts")
    capsys.readouterr()
    # The site has another version now: it is refused, and the damaged file stays where it is.
    first, site.content = site.content, facts(300, "Klingon")
    site.validators = {"ETag": '"two"'}
    assert pull(site) == 2
    assert "the one recorded at the first pull (20" in sentence(capsys)
    assert names(own_cache / "data") == {FILE, f"{FILE}.pulled.json"}
    site.content, site.validators = first, {"ETag": '"one"'}
    assert pull(site) == 0
    assert path.read_bytes() == first
    assert resolve_data("zsre", "facts") == path


def test_pulls_into_a_folder(
    site: Site, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "sets"
    assert pull(site, "--out", str(out)) == 0
    assert capsys.readouterr().out == f"{out / FILE}\n"
    assert names(out) == {FILE, f"{FILE}.pulled.json"}
    assert not (own_cache / "data").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / FILE).write_text("[1]", "utf-8")
    assert pull(site, "--out", str(mine)) == 2
    assert "was not pulled by firsttok; move it away" in sentence(capsys)
    assert (mine / FILE).read_text("utf-8") == "[1]"
    assert pull(site, "--out", str(mine / FILE)) == 2
    assert "is a file; name a folder" in sentence(capsys)


FULL = """
import resource, sys
from firsttok.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_keeps_what_fits(site: Site, own_cache: Path) -> None:
    environment = os.environ | {"FIRSTTOK_CACHE": str(own_cache)}
    command = [sys.executable, "-c", FULL, *PULL, "--url", site.url]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 2
    assert "cannot be written (File too large); free some space" in result.stderr
    assert "Traceback" not in result.stderr
    assert (own_cache / "data" / f"{FILE}.part").stat().st_size == 100_000
    assert pull(site) == 0
    assert ranges(site) == [None, "bytes=100000-"]
    assert (own_cache / "data" / FILE).read_bytes() == site.content


def test_published_sentences_have_their_published_hash(
    site: Site, own_cache: Path, shared: Path
) -> None:
    for name, file in (("me-ppl-50", "ME-PPL_50.json"), ("me-ppl-1k", "ME-PPL_1k.json")):
        site.content = (shared / "data" / "me-ppl" / file).read_bytes()
        assert pull(site, name=name) == 0
        assert resolve_data(name, "texts") == own_cache / "data" / file


@pytest.mark.parametrize("name", ["HardCF", "HardEdit"])
def test_hard_facts_are_pulled_from_an_address_of_the_users(
    name: str, site: Site, own_cache: Path
) -> None:
    records, expected = PUBLISHED[name]
    site.content = json.dumps(records).encode()
    digest = hashlib.sha256(site.content).hexdigest()
    assert pull(site, "--sha256", "0" * 64, name=name.lower()) == 2
    assert not is_pulled_data(name.lower())
    assert pull(site, "--sha256", digest, name=name.lower()) == 0
    path = resolve_data(name.lower(), "facts")
    assert path == own_cache / "data" / f"{name.lower()}.json"
    assert [replace(fact, source="python") for fact in check_facts(path)] == list(expected)


def test_names_paths_and_what_is_neither(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in {
        "counterfact": "fetch it with: firsttok data pull counterfact",
        "hardcf": "firsttok hard --facts counterfact",
        "hardedit": "firsttok hard --generate",
        "me-ppl-50": "holds texts, not facts",
        "no.json": "no file of facts at no.json; check the path, or name one of counterfact, zsre",
    }.items():
        with pytest.raises(BadInputError, match=re.escape(message)):
            resolve_data(name, "facts")
    with pytest.raises(BadInputError, match="name one of me-ppl-50, me-ppl-1k"):
        resolve_data("no.json", "texts")
    # A file of one's own goes before a name.
    (tmp_path / "counterfact").write_bytes(facts(1))
    assert resolve_data("counterfact", "facts") == Path("counterfact")
    assert main(["scan", "--facts", "zsre", "--out", "out"]) == 2
    assert not (tmp_path / "out").exists()


def test_the_list_says_what_there_is(
    site: Site, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(site) == 0
    capsys.readouterr()
    assert main(["data", "list"]) == 0
    output = capsys.readouterr().out
    for each in DATA_SETS:
        assert each.name in output
        assert each.note in output
    (line,) = [line for line in output.splitlines() if "zsre" in line and "8.1" in line]
    assert "at first pull" in line
    assert "yes" in line
    assert len({each.name for each in DATA_SETS}) == len(DATA_SETS)
    for each in DATA_SETS:
        assert each.name == each.name.lower()
        assert each.sha256 is None or re.fullmatch("[0-9a-f]{64}", each.sha256)
        assert each.url is None or each.url.startswith("https://")
