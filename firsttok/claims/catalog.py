"""All claims, in the order of the paper; our own come last."""

from firsttok.claims.accuracy import ACCURACY_CLAIMS
from firsttok.claims.edits import EDIT_CLAIMS
from firsttok.claims.keys import KEY_CLAIMS
from firsttok.claims.places import PLACE_CLAIMS
from firsttok.claims.verdicts import Claim

__all__ = ["CLAIMS"]

_ORDER = (
    "table1_update_components",
    "table2_perplexity",
    "table3_transfer",
    "table4_efficacy",
    "table5_prefixed_efficacy",
    "table6_second2first",
    "table7_first2second",
    "figure2_keys",
    "figure3_first_tokens",
    "figure6_encoder_contrast",
    "figure7_without_bos",
    "figure8_concentration",
    "extra_attention_mask",
    "extra_token_identity",
    "extra_value_anchor",
)
_ALL = (*EDIT_CLAIMS, *KEY_CLAIMS, *PLACE_CLAIMS, *ACCURACY_CLAIMS)

CLAIMS: tuple[Claim, ...] = tuple(
    sorted(_ALL, key=lambda claim: (claim.own, _ORDER.index(claim.script)))
)
"""Every claim that a table or a figure of "The Fall of ROME" supports, and ours beside them."""
