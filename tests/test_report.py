"""The report: says everything the scripts left, loads nothing, and can be read on a phone."""

import json
import re
import shutil
from collections.abc import Generator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Page, chromium, find_chromium
from synthetic import BY_SCRIPT, CLAIMS, CLAIMS_OF

from firsttok.cli import main
from firsttok.data import paper_values
from firsttok.errors import BadInputError
from firsttok.paper.claims import Result, Status, judge
from firsttok.paper.figures import figure, save_figure
from firsttok.paper.inconsistencies import find_inconsistencies
from firsttok.paper.pages import render_html, render_markdown, write_reports
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS
from firsttok.paper.report import build_report, result_folders
from firsttok.paper.tables import Found, publish
from firsttok.storage import read_json

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = '<script>alert("x")</script> | *bold* & "quoted"'


def verdicts(name: str, rows: list[dict[str, Any]], **provenance: Any) -> list[dict[str, Any]]:
    """What a script's file says of its claims."""
    result = Result(script=name, rows=tuple(rows), provenance=provenance)
    return [judge(claim, result).as_dict() for claim in CLAIMS_OF[name]]


def leave(out: Path, model: str, scripts: tuple[str, ...] = SCRIPTS, **changed: Any) -> Path:
    """Leave what the scripts would have left, with pictures."""
    folder = out / model
    folder.mkdir(parents=True)
    drawn, (axis,) = figure(1)
    axis.plot([0, 1], [1, 2])
    save_figure(folder / "picture", drawn)
    for name in scripts:
        rows, provenance = BY_SCRIPT[name]
        provenance = {
            **provenance,
            "model": {
                "name": model,
                "source": "nowhere",
                "fingerprint": "f" * 64,
                "dtype": "float32",
                "bos": "without",
                "bos_token_ids": [],
            },
            "layer": 15,
            "seed": 0,
            "seconds": 12.5,
            "command": f"python analyses/{name}.py --profile full",
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            **changed,
        }
        record = {
            "title": f"Title of {name} {HOSTILE}",
            "columns": ["", f"{model}, measured", "paper, gpt2-xl"],
            "lines": [[f"line of {name}", 0.00123, 26084.66], [HOSTILE, None, "24 of 24"]],
            "claims": verdicts(name, rows, **provenance),
            "provenance": provenance,
            "rows": rows,
        }
        (folder / f"{name}.json").write_text(json.dumps(record), "utf-8")
        for suffix in (".png", ".svg"):
            shutil.copy(folder / f"picture{suffix}", folder / f"{name}{suffix}")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models; on the second some scripts were run, and came out otherwise."""
    out = tmp_path_factory.mktemp("figures")
    leave(out, "smollm2-135m")
    other = leave(out, "gemma3-270m", ("table1_update_components", "table4_efficacy"))
    path = other / "table4_efficacy.json"
    record = json.loads(path.read_text("utf-8"))
    for row in record["rows"]:
        row["efficacy"] = 0.95
    record["claims"] = verdicts("table4_efficacy", record["rows"], **record["provenance"])
    path.write_text(json.dumps(record), "utf-8")
    (out / "quick").mkdir()
    assert len(write_reports(out)) == 4
    return out


class Parsed(HTMLParser):
    """A page's elements, with a check that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def page(out: Path) -> Parsed:
    return Parsed((out / "smollm2-135m" / "index.html").read_text("utf-8"))


def plain(text: str) -> str:
    """A sentence as the page shows it."""
    return text.replace("C^-1", "C−1").replace("k_bar", "k̄").replace("k^u", "ku")  # noqa: RUF001


