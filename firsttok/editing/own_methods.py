"""Methods of one's own, given by their four slot values; nothing is executed.

``rome`` names a built-in method, ``NAME=direction:KEY,residual:KEY,denominator:KEY,anchor:KEY``
spells one out (a KEY is ``prefixed`` or ``bare``), and a TOML file holds any number, a table each.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from firsttok.arguments import taken
from firsttok.editing.edit import Editor, OpenEditor, SideBySideEditor
from firsttok.editing.fine_tuning import FINE_TUNING
from firsttok.editing.memit import SPREAD, MemitEditor
from firsttok.editing.mend import MEND, MEND_RELEASED
from firsttok.editing.methods import METHODS, SLOTS, Method, Slot, find_method
from firsttok.errors import BadInputError
from firsttok.models import Model
from firsttok.storage import read_toml

__all__ = [
    "EDITORS",
    "check_methods",
    "find_editors",
    "find_methods",
    "load_methods",
    "optimisations",
    "other_layers",
]

EDITORS: tuple[Editor, ...] = (*SPREAD, *FINE_TUNING, MEND, MEND_RELEASED)
"""Editors that go by a name besides the methods of the ROME family."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS = {
    "prefixed": Slot.PREFIXED_MEAN,
    "prefixed_mean": Slot.PREFIXED_MEAN,
    "bare": Slot.UNPREFIXED,
    "unprefixed": Slot.UNPREFIXED,
}
_FORM = "NAME=direction:KEY,residual:KEY,denominator:KEY,anchor:KEY"


def find_methods(given: Method | str | Iterable[Method | str]) -> tuple[Method, ...]:
    """Return the methods that are meant, in order, each once.

    Args:
        given: Methods, or what names one: a built-in name, a method spelled out, or a TOML file of
            methods. One alone counts as a sequence of one.

    Raises:
        BadInputError: If one is unknown or malformed, or two different ones go by one name.
    """
    return _methods((given,) if isinstance(given, Method | str) else given)


def _methods(given: Iterable[Method | str], others: Iterable[str] = ()) -> tuple[Method, ...]:
    found: list[Method] = []
    for text in given:
        if isinstance(text, Method):
            found.append(text)
        elif "=" in text:
            found.append(_spelled_out(text))
        elif text.endswith(".toml"):
            found += load_methods(text)
        else:
            found.append(find_method(text, others=others))
    methods = tuple(dict.fromkeys(found))
    check_methods(methods)
    return methods


def other_layers(model: Model, layer: int, methods: Iterable[Method | Editor]) -> tuple[int, ...]:
    """Return the layers besides the edited one whose second moment methods need.

    Raises:
        LayerOutOfRangeError: If the model lacks one of them.
    """
    opened = [each for each in methods if isinstance(each, OpenEditor)]
    layers = {other for each in opened for other in each.moments_of(model, layer)}
    return tuple(model.site(other).layer for other in sorted(layers - {layer}))


def optimisations(methods: Iterable[Method | Editor]) -> int:
    """Return how many optimisations a fact takes: methods that are anchored alike share one."""
    given = tuple(methods)
    shared = {(type(each), each.anchor) for each in given if isinstance(each, Method | MemitEditor)}
    return len(shared) + sum(
        isinstance(each, SideBySideEditor) and not isinstance(each, MemitEditor) for each in given
    )


def find_editors(given: Iterable[Method | Editor | str]) -> tuple[Method | Editor, ...]:
    """As :func:`find_methods`, where editors may stand among the methods.

    Args:
        given: Methods, what names them or one of :data:`EDITORS`, and editors.

    Raises:
        BadInputError: If a method is unknown or malformed, or two different ones go by one name.
    """
    found: dict[Any, Method | Editor] = {}
    named = {editor.name: editor for editor in EDITORS}
    for each in given:
        editor = named.get(each.lower().replace("_", "-")) if isinstance(each, str) else None
        if editor is not None:
            found[id(editor)] = editor
        elif isinstance(each, Method | str):
            found |= {method: method for method in _methods([each], named)}
        else:
            # A user's class may have no hash.
            found[id(each)] = each
    check_methods(found.values())
    return tuple(found.values())


