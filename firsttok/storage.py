"""Files: the cache folder, atomic writes, and reading what is ours or a user's with helpful errors.

A file that firsttok reads again holds a digest of its content (:mod:`firsttok.digests`). There are
two readers for each kind. :func:`read_json` and :func:`read_safetensors` take a file that a user
names, whoever wrote it, and check its digest if it has one. :func:`read_record` and
:func:`read_tensors` take a file that is kept under a name made from what it depends on: without its
digest, or under another name, it is damaged. Each is told what the file should hold (``"facts"``),
for its messages.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Generator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from firsttok.digests import content_hash, is_sealed, sealed, tensors_hash, unsealed
from firsttok.errors import BadInputError, CacheError
from firsttok.sinks import atomic_path

__all__ = [
    "atomic_path",
    "cache_folder",
    "content_hash",
    "file_sha256",
    "locked",
    "make_folder",
    "parse_json",
    "read_json",
    "read_record",
    "read_safetensors",
    "read_tensors",
    "read_text",
    "read_toml",
    "save_result",
    "write_json",
    "write_record",
    "write_tensors",
]

logger = logging.getLogger(__name__)

_PATIENCE = 2.0
"""Seconds that a process waits for another one without a word."""


def cache_folder(*parts: str) -> Path:
    """Return a folder of the user's cache, made if needed; ``FIRSTTOK_CACHE`` overrides its root.

    Raises:
        CacheError: If the folder cannot be made or written to.
    """
    override = os.environ.get("FIRSTTOK_CACHE")
    if override:
        root = Path(override).expanduser()
    else:
        import platformdirs

        root = Path(platformdirs.user_cache_dir("firsttok"))
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"the cache folder {folder} cannot be made ({error.strerror}); "
            "set FIRSTTOK_CACHE to a folder you may write to"
        ) from None
    return folder


def make_folder(folder: Path, what: str = "folder") -> None:
    """Make a folder that a user named, unless it is there.

    Raises:
        CacheError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"the {what} {folder} cannot be made ({error.strerror}); choose another one"
        ) from None


@contextlib.contextmanager
def locked(path: Path) -> Generator[None, None, None]:
    """Hold a lock file beside ``path``, so that two processes never write it at once.

    It says so when another process holds it for longer than :data:`_PATIENCE`.

    Raises:
        CacheError: If the lock file cannot be made.
    """
    lock = FileLock(str(path) + ".lock")
    try:
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            logger.warning("waiting for another process, which is at work on %s", path.name)
            lock.acquire()
    except OSError as error:
        raise CacheError(
            f"{path.parent} cannot be written to ({error.strerror}); "
            "set FIRSTTOK_CACHE to a folder you may write to"
        ) from None
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; one that :func:`write_record` wrote has to be as it was written.

    Raises:
        BadInputError: If it is missing, unreadable, not UTF-8 or not JSON; the message names the
            line.
        DamagedFileError: If it holds a digest that does not belong to its content.
    """
    content = parse_json(path, read_text(path, what), what)
    return unsealed(content, path, what) if is_sealed(content) else content


def read_record(path: Path, what: str) -> dict[str, Any]:
    """Read a kept file, written by :func:`write_record` under the same name.

    Raises:
        BadInputError: As :func:`read_json` does.
        DamagedFileError: If it holds no digest, or another one than that of its content and name.
    """
    return unsealed(parse_json(path, read_text(path, what), what), path, what, name=path.name)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        BadInputError: If it is missing, unreadable, not UTF-8 or not TOML; the message names the
            line.
    """
    # Found by name, since either may be lacking: tomllib is part of Python from 3.11 on.
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return dict(toml.loads(read_text(path, what)))
    except toml.TOMLDecodeError as error:
        raise BadInputError(f"{path} is not valid TOML ({error}); correct that line") from None
    except ValueError as error:
        raise BadInputError(f"{path} holds a number that cannot be read ({error})") from None
    except RecursionError:
        raise BadInputError(f"{path} is nested too deeply to be a file of {what}") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with a final newline; NaN and infinity are refused.

    Raises:
        CacheError: If the file cannot be written.
        ValueError: If the content holds NaN or infinity.
    """
    text = _as_json(content)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as :func:`write_json` does, with a digest of it and of the file's name.

    Raises:
        CacheError: If the file cannot be written.
        ValueError: If the content holds NaN or infinity.
    """
    # As it will be read: a tuple comes back as a list, and a number as a key as a text.
    write_json(path, sealed(json.loads(_as_json(dict(content))), path.name))


