"""All claims, in the order of the paper; our own come last."""

from firsttok.claims.accuracy import ACCURACY_CLAIMS
from firsttok.claims.edits import EDIT_CLAIMS
from firsttok.claims.keys import KEY_CLAIMS
from firsttok.claims.places import PLACE_CLAIMS
from firsttok.claims.verdicts import Claim
from firsttok.scripts import SCRIPTS

__all__ = ["CLAIMS"]

_ALL = (*EDIT_CLAIMS, *KEY_CLAIMS, *PLACE_CLAIMS, *ACCURACY_CLAIMS)

CLAIMS: tuple[Claim, ...] = tuple(
    sorted(_ALL, key=lambda claim: (claim.own, SCRIPTS.index(claim.script)))
)
"""Every claim that a table or a figure of "The Fall of ROME" supports, and ours beside them."""
