"""Causal probes: what makes the first token special, and pictures and numbers that show it."""

from firsttok.probes.attention import (
    MaskedKeys,
    SeesAll,
    SeesItself,
    TokenStates,
    cosine_with,
    token_states,
)
from firsttok.probes.bos import bos_study
from firsttok.probes.concentration import (
    LayerConcentration,
    Spread,
    concentration,
    effective_rank,
    later_positions,
    mean_distance,
    parts_at,
    spread,
)
from firsttok.probes.identity import (
    IDENTITY_CELLS,
    IdentityCell,
    distinct_with_space,
    identity_prompt,
)
from firsttok.probes.positions import (
    FIRST2SECOND,
    SECOND2FIRST,
    STAGES,
    PositionSwap,
    first_key_change,
    measure_stages,
    stage_lines,
    swapped_study,
)
from firsttok.probes.projection import (
    Projection,
    Separation,
    normalise,
    project,
    save_points,
    scatter,
    separation,
)

__all__ = [
    "FIRST2SECOND",
    "IDENTITY_CELLS",
    "SECOND2FIRST",
    "STAGES",
    "IdentityCell",
    "LayerConcentration",
    "MaskedKeys",
    "PositionSwap",
    "Projection",
    "SeesAll",
    "SeesItself",
    "Separation",
    "Spread",
    "TokenStates",
    "bos_study",
    "concentration",
    "cosine_with",
    "distinct_with_space",
    "effective_rank",
    "first_key_change",
    "identity_prompt",
    "later_positions",
    "mean_distance",
    "measure_stages",
    "normalise",
    "parts_at",
    "project",
    "save_points",
    "scatter",
    "separation",
    "spread",
    "stage_lines",
    "swapped_study",
    "token_states",
]
