"""How far the fast side may be from the naive one, by the type of the weights."""

from dataclasses import dataclass

from measuring import Extras, Table

__all__ = ["ALLOWED", "Allowed", "Difference", "judge"]


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Largest relative differences; None where nothing is asked."""

    first_loss: float
    """Of the loss before any step."""
    loss: float | None
    """Of the loss at any step."""
    value: float | None
    """Of v*."""
    losses: int | None
    """Of the number of losses, absolute."""
    key: float
    """Of a key."""
    moment: float
    """Of the second moment."""
    perplexity: float
    """Of the perplexity of a sentence."""


# In half precision each step rounds anew, and Adam's first steps depend on signs alone: the two
# sides part, and only what no optimisation precedes can be held to something.
_HALF = Allowed(
    first_loss=2e-2,
    loss=None,
    value=None,
    losses=None,
    key=2e-2,
    moment=2e-2,
    perplexity=5e-2,
)
ALLOWED = {
    "float64": Allowed(
        first_loss=1e-6,
        loss=1e-6,
        value=1e-6,
        losses=0,
        key=1e-6,
        moment=1e-6,
        perplexity=1e-6,
    ),
    "float32": Allowed(
        first_loss=2e-3,
        loss=2e-3,
        value=1e-2,
        losses=0,
        key=1e-4,
        moment=1e-4,
        perplexity=1e-4,
    ),
    "bfloat16": _HALF,
    "float16": _HALF,
}
"""By the type of the weights."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One difference between the sides."""

    of: str
    """What differs."""
    found: float
    """By how much."""
    allowed: float | None
    """By how much it may; None where nothing is asked."""

    @property
    def fails(self) -> bool:
        """Whether it is too large, or not a number."""
        return self.allowed is not None and not self.found <= self.allowed


def judge(title: str, *differences: Difference) -> Extras:
    """A table of differences; those that are too large are failures."""
    rows: list[tuple[str | float, ...]] = []
    for one in differences:
        if one.allowed is None:
            rows.append((one.of, one.found, "-", "-"))
        else:
            rows.append((one.of, one.found, one.allowed, "DOES NOT HOLD" if one.fails else "holds"))
    table = Table(title=title, columns=("of", "difference", "allowed", "verdict"), rows=tuple(rows))
    return Extras(
        tables=(table,),
        failures=tuple(
            f"{one.of} differs from the naive side by {one.found:.2g}; {one.allowed:.2g} is allowed"
            for one in differences
            if one.fails
        ),
    )
