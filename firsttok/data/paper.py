"""The numbers the papers print, each with its table and cell; no script carries one."""

from dataclasses import dataclass

from firsttok.data.records import builtin_json

__all__ = ["FALL_OF_ROME", "REBUILDING", "SLIDES", "PaperValue", "paper_values"]

FALL_OF_ROME = "fall-of-rome"
"""Yang et al., "The Fall of ROME", Findings of EMNLP 2024, camera-ready."""
REBUILDING = "rebuilding-rome"
"""Gupta et al., "Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing" (2024);
Tables 1 and 4 are of single edits, Table 2 of sequential ones."""
SLIDES = "butterfly-effect-slides"
"""The authors' slides on "The Butterfly Effect of Model Editing" (Findings of ACL 2024)."""


@dataclass(frozen=True, kw_only=True)
class PaperValue:
    """One printed number."""

    paper: str
    """Key of the paper: :data:`FALL_OF_ROME`, :data:`REBUILDING` or :data:`SLIDES`."""
    table: str
    """Table or equation, as printed; ``Text`` for a number of the running text."""
    model: str
    row: str
    """Row labels, joined by ``/``."""
    value: float
    """The number as printed; percentages in percent."""


def paper_values(table: str, *, paper: str = FALL_OF_ROME) -> tuple[PaperValue, ...]:
    """Return all printed numbers of one table or equation, in the paper's order."""
    return tuple(
        PaperValue(
            paper=block["paper"], table=block["table"], model=model, row=row, value=float(value)
        )
        for block in builtin_json("paper.json")
        if (block["paper"], block["table"]) == (paper, table)
        for row, cells in block["rows"].items()
        for model, value in zip(block["models"], cells, strict=True)
        if value is not None
    )
