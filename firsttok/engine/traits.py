"""What a bridge is: its hook points, its type, how far it sees, how it numbers tokens."""

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from firsttok.errors import UnsupportedModelError

__all__ = [
    "KEY",
    "RESIDUAL",
    "VALUE",
    "attention_window",
    "find_first_position",
    "is_decoder",
    "position_embedding",
    "some_tokens",
    "some_weight",
]

KEY = "blocks.{}.mlp.out.hook_in"
"""Hook point of what the last matrix of a layer's MLP is given."""
VALUE = "blocks.{}.mlp.hook_out"
"""Hook point of that MLP's output."""
RESIDUAL = "blocks.{}.hook_out"
"""Hook point of the residual stream after the layer."""


def is_decoder(bridge: Any) -> bool:
    """Whether it is a decoder with a final norm and an unembedding, one stack of blocks."""
    parts = ("blocks", "ln_final", "unembed")
    return bridge.cfg.attention_dir == "causal" and all(hasattr(bridge, part) for part in parts)


def some_weight(bridge: Any) -> Shaped[Tensor, "..."]:
    """Return one of its weights, which tells where they all live and of which type they are."""
    return next(bridge.original_model.parameters())


def some_tokens(bridge: Any, rows: int, width: int) -> Int[Tensor, "prompt pos"]:
    """Return made-up prompts for a trial."""
    numbers = torch.arange(rows * width, device=some_weight(bridge).device)
    return (numbers.view(rows, width) * 7 + 11) % int(bridge.cfg.d_vocab)


def position_embedding(bridge: Any) -> str:
    """``learned``, ``rotary`` or another name of TransformerLens's configuration."""
    kind = str(bridge.cfg.positional_embedding_type)
    return "learned" if kind == "standard" else kind


def attention_window(bridge: Any) -> int | None:
    """How far back a token sees at most in some layers (Mistral, Gemma); None without limit."""
    window = getattr(bridge.original_model.config.get_text_config(), "sliding_window", None)
    return None if window is None else int(window)


@torch.no_grad()
def find_first_position(bridge: Any) -> int:
    """Find the position id of a prompt's first token, by trial against a pass without ids.

    It is 0 for all but RoBERTa, which counts from after the id of its padding token.

    Args:
        bridge: The bridge of an encoder or a decoder.

    Raises:
        UnsupportedModelError: If positions are numbered in another way.
    """
    tokens, last = some_tokens(bridge, 1, 6), RESIDUAL.format(bridge.cfg.n_layers - 1)

    def last_states(**arguments: Tensor) -> Tensor:
        # Logits may be zero, as of an encoder's head.
        found: list[Tensor] = []
        hooks = [(last, lambda states, hook: found.append(states))]  # noqa: ARG005 (called by name)
        bridge.run_with_hooks(tokens, fwd_hooks=hooks, **arguments)
        return found[0]

    ones = torch.ones_like(tokens)
    implied = last_states(attention_mask=ones)
    padding = getattr(bridge.original_model.config, "pad_token_id", None)
    # Replays of a decoder count from 0.
    behind = [] if bridge.cfg.attention_dir == "causal" or padding is None else [int(padding) + 1]
    errors: dict[int, float] = {}
    for first in (0, *behind):
        ids = ones.cumsum(1) - 1 + first
        explicit = last_states(attention_mask=ones, position_ids=ids)
        difference = explicit.double() - implied.double()
        errors[first] = float(difference.norm() / implied.double().norm())
    found = min(errors, key=lambda first: errors[first])
    # The same kernels run, so what is the same differs in the last bits at most.
    if errors[found] <= 8 * torch.finfo(implied.dtype).eps:
        return found
    raise UnsupportedModelError(
        f"{bridge.cfg.architecture} does not number the tokens of a prompt from 0 on, and firsttok "
        "passes such numbers; this architecture is not supported"
    )
