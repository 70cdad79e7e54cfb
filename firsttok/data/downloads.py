"""Downloads that go on where they broke off, and never glue two versions of a file together."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from firsttok.errors import BadInputError, CacheError, DownloadError
from firsttok.storage import read_record, write_record

__all__ = ["discard", "download"]

logger = logging.getLogger(__name__)
_TRIES = 4
"""Tries in a row that bring nothing new before it is given up."""
_PAUSE = 1.0
"""Seconds before the second try; twice as many before each further one."""
_PASSING = (408, 425, 429)
"""Refusals that may not last, as those from 500 on."""


class _BrokenError(Exception):
    """A try failed in a way that the next one may not."""


def download(url: str, part: Path, *, report: Callable[[int, int | None], None]) -> None:
    """Fetch a file into ``part``, after what an earlier call left there of the same version.

    Whatever ends it, an interruption of the user included, what has arrived stays in ``part``, and
    beside it what it is a part of. ``report`` is told how many bytes are there, and how many there
    will be, if that is known.

    Raises:
        BadInputError: If it is no address of the web.
        DownloadError: If the server refuses, or cannot be reached, several times.
        CacheError: If the part cannot be written.
    """
    # Before what is kept of another address is given up.
    _check_address(url)
    best, failures = _size(part), 0
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(30, connect=15)) as client:
        while True:
            try:
                return _fetch(client, url, part, report)
            except (_BrokenError, httpx.HTTPError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
            except OSError as error:
                raise CacheError(
                    f"{part} cannot be written ({error.strerror or error}); free some space and "
                    "run the same command again, which goes on from there"
                ) from None
            size = _size(part)
            failures = 1 if size > best else failures + 1
            best = max(best, size)
            if failures >= _TRIES:
                raise DownloadError(
                    f"{url} cannot be fetched ({reason}); check the network and run the same "
                    f"command again, which goes on after the {size} bytes that are kept"
                )
            logger.warning("%s; trying again", reason)
            time.sleep(_PAUSE * 2 ** (failures - 1))


def discard(part: Path) -> None:
    """Remove an unfinished file and what is kept beside it."""
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _check_address(url: str) -> None:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL("")
    if address.scheme not in ("http", "https") or not address.host:
        raise BadInputError(f"{url!r} is not a web address; it should begin with https://")


def _fetch(
    client: httpx.Client, url: str, part: Path, report: Callable[[int, int | None], None]
) -> None:
    begun = _read_state(part, url)
    if begun is None:
        discard(part)
    have = _size(part)
    if begun is not None and have == begun["size"]:
        return
    # Compressed on its way, bytes would be counted, and begun at, in another file.
    headers = {"Accept-Encoding": "identity"}
    if begun is not None and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": begun["validator"]}
    with client.stream("GET", url, headers=headers) as answer:
        code = answer.status_code
        said = f"the server says {code} {answer.reason_phrase}".strip()
        if code == 416 or (code == 206 and not _continues(answer, begun, have)):
            discard(part)
            other = "the server sent another part than the one that is lacking"
            raise _BrokenError(said if code == 416 else other)
        if code not in (200, 206):
            if code >= 500 or code in _PASSING:
                raise _BrokenError(said)
            raise DownloadError(
                f"{url} cannot be fetched ({said}); give another address with --url"
            )
        if begun is None or code == 200:
            begun, have = _begin(answer, url, part), 0
        size: int | None = begun["size"]
        with part.open("ab") as file:
            report(have, size)
            for chunk in answer.iter_raw():
                file.write(chunk)
                have += len(chunk)
                report(have, size)
    if size is not None and have != size:
        raise _BrokenError(f"{have} of {size} bytes arrived")


def _continues(answer: httpx.Response, begun: dict[str, Any] | None, have: int) -> bool:
    """Whether an answer is the rest of the part. Some servers do not heed ``If-Range``."""
    if begun is None or _validator(answer) not in ("", begun["validator"]):
        return False
    size = r"\d+" if begun["size"] is None else begun["size"]
    sent = answer.headers.get("Content-Range", "")
    return re.fullmatch(rf"bytes {have}-\d+/({size}|\*)", sent) is not None


def _begin(answer: httpx.Response, url: str, part: Path) -> dict[str, Any]:
    """What is begun; it is kept, and so resumed, if the server gives this version a name."""
    discard(part)
    length = answer.headers.get("Content-Length", "")
    size = int(length) if length.isdigit() and "Content-Encoding" not in answer.headers else None
    begun = {"url": url, "validator": _validator(answer), "size": size}
    if begun["validator"]:
        write_record(_state(part), begun)
    return begun


def _validator(answer: httpx.Response) -> str:
    """The server's name for this version: a strong ETag, or the time of the last change."""
    tag = answer.headers.get("ETag", "")
    # A weak one names versions that may differ in their bytes.
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _read_state(part: Path, url: str) -> dict[str, Any] | None:
    try:
        begun = read_record(_state(part), "a download that was begun")
    except BadInputError:
        return None
    return begun if begun["url"] == url else None


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
