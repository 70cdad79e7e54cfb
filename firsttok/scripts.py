"""The analysis scripts, in the order of the paper; our own come last."""

__all__ = ["SCRIPTS"]

SCRIPTS = (
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
"""Names of the files in ``analyses/``, without suffix."""
