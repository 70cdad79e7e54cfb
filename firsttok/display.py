"""How objects show themselves: one description, as HTML in a notebook and as text in a terminal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from firsttok.escapes import as_html, printable

__all__ = ["Note", "Panel", "Part", "Shown", "Strip", "Table", "cell_text", "short_hash"]

_MONO = "font-family:ui-monospace,monospace"
_LINE = "1px solid currentColor"
_LEFT = ' style="text-align:left"'
_NUMBER = re.compile(r"[-+<>]?\s?[\d.]|[-+]?(inf|nan)\b|-?$")
"""How a cell begins that holds a number, perhaps with a unit or an interval, or nothing."""


@runtime_checkable
class Part(Protocol):
    """A piece of a panel."""

    @property
    def text(self) -> str:
        """Plain text, without a final newline."""
        ...

    @property
    def html(self) -> str:
        """HTML, with everything that came from outside escaped."""
        ...


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence."""

    text: str

    @property
    def html(self) -> str:
        """A paragraph."""
        return f"<p>{as_html(self.text)}</p>"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; its first column names the lines, and columns of numbers are flush right."""

    columns: Sequence[str]
    lines: Sequence[Sequence[Any]]
    """The lines; a cell is a text, a number, a truth value or None."""

    @property
    def text(self) -> str:
        """Aligned columns."""
        rows = [
            [printable(cell_text(cell), lines=False) for cell in line]
            for line in (self.columns, *self.lines)
        ]
        widths = [max(len(row[index]) for row in rows) for index in range(len(self.columns))]
        flush = self.left
        return "\n".join(
            "  ".join(
                cell.ljust(width) if left else cell.rjust(width)
                for cell, width, left in zip(row, widths, flush, strict=True)
            ).rstrip()
            for row in rows
        )

    @property
    def html(self) -> str:
        """A table whose first cells are headings of their rows."""
        styles = [_LEFT if left else "" for left in self.left]
        head = "".join(
            f'<th scope="col"{style}>{as_html(name)}</th>'
            for name, style in zip(self.columns, styles, strict=True)
        )
        body = ""
        for line in self.lines:
            first, *rest = (as_html(cell_text(cell)) for cell in line)
            cells = (
                f"<td{style}>{cell}</td>" for cell, style in zip(rest, styles[1:], strict=True)
            )
            body += f'<tr><th scope="row"{_LEFT}>{first}</th>{"".join(cells)}</tr>'
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    @property
    def left(self) -> list[bool]:
        """Which columns are flush left: the first, and those in which a cell is prose."""
        return [
            index == 0 or not self.lines or any(_is_prose(line[index]) for line in self.lines)
            for index in range(len(self.columns))
        ]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Tokens side by side, one of them marked."""

    pieces: Sequence[str]
    marked: int | None
    mark: str
    """What the mark says."""

    @property
    def text(self) -> str:
        """Two lines: the tokens, and a caret under the marked one."""
        pieces = [printable(piece, lines=False) for piece in self.pieces]
        line = "|".join(pieces)
        if self.marked is None:
            return line
        indent = sum(len(piece) + 1 for piece in pieces[: self.marked])
        return f"{line}\n{' ' * indent}^ {printable(self.mark, lines=False)}"

    @property
    def html(self) -> str:
        """Boxes with their positions, the marked one drawn bold and named below."""
        boxes = "".join(self._box(index, piece) for index, piece in enumerate(self.pieces))
        note = "" if self.marked is None else f"<small>▲ {as_html(self.mark)}</small>"
        return f'<div style="line-height:2.4">{boxes}</div>{note}'

    def _box(self, index: int, piece: str) -> str:
        border = "3px solid #d55e00;font-weight:bold" if index == self.marked else _LINE
        tag = "mark" if index == self.marked else "span"
        plain = "background:none;color:inherit;" if tag == "mark" else ""
        return (
            f'<{tag} title="position {index}" style="{plain}{_MONO};white-space:pre;'
            f'border:{border};border-radius:3px;padding:2px 3px;margin:1px">'
            f"{as_html(printable(piece, lines=False))}<sub>{index}</sub></{tag}>"
        )


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What an object shows: a title, some parts, and where it came from."""

    title: str
    parts: Sequence[Part] = ()
    """The pieces, from top to bottom."""
    source: Mapping[str, Any] | None = None
    """Where it came from, by label; None values are left out."""

    @property
    def text(self) -> str:
        """Plain text for a terminal."""
        blocks = [self.title, *(part.text for part in self.parts)]
        if origin := self._origin():
            blocks.append(f"from: {origin}")
        return printable("\n".join(blocks))

    @property
    def html(self) -> str:
        """HTML for a notebook; it loads nothing."""
        origin = self._origin()
        foot = f"<p><small>from: {as_html(origin)}</small></p>" if origin else ""
        body = "".join(part.html for part in self.parts)
        title = f"<p><strong>{as_html(self.title)}</strong></p>"
        # A notebook would set what stands between two dollar signs as a formula.
        return f'<div class="firsttok tex2jax_ignore mathjax_ignore">{title}{body}{foot}</div>'

    def _origin(self) -> str:
        known = (self.source or {}).items()
        return "; ".join(f"{k} {cell_text(v)}".strip() for k, v in known if v not in (None, ""))


class Shown:
    """Base of what shows itself by its panel.

    A dataclass made with ``repr=False`` shows it in a terminal, too; the others keep their own.
    """

    def panel(self) -> Panel:
        """Describe the object."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.panel().text

    def _repr_html_(self) -> str:
        return self.panel().html


def _is_prose(cell: Any) -> bool:
    return isinstance(cell, str) and _NUMBER.match(cell) is None


def cell_text(cell: Any) -> str:
    """A cell as it is shown: two decimals, or three digits where the number is small or huge."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:,.2f}" if 0.1 <= abs(cell) < 1e6 else f"{cell:.3g}"
    return str(cell)


def short_hash(digest: object) -> str | None:
    """The first digits of a hash, enough to tell two apart at a glance."""
    return str(digest)[:10] if digest else None
