"""Separation against naive references and known geometry, and t-SNE as one repeatable joint fit."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from firsttok.errors import BadInputError, NonFiniteError
from firsttok.probes import Projection, normalise, project, save_points, scatter, separation


def cloud(
    count: int,
    width: int = 6,
    *,
    seed: int,
    centre: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Points around a place on the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + centre


def along(axis: int, count: int = 20, *, seed: int = 0) -> torch.Tensor:
    """Points tightly around 10 on one axis."""
    points = 0.1 * cloud(count, seed=seed + axis)
    points[:, axis] += 10
    return points


def naive_silhouette(one: torch.Tensor, other: torch.Tensor) -> float:
    """The textbook's silhouette by cosine distance, point by point."""
    scores: list[float] = []
    for own, rest in ((one, other), (other, one)):
        for index, point in enumerate(own):
            near = 1 - torch.cosine_similarity(own.double(), point.double()[None])
            far = 1 - torch.cosine_similarity(rest.double(), point.double()[None])
            inside = float(torch.cat([near[:index], near[index + 1 :]]).mean())
            outside = float(far.mean())
            scores.append((outside - inside) / max(inside, outside))
    return sum(scores) / len(scores)


def test_far_groups_are_told_apart_fully() -> None:
    found = separation(along(0), along(1))
    assert found.silhouette > 0.99
    assert found.probe_accuracy == 1
    assert found.probe_chance == 0.5
    assert abs(found.cosine_of_means) < 0.05
    assert found.n == 20


def test_samples_of_one_cloud_are_told_apart_no_better_than_by_chance() -> None:
    accuracies = [
        separation(cloud(100, seed=2 * i), cloud(100, seed=2 * i + 1)).probe_accuracy
        for i in range(10)
    ]
    assert sum(accuracies) / 10 == pytest.approx(0.5, abs=0.05)
    found = separation(cloud(100, seed=0, centre=1.0), cloud(100, seed=1, centre=1.0))
    assert abs(found.silhouette) < 0.02
    assert found.cosine_of_means > 0.97


def test_the_probe_is_judged_on_points_it_was_not_fitted_on() -> None:
    # With more features than points a probe fits any labels; only a leak makes it right here.
    one, other = cloud(30, 400, seed=0), cloud(30, 400, seed=1)
    assert separation(one, other).probe_accuracy < 0.75


def test_the_probe_reads_small_features_beside_large_ones() -> None:
    one, other = 100 * cloud(40, seed=0), 100 * cloud(40, seed=1)
    one[:, 2], other[:, 2] = 1e-3, -1e-3
    assert separation(one, other).probe_accuracy > 0.95


def test_chance_is_the_share_of_the_larger_group() -> None:
    found = separation(cloud(30, seed=0), cloud(10, seed=1))
    assert (found.probe_chance, found.n) == (0.75, 10)
    assert separation(cloud(10, seed=1), cloud(30, seed=0)).probe_chance == 0.75


@pytest.mark.parametrize("centre", [0.3, 2.0])
def test_silhouette_and_means_equal_naive_ones(centre: float) -> None:
    one, other = cloud(17, seed=0, centre=centre), cloud(9, seed=1, centre=-0.5)
    found = separation(one, other)
    assert found.silhouette == pytest.approx(naive_silhouette(one, other), rel=1e-9)
    means = [points.double().mean(0) for points in (one, other)]
    expected = float(torch.cosine_similarity(*means, dim=0))
    assert found.cosine_of_means == pytest.approx(expected, rel=1e-9)
    assert found.distance_of_means == pytest.approx(float((means[0] - means[1]).norm()), rel=1e-9)


def test_silhouette_does_not_depend_on_norms() -> None:
    one, other = cloud(15, seed=0, centre=0.5), cloud(15, seed=1)
    stretched = one * torch.linspace(0.01, 1000, 15)[:, None]
    expected = separation(one, other).silhouette
    assert separation(stretched, other).silhouette == pytest.approx(expected, rel=1e-5)


