"""Arguments of public functions: what is easily mistaken is taken as it was meant, or refused.

:func:`taken` and :func:`take_fields` go by annotations, so that no function has checks of its own.
"""

import functools
import inspect
import operator
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

from firsttok.errors import BadInputError

__all__ = [
    "LARGEST",
    "SEEDS",
    "check_text",
    "converters",
    "seed_number",
    "take_fields",
    "taken",
    "whole_number",
]

LARGEST = 3.4e38
"""Numbers that enter the arithmetic of weights are no larger: float32 holds no larger ones."""
SEEDS = 2**32
"""Seeds are below this: every library that draws anything takes them, scikit-learn no others."""
_Function = TypeVar("_Function", bound=Callable[..., Any])
_Converter = Callable[[Any], Any]
_NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}
_MANY = (Collection, Iterable, Sequence, list, tuple)


def taken(function: _Function) -> _Function:
    """Let a function see its arguments as its annotations say, or refuse them in one sentence.

    One thing stands for a sequence of one, and a text is never taken letter by letter. Whole
    numbers may be NumPy's or PyTorch's, paths may be texts, members of an enumeration their values.
    A seed is a whole number from 0 to 4 294 967 295.

    Raises:
        BadInputError: When called with something else.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            # Python says what is wrong with the call, with the function's name.
            return function(*args, **kwargs)
        known = converters(function)
        for name, given in bound.arguments.items():
            if name in known:
                bound.arguments[name] = known[name](given)
        return function(*bound.args, **bound.kwargs)

    return cast(_Function, called)


def take_fields(thing: Any) -> None:
    """As :func:`taken`, for the fields of a frozen dataclass, in its ``__post_init__``.

    Raises:
        BadInputError: If a field is not what its annotation says.
    """
    for name, convert in converters(type(thing)).items():
        given = getattr(thing, name)
        converted = convert(given)
        if converted is not given:
            object.__setattr__(thing, name, converted)


@functools.cache
def converters(of: Callable[..., Any]) -> Mapping[str, _Converter]:
    """What becomes of each argument of a function, or field of a dataclass; others are left alone.

    An annotation of a function in quotation marks is none: it is imported for type checkers only.
    """
    if isinstance(of, type):
        hints = get_type_hints(of)
        hints = {field.name: hints[field.name] for field in fields(of)}
    else:
        hints = {
            p.name: tuple[p.annotation, ...] if p.kind is p.VAR_POSITIONAL else p.annotation
            for p in inspect.signature(inspect.unwrap(of)).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        }
    found = {name: _converter(hint, name) for name, hint in hints.items()}
    if "seed" in found and not isinstance(of, type):
        found["seed"] = seed_number
    return {name: convert for name, convert in found.items() if convert is not None}


def whole_number(
    given: Any, what: str, *, least: int | None = None, most: int | None = None
) -> int:
    """A whole number, also one of NumPy or PyTorch; True and 1.0 are none.

    Raises:
        BadInputError: If it is something else, or less than ``least`` or more than ``most``.
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
    """A seed: a whole number from 0 to 4 294 967 295; what is none is a BadInputError."""
    return whole_number(given, what, least=0, most=SEEDS - 1)


def check_text(text: str, what: str) -> None:
    """Refuse a text that no tokenizer and no file takes.

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


def _converter(hint: Any, what: str) -> _Converter | None:
    """What makes a value fit an annotation; None for an annotation that says nothing to check."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(inside, what)
    if origin in _MANY:
        return _many_of(origin, inside, what)
    if hint is int:
        return functools.partial(whole_number, what=what)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return functools.partial(_member, kind=hint, what=what)
    own = getattr(hint, "__module__", "").startswith("firsttok.") and isinstance(hint, type)
    checkable = not getattr(hint, "_is_protocol", False) or hasattr(hint, "_is_runtime_protocol")
    checkable = checkable and not is_typeddict(hint)
    if hint in (bool, float, str, Path) or (own and checkable):
        return functools.partial(_instance, kind=hint, what=what)
    return None


def _one_of(inside: Sequence[Any], what: str) -> _Converter | None:
    options = [hint for hint in inside if hint is not types.NoneType]
    known = [_converter(hint, what) for hint in options]
    if None in known:
        return None

    def convert(given: Any) -> Any:
        if given is None and types.NoneType in inside:
            return None
        refused: list[BadInputError] = []
        for each in cast(list[_Converter], known):
            try:
                return each(given)
            except BadInputError as error:  # noqa: PERF203 - the next one may take it
                refused.append(error)
        if isinstance(given, str) and str in options:
            raise refused[options.index(str)]
        if len(refused) == 1 or (isinstance(given, Iterable) and get_origin(options[-1]) in _MANY):
            raise refused[-1]
        names = " or ".join(map(_name, options))
        raise BadInputError(f"{what} is {_shown(given)}; give {names}")

    return convert


def _many_of(origin: Any, inside: Sequence[Any], what: str) -> _Converter | None:
    if origin is tuple and (len(inside) != 2 or inside[1] is not Ellipsis):
        return None
    kind: Any = inside[0]
    each, alone = _converter(kind, f"one of {what}"), _converter(kind, what)
    if each is None or alone is None or get_origin(kind) in _MANY:
        return None
    own = get_args(kind) or (kind,)

    def convert(given: Any) -> Any:
        one = isinstance(given, (str, bytes, *own))
        if one or not isinstance(given, Iterable):
            return origin((alone(given),)) if origin in (list, tuple) else (alone(given),)
        known = isinstance(given, list | tuple | range) or hasattr(given, "__array__")
        if origin is Iterable and not known:
            # It may be a stream that is read once, or larger than the memory.
            return cast(Iterable[Any], given)
        found = (each(part) for part in cast(Iterable[Any], given))
        return list(found) if origin is list else tuple(found)

    return convert


def _member(given: Any, kind: type[Enum], what: str) -> Enum:
    try:
        return kind(given)
    except ValueError:
        choices = ", ".join(str(member.value) for member in kind)
        raise BadInputError(f"{what} is {_shown(given)}; choose from {choices}") from None


def _instance(given: Any, kind: type[Any], what: str) -> Any:
    """A truth value, number, text, path, or object of firsttok."""
    if not _fits(given, kind):
        raise BadInputError(f"{what} is {_shown(given)}; give {_name(kind)}")
    if kind is str:
        check_text(given, what)
    return kind(given) if kind in (bool, float, Path) else given


def _fits(given: Any, kind: type[Any]) -> bool:
    if kind is bool:
        # NumPy's is no bool to Python.
        return isinstance(given, bool) or str(getattr(given, "dtype", "")) == "bool"
    if kind is float:
        return hasattr(given, "__float__") and not isinstance(given, bool)
    return isinstance(given, str | PathLike if kind is Path else kind)


def _name(hint: Any) -> str:
    if get_origin(hint) in _MANY:
        return "several"
    name: str = getattr(hint, "__name__", str(hint))
    return _NAMES.get(hint) or f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _shown(given: Any) -> str:
    """Enough of a thing to know it again."""
    if given is not None and not isinstance(given, str | bytes | int | float | list | tuple):
        return _name(type(given))
    try:
        text = ascii(given)
    except ValueError:
        # A whole number of more than 4300 digits.
        return "a number of very many digits"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]}... (a {type(given).__name__})"
