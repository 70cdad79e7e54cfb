"""Where output goes: a file that is there as a whole or not at all, a pipe, or the null device."""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

from firsttok.errors import BadInputError, CacheError

__all__ = ["atomic_path", "check_output"]

_LINKS = 40
"""Symbolic links that are followed, as many as Linux does."""
_NAME = 40
"""Characters of a file's name that its temporary one begins with; a whole one may have no room."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path; what is written there goes to ``path`` as a whole, on success only.

    A file is replaced at once and keeps its permissions; a symbolic link to it stays, another hard
    link keeps the old content. A pipe, ``/dev/stdout`` among them, is sent the content, and so is
    the null device.

    Raises:
        BadInputError: If a folder or a device has that name, or a file that may not be changed.
        CacheError: If there can be no such file, if its folder cannot be written to, or if the disk
            is full.
    """
    stream = _checked(path, str(path))
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        if stream is None:
            target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.parent if stream is None else None
        handle, name = tempfile.mkstemp(".part", f".{path.name[:_NAME]}.", folder)
        os.close(handle)
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror}); choose a folder you may write to"
        ) from None
    temporary = Path(name)
    try:
        yield temporary
        if stream is None:
            _replace(temporary, target)
        else:
            _send(temporary, stream)
    except BrokenPipeError:
        # Nobody reads any more, which is no fault of the place.
        raise
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written ({error.strerror or error}); free some space or choose "
            "another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: Path, option: str = "") -> None:
    """Check that a file, named by an option, can be written later, before work is done for it.

    Raises:
        BadInputError: If a folder or a device has that name, if its folder does not exist, or if
            the file or its folder may not be changed.
        CacheError: If there can be no such file.
    """
    named = f"{option} {path}".lstrip()
    if _checked(path, named) is not None:
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise BadInputError(f"the folder of {named} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInputError(f"the folder of {named} cannot be written to; choose another one")


def _checked(path: Path, named: str) -> Path | int | None:
    """What to open where output is sent, a descriptor or a pipe; None where a file is replaced."""
    descriptor = _descriptor(path)
    if descriptor is not None:
        return descriptor
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CacheError(f"{named} cannot be written ({reason}); name another file") from None
    kind = found.st_mode
    if stat.S_ISREG(kind):
        if not kind & 0o222 or not os.access(path, os.W_OK):
            raise BadInputError(
                f"{named} is there and may not be written to; name another file, or change its "
                "permissions"
            )
        return None
    null = stat.S_ISCHR(kind) and found.st_rdev == Path(os.devnull).stat().st_rdev
    if null or stat.S_ISFIFO(kind):
        return path
    what = "folder" if stat.S_ISDIR(kind) else "socket" if stat.S_ISSOCK(kind) else "device"
    raise BadInputError(f"{named} is a {what}; name a file, a pipe or {os.devnull}")


def _descriptor(path: Path) -> int | None:
    """Number of the open file that a path such as ``/dev/stdout`` stands for.

    Opened by its path, a file would be cut off, and what is printed to it lost.
    """
    folders = {os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd")}
    try:
        for _ in range(_LINKS):
            if path.name.isdecimal() and os.path.realpath(path.parent) in folders:
                return int(path.name)
            path = path.parent / path.readlink()
    except (OSError, ValueError):
        # No link, so a file or nothing.
        pass
    return None


def _replace(temporary: Path, target: Path) -> None:
    try:
        old = target.stat()
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        mode = 0o666 & ~umask
    else:
        mode = stat.S_IMODE(old.st_mode)
        with contextlib.suppress(OSError):
            os.chown(temporary, old.st_uid, old.st_gid)
    temporary.chmod(mode)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(target)


def _send(temporary: Path, stream: Path | int) -> None:
    for printed in (sys.stdout, sys.stderr):
        # What was printed before comes before.
        with contextlib.suppress(AttributeError, ValueError):
            printed.flush()
    with (
        temporary.open("rb") as written,
        open(stream, "wb", closefd=isinstance(stream, Path)) as out,
    ):
        shutil.copyfileobj(written, out)
