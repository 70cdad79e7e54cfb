"""The documentation site: built strictly and offline, complete, sound, searched in a browser."""

import base64
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import browser
import pytest

import firsttok
from firsttok.paper.report import build_report

pytest.importorskip("mkdocs", reason="needs the extra: pip install 'firsttok[docs]'")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OFFLINE = """
import socket, sys
def refuse(*_): raise OSError("the documentation is built without network access")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""
LOADED = {"img", "script", "link", "iframe", "source", "video", "audio", "object", "embed"}
"""Elements that make a browser fetch something by itself."""
pytestmark = [pytest.mark.slow, pytest.mark.release]


class Links(HTMLParser):
    """What a page refers to, what it loads, and the places it can be entered at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            if name in ("href", "src", "data") and value is not None:
                (self.loaded if tag in LOADED else self.links).append(value)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    result = build(folder)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "WARNING" not in result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    """Our own pages; a report is one file with its own tests."""
    return {
        path: Links(path.read_text("utf-8"))
        for path in site.rglob("*.html")
        if path.parent.name != "reports" and path.name != "404.html"
    }


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(firsttok.__path__, "firsttok."):
        module = importlib.import_module(found.name)
        if hasattr(module, "__all__"):
            yield module


def definition(module: ModuleType, name: str, documented: set[str]) -> str | None:
    """Where a name is documented: in its module, or in the one below that defines it."""
    own = f"{module.__name__}.{name}"
    if own in documented:
        return own
    value = getattr(module, name)
    for path in documented:
        place, _, last = path.rpartition(".")
        ours = last == name and place.startswith("firsttok.") and place in sys.modules
        if ours and getattr(sys.modules[place], name, None) is value:
            return path
    return None


def test_every_public_name_is_in_the_reference(pages: dict[Path, Links]) -> None:
    documented = {
        name for path, page in pages.items() if path.parent.name == "reference" for name in page.ids
    }
    for module in (firsttok, *public_modules()):
        missing = [name for name in module.__all__ if definition(module, name, documented) is None]
        assert not missing, f"{module.__name__}: {missing} are not in the reference"


def test_a_name_that_is_not_documented_is_missed() -> None:
    assert definition(firsttok, "ROME", {"firsttok.editing.methods.C_ROME"}) is None
    assert definition(firsttok, "ROME", {"firsttok.data.ROME"}) is None


def test_the_package_page_links_every_name(site: Path) -> None:
    text = (site / "reference" / "index.html").read_text("utf-8")
    for name in firsttok.__all__:
        assert re.search(rf'href="[^"]+\.html#firsttok\.[\w.]+"><code>{name}</code>', text), name


def test_shapes_stand_in_the_signatures(site: Path) -> None:
    text = re.sub(
        r"<[^>]+>", "", (site / "reference" / "keys-and-second-moment.html").read_text("utf-8")
    )
    assert "layer prompt d_mlp" in text
    assert "d_mlp d_mlp" in text


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Links]) -> None:
    assert len(pages) > 20
    for path, page in pages.items():
        for link in (*page.links, *page.loaded):
            if urlsplit(link).scheme or link.startswith("#__"):
                continue
            address, fragment = urldefrag(link)
            target = (
                (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
            )
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site), f"{path}: {link}"
            assert target.is_file(), f"{path}: {link}"
            if fragment and target in pages and not fragment.startswith("__"):
                assert unquote(fragment) in pages[target].ids, f"{path}: {link}"


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Links]) -> None:
    for path, page in pages.items():
        outside = [link for link in page.loaded if urlsplit(link).scheme not in ("", "data")]
        assert not outside, f"{path} loads {outside}"
    for path in site.rglob("*.css"):
        for address in re.findall(r"url\(([^)]+)\)", path.read_text("utf-8")):
            assert not address.strip("\"' ").startswith(("http", "//")), f"{path} loads {address}"


def test_formulas_are_built_and_no_macro_is_left(pages: dict[Path, Links]) -> None:
    shown = 0
    for path in pages:
        text = path.read_text("utf-8")
        assert 'class="arithmatex"' not in text, path
        assert "merror" not in text, path
        assert "{{" not in text, path
        shown += text.count("<math")
    assert shown > 40


def test_the_report_of_each_model_is_there(site: Path) -> None:
    for path in (ROOT / "figures").glob("*/index.html"):
        assert (site / "reports" / f"{path.parent.name}.html").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_is_a_tutorial(site: Path, path: Path) -> None:
    text = (site / "tutorials" / f"{path.stem}.html").read_text("utf-8")
    assert text.count("<h1") == 1
    index = (site / "tutorials" / "index.html").read_text("utf-8")
    assert f'href="{path.stem}.html"' in index


def test_a_notebook_keeps_its_outputs(tmp_path: Path) -> None:
    pixel = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "printed\n"},
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"text/html": "<table id='t'></table>"},
        },
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": pixel}},
    ]
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": "# A title\n\nWhat it\nis.\n\nMore."},
        {
            "cell_type": "code",
            "metadata": {},
            "source": "x = 1",
            "execution_count": 1,
            "outputs": outputs,
        },
    ]
    path = tmp_path / "mine.ipynb"
    path.write_text(
        json.dumps({"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": cells})
    )
    generated = hook("generated")
    added: dict[str, Any] = {}
    generated._add_notebook(path, added.__setitem__)
    page = added.pop("tutorials/mine.md")
    assert page.lstrip().startswith("# A title")
    for part in ("x = 1", "printed", "<table id='t'></table>"):
        assert part in page
    ((name, data),) = added.items()
    assert data.startswith(b"\x89PNG")
    assert f"]({name.removeprefix('tutorials/')})" in page
    assert generated._listed(path) == "- [A title](mine.md). What it is."


