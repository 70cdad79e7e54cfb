"""How a target is joined to the prompt before it, told from the two texts."""

import unicodedata
from typing import Literal, get_args

__all__ = ["JOINS", "STRADDLES", "Join", "Straddle", "text_joint"]

Join = Literal["auto", "space", "none"]
"""One space always, nothing at all, or what :func:`text_joint` finds."""
JOINS: tuple[Join, ...] = get_args(Join)
Straddle = Literal["refuse", "token"]
"""What is done where a token holds the subject's end and a mark after it."""
STRADDLES: tuple[Straddle, ...] = get_args(Straddle)

_CLOSES = {
    "\u201c": "\u201e",
    "\u2018": "\u201a",
    "\u00ab": "\u00bb",
    "\u2039": "\u203a",
    "\u201d": "\u201c",
    "\u2019": "\u2018",
    "\u00bb": "\u00ab",
    "\u203a": "\u2039",
}
"""Quotes that open in one language and close in another, with the one that they close there."""
_BEFORE_OPENING = "=:-\u2013\u2014"
"""Equals sign, colon and dashes; a quote after one opens."""
_SPACELESS = (
    "BOPOMOFO",
    "CJK ",
    "FULLWIDTH ",
    "HALFWIDTH KATAKANA",
    "HIRAGANA",
    "IDEOGRAPHIC",
    "KATAKANA",
    "KHMER",
    "LAO",
    "MYANMAR",
    "THAI",
    "TIBETAN",
)
"""How Unicode's names of letters begin in scripts that put no space between words."""


def text_joint(prompt: str, target: str, join: Join = "auto") -> str:
    """Return what is written between a prompt and its target: one space, or nothing.

    The released code puts one space always (note 11). ``auto`` does so, too, except

    - after white space: a line end, a tab;
    - after an opening quote or bracket, and after a full-width mark, which holds its own space;
    - between two letters of scripts that are written without spaces.

    A straight quote opens where white space, another opening mark, ``=``, ``:``, a dash or nothing
    stands before it.
    """
    if join != "auto":
        return " " if join == "space" else ""
    separated = not prompt or prompt[-1].isspace() or _opens(prompt) or _is_wide_mark(prompt[-1])
    return "" if separated or _in_one_word_flow(prompt, target) else " "


def _opens(text: str) -> bool:
    """Whether the last character opens a quotation or a bracket."""
    mark, before = text[-1:], text[:-1]
    kind = unicodedata.category(mark) if mark else ""
    if kind == "Ps" or (mark and mark in "¿¡"):
        return True
    if kind not in ("Pi", "Pf") and (not mark or mark not in "\"'`"):
        return False
    partner = _CLOSES.get(mark)
    if partner is not None and before.count(partner) > before.count(mark):
        return False
    if kind == "Pi" or not before or before[-1].isspace() or before[-1] in _BEFORE_OPENING:
        return True
    if _is_spaceless(before[-1]):
        # No space tells the two apart there, so the quotes are counted.
        return before.count(mark) % 2 == 0
    return _opens(before)


def _is_wide_mark(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in ("F", "W")
    return wide and unicodedata.category(character).startswith("P")


def _in_one_word_flow(prompt: str, target: str) -> bool:
    """Whether no space is written between the last letter of the prompt and the target's first."""
    last = next((c for c in reversed(prompt) if c.isalpha()), "")
    first = next((c for c in target if c.isalpha()), "")
    if not first:
        # A number takes the custom of the text before it.
        return _is_spaceless(prompt[-1:])
    return _is_spaceless(last) and _is_spaceless(first)


def _is_spaceless(character: str) -> bool:
    return bool(character) and unicodedata.name(character, "").startswith(_SPACELESS)
