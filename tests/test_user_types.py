"""Programs of users are type-checked against the wheel: right ones pass, wrong ones do not."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shipping import build, copy_of_tree, installed

pytestmark = [pytest.mark.slow, pytest.mark.release]
PROGRAMS = Path(__file__).parent / "typing"
MARK = re.compile(r"# wrong: (\w+), ([\w-]+)$")
MYPY = """
[mypy]
strict = true
# Both are bigger than everything else together, and no user's program here touches them.
[mypy-transformers.*,transformer_lens.*]
follow_imports = skip
"""
Found = set[tuple[str, int, str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, away from the checkout: programs, and an environment with the wheel."""
    folder = tmp_path_factory.mktemp("user")
    _, wheel = build(copy_of_tree(folder), folder / "dist")
    installed(wheel, folder / "venv")
    for program in PROGRAMS.glob("*.py"):
        shutil.copy(program, folder)
    return folder


@pytest.fixture(scope="module")
def pyright(project: Path) -> Found:
    settings = {
        "include": ["*.py"],
        "venvPath": ".",
        "venv": "venv",
        "typeCheckingMode": "strict",
    }
    (project / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    report = checked([sys.executable, "-m", "basedpyright", "--outputjson"], project)
    answer: dict[str, Any] = json.loads(report)
    assert answer["summary"]["filesAnalyzed"] == 2
    found = {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["rule"])
        for each in answer["generalDiagnostics"]
    }
    # A name that is not there has no known type either, which is said once more.
    return {each for each in found if each[0] == "correct.py" or "reportUnknown" not in each[2]}


@pytest.fixture(scope="module")
def mypy(project: Path) -> Found:
    (project / "mypy.ini").write_text(MYPY, encoding="utf-8")
    python = str(project / "venv" / "bin" / "python")
    command = ["mypy", "--config-file", "mypy.ini", "--python-executable", python]
    report = checked(
        [sys.executable, "-m", *command, "--output", "json", "correct.py", "misuse.py"], project
    )
    lines: list[dict[str, Any]] = [json.loads(line) for line in report.splitlines()]
    return {(Path(each["file"]).name, each["line"], each["code"]) for each in lines}


def checked(command: list[str], project: Path) -> str:
    """What a checker says of programs one of which is wrong."""
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def marked(column: int) -> Found:
    """The mistakes that the wrong program says it makes."""
    lines = (PROGRAMS / "misuse.py").read_text("utf-8").splitlines()
    return {
        ("misuse.py", number, found.group(column))
        for number, line in enumerate(lines, start=1)
        if (found := MARK.search(line))
    }


def test_pyright_finds_every_mistake_and_no_other(pyright: Found) -> None:
    assert len(marked(1)) > 10
    assert pyright == marked(1)


def test_every_public_type_is_known(project: Path) -> None:
    """So that an editor can tell what it is, and a strict checker has nothing to guess."""
    command = [str(Path(sys.executable).parent / "basedpyright"), "--verifytypes", "firsttok"]
    done = subprocess.run(
        [*command, "--ignoreexternal", "--outputjson"],
        cwd=project,
        env={**os.environ, "PATH": f"{project / 'venv' / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout)["typeCompleteness"]
    assert Path(answer["pyTypedPath"]).is_relative_to(project)
    exported: list[dict[str, Any]] = [each for each in answer["symbols"] if each["isExported"]]
    assert len(exported) > 1000
    unknown = {each["name"] for each in exported if not each["isTypeKnown"]}
    # Neither is in any __all__; and lm-eval, on which one module rests, is an extra.
    known = (".logger", "console.stderr")
    unknown = {name for name in unknown if not name.endswith(known)}
    assert {name for name in unknown if ".evaluation.harness" not in name} == set()


def test_mypy_finds_every_mistake_and_no_other(mypy: Found) -> None:
    assert mypy == marked(2)
