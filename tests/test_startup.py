"""What is imported before anything is computed: nothing that takes its time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "seaborn",
    "sklearn",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "jaxtyping",
    "rich",
)
PARSE = """
from firsttok.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    assert ended.code == {code}, ended.code
else:
    raise AssertionError("it was run")
"""
COMMANDS = sorted(
    path.stem.replace("_", "-") for path in (ROOT / "firsttok" / "commands").glob("[a-z]*.py")
)


def imported(code: str) -> set[str]:
    """The heavy libraries that a fresh Python has imported once it has run some code."""
    code += f"\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_a_heavy_import_would_be_seen() -> None:
    assert "numpy" in imported("import numpy")


def test_the_package_imports_no_library() -> None:
    assert imported("import firsttok; dir(firsttok)") == set()


def test_light_parts_of_the_package_import_no_library() -> None:
    light = ("cli", "commands", "errors", "hyperparameters", "options", "provenance")
    light += ("paper.registry",)
    assert imported(f"import {', '.join(f'firsttok.{name}' for name in light)}") == set()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("models", "pull")])
def test_help_imports_no_library(command: tuple[str, ...]) -> None:
    assert imported(PARSE.format(arguments=[*command, "--help"], code=0)) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["edits"],
        ["edit", "--subject", "England"],
        ["scan", "--seed", "one"],
        ["scan", "--dtype", "int8"],
        ["report", "--no-such-option"],
    ],
)
def test_a_mistyped_command_is_refused_before_any_import(arguments: list[str]) -> None:
    assert imported(PARSE.format(arguments=arguments, code=2)) == set()