def test_separation_is_repeatable_and_the_seed_only_deals_the_folds() -> None:
    one, other = cloud(30, seed=0), cloud(30, seed=1, centre=0.4)
    found = [separation(one, other, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len({row.probe_accuracy for row in found}) > 1
    assert len({(row.silhouette, row.cosine_of_means) for row in found}) == 1


def test_two_points_each_are_enough() -> None:
    found = separation(along(0, 2), along(1, 2))
    assert found.silhouette > 0.99
    assert found.probe_accuracy in (0, 0.25, 0.5, 0.75, 1)
    assert (found.probe_chance, found.n) == (0.5, 2)


def test_massive_values_in_half_precision_do_not_overflow() -> None:
    one, other = (6000 * along(axis).half() for axis in (0, 1))
    assert not bool(torch.isfinite(one.square()).all())
    assert separation(one, other).silhouette > 0.99
    norms = normalise(one).double().norm(dim=1)
    assert float((norms - 1).abs().max()) < 2e-3
    longest = normalise(torch.full((2, 6), 60000.0, dtype=torch.float16))
    assert float(longest.double().norm(dim=1).min()) > 0.99


def test_normalise_keeps_directions_and_gives_unit_norms() -> None:
    points = 1e25 * cloud(12, seed=3)
    found = normalise(points)
    assert found.dtype == points.dtype
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(torch.cosine_similarity(found, points / 1e25), torch.ones(12))


def test_one_fit_for_all_groups() -> None:
    points = cloud(40, seed=0)
    parted = project({"a": points[:10], "b": points[10:25], "c": points[25:]})
    whole = project({"all": points})
    assert torch.equal(parted.points, whole.points)
    assert parted.labels == ("a",) * 10 + ("b",) * 15 + ("c",) * 15
    assert torch.equal(parted.of("b"), whole.points[10:25])


def test_the_fit_is_repeatable_whatever_the_state_of_other_generators() -> None:
    import numpy as np

    # Wide enough for the principal components of the start to be found by random projections.
    groups = {"a": cloud(40, 600, seed=0), "b": cloud(40, 600, seed=1)}
    first = project(groups)
    np.random.rand(3)
    torch.rand(3)
    assert torch.equal(project(groups).points, first.points)


def test_far_groups_lie_apart_in_the_plane() -> None:
    found = project({"a": along(0), "b": along(1)})
    assert bool(torch.isfinite(found.points).all())
    centres = [found.of(label).mean(0) for label in "ab"]
    radius = max(
        float((found.of(label) - centre).norm(dim=1).max())
        for label, centre in zip("ab", centres, strict=True)
    )
    assert float((centres[0] - centres[1]).norm()) > radius


@pytest.mark.parametrize(("count", "perplexity"), [(4, 1.0), (40, 13.0), (91, 30.0), (150, 30.0)])
def test_perplexity_follows_the_number_of_points(count: int, perplexity: float) -> None:
    assert project({"a": cloud(count, seed=0)}).perplexity == perplexity


def test_scatter_draws_every_group_in_its_style() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    found = Projection(
        points=torch.arange(8.0).reshape(4, 2), labels=("a", "b", "a", "b"), perplexity=1.0
    )
    scatter(axis, found, {"b": {"color": "red"}, "a": {"marker": "^"}})
    drawn = {str(group.get_label()): group.get_offsets() for group in axis.collections}
    assert list(drawn) == ["b", "a"]
    assert torch.equal(torch.tensor(drawn["a"]).double(), torch.tensor([[0.0, 1], [4, 5]]).double())
    assert len(axis.get_xticks()) == 0


def test_saved_points_name_panel_group_and_place(tmp_path: Path) -> None:
    found = project({"one": cloud(3, seed=0), "other, far": cloud(2, seed=1)})
    save_points(tmp_path / "points.csv", {"a": found, "b": found})
    with (tmp_path / "points.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10
    assert (lines[9]["panel"], lines[9]["group"], lines[9]["index"]) == ("b", "other, far", "1")
    saved = torch.tensor([[float(line["x"]), float(line["y"])] for line in lines[5:]])
    torch.testing.assert_close(saved, found.points.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: separation(cloud(1, seed=0), cloud(5, seed=1)), "1 and 5 vectors"),
        (lambda: separation(cloud(5, seed=0), cloud(0, seed=1)), "5 and 0 vectors"),
        (lambda: separation(torch.tensor([[1.0], [-1]]), cloud(5, 1, seed=1)), "norm 0"),
        (lambda: normalise(torch.zeros(2, 3)), "norm 0"),
        (lambda: project({"a": cloud(2, seed=0), "b": cloud(1, seed=1)}), "t-SNE of 3 points"),
        (lambda: project({"a": torch.ones(5, 4), "b": torch.ones(2, 4)}), "all vectors are equal"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        call()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite_are_refused(bad: float) -> None:
    broken = cloud(5, seed=0)
    broken[3, 2] = bad
    with pytest.raises(NonFiniteError, match="float32"):
        separation(cloud(5, seed=1), broken)
    with pytest.raises(NonFiniteError, match="float32"):
        project({"a": cloud(5, seed=1), "b": broken})
