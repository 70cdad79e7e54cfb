"""Figures: one style for all, saved as PNG and SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firsttok.escapes import printable
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PALETTE",
    "RESOLUTION",
    "accuracy_bars",
    "caption",
    "dots",
    "effect_map",
    "figure",
    "layer_curve",
    "legend_below",
    "perplexity_axis",
    "plain",
    "save_figure",
    "screen_curves",
    "stage_plot",
    "strip_plot",
]

RESOLUTION = 160
"""Dots to the inch of a PNG."""
PALETTE = {"collapse": "#c0392b", "normal": "#2c6fbb"}


def figure(columns: int, *, height: float = 3.6) -> "tuple[Figure, list[Axes]]":
    """A figure with some panels side by side, on a backend that needs no screen."""
    import matplotlib as mpl

    mpl.use("Agg", force=False)
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook", font_scale=0.85)
    drawn, axes = plt.subplots(1, columns, figsize=(4.2 * columns, height), squeeze=False)
    return drawn, list(axes[0])


def plain(text: str) -> str:
    """Text from outside for a title or a label, in which no dollar sign begins a formula."""
    return printable(text, lines=False).replace("$", "\\$")


def dots(axis: "Axes", rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
    """One dot per row; ``x``, ``y`` and the like name columns, as in seaborn."""
    import pandas as pd
    import seaborn as sns

    settings = {"alpha": 0.75, **settings}
    sns.stripplot(data=pd.DataFrame([dict(row) for row in rows]), ax=axis, **settings)


def perplexity_axis(axis: "Axes", label: str = "perplexity after ROME") -> None:
    """A logarithmic axis, with a line at the perplexity that counts as collapse."""
    axis.axhline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    axis.set_yscale("log")
    axis.set_xlabel("")
    axis.set_ylabel(label)


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
    style: dict[str, Any] = {"dodge": True, "jitter": 0.2, "size": 5, "palette": PALETTE}
    dots(axis, rows, x=x, y=y, hue="cases", order=list(order), **style)
    axis.set_yscale("log")
    axis.set_xlabel("")
    axis.set_ylabel(label)
    axis.legend(title=None, frameon=True)


def caption(row: Mapping[str, Any], join: str = ", ") -> str:
    """How far two groups of keys are apart, in the words of a caption."""
    return (
        f"silhouette {row['silhouette']:.2f}, cosine {row['cosine_of_means']:.2f}{join}"
        f"probe {row['probe_accuracy']:.2f}"
    )


def layer_curve(
    axis: "Axes", rows: Sequence[Mapping[str, Any]], column: str, **settings: Any
) -> None:
    """A column over layers, with its interval where the rows have one."""
    layers = [row["layer"] for row in rows]
    axis.plot(layers, [row[column] for row in rows], **settings)
    if f"{column}_low" in rows[0]:
        low, high = ([row[f"{column}_{end}"] for row in rows] for end in ("low", "high"))
        axis.fill_between(layers, low, high, color=settings["color"], alpha=0.2, linewidth=0)
    axis.set_xlabel("layer")


def legend_below(axis: "Axes", distance: float, **settings: Any) -> None:
    """A legend under a panel and its captions."""
    settings = {"loc": "upper center", "bbox_to_anchor": (0.5, -distance), **settings}
    axis.legend(fontsize=8, **settings)


def save_figure(stem: Path, drawn: "Figure") -> None:
    """Write ``stem.png`` and ``stem.svg`` and close the figure."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    drawn.tight_layout()
    # No date and no random ids in the file, so that equal numbers give an equal file.
    settings: Any = {"svg.hashsalt": stem.name}
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        # The name of a model may hold a dot, and a suffix would take the place of what follows it.
        path = stem.with_name(f"{stem.name}.{kind}")
        with atomic_path(path) as temporary, mpl.rc_context(settings):
            drawn.savefig(temporary, format=kind, dpi=RESOLUTION, metadata=metadata)
    plt.close(drawn)


def accuracy_bars(axis: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean efficacy, generalization and locality of each method, with 95 % bootstrap intervals."""
    import pandas as pd
    import seaborn as sns

    long = pd.DataFrame(
        {"method": row["method"], "measure": measure, "percent": 100 * row[measure]}
        for row in rows
        for measure in ("efficacy", "generalization", "locality")
        if row[measure] is not None
    )
    names: dict[str, Any] = {"x": "measure", "y": "percent", "hue": "method"}
    sns.barplot(data=long, **names, errorbar="ci", seed=0, ax=axis)
    axis.set_xlabel("")
    axis.set_ylim(0, 105)
    axis.legend(title=None)


def stage_plot(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Perplexity of every edit by the stage a swap acts in, on a logarithmic axis."""
    drawn, (axis,) = figure(1)
    dots(axis, rows, x="stage", y="perplexity")
    perplexity_axis(axis)
    axis.set_xlabel("the swap acts on")
    return drawn


def screen_curves(axes: "Sequence[Axes]", rows: Sequence[Mapping[str, Any]]) -> None:
    """Receiver operating characteristic, and denominators by what the edit did."""
    import pandas as pd
    import seaborn as sns
    from sklearn.metrics import RocCurveDisplay

    edited = [row for row in rows if row["collapsed"] is not None]
    truth = [bool(row["collapsed"]) for row in edited]
    sizes = [abs(float(row["denominator"])) for row in edited]
    RocCurveDisplay.from_predictions(truth, [-size for size in sizes], ax=axes[0], name="screen")
    axes[0].set_xlabel("share of normal cases taken for collapse cases")
    axes[0].set_ylabel("share of collapse cases found")
    frame = pd.DataFrame(
        {"edit": ["collapse" if flag else "normal" for flag in truth], "|denominator|": sizes}
    )
    sns.stripplot(
        data=frame, x="edit", y="|denominator|", hue="edit", palette=PALETTE, alpha=0.7, ax=axes[1]
    )
    axes[1].set_yscale("log")
    axes[1].set_xlabel("what ROME's edit did")


def effect_map(
    axis: "Axes",
    rows: Sequence[Mapping[str, Any]],
    *,
    roles: Sequence[str],
    title: str,
    limit: float,
    marked: int | None = None,
) -> None:
    """Average indirect effects by role of the token and layer, white where there is none.

    Args:
        axis: Where to draw.
        rows: Rows of one kind of state, with ``role``, ``layer`` and ``aie``.
        roles: In order from above; those without a row are left out.
        title: Title of the panel.
        limit: The effect at which the colours end, so that panels can be compared.
        marked: A layer to mark by a line.
    """
    import pandas as pd
    import seaborn as sns

    frame = pd.DataFrame([dict(row) for row in rows])
    table = frame.pivot_table(index="role", columns="layer", values="aie")
    table = table.reindex([role for role in roles if role in table.index])
    colours: dict[str, Any] = {"cmap": "vlag", "vmin": -limit, "vmax": limit}
    colours["cbar_kws"] = {"label": "average indirect effect"}
    sns.heatmap(table, **colours, xticklabels=5, yticklabels=1, ax=axis)
    if marked is not None:
        axis.axvline(marked + 0.5, color="black", linewidth=1, linestyle=":")
    axis.set_title(title)
    axis.set_xlabel("layer")
    axis.set_ylabel("")
    axis.tick_params(axis="y", rotation=0)