@taken
def load_methods(path: str | Path) -> tuple[Method, ...]:
    """Read methods from TOML: a table each, with the four slots and, if wanted, a ``label``.

    Raises:
        BadInputError: If the file is missing or not TOML, or a method in it is malformed.
    """
    tables = read_toml(Path(path), "methods")
    if not tables:
        raise BadInputError(f"{path} holds no method; write a table for each, such as [mine]")
    methods = tuple(_method(f"{path}, [{name}]", name, table) for name, table in tables.items())
    check_methods(methods)
    return methods


def check_methods(methods: Iterable[Method | Editor]) -> None:
    """Refuse methods and editors that results could not tell apart.

    Raises:
        BadInputError: If two go by one name, or one by the name of a built-in method that it is
            not.
    """
    seen: dict[str, Method | Editor] = {}
    labels = {known.label.lower(): known.name for known in METHODS}
    for method in methods:
        name = method.name.lower()
        builtin = next((known for known in METHODS if known.name == name), None)
        slots = method.slots if isinstance(method, Method) else None
        if name == "r-rome" or (builtin is not None and builtin.slots != slots):
            raise BadInputError(
                f"a method of your own cannot be called {method.name!r}, which is a built-in one "
                "with other slots; give it another name"
            )
        if name in seen:
            kind = "methods" if slots is not None else "editors"
            raise BadInputError(f"two {kind} are called {method.name!r}; give each its own name")
        seen[name] = method
        owner = labels.setdefault(method.label.lower(), name)
        if owner != name:
            raise BadInputError(
                f"the methods {owner!r} and {method.name!r} are both shown as {method.label!r}; "
                "give each its own label"
            )


def _spelled_out(text: str) -> Method:
    name, _, rest = text.partition("=")
    slots: dict[str, Any] = {}
    for part in rest.split(","):
        slot, colon, key = part.partition(":")
        if not colon:
            raise BadInputError(f"--method {text!r} cannot be read; write {_FORM}")
        if slot.strip() in slots:
            raise BadInputError(f"--method {text!r} gives {slot.strip()} twice; give it once")
        slots[slot.strip()] = key.strip()
    return _method(f"--method {text!r}", name.strip(), slots)


def _method(where: str, name: str, table: Any) -> Method:
    """A method from its slots by name.

    Args:
        where: Where it was given, for messages.
        name: Its name.
        table: Its slots, and a label if it has one.

    Raises:
        BadInputError: If something is missing, superfluous or unknown.
    """
    if not _NAME.fullmatch(name):
        raise BadInputError(
            f"{where}: {name!r} is no name; take letters, digits, dots, dashes and underscores"
        )
    if not isinstance(table, Mapping):
        raise BadInputError(
            f"{where} is not a table of slots; write [{name}] with {', '.join(SLOTS)}"
        )
    given = dict(cast(Mapping[str, Any], table))
    label = given.pop("label", name)
    missing = [slot for slot in SLOTS if slot not in given]
    other = [slot for slot in given if slot not in SLOTS]
    if missing:
        raise BadInputError(f"{where} has no {missing[0]}; give all of {', '.join(SLOTS)}")
    if other:
        raise BadInputError(f"{where} has {other[0]!r}, which is no slot; give {', '.join(SLOTS)}")
    for slot, key in given.items():
        if not isinstance(key, str) or key not in _KEYS:
            raise BadInputError(
                f"{where}: {slot} is {key!r}; take 'prefixed' (the mean over the contexts) or "
                "'bare' (the prompt alone)"
            )
    if not isinstance(label, str) or not label.strip():
        raise BadInputError(f"{where}: the label is {label!r}; give a text")
    return Method(name=name, label=label, **{slot: _KEYS[key] for slot, key in given.items()})
