"""What the paper claims, the rule that decides on each claim, and where it contradicts itself.

A rule reads one script's result and nothing else, and says its thresholds in words. Each model's
folder is judged by itself.
"""

from firsttok.claims.catalog import CLAIMS
from firsttok.claims.inconsistencies import Inconsistency, find_inconsistencies
from firsttok.claims.results import ScriptResult, load_result, load_sweep
from firsttok.claims.verdicts import Claim, Status, Verdict, judge

__all__ = [
    "CLAIMS",
    "Claim",
    "Inconsistency",
    "ScriptResult",
    "Status",
    "Verdict",
    "find_inconsistencies",
    "judge",
    "load_result",
    "load_sweep",
]
