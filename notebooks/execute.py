"""Execute the notebooks: each ``NAME.py`` is the source, ``NAME.ipynb`` gets its outputs.

python notebooks/execute.py [NAME ...] [--out DIR]
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NAMES = (
    "collapse_in_ten_minutes",
    "hooks_and_keys",
    "who_writes_it",
    "edit_after_edit",
    "your_own_model",
    "your_own_method",
)
TIMEOUT = 1800
"""Seconds that one cell may take, on a machine that has other work, too."""


def read_source(name: str) -> Any:
    """The notebook without outputs, its cells numbered so that equal sources give equal files."""
    notebook: Any = jupytext.read(FOLDER / f"{name}.py")
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
        cell["metadata"] = {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook["metadata"] = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": kernel,
        "language_info": {"name": "python"},
    }
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    return notebook


def execute(name: str, kernel: Any = None) -> Any:
    """Run one notebook in its folder; raises what a cell raises.

    A kernel that is given, by its manager, runs on afterwards.
    """
    notebook = read_source(name)
    client_of(notebook, kernel).execute()
    return strip(notebook)


def client_of(notebook: Any, kernel: Any = None) -> NotebookClient:
    """Return what runs a notebook, in a kernel of its own unless one is given."""
    given = {} if kernel is None else {"km": kernel}
    return NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        startup_timeout=TIMEOUT,
        **given,
    )


def strip(notebook: Any) -> Any:
    """Take away what differs from run to run: progress and warnings, metadata."""
    notebook["metadata"]["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell["metadata"] = {}
        if cell.cell_type == "code":
            cell["outputs"] = [
                output
                for output in cell["outputs"]
                if not (output.output_type == "stream" and output.name == "stderr")
                and output.get("data", {}).get("text/html") != ""
            ]
    return notebook


def main() -> None:
    """Execute the named notebooks, or all."""
    parser = argparse.ArgumentParser(description="Execute the notebooks.")
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the .ipynb files")
    args = parser.parse_args()
    for name in args.names:
        if name not in NAMES:
            parser.error(f"no notebook is called {name!r}; choose from {', '.join(NAMES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        start = time.perf_counter()
        notebook = execute(name)
        nbformat.validate(notebook)
        text = nbformat.writes(notebook) + "\n"
        (args.out / f"{name}.ipynb").write_text(text, encoding="utf-8")
        sys.stdout.write(f"{name}: {time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    main()
