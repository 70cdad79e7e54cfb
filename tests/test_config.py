"""Configuration files: given options win over them, they win over defaults, damage is named."""

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from firsttok.cli import _parser, main
from firsttok.config import config_keys, configured, read_config, toml_line
from firsttok.errors import BadInputError
from firsttok.options import add_edit_options, add_model_options, add_script_options
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS

# Part of Python from 3.11 on.
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).parent.parent
EVERY = """
model = "some/folder"
layer = 3
bos = "without"
dtype = "float64"
device = "cpu"
seed = 5
contexts = "contexts.json"
second_moment = "identity"
corpus = "corpus.txt"
texts = "texts.json"
text_bos = "with"
steps = 7
lr = 0.25
weight_decay = 0.5
clamp = 2
kl = 0.125
facts = "facts.json"
cases = "cases.json"
join = "none"
straddle = "token"
"""
VALUES = tomllib.loads(EVERY)
FACT = ["--subject", "England", "--template", "{} is"]
COMMANDS = {
    "tokens": FACT,
    "edit": [*FACT, "--target", "Berlin"],
    "scan": [],
    "screen": [],
    "hard": ["--out", "hard.json"],
    "sweep": ["run"],
    "sequence": ["run"],
    "inspect": [],
    "reproduce": [],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(EVERY, "utf-8")
    return path


def parsed(arguments: list[str]) -> dict[str, object]:
    parser = _parser()
    return vars(configured(parser.parse_args(arguments), parser, arguments))


def test_every_option_of_model_and_edit_is_a_key() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_model_options(parser)
    add_edit_options(parser)
    options = {action.dest for action in parser._actions} - {"config"}
    assert set(config_keys()) == options | {"facts", "cases"}
    assert set(VALUES) == set(config_keys())


def test_all_commands_with_a_model_take_a_configuration() -> None:
    choices = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    takers = {
        name
        for name, parser in choices.choices.items()
        if any("--model" in action.option_strings for action in parser._actions)
    }
    # Two take the label of a folder of results, and open no model; an edit brings its settings.
    assert takers - {"report", "results", "show", "export"} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_values_are_the_defaults_of_every_command(command: str, config: Path) -> None:
    plain = parsed([command, *COMMANDS[command]])
    found = parsed([command, *COMMANDS[command], "--config", str(config)])
    for name, value in VALUES.items():
        if name in plain:
            several = command == "sweep" and name in ("model", "layer")
            assert found[name] == ([value] if several else value)
    changed = {name for name in plain if plain[name] != found[name]}
    assert changed - {"config"} <= set(VALUES)
    assert "configurable" not in found or "config" not in found


@pytest.mark.parametrize("first", [True, False])
def test_a_given_option_wins_wherever_it_stands(config: Path, first: bool) -> None:
    given = ["--layer", "9", "--lr", "0.5", "--model", "other", "--bos", "with"]
    named = ["--config", str(config)]
    found = parsed(["scan", *(given + named if first else named + given)])
    assert (found["layer"], found["lr"], found["model"], found["bos"]) == (9, 0.5, "other", "with")
    assert found["steps"] == VALUES["steps"]


def test_an_option_given_as_its_own_default_wins_too(config: Path) -> None:
    found = parsed(["scan", "--config", str(config), "--bos", "as_tokenizer", "--seed", "0"])
    assert (found["bos"], found["seed"]) == ("as_tokenizer", 0)


def test_scripts_take_the_same_file(config: Path) -> None:
    parser = argparse.ArgumentParser()
    add_script_options(parser)
    argv = ["--config", str(config), "--steps", "2"]
    found = vars(configured(parser.parse_args(argv), parser, argv))
    assert found == VALUES | {"steps": 2, "config": str(config)} | {
        "profile": "quick",
        "collapse": None,
        "normal": None,
        "out": "figures",
        "skip_bad": False,
    }


@pytest.mark.parametrize("script", [EXPERIMENTS[0].name, EXPERIMENTS[-1].name])
def test_a_script_refuses_a_damaged_one_before_any_work(script: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("layr = 3", "utf-8")
    command = [sys.executable, f"analyses/{script}.py", "--config", str(path), "--model", "/none"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "'layr' is unknown; did you mean layer?" in done.stderr
    assert "Traceback" not in done.stderr


def test_dashes_and_underscores_and_a_byte_order_mark_are_all_right(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(b"\xef\xbb\xbftext-bos = 'with'\nweight-decay = 1\n")
    assert read_config(path) == {"text_bos": "with", "weight_decay": 1.0}
    assert isinstance(read_config(path)["weight_decay"], float)


def test_an_empty_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("# nothing\n", "utf-8")
    plain = parsed(["scan"])
    plain.pop("configurable", None)
    assert parsed(["scan", "--config", str(path)]) == plain | {"config": str(path)}


BAD = {
    "unknown key": ("layr = 3", "key 'layr' is unknown; did you mean layer?"),
    "far key": ("zzzzzz = 3", "known are model, layer"),
    "option of one run": ("out = 'here'", "'out' is unknown"),
    "itself": ("config = 'other.toml'", "'config' is unknown"),
    "table": ("[edit]\nlr = 0.5", "[edit] is a table"),
    "text for number": ("layer = '3'", "layer is '3', and not a whole number"),
    "fraction for whole": ("steps = 2.5", "steps is 2.5, and not a whole number"),
    "truth for whole": ("layer = true", "layer is True, and not a whole number"),
    "text for fraction": ("lr = 'big'", "lr is 'big', and not a number"),
    "truth for fraction": ("kl = false", "kl is False, and not a number"),
    "number for text": ("model = 3", "model is 3, and not a text"),
    "list": ("model = ['a', 'b']", "and not a text"),
    "date": ("seed = 2024-01-01", "and not a whole number"),
    "choice": ("bos = 'maybe'", "bos is 'maybe'; choose one of as_tokenizer, with, without"),
    "type": ("dtype = 'int8'", "choose one of float32"),
    "both spellings": ("text-bos = 'with'\ntext_bos = 'with'", "text_bos is given twice"),
    "same key twice": ("layer = 1\nlayer = 2", "is not valid TOML"),
    "cut off": ("model = 'smollm2", "is not valid TOML"),
    "no value": ("layer =", "is not valid TOML"),
    "json": ('{"layer": 3}', "is not valid TOML"),
    "not finite": ("lr = nan", "learning_rate is nan"),
    "infinite": ("clamp = inf", "clamp is inf"),
    "out of range": ("steps = 0", "steps is 0; give a whole number of at least 1"),
    "huge": ("lr = 1" + "0" * 400, "is a number out of range"),
    "latin-1": (b"model = '\xe4'", "is not UTF-8 text at byte 9"),
}


@pytest.mark.parametrize("kind", BAD)
def test_each_damage_gets_one_sentence_with_file_and_key(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = BAD[kind]
    path = tmp_path / "bad.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    # The model is not there either: the file is refused before it is looked for.
    out = tmp_path / "out"
    assert main(["scan", "--model", "/none", "--out", str(out), "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"firsttok: {path}")
    assert words in line
    assert not out.exists()


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_is_none_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", "--config", str(tmp_path / name)]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["plain", 'a "quoted" one', "back\\slash", "tab\tnew\nline", "żółć 日本 🧪", "\x00\x7f", ""],
)
def test_what_is_written_is_read_back(text: str) -> None:
    line = toml_line("model", text, "with a reason")
    assert tomllib.loads(line) == {"model": text}
    assert "\n" not in line


@pytest.mark.parametrize("number", [3, 0, -2, 0.1, 1e-30, 2.0, 1e300])
def test_numbers_keep_their_kind(number: float) -> None:
    found = tomllib.loads(toml_line("lr", number))["lr"]
    assert found == number
    assert type(found) is type(number)


def test_a_parser_without_the_option_is_left_alone() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", type=int, default=4)
    args = parser.parse_args([])
    assert configured(args, parser, []) is args


def test_reproduce_passes_it_on(config: Path, tmp_path: Path) -> None:
    analyses = tmp_path / "analyses"
    analyses.mkdir()
    log = tmp_path / "log"
    stub = f"import sys; open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n'); sys.exit(2)"
    for name in SCRIPTS:
        (analyses / f"{name}.py").write_text(stub, "utf-8")
    command = ["reproduce", "--analyses", str(analyses), "--config", str(config), "--jobs", "1"]
    main([*command, "--texts", "mine.json", "--out", str(tmp_path / "out")])
    for line in log.read_text("utf-8").splitlines():
        words = line.split()
        assert words[words.index("--config") + 1] == str(config)
        assert words[words.index("--model") + 1] == VALUES["model"]
        assert words[words.index("--texts") + 1] == "mine.json"


def test_nothing_heavy_is_imported_for_it(config: Path) -> None:
    code = (
        f"from firsttok.config import read_config; read_config({str(config)!r}); import sys; "
        "print([m for m in ('torch', 'numpy', 'rich', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unreadable_values_are_errors_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("model = " + "[" * 5000 + "]" * 5000, "utf-8")
    with pytest.raises(BadInputError, match=r"nested too deeply|not valid TOML|not a text"):
        read_config(path)
