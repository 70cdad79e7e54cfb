"""The jaxtyping vocabulary: one name per dimension, used in every public signature.

``prompt`` counts prompts of a batch, ``pos`` token positions, ``layer`` captured layers,
``d_mlp`` the width of a key, ``d_model`` the width of a value, ``vocab`` tokens.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "Intervention",
    "KeyMatrix",
    "KeyVector",
    "Logits",
    "SecondMomentMatrix",
    "TokenBatch",
    "TokenMask",
    "Tokens",
    "ValueMatrix",
    "ValueVector",
    "WeightInOut",
]

KeyVector = Float[Tensor, "d_mlp"]
KeyMatrix = Float[Tensor, "prompt d_mlp"]
ValueVector = Float[Tensor, "d_model"]
ValueMatrix = Float[Tensor, "prompt d_model"]
SecondMomentMatrix = Float[Tensor, "d_mlp d_mlp"]
WeightInOut = Float[Tensor, "d_mlp d_model"]
Tokens = Int[Tensor, "prompt pos"]
TokenMask = Bool[Tensor, "prompt pos"]
Logits = Float[Tensor, "prompt pos vocab"]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Padded prompts with everything a forward pass needs made explicit."""

    tokens: Int[Tensor, "prompt pos"]
    """Token ids; padded places hold the pad token."""
    attention_mask: Int[Tensor, "prompt pos"]
    """1 on real tokens, 0 on padding."""
    position_ids: Int[Tensor, "prompt pos"]
    """Position of each real token counted from the prompt's own first token."""
    starts: Int[Tensor, "prompt"]
    """Column of each prompt's first real token."""
    visible: Bool[Tensor, "prompt query key"] | None = None
    """Which columns each token attends to; None leaves it to the model (causal in a decoder)."""

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.tokens.device

    def columns(self, positions: Int[Tensor, "prompt"]) -> Int[Tensor, "prompt"]:
        """Turn absolute token positions of each prompt into columns of the padded batch."""
        return self.starts + positions.to(self.starts.device)

    def causally_visible(self) -> Bool[Tensor, "prompt query key"]:
        """What a decoder lets each token attend to: itself and all earlier real tokens."""
        width = self.tokens.shape[1]
        earlier = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        return earlier & self.attention_mask.bool()[:, None, :]


@runtime_checkable
class Intervention(Protocol):
    """A change to how prompts are run, made to every padded batch of a model's view.

    See :meth:`firsttok.models.Model.intervened`; the ones in ``firsttok.probes`` change position
    ids and what a token may attend to.
    """

    @property
    def name(self) -> str:
        """What it does, in a few words; it enters provenance and cache keys."""
        ...

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """Return the changed batch."""
        ...
