"""SQL over the rows of a run: one SELECT, and nothing but the rows within its reach."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing
from threading import Event
from typing import TYPE_CHECKING, Any

from firsttok.arguments import check_text
from firsttok.errors import BadInputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["SECONDS", "frame_of", "select"]

SECONDS = 60.0
"""How long a query may take unless more is asked for."""
_LARGEST = 2**30
"""Bytes of an answer."""
_BATCH = 100_000
"""Rows of an answer between two looks at its size."""

_LOCK = (
    "SET python_enable_replacements = false",  # a table's name is not looked up in Python
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET memory_limit = '1GB'",
    "SET temp_directory = ''",  # nothing is put on disk when that is used up
    "SET enable_external_access = false",
    "SET disabled_filesystems = 'LocalFileSystem'",
    "SET lock_configuration = true",
)
"""Settings after which no query can read or write a file, or take these settings back."""


def select(table: "pa.Table", query: str, *, seconds: float = SECONDS) -> "pa.Table":
    """Answer a query over a table, which it knows as the view ``rows``.

    The database lives in memory and goes with the answer. It sees the table and nothing else: no
    file, no network, no variable of this process. Ctrl-C ends it at once.

    Args:
        table: The table.
        query: One SELECT in DuckDB's SQL; DESCRIBE and SUMMARIZE are such, too.
        seconds: How long it may take.

    Raises:
        BadInputError: If the query is no single SELECT, DuckDB cannot answer it, or the answer
            takes too long or more than a gigabyte.
    """
    import duckdb

    check_text(query, "the query")
    if not seconds > 0:
        raise BadInputError(f"a query cannot be answered in {seconds} seconds; give more than 0")
    with closing(duckdb.connect(":memory:")) as connection:
        connection.register("rows", table)
        for setting in _LOCK:
            connection.execute(setting)
        stopped = Event()
        # DuckDB hears no signal while it computes, so that it does so in a thread of its own.
        with ThreadPoolExecutor(max_workers=1) as beside:
            answer = beside.submit(_answer, connection, query, stopped)
            try:
                return answer.result(timeout=min(seconds, 1e6))
            except FutureTimeoutError:
                raise BadInputError(
                    f"the query was not answered in {seconds:g} seconds; simplify it, or allow "
                    "more with --sql-seconds"
                ) from None
            finally:
                stopped.set()
                connection.interrupt()


def _answer(connection: Any, query: str, stopped: Event) -> "pa.Table":
    import duckdb
    import pyarrow as pa

    try:
        statements = connection.extract_statements(query)
        if [statement.type.name for statement in statements] != ["SELECT"]:
            raise BadInputError(
                "the query is not one SELECT; a run is only read, so give a single SELECT "
                "over the view rows"
            )
        relation = connection.sql(statements[0])
        # Its name until DuckDB 1.4.
        reading = getattr(relation, "to_arrow_reader", None) or relation.fetch_arrow_reader
        reader, batches, size = reading(_BATCH), list[pa.RecordBatch](), 0
        for batch in reader:
            size += batch.nbytes
            if size > _LARGEST:
                raise BadInputError(
                    "the answer has more than a gigabyte; ask for fewer rows, with LIMIT, or for "
                    "fewer columns"
                )
            if stopped.is_set():
                break
            batches.append(batch)
        return pa.Table.from_batches(batches, schema=reader.schema)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        first = " ".join(str(error).partition("\n")[0].split())
        raise BadInputError(
            f"the query cannot be answered ({first}); it may read the view rows and nothing "
            "else, whose columns DESCRIBE rows lists"
        ) from None


def frame_of(table: "pa.Table") -> "pd.DataFrame":
    """A table as a data frame in which a missing whole number or truth value stays missing."""
    import pandas as pd
    import pyarrow as pa

    # A sum of whole numbers is a decimal in DuckDB, and one object per cell in pandas.
    fields = [
        field.with_type(pa.float64()) if pa.types.is_decimal(field.type) else field
        for field in table.schema
    ]
    types = {
        pa.int64(): pd.Int64Dtype(),
        pa.int32(): pd.Int32Dtype(),
        pa.bool_(): pd.BooleanDtype(),
    }
    return table.cast(pa.schema(fields)).to_pandas(types_mapper=types.get)
