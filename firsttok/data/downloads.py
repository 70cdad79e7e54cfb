"""Downloads that go on where they broke off, and never glue two versions of a file together."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from firsttok.errors import BadInputError, CacheError, DownloadError
from firsttok.storage import read_record, write_record

__all__ = ["discard", "download"]

logger = logging.getLogger(__name__)
_TRIES = 4
"""Tries in a row that bring nothing new before it is given up."""
_PAUSE = 1.0
"""Seconds before the second try; twice as many before each further one."""
_WHOLE, _PART, _NO_SUCH_PART = 200, 206, 416
_PASSING = (408, 425, 429)
"""Refusals that may not last, as those from 500 on."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

Report = Callable[[int, int | None], None]


class _BrokenError(Exception):
    """A try failed in a way that the next one may not."""


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """What a part is a part of."""

    url: str
    """Its address."""
    validator: str
    """The server's name for this version: a strong ETag, or the time of the last change."""
    size: int | None
    """Bytes of the whole."""


def download(url: str, part: Path, *, report: Report) -> None:
    """Fetch a file into ``part``, behind what an earlier call left there of the same version.

    Whatever ends it, an interruption of the user included, what has arrived stays in ``part``.

    Args:
        url: The address.
        part: The unfinished file; what it is a part of is kept beside it.
        report: Told how many bytes are there, and how many there will be, if that is known.

    Raises:
        BadInputError: If it is no address of the web.
        DownloadError: If the server refuses, or cannot be reached, several times.
        CacheError: If the part cannot be written.
    """
    _check_address(url)
    best = _size(part)
    failures = 0
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(30, connect=15)) as client:
        while (reason := _try(client, url, part, report)) is not None:
            size = _size(part)
            failures = 1 if size > best else failures + 1
            best = max(best, size)
            if failures >= _TRIES:
                raise DownloadError(
                    f"{url} cannot be fetched ({reason}); check the network and run the same "
                    f"command again, which goes on behind the {size} bytes that are kept"
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


def _try(client: httpx.Client, url: str, part: Path, report: Report) -> str | None:
    """Why a try failed in a way that the next one may not; None if all is there."""
    try:
        _fetch(client, url, part, report)
    except (_BrokenError, httpx.HTTPError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    except OSError as error:
        raise CacheError(
            f"{part} cannot be written ({error.strerror or error}); free some space and run the "
            "same command again, which goes on from there"
        ) from None
    return None


def _fetch(client: httpx.Client, url: str, part: Path, report: Report) -> None:
    begun = _read_state(part, url)
    if begun is None:
        discard(part)
    have = _size(part)
    if begun is not None and begun.size is not None and have >= begun.size:
        if have == begun.size:
            return
        discard(part)
        begun, have = None, 0
    # Compressed on its way, bytes would be counted, and begun at, in another file.
    headers = {"Accept-Encoding": "identity"}
    if begun is not None and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": begun.validator}
    with client.stream("GET", url, headers=headers) as answer:
        _check_status(answer, url, part)
        if answer.status_code == _PART:
            if begun is None or not _continues(answer, begun, have):
                discard(part)
                raise _BrokenError("the server sent another part than the one that is lacking")
            size, mode = begun.size, "ab"
        else:
            size, mode, have = _begin(answer, url, part), "wb", 0
        with part.open(mode) as file:
            report(have, size)
            for chunk in answer.iter_raw():
                file.write(chunk)
                have += len(chunk)
                report(have, size)
    if size is not None and have != size:
        raise _BrokenError(f"{have} of {size} bytes arrived")


def _check_status(answer: httpx.Response, url: str, part: Path) -> None:
    code = answer.status_code
    if code in (_WHOLE, _PART):
        return
    said = f"{code} {answer.reason_phrase}".strip()
    if code == _NO_SUCH_PART:
        discard(part)
    elif code < 500 and code not in _PASSING:
        raise DownloadError(
            f"{url} cannot be fetched (the server says {said}); give another address with --url"
        )
    raise _BrokenError(f"the server says {said}")


def _continues(answer: httpx.Response, begun: _Begun, have: int) -> bool:
    """Whether an answer is the rest of the part. Some servers do not heed ``If-Range``."""
    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != have:
        return False
    if begun.size is not None and found[2] not in ("*", str(begun.size)):
        return False
    return _validator(answer) in ("", begun.validator)


def _begin(answer: httpx.Response, url: str, part: Path) -> int | None:
    """Note what is begun; without a validator it will not be resumed."""
    discard(part)
    length = answer.headers.get("Content-Length", "")
    size = int(length) if length.isdigit() and "Content-Encoding" not in answer.headers else None
    validator = _validator(answer)
    if validator:
        write_record(_state(part), asdict(_Begun(url=url, validator=validator, size=size)))
    return size


def _validator(answer: httpx.Response) -> str:
    tag = answer.headers.get("ETag", "")
    # A weak one names versions that may differ in their bytes.
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _read_state(part: Path, url: str) -> _Begun | None:
    try:
        begun = _Begun(**read_record(_state(part), "a download that was begun"))
    except (BadInputError, TypeError):
        return None
    return begun if begun.url == url else None


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0
