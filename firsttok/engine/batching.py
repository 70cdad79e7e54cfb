"""Which of many rows share a batch: padding costs time, and so does every batch."""

from collections.abc import Callable

__all__ = ["BATCH_COST", "cheapest_split"]

BATCH_COST = {"cpu": 140, "cuda": 4096}
"""What one more batch costs, in tokens: small matrices are slow to multiply.

Rough: on two CPU cores from the time of a step of the value optimisation with one to twelve facts
in a batch, on a GPU a guess. It changes which rows share a batch, and no number.
"""


def cheapest_split(
    count: int,
    tokens: Callable[[int, int], int],
    fits: Callable[[int, int], bool],
    *,
    batch_cost: int = BATCH_COST["cpu"],
) -> list[range]:
    """Cut a sorted list into batches so that padded tokens and batches cost least together.

    Args:
        count: Items of the list.
        tokens: Padded tokens of the batch of items ``start`` to ``end - 1``.
        fits: Whether that batch may be run; where one does not fit, no longer one is tried. A
            single item is never refused.
        batch_cost: What one more batch costs, in tokens.

    Returns:
        The batches, which cover ``range(count)`` in order.
    """
    # The least cost of the first so many items, and where the last batch of that split starts.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, count + 1):
        found: list[tuple[int, int]] = []
        for start in reversed(range(end)):
            if found and not fits(start, end):
                break
            found.append((best[start][0] + tokens(start, end) + batch_cost, start))
        best.append(min(found))
    split: list[range] = []
    end = count
    while end:
        start = best[end][1]
        split.append(range(start, end))
        end = start
    return split[::-1]
