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
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def build(tree: Path, out: Path) -> tuple[Path, Path]:
    """Build the sdist, and from it the wheel, with what is declared for it; returns both files."""
    # An environment as pip would make it for the build, out of what is here: that takes no network.
    builder = borrowing(["build", *PROJECT["build-system"]["requires"]], out / "builder")
    run([str(builder), "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)], tree)
    shutil.rmtree(out / "builder")
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def borrowing(requirements: list[str], folder: Path) -> Path:
    """Make an environment with these requirements, what they need, and nothing else.

    They are linked from the environment that runs the tests, so that nothing is fetched or copied.
    Returns its Python.
    """
    python = environment(folder)
    site, here = site_of(python), Path(sysconfig.get_path("purelib"))
    for name in needed(requirements):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(here / top)
    return python


def needed(requirements: list[str]) -> set[str]:
    """Names of the distributions that requirements ask for, directly or through others."""
    found: set[tuple[str, str]] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        asked, extra = left.pop()
        if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
            continue
        for own in ("", *asked.extras):
            name = canonicalize_name(asked.name)
            if (name, own) not in found:
                found.add((name, own))
                texts = distribution(name).requires or []
                left += [(Requirement(text), own) for text in texts]
    return {name for name, _ in found}


def environment(folder: Path) -> Path:
    """Make an environment without anything in it; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def site_of(python: Path) -> Path:
    """Where an environment has its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run([str(python), "-c", code], python.parent).stdout.strip())


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
    python = environment(folder)
    site = site_of(python)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    borrowed = sysconfig.get_path("purelib")
    (site / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    return python
