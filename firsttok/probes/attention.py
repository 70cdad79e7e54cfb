"""What a token may attend to, changed in the same causal weights.

The paper's first hypothesis is that the first token is anomalous because it can interact with no
other token (Section 3.2, "Analysis"). The T5 contrast tests it on another model; these
interventions test it on one and the same. For attention sinks masks have been changed before, in
training (Gu et al. 2024) and in a trained model (Li et al. 2026); what such a token's key does to
an edit we found in no paper.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import take_fields, taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.errors import BadInputError
from firsttok.keys import FactKeys, fact_keys, keys_at
from firsttok.models import Model, capture
from firsttok.prompts import Prompt, batches, fact_prompt, is_changed, pad, positions
from firsttok.tensors import Intervention, KeyMatrix, TokenBatch

__all__ = [
    "MaskedKeys",
    "SeesAll",
    "SeesItself",
    "TokenStates",
    "cosine_with",
    "token_states",
]


@dataclass(frozen=True, kw_only=True)
class SeesAll:
    """Let the token at one position attend to every real token, later ones included."""

    position: int = 0
    """Position of the token, counted from the first of the sequence."""

    __post_init__ = take_fields

    @property
    def name(self) -> str:
        """Name in provenance."""
        return f"position {self.position} sees all"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """Open the token's row of the mask."""
        rows, columns = batch.places(self.position)
        visible = _visible(batch)
        visible[rows, columns] = batch.attention_mask[rows].bool()
        return replace(batch, visible=visible)


@dataclass(frozen=True, kw_only=True)
class SeesItself:
    """Let the token at one position attend to itself only; others still see it."""

    position: int
    """Position of the token, counted from the first of the sequence."""

    __post_init__ = take_fields

    @property
    def name(self) -> str:
        """Name in provenance."""
        return f"position {self.position} sees itself only"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        """Close the token's row of the mask but for itself."""
        rows, columns = batch.places(self.position)
        visible = _visible(batch)
        visible[rows, columns] = False
        visible[rows, columns, columns] = True
        return replace(batch, visible=visible)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStates:
    """What one token of each prompt looks like after one layer."""

    residual_norms: Float[Tensor, "prompt"]
    keys: KeyMatrix


@taken
def token_states(model: Model, prompts: list[Prompt], at: list[int], *, layer: int) -> TokenStates:
    """Read the residual norm and the key of one token of each prompt, at its absolute position."""
    site = model.site(layer)
    norms = torch.empty(len(prompts), dtype=torch.float64)
    keys = torch.empty(len(prompts), site.d_mlp, dtype=model.dtype, device=model.device)
    for group in batches(prompts):
        batch = pad(model, [prompts[i] for i in group])
        columns = batch.columns(torch.tensor([at[i] for i in group]))
        names = [site.key_hook, site.residual_hook]
        seen = capture(model, batch, names, stop_at_layer=site.layer + 1)
        rows = torch.arange(len(group), device=columns.device)
        keys[group] = seen[site.key_hook][rows, columns]
        norms[group] = seen[site.residual_hook][rows, columns].double().norm(dim=1).cpu()
    return TokenStates(residual_norms=norms, keys=keys)


def cosine_with(keys: KeyMatrix, others: KeyMatrix) -> float:
    """Mean cosine of each key with the other key of the same prompt."""
    return float(torch.nn.functional.cosine_similarity(keys.double(), others.double()).mean())


@dataclass(frozen=True, kw_only=True)
class MaskedKeys:
    """A key source whose k^u comes from a token that sees more, or less, than it would.

    k_bar is the ordinary one, and so are the prompts of the value optimisation. Its anchor is the
    MLP's output for this k^u, and with the anchor go the clamp on delta and the weight decay: the
    numerator changes, too, though far less than the denominator.
    """

    later: bool
    """Whether k^u is read after a prefix, where the subject is a later token."""
    changed: bool
    """Whether the first token sees all others, or the later one itself only."""

    @property
    def name(self) -> str:
        """Name in tables and provenance."""
        change = "sees itself only" if self.later else "sees all"
        token = "later token" if self.later else "first token"
        return f"{token} {change}" if self.changed else token

    def keys(self, model: Model, fact: Fact, contexts: ContextSet, *, layer: int) -> FactKeys:
        """Return the ordinary k_bar and the k^u of the changed token.

        Raises:
            BadInputError: If nothing stands after a token that is to see all.
            UnsupportedModelError: If the model does not obey such a mask.
        """
        ordinary = fact_keys(model, fact, contexts, layer=layer)
        if not (self.later or self.changed):
            return ordinary
        prompt = fact_prompt(model, fact, contexts.first_prefix if self.later else "{}")
        place = int(positions([prompt])[0])
        change: Intervention = SeesItself(position=place) if self.later else SeesAll(position=place)
        view = model.intervened(change) if self.changed else model
        if self.changed and not is_changed(view, [prompt]):
            raise BadInputError(
                f"in {prompt.text!r} {self.name!r} changes nothing, since the subject ends the "
                "prompt and sees all of it anyway; give a fact whose prompt goes on after it"
            )
        key = keys_at(view, [prompt], [place], layers=[layer]).at(layer)[0]
        return replace(ordinary, unprefixed=key)


def _visible(batch: TokenBatch) -> Tensor:
    given = batch.visible
    return batch.causally_visible() if given is None else given.clone()