def test_every_claim_stands_with_verdict_rule_and_reason(out: Path, page: Parsed) -> None:
    report = build_report(out / "smollm2-135m", result_folders(out))
    ids = [attributes.get("id") for _, attributes in page.elements]
    markdown = (out / "smollm2-135m" / "README.md").read_text("utf-8")
    assert len(report.judged) == len(CLAIMS)
    for item in report.judged:
        special = {"figure8-llama": Status.NOT, "own-encoder-place": Status.NOT_JUDGED}
        assert item.status == special.get(item.id, Status.REPRODUCED)
        assert ids.count(item.id) == 1
        for text in (item.sentence, item.rule, item.reason):
            assert plain(text) in page.words
        # In the summary, beside other models, in its section, and among what was not judged.
        places = 3 + (item.status == Status.NOT_JUDGED)
        assert page.words.count(plain(item.sentence)) == places
    paper = sum(not item.own for item in report.judged)
    own = len(report.judged) - paper
    paper_count = f"{paper - 1} reproduced, 0 partly, 1 not reproduced, 0 not judged"
    assert paper_count in page.words
    assert f"{own - 1} hold, 0 partly, 0 do not hold, 1 not judged" in page.words
    assert paper_count in markdown


def test_a_script_run_by_itself_has_a_section_where_it_was_run(tmp_path: Path) -> None:
    folder = leave(tmp_path, "smollm2-135m")
    (name, heading), *_ = ((each.name, each.heading) for each in EXPERIMENTS if each.alone)
    without = {section.script for section in build_report(folder).sections}
    assert name not in without
    record = json.loads((folder / f"{SCRIPTS[0]}.json").read_text("utf-8"))
    (folder / f"{name}.json").write_text(json.dumps(record), "utf-8")
    (section,) = [each for each in build_report(folder).sections if each.script not in without]
    assert (section.script, section.heading) == (name, heading)
    assert heading in render_html(build_report(folder))
    for script in SCRIPTS:
        (folder / f"{script}.json").unlink()
    assert result_folders(tmp_path) == [folder]
    assert name in {section.script for section in build_report(folder).sections}


def test_every_table_and_picture_is_there(out: Path, page: Parsed) -> None:
    markdown = (out / "smollm2-135m" / "README.md").read_text("utf-8")
    assert len(page.of("img")) == len(SCRIPTS)
    for name in SCRIPTS:
        assert f"Title of {name}" in page.words
        assert f"line of {name} 0.00123 26,084.66" in spaced(out)
        assert f"python analyses/{name}.py --profile full" in page.words
        assert f"]({name}.png)" in markdown
        escaped = name.replace("_", r"\_")
        assert f"| line of {escaped} | 0.00123 | 26,084.66 |" in markdown
    printed = [f"Table {number}" for number in range(1, 8)] + ["Equation 4"]
    for table in printed:
        assert f"The paper's {table}" in page.words
        for value in paper_values(table):
            shown = f"{value.value:,.2f}" if value.value != 100 else "100"
            assert value.row in page.words
            assert shown in page.words or f"{value.value:,.3f}" in page.words
    for item in find_inconsistencies():
        assert plain(item.sentence) in page.words


