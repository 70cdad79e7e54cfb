"""Records of a data file, one after another: JSON, JSON Lines, Parquet; never all at once."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib import resources
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, NoReturn

import ijson
from ijson.common import ObjectBuilder

from firsttok.errors import BadInputError, FactFormatError
from firsttok.storage import parse_json

__all__ = ["LINES", "builtin_json", "iter_records", "kind_of", "plain_suffix"]

LINES = (".jsonl", ".ndjson")
"""Endings of files that hold one record a line."""
_DEEPEST = 64
"""Levels of nesting; a record of facts has seven at most (KnowEdit)."""
_STEPS = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
_SPACE = b" \t\r\n\v\f"
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_COMPRESSED = (b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_POINTER = b"version https://git-lfs"
_TEXT_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?(?:NaN|Infinity)')
_OF_A_FACT = ("requested_rewrite", "prompt", "src", "subject", "concept")
"""Fields by which an object is a record, and no object of records."""
_BATCH = 256
"""Rows of a Parquet file that are read together."""


def builtin_json(name: str) -> Any:
    """Return the content of a file that comes with firsttok."""
    file = resources.files("firsttok.data.builtin").joinpath(name)
    return json.loads(file.read_text("utf-8"))


def iter_records(path: Path, what: str = "facts") -> Iterator[tuple[str, Any]]:
    """Read the records of a JSON list, of JSON Lines (by name: :data:`LINES`) or of Parquet.

    Each may be compressed by gzip. A JSON object may hold the list, as in ``{"data": [...]}``, hold
    the records by their numbers, or be the one record. Memory stays flat, whatever the size of a
    list. What is wrong is found when it is reached; messages call the records ``what``.

    Yields:
        Where each record stands, for messages, and the record; for a line that is no JSON the
        ``BadInputError`` that says why, after which reading goes on.

    Raises:
        BadInputError: If the file is missing, unreadable, not UTF-8 or not JSON.
        FactFormatError: If it is JSON, but no list.
    """
    with _opened(path, what) as (file, head):
        if head.startswith(_PARQUET):
            yield from _rows(path, file, what)
        elif plain_suffix(path) in LINES:
            yield from _lines(path, file)
        else:
            yield from _items(path, file, what)


def plain_suffix(path: Path) -> str:
    """The ending of a name without ``.gz``, in lower case."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true/false"}
    return "null" if value is None else kinds.get(type(value), "a number")


