"""MEMIT and its relatives: many facts at once, written into several layers.

A target z for the residual stream after the last edited layer is optimised for every fact. Then
each layer in turn, from the lowest on, is given its share of what is missing, by a closed form in
the keys K of all facts: MEMIT's (Meng et al. 2023), EMMET's (Gupta et al. 2024) or AlphaEdit's
(Fang et al. 2025).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from firsttok.arguments import take_fields, taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit, EditSettings
from firsttok.editing.methods import Slot
from firsttok.editing.record import edit_record
from firsttok.editing.value import Value, optimise_values
from firsttok.engine.tail import Replay, Tail
from firsttok.engine.traits import KEY, RESIDUAL
from firsttok.errors import (
    BadInputError,
    EditMismatchError,
    HyperparameterError,
    NonFiniteError,
)
from firsttok.hyperparameters import Hyperparameters, SpreadSettings
from firsttok.models import Model, capture, capture_tail
from firsttok.prompts import fact_prompt, pad, positions
from firsttok.second_moment import SecondMoment
from firsttok.tensors import TokenBatch, ValueMatrix

__all__ = [
    "ALPHAEDIT",
    "EMMET",
    "MEMIT",
    "MEMIT_SEQ",
    "SPREAD",
    "AlphaEditRule",
    "EmmetRule",
    "MemitEditor",
    "MemitRule",
    "SpreadRule",
    "spread_each",
]

_DEPENDENT = 1e-9
"""Smallest over largest eigenvalue of ``K^T C^-1 K`` below which keys depend on one another."""
KeyColumns = Float[Tensor, "d_mlp fact"]
EarlierKeys = Float[Tensor, "d_mlp earlier"]


@runtime_checkable
class SpreadRule(Protocol):
    """The closed form of one layer: the update is ``left @ R^T`` for residuals R."""

    @property
    def name(self) -> str:
        """Name in records."""
        ...

    def completed(self, settings: SpreadSettings) -> "SpreadRule":
        """Return the rule with a model's numbers where it gives none itself."""
        ...

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: EarlierKeys | None
    ) -> KeyColumns:
        """Return the left factor.

        Args:
            keys: K, in float64.
            moment: C.
            earlier: Keys of the facts that were written before; None for none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class MemitRule:
    """``(lambda C + M M^T + K K^T)^-1 K`` (Meng et al. 2023, Equation 14).

    M holds what an editor remembers of earlier facts; the released MEMIT remembers nothing.
    """

    weight: float | None = None
    """lambda: how many pretended tokens C stands for; None for the model's."""
    name: str = "memit"

    def __post_init__(self) -> None:
        """Check the range."""
        take_fields(self)
        _check_positive(self, "weight")

    def completed(self, settings: SpreadSettings) -> "MemitRule":
        """As :meth:`SpreadRule.completed`."""
        return self if self.weight is not None else replace(self, weight=settings.weight)

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: EarlierKeys | None
    ) -> KeyColumns:
        """As :meth:`SpreadRule.left`."""
        seen = _joined(keys, earlier)
        # (weight C + S S^T)^-1 S = C^-1 S (S^T C^-1 S + weight I)^-1, on one factor of C.
        towards = moment.solve_all(seen)
        gram = seen.T @ towards
        gram.diagonal().add_(_given(self.weight, "weight of MemitRule"))
        return torch.linalg.solve(gram, towards.T).T[:, : keys.shape[1]]


@dataclass(frozen=True, kw_only=True)
class EmmetRule:
    """``C^-1 K (K^T C^-1 K)^-1``: every key is mapped to its value exactly (Gupta et al. 2024).

    What an editor remembers of earlier facts is added to C.
    """

    name: str = "emmet"

    def completed(self, settings: SpreadSettings) -> "EmmetRule":
        """As :meth:`SpreadRule.completed`: there is no number."""
        del settings
        return self

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: EarlierKeys | None
    ) -> KeyColumns:
        """As :meth:`SpreadRule.left`."""
        towards = moment.solve_all(keys)
        if earlier is not None:
            towards = torch.linalg.solve(moment.matrix.to(keys) + earlier @ earlier.T, keys)
        return torch.linalg.solve(keys.T @ towards, towards.T).T


