"""The analysis scripts, in the order of the paper; our own come last."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["AFTER", "ALONE", "HEADINGS", "LANE_ORDER", "SCRIPTS"]

HEADINGS = {
    "table1_update_components": "Table 1: numerator and denominator of the update",
    "table2_perplexity": "Table 2: perplexity after one edit",
    "table3_transfer": "Table 3: the same cases on other models",
    "table4_efficacy": "Table 4: does the new target come out?",
    "table5_prefixed_efficacy": "Table 5: and behind a prefix?",
    "table6_second2first": "Table 6: the first token at the second one's position",
    "table7_first2second": "Table 7: the second token at the first one's position",
    "figure2_keys": "Figures 2, 4 and 5: where the keys lie",
    "figure3_first_tokens": "Figure 3: first tokens, and prefixed subjects",
    "figure6_encoder_contrast": "Figure 6: an encoder, whose first token sees the others",
    "figure7_without_bos": "Figure 7: with and without BOS",
    "figure8_concentration": "Figure 8 and Equation 4: how concentrated first tokens are",
    "extra_attention_mask": "Beyond the paper: the attention mask",
    "extra_token_identity": "Beyond the paper: the place or the token?",
    "extra_value_anchor": "Beyond the paper: the anchor of the value",
}
"""Heading of each file of ``analyses/``, by its name without suffix."""
SCRIPTS = tuple(HEADINGS)
"""Names of the files that ``firsttok reproduce`` runs, in order."""
ALONE: Mapping[str, str] = MappingProxyType(
    {"extra_causal_tracing": "Beyond the paper: which layer carries a fact?"}
)
"""Headings of files that take as long as all others together, and are run by themselves."""
_TABLE1, _TABLE2 = "table1_update_components", "table2_perplexity"
AFTER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        _TABLE2: (_TABLE1,),
        "table3_transfer": (_TABLE1,),
        "table4_efficacy": (_TABLE2,),
        "table5_prefixed_efficacy": (_TABLE2,),
        "table6_second2first": (_TABLE1,),
        "figure7_without_bos": (_TABLE1,),
        "extra_attention_mask": (_TABLE1,),
        "extra_token_identity": (_TABLE1,),
        "extra_value_anchor": (_TABLE2,),
    }
)
"""Scripts that read values which another one leaves: side by side, both would compute them."""
LANE_ORDER = (
    _TABLE1,
    _TABLE2,
    "extra_value_anchor",
    "table7_first2second",
    "extra_token_identity",
    "extra_attention_mask",
    "figure7_without_bos",
    "table6_second2first",
    "figure2_keys",
    "figure6_encoder_contrast",
    "figure8_concentration",
    "table5_prefixed_efficacy",
    "table4_efficacy",
    "figure3_first_tokens",
    "table3_transfer",
)
"""The order in which several lanes take them up: what others wait for, then what takes longest."""
