"""Published data sets in the cache: fetched, checked, recorded, and found by name."""

import datetime as dt
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.progress import Progress

from firsttok.data.catalog import DATA_SETS, DataSet
from firsttok.data.fact_files import SKIP_HINT, check_facts
from firsttok.data.texts import load_texts
from firsttok.errors import BadInputError, CacheError, DownloadError, FirsttokError
from firsttok.storage import cache_folder, file_sha256, locked, make_folder, read_json, write_record

__all__ = ["is_pulled_data", "pull_data", "pulled_file", "resolve_data"]

logger = logging.getLogger(__name__)


def pull_data(
    name: str,
    *,
    url: str | None = None,
    sha256: str | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch a data set, unless it is there; an interrupted pull is resumed.

    The file takes its name when its bytes have been checked and all its records read; beside it
    lies a record of where it came from. Its SHA-256 is the catalog's, or is recorded the first
    time; another one is refused from then on. ``url`` and ``sha256`` go before those of
    :data:`~firsttok.data.catalog.DATA_SETS`, and ``out`` is a folder to take instead of the cache.

    Raises:
        BadInputError: If there is no such data set, or an argument makes no sense.
        DownloadError: If it cannot be fetched, or is not what it should be.
        CacheError: If it cannot be written.
    """
    data_set = _named(name)
    if data_set is None:
        raise BadInputError(
            f"no data set is called {name!r}; see the names with: firsttok data list"
        )
    address = url or data_set.url
    if address is None:
        raise BadInputError(data_set.note)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BadInputError(f"sha256 {sha256!r} is no SHA-256; give its 64 hexadecimal digits")
    folder = cache_folder("data") if out is None else Path(out)
    make_folder(folder)
    path = folder / data_set.file_name
    # The web's library takes its time, and a name is found without it.
    from firsttok.data.downloads import discard, download

    with locked(path):
        record = _read_record(path) or {}
        first = f"the one recorded at the first pull ({record.get('pulled')})"
        pins = {
            "the one asked for": sha256 and sha256.lower(),
            "the published one": data_set.sha256,
            first: record.get("sha256"),
        }
        whose, wanted = next((pin for pin in pins.items() if pin[1]), ("", None))

        def check(found: str, source: str) -> None:
            if wanted not in (None, found):
                raise DownloadError(
                    f"{source} has SHA-256 {found}, not {wanted}, which is {whose}; it is not "
                    "used, try again or give another address with --url"
                )

        if path.exists():
            if not record:
                raise BadInputError(
                    f"{path} is there already and was not pulled by firsttok; move it away first"
                )
            if file_sha256(path) == record["sha256"]:
                check(record["sha256"], str(path))
                return path
            logger.warning("%s is damaged and is fetched again", path.name)
        part = path.with_name(f"{path.name}.part")
        download(address, part, report=_bar(progress, data_set.name))
        try:
            found = file_sha256(part)
            check(found, address)
            count = len(check_facts(part) if data_set.kind == "facts" else load_texts(part))
        except FirsttokError as error:
            discard(part)
            if isinstance(error, DownloadError):
                raise
            reason = str(error).replace(str(part), data_set.file_name).removesuffix(SKIP_HINT)
            raise DownloadError(f"what {address} sends is not used, since {reason}") from None
        now = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
        size = part.stat().st_size
        kept = {"name": data_set.name, "url": address, "sha256": found, "bytes": size}
        # The record first: a file without one would be nobody's.
        write_record(_record(path), kept | {"records": count, "pulled": now})
        _take_name(part, path)
        discard(part)
    return path


def is_pulled_data(name: str) -> bool:
    """Whether a data set is in the cache; its bytes are checked when it is used."""
    path = pulled_file(name)
    return path is not None and _read_record(path) is not None


def pulled_file(name: str) -> Path | None:
    """The file of a data set in the cache, whatever it holds; None if there is none."""
    data_set = _named(name)
    path = None if data_set is None else cache_folder("data") / data_set.file_name
    return path if path is not None and path.is_file() else None


def resolve_data(name_or_path: str | Path, kind: Literal["facts", "texts"]) -> Path:
    """Return the file that is meant: a path, or the name of a data set that was pulled.

    Raises:
        BadInputError: If it is neither, or not pulled; says what to run.
        DownloadError: If the file in the cache is not what was pulled.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    data_set = _named(str(name_or_path))
    if data_set is None:
        what = "facts" if kind == "facts" else "sentences"
        names = ", ".join(each.name for each in DATA_SETS if each.kind == kind and each.url)
        raise BadInputError(f"no file of {what} at {path}; check the path, or name one of {names}")
    if data_set.kind != kind:
        raise BadInputError(f"{data_set.name} holds {data_set.kind}, not {kind}; name another one")
    cached = cache_folder("data") / data_set.file_name
    record = _read_record(cached)
    command = f"firsttok data pull {data_set.name}"
    if record is None or not cached.is_file():
        absent = f"{data_set.name} is not in the cache; fetch it with: {command}"
        raise BadInputError(absent if data_set.url else data_set.note)
    if file_sha256(cached) != record["sha256"]:
        raise DownloadError(
            f"{cached} was changed since it was pulled; fetch it again with: {command}"
        )
    return cached


def _named(name: str) -> DataSet | None:
    return next((each for each in DATA_SETS if each.name == name.lower()), None)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.pulled.json")


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(_record(path), "a pull")
    except BadInputError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("sha256"), str) else None


def _take_name(part: Path, path: Path) -> None:
    try:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror or error}); free some space or choose "
            "another folder"
        ) from None


def _bar(progress: Progress | None, name: str) -> Callable[[int, int | None], None]:
    """What shows a download, in kilobytes."""
    if progress is None:
        return lambda _have, _size: None
    task = progress.add_task(f"{name} (kB)", total=None)

    def show(have: int, size: int | None) -> None:
        progress.update(task, completed=have / 1e3, total=None if size is None else size / 1e3)

    return show
