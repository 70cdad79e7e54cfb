"""What a result was made with."""

import hashlib
import inspect
import platform
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import metadata
from pathlib import PurePath
from typing import Any, cast

__all__ = ["described", "versions"]

_PACKAGES = ("firsttok", "torch", "transformers", "transformer-lens", "numpy")
_DEEPEST = 16
_LIBRARIES = ("torch", "transformers", "transformer_lens", "builtins", "functools")
"""Packages whose objects hold more than their fields say."""
_WRAPPED = ("__func__", "fget", "func")
"""Where a method, a property and a cached property have their function."""


_DECIDING = (types.FunctionType, bool, int, float, str, tuple, list, dict)
"""Members of a class that decide what it does."""


def versions() -> dict[str, str]:
    """Return the versions of Python, firsttok and the libraries that decide numbers."""
    found = {package: metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **found}


def described(value: Any) -> Any:
    """Everything that decides what an object does, as JSON: its fields, and the code of its class.

    Two objects that are described alike do the same, so results may be kept under the description.
    What a function calls by name is not followed into other modules.

    Args:
        value: An intervention, a key source, or a part of one.

    Raises:
        TypeError: If it holds what cannot be described: an open file, an object of a library.
    """
    return _described(value, 0)


def _described(value: Any, depth: int) -> Any:  # noqa: PLR0911
    if depth > _DEEPEST:
        raise TypeError(f"{type(value).__name__} is nested too deeply to be described")

    def inner(part: Any) -> Any:
        return _described(part, depth + 1)

    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, Enum) else value
    is_torch = type(value).__module__ == "torch" and not hasattr(value, "numpy")
    if isinstance(value, float | complex | bytes | PurePath | Enum) or is_torch:
        return [type(value).__qualname__, repr(value)]
    if hasattr(value, "numpy") or type(value).__module__ == "numpy":
        return _tensor(value)
    if isinstance(value, Mapping):
        pairs = cast(Mapping[Any, Any], value).items()
        return ["mapping", sorted(([inner(k), inner(v)] for k, v in pairs), key=repr)]
    if isinstance(value, set | frozenset):
        return ["set", sorted((inner(part) for part in cast(set[Any], value)), key=repr)]
    if isinstance(value, list | tuple):
        return [inner(part) for part in cast(Sequence[Any], value)]
    if isinstance(value, types.FunctionType | types.MethodType):
        return _function(value, depth)
    if isinstance(value, type) or inspect.isroutine(value):
        return [value.__module__, value.__qualname__]
    return [_class(type(value), depth), _state(value, depth)]


def _state(value: Any, depth: int) -> Any:
    if is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "__dict__"):
        held = vars(value)
    else:
        raise TypeError(f"a {type(value).__name__} cannot be described by its fields")
    return {name: _described(part, depth + 1) for name, part in sorted(held.items())}


def _class(kind: type, depth: int) -> Any:
    """A class by its name and, if it is a user's, by the code of its functions."""
    name = [kind.__module__, kind.__qualname__]
    if kind.__module__.partition(".")[0] == "firsttok":
        return name
    if kind.__module__.partition(".")[0] in _LIBRARIES:
        raise TypeError(f"a {kind.__name__} cannot be described")
    held: dict[str, Any] = {}
    for owner in reversed(kind.__mro__[:-1]):
        if owner.__module__ not in ("typing", "abc", "enum"):
            for key, part in vars(owner).items():
                plain = next((getattr(part, n) for n in _WRAPPED if hasattr(part, n)), part)
                decides = isinstance(plain, _DECIDING)
                if decides and (not key.startswith("__") or key == "__call__"):
                    held[key] = _described(plain, depth + 1)
    return [*name, held]


def _function(function: Any, depth: int) -> Any:
    plain = getattr(function, "__func__", function)
    bound = getattr(function, "__self__", None)
    held = [cell.cell_contents for cell in plain.__closure__ or ()]
    parts = [plain.__defaults__, plain.__kwdefaults__, held, bound]
    return [_code(plain.__code__), [_described(part, depth + 1) for part in parts]]


def _code(code: types.CodeType) -> str:
    constants = [
        _code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts
    ]
    text = repr((code.co_code, constants, code.co_names, code.co_varnames))
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor(value: Any) -> Any:
    import numpy as np

    array = np.asarray(value.detach().cpu().double() if hasattr(value, "detach") else value)
    if array.dtype == object:
        raise TypeError("an array of objects cannot be described")
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [str(value.dtype), list(array.shape), digest]
