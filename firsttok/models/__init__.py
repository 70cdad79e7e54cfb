"""Models: what there is, how it is loaded, and where it can be edited.

The only package that knows architectures.
"""

from firsttok.models.bos import BosPolicy
from firsttok.models.catalog import CATALOG, ModelSpec, find_spec
from firsttok.models.embedded import embedded_folder, is_pulled, pull
from firsttok.models.forward import capture, logits
from firsttok.models.interventions import intervene, sees_later
from firsttok.models.libraries import quiet_libraries
from firsttok.models.loading import load
from firsttok.models.model import Model
from firsttok.models.plain import EXPORT_RECORD, checkpoint_of, plain_model
from firsttok.models.replay import capture_tail, find_replay, keys_behind
from firsttok.models.sites import PORTS, EditSite, Place, find_sites, refuse_processed
from firsttok.models.tail import Replay, Tail
from firsttok.models.trials import Change, Trials, changes_of
from firsttok.models.weights import Standing, WeightEdit, Weights

__all__ = [
    "CATALOG",
    "EXPORT_RECORD",
    "PORTS",
    "BosPolicy",
    "Change",
    "EditSite",
    "Model",
    "ModelSpec",
    "Place",
    "Replay",
    "Standing",
    "Tail",
    "Trials",
    "WeightEdit",
    "Weights",
    "capture",
    "capture_tail",
    "changes_of",
    "checkpoint_of",
    "embedded_folder",
    "find_replay",
    "find_sites",
    "find_spec",
    "intervene",
    "is_pulled",
    "keys_behind",
    "load",
    "logits",
    "plain_model",
    "pull",
    "quiet_libraries",
    "refuse_processed",
    "sees_later",
]
