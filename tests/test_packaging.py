"""What is shipped: all of the package and nothing else, and it works with what it declares."""

import ast
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import metadata, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from shipping import PROJECT, ROOT, borrowing, build, copy_of_tree, pythons, run
from tiny import build as build_model

PACKAGE = ROOT / "firsttok"
MODULES = sorted(PACKAGE.rglob("*.py"))
ORIGINS = packages_distributions()
NOT_IMPORTED = {
    "pip": "it is run, and not imported, to fetch models from the package index",
}
"""Declared for another reason than an import."""
NOT_IN_SDIST = re.compile(r"\.|figures/(?!.*\.json$)")
"""Hidden files, and figures that no test and no page reads."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sdist and wheel, by the setuptools that is here: that takes no network."""
    before = files_below(tree)
    sdist, wheel = build(tree, tmp_path_factory.mktemp("dist"))
    assert before <= files_below(tree)
    return sdist, wheel


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def naive_listing(tree: Path) -> set[str]:
    """The files of a tree but those that a build left in it."""
    return {name for name in files_below(tree) if not name.startswith("firsttok.egg-info/")}


def wheel_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.mark.slow
@pytest.mark.release
def test_the_wheel_holds_the_package_and_nothing_else(tree: Path, built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        extra = {name.split("/", 1)[1] for name in archive.namelist() if ".dist-info/" in name}
    package = {name for name in naive_listing(tree) if name.startswith("firsttok/")}
    assert names == package
    assert {"firsttok/py.typed", "firsttok/templates/report.html"} < names
    assert "firsttok/data/builtin/facts.json" in names
    assert extra == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"),
        "licenses/LICENSE",
    }