@dataclass(frozen=True, kw_only=True)
class AlphaEditRule:
    """``(P (K K^T + M M^T) + ridge I)^-1 P K``, P onto what C hardly holds (Fang et al. 2025).

    P projects onto the eigenvectors of C whose eigenvalue is below the threshold, so that keys of
    ordinary text are mapped as before. It is computed as ``V (V^T A V + ridge I)^-1 V^T K`` with
    ``P = V V^T`` and ``A = K K^T + M M^T``, which is the same and symmetric.
    """

    threshold: float | None = None
    """Eigenvalues below it are of directions that may change; None for the model's."""
    ridge: float | None = None
    """``L2`` in the released settings; None for the model's."""
    name: str = "alphaedit"

    def __post_init__(self) -> None:
        """Check the ranges."""
        take_fields(self)
        _check_positive(self, "threshold", "ridge")

    def completed(self, settings: SpreadSettings) -> "AlphaEditRule":
        """As :meth:`SpreadRule.completed`."""
        threshold = settings.threshold if self.threshold is None else self.threshold
        ridge = settings.ridge if self.ridge is None else self.ridge
        return replace(self, threshold=threshold, ridge=ridge)

    def left(
        self, keys: KeyColumns, moment: SecondMoment, earlier: EarlierKeys | None
    ) -> KeyColumns:
        """As :meth:`SpreadRule.left`."""
        ridge = _given(self.ridge, "ridge of AlphaEditRule")
        threshold = _given(self.threshold, "threshold of AlphaEditRule")
        free = moment.below(threshold).to(keys)
        seen = free.T @ _joined(keys, earlier)
        # (S S^T + ridge I)^-1 S = S (S^T S + ridge I)^-1, and S has a column a fact.
        gram = seen.T @ seen
        gram.diagonal().add_(ridge)
        return free @ torch.linalg.solve(gram, seen.T).T[:, : keys.shape[1]]


def _check_positive(rule: Any, *names: str) -> None:
    for name in names:
        value: float | None = getattr(rule, name)
        if value is not None and not 0 < value < math.inf:
            raise HyperparameterError(f"{name} is {value}; give a finite number above 0")


def _check_free(
    rule: SpreadRule, moments: Mapping[int, SecondMoment], layers: Sequence[int]
) -> None:
    """Refuse AlphaEdit where no direction may change, before any value is optimised."""
    threshold = rule.threshold if isinstance(rule, AlphaEditRule) else None
    for layer in layers if threshold is not None else ():
        if threshold is not None and not moments[layer].below(threshold).shape[1]:
            raise BadInputError(
                f"no eigenvalue of the second moment of layer {layer} is below {threshold:g}, so "
                "that AlphaEdit may change nothing; give a higher threshold "
                "(--nullspace-threshold)"
            )


def _given(value: float | None, what: str) -> float:
    if value is None:
        raise BadInputError(f"the {what} is not given; give it, or call completed with a model's")
    return value


