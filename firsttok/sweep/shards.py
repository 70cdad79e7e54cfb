"""The rows of a sweep on disk: one Parquet file per chunk, there as a whole or not at all.

A file holds a SHA-256 of its name and of all its other bytes, in a gap before the footer, where
Parquet's readers do not look. Every byte is checked before Arrow sees the first one: page checksums
leave out the footer, which says what the bytes of the pages mean.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firsttok.errors import BadInputError
from firsttok.storage import atomic_path
from firsttok.sweep.rows import SweepRow, row_schema, rows_of, table_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Shard",
    "read_shard",
    "read_table",
    "shard_path",
    "shard_paths",
    "write_shard",
]

_SECONDS = b"seconds"
_AGAIN = "run the sweep again, which does its chunk again, or move the file out of the run"
_MARK = b"firsttok sha256:"
_TAIL = 8
"""Bytes at the end of a Parquet file: length of the footer, and the magic number."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A chunk's file, which may not hold all of its rows yet."""

    index: int
    """Number of the chunk."""
    path: Path
    """The file."""
    rows: int
    """Rows in it."""
    seconds: float
    """Time its facts took."""

    @staticmethod
    def at(path: Path) -> "Shard":
        """Look at a file.

        Raises:
            BadInputError: If it is no shard, or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = _checked(path)
        try:
            footer = pq.read_metadata(io.BytesIO(content))
            metadata: dict[bytes, bytes] = footer.schema.to_arrow_schema().metadata or {}
            return Shard(
                index=int(path.stem.removeprefix("chunk-")),
                path=path,
                rows=footer.num_rows,
                seconds=float(metadata[_SECONDS]),
            )
        except (pa.ArrowException, OSError, KeyError, ValueError):
            raise BadInputError(
                f"{path} is not a shard of a sweep; move it out of the run"
            ) from None


def write_shard(folder: Path, index: int, rows: Sequence[SweepRow], seconds: float) -> Path:
    """Write a chunk's file; nothing is left behind if that fails.

    Raises:
        CacheError: If the folder cannot be written to, or the disk is full.
    """
    import pyarrow.parquet as pq

    path = shard_path(folder, index)
    table: Any = table_of(rows)
    table = table.replace_schema_metadata({_SECONDS: f"{seconds:.3f}".encode()})
    written = io.BytesIO()
    pq.write_table(table, written, compression="zstd", write_page_checksum=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(_with_digest(written.getvalue(), path.name))
    return path


def shard_path(folder: Path, index: int) -> Path:
    """The file of a chunk."""
    return folder / f"chunk-{index:06d}.parquet"


def read_shard(path: Path) -> list[SweepRow]:
    """Read the rows of a chunk.

    Raises:
        BadInputError: As :func:`read_table` does.
    """
    return rows_of(read_table(path))


def read_table(path: Path) -> "pa.Table":
    """Read a chunk as a table, in the columns of :func:`~firsttok.sweep.rows.row_schema`.

    Raises:
        BadInputError: If the file is damaged, or made by another version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = _checked(path)
    try:
        # Not pq.read_table, which takes columns from folder names such as a=b.
        with pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True) as file:
            table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise BadInputError(f"{path} is damaged ({reason}); {_AGAIN}") from None
    if table.schema.remove_metadata() != row_schema():
        raise BadInputError(
            f"{path} has other columns than this version of firsttok writes; read it with the "
            "version its run's manifest.json names"
        )
    return table.replace_schema_metadata(None)


def shard_paths(folder: Path) -> Iterator[Path]:
    """Files of chunks, in order."""
    yield from sorted(folder.glob("chunk-*.parquet"))


def _with_digest(content: bytes, name: str) -> bytes:
    """Put the digest of a Parquet file into it; offsets count from the start and stay right."""
    end = _footer_start(content)
    digest = hashlib.sha256(name.encode() + b"\0" + content).digest()
    return b"".join([content[:end], _MARK, digest, content[end:]])


def _checked(path: Path) -> bytes:
    """The bytes of a shard, which are those that were written under its name.

    Raises:
        BadInputError: If they are not, or the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"{path} is damaged ({error.strerror}); {_AGAIN}") from None
    end = _footer_start(content)
    start = end - len(_MARK) - hashlib.sha256().digest_size
    plain = content[: max(start, 0)] + content[end:]
    if start < 0 or content[start:] != _with_digest(plain, path.name)[start:]:
        raise BadInputError(
            f"{path} is damaged, or was not written under this name by this version of firsttok "
            f"(its checksum is wrong); {_AGAIN}"
        )
    return content


def _footer_start(content: bytes) -> int:
    """Where the footer of a Parquet file begins, by the length it gives; 0 if that is absurd."""
    length = int.from_bytes(content[-_TAIL:-4], "little")
    return max(len(content) - _TAIL - length, 0)
