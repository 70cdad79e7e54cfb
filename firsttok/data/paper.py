"""The numbers the papers print, each with its table and cell; no script carries one."""

import json
from dataclasses import dataclass
from importlib import resources

__all__ = ["PaperValue", "paper_values"]


@dataclass(frozen=True, kw_only=True)
class PaperValue:
    """One printed number."""

    paper: str
    """Key of the paper: ``fall-of-rome`` (Yang et al., EMNLP 2024 Findings, camera-ready)."""
    table: str
    """Table or equation, as printed."""
    model: str
    """Model the cell is about."""
    row: str
    """Row labels, joined by ``/``."""
    value: float
    """The number as printed."""


def paper_values(table: str) -> tuple[PaperValue, ...]:
    """Return all printed numbers of one table of "The Fall of ROME", in the paper's order."""
    text = resources.files("firsttok.data.builtin").joinpath("paper.json").read_text("utf-8")
    return tuple(
        PaperValue(paper=block["paper"], table=block["table"], model=model, row=row, value=value)
        for block in json.loads(text)
        if block["table"] == table
        for row, cells in block["rows"].items()
        for model, value in zip(block["models"], cells, strict=True)
        if value is not None
    )
