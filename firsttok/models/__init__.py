"""Models: what there is, how it is loaded, and where it can be edited.

With ``engine``, the only package that knows architectures.
"""

from firsttok.models.bos import BosPolicy
from firsttok.models.catalog import CATALOG, ModelSpec, find_spec
from firsttok.models.embedded import embedded_folder, is_pulled, pull
from firsttok.models.libraries import quiet_libraries
from firsttok.models.loading import load
from firsttok.models.model import Model
from firsttok.models.passes import capture, capture_tail, logits
from firsttok.models.plain import EXPORT_RECORD, checkpoint_of, plain_model
from firsttok.models.sites import PORTS, EditSite, Place, find_sites, refuse_processed
from firsttok.models.weights import Standing, WeightEdit, Weights

__all__ = [
    "CATALOG",
    "EXPORT_RECORD",
    "PORTS",
    "BosPolicy",
    "EditSite",
    "Model",
    "ModelSpec",
    "Place",
    "Standing",
    "WeightEdit",
    "Weights",
    "capture",
    "capture_tail",
    "checkpoint_of",
    "embedded_folder",
    "find_sites",
    "find_spec",
    "is_pulled",
    "load",
    "logits",
    "plain_model",
    "pull",
    "quiet_libraries",
    "refuse_processed",
]