def save_result(stem: Path, record: Mapping[str, Any]) -> None:
    """Write a result as ``stem.json``, and its rows as ``stem.csv``.

    Args:
        stem: Path without suffix.
        record: Title, columns and lines of a table, ``provenance``, and ``rows``: flat, one per
            observation.

    Raises:
        CacheError: If a file cannot be written.
        ValueError: If a number is not finite.
    """
    import pandas as pd

    rows = [dict(row) for row in record["rows"]]
    # JSON first: it refuses NaN, and then there is to be no CSV either.
    write_record(stem.with_name(f"{stem.name}.json"), {**record, "rows": rows})
    with atomic_path(stem.with_name(f"{stem.name}.csv")) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file, whoever wrote it.

    Returns:
        Tensors by name (on the CPU), and the string metadata.

    Raises:
        BadInputError: If it is missing, truncated or not a safetensors file.
        DamagedFileError: If it holds a digest that does not belong to its content.
    """
    tensors, metadata = _read_safetensors(path, what)
    if is_sealed(metadata):
        metadata = unsealed(metadata, path, what, beside=tensors_hash(tensors))
    return tensors, metadata


def read_tensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a kept safetensors file, written by :func:`write_tensors` under the same name.

    Returns:
        As :func:`read_safetensors` does.

    Raises:
        BadInputError: As :func:`read_safetensors` does.
        DamagedFileError: If it holds no digest, or another one than that of its content and name.
    """
    tensors, metadata = _read_safetensors(path, what)
    beside = tensors_hash(tensors)
    return tensors, unsealed(metadata, path, what, name=path.name, beside=beside)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write safetensors atomically, with a digest of tensors, metadata and the file's name.

    Raises:
        CacheError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = sealed(dict(metadata), path.name, beside=tensors_hash(plain))
    with atomic_path(path) as temporary:
        try:
            save_file(plain, str(temporary), about)
        except SafetensorError as error:
            # It wraps what the system says, such as that the disk is full.
            raise OSError(str(error)) from None


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_text(path: Path, what: str) -> str:
    """Read a text file, without a byte order mark.

    Raises:
        BadInputError: If it is missing, unreadable, not UTF-8, or a device, which may have no end.
    """
    try:
        if path.is_char_device() and not path.samefile(os.devnull):
            raise BadInputError(f"{path} is a device; name a file")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInputError(f"no file of {what} at {path}; check the path") from None
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path} is not UTF-8 text at byte {error.start}; save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(f"{str(path)!r} cannot be read ({reason}); check the path") from None


def parse_json(path: Path, text: str, what: str) -> Any:
    """The content of a JSON text that was read from a file.

    Raises:
        BadInputError: If it is empty or no JSON; says where.
    """
    if not text.strip():
        raise BadInputError(f"{path} is empty; it should hold {what} as JSON")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}); correct that line"
        ) from None
    except ValueError as error:
        # Python reads no whole number of more than 4300 digits.
        raise BadInputError(f"{path} holds a number that cannot be read ({error})") from None
    except RecursionError:
        raise BadInputError(f"{path} is nested too deeply to be a file of {what}") from None


def _read_safetensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadInputError(f"no file of {what} at {path}; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise BadInputError(
            f"{path} is not a complete safetensors file of {what} ({error}); make it again"
        ) from None
