"""The closed form of the update (Equation 3), with any key in any slot."""

from dataclasses import asdict, dataclass

import torch

from firsttok.arguments import take_fields
from firsttok.display import Panel, Shown, Table
from firsttok.editing.methods import Method
from firsttok.editing.value import Value
from firsttok.errors import NonFiniteError
from firsttok.keys import FactKeys
from firsttok.models import EditSite
from firsttok.second_moment import SecondMoment
from firsttok.tensors import KeyVector, ValueVector

__all__ = ["UpdateReport", "solve_update"]


@dataclass(frozen=True, kw_only=True, repr=False)
class UpdateReport(Shown):
    """The components of one update, as Table 1 reports them and without normalisation.

    The edit is the same under both; the left vector is scaled to unit norm in the released code,
    and Table 1 depends on that.
    """

    numerator: float
    """``||v* - W k||``: norm of the numerator matrix with a unit left vector (Table 1)."""
    denominator: float
    """``u . k``, signed, with a unit left vector u (Table 1 averages its absolute value)."""
    delta_norm: float
    """Frobenius norm of the update matrix Delta."""
    raw_numerator: float
    """Norm of ``(v* - W k)(C^-1 k)^T`` with ``C^-1 k`` as it is."""
    raw_denominator: float
    """``(C^-1 k)^T k`` with ``C^-1 k`` as it is."""
    mean_delta: float
    """|Delta| of "Rebuilding ROME": Frobenius norm over the number of elements."""
    key_cosine: float
    """Cosine of k_bar and k^u."""
    key_norm_ratio: float
    """``||k^u|| / ||k_bar||``."""

    def __post_init__(self) -> None:
        """Check what a file may hold."""
        take_fields(self)

    def table(self) -> Table:
        """The components by name."""
        lines = [
            ["numerator ||v* - W k||", self.numerator],
            ["denominator u . k", self.denominator],
            ["||Delta W||", self.delta_norm],
            ["cosine of k_bar and k^u", self.key_cosine],
            ["||k^u|| / ||k_bar||", self.key_norm_ratio],
        ]
        return Table(columns=("component", "value"), lines=lines)

    def panel(self) -> Panel:
        """The components as Table 1 has them, and the keys they come from."""
        return Panel(title="components of the update", parts=[self.table()])

    def as_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


def solve_update(
    site: EditSite, keys: FactKeys, value: Value, method: Method, moment: SecondMoment
) -> tuple[KeyVector, ValueVector, UpdateReport]:
    """Solve Equation 3 with the method's keys.

    Returns:
        The unit left vector u, the right vector ``(v* - W k) / (u . k)``, and the report; the
        update is ``outer(left, right)`` in ``[d_mlp, d_model]``.

    Raises:
        NonFiniteError: If the denominator is zero or something is not finite.
    """
    raw = moment.solve(method.direction.pick(keys))
    scale = raw.norm()
    left = raw / scale
    residual = value.target - site.values_of(method.residual.pick(keys)[None])[0]
    denominator = left @ method.denominator.pick(keys)
    right = residual / denominator
    if not bool(torch.isfinite(right).all() and torch.isfinite(left).all()):
        raise NonFiniteError(
            f"the {method.label} update is not finite (denominator {float(denominator)}); "
            "the key is zero or orthogonal to the left vector"
        )
    size = float(right.double().norm())
    report = UpdateReport(
        numerator=float(residual.norm()),
        denominator=float(denominator),
        delta_norm=size,
        raw_numerator=float(residual.norm() * scale),
        raw_denominator=float(denominator * scale),
        mean_delta=size / (left.numel() * right.numel()),
        key_cosine=keys.cosine,
        key_norm_ratio=keys.norm_ratio,
    )
    return left, right, report
