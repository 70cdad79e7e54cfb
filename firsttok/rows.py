"""The row of a measurement, one fact edited by one editor, and the files that hold rows.

A row is flat: columns of the fact, of the edit's report, and of every metric. Rows are kept in
Parquet files, each there as a whole or not at all. A file holds a SHA-256 of its name and of all
its other bytes, in a gap before the footer, where Parquet's readers do not look. Every byte is
checked before Arrow sees the first one: page checksums leave out the footer, which says what the
bytes of the pages mean.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firsttok.data import Fact
from firsttok.errors import BadInputError
from firsttok.storage import atomic_path

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "COLUMNS",
    "DONE",
    "FACT",
    "FAILED",
    "METRIC_COLUMNS",
    "REPORT",
    "Row",
    "first_columns",
    "read_rows",
    "read_table",
    "row_schema",
    "rows_of",
    "seconds_of",
    "shard_path",
    "shard_paths",
    "table_of",
    "write_rows",
]

DONE = "done"
"""Status of a row that holds numbers."""
FAILED = "failed"
"""Status of a row that holds a reason instead."""
FACT: Mapping[str, type] = {
    "model": str,
    "case_id": int,
    "layer": int,
    "method": str,
    "status": str,
    "reason": str,
    **dict.fromkeys(("subject", "prompt", "target_new", "target_true"), str),
    # Whether the looked-up token is the very first of the sequence, where BOS counts as a token.
    "first_token": bool,
    # Whether the subject is a single token.
    "one_token": bool,
}
"""Columns of every row. ``layer`` is that of the study."""
REPORT: Mapping[str, type] = {
    **dict.fromkeys(("numerator", "denominator", "raw_numerator", "raw_denominator"), float),
    **dict.fromkeys(("delta_norm", "mean_delta", "key_cosine", "key_norm_ratio"), float),
    "value_norm": float,
    # Loss evaluations of the value optimisation, and the loss of the last one.
    "steps": int,
    "final_loss": float,
}
"""Columns of the ROME family's report, see :func:`~firsttok.editing.solve_update`; other editors
add columns of their own."""
METRIC_COLUMNS: Mapping[str, Mapping[str, type]] = {
    "perplexity": {"perplexity": float, "corpus_perplexity": float, "collapsed": bool},
    "accuracy": {
        **dict.fromkeys(("efficacy", "generalization", "locality"), float),
        "prefix": str,
        "prefixed_efficacy": float,
    },
    "scores": dict.fromkeys(("es", "ps", "ns", "em", "pm", "nm", "score"), float),
    "generated": {"generated": str, "generated_exact": bool, "generated_first_words": bool},
    "entropy": {"entropy": float},
    "tasks": dict.fromkeys(
        ("task_own_piqa", "task_own_hellaswag", "task_own_lambada", "task_own_sst2"), float
    ),
}
"""Columns of the built-in metrics by the metric's name, see :mod:`firsttok.metrics`."""
COLUMNS: Mapping[str, type] = {
    **FACT,
    **REPORT,
    **{k: v for each in METRIC_COLUMNS.values() for k, v in each.items()},
}
"""All columns that firsttok itself knows, in order."""
_SECONDS = b"seconds"
_AGAIN = (
    "run the sweep or sequence again, which does this part again, or move the file out of the run"
)
_MARK = b"firsttok sha256:"
_TAIL = 8
"""Bytes at the end of a Parquet file: length of the footer, and the magic number."""


