"""Models: what there is, how it is loaded, and where it can be edited.

The only package that knows architectures.
"""

from firsttok.models.bos import BosPolicy
from firsttok.models.catalog import CATALOG, ModelSpec, find_spec
from firsttok.models.embedded import embedded_folder, is_pulled, pull
from firsttok.models.forward import capture, logits
from firsttok.models.interventions import intervene, sees_later
from firsttok.models.loading import load
from firsttok.models.model import Model
from firsttok.models.replay import capture_tail, find_replay, keys_behind
from firsttok.models.sites import EditSite, find_sites, refuse_processed
from firsttok.models.tail import Replay, Tail
from firsttok.models.trials import Change, Trials, changes_of
from firsttok.models.weights import Place, Standing, WeightEdit, Weights

__all__ = [
    "CATALOG",
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
    "embedded_folder",
    "find_replay",
    "find_sites",
    "find_spec",
    "intervene",
    "is_pulled",
    "keys_behind",
    "load",
    "logits",
    "pull",
    "refuse_processed",
    "sees_later",
]