@contextmanager
def _opened(path: Path, what: str) -> Generator[tuple[BufferedIOBase, bytes], None, None]:
    """The bytes of a file without gzip and a byte order mark, and the first of them."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise BadInputError(
                f"{path} is no regular file, and {what} are read more than once; save them to one"
            )
        with path.open("rb") as plain:
            packed = plain.read(2) == _GZIP
            plain.seek(0)
            file = gzip.GzipFile(fileobj=plain) if packed else plain
            head = file.read(64)
            if head.startswith(_COMPRESSED):
                raise BadInputError(f"{path} is compressed, not by gzip; unpack it first")
            if head.startswith(_POINTER):
                raise BadInputError(
                    f"{path} is a Git LFS pointer, not the file itself; fetch that with: "
                    "git lfs pull"
                )
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            yield file, head
    except FileNotFoundError:
        raise BadInputError(f"no file of {what} at {path}; check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInputError(
            f"{path} is damaged or not all there ({error}); fetch it again"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise BadInputError(f"{path} cannot be read ({reason}); check the path") from None


def _items(path: Path, file: BufferedIOBase, what: str) -> Iterator[tuple[str, Any]]:
    start = begin = file.tell()
    while (byte := file.read(1)) and byte in _SPACE:
        begin += 1
    file.seek(begin)
    index = 0
    if byte == b"[":
        try:
            for record in _built(path, file, what):
                yield f"{path}, record {index}", record
                index += 1
        except (ijson.JSONError, ValueError):
            # The json module says where the mistake is; it also reads numbers too long for ijson.
            pass
        else:
            return
    elif byte == b"{":
        _refuse_lines(path, file)
    file.seek(start)
    content = _strictly(path, file, what)
    for number, record in enumerate(_listed(path, content, what)):
        if number >= index:
            yield f"{path}, record {number}", record


def _built(path: Path, file: BufferedIOBase, what: str) -> Iterator[Any]:
    depth = 0
    builder = ObjectBuilder()
    for event, value in ijson.basic_parse(file, use_float=True):
        depth += _STEPS.get(event, 0)
        if depth > _DEEPEST:
            raise BadInputError(f"{path} is nested too deeply to be a file of {what}")
        if depth == 0 or (depth == 1 and event == "start_array"):
            # The list's own end, or its beginning.
            continue
        builder.event(event, value)
        if depth == 1:
            yield builder.value
            builder = ObjectBuilder()


def _lines(path: Path, file: BufferedIOBase) -> Iterator[tuple[str, Any]]:
    index = 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            record = BadInputError(_reason(path, number, error))
        yield f"{path}, record {index} (line {number})", record
        index += 1


def _reason(path: Path, number: int, error: Exception) -> str:
    """Why a line is no record."""
    if isinstance(error, UnicodeDecodeError):
        return f"{path} is not UTF-8 text in line {number}; save it as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return (
            f"{path} is not valid JSON at line {number}, column {error.colno} ({error.msg}); "
            "each line should hold one record"
        )
    if isinstance(error, RecursionError):
        return f"{path} is nested too deeply in line {number}; each should hold one record"
    return f"{path} holds in line {number} what is no JSON ({error}); correct that line"


def _rows(path: Path, file: BufferedIOBase, what: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        # It reads from the end, which is far in what is compressed.
        source = BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
        with pq.ParquetFile(source) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    yield f"{path}, record {index}", record
                    index += 1
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise BadInputError(
            f"{path} is no complete Parquet file of {what} ({reason}); fetch it again"
        ) from None


def _listed(path: Path, content: Any, what: str) -> list[Any]:
    """The records in the whole content of a file."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise FactFormatError(f"{path} holds {kind_of(content)}; it should hold a list of {what}")
    fields: dict[str, Any] = content
    if any(name in fields for name in _OF_A_FACT):
        return [fields]
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and value}
    objects = {name: value for name, value in lists.items() if isinstance(value[0], dict)}
    (*found,) = objects or lists
    if len(found) == 1:
        return lists[found[0]]
    if found:
        raise FactFormatError(
            f"{path} holds {len(found)} lists ({', '.join(found)}); save the one with {what} as a "
            "file of its own"
        )
    if fields and all(isinstance(value, dict) for value in fields.values()):
        return [
            {"case_id": int(name)} | record if name.isdecimal() and len(name) < 19 else record
            for name, record in fields.items()
        ]
    raise FactFormatError(f"{path} holds an object; it should hold a list of {what}")


def _refuse_lines(path: Path, file: BufferedIOBase) -> None:
    """Refuse records one after another in a file whose name does not say so."""
    first = file.readline()
    try:
        alone = isinstance(json.loads(first), dict) and bool(file.read(1 << 16).strip())
    except (ValueError, RecursionError):
        alone = False
    if alone:
        raise BadInputError(
            f"{path} holds one JSON value after another; put them into a list, or let the name of "
            "the file end in .jsonl"
        )


def _strictly(path: Path, file: BufferedIOBase, what: str) -> Any:
    """The content of a whole file, with a sentence that says where it is no JSON."""
    before, data = file.tell(), file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path} is not UTF-8 text at byte {before + error.start}; save it as UTF-8"
        ) from None
    content = parse_json(path, text, what)
    for found in _TEXT_OR_CONSTANT.finditer(text):
        if not found[0].startswith('"'):
            number = text.count("\n", 0, found.start()) + 1
            column = found.start() - text.rfind("\n", 0, found.start())
            raise BadInputError(
                f"{path} holds {found[0]} at line {number}, column {column}, which is no JSON; "
                "correct that line"
            )
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
