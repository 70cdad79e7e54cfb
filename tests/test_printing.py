"""Text from outside is printed as it is: never markup, and nothing that a terminal would obey."""

import ast
import io
import json
import logging
import random
import sys
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_display import Reader
from test_report import leave
from tiny import FACTS, SENTENCES, build

from firsttok.cli import main
from firsttok.console import exit_on_error, note, print_table, progress_bar, show, show_json
from firsttok.display import Note, Panel, Part, Strip, Table
from firsttok.errors import BadInputError
from firsttok.escapes import as_html, as_json, printable
from firsttok.paper.figures import figure, plain, save_figure
from firsttok.paper.pages import write_reports
from firsttok.svg import Plot

ROOT = Path(__file__).parent.parent
REORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HOSTILE = (
    "[/INST]",
    "[/red]A",
    "[bold]b[/bold]",
    ":smile:",
    "\x1b[2J\x1b[31m",
    "\x9b31m",
    "a\rb\x08\x07",
    "\u202eabc",
    "a\u2028b",
    "<b>&amp;</b>",
    "$x$ and $y",
    "\\",
    "a\nb\tc",
)
"""What a terminal, rich, HTML, Markdown or a formula would obey."""


def obeyed(text: str) -> list[str]:
    """Characters that move a cursor, reorder a line or cannot be encoded."""
    return [
        char
        for char in text
        if char not in "\n\t"
        and (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in REORDERING)
    ]


def test_every_character_that_a_terminal_obeys_is_escaped_and_no_other_one_changed() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    harmful = obeyed(everything)
    harmless = everything.translate(dict.fromkeys(map(ord, harmful)))
    assert printable(harmless) == harmless
    for char in harmful:
        assert printable(char) == ascii(char)[1:-1]
    assert printable("a\nb\tc\x1b", lines=False) == "a\\nb\\tc\\x1b"


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "utf-16"])
def test_json_reads_back_the_same_in_every_encoding(encoding: str) -> None:
    draw = random.Random(7)
    for _ in range(300):
        content = {"".join(chr(draw.randrange(0x2100)) for _ in range(9)): [*HOSTILE, "\ud800😀中"]}
        line = as_json(content, encoding=encoding)
        assert obeyed(line) == []
        assert json.loads(line.encode(encoding).decode(encoding)) == content


