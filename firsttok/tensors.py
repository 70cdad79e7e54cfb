"""The jaxtyping vocabulary: one name per dimension, used in every public signature.

``prompt`` counts prompts of a batch, ``pos`` token positions, ``layer`` captured layers,
``d_mlp`` the width of a key, ``d_model`` the width of a value, ``vocab`` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from firsttok.errors import BadInputError

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
    """Position id of each real token; interventions see it counted from the prompt's first one."""
    starts: Int[Tensor, "prompt"]
    """Column of each prompt's first real token."""
    visible: Bool[Tensor, "prompt query key"] | None = None
    """Which columns each token attends to; None leaves it to the model (causal in a decoder)."""

    @classmethod
    def of(
        cls, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"] | None = None
    ) -> "TokenBatch":
        """Return prompts as they are run without changes; without a mask, all tokens are real."""
        mask = torch.ones_like(tokens) if mask is None else mask.long()
        return cls(
            tokens=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            starts=mask.argmax(1),
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.tokens.device

    def columns(self, positions: Int[Tensor, "prompt"]) -> Int[Tensor, "prompt"]:
        """Turn absolute token positions of each prompt into columns of the padded batch.

        Raises:
            BadInputError: If a prompt has no such token.
        """
        columns = self.starts + positions.to(self.starts.device)
        lengths = self.attention_mask.sum(1)
        outside = (columns < self.starts) | (columns >= self.starts + lengths)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise BadInputError(
                f"there is no token {int(positions[row])} in a prompt of {int(lengths[row])} "
                "tokens; positions count from 0"
            )
        return columns

    def rows(self, index: Int[Tensor, "row"]) -> "TokenBatch":
        """Return some of the prompts; one may be taken several times."""
        return TokenBatch(
            tokens=self.tokens[index],
            attention_mask=self.attention_mask[index],
            position_ids=self.position_ids[index],
            starts=self.starts[index],
            visible=None if self.visible is None else self.visible[index],
        )

    @classmethod
    def joined(cls, batches: Sequence["TokenBatch"]) -> "TokenBatch":
        """Put batches of the same width together, one below another."""
        visible = [batch.visible for batch in batches if batch.visible is not None]
        return cls(
            tokens=torch.cat([batch.tokens for batch in batches]),
            attention_mask=torch.cat([batch.attention_mask for batch in batches]),
            position_ids=torch.cat([batch.position_ids for batch in batches]),
            starts=torch.cat([batch.starts for batch in batches]),
            visible=torch.cat(visible) if len(visible) == len(batches) else None,
        )

    def first(self, columns: int) -> "TokenBatch":
        """Return the first columns; what they hold does not depend on the rest if it is causal.

        Raises:
            ValueError: If tokens may see later ones.
        """
        if self.visible is not None:
            raise ValueError("a batch with its own visibility cannot be cut")
        return replace(
            self,
            tokens=self.tokens[:, :columns],
            attention_mask=self.attention_mask[:, :columns],
            position_ids=self.position_ids[:, :columns],
        )

    def places(self, position: int) -> tuple[Int[Tensor, "place"], Int[Tensor, "place"]]:
        """Rows and columns of the token at a position, in every prompt that is long enough.

        Raises:
            BadInputError: If the position is negative.
        """
        if position < 0:
            raise BadInputError(f"there is no token {position}; positions count from 0")
        columns = self.starts + position
        rows = torch.arange(len(columns), device=columns.device)
        inside = columns < self.tokens.shape[1]
        rows, columns = rows[inside], columns[inside]
        real = self.attention_mask[rows, columns].bool()
        return rows[real], columns[real]

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
