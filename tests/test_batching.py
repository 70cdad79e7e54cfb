"""The cheapest split, beside all splits there are."""

import itertools
import random

import pytest

from firsttok.engine.batching import cheapest_split


def naive_cost(sizes: list[int], most: int, batch_cost: int) -> int:
    """Least cost over every way to cut the list."""
    costs: list[int] = []
    for cuts in itertools.product([False, True], repeat=len(sizes) - 1):
        edges = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(sizes)]
        batches = [sizes[start:end] for start, end in itertools.pairwise(edges)]
        if all(len(batch) == 1 or len(batch) * max(batch) <= most for batch in batches):
            costs.append(sum(len(batch) * max(batch) + batch_cost for batch in batches))
    return min(costs)


@pytest.mark.parametrize("batch_cost", [0, 5, 40])
@pytest.mark.parametrize("most", [1, 30, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_no_split_costs_less(seed: int, most: int, batch_cost: int) -> None:
    draw = random.Random(seed)
    sizes = sorted(draw.randint(1, 20) for _ in range(9))

    def tokens(start: int, end: int) -> int:
        return (end - start) * sizes[end - 1]

    split = cheapest_split(
        len(sizes), tokens, lambda start, end: tokens(start, end) <= most, batch_cost=batch_cost
    )
    assert list(itertools.chain(*split)) == list(range(len(sizes)))
    assert all(len(batch) == 1 or tokens(batch.start, batch.stop) <= most for batch in split)
    found = sum(tokens(batch.start, batch.stop) + batch_cost for batch in split)
    assert found == naive_cost(sizes, most, batch_cost)


def test_nothing_needs_no_batch() -> None:
    assert cheapest_split(0, lambda _start, _end: 1, lambda _start, _end: True) == []
