"""Compare two folders of results, number by number: the largest difference of each table.

``python benchmarks/compare_figures.py OLD NEW``; exit code 1 if a number is off by more than 1e-4
relative, or a perplexity above the collapse threshold by more than 1 %.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from firsttok.console import print_table
from firsttok.evaluation import COLLAPSE_THRESHOLD

__all__ = ["main"]

_CLOSE, _OF_DESTROYED = 1e-4, 1e-2


def main(old: str, new: str) -> int:
    """Print a line per table; returns 1 if one is off, or is in one folder only."""
    lines: list[list[Any]] = []
    names = sorted({path.name for folder in (old, new) for path in Path(folder).glob("*.json")})
    for name in names:
        both = [Path(folder) / name for folder in (old, new)]
        if not all(path.exists() for path in both):
            lines.append([name, None, None, "in one folder only", None, False])
            continue
        one, two = (json.loads(path.read_text(encoding="utf-8")) for path in both)
        found = list(_differences(one.get("rows", []), two.get("rows", []), "rows"))
        found += _differences(one.get("lines", []), two.get("lines", []), "lines")
        numbers = [each for each in found if math.isfinite(each[0])]
        others = len(found) - len(numbers)
        worst = max(numbers, key=lambda each: each[0] / each[1], default=(0.0, 1.0, ""))
        close = worst[0] <= worst[1] and not others
        lines.append([name, len(numbers), worst[0], worst[2], others, close])
    columns = ["table", "numbers", "largest difference", "where", "no numbers, differ", "close"]
    print_table(f"{old} and {new}", columns, lines)
    return int(not all(line[-1] for line in lines))


def _differences(one: Any, two: Any, place: str) -> Iterator[tuple[float, float, str]]:
    """Relative differences of all numbers, each with what is allowed and where it is.

    A field in one of two rows, and values that are no numbers and differ, count as infinite.
    """
    if isinstance(one, dict) and isinstance(two, dict):
        for key in one.keys() | two.keys():
            where = f"{place}.{key}"
            if key in one and key in two:
                yield from _differences(one[key], two[key], where)
            else:
                yield math.inf, _CLOSE, f"{where}: in one only"
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from _differences(a, b, f"{place}[{index}]")
    elif _is_number(one) and _is_number(two):
        largest = max(abs(one), abs(two))
        allowed = _OF_DESTROYED if largest > COLLAPSE_THRESHOLD else _CLOSE
        yield (abs(one - two) / largest if largest else 0.0), allowed, place
    elif one != two:
        yield math.inf, _CLOSE, f"{place}: {str(one)[:20]!r} and {str(two)[:20]!r}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
