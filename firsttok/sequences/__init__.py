"""Edit after edit on the weights as they have become, and what becomes of the model.

As in the released code, C and contexts are those of the model before the first edit, and all else
is taken from the current weights: W k, the anchor and v*, and the reference of the KL divergence.
Several sequences on one model are run side by side.
"""

from firsttok.sequences.lockstep import run_sequences
from firsttok.sequences.plan import EditSequence, Guard, SequencePlan, check_order, order_facts
from firsttok.sequences.record import SequenceRun

__all__ = [
    "EditSequence",
    "Guard",
    "SequencePlan",
    "SequenceRun",
    "check_order",
    "order_facts",
    "run_sequences",
]
