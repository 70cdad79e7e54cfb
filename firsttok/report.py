"""Tables and figures: saved as CSV, JSON, PNG and SVG, and printed beside the paper's numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from firsttok.storage import atomic_path, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "pick", "print_table", "save_figure", "save_rows", "strip_plot"]

PALETTE = {"collapse": "#c0392b", "normal": "#2c6fbb"}


def save_rows(stem: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    """Write ``stem.csv`` and ``stem.json``; the JSON holds rows and provenance."""
    import pandas as pd

    with atomic_path(stem.with_suffix(".csv")) as temporary:
        pd.DataFrame([dict(row) for row in rows]).to_csv(temporary, index=False)
    record = {"provenance": dict(provenance), "rows": [dict(row) for row in rows]}
    write_json(stem.with_suffix(".json"), record)


def pick(rows: Sequence[Mapping[str, Any]], column: str, **match: Any) -> list[float]:
    """One column of the rows whose other columns have the given values."""
    return [
        float(row[column])
        for row in rows
        if all(row[name] == wanted for name, wanted in match.items())
    ]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output; numbers get at most six digits."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    console = Console()
    # A file or a pipe has no width of its own, and a narrow table cuts its numbers off.
    Console(width=console.width if console.is_terminal else 140).print(table)


def figure(columns: int, *, height: float = 3.6) -> "tuple[Figure, list[Axes]]":
    """A figure with some panels side by side, on a backend that needs no screen."""
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    drawn, axes = plt.subplots(1, columns, figsize=(4.2 * columns, height), squeeze=False)
    return drawn, list(axes[0])


def strip_plot(
    axis: "Axes",
    rows: Sequence[Mapping[str, Any]],
    *,
    x: str,
    y: str,
    label: str,
    order: Sequence[str],
) -> None:
    """One dot per row, coloured by its ``cases``, on a logarithmic axis."""
    import pandas as pd
    import seaborn as sns

    sns.stripplot(
        data=pd.DataFrame([dict(row) for row in rows]),
        x=x,
        y=y,
        hue="cases",
        order=list(order),
        palette=PALETTE,
        dodge=True,
        jitter=0.2,
        alpha=0.75,
        size=5,
        ax=axis,
    )
    axis.set_yscale("log")
    axis.set_xlabel("")
    axis.set_ylabel(label)
    axis.legend(title=None, frameon=True)


def save_figure(stem: Path, drawn: "Figure") -> None:
    """Write ``stem.png`` and ``stem.svg`` and close the figure."""
    import matplotlib.pyplot as plt

    drawn.tight_layout()
    for suffix in (".png", ".svg"):
        with atomic_path(stem.with_suffix(suffix)) as temporary:
            # No date in the file, so that equal numbers give an equal file.
            metadata = {"Date": None} if suffix == ".svg" else None
            drawn.savefig(temporary, format=suffix[1:], dpi=160, metadata=metadata)
    plt.close(drawn)


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.2f}" if 0.1 <= abs(cell) < 1e6 else f"{cell:.3g}"
    return str(cell)
