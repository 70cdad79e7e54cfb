"""Edits: the ROME family slot by slot, MEMIT and its relatives, fine-tuning, MEND; value, patch."""

from firsttok.editing.delta import Delta
from firsttok.editing.edit import (
    AppliedEdit,
    Edit,
    Editor,
    EditSettings,
    OpenEditor,
    SideBySideEditor,
    shown_components,
)
from firsttok.editing.edits import RomeEditor, Turn, compute_edit, edit_each, edit_in_step
from firsttok.editing.exports import check_export, export_model
from firsttok.editing.fine_tuning import (
    FINE_TUNING,
    FT,
    FT_M,
    FT_UNBOUND,
    FineTuningEditor,
    FineTuningLoss,
)
from firsttok.editing.memit import (
    ALPHAEDIT,
    EMMET,
    MEMIT,
    MEMIT_SEQ,
    SPREAD,
    AlphaEditRule,
    EmmetRule,
    MemitEditor,
    MemitRule,
    SpreadRule,
)
from firsttok.editing.mend import MEND, MEND_RELEASED, MendEditor, MendStatistics, load_mend
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
from firsttok.editing.own_methods import (
    EDITORS,
    check_methods,
    find_editors,
    find_methods,
    load_methods,
    optimisations,
    other_layers,
)
from firsttok.editing.record import EditRecord
from firsttok.editing.saved_edits import load_edit
from firsttok.editing.store import ValueStore
from firsttok.editing.update import solve_update
from firsttok.editing.value import Value, optimise_values

__all__ = [
    "ALPHAEDIT",
    "C_ROME",
    "EDITORS",
    "EMMET",
    "FC_ROME",
    "FINE_TUNING",
    "FT",
    "FT_M",
    "FT_UNBOUND",
    "MEMIT",
    "MEMIT_SEQ",
    "MEND",
    "MEND_RELEASED",
    "METHODS",
    "P_ROME",
    "ROME",
    "SLOTS",
    "SPREAD",
    "AlphaEditRule",
    "AppliedEdit",
    "Delta",
    "Edit",
    "EditRecord",
    "EditSettings",
    "Editor",
    "EmmetRule",
    "FineTuningEditor",
    "FineTuningLoss",
    "MemitEditor",
    "MemitRule",
    "MendEditor",
    "MendNetwork",
    "MendStatistics",
    "Method",
    "OpenEditor",
    "RomeEditor",
    "SideBySideEditor",
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
    "optimisations",
    "optimise_values",
    "other_layers",
    "shown_components",
    "solve_update",
]
