"""Text from outside, made safe to print: no character of it moves a cursor or ends a tag."""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

__all__ = ["as_html", "as_json", "finite", "printable"]

_UNPRINTABLE = re.compile(
    # Control characters but line end and tab, line separators, marks that reorder a line, and
    # halves of surrogate pairs, which no encoding of Unicode holds.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, *, lines: bool = True) -> str:
    """Text in which every character that a terminal obeys is written as Python escapes it.

    Line ends and tabs stay, unless ``lines`` is False.
    """
    shown = _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text)
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def as_html(text: str) -> str:
    """Text for the inside of HTML or SVG, also of an attribute."""
    return html.escape(printable(text))


def as_json(content: Any, *, encoding: str = "utf-8") -> str:
    """One line of JSON that reads back as the same content and is safe to print.

    What the encoding lacks is escaped.

    Raises:
        ValueError: If the content holds NaN or infinity.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    text = _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match.group())[1:-1], text)
    return text


def finite(value: Any) -> Any:
    """A value as JSON can say it: None in place of NaN and infinity, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in cast(Sequence[Any], value)]
    return value
