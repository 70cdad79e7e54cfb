"""What a view changes in a batch: made, checked for its form, and tried on the model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from firsttok.engine.traits import attention_window, is_decoder, some_tokens
from firsttok.engine.trials import Trials
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.tensors import Intervention, TokenBatch

__all__ = ["intervene", "sees_later"]


def intervene(
    bridge: Any,
    batch: TokenBatch,
    interventions: Sequence[Intervention],
    *,
    trials: Trials,
    name: str,
) -> TokenBatch:
    """Make a view's changes to a batch.

    Args:
        bridge: The bridge that will run it.
        batch: The batch without them, which is left as it is.
        interventions: The changes, in order.
        trials: What was tried on the bridge before.
        name: What the model is called.

    Raises:
        BadInputError: If an intervention returns something else than the same prompts with other
            position ids or another visibility, or one that no attention can have.
        UnsupportedModelError: If the model does not do what is asked for, found out by trial.
    """
    changed = _changed(bridge, batch, interventions)
    names = ", ".join(intervention.name for intervention in interventions)
    if changed.visible is not None:
        _check_visibility(changed, changed.visible, names)
        if not is_decoder(bridge):
            raise UnsupportedModelError(
                f"{name} is no decoder with a final norm and an unembedding, and only a "
                f"decoder's attention mask is opened or closed ({names})"
            )
        window = attention_window(bridge)
        if window is not None and changed.tokens.shape[1] > window:
            # The mask given stands for all layers, and some of this model's see no further.
            raise UnsupportedModelError(
                f"{name} attends no further back than {window} tokens in some layers, so a "
                f"mask is only opened or closed on prompts of at most as many ({names})"
            )
        if not sees_later(bridge, interventions):
            raise BadInputError(
                f"{names}: `visible` is given for some batches and not for others, and prompts "
                "without it may be cut; give it for every batch (`batch.causally_visible()`)"
            )
    reason = trials.obstacle(bridge, batch, changed)
    if reason is not None:
        raise UnsupportedModelError(
            f"{name} does not do what {names!r} asks for: {reason}; leave it out, or choose "
            "another model"
        )
    return changed


def sees_later(bridge: Any, interventions: Sequence[Intervention]) -> bool:
    """Whether interventions say what tokens attend to, so that one may see later ones."""
    if not interventions:
        return False
    batch = TokenBatch.of(some_tokens(bridge, 1, 2))
    return _changed(bridge, batch, interventions).visible is not None


def _changed(bridge: Any, batch: TokenBatch, interventions: Sequence[Intervention]) -> TokenBatch:
    """A copy of the batch after a view's changes, each of which is of the right form."""
    # An intervention may change in place what it is given.
    changed = replace(
        batch,
        tokens=batch.tokens.clone(),
        attention_mask=batch.attention_mask.clone(),
        position_ids=batch.position_ids.clone(),
        starts=batch.starts.clone(),
    )
    for intervention in interventions:
        changed = intervention(changed)
        fault = _fault(batch, changed, int(bridge.cfg.n_ctx))
        if fault is not None:
            raise BadInputError(f"the intervention {intervention.name!r} {fault}")
    return changed


def _fault(usual: TokenBatch, changed: object, max_tokens: int) -> str | None:
    """What is wrong with what an intervention returned."""
    if not isinstance(changed, TokenBatch):
        return (
            f"returned {type(changed).__name__} where a TokenBatch is needed; end it with "
            "`return dataclasses.replace(batch, ...)`"
        )
    for name in ("tokens", "attention_mask", "starts"):
        before, after = getattr(usual, name), getattr(changed, name)
        if not (_is_like(after, before.shape, before) and torch.equal(before, after)):
            return (
                f"changed the batch's {name}; let it change `position_ids` and `visible` only, "
                "since other tokens are another prompt"
            )
    shape = usual.tokens.shape
    ids: object = changed.position_ids
    if not _is_like(ids, shape, usual.position_ids):
        return f"gave position ids that are no tensor of whole numbers of shape {list(shape)}"
    if bool(((ids < 0) | (ids >= max_tokens))[usual.attention_mask.bool()].any()):
        return f"gave a position id outside 0 to {max_tokens - 1}, which is all the model has"
    shape, visible = (*shape, shape[1]), changed.visible
    if visible is not None and not _is_like(visible, shape, usual.attention_mask.bool()):
        return f"gave a `visible` that is no tensor of booleans of shape {list(shape)}"
    return None


def _is_like(found: object, shape: tuple[int, ...], other: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(found, Tensor)
        and tuple(found.shape) == tuple(shape)
        and (found.dtype, found.device) == (other.dtype, other.device)
    )


def _check_visibility(batch: TokenBatch, visible: Tensor, names: str) -> None:
    """Refuse what no attention can do: attend to nothing; and what none should: to padding."""
    real = batch.attention_mask.bool()
    blind = ~visible[real].any(1)
    padding = (visible & ~real[:, None, :])[real].any(1)
    for wrong, what in ((blind, "attends to nothing"), (padding, "attends to padding")):
        if bool(wrong.any()):
            row, column = real.nonzero()[int(wrong.nonzero()[0])].tolist()
            raise BadInputError(
                f"under {names!r} token {column - int(batch.starts[row])} of prompt {row} {what}; "
                "let every token attend to at least one real token, and to real ones only "
                "(`batch.attention_mask`)"
            )
