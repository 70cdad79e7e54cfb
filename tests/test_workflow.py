"""The GitHub workflow does what ``.ci/run`` does, on every Python that the package names."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipping import ROOT, pythons

FILE = ROOT / ".github" / "workflows" / "ci.yml"
WORKFLOW: dict[str, Any] = yaml.safe_load(FILE.read_text("utf-8"))
JOBS: dict[str, Any] = WORKFLOW["jobs"]
STEPS: list[dict[str, Any]] = [step for job in JOBS.values() for step in job["steps"]]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, flags=re.MULTILINE))


def schema_errors(path: Path) -> int:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*command, "vendor.github-workflows", str(path)], capture_output=True, check=False
    )
    return done.returncode


def test_it_is_a_valid_workflow(tmp_path: Path) -> None:
    broken = tmp_path / "ci.yml"
    broken.write_text(FILE.read_text("utf-8").replace("runs-on:", "runs_on:"), encoding="utf-8")
    assert schema_errors(FILE) == 0
    assert schema_errors(broken) == 1


def test_it_runs_on_every_python_of_the_classifiers() -> None:
    assert JOBS["test"]["strategy"]["matrix"] == {"python": pythons()}
    assert JOBS["test"]["strategy"]["fail-fast"] is False
    for job in JOBS.values():
        setups = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
        (setup,) = setups
        assert setup["with"]["python-version"] in {"${{ matrix.python }}", *pythons()}
        assert setup["with"]["cache"] == "pip"
        for name in setup["with"]["cache-dependency-path"].split():
            assert (ROOT / name).is_file()


def test_it_does_what_the_ci_does() -> None:
    commands = [step["run"] for step in JOBS["test"]["steps"] if "run" in step]
    assert commands[0] == "bash .ci/run"
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert script.rstrip().endswith("\nmake test\nexec make test-release")


@pytest.mark.parametrize("step", [step for step in STEPS if "run" in step], ids=lambda s: s["run"])
def test_every_command_is_there(step: dict[str, Any]) -> None:
    program, *arguments = step["run"].split()
    if program == "make":
        assert set(arguments) <= targets()
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file()
    else:
        # The coverage target leaves the environment, and the coverage in it.
        assert program == ".venv/bin/python"
        assert re.search(r"^VENV := \.venv$", MAKEFILE, flags=re.MULTILINE)
        assert arguments[:2] == ["-m", "coverage"]
        assert "--cov " in MAKEFILE


def test_every_action_is_pinned_to_a_commit() -> None:
    used = re.findall(r"uses: *(.*)", FILE.read_text("utf-8"))
    assert len(used) == len([step for step in STEPS if "uses" in step]) > 0
    for text in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", text), text


def test_it_may_only_read_and_cannot_hang() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for job in JOBS.values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90
        checkout = job["steps"][0]
        assert checkout["with"]["persist-credentials"] is False
    assert "secrets." not in FILE.read_text("utf-8")


def test_an_index_of_builds_for_cpus_can_be_named() -> None:
    for job in JOBS.values():
        assert job["env"] == {"PIP_EXTRA_INDEX_URL": "${{ vars.PIP_EXTRA_INDEX_URL }}"}


def test_what_it_keeps_is_what_it_made() -> None:
    kept = {
        step["with"]["name"]: step["with"]["path"]
        for step in STEPS
        if "upload-artifact" in step.get("uses", "")
    }
    assert kept == {"coverage": "coverage.xml", "dist": "dist/"}
    commands = [step["run"] for step in STEPS if "run" in step]
    assert any(command.endswith("-o coverage.xml") for command in commands)
    (counted,) = [n for n, command in enumerate(commands) if command == "make coverage"]
    assert commands[counted + 1].endswith("-o coverage.xml")
    assert "--outdir dist\n" in MAKEFILE


def test_the_hooks_before_a_commit_are_what_make_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    entries = {hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]}
    lint = {
        f".venv/bin/{name}" for name in re.findall(r"\$\(BIN\)/((?:ruff|based)[\w ]*)", MAKEFILE)
    }
    assert {entry.replace(" --fix", "").split(" --")[0] for entry in entries} == {
        name.strip() for name in lint
    }
    assert all(repo["repo"] == "local" for repo in hooks["repos"])