def _joined(keys: KeyColumns, earlier: EarlierKeys | None) -> Float[Tensor, "d_mlp seen"]:
    return keys if earlier is None else torch.cat([keys, earlier], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class MemitEditor:
    """MEMIT, or another rule in its place: any number of facts, several layers.

    The slots are as released; with another key in them it is a consistent variant. Prefixed keys
    and states are means over the contexts that have a prefix. What is left open, a study fills in:
    :data:`MEMIT` and its relatives leave open all that belongs to a model.

    Raises:
        BadInputError: If the layers are not in order, one of them lacks its second moment, or the
            bare prompt is not among the contexts.
    """

    contexts: ContextSet | None = None
    """Contexts of z, the bare one among them; those with a prefix also make the prefixed keys."""
    second_moments: Mapping[int, SecondMoment] = field(default_factory=dict[int, SecondMoment])
    """C of each layer; empty for the study's."""
    layers: tuple[int, ...] | None = None
    """Layers to edit, in order; z belongs to the last one. None for the model's."""
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
        """Check the layers and the contexts."""
        take_fields(self)
        layers = self.layers
        if layers is not None:
            if not layers or list(layers) != sorted(set(layers)):
                raise BadInputError(
                    f"the layers are {list(layers)}; give each once, from the lowest on"
                )
            for layer in layers:
                if self.second_moments and layer not in self.second_moments:
                    raise BadInputError(
                        f"layer {layer} has no second moment; give one for each layer"
                    )
        if self.contexts is not None and "{}" not in self.contexts.templates:
            raise BadInputError("the contexts lack the bare prompt; let {} be among them")

    def moments_of(self, model: Model, layer: int) -> tuple[int, ...]:
        """As :meth:`~firsttok.editing.edit.OpenEditor.moments_of`."""
        layers = self._layers_for(model, layer)
        return () if self.second_moments else layers

    def _layers_for(self, model: Model, layer: int) -> tuple[int, ...]:
        """The model's layers, moved as far as the edited layer is from the model's default."""
        return self.layers or _settings_of(model).moved(layer - model.default_layer)

    def completed(self, settings: EditSettings) -> "MemitEditor":
        """Take contexts, second moments, layers and numbers from a study where they are open.

        What is asked for instead of the model's settings of the value is so for z, too. Layers
        move with the study's layer where it is not the model's default.

        Raises:
            BadInputError: If the study has no second moment of a layer, or AlphaEdit may change
                nothing there.
        """
        model = settings.model
        layers = self._layers_for(model, settings.layer)
        changed: dict[str, Any] = dict(settings.asked)
        rule = self.rule.completed(_settings_of(model))
        moments = self.second_moments or {layer: settings.moment(layer) for layer in layers}
        _check_free(rule, moments, layers)
        return replace(
            self,
            contexts=self.contexts or settings.contexts,
            second_moments=moments,
            layers=layers,
            rule=rule,
            hyperparameters=self.hyperparameters
            or replace(_settings_of(model).hyperparameters, **changed),
        )

    @taken
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
        writer, identity = self._writer(model), model.identity()
        scenes = writer.scenes(facts)
        edit = writer.write(facts, scenes, writer.values(facts, scenes))
        if model.identity() != identity:
            raise EditMismatchError(
                f"{model.name} was changed while an edit was computed on it; compute it again"
            )
        return edit

    def edit_all(
        self,
        model: Model,
        facts: Sequence[Fact],
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Edit]:
        """As :meth:`~firsttok.editing.edit.SideBySideEditor.edit_all`: values side by side."""
        return [edits[self.name] for edits in spread_each(model, facts, [self], on_step=on_step)]

    def _writer(self, model: Model) -> "_Writer":
        settings = self.hyperparameters or _settings_of(model).hyperparameters
        layers = self.layers or _settings_of(model).layers
        if self.contexts is None or not self.second_moments:
            raise BadInputError(
                f"{self.label} has no {'contexts' if self.contexts is None else 'second moments'}; "
                "give them, or let a study edit, such as ft.what_if or ft.measure_facts"
            )
        rule = self.rule.completed(_settings_of(model))
        for layer in layers:
            self.second_moments[layer].check(model, layer)
        _check_free(rule, self.second_moments, layers)
        return _Writer(
            editor=replace(self, rule=rule, layers=layers, hyperparameters=settings),
            model=model,
            contexts=self.contexts,
            layers=layers,
            hyperparameters=settings,
            memory=self._memory,
        )

    @cached_property
    def _memory(self) -> dict[tuple[str, int], KeyColumns]:
        """Keys of earlier facts, by the view right after their edit and by layer."""
        return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Writer:
    """An editor with nothing left open, at work on a model."""

    editor: MemitEditor
    model: Model
    contexts: ContextSet
    layers: tuple[int, ...]
    hyperparameters: Hyperparameters
    memory: dict[tuple[str, int], KeyColumns]

    @property
    def shared(self) -> tuple[Any, ...]:
        """What decides z."""
        hashed = self.contexts.content_hash
        return hashed, self.layers[-1], self.editor.anchor, self.hyperparameters

    def scenes(self, facts: Sequence[Fact]) -> "list[_Scene]":
        """The facts' prompts, run up to the lowest edited layer."""
        return self._scenes(self.model, facts)

    def _scenes(self, view: Model, facts: Sequence[Fact]) -> "list[_Scene]":
        return [_Scene.of(view, fact, self.contexts, self.layers) for fact in facts]

    def values(
        self,
        facts: Sequence[Fact],
        scenes: "Sequence[_Scene]",
        on_step: Callable[[int], None] | None = None,
    ) -> list[Value]:
        """Optimise z of each fact on the model as it is."""
        return optimise_values(
            self.model,
            facts,
            _read(scenes, self.model, self.layers[0]).states(self.editor.anchor),
            contexts=self.contexts,
            slot=self.editor.anchor,
            layer=self.layers[-1],
            hyperparameters=self.hyperparameters,
            stream=True,
            on_step=on_step,
        )

    def write(
        self, facts: Sequence[Fact], scenes: "Sequence[_Scene]", values: Sequence[Value]
    ) -> Edit:
        """Give each layer its share of what is missing."""
        model, editor = self.model, self.editor
        z = torch.stack([value.target for value in values])
        deltas: list[Delta] = []
        components: dict[str, float] = {}
        for number, layer in enumerate(self.layers):
            view = model.edited(self._edit(facts, deltas)) if deltas else model
            reading = _read(scenes, view, layer)
            missing = (z - reading.states(editor.residual)).double()
            right = missing / (len(self.layers) - number)
            keys, bare = reading.keys(editor.keys), reading.keys(Slot.UNPREFIXED)
            moment = editor.second_moments[layer]
            try:
                left = editor.rule.left(keys, moment, self._remembered(layer))
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                raise NonFiniteError(
                    f"the keys of the facts at layer {layer} depend on one another, and "
                    f"{editor.label} has no solution; give facts with other subjects or prompts"
                ) from None
            if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
                raise NonFiniteError(
                    f"the {editor.label} update of layer {layer} is not finite; take other facts, "
                    "or a second moment over more text"
                )
            components |= _components(layer, keys, bare, moment, missing)
            wide = model.wide_dtype
            place = model.site(layer).place
            deltas.append(Delta(place=place, left=left.to(wide), right=right.to(wide)))
        losses = values[0].losses if len(values) == 1 else ()
        components["value_norm"] = float(z.norm(dim=1).mean())
        return self._edit(facts, deltas, components=components, losses=losses)

    def _edit(
        self,
        facts: Sequence[Fact],
        deltas: Sequence[Delta],
        *,
        components: Mapping[str, float] | None = None,
        losses: tuple[float, ...] = (),
    ) -> Edit:
        model, templates = self.model, list(self.contexts.templates)
        record = edit_record(
            model.record(),
            facts,
            editor=self._described(),
            contexts={"hash": self.contexts.content_hash, "templates": templates},
            parameters={str(each.place): model.weights.name_of(each.place) for each in deltas},
        )
        return Edit(
            deltas=tuple(deltas),
            components=components or {},
            losses=losses,
            provenance=record,
        )

    def _described(self) -> dict[str, Any]:
        editor = self.editor
        rule: Any = editor.rule
        return {
            "name": editor.name,
            "rule": asdict(rule),
            "layers": list(self.layers),
            "keys": "released" if editor.keys is None else editor.keys.value,
            "anchor": editor.anchor.value,
            "residual": editor.residual.value,
            "remembers": editor.remembers,
            "hyperparameters": self.hyperparameters.as_dict(),
            "second_moments": {
                str(layer): editor.second_moments[layer].content_hash for layer in self.layers
            },
        }

    def _remembered(self, layer: int) -> EarlierKeys | None:
        """Keys of the facts that an editor of this name wrote into the view.

        Those of each are of the model right after its edit, as in the released code.
        """
        if not self.editor.remembers:
            return None
        model, found = self.model, list[KeyColumns]()
        for number, edit in enumerate(model.edits, 1):
            if not isinstance(edit, Edit) or not edit.facts:
                continue
            if edit.provenance.get("editor", {}).get("name") == self.editor.name:
                view = replace(model, own_edits=model.edits[:number], contents={**model.contents})
                key = (view.identity(), layer)
                if key not in self.memory:
                    reading = _read(self._scenes(view, edit.facts), view, layer)
                    self.memory[key] = reading.keys(self.editor.keys)
                found.append(self.memory[key])
        return torch.cat(found, dim=1) if found else None


def spread_each(
    model: Model,
    facts: Sequence[Fact],
    editors: Sequence[MemitEditor],
    *,
    on_step: Callable[[int], None] | None = None,
) -> list[dict[str, Edit]]:
    """Edit every fact alone by each editor; those whose z is the same optimise it once.

    Args:
        model: The model, or a view of it.
        facts: The facts.
        editors: The editors, each with a name of its own.
        on_step: Called with the number of facts that took one optimisation step.

    Returns:
        For each fact its edits by the editor's name.

    Raises:
        FirsttokError: As :meth:`MemitEditor.edit`.
    """
    identity = model.identity()
    writers = [editor._writer(model) for editor in editors]
    scenes: dict[Any, list[_Scene]] = {}
    values: dict[Any, list[Value]] = {}
    found: list[dict[str, Edit]] = [{} for _ in facts]
    for writer in writers if facts else ():
        run = (writer.contexts.content_hash, writer.layers[0], writer.layers[-1])
        if run not in scenes:
            scenes[run] = writer.scenes(facts)
        if writer.shared not in values:
            values[writer.shared] = writer.values(facts, scenes[run], on_step)
        parts = zip(found, facts, scenes[run], values[writer.shared], strict=True)
        for edits, fact, scene, value in parts:
            edits[writer.editor.name] = writer.write([fact], [scene], [value])
    if model.identity() != identity:
        raise EditMismatchError(
            f"{model.name} was changed while edits were computed on it; compute them again"
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scene:
    """One fact's prompts, the bare one last, run up to the lowest edited layer."""

    batch: TokenBatch
    """The prompts up to their subjects' last tokens, after which nothing is read."""
    columns: Int[Tensor, "prompt"]
    """Column of each subject's last token."""
    tail: Tail | None
    """What runs again; None where all does."""
    model: Model
    """The view that they were run on."""
    layers: tuple[int, ...]
    """The edited layers."""

    @staticmethod
    def of(model: Model, fact: Fact, contexts: ContextSet, layers: Sequence[int]) -> "_Scene":
        """Run the prompts; without any prefix the bare one stands for the prefixed ones, too."""
        prefixed = [text for text in contexts.templates if text != "{}"] or ["{}"]
        prompts = [fact_prompt(model, fact, text) for text in (*prefixed, "{}")]
        batch = pad(model, prompts)
        columns = batch.columns(positions(prompts))
        if not model.sees_later:
            batch = batch.first(int(columns.max()) + 1)
        below = layers[0] - 1
        whole = below < 0 or model.replay is Replay.WHOLE
        tail = None if whole else capture_tail(model, batch, layer=below)
        return _Scene(batch=batch, columns=columns, tail=tail, model=model, layers=tuple(layers))

    def read(self, view: Model, layer: int) -> tuple[Tensor, Tensor]:
        """Keys at a layer and residual streams after the last one, ``[prompt, d]`` each."""
        if view is self.model and layer == self.layers[0]:
            return self._start
        return self._read(view, layer)

    @cached_property
    def _start(self) -> tuple[Tensor, Tensor]:
        """What z begins with is what every editor reads at its first layer, too."""
        return self._read(self.model, self.layers[0])

    def _read(self, view: Model, layer: int) -> tuple[Tensor, Tensor]:
        last = self.layers[-1]
        names = [KEY.format(layer), RESIDUAL.format(last)]
        if self.tail is None:
            seen = capture(view, self.batch, names, stop_at_layer=last + 1)
        else:
            with view.running() as bridge:
                seen = self.tail.capture(bridge, names, last=last)
        rows = torch.arange(len(self.columns), device=self.columns.device)
        keys, states = (seen[name][rows, self.columns].to(view.wide_dtype) for name in names)
        return keys, states


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reading:
    """Keys and residual streams of several facts, a row each."""

    prefixed: Float[Tensor, "fact d_mlp"]
    bare: Float[Tensor, "fact d_mlp"]
    prefixed_states: ValueMatrix
    bare_states: ValueMatrix

    def keys(self, slot: Slot | None) -> KeyColumns:
        """K in float64 on the CPU; the released half-and-half for None."""
        mean = self.prefixed.double().cpu().T.contiguous()
        bare = self.bare.double().cpu().T.contiguous()
        if slot is None:
            return (bare + mean) / 2
        return bare if slot is Slot.UNPREFIXED else mean

    def states(self, slot: Slot) -> ValueMatrix:
        """The residual streams after the last layer."""
        return self.bare_states if slot is Slot.UNPREFIXED else self.prefixed_states


def _read(scenes: Sequence[_Scene], view: Model, layer: int) -> _Reading:
    found = [scene.read(view, layer) for scene in scenes]
    return _Reading(
        prefixed=torch.stack([keys[:-1].mean(0) for keys, _ in found]),
        bare=torch.stack([keys[-1] for keys, _ in found]),
        prefixed_states=torch.stack([states[:-1].mean(0) for _, states in found]),
        bare_states=torch.stack([states[-1] for _, states in found]),
    )


def _settings_of(model: Model) -> SpreadSettings:
    """The model's settings; three layers up to the default one where there are none."""
    if model.spread is not None:
        return model.spread
    last = model.default_layer
    return SpreadSettings(
        layers=tuple(range(max(0, last - 2), last + 1)),
        # About as much beside k^T C^-1 k as on the models that have released settings.
        weight=1.5 * model.site(last).d_mlp,
        hyperparameters=model.hyperparameters,
    )


def _components(
    layer: int, keys: KeyColumns, bare: KeyColumns, moment: SecondMoment, missing: Tensor
) -> dict[str, float]:
    """What is reported of one layer.

    ``denominator`` is the smallest eigenvalue (real part) of ``K^T C^-1 K_bare``, over that of
    ``K^T C^-1 K``: the generalisation of ROME's denominator over C-ROME's, 1 without a mismatch.
    It is left out where keys depend on one another.
    """
    towards = moment.solve_all(keys)
    own = torch.linalg.eigvalsh(towards.T @ keys)
    cosines = torch.nn.functional.cosine_similarity(keys, bare, dim=0)
    found: dict[str, float] = {}
    if float(own.min()) > _DEPENDENT * float(own.max()):
        mixed = torch.linalg.eigvals(towards.T @ bare).real.min()
        found[f"denominator_{layer}"] = float(mixed / own.min())
    return found | {
        f"residual_norm_{layer}": float(missing.norm(dim=1).mean()),
        f"key_cosine_{layer}": float(cosines.mean()),
    }


def _variants(released: MemitEditor) -> tuple[MemitEditor, ...]:
    """An editor as released, and its consistent, fully consistent and bare variants."""
    prefixed, bare = Slot.PREFIXED_MEAN, Slot.UNPREFIXED
    filled = {
        "c": (prefixed, bare, prefixed),
        "fc": (prefixed, prefixed, prefixed),
        "p": (bare, bare, bare),
    }
    return (
        released,
        *(
            replace(
                released,
                name=f"{short}-{released.name}",
                label=f"{short.upper() if short != 'p' else short}-{released.label}",
                keys=keys,
                anchor=anchor,
                residual=residual,
            )
            for short, (keys, anchor, residual) in filled.items()
        ),
    )


MEMIT = MemitEditor()
"""MEMIT as released."""
EMMET = MemitEditor(name="emmet", label="EMMET", rule=EmmetRule())
"""EMMET as released."""
ALPHAEDIT = MemitEditor(name="alphaedit", label="AlphaEdit", rule=AlphaEditRule(), remembers=True)
"""AlphaEdit as released: it remembers the keys of earlier facts."""
MEMIT_SEQ = MemitEditor(name="memit-seq", label="MEMIT_seq", remembers=True)
"""MEMIT that remembers the keys of earlier facts, as AlphaEdit's authors run it."""
SPREAD: tuple[MemitEditor, ...] = (
    *_variants(MEMIT),
    MEMIT_SEQ,
    *_variants(EMMET),
    *_variants(ALPHAEDIT),
)
"""MEMIT and its relatives: c- with prefixed keys and residuals, fc- with a prefixed anchor as well,
p- with the bare prompt everywhere."""
