"""The plain twin of a view: the model as Hugging Face's transformers has it."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from firsttok.arguments import taken
from firsttok.errors import UnsupportedModelError
from firsttok.models.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EXPORT_RECORD", "checkpoint_of", "plain_model"]

EXPORT_RECORD = "firsttok.json"
"""File of an exported folder that says which edits are in its weights."""


def checkpoint_of(model: Model) -> dict[str, Tensor]:
    """Return every tensor of a view by its name in the checkpoint, edits included.

    Nothing is copied but the weights that the view's edits change.

    Args:
        model: The model, or a view of it; interventions are no part of a checkpoint.

    Raises:
        UnsupportedModelError: If something was changed that a checkpoint does not hold, or the
            bridge holds a tensor of the checkpoint in pieces only.
    """
    if model.weights.taken_apart:
        raise UnsupportedModelError(
            f"TransformerLens keeps {model.weights.taken_apart[0]} of {model.name} in pieces only, "
            "so that firsttok has no checkpoint of it; export from another architecture"
        )
    lost = model.weights.lost()
    if lost:
        raise UnsupportedModelError(
            f"{lost[0]} of {model.name} was changed in TransformerLens's own copy, which the "
            "checkpoint does not hold; change the weight that it was made from"
        )
    edited = {
        id(model.weights.sites[place].weight): place for e in model.edits for place in e.places
    }
    found: dict[str, Tensor] = {}
    for name, tensor in model.weights.checkpoint.items():
        place = edited.get(id(tensor))
        if place is None:
            found[name] = tensor.detach()
        else:
            found[name] = model.site_at(place).weight.detach()
    return found


def _parameters(model: Model) -> dict[str, Tensor]:
    """The checkpoint's tensors, tied ones as one and the same parameter."""
    loaded, own = model.weights.checkpoint, dict[int, nn.Parameter]()
    found: dict[str, Tensor] = {}
    for name, tensor in checkpoint_of(model).items():
        if isinstance(loaded[name], nn.Parameter):
            fresh = nn.Parameter(tensor, requires_grad=False)
            found[name] = own.setdefault(id(loaded[name]), fresh)
        else:
            found[name] = tensor
    return found


@taken
def plain_model(model: Model) -> "PreTrainedModel":
    """Return the Hugging Face model on the same tensors, the edits of a view in its weights.

    It shares memory with the model it is made from, so that a change in place changes both. What an
    edit changes is a tensor of its own.

    Args:
        model: The model, or a view of it.

    Returns:
        The model in evaluation mode, its weights frozen.

    Raises:
        UnsupportedModelError: If something was changed that a checkpoint does not hold, or if
            transformers needs more than the checkpoint to make the model.
    """
    loaded: Any = model.weights.bridge.original_model
    with torch.device("meta"):
        twin: Any = type(loaded)(copy.deepcopy(loaded.config))
    twin.load_state_dict(_parameters(model), assign=True)
    # No checkpoint holds them: transformers computes them from the configuration.
    buffers = {name.replace("_original_component.", ""): b for name, b in loaded.named_buffers()}
    for name, buffer in list(twin.named_buffers()):
        if buffer.is_meta:
            owner, _, own = name.rpartition(".")
            twin.get_submodule(owner)._buffers[own] = buffers.get(name)
    if any(
        t is None or t.is_meta for t in (*twin.parameters(), *dict(twin.named_buffers()).values())
    ):
        raise UnsupportedModelError(
            f"{loaded.config.model_type} keeps something that is in no checkpoint, and firsttok "
            f"cannot make a plain copy of {model.name}"
        )
    if getattr(loaded, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(loaded.generation_config)
    plain: PreTrainedModel = twin.eval().requires_grad_(False)
    return plain
