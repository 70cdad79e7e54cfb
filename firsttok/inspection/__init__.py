"""Onboarding of a model: what it is, whether it can be edited, and how to begin."""

from firsttok.inspection.anomaly import FirstTokens, measure_first_tokens
from firsttok.inspection.checks import SiteCheck, check_sites, named_checks
from firsttok.inspection.forecast import FactForecast, Forecast, forecast
from firsttok.inspection.proposal import Proposal, Setting, TextPerplexities, propose
from firsttok.inspection.record import (
    Architecture,
    Bos,
    Inspection,
    inspect_model,
)

__all__ = [
    "Architecture",
    "Bos",
    "FactForecast",
    "FirstTokens",
    "Forecast",
    "Inspection",
    "Proposal",
    "Setting",
    "SiteCheck",
    "TextPerplexities",
    "check_sites",
    "forecast",
    "inspect_model",
    "measure_first_tokens",
    "named_checks",
    "propose",
]
