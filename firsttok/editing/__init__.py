"""Edits: the ROME family slot by slot, MEMIT and its relatives, MEND, the value, the patch."""

from firsttok.editing.delta import Delta
from firsttok.editing.edit import AppliedEdit, Edit, Editor, shown_components
from firsttok.editing.edits import RomeEditor, Turn, compute_edit, edit_each, edit_in_step
from firsttok.editing.exports import check_export, export_model
from firsttok.editing.memit import (
    AlphaEditRule,
    EmmetRule,
    MemitEditor,
    MemitRule,
    SpreadRule,
)
from firsttok.editing.mend import MendEditor, MendStatistics, load_mend
from firsttok.editing.mend_network import MendNetwork
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
from firsttok.editing.own_methods import check_methods, find_editors, find_methods, load_methods
from firsttok.editing.record import EditRecord
from firsttok.editing.saved_edits import load_edit
from firsttok.editing.store import ValueStore
from firsttok.editing.update import solve_update
from firsttok.editing.value import Value, optimise_values

__all__ = [
    "C_ROME",
    "FC_ROME",
    "METHODS",
    "P_ROME",
    "ROME",
    "SLOTS",
    "AlphaEditRule",
    "AppliedEdit",
    "Delta",
    "Edit",
    "EditRecord",
    "Editor",
    "EmmetRule",
    "MemitEditor",
    "MemitRule",
    "MendEditor",
    "MendNetwork",
    "MendStatistics",
    "Method",
    "RomeEditor",
    "Slot",
    "SpreadRule",
    "Turn",
    "Value",
    "ValueStore",
    "check_export",
    "check_methods",
    "compute_edit",
    "edit_each",
    "edit_in_step",
    "export_model",
    "find_editors",
    "find_method",
    "find_methods",
    "load_edit",
    "load_mend",
    "load_methods",
    "optimise_values",
    "shown_components",
    "solve_update",
]
