"""MEMIT and its relatives: many facts at once, written into several layers.

A target z for the residual stream behind the last edited layer is optimised for every fact. Then
each layer in turn, from the lowest on, is given its share of what is missing, by a closed form in
the keys K of all facts: MEMIT's (Meng et al. 2023), EMMET's (Gupta et al. 2024) or AlphaEdit's
(Fang et al. 2025).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import take_fields
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit
from firsttok.editing.methods import Slot
from firsttok.editing.record import edit_record
from firsttok.editing.value import optimise_values
from firsttok.engine.traits import RESIDUAL
from firsttok.errors import BadInputError, EditMismatchError, NonFiniteError
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import keys_of_facts
from firsttok.models import Model, capture
from firsttok.prompts import batches, fact_prompt, pad, positions
from firsttok.second_moment import SecondMoment
from firsttok.tensors import ValueMatrix

__all__ = ["AlphaEditRule", "EmmetRule", "MemitEditor", "MemitRule", "SpreadRule"]

_MAX_TOKENS = 4096
KeyColumns = Float[Tensor, "d_mlp fact"]


@runtime_checkable
class SpreadRule(Protocol):
    """The closed form of one layer: the update is ``left @ R^T`` for residuals R."""

    @property
    def name(self) -> str:
        """Name in records."""
        ...

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: Float[Tensor, "d_mlp d_mlp"] | None
    ) -> KeyColumns:
        """Return the left factor.

        Args:
            keys: K, in float64.
            moment: C.
            earlier: Sum of ``k k^T`` over the facts that were written before; None for none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class MemitRule:
    """``(lambda C + M + K K^T)^-1 K`` (Meng et al. 2023, Equation 14).

    M is what an editor remembers of earlier facts; the released MEMIT remembers nothing.
    """

    weight: float = 15_000.0
    """lambda: how many pretended tokens C stands for."""
    name: str = "memit"

    __post_init__ = take_fields

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: Float[Tensor, "d_mlp d_mlp"] | None
    ) -> KeyColumns:
        """As :meth:`SpreadRule.left`."""
        held = self.weight * moment.matrix.to(keys)
        held = held if earlier is None else held + earlier
        return torch.linalg.solve(held + keys @ keys.T, keys)


@dataclass(frozen=True, kw_only=True)
class EmmetRule:
    """``C^-1 K (K^T C^-1 K)^-1``: every key is mapped to its value exactly (Gupta et al. 2024)."""

    name: str = "emmet"

    __post_init__ = take_fields

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: Float[Tensor, "d_mlp d_mlp"] | None
    ) -> KeyColumns:
        """As :meth:`SpreadRule.left`."""
        held = moment.matrix.to(keys)
        held = held if earlier is None else held + earlier
        towards = torch.linalg.solve(held, keys)
        return torch.linalg.solve(keys.T @ towards, towards.T).T


@dataclass(frozen=True, kw_only=True)
class AlphaEditRule:
    """``(P (K K^T + M) + ridge I)^-1 P K``, with P onto what C hardly holds (Fang et al. 2025).

    P projects onto the eigenvectors of C whose eigenvalue is below the threshold, so that keys of
    ordinary text are mapped as before.
    """

    threshold: float = 2e-2
    ridge: float = 10.0
    name: str = "alphaedit"

    __post_init__ = take_fields

    def projector(self, moment: SecondMoment) -> Float[Tensor, "d_mlp d_mlp"]:
        """P of a layer, in float64."""
        values, vectors = torch.linalg.eigh(moment.matrix)
        kept = vectors[:, values < self.threshold]
        return kept @ kept.T

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: Float[Tensor, "d_mlp d_mlp"] | None
    ) -> KeyColumns:
        """As :meth:`SpreadRule.left`."""
        projector = self.projector(moment).to(keys)
        held = keys @ keys.T
        held = projector @ (held if earlier is None else held + earlier)
        held.diagonal().add_(self.ridge)
        return torch.linalg.solve(held, projector @ keys)


