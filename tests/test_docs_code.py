"""Every code block of README and of the documentation: run, or parsed and said why not run."""

import argparse
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from tiny import CONTEXTS, FACTS, SENTENCES, build

import firsttok.contexts
import firsttok.models
import firsttok.second_moment
from firsttok.cli import _parser, main
from firsttok.contexts import ContextSet
from firsttok.data import builtin_sentences, load_facts
from firsttok.editing import load_methods
from firsttok.evaluation import continuation
from firsttok.models import BosPolicy, Model
from firsttok.storage import write_json

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "bash")

RUN = {
    *("tokens", "data list", "data synthesize", "results", "sweep status", "edit", "show"),
    *("export", "audit"),
}
"""Commands of firsttok that are run as they are written; all others are parsed only."""
PARSED = {
    "data pull": "fetches from its makers' address",
    "data sample": "writes for minutes; tests/test_corpus.py runs it on a tiny model",
    "inspect": "reads a corpus and edits facts; tests/test_inspection.py runs it on tiny models",
    "sequence": "takes minutes; tests/test_sequences.py runs it on a tiny model",
    "reproduce": "takes many minutes; tests/test_scripts.py runs the scripts on a tiny model",
    "scan": "edits every fact; tests/test_cli.py runs it on a tiny model",
    "hard": "edits facts until enough are found; tests/test_hard_lists.py runs it on a tiny model",
    "screen": "reads every fact; tests/test_screening.py runs it on a tiny model",
    "sweep": "edits whole data sets; tests/test_sweep.py runs it on tiny models",
    "tasks": "takes minutes; tests/test_tasks.py runs tasks on tiny models",
    "train-mend": "takes minutes; tests/test_mend_training.py runs it on a tiny model",
}
"""Why a command of firsttok is parsed and not run."""
NOT_HERE = {
    "helm": "needs a Kubernetes cluster",
    "kubectl": "needs a Kubernetes cluster",
    "make": "installs, or takes many minutes; its target is looked up",
    "pip": "changes the environment; the extra is looked up",
    "python": "takes many minutes; its options are parsed",
    "scontrol": "needs Slurm",
    "sleep": "waits for another machine",
    "srun": "needs Slurm",
}
"""Why another program is not run."""
HUB = "openai-community/"
"""Models that only a hub has are not fetched."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A code block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield Block(
                page=page,
                line=token.map[0] + 1,
                language=token.info.strip(),
                text=token.content,
            )


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL_BLOCKS = [block for block in BLOCKS if block.language in SHELL]


def commands_in(text: str) -> list[list[str]]:
    """The commands of a shell block, word by word; comments and assignments are no commands."""
    found: list[list[str]] = []
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            # head=$(scontrol ...) runs a program; what it is asked for is not looked at.
            words = ["scontrol"] if words[0].startswith("head=$(scontrol") else words[1:]
        if words and words[-1] == "&":
            words = words[:-1]
        if words:
            found.append([Path(words[0]).name, *words[1:]])
    return found


def firsttok_commands() -> list[tuple[Block, list[str]]]:
    found = [
        (block, words[1:])
        for block in SHELL_BLOCKS
        for words in commands_in(block.text)
        if words[0] == "firsttok"
    ]
    for block in BLOCKS:
        if block.language == "yaml":
            entry = yaml.safe_load(block.text)["spec"]["entrypoint"]
            found.append((block, shlex.split(entry)[1:]))
    return found


FIRSTTOK = firsttok_commands()


def kind_of(words: list[str]) -> str:
    two = " ".join(words[:2])
    return two if two in RUN or two in PARSED else words[0]


def parse(words: list[str]) -> argparse.Namespace:
    # What a job scheduler puts in.
    known = {"SLURM_ARRAY_TASK_ID": "3", "address": "node:6379"}
    filled = [re.sub(r"\$(\w+)", lambda found: known[found[1]], word) for word in words]
    return _parser().parse_args(filled)


def test_blocks_are_found_and_every_language_is_known() -> None:
    assert len(BLOCKS) > 40
    others = {"json", "python", "text", "toml", "yaml"}
    assert {block.language for block in BLOCKS} <= {*SHELL, *others}


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=lambda block: block.place)
def test_a_shell_block_is_sound_and_calls_what_there_is(block: Block) -> None:
    checked = subprocess.run(
        ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    for name, *words in commands_in(block.text):
        assert name == "firsttok" or name in NOT_HERE, f"{block.place}: {name}"
        check = CHECKS.get(name)
        if check is not None:
            check(words)


@pytest.mark.parametrize(
    ("block", "words"), FIRSTTOK, ids=[f"{block.place} {words[0]}" for block, words in FIRSTTOK]
)
def test_a_command_is_taken_by_the_real_parser(block: Block, words: list[str]) -> None:
    assert kind_of(words) in RUN or kind_of(words) in PARSED, f"{block.place}: {words}"
    parse(words)


@pytest.mark.parametrize("words", [["scan", "--no-such"], ["edits"], ["sweep"], ["data", "pull"]])
def test_a_mistaken_command_would_be_seen(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(words)


def test_no_reason_is_left_over() -> None:
    called = {words[0] for block in SHELL_BLOCKS for words in commands_in(block.text)}
    assert set(NOT_HERE) <= called
    asked = {kind_of(words) for _, words in FIRSTTOK}
    assert asked == RUN | set(PARSED)


def make_target(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(words) <= set(targets), words


def pip_install(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (extra,) = re.findall(r"firsttok\[(\w+)\]", " ".join(words))
    assert re.search(rf"^{extra} = \[", project, re.MULTILINE), words


def python_script(words: list[str]) -> None:
    script, *options = words
    if script == "-m":
        assert options[0] == "http.server"
        return
    assert (ROOT / script).is_file(), script
    told = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for option in options:
        if option.startswith("-"):
            assert re.search(rf"{option}\b", told), option


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": make_target,
    "pip": pip_install,
    "python": python_script,
}


@pytest.fixture(scope="module")
def furniture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: a model of one's own, and a run that has ended."""
    folder = tmp_path_factory.mktemp("furniture")
    build("gpt2", folder / "my-model")
    build("llama", folder / "embedded")
    config = folder / "embedded" / "config.json"
    # The built-in sentences are longer than a tiny model's window.
    longer = json.loads(config.read_text("utf-8")) | {"max_position_embeddings": 2048}
    config.write_text(json.dumps(longer), "utf-8")
    write_json(
        folder / "facts.json", [{**f.as_record(), "case_id": i} for i, f in enumerate(FACTS)]
    )
    write_json(folder / "texts.json", list(SENTENCES))
    write_json(folder / "contexts.json", list(CONTEXTS.templates))
    words = ["sweep", str(folder / "runs" / "first"), "--model", str(folder / "my-model")]
    for name in ("facts", "texts", "contexts"):
        words += [f"--{name}", str(folder / f"{name}.json")]
    words += ["--second-moment", "identity", "--steps", "2", "--layer", "1"]
    assert main(words) == 0
    return folder


