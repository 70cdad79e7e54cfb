"""A loaded model: its bridge, tokenizer and edit sites, and what a view of it changes."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.errors import LayerOutOfRangeError
from firsttok.hyperparameters import Hyperparameters
from firsttok.models.bos import BosPolicy, leading_ids, trailing_ids
from firsttok.models.fusibility import is_fusible
from firsttok.models.replay import find_replay
from firsttok.models.sites import EditSite
from firsttok.models.tail import Replay
from firsttok.options import model_label
from firsttok.tensors import Intervention

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

__all__ = ["Model"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Model(Shown):
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
        return model_label(self.name)

    @property
    def origin(self) -> dict[str, Any]:
        """What an object made with this view says about it: name, weights, BOS, changes."""
        return {
            "model": self.label,
            "weights": short_hash(self.fingerprint),
            "BOS": self.bos.value,
            "view": ", ".join(change.name for change in self.interventions),
        }

    def panel(self) -> Panel:
        """The model at a glance."""
        site = self.site(self.default_layer)
        lines = [
            ["layers", self.n_layers],
            ["layer edited by default", self.default_layer],
            ["width of the residual stream", site.d_model],
            ["width of a key", site.d_mlp],
            ["position embedding", self.position_embedding],
            ["tokens put before a prompt", str(list(self.leading_ids) or "none")],
            ["can be edited", self.can_be_edited],
            ["type and device", f"{str(self.dtype).removeprefix('torch.')}, {self.device}"],
        ]
        table = Table(columns=("", "value"), lines=lines)
        return Panel(
            title=self.label, parts=[table], source=self.origin | {"loaded from": self.source}
        )

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.sites[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.sites[0].weight.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """Type that keys, deltas and changes are computed in: float32 for 16-bit weights."""
        return torch.promote_types(self.dtype, torch.float32)

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

    @cached_property
    def replay(self) -> Replay:
        """How much has to run again after a change at one layer, found by trial on first use."""
        return find_replay(self)

    @property
    def runs_packed(self) -> bool:
        """Whether replays run no padding: blocks are as in Llama, and no hook is on them."""
        bridge: Any = self.bridge
        return self.replay is Replay.ABOVE and is_fusible(list(bridge.blocks))

    @property
    def position_embedding(self) -> str:
        """``learned``, ``rotary`` or another name of TransformerLens's configuration."""
        kind = str(self.bridge.cfg.positional_embedding_type)
        return "learned" if kind == "standard" else kind

    @property
    def attention_window(self) -> int | None:
        """How far back a token sees at most in some layers (Mistral, Gemma); None without limit."""
        config: Any = self.bridge.original_model.config
        window = getattr(config.get_text_config(), "sliding_window", None)
        return None if window is None else int(window)

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
        return leading_ids(self.tokenizer, self.bos, self.name)

    @property
    def trailing_ids(self) -> tuple[int, ...]:
        """Token ids every prompt ends in: what an encoder's tokenizer appends ([SEP], </s>).

        They are there under every BOS policy, since that is the text an encoder was trained on. A
        decoder goes on where its prompt ends, and has none.
        """
        return () if self.can_be_edited else trailing_ids(self.tokenizer)

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
        return self._view(replace(self, bos=bos))

    def intervened(self, *interventions: Intervention) -> "Model":
        """Return the same weights in a view that changes every batch before it is run.

        Args:
            interventions: The changes, made in order after those of this view.
        """
        return self._view(replace(self, interventions=(*self.interventions, *interventions)))

    def _view(self, view: "Model") -> "Model":
        # The trial was made on the same weights, whatever the view.
        if "replay" in vars(self):
            vars(view)["replay"] = self.replay
        return view