def test_a_page_that_links_nowhere_ends_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Home\n\n[gone](gone.md)\n", "utf-8")
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    head = config.partition("\nnav:")[0]
    rules = "validation:" + config.partition("validation:")[2].partition("\nhooks:")[0]
    (tmp_path / "mkdocs.yml").write_text(head.partition("extra_css")[0] + rules, "utf-8")
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode != 0
    assert "gone.md" in result.stderr


def test_numbers_are_read_and_a_missing_one_is_an_error() -> None:
    measured = hook("measured")
    shown = measured.cell(
        "table1_update_components", "denominator, collapse (n=24)", "smollm2-135m, ROME"
    )
    assert 0 < float(shown) < 0.1
    with pytest.raises(LookupError):
        measured.cell("table1_update_components", "no such line", "smollm2-135m, ROME")
    with pytest.raises(ValueError, match="no such column"):
        measured.cell("table1_update_components", "denominator, collapse (n=24)", "no such column")
    with pytest.raises(FileNotFoundError):
        measured.cell("table99", "", "")
    judged = measured.verdicts(own=False) + measured.verdicts(own=True)
    for claim in build_report(ROOT / "figures" / measured.MODEL).judged:
        assert claim.sentence.replace("|", "\\|") in judged


@pytest.mark.parametrize("name", ["index.md", "explanation/findings.md"])
def test_pages_of_results_hold_no_typed_number(name: str) -> None:
    text = re.sub(
        r"\{\{.*?\}\}|```.*?```|`[^`]*`|\]\([^)]*\)|\w+-\d+[Mm]\b",
        "",
        (DOCS / name).read_text("utf-8"),
        flags=re.S,
    )
    # The threshold, the year of the papers, the Python that is asked for.
    assert set(re.findall(r"\d[\d.,]*\d", text)) <= {"1000", "2024", "3.11"}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.find_chromium() is None:
        pytest.skip("chromium is not installed")
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


WAIT_FOR = """
new Promise((done, failed) => {{
  const end = Date.now() + 30000;
  (function look() {{
    const found = {expression};
    if (found) done(found);
    else if (Date.now() > end) failed(new Error("waited in vain"));
    else setTimeout(look, 50);
  }})();
}})
"""


def waited(page: browser.Page, expression: str) -> Any:
    return page.value(WAIT_FOR.format(expression=expression))


def check_quiet(page: browser.Page, address: str) -> None:
    assert page.requests
    assert [url for url in page.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert page.complaints == []


def search(page: browser.Page, words: str) -> list[str]:
    """Type words into the search field and return the addresses of what is found."""
    page.value("document.querySelector('[data-md-component=search-query]').focus()")
    page.call("Input.insertText", text=words)
    found = waited(
        page,
        "(links => links.length && links)([...document.querySelectorAll("
        "'.md-search-result__list a.md-search-result__link')].map(link => link.href))",
    )
    return [urldefrag(link.partition("?")[0])[0] for link in found]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("denominator", "explanation/update.html"),
        ("edit_each", "reference/edits.html"),
        ("second moment corpus", "explanation/limits.html"),
        ("job array", "sweeps.html"),
    ],
)
def test_search_finds_a_page_that_can_be_read(
    page: browser.Page, address: str, words: str, expected: str
) -> None:
    page.open(address, width=1200, height=900, scheme="light")
    assert address + expected in search(page, words)
    check_quiet(page, address)
    page.open(address + expected, width=1200, height=900, scheme="dark")
    text = page.value("document.querySelector('article').innerText")
    assert words.split(maxsplit=1)[0].lower() in text.lower()
    check_quiet(page, address)


def test_search_finds_nothing_where_there_is_nothing(page: browser.Page, address: str) -> None:
    page.open(address, width=1200, height=900, scheme="light")
    page.value("document.querySelector('[data-md-component=search-query]').focus()")
    page.call("Input.insertText", text="xylophone")
    message = waited(
        page,
        "(text => /no matching/i.test(text) && text)"
        "(document.querySelector('.md-search-result__meta').innerText)",
    )
    assert "No matching documents" in message


def test_every_page_reads_on_a_phone_and_makes_no_request_elsewhere(
    page: browser.Page, address: str, site: Path, pages: dict[Path, Links]
) -> None:
    for path in sorted(pages):
        page.open(
            address + path.relative_to(site).as_posix(), width=390, height=800, scheme="light"
        )
        check_quiet(page, address)
        wide = page.value("document.scrollingElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{path} is {wide} pixels too wide"
        assert page.value("document.querySelectorAll('article h1').length") == 1, path


def test_formulas_are_drawn(page: browser.Page, address: str) -> None:
    page.open(address + "explanation/update.html", width=1200, height=900, scheme="light")
    sizes = page.value(
        "[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())"
        ".map(box => Math.min(box.width, box.height))"
    )
    assert len(sizes) > 40
    assert min(sizes) > 4
