"""Many cases: planned, done in chunks, kept as they are done, resumed after any stop.

A module is imported when one of its names is first used: to read results, no model library is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firsttok.sweep.cluster import RayEngine, Recipe, connected
    from firsttok.sweep.engine import Chunk, DoneChunk, Engine, LocalEngine
    from firsttok.sweep.local_run import sweep_facts
    from firsttok.sweep.manifest import check_run, join_run, model_entry, read_manifest, run_entry
    from firsttok.sweep.results import RunResults, read_run
    from firsttok.sweep.runner import CHUNK, Share, chunks_of, model_folder, sweep

_MODULES = {
    "cluster": ("RayEngine", "Recipe", "connected"),
    "engine": ("Chunk", "DoneChunk", "Engine", "LocalEngine"),
    "local_run": ("sweep_facts",),
    "manifest": ("check_run", "join_run", "model_entry", "read_manifest", "run_entry"),
    "results": ("RunResults", "read_run"),
    "runner": ("CHUNK", "Share", "chunks_of", "model_folder", "sweep"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CHUNK",
    "Chunk",
    "DoneChunk",
    "Engine",
    "LocalEngine",
    "RayEngine",
    "Recipe",
    "RunResults",
    "Share",
    "check_run",
    "chunks_of",
    "connected",
    "join_run",
    "model_entry",
    "model_folder",
    "read_manifest",
    "read_run",
    "run_entry",
    "sweep",
    "sweep_facts",
]


# A type checker that saw it would take every misspelt name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import the module that holds a public name."""
        if name not in _HOMES:
            raise AttributeError(f"module 'firsttok.sweep' has no attribute {name!r}")
        return getattr(import_module(f"firsttok.sweep.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
