"""The report on a model: what the paper says, what was measured, and what follows.

Nothing is measured here. The report is put together from what the scripts left in
``figures/<model>/``, and equal files give an equal report.
"""

from firsttok.report.pages import render_html, render_markdown, write_reports
from firsttok.report.view import (
    Judged,
    ModelReport,
    PrintedTable,
    Section,
    build_report,
    result_folders,
)

__all__ = [
    "Judged",
    "ModelReport",
    "PrintedTable",
    "Section",
    "build_report",
    "render_html",
    "render_markdown",
    "result_folders",
    "write_reports",
]
