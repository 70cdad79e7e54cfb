"""A sweep's run folder as an object: rows, tables, queries, and how much of it is done."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from firsttok.arguments import taken
from firsttok.display import Note, Panel, Part, Shown, Table
from firsttok.errors import BadInputError
from firsttok.options import folder_name
from firsttok.rows import DONE, FAILED, Row, read_table, row_schema
from firsttok.storage import content_hash, save_result
from firsttok.sweep.groups import COLUMNS, GroupedRows
from firsttok.sweep.manifest import read_manifest
from firsttok.sweep.query import SECONDS, frame_of, select
from firsttok.sweep.tables import ResultTable, method_summary, model_tables

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["ModelProgress", "RunResults", "read_run"]


@dataclass(frozen=True, kw_only=True)
class ModelProgress:
    """How much of a model's part of a run is done."""

    model: str
    """Label of the model."""
    planned: int
    """Rows it will have: one per fact and method."""
    done: int
    """Rows that hold numbers."""
    failed: int
    """Rows that hold a reason."""
    collapsed: int
    """Rows whose edit destroyed the model."""

    def __str__(self) -> str:
        """One line."""
        here = self.done + self.failed
        share = 100 * here / self.planned if self.planned else 0
        rest = max(0, self.planned - here)
        state = f"{rest} still to do" if rest else "complete"
        return (
            f"{self.model}: {here} of {self.planned} rows ({math.floor(share)} %), {self.failed} "
            f"of them failed; {state}"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunResults(Shown):
    """What a sweep has found so far; an unfinished run can be read at any time."""

    folder: Path
    """The run's folder."""
    manifest: Mapping[str, Any]
    """What the run is made of: models, facts, methods and settings."""
    table: "pa.Table"
    """All rows: the columns of :data:`~firsttok.rows.COLUMNS`, measured or not, then those of a
    user's editors and metrics."""

    @property
    def models(self) -> tuple[str, ...]:
        """Labels of the models that take part."""
        return tuple(self.manifest["models"])

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(self.manifest["methods"])

    @property
    def labels(self) -> Mapping[str, str]:
        """Names of the methods in tables, as far as the run tells."""
        match self.manifest:
            case {"told": {"labels": dict() as labels}}:
                known = cast(dict[str, Any], labels)
                return {name: label for name, label in known.items() if isinstance(label, str)}
            case _:
                return {}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All rows as objects, made on first use."""
        return tuple(Row(record) for record in self.table.to_pylist())

    def frame(self) -> "pd.DataFrame":
        """All rows as a data frame; whole numbers and truth values may be missing (pandas.NA)."""
        return frame_of(self.table)

    @taken
    def sql(self, query: str, *, seconds: float = SECONDS) -> "pd.DataFrame":
        """Answer a SELECT over the view ``rows``, in DuckDB's SQL.

        Args:
            query: One SELECT; it can read nothing but the rows.
            seconds: How long it may take.

        Raises:
            BadInputError: If it is anything else, or cannot be answered in that time.
        """
        return frame_of(select(self.table, query, seconds=seconds))

    def of(self, model: str) -> "RunResults":
        """The part of one model.

        Raises:
            BadInputError: If it does not take part in the run.
        """
        import pyarrow.compute as pc

        if model not in self.models:
            known = ", ".join(self.models) or "none yet"
            raise BadInputError(
                f"no model {model!r} takes part in the run in {self.folder}; choose from {known}"
            )
        entries = cast(Mapping[str, Any], self.manifest["models"])
        return replace(
            self,
            manifest={**self.manifest, "models": {model: entries[model]}},
            table=self.table.filter(pc.field("model") == model),
        )

    def grouped(self, model: str) -> GroupedRows:
        """The rows of one model by method and group of cases.

        Raises:
            BadInputError: If it does not take part in the run.
        """
        return GroupedRows(
            model=model,
            methods=self.methods,
            records=self.of(model).table.select(COLUMNS).to_pylist(),
            original=self.original(model),
            labels=self.labels,
        )

    def original(self, model: str) -> float | None:
        """Perplexity of a model before any edit, where the manifest knows it."""
        value = self.manifest["models"][model].get("original_perplexity")
        return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None

    def tables(self) -> tuple[ResultTable, ...]:
        """The papers' tables, model by model; of a model without a row, none."""
        grouped = [self.grouped(model) for model in self.models]
        return tuple(
            table for rows in grouped if rows.done or rows.failed for table in model_tables(rows)
        )

    def progress(self) -> tuple[ModelProgress, ...]:
        """How much is done, model by model."""
        found: list[ModelProgress] = []
        for model in self.models:
            table = self.of(model).table
            status = Counter(table["status"].to_pylist())
            found.append(
                ModelProgress(
                    model=model,
                    planned=self.manifest["facts"]["count"] * len(self.methods),
                    done=status[DONE],
                    failed=status[FAILED],
                    collapsed=table["collapsed"].to_pylist().count(True),
                )
            )
        return tuple(found)

    def panel(self) -> Panel:
        """How much is done, and the summary of every model."""
        names = [field.name for field in fields(ModelProgress)]
        parts: list[Part] = [
            Table(columns=names, lines=[astuple(each) for each in self.progress()])
        ]
        for model in self.models:
            summary = self.summary(model)
            parts += [Note(text=summary.title), *summary.panel().parts]
        return Panel(
            title=f"a run of {self.manifest['facts']['count']} facts by {', '.join(self.methods)}",
            parts=parts,
            source={"run": self.folder.name},
        )

    def summary(self, model: str) -> ResultTable:
        """One line per method: its slots, and what it did to one model.

        Raises:
            BadInputError: If the model does not take part in the run.
        """
        return method_summary(self.grouped(model), self.manifest["methods"])

    def publish(self, out: str | Path) -> tuple[Path, ...]:
        """Leave the summary and all rows where ``firsttok report --out`` finds them.

        Args:
            out: Folder of results, which has one folder for each model.

        Returns:
            The files, ``OUT/<model>/sweep_<run>.json``; a CSV of the rows lies beside each.

        Raises:
            BadInputError: If no model has a row yet.
            CacheError: If a file cannot be written.
        """
        written: list[Path] = []
        for model, entry in self.manifest["models"].items():
            rows = self.of(model).table.to_pylist()
            if not rows:
                continue
            table = self.summary(model)
            stem = Path(out) / folder_name(model) / f"sweep_{_plain_name(self.folder)}"
            record = {
                "title": table.title,
                "columns": table.columns,
                "lines": [list(map(_finite, line)) for line in table.lines],
                "provenance": {**entry, "methods": self.manifest["methods"]},
                "rows": [{name: _finite(cell) for name, cell in row.items()} for row in rows],
            }
            save_result(stem, record)
            written.append(Path(f"{stem}.json"))
        if not written:
            raise BadInputError(f"the run in {self.folder} holds no rows yet; sweep first")
        return tuple(written)


@taken
def read_run(path: str | Path) -> RunResults:
    """Read what is there of a run, whether it has ended or not.

    Args:
        path: The run's folder.

    Raises:
        BadInputError: If it holds no run, if a file of it is damaged, or if a row occurs twice or
            does not belong to it.
    """
    import pyarrow as pa

    folder = Path(path)
    manifest = read_manifest(folder)
    # The model is read from the rows, so that a folder's name means nothing.
    files = sorted((folder / "rows").rglob("chunk-*.parquet"))
    shards = [read_table(file) for file in files]
    try:
        # A column of a user's may hold whole numbers in one file and others in another.
        table = pa.concat_tables(
            [row_schema().empty_table(), *shards], promote_options="permissive"
        )
    except pa.ArrowException as error:
        raise BadInputError(
            f"files of the run in {folder} hold different kinds of values ({error}); begin another "
            "run"
        ) from None
    known = {"model": manifest["models"], "method": manifest["methods"], "status": (DONE, FAILED)}
    for column, values in known.items():
        for value in table[column].unique().to_pylist():
            if value not in values:
                raise BadInputError(
                    f"{_holder(files, shards, {column: value})} holds rows of {column} {value!r}, "
                    "which the run's manifest.json does not know; move the file out of the run"
                )
    _refuse_repeated(table, files, shards)
    return RunResults(folder=folder, manifest=manifest, table=table.combine_chunks())


def _refuse_repeated(table: "pa.Table", files: list[Path], shards: "list[pa.Table]") -> None:
    """Raise if a fact was counted twice, which a copied shard would do to every mean."""
    import pyarrow.compute as pc

    key = ["model", "case_id", "method"]
    counts = table.select(key).group_by(key).aggregate([([], "count_all")])
    repeated = counts.filter(pc.field("count_all") > 1).select(key).to_pylist()
    if not repeated:
        return
    first = min(repeated, key=lambda row: [str(row["model"]), row["case_id"], row["method"]])
    raise BadInputError(
        f"case {first['case_id']} by {first['method']} on {first['model']} occurs more than once "
        f"in the run, such as in {_holder(files, shards, first)} ({len(repeated)} rows do); take "
        "the copied file out of it"
    )


def _holder(files: list[Path], shards: "list[pa.Table]", match: Mapping[str, Any]) -> str:
    """Files that hold a row."""
    found = [
        str(file)
        for file, shard in zip(files, shards, strict=True)
        if any(
            all(row[name] == value for name, value in match.items())
            for row in shard.select(list(match)).to_pylist()
        )
    ]
    return " and ".join(found)


def _plain_name(folder: Path) -> str:
    """The run's name as a part of a file's; no two runs of different names have one."""
    name = folder.resolve().name
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    return plain if plain == name else f"{plain}-{content_hash(name)[:8]}"


def _finite(value: Any) -> Any:
    """As JSON takes it: a number that is not finite is a text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
