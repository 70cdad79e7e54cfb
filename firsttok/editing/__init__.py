"""ROME-family edits: which key goes into which slot, the value, the closed form, the patch."""

from firsttok.editing.edits import compute_edit, compute_edits
from firsttok.editing.methods import (
    C_ROME,
    FC_ROME,
    METHODS,
    P_ROME,
    ROME,
    SLOTS,
    Method,
    Slot,
    find_method,
)
from firsttok.editing.own_methods import check_methods, find_methods, load_methods
from firsttok.editing.patch import AppliedEdit, RankOneEdit, load_edit
from firsttok.editing.store import ValueStore
from firsttok.editing.update import UpdateReport, solve_update
from firsttok.editing.value import Value, optimise_values

__all__ = [
    "C_ROME",
    "FC_ROME",
    "METHODS",
    "P_ROME",
    "ROME",
    "SLOTS",
    "AppliedEdit",
    "Method",
    "RankOneEdit",
    "Slot",
    "UpdateReport",
    "Value",
    "ValueStore",
    "check_methods",
    "compute_edit",
    "compute_edits",
    "find_method",
    "find_methods",
    "load_edit",
    "load_methods",
    "optimise_values",
    "solve_update",
]