class Row(Mapping[str, Any]):
    """One fact edited by one editor on one model, or why that could not be done.

    A column is an item and an attribute: ``row["perplexity"]``, ``row.perplexity``. ``dict(row)``
    has all of them.
    """

    __slots__ = ("_columns",)

    def __init__(self, columns: Mapping[str, Any]) -> None:
        """Take a copy of the columns."""
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> Any:
        """The value of a column."""
        return self._columns[name]

    def __getattr__(self, name: str) -> Any:
        """The value of a column."""
        # A copy in the making has no columns yet.
        if name.startswith("_") or name not in self._columns:
            known = "" if name.startswith("_") else f"; it has {', '.join(self._columns)}"
            raise AttributeError(f"the row has no column {name!r}{known}")
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the columns, in order."""
        return iter(self._columns)

    def __len__(self) -> int:
        """How many columns there are."""
        return len(self._columns)

    def __dir__(self) -> list[str]:
        """The columns, too, for a notebook's completion."""
        return [*super().__dir__(), *self._columns]

    def __reduce__(self) -> tuple[type["Row"], tuple[dict[str, Any]]]:
        """Pickle for workers of a cluster."""
        return Row, (self._columns,)

    def __repr__(self) -> str:
        """All columns."""
        return f"Row({', '.join(f'{name}={value!r}' for name, value in self.items())})"


def first_columns(
    model: str, layer: int, fact: Fact, method: str, *, reason: str | None = None
) -> dict[str, Any]:
    """Columns of a row that nothing has to be computed for; with a reason, one that failed."""
    return {
        "model": model,
        "case_id": fact.case_id,
        "layer": layer,
        "method": method,
        "status": DONE if reason is None else FAILED,
        "reason": reason,
        "subject": fact.subject,
        "prompt": fact.prompt,
        "target_new": fact.target_new,
        "target_true": fact.target_true,
    }


def row_schema() -> "pa.Schema":
    """All columns that firsttok itself knows, as Arrow has them."""
    import pyarrow as pa

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return pa.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])


def table_of(rows: Iterable[Mapping[str, Any]]) -> "pa.Table":
    """Rows as a table: the columns that one of them has, those of :data:`COLUMNS` first.

    Raises:
        BadInputError: If the values of a column are not of one kind.
    """
    import pyarrow as pa

    kept, known = list(rows), row_schema()
    held = dict.fromkeys(name for row in kept for name in row)
    columns: dict[str, Any] = {}
    for name in dict.fromkeys([*FACT, *(name for name in COLUMNS if name in held), *held]):
        values = [row.get(name) for row in kept]
        try:
            column = pa.array(values, type=known.field(name).type if name in COLUMNS else None)
        except pa.ArrowException as error:
            raise BadInputError(
                f"the column {name} cannot be kept ({error}); give a text, a number, a truth value "
                "or None, of one kind in all rows"
            ) from None
        # Where nothing was measured, nothing says what it would be.
        if not pa.types.is_null(column.type):
            columns[name] = column
    return pa.table(columns)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], *, seconds: float = 0.0) -> None:
    """Write a file of rows and of the time they took; nothing is left behind if that fails.

    Raises:
        BadInputError: As :func:`table_of` does.
        CacheError: If the folder cannot be written to, or the disk is full.
    """
    import pyarrow.parquet as pq

    table: Any = table_of(rows)
    table = table.replace_schema_metadata({_SECONDS: f"{seconds:.3f}".encode()})
    written = io.BytesIO()
    pq.write_table(table, written, compression="zstd", write_page_checksum=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(_with_digest(written.getvalue(), path.name))


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file, each with the columns that it was kept with.

    Raises:
        BadInputError: As :func:`read_table` does.
    """
    return rows_of(read_table(path))


def rows_of(table: "pa.Table") -> list[Row]:
    """The rows of a table, each with all of its columns."""
    return [Row(record) for record in table.to_pylist()]


def read_table(path: Path) -> "pa.Table":
    """Read a file of rows as a table.

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
    known = row_schema()
    if not set(FACT) <= set(table.column_names) or any(
        column.name in COLUMNS and column.type != known.field(column.name).type
        for column in table.schema
    ):
        raise BadInputError(
            f"{path} has other columns than this version of firsttok writes; read it with the "
            "version its run's manifest.json names"
        )
    return table


def seconds_of(table: "pa.Table") -> float:
    """Time that the rows of a file took."""
    return float((table.schema.metadata or {}).get(_SECONDS, 0))


def shard_path(folder: Path, index: int) -> Path:
    """The file of a chunk."""
    return folder / f"chunk-{index:06d}.parquet"


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
