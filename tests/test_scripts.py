"""Every analysis script, run as a user runs it, on a tiny model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import CONTEXTS, FACTS, SENTENCES, build

from firsttok.cases import load_collapse_ids
from firsttok.cli import SCRIPTS
from firsttok.data import load_facts

ROOT = Path(__file__).parent.parent
ANALYSES = ROOT / "analyses"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scripts")
    build("llama", folder / "llama")
    numbered = [replace(fact, case_id=index) for index, fact in enumerate(FACTS)]
    contents = {
        "facts": [fact.as_record() for fact in numbered],
        "texts": list(SENTENCES),
        "contexts": list(CONTEXTS.templates),
    }
    paths = {name: folder / f"{name}.json" for name in contents}
    for name, content in contents.items():
        paths[name].write_text(json.dumps(content), "utf-8")
    return paths | {"model": folder / "llama", "out": folder / "out", "cache": folder / "cache"}


def run(setting: dict[str, Path], *command: str) -> subprocess.CompletedProcess[str]:
    options = ["--second-moment", "identity", "--steps", "3", "--bos", "without"]
    for name in ("model", "facts", "texts", "contexts", "out"):
        options += [f"--{name}", str(setting[name])]
    environment = os.environ | {"FIRSTTOK_CACHE": str(setting["cache"])}
    result = subprocess.run(
        [sys.executable, *command, *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "warn" not in result.stderr.lower()
    return result


@pytest.fixture(scope="module")
def cases(setting: dict[str, Path]) -> Path:
    run(setting, "-m", "firsttok.cli", "scan")
    path = setting["out"] / "llama" / "collapse_cases.json"
    assert len(load_collapse_ids(path, load_facts(setting["facts"]))) > 2
    # A random model is never good, so a few facts have to stand for the normal ones.
    record = json.loads(path.read_text("utf-8"))
    record["collapse"] = record["collapse"][:2]
    path.write_text(json.dumps(record), "utf-8")
    return path


def test_every_script_is_known_to_reproduce() -> None:
    assert {path.stem for path in ANALYSES.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_leaves_its_files(name: str, setting: dict[str, Path], cases: Path) -> None:
    script = str(ANALYSES / f"{name}.py")
    result = run(setting, script, "--cases", str(cases), "--collapse", "2", "--normal", "2")
    assert "paper" in result.stdout or name.startswith("extra")
    stem = setting["out"] / "llama" / name
    for suffix in (".csv", ".json", ".png", ".svg"):
        assert stem.with_suffix(suffix).stat().st_size > 100
    record = json.loads(stem.with_suffix(".json").read_text("utf-8"))
    provenance = record["provenance"]
    for key in ("model", "contexts", "second_moment", "hyperparameters", "versions", "seconds"):
        assert key in provenance
    assert record["rows"]
    lines = stem.with_suffix(".csv").read_text("utf-8").splitlines()
    assert len(lines) == len(record["rows"]) + 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_has_help(name: str) -> None:
    command = [sys.executable, str(ANALYSES / f"{name}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for option in ("--model", "--facts", "--device", "--seed", "--out", "--profile"):
        assert option in shown


def test_script_without_a_list_says_how_to_make_one(setting: dict[str, Path]) -> None:
    script = str(ANALYSES / f"{SCRIPTS[0]}.py")
    command = [sys.executable, script, "--model", str(setting["model"]), "--cases", "/none.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert "firsttok scan" in result.stderr
    assert "Traceback" not in result.stderr
