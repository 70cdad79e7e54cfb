"""The closed form of the update (Equation 3), with any key in any slot."""

import torch

from firsttok.editing.methods import Method
from firsttok.editing.value import Value
from firsttok.errors import NonFiniteError
from firsttok.keys import FactKeys
from firsttok.models import EditSite
from firsttok.second_moment import SecondMoment
from firsttok.tensors import KeyVector, ValueVector

__all__ = ["solve_update"]


def solve_update(
    site: EditSite, keys: FactKeys, value: Value, method: Method, moment: SecondMoment
) -> tuple[KeyVector, ValueVector, dict[str, float]]:
    """Solve Equation 3 with the method's keys.

    The update is the same however its left vector is scaled; Table 1 depends on that, and has it at
    unit norm, as the released code.

    Returns:
        The unit left vector u, the right vector ``(v* - W k) / (u . k)``, and the components of the
        update, which is ``outer(left, right)`` in ``[d_mlp, d_model]``: ``numerator``
        ``||v* - W k||`` and ``denominator`` ``u . k``, signed, of which Table 1 averages the
        absolute value; ``raw_numerator`` and ``raw_denominator``, both with ``C^-1 k`` as it is;
        ``key_cosine`` of k_bar and k^u, and ``key_norm_ratio`` ``||k^u|| / ||k_bar||``; and
        ``value_norm`` ``||v*||``.

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
    components = {
        "numerator": float(residual.norm()),
        "denominator": float(denominator),
        "raw_numerator": float(residual.norm() * scale),
        "raw_denominator": float(denominator * scale),
        "key_cosine": keys.cosine,
        "key_norm_ratio": keys.norm_ratio,
        "value_norm": float(value.target.norm()),
    }
    return left, right, components