PARTS: dict[str, Callable[[str], Part]] = {
    "note": lambda text: Note(text=text),
    "table": lambda text: Table(columns=["", text], lines=[[text, text], ["a", 1.0]]),
    "strip": lambda text: Strip(pieces=[text, "a"], marked=0, mark=text),
    "plot": lambda text: Plot(title=text, series={text: [1.0, 2.0]}, x_label=text, y_label=text),
    "panel": lambda text: Panel(title=text, parts=[Note(text=text)], source={text: text}),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_shown_holds_the_text_and_no_tag_more(kind: str, text: str) -> None:
    part, harmless = PARTS[kind](text), PARTS[kind]("plain")
    shown = Panel(title="", parts=[part])
    assert obeyed(shown.text) == []
    assert obeyed(part.html) == []
    reader = Reader(part.html)
    assert reader.tags == Reader(harmless.html).tags
    whole = "".join(reader.texts)
    assert printable(text) in whole or printable(text, lines=False) in whole


def test_a_caret_stands_below_its_token_whatever_the_tokens_before_it_hold() -> None:
    strip = Strip(pieces=["\x1b", "\t", "a\nb", "here"], marked=3, mark="lookup")
    line, mark = strip.text.splitlines()
    assert line[mark.index("^") :] == "here"


def test_a_notebook_sets_no_formula_between_two_prices() -> None:
    # The classes by which MathJax, which notebooks load, is told to leave an element alone.
    shown = Panel(title="This costs $5, not $6").html
    assert shown.startswith('<div class="firsttok tex2jax_ignore mathjax_ignore">')


@pytest.mark.parametrize("text", HOSTILE)
def test_a_drawing_is_well_formed_xml(text: str) -> None:
    source = PARTS["plot"](text).html
    found = [element.text for element in ET.fromstring(source).iter() if element.text]
    assert found.count(printable(text)) >= 4


def test_a_formula_in_a_name_does_not_stop_a_figure(tmp_path: Path) -> None:
    drawn, (axis,) = figure(1)
    axis.set_title(plain("$\\undefined{$ \x1b"))
    save_figure(tmp_path / "figure", drawn)
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("text", HOSTILE)
def test_all_ways_to_print_print_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    show(text)
    show_json({text: text})
    print_table(text, ["a", text], [[text, 1.0]])
    first = printable(text)
    assert out.getvalue().startswith(f"{first}\n")
    assert json.loads(out.getvalue()[len(first) :].splitlines()[1]) == {text: text}
    for part in first.split():
        # As title, as the name of a column and as a cell.
        assert out.getvalue().count(part) >= 4

    def speak() -> None:
        note(text)
        with progress_bar() as progress:
            progress.add_task(text, total=1)
        logging.getLogger("firsttok").warning("a message: %s", text)
        raise BadInputError(f"about {text}")

    assert exit_on_error(speak) == 2
    logging.getLogger().handlers.clear()
    assert f"firsttok: about {printable(text, lines=False)}\n" in errors.getvalue()
    for part in first.split():
        assert errors.getvalue().count(part) >= 3
    for stream in (out, errors):
        assert obeyed(stream.getvalue()) == []


def test_only_one_module_prints() -> None:
    for folder in ("firsttok", "analyses"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "console.py":
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                named = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
                stream = isinstance(node, ast.Attribute) and ast.unparse(node)
                written = stream in ("sys.stdout", "sys.stderr")
                rich = isinstance(node, ast.ImportFrom) and (node.module or "") == "rich.console"
                # Sinks flush before a pipe.
                prints = named or rich or (written and path.name != "sinks.py")
                assert not prints, f"{path.name}, line {getattr(node, 'lineno', 0)} prints"


@pytest.mark.parametrize("text", ["$x$ and $y$", "`a` ``b``", "~~gone~~", "a\x1b[2J\u202eb\ud800"])
def test_a_report_shows_a_command_and_a_cell_as_they_are(text: str, tmp_path: Path) -> None:
    folder = leave(tmp_path, "model", ("table1_update_components",))
    path = folder / "table1_update_components.json"
    record = json.loads(path.read_text("utf-8"))
    record["provenance"]["command"] = text
    record["lines"][0][0] = f"cell {text}"
    path.write_text(json.dumps(record), "utf-8")
    write_reports(tmp_path)
    markdown = (folder / "README.md").read_text("utf-8")
    page = (folder / "index.html").read_text("utf-8")
    assert obeyed(markdown + page) == []
    assert as_html(f"cell {text}") in page
    (line,) = [line for line in markdown.splitlines() if line.startswith("| cell ")]
    for special in "$~`":
        assert line.count(special) == line.count(f"\\{special}")
    (made,) = [line for line in markdown.splitlines() if " command `" in line]
    code = made.partition(" command ")[2].rstrip(".;")
    fence = code[: len(code) - len(code.lstrip("`"))]
    assert code.startswith(fence)
    assert code.endswith(fence)
    assert fence not in code[len(fence) : -len(fence)].replace(f"{fence}`", "")
    assert code[len(fence) : -len(fence)].strip() == printable(text)


FACT = replace(FACTS[0], subject="[/red]A\x1b[2J", template="Where is {}? [/INST] :smile: In")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose folder's name is markup, and so are its facts."""
    folder = tmp_path_factory.mktemp("models") / "[b]m[i]:smile:\x1b"
    build("llama", folder)
    return folder


COMMANDS: dict[str, list[str]] = {
    "tokens": ["tokens", "FACT"],
    "edit": ["edit", "FACT", "--target", "[bold]x", "SET", "--method", "rome", "c-rome"],
    "scan": ["scan", "SET", "--facts", "FACTS", "--out", "OUT"],
    "screen": ["screen", "SET", "--facts", "FACTS", "--out", "OUT"],
    "sweep": ["sweep", "OUT/[b]run", "SET", "--facts", "FACTS", "--metrics", "perplexity"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_facts_and_models_as_they_are(
    name: str, llama: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contexts, texts, facts = (tmp_path / f"{part}.json" for part in ("c", "t", "f"))
    contexts.write_text(json.dumps(["{}", "[/a] I know. {}"]), "utf-8")
    texts.write_text(json.dumps(SENTENCES), "utf-8")
    facts.write_text(json.dumps([FACT.as_record()]), "utf-8")
    sets = ["--contexts", str(contexts), "--second-moment", "identity", "--texts", str(texts)]
    words = {
        "FACT": ["--subject", FACT.subject, "--template", FACT.template],
        "SET": [*sets, "--steps", "2"],
    }
    argv = [part for word in COMMANDS[name] for part in words.get(word, [word])]
    argv = [word.replace("FACTS", str(facts)).replace("OUT", str(tmp_path)) for word in argv]
    assert main([*argv, "--model", str(llama)]) == 0
    captured = capsys.readouterr()
    assert obeyed(captured.out) == []
    expected = {
        "tokens": "|]|A|\\x1b|[|2|J|?|",
        "edit": "Where is [/red]A\\x1b[2J? [/INST] :smile: In",
        "scan": "/_b_m_i_smile_-f1e2a99b/collapse_cases.json",
        "screen": "Where is [/red]A\\x1b[2J? [/INST] :smile: In",
        "sweep": "[b]m[i]:smile:\\x1b",
    }
    assert expected[name] in captured.out.replace("\n", "")
    if name == "sweep":
        assert main(["results", f"{tmp_path}/[b]run"]) == 0
        assert main(["results", f"{tmp_path}/[b]run", "--sql", "SELECT subject FROM rows"]) == 0
        captured = capsys.readouterr()
        assert "[b]m[i]:smile:\\x1b" in captured.out
        assert "[/red]A\\x1b[2J" in captured.out
        assert obeyed(captured.out) == []
