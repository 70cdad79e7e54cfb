"""Load a model by name, hub id or folder, as a TransformerBridge with checked edit sites."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from firsttok.arguments import taken
from firsttok.engine.norms import skip_idle_hooks
from firsttok.engine.traits import find_first_position
from firsttok.errors import (
    BadInputError,
    CheckpointError,
    FirsttokError,
    UnknownModelError,
    UnsupportedModelError,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.models.bos import BosPolicy
from firsttok.models.catalog import find_spec
from firsttok.models.disturbance import Baseline
from firsttok.models.fingerprint import hash_weights, tensor_hash
from firsttok.models.libraries import collection_paused, quiet_libraries
from firsttok.models.location import Location, hub_file, hub_trouble, locate, reason_of
from firsttok.models.model import Model
from firsttok.models.plain import EXPORT_RECORD
from firsttok.models.sites import find_inner_sites, find_sites
from firsttok.models.weight_files import adapter_trouble, check_config, check_files, check_weights
from firsttok.models.weights import Weights, checkpoint_tensors
from firsttok.option_values import check_device_name
from firsttok.storage import read_record

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_device", "load"]

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@taken
def load(
    name: str | Path = "smollm2-135m",
    *,
    bos: BosPolicy | str = BosPolicy.AS_TOKENIZER,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> Model:
    """Load a model and check its edit sites.

    Args:
        name: A name of the catalog, a hub id (``org/name`` or ``org/name@revision``), or a folder
            with ``config.json``, safetensors and a tokenizer.
        bos: The BOS policy of prompts.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The model in evaluation mode, its weights frozen.

    Raises:
        UnknownModelError: If nothing goes by the name.
        DownloadError: If a model of the package index cannot be fetched.
        UnsupportedModelError: If the architecture has no edit sites.
        NonFiniteError: If a weight is NaN or infinite.
        BadInputError: If dtype, device or files are unusable.
    """
    name, device, dtype = str(name), str(device), str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadInputError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    try:
        policy = BosPolicy(bos)
    except ValueError:
        choices = ", ".join(policy.value for policy in BosPolicy)
        raise BadInputError(f"BOS policy {bos!r} is unknown; choose from {choices}") from None
    check_device(device)
    spec = find_spec(name)
    location = locate(name, spec)
    with collection_paused(), quiet_libraries():
        hf_model, tokenizer = _load_files(location, DTYPES[dtype], name)
        movable: Any = hf_model.eval()
        movable.to(torch.device(device))
        with ThreadPoolExecutor(max_workers=1) as beside:
            # Hashing holds no lock, so it costs no time beside an import. It has to be done before
            # the bridge is made, which puts its own parts into the model.
            hashed = beside.submit(hash_weights, hf_model)
            import_module("transformer_lens.model_bridge")
            lens_tokenizer = _lens_tokenizer(tokenizer, name)
            written = _written(location, hf_model)
            hashes = hashed.result()
        bridge = _bridge(hf_model, lens_tokenizer, name)
        sites = find_sites(bridge)
        inner = find_inner_sites(bridge, sites, checkpoint_tensors(bridge, hashes).values())
        numbered = sites[0].stack == "blocks"
        first_position = find_first_position(bridge) if numbered else 0
    layers = sum(site.stack == sites[0].stack for site in sites)
    if written is None:
        logger.warning(
            "%s was changed since firsttok exported it, so its %s says nothing about its weights",
            name,
            EXPORT_RECORD,
        )
    return Model(
        name=name,
        source=location.source,
        weights=Weights(bridge, (*sites, *inner), hashes),
        baseline=Baseline.of(bridge),
        tokenizer=tokenizer,
        sites=sites,
        bos=policy,
        default_layer=spec.layer if spec and spec.layer is not None else layers // 2,
        hyperparameters=spec.hyperparameters if spec else Hyperparameters(),
        spread=spec.spread if spec else None,
        first_position=first_position,
        written=written or (),
    )


def _written(location: Location, hf_model: "PreTrainedModel") -> tuple[str, ...] | None:
    """Titles of the edits that firsttok exported with the weights; None if these are others now."""
    path = Path(location.path) / EXPORT_RECORD
    if not location.is_local or not path.exists():
        return ()
    record = read_record(path, "the record of an exported model")
    state = hf_model.state_dict()
    saved = DTYPES[record["dtype"]]
    for weight, digest in record["weights"].items():
        if tensor_hash(state[weight].to(saved)) != digest:
            return None
    titles = tuple(edit["title"] for edit in record["model"]["edits"])
    return (*record["model"].get("written", ()), *titles)


def check_device(device: str) -> None:
    """Refuse a device that is not supported, or not here.

    Raises:
        BadInputError: If it is neither ``cpu`` nor a GPU of this machine.
    """
    check_device_name(device)
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise BadInputError(f"device {device!r} is not available on this machine; use cpu")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise BadInputError(
            f"device {device!r} is not on this machine, whose last one is cuda:{count - 1}"
        )


def _load_files(
    location: Location, dtype: torch.dtype, name: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import transformers
    from safetensors import SafetensorError

    path, local = location.path, location.is_local
    options: dict[str, Any] = {"revision": location.revision} if location.revision else {}
    options |= {"trust_remote_code": False, "local_files_only": local}
    try:
        if local:
            check_files(Path(path))
        elif hub_file(location, "adapter_config.json") is not None:
            raise CheckpointError(adapter_trouble(name, "adapter_config.json"))
        config: Any = transformers.AutoConfig.from_pretrained(path, **options)
        check_config(config, name)
        architectures: list[str] = config.architectures or []
        auto: Any = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = transformers.AutoModelForSeq2SeqLM
        elif any(text.endswith("MaskedLM") for text in architectures):
            auto = transformers.AutoModelForMaskedLM
        tokenizer = _load_tokenizer(path, options, name)
        hf_model: Any
        hf_model, info = auto.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
            **options,
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights of {name} are not a complete safetensors file ({error}); fetch them again"
        ) from None
    except (FirsttokError, MemoryError):
        raise
    except Exception as error:  # a library's, over files that it cannot make sense of
        if local:
            raise CheckpointError(
                f"{path} cannot be loaded as a model ({reason_of(error)}); give a folder as "
                "save_pretrained of model and tokenizer leaves it"
            ) from None
        raise UnknownModelError(hub_trouble(name, error)) from None
    check_weights(info, name)
    # The bridge goes by what the file says, which may be another class than was loaded.
    hf_model.config.architectures = [type(hf_model).__name__]
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"the tokenizer of {name} gives no character offsets; add its tokenizer.json"
        )
    return hf_model, tokenizer


def _load_tokenizer(path: str, options: dict[str, Any], name: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        folder = Path(path)
        if not folder.is_dir():
            raise
        there = (folder / "tokenizer.json").is_file()
        reason = reason_of(error) if there else "the folder holds no tokenizer.json"
        raise CheckpointError(
            f"the tokenizer of {name} cannot be loaded ({reason}); save it there again, with "
            "save_pretrained of a fast tokenizer"
        ) from None


def _lens_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str) -> Any:
    """A copy of the tokenizer for TransformerLens, which may change it."""
    # TransformerLens would load the tokenizer anew with BOS switched on; this copy says that has
    # been done, so that its own to_tokens follows the tokenizer the user loaded.
    copied: Any = copy.deepcopy(tokenizer)
    copied.init_kwargs["add_bos_token"] = True
    copied.init_kwargs.setdefault("name_or_path", name)
    return copied


def _bridge(hf_model: "PreTrainedModel", lens_tokenizer: Any, name: str) -> "TransformerBridge":
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridge = TransformerBridge.boot_transformers(
            f"firsttok/{name}", hf_model=hf_model, tokenizer=lens_tokenizer
        )
    except ValueError as error:
        reason = str(error).split(". Available")[0]
        raise UnsupportedModelError(
            f"TransformerLens does not support {name} ({reason}); "
            "choose an architecture of its TransformerBridge"
        ) from None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UnsupportedModelError(
            f"TransformerLens cannot take {name} apart ({type(error).__name__}: {reason}); "
            "choose another variant of the architecture"
        ) from None
    # Not before: of GPT-2's queries, keys and values the bridge makes weights of its own.
    bridge.requires_grad_(False)
    skip_idle_hooks(bridge)
    if hf_model.dtype == torch.float64:
        # The softmax runs in float32, where float64's mask value is minus infinity, and the row of
        # a padded token, masked everywhere, becomes NaN.
        def finite(scores: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            return scores.clamp_min(torch.finfo(torch.float32).min)

        for point in [name for name in bridge.hook_dict if name.endswith("hook_attn_scores")]:
            bridge.add_hook(point, finite, is_permanent=True)
    return bridge
