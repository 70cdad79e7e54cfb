"""Do two groups of keys differ? A t-SNE picture (Figures 2 to 6), and numbers beside it.

A picture is no evidence: t-SNE is free to tear one cloud apart and to shrink the gap between two.
So every picture comes with a :class:`Separation`, measured on the vectors themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import taken
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.storage import atomic_path
from firsttok.tensors import KeyMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = [
    "Projection",
    "Separation",
    "normalise",
    "project",
    "save_points",
    "scatter",
    "separation",
]

RANDOM_STATE = 42
"""Of t-SNE, as in the released code."""
LARGEST_PERPLEXITY = 30.0
FOLDS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Points of all groups in one plane, from one joint fit."""

    points: Float[Tensor, "point 2"]
    """Coordinates, without unit; only who is near whom has a meaning."""
    labels: tuple[str, ...]
    perplexity: float
    """Perplexity of t-SNE (a number of neighbours)."""

    def of(self, label: str) -> Float[Tensor, "point 2"]:
        """Points of one group, in the order they were given in."""
        return self.points[[own == label for own in self.labels]]


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How far apart two groups of vectors are."""

    silhouette: float
    """Mean silhouette score by cosine distance: 1 is two tight groups apart, 0 is one cloud."""
    cosine_of_means: float
    distance_of_means: float
    """Euclidean distance of the two means, in the unit of the vectors."""
    probe_accuracy: float
    """Share of vectors that a linear probe, fitted on the others, puts into the right group."""
    probe_chance: float
    """Share of the larger group: what always naming that one would reach."""
    n: int
    """Vectors of the smaller group."""


def normalise(points: KeyMatrix) -> KeyMatrix:
    """Divide every row by its norm.

    ``C^-1 k_bar`` is no key: its norm has another unit than that of ``k^u``, and Figure 2a shows
    both. The paper does not say whether its vectors were scaled; this is the scaled version.

    Raises:
        BadInputError: If a row is zero.
    """
    norms = points.double().norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise BadInputError("a vector of norm 0 has no direction; leave it out")
    return (points.double() / norms).to(points)


def project(groups: Mapping[str, Float[Tensor, "_ d_mlp"]]) -> Projection:
    """Fit t-SNE once, on all groups together (Figures 2 to 6).

    Starts from the first two principal components, with random state 42 and perplexity
    ``min(30, (n - 1) / 3)`` for ``n`` points. Vectors are taken as they are (see
    :func:`normalise`).

    Raises:
        BadInputError: If there are fewer than four points, or all are equal.
        NonFiniteError: If a vector is NaN or infinite.
    """
    from sklearn.manifold import TSNE

    labels = tuple(name for name, points in groups.items() for _ in range(len(points)))
    if len(labels) < 4:
        raise BadInputError(f"t-SNE of {len(labels)} points shows nothing; give at least 4")
    vectors = torch.cat([_double(points) for points in groups.values()])
    if bool((vectors == vectors[0]).all()):
        raise BadInputError("all vectors are equal, so there is nothing to project")
    perplexity = min(LARGEST_PERPLEXITY, (len(labels) - 1) / 3)
    fit: Any = TSNE(perplexity=perplexity, init="pca", random_state=RANDOM_STATE)
    points = torch.from_numpy(fit.fit_transform(vectors.numpy()))
    return Projection(points=points, labels=labels, perplexity=perplexity)


@taken
def separation(
    one: Float[Tensor, "one d_mlp"], other: Float[Tensor, "other d_mlp"], *, seed: int = 0
) -> Separation:
    """Measure how far two groups of vectors are apart, in the space they live in.

    The silhouette takes cosine distances, so it does not depend on the norms. The linear probe is
    a logistic regression on features standardised within the fold, cross-validated over five
    stratified folds, or over as many as the smaller group has vectors. The seed is that of the
    folds.

    Raises:
        BadInputError: If a group has fewer than two vectors, or a mean of norm 0.
        NonFiniteError: If a vector is NaN or infinite.
    """
    from sklearn.metrics import silhouette_score

    sizes = (len(one), len(other))
    if min(sizes) < 2:
        raise BadInputError(
            f"groups of {sizes[0]} and {sizes[1]} vectors cannot be told apart by a measure; "
            "give at least 2 of each"
        )
    vectors = torch.cat([_double(one), _double(other)])
    means = torch.stack([_double(one).mean(0), _double(other).mean(0)])
    cosine = float(normalise(means).prod(0).sum())
    points: Any = vectors.numpy()
    truth: Any = torch.tensor([0] * sizes[0] + [1] * sizes[1]).numpy()
    return Separation(
        silhouette=float(silhouette_score(points, truth, metric="cosine")),
        cosine_of_means=max(-1.0, min(1.0, cosine)),
        distance_of_means=float((means[0] - means[1]).norm()),
        probe_accuracy=_probe_accuracy(points, truth, folds=min(FOLDS, *sizes), seed=seed),
        probe_chance=max(sizes) / sum(sizes),
        n=min(sizes),
    )


@taken
def scatter(axis: "Axes", projection: Projection, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the groups of a projection in the order of ``styles``, arguments of ``Axes.scatter``."""
    for label, style in styles.items():
        points: Any = projection.of(label).numpy()
        settings: dict[str, Any] = {"s": 26, "linewidths": 0.7, "alpha": 0.8, "label": label}
        axis.scatter(points[:, 0], points[:, 1], **(settings | dict(style)))
    # The axes of t-SNE have no unit, so numbers on them would only be read as one.
    axis.set_xticks([])
    axis.set_yticks([])


@taken
def save_points(path: Path, panels: Mapping[str, Projection]) -> None:
    """Write a CSV file with one line per point: panel, group, index within the group, x, y."""
    import pandas as pd

    rows = [
        {"panel": panel, "group": label, "index": index, "x": x, "y": y}
        for panel, projection in panels.items()
        for label in dict.fromkeys(projection.labels)
        for index, (x, y) in enumerate(projection.of(label).tolist())
    ]
    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)


def _probe_accuracy(
    points: "NDArray[Any]", truth: "NDArray[Any]", *, folds: int, seed: int
) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    guesses: Any = cross_val_predict(probe, points, truth, cv=split)
    return float((guesses == truth).mean())


def _double(points: Float[Tensor, "_ d_mlp"]) -> Float[Tensor, "_ d_mlp"]:
    # In float64, since the squares of a massive activation leave float16 and strain float32.
    vectors = points.detach().double().cpu()
    if not bool(torch.isfinite(vectors).all()):
        raise NonFiniteError("a vector is NaN or infinite; load the model in float32")
    return vectors
