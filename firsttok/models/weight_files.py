"""What a checkpoint must hold to be loaded: one model, all of it, and nothing that is left out."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from firsttok.errors import CheckpointError
from firsttok.storage import read_json

__all__ = ["adapter_trouble", "check_config", "check_files", "check_format", "check_weights"]

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_IDLE = re.compile(
    # Buffers that older versions of transformers saved; today they follow from the configuration.
    r"\.(attn|attention|self_attn)\.(masked_)?bias$|\.causal_mask$|embed_positions\.weights$"
    r"|(^|\.)position_ids$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    # Parts that read what the language model computes, or feed it with what is no text.
    r"|(^|\.)(pooler|seq_relationship|score|classifier|qa_outputs|v_head|mtp|visual|vision_model"
    r"|vision_tower|audio_tower|multi_modal_projector)\."
)
"""Weights that a checkpoint may hold though the model has no place for them."""


def check_files(folder: Path) -> None:
    """Check that a folder holds one model and all of it, before weights are read.

    Raises:
        CheckpointError: If it holds an adapter, no weights, weights twice or in another format than
            safetensors, or an index of files that are lacking.
        SafetensorError: If one of several files is not a safetensors file.
    """
    check_format(folder)
    whole, index = folder / _WHOLE, folder / _INDEX
    if index.exists():
        if whole.exists():
            raise CheckpointError(
                f"{folder} holds its weights twice, in {_WHOLE} and in the files of {_INDEX}; move "
                "those away that are not meant"
            )
        _check_index(folder, index)
    elif not whole.exists():
        raise CheckpointError(
            f"{folder} holds no weights ({_WHOLE}); give a complete model's folder"
        )


def check_format(folder: Path) -> None:
    """Check that a folder holds no adapter, and its weights not in another format alone.

    Raises:
        CheckpointError: If it holds an adapter, or weights in another format alone.
    """
    for name in _ADAPTERS:
        if (folder / name).exists():
            raise CheckpointError(adapter_trouble(folder, name))
    if any(folder.glob("*.safetensors")):
        return
    for pattern, what in (("*.gguf", "GGUF"), ("*.bin", "pickled"), ("*.pt*", "pickled")):
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            raise CheckpointError(
                f"{folder} holds {what} weights ({found[0]}), which firsttok does not read; "
                "convert them to safetensors with save_pretrained"
            )


def adapter_trouble(place: str | Path, file: str) -> str:
    """The sentence for a checkpoint with an adapter, which would be left out without a word."""
    return (
        f"{place} holds an adapter ({file}), which firsttok does not apply; merge it into the "
        "weights (peft: merge_and_unload, save_pretrained), or give a copy without it to look at "
        "the model that it was made for"
    )


def check_config(config: Any, name: str) -> None:
    """Check that a configuration is of weights that can be edited.

    Args:
        config: The configuration.
        name: Name of the model, for the message.

    Raises:
        CheckpointError: If the weights are quantised.
    """
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        given: Any = quantised if isinstance(quantised, Mapping) else vars(quantised)
        raise CheckpointError(
            f"the weights of {name} are quantised ({given.get('quant_method', 'unknown method')}), "
            "and a quantised weight cannot be edited; give the checkpoint that they were made from"
        )


def check_weights(info: Mapping[str, Any], name: str) -> None:
    """Check that every weight of a model came from its checkpoint, and that none was left over.

    Args:
        info: What ``from_pretrained(..., output_loading_info=True)`` says; tied weights and those
            that transformers knows to ignore are not in it.
        name: Name of the model, for the message.

    Raises:
        CheckpointError: If a weight is lacking, of another shape, or has no place in the model.
    """
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise CheckpointError(
            f"the checkpoint of {name} lacks {_some(lacking)}, which would be random numbers; "
            "fetch it again, or give one with all weights, those of the language-modelling head too"
        )
    shapes = sorted(
        f"{key} ({list(found)} where the configuration wants {list(wanted)})"
        for key, found, wanted in info["mismatched_keys"]
    )
    if shapes:
        raise CheckpointError(
            f"the checkpoint of {name} has another shape at {_some(shapes)}; give the config.json "
            "that belongs to the weights"
        )
    over = sorted(key for key in info["unexpected_keys"] if _IDLE.search(key) is None)
    if over:
        raise CheckpointError(
            f"the checkpoint of {name} holds {_some(over)}, for which the model of its config.json "
            "has no place; give the config.json that belongs to the weights"
        )


def _check_index(folder: Path, index: Path) -> None:
    from safetensors import safe_open

    content = read_json(index, "names of weights")
    try:
        named = sorted({str(name) for name in content["weight_map"].values()})
        sound = isinstance(content["metadata"], dict) and bool(named)
    except (AttributeError, KeyError, TypeError):
        sound, named = False, []
    # A file elsewhere is not this model's, whatever the index says.
    if not sound or any(Path(name).name != name for name in named):
        raise CheckpointError(
            f"{index} is not an index of the weights in its folder; fetch it again"
        )
    lacking = [name for name in named if not (folder / name).is_file()]
    if lacking:
        raise CheckpointError(
            f"{folder} lacks {_some(lacking, 'file')} that {_INDEX} names; fetch the model again"
        )
    holder: dict[str, str] = {}
    for name in named:
        with safe_open(folder / name, framework="pt") as file:
            for weight in file.keys():  # noqa: SIM118
                if weight in holder:
                    raise CheckpointError(
                        f"{folder} holds the weight {weight} twice, in {holder[weight]} and "
                        f"{name}; fetch the model again"
                    )
                holder[weight] = name


def _some(names: Collection[str], what: str = "weight") -> str:
    """The first of some names, and how many more there are."""
    first, *more = names
    rest = f" and {len(more)} more" if more else ""
    return f"the {what} {first}{rest}"
