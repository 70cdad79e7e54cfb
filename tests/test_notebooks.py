"""The notebooks run from their sources, and what is committed is what they gave."""

import gc
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbclient.util import run_sync

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "execute")
PATHS = re.compile(r"(?<![\w.])/(?:tmp|home|root|work|var|Users|opt)/|[A-Z]:\\\\|site-packages")
"""What only a path of the machine would hold."""


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def said(notebook: Any) -> str:
    """All text of all outputs."""
    parts: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            parts.append(output.get("text", ""))
            parts += [str(value) for value in output.get("data", {}).values()]
    return "\n".join(parts)


def test_all_are_listed(execute: ModuleType) -> None:
    assert sorted(execute.NAMES) == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_in_sync(name: str, execute: ModuleType) -> None:
    source, found = execute.read_source(name), committed(name)
    nbformat.validate(found)
    sources, cells = (
        [(cell.cell_type, cell.source, cell.id) for cell in each.cells] for each in (source, found)
    )
    assert sources == cells
    assert found.metadata == source.metadata


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_was_run_and_is_of_no_machine(name: str) -> None:
    found = committed(name)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    assert not PATHS.search(said(found))
    assert any("text/html" in o.get("data", {}) for cell in code for o in cell.outputs)
    assert all(cell.metadata == {} for cell in found.cells)


def test_a_path_would_be_seen() -> None:
    for text in ("in /tmp/abc/x", "'/home/me'", "lib/python3.11/site-packages/torch"):
        assert PATHS.search(text)
    for text in ("</tmp", "and/or", "a/tmp/b", "perplexity 72/100"):
        assert not PATHS.search(text)


SHARED = """
def share():
    from functools import partial
    from firsttok import exploration, models
    plain, embedded = models.load, models.load("smollm2-135m")
    models.load = lambda name: embedded if name == "smollm2-135m" else plain(name)
    exploration.continuation = partial(exploration.continuation, tokens=3)
share()
"""
"""All notebooks share one embedded model, and what follows a prompt is short."""
FRESH = f"get_ipython().run_line_magic('reset', '-f')\nimport os\nos.chdir({str(FOLDER)!r})"
"""No notebook has what another one left."""


@pytest.fixture(scope="module")
def kernel(execute: ModuleType) -> Iterator[Any]:
    """One kernel for all: a start, with the model, takes as long as many a notebook."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHARED)])
    client = execute.client_of(notebook)
    client.owns_km = False
    client.create_kernel_manager()
    client.execute()
    yield client.km
    run_sync(client.km.shutdown_kernel)(now=True)
    del client
    # Collected later, clients warn of their sockets in the midst of another test's output.
    gc.collect()


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.real_model
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, execute: ModuleType, kernel: Any) -> None:
    fresh = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FRESH)])
    execute.client_of(fresh, kernel).execute()
    notebook = execute.execute(name, kernel)
    assert not PATHS.search(said(notebook))
    # Outputs of the same kind at the same places; numbers may differ in their last digits.
    for fresh, kept in zip(notebook.cells, committed(name).cells, strict=True):
        kinds = [
            [(o.output_type, sorted(o.get("data", {}))) for o in cell.get("outputs", [])]
            for cell in (fresh, kept)
        ]
        assert kinds[0] == kinds[1], fresh.source