@dataclass(frozen=True, kw_only=True, eq=False)
class MemitEditor:
    """MEMIT, or another rule in its place: any number of facts, several layers.

    The slots are as released; with another key in them it is a consistent variant. Prefixed keys
    and states are means over the contexts that have a prefix.

    Raises:
        BadInputError: If a layer has no second moment, or the layers are not in order.
    """

    contexts: ContextSet
    """Contexts of z, the bare one among them; those with a prefix also make the prefixed keys."""
    second_moments: Mapping[int, SecondMoment]
    """C of each layer."""
    layers: tuple[int, ...]
    """Layers to edit, in order; z belongs to the last one."""
    rule: SpreadRule = field(default_factory=MemitRule)
    """The closed form of each layer."""
    hyperparameters: Hyperparameters | None = None
    """Settings of the optimisation of z; None for the model's own."""
    keys: Slot | None = None
    """Which keys K holds; None for half the bare one and half the prefixed ones', as released."""
    anchor: Slot = Slot.UNPREFIXED
    """What delta is added to: the residual stream of the bare prompt, or of the prefixed ones."""
    residual: Slot = Slot.UNPREFIXED
    """Whose residual stream is taken from z."""
    name: str = "memit"
    label: str = "MEMIT"
    remembers: bool = False
    """Whether facts that stand in the model, written by an editor of the same name, are kept."""

    def __post_init__(self) -> None:
        """Check the layers."""
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise BadInputError(
                f"the layers are {list(self.layers)}; give each once, from the lowest on"
            )
        for layer in self.layers:
            if layer not in self.second_moments:
                raise BadInputError(f"layer {layer} has no second moment; give one for each layer")
        if "{}" not in self.contexts.templates:
            raise BadInputError("the contexts lack the bare prompt; let {} be among them")

    def edit(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Compute one edit for all the facts; the model is left as it is.

        Args:
            model: The model, or a view of it.
            facts: The facts.

        Raises:
            BadInputError: If there is no fact, or a second moment is of another layer or model.
            NonFiniteError: If an update is not finite.
            EditMismatchError: If the model is changed while the edit is computed.
            UnsupportedModelError: If the model is no plain stack of blocks.
        """
        if not facts:
            raise BadInputError(f"{self.label} was given no fact; give at least one")
        for layer in self.layers:
            self.second_moments[layer].check(model, layer)
        identity, last = model.identity(), self.layers[-1]
        settings = self.hyperparameters or model.hyperparameters
        values = optimise_values(
            model,
            facts,
            self._states(model, facts, self.anchor),
            contexts=self.contexts,
            slot=self.anchor,
            layer=last,
            hyperparameters=settings,
            stream=True,
        )
        z = torch.stack([value.target for value in values])
        deltas: list[Delta] = []
        components: dict[str, float] = {}
        for number, layer in enumerate(self.layers):
            view = model.edited(self._edit(model, facts, deltas)) if deltas else model
            missing = (z - self._states(view, facts, self.residual)).double()
            right = missing / (len(self.layers) - number)
            keys, bare = self._keys(view, facts, layer)
            moment = self.second_moments[layer]
            earlier = self._remembered(model, layer)
            left = self.rule.left(keys, moment, earlier)
            if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
                raise NonFiniteError(
                    f"the {self.label} update of layer {layer} is not finite; take other facts, "
                    "or a second moment over more text"
                )
            components |= _components(layer, keys, bare, moment, missing)
            wide = model.wide_dtype
            place = model.site(layer).place
            deltas.append(Delta(place=place, left=left.to(wide), right=right.to(wide)))
        if model.identity() != identity:
            raise EditMismatchError(
                f"{model.name} was changed while an edit was computed on it; compute it again"
            )
        losses = values[0].losses if len(values) == 1 else ()
        components["value_norm"] = float(z.norm(dim=1).mean())
        return self._edit(model, facts, deltas, components=components, losses=losses)

    def _edit(
        self,
        model: Model,
        facts: Sequence[Fact],
        deltas: Sequence[Delta],
        *,
        components: Mapping[str, float] | None = None,
        losses: tuple[float, ...] = (),
    ) -> Edit:
        names = {str(each.place): model.weights.name_of(each.place) for each in deltas}
        record = edit_record(
            model.record(),
            facts,
            editor=self.described(model),
            contexts={
                "hash": self.contexts.content_hash,
                "templates": list(self.contexts.templates),
            },
            parameters=names,
        )
        return Edit(
            deltas=tuple(deltas),
            components=components or {},
            losses=losses,
            provenance=record,
        )

    def described(self, model: Model) -> dict[str, Any]:
        """Name and settings, as the record of an edit has them."""
        rule: Any = self.rule
        return {
            "name": self.name,
            "rule": asdict(rule),
            "layers": list(self.layers),
            "keys": "released" if self.keys is None else self.keys.value,
            "anchor": self.anchor.value,
            "residual": self.residual.value,
            "remembers": self.remembers,
            "hyperparameters": (self.hyperparameters or model.hyperparameters).as_dict(),
            "second_moments": {
                str(layer): self.second_moments[layer].content_hash for layer in self.layers
            },
        }

    @property
    def _prefixed(self) -> ContextSet:
        prefixed = tuple(text for text in self.contexts.templates if text != "{}")
        return ContextSet(templates=prefixed or ("{}",))

    def _keys(
        self, model: Model, facts: Sequence[Fact], layer: int
    ) -> tuple[KeyColumns, KeyColumns]:
        """K, and the keys of the bare prompts, in float64 on the CPU."""
        found = keys_of_facts(model, facts, self._prefixed, layer=layer)
        mean = torch.stack([each.prefixed_mean for each in found], dim=1).double().cpu()
        bare = torch.stack([each.unprefixed for each in found], dim=1).double().cpu()
        if self.keys is None:
            return (bare + mean) / 2, bare
        return (bare if self.keys is Slot.UNPREFIXED else mean), bare

    def _states(self, model: Model, facts: Sequence[Fact], slot: Slot) -> ValueMatrix:
        """The residual stream behind the last layer at each subject's last token."""
        templates = ("{}",) if slot is Slot.UNPREFIXED else self._prefixed.templates
        prompts = [fact_prompt(model, fact, text) for fact in facts for text in templates]
        hook = RESIDUAL.format(self.layers[-1])
        states: dict[int, Tensor] = {}
        for group in batches(prompts, max_tokens=_MAX_TOKENS):
            chosen = [prompts[i] for i in group]
            batch = pad(model, chosen)
            found = capture(model, batch, [hook], stop_at_layer=self.layers[-1] + 1)[hook]
            columns = batch.columns(positions(chosen))
            rows = found[torch.arange(len(chosen), device=found.device), columns]
            states |= zip(group, rows.to(model.wide_dtype), strict=True)
        ordered = torch.stack([states[i] for i in range(len(prompts))])
        return ordered.view(len(facts), len(templates), -1).mean(1)

    def _remembered(self, model: Model, layer: int) -> Float[Tensor, "d_mlp d_mlp"] | None:
        """Sum of ``k k^T`` of the facts that an editor of this name wrote into the view.

        The keys of each are those of the model right behind its edit, as in the released code.
        """
        if not self.remembers:
            return None
        total: Tensor | None = None
        for number, edit in enumerate(model.edits, 1):
            if not isinstance(edit, Edit) or not edit.facts:
                continue
            if edit.provenance.get("editor", {}).get("name") == self.name:
                view = replace(model, own_edits=model.edits[:number], contents={**model.contents})
                keys, _ = self._keys(view, edit.facts, layer)
                total = keys @ keys.T if total is None else total + keys @ keys.T
        return total


def _components(
    layer: int, keys: KeyColumns, bare: KeyColumns, moment: SecondMoment, missing: Tensor
) -> dict[str, float]:
    """What is reported of one layer.

    ``denominator`` is the smallest eigenvalue (real part) of ``K^T C^-1 K_bare``, over that of
    ``K^T C^-1 K``: the generalisation of ROME's denominator over C-ROME's, 1 without a mismatch.
    """
    towards = torch.linalg.solve(moment.matrix.to(keys), keys)
    mixed = torch.linalg.eigvals(towards.T @ bare).real.min()
    own = torch.linalg.eigvalsh(towards.T @ keys).min()
    cosines = torch.nn.functional.cosine_similarity(keys, bare, dim=0)
    return {
        f"denominator_{layer}": float(mixed / own),
        f"residual_norm_{layer}": float(missing.norm(dim=1).mean()),
        f"key_cosine_{layer}": float(cosines.mean()),
    }
