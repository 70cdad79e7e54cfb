"""Arguments of public functions: what is easily mistaken is taken as it was meant, or refused."""

import operator
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, cast

from firsttok.errors import BadInputError

__all__ = ["SEEDS", "check_text", "seed_number", "several", "single", "whole_number"]

SEEDS = 2**32
"""Seeds are below this: every library that draws anything takes them, scikit-learn no others."""
_Kind = TypeVar("_Kind")


def several(given: Any, kind: type[_Kind], what: str) -> tuple[_Kind, ...]:
    """Things of one kind as a tuple; one alone counts as a sequence of one.

    A text is itself a sequence of texts, so that one sentence in place of several would otherwise
    be taken letter by letter.

    Args:
        given: The things, in any iterable, or one of them.
        kind: Their type.
        what: What one of them is called, for the message.

    Raises:
        BadInputError: If it is something else, or holds something else.
    """
    if isinstance(given, kind):
        return (given,)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        _refuse(given, kind, what)
    found = tuple(cast(Iterable[Any], given))
    for each in found:
        single(each, kind, what)
    return found


def single(given: Any, kind: type[_Kind], what: str) -> _Kind:
    """One thing of a kind.

    Args:
        given: The thing.
        kind: Its type.
        what: What it is called, for the message.

    Raises:
        BadInputError: If it is something else.
    """
    if not isinstance(given, kind):
        _refuse(given, kind, what)
    return given


def whole_number(
    given: Any, what: str, *, least: int | None = None, most: int | None = None
) -> int:
    """A whole number, also one of NumPy or PyTorch; True and 1.0 are none.

    Args:
        given: The number.
        what: What it is called, for the message.
        least: The smallest that is taken; None without limit.
        most: The largest that is taken; None without limit.

    Raises:
        BadInputError: If it is something else, or outside the limits.
    """
    try:
        number = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = None
    if number is None:
        raise BadInputError(f"{what} is {_shown(given)}; give a whole number")
    if (least is not None and number < least) or (most is not None and number > most):
        bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise BadInputError(f"{what} is {_shown(number)}; give a whole number {bounds}")
    return number


def seed_number(given: Any, what: str = "seed") -> int:
    """A seed.

    Args:
        given: The number.
        what: What it is called, for the message.

    Raises:
        BadInputError: If it is no whole number from 0 to 4 294 967 295.
    """
    return whole_number(given, what, least=0, most=SEEDS - 1)


def check_text(text: str, what: str) -> None:
    """Refuse a text that no tokenizer and no file takes.

    Args:
        text: The text.
        what: What it is, for the message.

    Raises:
        BadInputError: If it holds half a surrogate pair, as a text that was not UTF-8 does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"{what} {_shown(text)} holds half a surrogate pair at character {error.start}, which "
            "is no text; write it again as UTF-8"
        ) from None


def _refuse(given: Any, kind: type[Any], what: str) -> NoReturn:
    name = {str: "a text", int: "a whole number"}.get(kind, f"a {kind.__name__}")
    raise BadInputError(f"{_shown(given)} is no {what}; give {name}, or a list of such")


def _shown(given: Any) -> str:
    """Enough of a thing to know it again."""
    try:
        text = ascii(given)
    except ValueError:
        # A whole number of more than 4300 digits.
        return "a number of very many digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({type(given).__name__})"
