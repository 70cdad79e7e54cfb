"""Onboarding of a model: what it is, whether it can be edited, and how to begin."""

from firsttok.inspection.anomaly import FirstTokens, measure_first_tokens
from firsttok.inspection.checks import check_sites, named_checks
from firsttok.inspection.forecast import forecast
from firsttok.inspection.proposal import TextPerplexities
from firsttok.inspection.record import Inspection, inspect_model

__all__ = [
    "FirstTokens",
    "Inspection",
    "TextPerplexities",
    "check_sites",
    "forecast",
    "inspect_model",
    "measure_first_tokens",
    "named_checks",
]