@pytest.mark.slow
@pytest.mark.release
def test_the_sdist_holds_what_builds_tests_and_documents_it(
    tree: Path, built: tuple[Path, Path]
) -> None:
    with tarfile.open(built[0]) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    names = {name.split("/", 1)[1] for name in files}
    generated = {name for name in names if name.startswith("firsttok.egg-info/")}
    kept = {name for name in naive_listing(tree) if not NOT_IN_SDIST.match(name)}
    assert names - generated == kept | {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
@pytest.mark.release
def test_the_metadata_says_what_pyproject_does(built: tuple[Path, Path]) -> None:
    said = wheel_metadata(built[1])
    project = PROJECT["project"]
    assert said["Version"] == project["version"]
    assert said["License-Expression"] == "MIT"
    assert said["Requires-Python"] == project["requires-python"]
    assert set(said.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    needed = {
        str(requirement)
        for text in said.get_all("Requires-Dist", [])
        if "extra ==" not in str((requirement := Requirement(text)).marker or "")
    }
    assert needed == {str(Requirement(text)) for text in project["dependencies"]}


def test_the_version_stands_in_one_place_and_the_rest_agrees() -> None:
    import firsttok

    number = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", number)
    assert str(Version(number)) == number
    assert firsttok.__version__ == version("firsttok") == number
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == number
    assert citation["license"] == PROJECT["project"]["license"]
    sources = [path.read_text("utf-8") for path in MODULES]
    assert not [source for source in sources if re.search(rf"version.*= *.{number}\b", source)]


def test_the_version_is_shown_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    from firsttok.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"firsttok {PROJECT['project']['version']}\n"


def test_the_changelog_leads_up_to_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    dated = [re.fullmatch(r"\[(.*)\] - \d{4}-\d{2}-\d{2}", heading) for heading in headings[1:]]
    released = [Version(found.group(1)) for found in dated if found]
    assert len(released) == len(headings) - 1
    assert released == sorted(released, reverse=True)
    current = Version(PROJECT["project"]["version"])
    assert not released or released[0] <= current
    kinds = set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert "Added" in kinds


def third_party(path: Path) -> set[str]:
    """Top-level names that a module imports, or finds by name, and that are not Python's."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            constants = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
            names.update(part.value for part in constants if isinstance(part.value, str))
    tops = {name.split(".")[0] for name in names}
    return tops - sys.stdlib_module_names - {"firsttok", "tomllib"}


def distributions(name: str) -> set[str]:
    """The distributions that a top-level name comes from."""
    return {canonicalize_name(found) for found in ORIGINS.get(name, [name])}


def declared(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_an_undeclared_import_would_be_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "import os, pytest\nfrom yaml import load\nimport_module('numpy.linalg' if a else 'tomli')",
        encoding="utf-8",
    )
    assert third_party(module) == {"pytest", "yaml", "numpy", "tomli"}
    assert distributions("sklearn") == {"scikit-learn"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_import_is_declared(path: Path) -> None:
    """By the core, or by an extra that the module names to whoever lacks it."""
    core = declared(PROJECT["project"]["dependencies"])
    source = path.read_text("utf-8")
    for name in third_party(path):
        extras = {
            extra
            for extra, needed in PROJECT["project"]["optional-dependencies"].items()
            if distributions(name) & declared(needed) and f"firsttok[{extra}]" in source
        }
        assert distributions(name) & core or extras, f"{name} is not declared"


def test_every_dependency_is_needed() -> None:
    imported: set[str] = set()
    for path in MODULES:
        for name in third_party(path):
            imported |= distributions(name)
    unused = declared(PROJECT["project"]["dependencies"]) - imported
    assert unused == set(NOT_IMPORTED)


def test_every_requirement_has_a_pin_that_it_allows() -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    project = PROJECT["project"]
    texts = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        texts += extra
    wanted = [Requirement(text) for text in [*texts, *PROJECT["build-system"]["requires"]]]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name in {"firsttok", "pip"}:
            continue
        assert pins.get(name), f"{name} is not pinned"
        for pin in pins[name]:
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert requirement.specifier.contains(exact.version), (str(requirement), str(pin))
        markers = [pin.marker for pin in pins[name]]
        for python in pythons():
            here = {"python_version": python, "python_full_version": f"{python}.9"}
            if requirement.marker is None or requirement.marker.evaluate(here):
                chosen = [mark for mark in markers if mark is None or mark.evaluate(here)]
                assert len(chosen) == 1, f"{name} has {len(chosen)} pins on Python {python}"


def test_the_oldest_python_is_the_same_everywhere() -> None:
    oldest = pythons()[0]
    minors = [int(python.split(".")[1]) for python in pythons()]
    assert minors == list(range(minors[0], minors[-1] + 1))
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    assert all(allowed.contains(python) for python in pythons())
    assert not allowed.contains(f"3.{minors[0] - 1}")
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{minors[0]}"
    assert PROJECT["tool"]["basedpyright"]["pythonVersion"] == oldest
    assert f"(3, {minors[0]})" in (ROOT / "Makefile").read_text("utf-8")


@pytest.mark.parametrize("folder", ["firsttok", "analyses", "benchmarks", "tests"])
def test_all_source_is_of_the_oldest_python(folder: str) -> None:
    oldest = int(pythons()[0].split(".")[1])
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass\n", feature_version=(3, oldest))
    for path in sorted((ROOT / folder).rglob("*.py")):
        ast.parse(path.read_text("utf-8"), feature_version=(3, oldest))


def test_the_installed_licence_is_the_one_that_is_named() -> None:
    assert metadata("firsttok")["License-Expression"] == PROJECT["project"]["license"]
    assert (ROOT / "LICENSE").read_text("utf-8").startswith("MIT License")


def test_the_citation_is_valid(tmp_path: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    check.append("vendor.citation-file-format")
    run([*check, str(ROOT / "CITATION.cff")], ROOT)
    broken = tmp_path / "CITATION.cff"
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    broken.write_text(text.replace("type: software", "type: hardware"), encoding="utf-8")
    done = subprocess.run([*check, str(broken)], capture_output=True, check=False)
    assert done.returncode == 1


@pytest.fixture(scope="module")
def clean(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel, what it declares, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    python = borrowing(PROJECT["project"]["dependencies"], folder / "venv")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", "--no-index"]
    # pip itself refuses what the wheel's own metadata asks for and does not find there.
    run([*install, str(built[1])], folder)
    return python.parent


EVERY_MODULE = """
import importlib, pkgutil, firsttok
names = [module.name for module in pkgutil.walk_packages(firsttok.__path__, "firsttok.")]
for name in names:
    # One runs the program, one needs an extra.
    if name not in ("firsttok.__main__", "firsttok.evaluation.harness"):
        importlib.import_module(name)
print(len(names), firsttok.__file__, [getattr(firsttok, name) for name in firsttok.__all__] != [])
"""


@pytest.mark.slow
@pytest.mark.release
def test_the_wheel_works_with_what_it_declares_and_nothing_else(
    clean: Path, tmp_path: Path
) -> None:
    command = str(clean / "firsttok")
    offline = {"FIRSTTOK_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run([str(clean / "python"), "-m", "pip", "check"], tmp_path)
    number = PROJECT["project"]["version"]
    assert run([command, "--version"], tmp_path).stdout == f"firsttok {number}\n"
    assert "usage: firsttok" in run([command, "--help"], tmp_path).stdout
    assert "smollm2-135m" in run([command, "models", "list"], tmp_path).stdout

    count, origin, _ = run([str(clean / "python"), "-c", EVERY_MODULE], tmp_path).stdout.split()
    assert int(count) == len(MODULES) - 1
    assert Path(origin).is_relative_to(clean.parent)

    build_model("llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    longer = {**json.loads(config.read_text("utf-8")), "max_position_embeddings": 512}
    config.write_text(json.dumps(longer), encoding="utf-8")  # the built-in texts are longer
    edit = [command, "edit", "--model", str(tmp_path / "model"), "--layer", "1", "--steps", "3"]
    edit += ["--second-moment", "identity", "--subject", "England", "--target", "Berlin"]
    edit += ["--template", "{}'s capital city is", "--save", "edit.safetensors"]
    assert "denominator" in run(edit, tmp_path, **offline).stdout
    assert (tmp_path / "edit.safetensors").stat().st_size > 0
    ray = run_failing([command, "sweep", "run", "--engine", "ray", *edit[2:6]], tmp_path, offline)
    assert "firsttok[ray]" in ray


def run_failing(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a command says that ends with exit code 2."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr
