"""Passes of a view: its edits stand in the weights while the bridge runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from firsttok.engine import forward
from firsttok.engine import replay as replays
from firsttok.engine.tail import Replay, Tail
from firsttok.errors import UnsupportedModelError
from firsttok.models.model import Model
from firsttok.tensors import Logits, TokenBatch

__all__ = ["capture", "capture_tail", "logits"]


@torch.no_grad()
def logits(model: Model, batch: TokenBatch) -> Logits:
    """Logits of a view at every column of a batch, padding included."""
    with model.running() as bridge:
        return forward.logits(bridge, batch)


def capture(
    model: Model, batch: TokenBatch, hook_names: Sequence[str], *, stop_at_layer: int | None
) -> dict[str, Tensor]:
    """Run a view as :func:`firsttok.engine.forward.capture` does."""
    with model.running() as bridge:
        return forward.capture(bridge, batch, hook_names, stop_at_layer=stop_at_layer)


def capture_tail(
    model: Model, batch: TokenBatch, *, layer: int, cut: int = 0, replay: Replay | None = None
) -> Tail:
    """Run a view as :func:`firsttok.engine.replay.capture_tail` does.

    With ``replay=None`` the least that is right for this model is run again.

    Raises:
        UnsupportedModelError: If the model is no decoder with a final norm and an unembedding.
        LayerOutOfRangeError: If there is no such layer.
    """
    model.site(layer)
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is not a decoder with a final norm and an unembedding; "
            "only such models can be edited"
        )
    mode = model.replay if replay is None else replay
    with model.running() as bridge:
        return replays.capture_tail(bridge, batch, layer=layer, cut=cut, replay=mode)
