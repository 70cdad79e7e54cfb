"""The package as it is shipped: built from a copy of the tree, and unpacked where a user has it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Found by name, since either may be lacking: tomllib is part of Python from 3.11 on.
_TOML = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT: dict[str, Any] = _TOML.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def pythons() -> list[str]:
    """The Python versions that the classifiers name."""
    found = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text)
        for text in PROJECT["project"]["classifiers"]
    ]
    return [match.group(1) for match in found if match]


def copy_of_tree(folder: Path) -> Path:
    """Copy what git keeps, or would keep: nothing that an earlier build or another test left."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so that nobody knows which files belong to it")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tree = folder / "tree"
    for name in run(listing, ROOT).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def build(tree: Path, out: Path, *options: str, **environment: str) -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel; returns both files."""
    command = [sys.executable, "-m", "build", *options, "--outdir", str(out), str(tree)]
    run(command, tree, **environment)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def run(command: list[str], folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command somewhere; a failure shows what it said."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def installed(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel into an environment that borrows its dependencies; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    shown = run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder
    )
    site = Path(shown.stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    borrowed = sysconfig.get_path("purelib")
    (site / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    return python
