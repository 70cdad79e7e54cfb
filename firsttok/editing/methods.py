"""The methods, each as the key that stands in every slot of Equation 3."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from firsttok.arguments import take_fields
from firsttok.display import Panel, Shown, Table
from firsttok.errors import BadInputError
from firsttok.keys import FactKeys
from firsttok.tensors import KeyVector

__all__ = [
    "C_ROME",
    "FC_ROME",
    "METHODS",
    "P_ROME",
    "ROME",
    "SLOTS",
    "Method",
    "Slot",
    "find_method",
]


SLOTS = ("direction", "residual", "denominator", "anchor")
"""Fields of a :class:`Method` that say which key stands where."""


class Slot(str, Enum):
    """A key of the fact that can stand in a slot."""

    PREFIXED_MEAN = "prefixed_mean"
    """k_bar, the mean over the context set (Equation 1)."""
    UNPREFIXED = "unprefixed"
    """k^u, the key of the bare prompt (Section 3.1)."""

    def pick(self, keys: FactKeys) -> KeyVector:
        """Return the key this slot takes."""
        return keys.prefixed_mean if self is Slot.PREFIXED_MEAN else keys.unprefixed


@dataclass(frozen=True, kw_only=True)
class Method(Shown):
    """One way to fill the slots of the update ``(v* - W k)(C^-1 k)^T / ((C^-1 k)^T k)``."""

    name: str
    """Name on the command line."""
    label: str
    """Name in tables."""
    direction: Slot
    """Key that ``C^-1`` is applied to, which gives the left vector."""
    residual: Slot
    """Key of the numerator's ``W k``."""
    denominator: Slot
    """Key the left vector is multiplied with."""
    anchor: Slot
    """Where ``v* = anchor + delta`` starts: the MLP's output for this key (note: not in Eq. 3)."""

    def __post_init__(self) -> None:
        """Check the slots."""
        take_fields(self)

    @property
    def slots(self) -> dict[str, str]:
        """The four slot values by the name of their slot."""
        return {name: getattr(self, name).value for name in SLOTS}

    def panel(self) -> Panel:
        """Which key stands in which slot."""
        lines = [[name, value.replace("_", " ")] for name, value in self.slots.items()]
        return Panel(title=self.label, parts=[Table(columns=("slot", "key"), lines=lines)])


ROME = Method(
    name="rome",
    label="ROME",
    direction=Slot.PREFIXED_MEAN,
    residual=Slot.UNPREFIXED,
    denominator=Slot.UNPREFIXED,
    anchor=Slot.UNPREFIXED,
)
"""ROME as released: the inconsistency that Section 3.1 finds."""

C_ROME = Method(
    name="c-rome",
    label="C-ROME",
    direction=Slot.PREFIXED_MEAN,
    residual=Slot.PREFIXED_MEAN,
    denominator=Slot.PREFIXED_MEAN,
    anchor=Slot.UNPREFIXED,
)
"""C-ROME (Section 3.1), the same as r-ROME of "Rebuilding ROME", as released."""

P_ROME = Method(
    name="p-rome",
    label="p-ROME",
    direction=Slot.UNPREFIXED,
    residual=Slot.UNPREFIXED,
    denominator=Slot.UNPREFIXED,
    anchor=Slot.UNPREFIXED,
)
"""p-ROME of "Rebuilding ROME": the bare prompt's key everywhere."""

FC_ROME = Method(
    name="fc-rome",
    label="FC-ROME",
    direction=Slot.PREFIXED_MEAN,
    residual=Slot.PREFIXED_MEAN,
    denominator=Slot.PREFIXED_MEAN,
    anchor=Slot.PREFIXED_MEAN,
)
"""Fully consistent: the anchor of the value is prefixed too.

In no paper found; a comment in the code of "A Unified Framework for Model Editing" (Gupta et al.
2024, ``rome/compute_v.py``) asks whether it should be."""

METHODS: tuple[Method, ...] = (ROME, C_ROME, P_ROME, FC_ROME)


def find_method(name: str, *, others: Iterable[str] = ()) -> Method:
    """Return a method by its name; ``r-rome`` is another name of ``c-rome``.

    Args:
        name: Its name.
        others: What else could have been named, for the message.

    Raises:
        BadInputError: If there is none.
    """
    plain = name.lower().replace("_", "-")
    plain = "c-rome" if plain == "r-rome" else plain
    for method in METHODS:
        if method.name == plain:
            return method
    known = ", ".join([*(method.name for method in METHODS), *others])
    raise BadInputError(
        f"no method is called {name!r}; choose from {known}, spell one out or "
        "give a TOML file of methods"
    )
