"""What a result was made with."""

import dis
import functools
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

from firsttok.digests import tensors_hash

__all__ = ["described", "versions"]

_PACKAGES = ("firsttok", "torch", "transformers", "transformer-lens", "numpy")
_DEEPEST = 16
_LIBRARIES = ("torch", "transformers", "transformer_lens", "builtins", "functools", "_io")
"""Packages whose objects hold more than their fields say."""
_WRAPPED = ("__func__", "fget", "func")
"""Where a method, a property and a cached property have their function."""
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
"""Members of a class that only say where an object keeps a field."""


def versions() -> dict[str, str]:
    """Return the versions of Python, firsttok and the libraries that decide numbers."""
    found = {package: metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **found}


def described(value: Any) -> Any:
    """Everything that decides what an object does, as JSON: its fields, and the code of its class.

    Two objects that are described alike do the same, so results may be kept under the description.
    A user's function counts with the globals it reads; functions and classes of other modules count
    by their names.

    Raises:
        TypeError: If it holds what cannot be described: an open file, an object of a library.
    """
    return _described(value, ())


def _described(value: Any, above: tuple[Any, ...]) -> Any:  # noqa: PLR0911
    if len(above) > _DEEPEST:
        raise TypeError(f"{type(value).__name__} is nested too deeply to be described")

    def inner(part: Any) -> Any:
        return _described(part, (*above, value))

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
        return _function(value, above)
    if isinstance(value, type) or inspect.isroutine(value):
        return [getattr(value, "__module__", None), value.__qualname__]
    return [_class(type(value), above), _state(value, above)]


def _state(value: Any, above: tuple[Any, ...]) -> Any:
    derived = {
        name
        for owner in type(value).__mro__
        for name, part in vars(owner).items()
        if isinstance(part, functools.cached_property)
    }
    held = {
        name: part for name, part in getattr(value, "__dict__", {}).items() if name not in derived
    }
    if is_dataclass(value):
        held |= {field.name: getattr(value, field.name) for field in fields(value)}
    elif not hasattr(value, "__dict__"):
        raise TypeError(f"a {type(value).__name__} cannot be described by its fields")
    return {name: _described(part, (*above, value)) for name, part in sorted(held.items())}


def _class(kind: type, above: tuple[Any, ...]) -> Any:
    """A class by its name and, if it is a user's, by its members."""
    name = [kind.__module__, kind.__qualname__]
    if _package(kind) == "firsttok" or any(kind is each for each in above):
        return name
    if _package(kind) in _LIBRARIES:
        raise TypeError(f"a {kind.__name__} cannot be described")
    held: dict[str, Any] = {}
    for owner in reversed(kind.__mro__[:-1]):
        if owner.__module__ not in ("typing", "abc", "enum"):
            for key, part in vars(owner).items():
                plain = next((getattr(part, n) for n in _WRAPPED if hasattr(part, n)), part)
                told = key == "__call__" or not (key.startswith("__") or key == "_abc_impl")
                if told and not isinstance(plain, _SLOTS):
                    held[key] = _described(plain, (*above, kind))
    return [*name, held]


def _function(function: Any, above: tuple[Any, ...]) -> Any:
    plain = getattr(function, "__func__", function)
    if any(plain is each for each in above):
        return [plain.__module__, plain.__qualname__]
    bound = getattr(function, "__self__", None)
    held = [cell.cell_contents for cell in plain.__closure__ or ()]
    parts = [plain.__defaults__, plain.__kwdefaults__, held, bound]
    read: dict[str, Any] = {}
    if _package(plain) != "firsttok":
        known = plain.__globals__
        for name in sorted(_names(plain.__code__) & known.keys()):
            part = known[name]
            elsewhere = getattr(part, "__module__", None) != plain.__module__
            if isinstance(part, types.ModuleType):
                continue
            if isinstance(part, type | types.FunctionType) and elsewhere:
                read[name] = [part.__module__, part.__qualname__]
            elif isinstance(part, type):
                read[name] = _class(part, (*above, plain))
            else:
                read[name] = _described(part, (*above, plain))
    return [_code(plain.__code__), [_described(part, (*above, plain)) for part in parts], read]


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


def _names(code: types.CodeType) -> set[str]:
    """Global names that code and the functions inside it read, without names of attributes."""
    inside = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    read = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return read.union(*map(_names, inside))


def _code(code: types.CodeType) -> str:
    constants = [
        _code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts
    ]
    text = repr((code.co_code, constants, code.co_names, code.co_varnames))
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor(value: Any) -> Any:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return tensors_hash({"": value.detach().cpu().contiguous()})
    array = np.asarray(value)
    if array.dtype == object:
        raise TypeError("an array of objects cannot be described")
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return [str(array.dtype), list(array.shape), digest]