@pytest.fixture
def desk(furniture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: None) -> Path:
    """A folder of one's own, in which a page is followed."""
    for name in ("my-model", "runs"):
        (tmp_path / name).symlink_to(furniture / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EMBEDDED = "smollm2-135m"
SCALE = {"contexts": 4, "max_tokens": 20_000, "sentences": 4, "steps": 6, "continued": 2}
"""How little of everything the pages are run with: a page states no number of its own."""
TEXTS = ("inputs", "exploration", "auditing", "evaluation.perplexity")
"""Modules that take the built-in sentences where none are given."""
MOMENTS = ("inputs", "exploration")
"""Modules that take the second moment of the default corpus where none is given."""
LOADING = ("models", "inputs", "commands.show", "commands.audit")
"""Modules that load a model by its name."""


def patch(patches: pytest.MonkeyPatch, modules: Sequence[str], name: str, value: Any) -> None:
    for module in modules:
        patches.setattr(import_module(f"firsttok.{module}"), name, value)


@pytest.fixture
def loaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages share one embedded model, one second moment and one set of contexts, all small."""
    plain: dict[str, Callable[..., Any]] = {
        "load": firsttok.models.load,
        "moment": firsttok.second_moment.compute_second_moment,
        "moments": firsttok.second_moment.compute_second_moments,
        "contexts": firsttok.contexts.kept_contexts,
        "sampled": firsttok.contexts.sample_contexts,
    }

    def load(name: str = EMBEDDED, **settings: Any) -> Model:
        if name != EMBEDDED:
            return plain["load"](name, **settings)
        model: Model = request.getfixturevalue("real_model")
        assert settings.get("dtype", "float32") == "float32"
        model = model.with_bos(BosPolicy(settings.get("bos", "as_tokenizer")))
        return replace(model, hyperparameters=replace(model.hyperparameters, steps=SCALE["steps"]))

    def moment(model: Model, *, max_tokens: int = SCALE["max_tokens"], **settings: Any) -> Any:
        return plain["moment"](model, max_tokens=max_tokens, **settings)

    def moments(model: Model, *, max_tokens: int = SCALE["max_tokens"], **settings: Any) -> Any:
        return plain["moments"](model, max_tokens=max_tokens, **settings)

    def contexts(model: Model, *seed: int, **settings: Any) -> ContextSet:
        # Kept on disk by what decides them: the model, the seed and the policy.
        found = plain["contexts"](model, *seed, **settings)
        return replace(found, templates=found.templates[: SCALE["contexts"]])

    def sampled(model: Model, *, path: Path | None = None, **settings: Any) -> ContextSet:
        if path is None:
            return contexts(model, **settings)
        # That is how those that are kept are made.
        return plain["sampled"](model, path=path, **settings)

    texts = builtin_sentences()[: SCALE["sentences"]]
    patch(monkeypatch, LOADING, "load", load)
    patch(monkeypatch, MOMENTS, "compute_second_moments", moments)
    patch(monkeypatch, ("second_moment",), "compute_second_moment", moment)
    patch(monkeypatch, ("inputs", "exploration"), "kept_contexts", contexts)
    patch(monkeypatch, ("contexts",), "sample_contexts", sampled)
    patch(monkeypatch, TEXTS, "builtin_sentences", lambda: texts)
    shorter = partial(continuation, tokens=SCALE["continued"])
    patch(monkeypatch, ("exploration",), "continuation", shorter)
    monkeypatch.setattr(firsttok, "continuation", shorter)


@pytest.fixture
def tiny_embedded(desk: Path, furniture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model goes by the embedded one's name, since commands only have to be obeyed."""

    def load(name: str = EMBEDDED, **settings: Any) -> Model:
        return plain(str(furniture / "embedded") if name == EMBEDDED else name, **settings)

    # An edit that is saved names its model, and of a folder only the last part.
    (desk / "embedded").symlink_to(furniture / "embedded")
    plain = firsttok.models.load
    patch(monkeypatch, LOADING, "load", load)


def pages_with_python() -> list[Any]:
    found: list[Any] = []
    for page in PAGES:
        text = "".join(block.text for block in blocks_of(page) if block.language == "python")
        if text:
            real = EMBEDDED in text
            marks = [pytest.mark.real_model, pytest.mark.slow, pytest.mark.release] if real else []
            found.append(pytest.param(page, marks=marks, id=str(page.relative_to(ROOT))))
    return found


@pytest.mark.parametrize("page", pages_with_python())
def test_python_runs_from_the_top_of_a_page(
    page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("a_page")
    monkeypatch.setitem(sys.modules, "a_page", module)
    for block in blocks_of(page):
        if block.language == "python":
            # Line breaks in front, so that a traceback names the line of the page.
            source = "\n" * block.line + block.text
            exec(compile(source, str(page), "exec"), vars(module))
    assert vars(module)
    assert "Traceback" not in capsys.readouterr().err


def test_a_page_whose_code_fails_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nassert 1 == 2\n```\n", "utf-8")
    (block,) = blocks_of(page)
    assert (block.language, block.line) == ("python", 3)
    with pytest.raises(AssertionError):
        exec(block.text, {})


def runnable() -> list[Any]:
    blocks: dict[str, list[list[str]]] = {}
    for block, words in FIRSTTOK:
        if kind_of(words) in RUN and not any(HUB in word for word in words):
            blocks.setdefault(block.place, []).append(words)
    return [pytest.param(commands, id=place) for place, commands in blocks.items()]


@pytest.mark.parametrize("commands", runnable())
def test_cheap_commands_run(
    commands: list[list[str]], tiny_embedded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    # One may read what another of its block has written.
    for words in commands:
        # Once the options are taken, more steps would only take longer.
        short = ["--steps", "2"] if words[0] == "edit" else []
        assert main([*words, *short]) == 0
        assert capsys.readouterr().out.strip()


def test_a_toml_block_is_a_file_of_methods(tmp_path: Path) -> None:
    found = [block for block in BLOCKS if block.language == "toml"]
    assert found
    for block in found:
        (tmp_path / "methods.toml").write_text(block.text, "utf-8")
        assert load_methods(tmp_path / "methods.toml")


def test_a_json_block_is_a_list_of_facts(tmp_path: Path) -> None:
    found = [block for block in BLOCKS if block.language == "json"]
    assert found
    for block in found:
        (tmp_path / "facts.json").write_text(block.text, "utf-8")
        assert len(load_facts(tmp_path / "facts.json")) == len(json.loads(block.text))