def spaced(out: Path) -> str:
    """The page's words, cells apart."""
    text = (out / "smollm2-135m" / "index.html").read_text("utf-8")
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_page_is_accessible(page: Parsed) -> None:
    assert page.of("html")[0]["lang"] == "en"
    viewport = [m for m in page.of("meta") if m.get("name") == "viewport"]
    assert viewport[0]["content"] == "width=device-width, initial-scale=1"
    assert all(image.get("alt") for image in page.of("img"))
    assert all(header.get("scope") in ("col", "row") for header in page.of("th"))
    assert len(page.of("table")) == len(page.of("caption"))
    assert len(page.of("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [found for _, attributes in page.elements if (found := attributes.get("id"))]
    assert len(set(ids)) == len(ids)
    for link in page.of("a"):
        target = link["href"] or ""
        assert target.startswith("https://") or target[1:] in ids


def test_page_loads_nothing(out: Path, page: Parsed) -> None:
    text = (out / "smollm2-135m" / "index.html").read_text("utf-8")
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "video", "audio", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "poster", "data", "action") or (
                name == "href" and tag != "a"
            ):
                assert (value or "").startswith("data:")
    outside = re.findall(r"(?:https?:)?//[^\s\"'<)]+", re.sub(r"data:[^\"]+", "", text))
    assert set(outside) == {"https://aclanthology.org/2024.findings-emnlp.236"}
    assert "@import" not in text
    assert "url(" not in text


def test_what_a_script_wrote_is_shown_and_not_obeyed(out: Path, page: Parsed) -> None:
    assert HOSTILE in page.words
    markdown = (out / "smollm2-135m" / "README.md").read_text("utf-8")
    assert "<script>" not in markdown
    (row,) = {line for line in markdown.splitlines() if line.startswith("| &lt;script")}
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_models_are_compared(out: Path) -> None:
    page = spaced(out)
    report = build_report(out / "smollm2-135m", result_folders(out))
    assert report.models == ("smollm2-135m", "gemma3-270m")
    # Judged on both, and different; what was run on one only differs in nothing.
    assert [each.claim.id for each in report.differing] == ["table4-efficacy"]
    assert "1 claim that was judged on several models came out differently" in page
    other = (out / "gemma3-270m" / "README.md").read_text("utf-8")
    claim = "C-ROME spares the model but hardly writes the new target on collapse cases."
    assert f"**Table 4: {claim}** | ✗ not reproduced | ✓ reproduced |" in other
    alone = build_report(out / "smollm2-135m")
    assert "on one model" not in render_markdown(alone)
    assert 'id="models"' not in render_html(alone)


def test_what_was_not_run_says_how_to_run_it(out: Path) -> None:
    text = (out / "gemma3-270m" / "README.md").read_text("utf-8")
    report = build_report(out / "gemma3-270m")
    assert len(report.judged) == 4
    (section,) = [each for each in report.sections if each.script == "figure2_keys"]
    command = "python analyses/figure2_keys.py --model gemma3-270m"
    assert section.result is None
    assert f"{section.heading}, not run.** Run it with `{command}`." in text
    assert f"Not run; run it with `{command}`." in text
    page = (out / "gemma3-270m" / "index.html").read_text("utf-8")
    assert page.count(f"<code>{command}</code>") == 2
    # A claim is still told where another model's scripts were run.
    (row,) = [line for line in text.splitlines() if "where that of normal cases lies" in line]
    assert "| ○ not run | ✓ reproduced |" in row
    assert page.count("not run</span>") == len(CLAIMS) - 4
    assert "Models that were not there for Table 3: gpt2-xl." in (
        out / "smollm2-135m" / "README.md"
    ).read_text("utf-8")
    # The paper's numbers stand even where nothing of ours does.
    assert "The paper's Table 2:" in text
    assert text.count("![") == 2


def test_equal_files_give_an_equal_report(out: Path, tmp_path: Path) -> None:
    for model in ("smollm2-135m", "gemma3-270m"):
        shutil.copytree(out / model, tmp_path / model)
    again = write_reports(tmp_path)
    for path in again:
        assert path.read_bytes() == (out / path.relative_to(tmp_path)).read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_mixed_results_are_pointed_out(tmp_path: Path) -> None:
    folder = leave(tmp_path, "llama", ("table4_efficacy",))
    assert build_report(folder).mixed == ()
    path = folder / "table4_efficacy.json"
    record = json.loads(path.read_text("utf-8"))
    record["provenance"]["model"]["fingerprint"] = "e" * 64
    (folder / "table5_prefixed_efficacy.json").write_text(json.dumps(record), "utf-8")
    report = build_report(folder)
    assert report.mixed == ("weights",)
    assert "Mixed results" in render_html(report)
    assert "weights" not in dict(report.facts)
    facts = {section.script: dict(section.facts) for section in report.sections}
    assert facts["table5_prefixed_efficacy"]["weights"] == "e" * 64


def test_results_of_older_scripts_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    rows, provenance = BY_SCRIPT["table4_efficacy"]
    record = {"rows": rows, "provenance": provenance}
    (folder / "table4_efficacy.json").write_text(json.dumps(record), "utf-8")
    report = build_report(folder)
    text, markdown = render_html(report), render_markdown(report)
    Parsed(text)
    assert "holds rows but no table" in text
    assert "<img" not in text
    assert report.judged == ()
    said = "This result is of an older version, which kept no verdicts; make it again with "
    assert f"{said}<code>python analyses/table4_efficacy.py --model llama</code>." in text
    assert f"{said}`python analyses/table4_efficacy.py --model llama`." in markdown
    # The command it was made with makes it again.
    record["provenance"] = {**provenance, "command": "python analyses/table4_efficacy.py --seed 3"}
    (folder / "table4_efficacy.json").write_text(json.dumps(record), "utf-8")
    assert f"{said}`python analyses/table4_efficacy.py --seed 3`." in render_markdown(
        build_report(folder)
    )


def test_large_drawings_go_in_as_png(tmp_path: Path) -> None:
    folder = leave(tmp_path, "llama", ("table4_efficacy",))
    assert "data:image/svg+xml" in render_html(build_report(folder))
    with (folder / "table4_efficacy.svg").open("a") as drawing:
        drawing.write("<!--" + "x" * 200_000 + "-->")
    text = render_html(build_report(folder))
    assert "data:image/svg+xml" not in text
    assert "data:image/png" in text


def test_publish_prints_and_keeps_table_and_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[list[Any]] = [["first", 0.00123, None], ["second", 26084.66, "2 of 3"]]
    given: dict[str, Any] = {"title": "A table", "columns": ["", "here", "paper, gpt2-xl"]}
    rows, provenance = BY_SCRIPT["table4_efficacy"]
    found = Found(**given, lines=lines, rows=rows, provenance={"held_out": 1000})
    claims = CLAIMS_OF["table4_efficacy"]
    publish(
        tmp_path / "table4_efficacy", found, provenance={"seed": 0, **provenance}, claims=claims
    )
    shown = capsys.readouterr().out
    for word in ("A table", "paper, gpt2-xl", "0.00123", "26,084.66", "2 of 3"):
        assert word in shown
    told = [line for line in shown.splitlines() if line.startswith("reproduced (Table 4): ")]
    assert [line.partition(": ")[2] for line in told] == [claim.sentence for claim in claims]
    record = read_json(tmp_path / "table4_efficacy.json", "results")
    provenance = {"seed": 0, **provenance, "held_out": 1000}
    judged = verdicts("table4_efficacy", rows, **provenance)
    assert record == given | {
        "lines": lines,
        "claims": judged,
        "provenance": provenance,
        "rows": rows,
    }
    assert [each["status"] for each in judged] == ["reproduced"] * 2
    kept = (tmp_path / "table4_efficacy.csv").read_text("utf-8").splitlines()
    assert kept[0] == ",".join(rows[0])
    assert len(kept) == len(rows) + 1


def test_publish_refuses_what_is_no_number(tmp_path: Path) -> None:
    found = Found(title="", columns=[], lines=[], rows=[{"perplexity": float("inf")}])
    with pytest.raises(ValueError, match="inf"):
        publish(tmp_path / "table", found, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_equal_numbers_give_an_equal_picture(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        drawn, (axis,) = figure(1)
        # A clipped line has an id in an SVG, which is random unless it is told not to be.
        axis.plot([0, 1, 2], [1, 5, 2], marker="o")
        axis.set_xlim(0.5, 1.5)
        save_figure(tmp_path / folder / "picture", drawn)
    for suffix in (".png", ".svg"):
        one, two = (tmp_path / folder / f"picture{suffix}" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_broken_picture_is_named(tmp_path: Path) -> None:
    folder = leave(tmp_path, "llama", ("table4_efficacy",))
    (folder / "table4_efficacy.png").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"table4_efficacy\.png is no PNG"):
        render_html(build_report(folder))


def test_command_writes_the_reports(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(out, tmp_path / "figures")
    for path in (tmp_path / "figures").rglob("index.html"):
        path.unlink()
    assert main(["report", "--out", str(tmp_path / "figures"), "--model", "gemma3-270m"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in shown] == ["index.html", "README.md"]
    assert all(Path(line).is_file() for line in shown)
    assert not (tmp_path / "figures" / "smollm2-135m" / "index.html").exists()


@pytest.mark.parametrize("model", [None, "none-such"])
def test_command_without_results_says_how_to_make_them(
    model: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [] if model is None else ["--model", model]
    assert main(["report", "--out", str(tmp_path), *chosen]) == 2
    complaint = capsys.readouterr().err
    assert "firsttok reproduce" in complaint
    assert (model or "no results in") in complaint
    with pytest.raises(BadInputError):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--out", "no"], "no results in no, which is no folder"),
        (
            ["--out", "figures/one"],
            "one is the folder of one model; give --out figures --m",
        ),
        (["--out", "."], "no results in . itself, but in figures; give --out figures"),
        (["--out", "empty"], "no results in empty; make them with: firsttok reproduce"),
        (["--out", "figures", "--model", "two"], "no results of two in figures, but of one"),
    ],
)
def test_results_that_are_elsewhere_are_pointed_to(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave(tmp_path / "figures", "one", ("table1_update_components",))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *argv]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("index.html"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Generator[Page, None, None]:
    if find_chromium() is None:
        pytest.skip("needs Chromium; with Debian: apt-get install chromium")
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_page_in_a_browser(out: Path, tab: Page, width: int, height: int, scheme: str) -> None:
    path = out / "smollm2-135m" / "index.html"
    tab.open(path, width=width, height=height, scheme=scheme)
    images = tab.value(
        "Array.from(document.images, i => i.decode().then(() => i.naturalWidth, () => 0))"
        ".reduce(async (all, one) => [...await all, await one], [])"
    )
    assert len(images) == len(SCRIPTS)
    assert min(images) > 0
    # A picture shows at its own shape.
    shapes = tab.value(
        "Array.from(document.images, i => (i.clientWidth / i.clientHeight)"
        " / (i.naturalWidth / i.naturalHeight))"
    )
    assert all(shape == pytest.approx(1, abs=0.02) for shape in shapes)
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [path.as_uri()]
    # Closed parts have no boxes; a reader may open them, too.
    tab.value("document.querySelectorAll('details').forEach(d => { d.open = true })")
    tables = tab.value(
        "Array.from(document.querySelectorAll('table'), t => t.getBoundingClientRect().height)"
    )
    # Two of verdicts, one of models, one of each script, eight of the paper.
    assert len(tables) == 2 + 1 + len(SCRIPTS) + 8
    assert min(tables) > 20
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value("document.body.scrollWidth") <= width
    # What is wider than the page scrolls in a region of its own, which the keyboard reaches.
    wide = tab.value(
        "Array.from(document.querySelectorAll('body *'))"
        ".filter(e => !e.closest('[role=region][tabindex], .skip'))"
        f".filter(e => e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML)"
    )
    assert wide == []
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128"
    assert tab.value(dark) is (scheme == "dark")
    # Charts are drawn for a light page.
    card = "getComputedStyle(document.querySelector('figure')).backgroundColor"
    assert tab.value(card) == "rgb(255, 255, 255)"
    assert min(tab.value(CONTRASTS)) >= 4.5


CONTRASTS = """
(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = parse(c).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    while (e) {
      const c = getComputedStyle(e).backgroundColor;
      if ((parse(c)[3] ?? 1) > 0) return c;
      e = e.parentElement;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = 'p, td, th, .badge, a, caption, figcaption, li, dt, dd, summary, .tag';
  return Array.from(document.querySelectorAll(texts))
    .filter(e => e.textContent.trim()).map(e => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    });
})()
"""
"""Contrast of text with what is behind it, by WCAG 2; 4.5 is what AA asks of small text."""
