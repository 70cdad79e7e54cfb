"""The row of a sweep: one fact, one method, every component of the update, every metric."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from firsttok.data import Fact

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DONE", "FAILED", "SweepRow", "failed_row", "row_schema", "rows_of", "table_of"]

DONE = "done"
"""Status of a row that holds numbers."""
FAILED = "failed"
"""Status of a row that holds a reason instead."""


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One fact edited by one method on one model, or why that could not be done."""

    model: str
    """Label of the model."""
    case_id: int
    """Number of the fact in its set."""
    method: str
    """Name of the method."""
    status: str
    """:data:`DONE` or :data:`FAILED`."""
    reason: str | None = None
    """Why the case failed."""
    subject: str
    """The fact's subject."""
    prompt: str
    """The fact's prompt."""
    target_new: str
    """The fact's new target."""
    target_true: str
    """The fact's old target."""
    first_token: bool | None = None
    """As in :class:`~firsttok.study.CaseRow`, like all up to ``collapsed``."""
    one_token: bool | None = None
    numerator: float | None = None
    denominator: float | None = None
    raw_numerator: float | None = None
    raw_denominator: float | None = None
    delta_norm: float | None = None
    mean_delta: float | None = None
    key_cosine: float | None = None
    key_norm_ratio: float | None = None
    steps: int | None = None
    final_loss: float | None = None
    perplexity: float | None = None
    corpus_perplexity: float | None = None
    collapsed: bool | None = None
    efficacy: float | None = None
    """As in :class:`~firsttok.evaluation.Accuracy`, behind the bare prompt (Table 4)."""
    generalization: float | None = None
    """The same on the first paraphrase."""
    locality: float | None = None
    """Share of unchanged answers on the first neighbour."""
    prefix: str | None = None
    """Template put before the rewriting prompt at test time (Table 5); None without a prefix."""
    prefixed_efficacy: float | None = None
    """Efficacy behind that prefix."""
    es: float | None = None
    """As in :class:`~firsttok.evaluation.CounterfactScores`, like all up to ``score``."""
    ps: float | None = None
    ns: float | None = None
    em: float | None = None
    pm: float | None = None
    nm: float | None = None
    score: float | None = None
    generated: str | None = None
    """As in :class:`~firsttok.evaluation.GeneratedMatch`; None unless it was asked for."""
    generated_exact: bool | None = None
    generated_first_words: bool | None = None
    entropy: float | None = None
    """Normalised entropy of the words of ten generations; None unless it was asked for."""


def failed_row(model: str, fact: Fact, method: str, reason: str) -> SweepRow:
    """The row of a case that could not be done."""
    return SweepRow(
        model=model,
        case_id=fact.case_id,
        method=method,
        status=FAILED,
        reason=reason,
        subject=fact.subject,
        prompt=fact.prompt,
        target_new=fact.target_new,
        target_true=fact.target_true,
    )


def row_schema() -> "pa.Schema":
    """Columns of a shard, in order."""
    import pyarrow as pa

    kinds: dict[type, pa.DataType] = {
        str: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
        bool: pa.bool_(),
    }
    hints = get_type_hints(SweepRow)
    columns: list[pa.Field] = []
    for field in fields(SweepRow):
        hint = hints[field.name]
        plain = get_args(hint)[0] if isinstance(hint, UnionType) else hint
        columns.append(pa.field(field.name, kinds[plain], nullable=plain is not hint))
    return pa.schema(columns)


def table_of(rows: Iterable[SweepRow]) -> "pa.Table":
    """Rows as a table."""
    import pyarrow as pa

    return pa.Table.from_pylist([asdict(row) for row in rows], schema=row_schema())


def rows_of(table: "pa.Table") -> list[SweepRow]:
    """A table's rows."""
    records: list[dict[str, Any]] = table.to_pylist()
    return [SweepRow(**record) for record in records]
