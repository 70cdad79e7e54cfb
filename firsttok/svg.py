"""Small line plots as SVG for notebooks, and as sparklines for a terminal; no library is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from firsttok.display import cell_text
from firsttok.escapes import as_html

__all__ = ["Plot", "sparkline"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which those see apart, too, who do not see red and green apart."""
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT = 460, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 26, 40


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A line for each series; what is no finite number is left out of its line."""

    title: str
    """What it shows; also read out."""
    series: Mapping[str, Sequence[float]]
    """Values by the name of their line."""
    x_label: str
    """What runs to the right."""
    y_label: str
    """What runs upwards."""
    x: Sequence[int | float] | None = None
    """Where the values stand; None for 0, 1, 2 and so on."""
    log: bool = False
    """Whether the scale is logarithmic, from which 0 and less are missing."""

    @property
    def text(self) -> str:
        """A sparkline for each line, with its least and its largest value."""
        width = max((len(name) for name in self.series), default=0)
        rows = [f"{self.title} ({self.x_label} to the right{', log scale' if self.log else ''})"]
        for name, values in self.series.items():
            known = [value for value in values if math.isfinite(value)]
            ends = f"  {cell_text(min(known))} to {cell_text(max(known))}" if known else ""
            rows.append(f"  {name.ljust(width)}  {sparkline(values, log=self.log)}{ends}")
        return "\n".join(rows)

    @property
    def html(self) -> str:
        """The plot as SVG."""
        title = as_html(self.title)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT + 14 * len(self.series)}" width="{_WIDTH}" '
            'font-family="sans-serif" font-size="11" fill="currentColor" stroke="none">'
            f'<title>{title}</title><text x="{_LEFT}" y="14">{title}</text>'
        )
        longest = max((len(each) for each in self.series.values()), default=0)
        places = [float(place) for place in (range(longest) if self.x is None else self.x)]
        lines = {name: _points(places, each, self.log) for name, each in self.series.items()}
        found = [point for points in lines.values() for point in points]
        if not found:
            return f'{head}<text x="{_LEFT}" y="40">nothing finite to draw</text></svg>'
        left, right = _limits([point[0] for point in found])
        low, high = _limits([point[1] for point in found])

        def across(value: float) -> float:
            return _LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

        def up(value: float) -> float:
            return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

        heights = _ticks(low, high, whole=self.log)
        if len(heights) < 2:
            # Less than a decade of a logarithmic scale: its ends.
            heights = [low, high]
        body = [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}" '
            'stroke="currentColor" stroke-opacity="0.2"/>'
            f'<text x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">'
            f"{_number(10**tick if self.log else tick)}</text>"
            for tick in heights
        ]
        body += [
            f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
            f"{_number(tick)}</text>"
            for tick in _ticks(left, right, whole=all(place.is_integer() for place in places))
        ]
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        body.append(
            f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
            f"{as_html(self.x_label)}</text>"
            f'<text x="12" y="{middle}" text-anchor="middle" '
            f'transform="rotate(-90 12 {middle})">{as_html(self.y_label)}</text>'
        )
        for index, (name, points) in enumerate(lines.items()):
            stroke = (
                f'stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="1.8" '
                f'stroke-dasharray="{_DASHES[index % len(_DASHES)]}"'
            )
            path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in points)
            height = _HEIGHT + 14 * index + 4
            body.append(
                f'<polyline points="{path}" fill="none" {stroke}/>'
                f'<line x1="{_LEFT}" x2="{_LEFT + 26}" y1="{height}" y2="{height}" {stroke}/>'
                f'<text x="{_LEFT + 32}" y="{height + 4}">{as_html(name)}</text>'
            )
        return f"{head}{''.join(body)}</svg>"


def sparkline(values: Sequence[float], *, log: bool = False) -> str:
    """The values as a row of blocks, from the least to the largest; ``·`` where there is none."""
    known = dict(_points(range(len(values)), values, log))
    if not known:
        return "·" * len(values)
    low, high = min(known.values()), max(known.values())
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BLOCKS[round((known[i] - low) * scale)] if i in known else "·" for i in range(len(values))
    )


def _points(
    places: Sequence[int | float], values: Sequence[float], log: bool
) -> list[tuple[float, float]]:
    return [
        (float(place), math.log10(value) if log else float(value))
        for place, value in zip(places, values, strict=True)
        if math.isfinite(value) and (value > 0 or not log)
    ]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    # A level line runs through the middle.
    margin = 0.0 if high > low else 0.5 * abs(low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    """About five round numbers between two limits."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (step * factor) <= 5)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}"
