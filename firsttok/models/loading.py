"""Load a model by name, hub id or folder, as a TransformerBridge with checked edit sites."""

import contextlib
import copy
import hashlib
import logging
import warnings
from collections.abc import Generator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from firsttok.errors import (
    BadInputError,
    LayerOutOfRangeError,
    NonFiniteError,
    UnknownModelError,
    UnsupportedModelError,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.models.catalog import CATALOG, ModelSpec, find_spec
from firsttok.models.embedded import embedded_folder
from firsttok.models.recipes import find_recipe
from firsttok.models.sites import EditSite, find_sites
from firsttok.tensors import Intervention

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BosPolicy", "Model", "load", "quiet_libraries"]

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class BosPolicy(str, Enum):
    """Whether prompts begin with the tokenizer's BOS token."""

    AS_TOKENIZER = "as_tokenizer"
    """What the tokenizer does by itself when it encodes text."""
    WITH = "with"
    """Always, also if the tokenizer would not."""
    WITHOUT = "without"
    """Never; on Llama-like models this makes the subject the first token (Appendix A.2)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A TransformerBridge with its checked edit sites and a visible BOS policy."""

    name: str
    """Name, hub id or folder it was loaded by."""
    source: str
    """Where the weights came from: hub id and commit, folder name, or wheel."""
    bridge: "TransformerBridge"
    """TransformerLens's view of the model; hooks, ``run_with_cache`` and all else work on it."""
    tokenizer: "PreTrainedTokenizerBase"
    """The model's own tokenizer."""
    sites: tuple[EditSite, ...]
    """Every edit site, checked."""
    bos: BosPolicy
    """The BOS policy of every prompt made for this model."""
    default_layer: int
    """Layer that is edited unless another one is asked for."""
    hyperparameters: Hyperparameters
    """Settings of the value optimisation unless others are given."""
    fingerprint: str
    """SHA-256 over names, shapes and bytes of all weights as loaded."""
    interventions: tuple[Intervention, ...] = ()
    """Changes made to every batch of this view, in order."""

    @property
    def label(self) -> str:
        """The name as tables and provenance show it: of a folder, only its own name."""
        is_path = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1
        return Path(self.name).name if is_path else self.name

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.sites[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.sites[0].weight.dtype

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether there is an encoder beside the decoder (T5)."""
        return any(site.stack != "blocks" for site in self.sites)

    @property
    def can_be_edited(self) -> bool:
        """Whether this is a decoder whose upper layers can be replayed (see ``capture_tail``)."""
        parts = ("blocks", "ln_final", "unembed")
        causal = self.bridge.cfg.attention_dir == "causal" and not self.is_encoder_decoder
        return causal and all(hasattr(self.bridge, part) for part in parts)

    @property
    def position_embedding(self) -> str:
        """``learned``, ``rotary`` or another name of TransformerLens's configuration."""
        kind = str(self.bridge.cfg.positional_embedding_type)
        return "learned" if kind == "standard" else kind

    @property
    def max_tokens(self) -> int:
        """Most tokens of one prompt."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def n_layers(self) -> int:
        """Number of layers of the first stack."""
        return sum(site.stack == self.sites[0].stack for site in self.sites)

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Token ids every prompt begins with under the BOS policy.

        Raises:
            BadInputError: If a BOS token is asked for and the tokenizer has none.
        """
        if self.bos is BosPolicy.WITHOUT:
            return ()
        tokenizer: Any = self.tokenizer
        if self.bos is BosPolicy.AS_TOKENIZER:
            bare = len(tokenizer("a", add_special_tokens=False)["input_ids"])
            ids: list[int] = tokenizer("a")["input_ids"]
            special = set(tokenizer.all_special_ids)
            count = next((i for i, token in enumerate(ids) if token not in special), len(ids))
            return tuple(ids[: min(count, len(ids) - bare)])
        bos = tokenizer.bos_token_id
        if bos is None:
            bos = tokenizer.cls_token_id
        if bos is None:
            raise BadInputError(f"the tokenizer of {self.name} has no BOS token; use --bos without")
        return (int(bos),)

    @property
    def trailing_ids(self) -> tuple[int, ...]:
        """Token ids every prompt ends in: what an encoder's tokenizer appends ([SEP], </s>).

        They are there under every BOS policy, since that is the text an encoder was trained on. A
        decoder goes on where its prompt ends, and has none.
        """
        if self.can_be_edited:
            return ()
        tokenizer: Any = self.tokenizer
        bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        ids: list[int] = tokenizer("a")["input_ids"]
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return tuple(ids[start + len(bare) :])
        return ()

    def site(self, layer: int | None = None, *, stack: str | None = None) -> EditSite:
        """Return the edit site of a layer.

        Args:
            layer: Layer number from 0; None for the model's default layer.
            stack: ``encoder_blocks`` or ``decoder_blocks`` on encoder-decoders; None for the first.

        Raises:
            LayerOutOfRangeError: If there is no such layer.
        """
        layer = self.default_layer if layer is None else layer
        stack = self.sites[0].stack if stack is None else stack
        for site in self.sites:
            if site.layer == layer and site.stack == stack:
                return site
        raise LayerOutOfRangeError(
            f"{self.name} has no layer {layer}; choose one from 0 to {self.n_layers - 1}"
        )

    def with_bos(self, bos: BosPolicy) -> "Model":
        """Return the same weights under another BOS policy."""
        return replace(self, bos=bos)

    def intervened(self, *interventions: Intervention) -> "Model":
        """Return the same weights in a view that changes every batch before it is run.

        Args:
            interventions: The changes, made in order after those of this view.
        """
        return replace(self, interventions=(*self.interventions, *interventions))


def load(
    name: str = "smollm2-135m",
    *,
    bos: BosPolicy | str = BosPolicy.AS_TOKENIZER,
    dtype: str = "float32",
    device: str = "cpu",
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
    if dtype not in DTYPES:
        raise BadInputError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    try:
        policy = BosPolicy(bos)
    except ValueError:
        choices = ", ".join(policy.value for policy in BosPolicy)
        raise BadInputError(f"BOS policy {bos!r} is unknown; choose from {choices}") from None
    _check_device(device)
    spec = find_spec(name)
    path, revision, source = _locate(name, spec)
    with quiet_libraries():
        hf_model, tokenizer = _load_files(path, revision, DTYPES[dtype], name)
        movable: Any = hf_model.requires_grad_(False).eval()
        movable.to(torch.device(device))
        fingerprint = _fingerprint(hf_model)
        bridge = _bridge(hf_model, tokenizer, name)
        sites = find_sites(bridge)
    layers = sum(site.stack == sites[0].stack for site in sites)
    return Model(
        name=name,
        source=source,
        bridge=bridge,
        tokenizer=tokenizer,
        sites=sites,
        bos=policy,
        default_layer=spec.layer if spec and spec.layer is not None else layers // 2,
        hyperparameters=spec.hyperparameters if spec else Hyperparameters(),
        fingerprint=fingerprint,
    )


@contextlib.contextmanager
def quiet_libraries() -> Generator[None, None, None]:
    """Keep warnings and progress bars of other libraries off the terminal."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    hub_verbosity = hub_logging.get_verbosity()
    root_level = logging.getLogger().level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # TransformerLens warns through the root logger.
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        logging.getLogger().setLevel(root_level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BadInputError(f"device {device!r} is unknown; use cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInputError("device 'cuda' is not available on this machine; use --device cpu")


def _locate(name: str, spec: ModelSpec | None) -> tuple[str, str | None, str]:
    recipe = find_recipe(spec.name) if spec is not None else None
    if recipe is not None:
        return str(embedded_folder(recipe.name)), None, recipe.source
    if spec is not None and spec.hub_id is not None:
        return spec.hub_id, spec.revision, f"{spec.hub_id}@{spec.revision}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownModelError(f"{folder} holds no config.json; give a model's folder")
        return str(folder), None, folder.resolve().name
    hub_id, _, revision = name.partition("@")
    if hub_id.count("/") == 1 and not name.startswith((".", "/", "~")):
        if not revision:
            revision = _newest_revision(hub_id)
            logger.info("%s: pinned to commit %s for this run", hub_id, revision)
        return hub_id, revision, f"{hub_id}@{revision}"
    known = ", ".join(entry.name for entry in CATALOG)
    raise UnknownModelError(
        f"no model is called {name!r} and no folder lies there; "
        f"choose one of {known}, a hub id or a folder"
    )


def _newest_revision(hub_id: str) -> str:
    from huggingface_hub import HfApi

    try:
        revision = HfApi().model_info(hub_id, timeout=20).sha
    except Exception as error:
        raise UnknownModelError(_hub_trouble(hub_id, error)) from None
    if revision is None:
        raise UnknownModelError(f"the hub names no commit of {hub_id}; give {hub_id}@COMMIT")
    return revision


def _hub_trouble(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"{name} cannot be loaded from the hub ({type(error).__name__}: "
        f"{reason[0] if reason else 'no reason given'}); check the name, your network and, for a "
        "gated model, your access, or give the folder of a copy"
    )


def _load_files(
    path: str, revision: str | None, dtype: torch.dtype, name: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import transformers
    from safetensors import SafetensorError

    local = Path(path).is_dir()
    options: dict[str, Any] = {"revision": revision} if revision else {}
    options |= {"trust_remote_code": False, "local_files_only": local}
    try:
        config: Any = transformers.AutoConfig.from_pretrained(path, **options)
        architectures: list[str] = config.architectures or []
        auto: Any = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = transformers.AutoModelForSeq2SeqLM
        elif any(text.endswith("MaskedLM") for text in architectures):
            auto = transformers.AutoModelForMaskedLM
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **options)
        hf_model: Any = auto.from_pretrained(
            path, dtype=dtype, use_safetensors=True, attn_implementation="eager", **options
        )
    except SafetensorError as error:
        raise BadInputError(
            f"the weights of {name} are not a complete safetensors file ({error}); fetch them again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        if local:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise BadInputError(f"{path} cannot be loaded as a model: {reason}") from None
        raise UnknownModelError(_hub_trouble(name, error)) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"the tokenizer of {name} gives no character offsets; add its tokenizer.json"
        )
    return hf_model, tokenizer


def _fingerprint(hf_model: "PreTrainedModel") -> str:
    digest = hashlib.sha256()
    for key, weight in sorted(hf_model.state_dict().items()):
        if weight.is_floating_point() and not bool(torch.isfinite(weight.sum(dtype=torch.float64))):
            raise NonFiniteError(
                f"weight {key} holds NaN or infinity; the model file is damaged, fetch it again"
            )
        digest.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
        plain = weight.detach().cpu().contiguous().view(torch.uint8) if weight.ndim else weight
        digest.update(memoryview(plain.numpy().reshape(-1)))
    return digest.hexdigest()


def _bridge(hf_model: "PreTrainedModel", tokenizer: Any, name: str) -> "TransformerBridge":
    from transformer_lens.model_bridge import TransformerBridge

    # TransformerLens would load the tokenizer anew with BOS switched on; this copy says that has
    # been done, so that its own to_tokens follows the tokenizer the user loaded.
    lens_tokenizer: Any = copy.deepcopy(tokenizer)
    lens_tokenizer.init_kwargs["add_bos_token"] = True
    lens_tokenizer.init_kwargs.setdefault("name_or_path", name)
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
    if hf_model.dtype == torch.float64:
        # The softmax runs in float32, where float64's mask value is minus infinity, and the row of
        # a padded token, masked everywhere, becomes NaN.
        def finite(scores: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            return scores.clamp_min(torch.finfo(torch.float32).min)

        for point in [name for name in bridge.hook_dict if name.endswith("hook_attn_scores")]:
            bridge.add_hook(point, finite, is_permanent=True)
    return bridge
