"""An edit as an object: changes of weights, what they were made for, and how."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import take_fields, taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.data.schemas import fact_from
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.editing.delta import Delta
from firsttok.editing.record import EditRecord, ModelRecord, checked_record, edit_record
from firsttok.errors import BadInputError, EditMismatchError, NonFiniteError, ViewError
from firsttok.models import EditSite, Model, Place, Standing, WeightEdit
from firsttok.models.fingerprint import hash_weights
from firsttok.provenance import versions
from firsttok.second_moment import SecondMoment
from firsttok.storage import content_hash, write_tensors
from firsttok.svg import Plot
from firsttok.tensors import KeyVector, ValueVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AppliedEdit",
    "Edit",
    "EditSettings",
    "Editor",
    "OpenEditor",
    "SideBySideEditor",
    "shown_components",
]

_LABELS = {
    "numerator": "numerator ||v* - W k||",
    "denominator": "denominator u . k",
    "delta_norm": "||Delta W||",
    "key_cosine": "cosine of k_bar and k^u",
    "key_norm_ratio": "||k^u|| / ||k_bar||",
}
_UNSHOWN = ("raw_numerator", "raw_denominator", "mean_delta", "value_norm")
"""Components that a table leaves out: all but the last are others in another unit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedEdit:
    """An edit that stands in a model's weights, and how to take it out again."""

    edit: "Edit"
    """The edit."""
    undo: Callable[[], None]
    """Takes it out."""

    def undo_(self) -> None:
        """Put the weight back, bit for bit.

        Raises:
            EditMismatchError: If something else changed the weight since.
        """
        self.undo()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Edit(Shown):
    """Changes of weights that were made together, by whatever editor.

    Edits of one state of a model add up: ``a + b`` is one edit that does what both do.

    Raises:
        BadInputError: If there is no change, or two are of one weight.
    """

    deltas: tuple[Delta, ...]
    """The changes, one for each weight."""
    components: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the editor measured of these changes, by name; see :attr:`report`."""
    losses: tuple[float, ...] = ()
    """Loss trace of an optimisation, if there was one."""
    provenance: EditRecord = field(default_factory=EditRecord)
    """Model, facts, editor and its settings, versions."""
    components_of: str = ""
    """Hash of the changes that the components are of; empty for these."""

    def __post_init__(self) -> None:
        """Check what a file may hold."""
        take_fields(self)
        places = [delta.place for delta in self.deltas]
        if not places:
            raise BadInputError("an edit needs at least one change of a weight; give one")
        for place in places:
            if places.count(place) > 1:
                raise BadInputError(f"two changes are of {place}; add them first")
        object.__setattr__(self, "components_of", self.components_of or self.content_hash)

    @staticmethod
    def of(
        model: Model,
        layer: int,
        left: Float[Tensor, "*d_in_rank"],
        right: Float[Tensor, "*rank_d_out"] | None = None,
        *,
        port: str = "out",
        stack: str | None = None,
        name: str = "own",
        facts: Sequence[Fact] = (),
        components: Mapping[str, float] | None = None,
    ) -> "Edit":
        """Make an edit of one's own: ``W + left @ right`` at one layer.

        Args:
            model: The model, or a view of it, that the edit is for.
            layer: The layer.
            left: The left factor ``[d_in, rank]``, or a vector ``[d_in]`` for rank one; the whole
                change ``[d_in, d_out]`` without a right one.
            right: The right factor ``[rank, d_out]``, or a vector ``[d_out]``.
            port: Which of the MLP's matrices: ``in``, ``gate`` or ``out``.
            stack: As for :meth:`firsttok.models.Model.site`.
            name: What the editor is called.
            facts: What it writes.
            components: What is to be reported of it, besides its norm.

        Raises:
            EditMismatchError: If the shape is not that of the weight.
            LayerOutOfRangeError: If there is no such layer.
            UnsupportedModelError: If the MLP has no such matrix.
        """
        if left.ndim == 1:
            left = left[:, None]
        if right is not None and right.ndim == 1:
            right = right[None]
        delta = Delta(place=model.site(layer, stack=stack, port=port).place, left=left, right=right)
        edit = Edit(
            deltas=(delta,),
            components=components or {},
            provenance=edit_record(
                model.record(),
                facts,
                editor={"name": name},
                parameters={str(delta.place): model.weights.name_of(delta.place)},
            ),
        )
        edit.check(model)
        return edit

    @property
    def report(self) -> dict[str, float]:
        """What the editor measured, and the size of the changes, which is always their own.

        ``delta_norm`` is the Frobenius norm of all changes, ``mean_delta`` that over the number of
        elements of the changed weights (|Delta| of "Rebuilding ROME"). What the editor measured is
        left out once the changes are others, as after ``dataclasses.replace``.
        """
        norm = math.sqrt(sum(delta.norm**2 for delta in self.deltas))
        size = sum(math.prod(delta.shape) for delta in self.deltas)
        own = self.components if self.components_of == self.content_hash else {}
        return {**own, "delta_norm": norm, "mean_delta": norm / size}

    @property
    def delta(self) -> Delta:
        """The change, where there is but one.

        Raises:
            BadInputError: If there are several.
        """
        first, *rest = self.deltas
        if rest:
            raise BadInputError(
                f"the edit {self.title} changes {len(self.deltas)} weights; take them from deltas"
            )
        return first

    @property
    def left(self) -> KeyVector:
        """u, the left vector of a rank-one edit; unit norm in the ROME family.

        Raises:
            BadInputError: If the edit is of another rank, or of several weights.
        """
        left, _ = self._factors()
        return left[:, 0]

    @property
    def right(self) -> ValueVector:
        """The right vector of a rank-one edit; ``(v* - W k) / (u . k)`` in the ROME family.

        Raises:
            BadInputError: As for :attr:`left`.
        """
        _, right = self._factors()
        return right[0]

    def _factors(self) -> tuple[Tensor, Tensor]:
        delta = self.delta
        if delta.right is None or delta.rank != 1:
            raise BadInputError(f"the edit {self.title} is not of rank one; take its deltas")
        return delta.left, delta.right

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, each once, in order."""
        return tuple(sorted({delta.place.layer for delta in self.deltas}))

    @property
    def layer(self) -> int:
        """The edited layer, where there is but one.

        Raises:
            BadInputError: If there are several.
        """
        first, *rest = self.layers
        if rest:
            raise BadInputError(
                f"the edit {self.title} changes layers {self._where}; take them from layers"
            )
        return first

    @property
    def output_layer(self) -> int | None:
        """The layer of a decoder whose MLP's last matrix is all that it changes; None otherwise.

        Such an edit can be measured by running only what is above that layer.
        """
        (first, *rest) = self.places
        return first.layer if not rest and (first.stack, first.port) == ("blocks", "out") else None

    @property
    def origin(self) -> dict[str, Any]:
        """What it was made with, in short; ``provenance`` has it all."""
        made = self.provenance
        model, keys = made.get("model", {}), made.get("keys")
        return {
            "model": model.get("name"),
            "weights": short_hash(model.get("fingerprint")),
            "layer": self._where,
            "method": self._maker,
            "keys": None if keys == "ordinary" else keys,
            "contexts": short_hash(made.get("contexts", {}).get("hash")),
            "second moment": made.get("second_moment", {}).get("corpus"),
            "firsttok": made.get("versions", {}).get("firsttok"),
        }

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts that it writes.

        Raises:
            BadInputError: If a record of the provenance is no fact.
        """
        found: list[Fact] = []
        for record in self.provenance.get("facts", []):
            source = str(record.get("source", "an edit"))
            fact = fact_from(record, record.get("case_id", 0), "fact", source)
            if fact is None:
                raise BadInputError("a fact of the edit cannot be read; compute the edit again")
            found.append(fact)
        return tuple(found)

    @property
    def _text(self) -> str:
        """What it says: the prompt and the new target of the first fact; empty without one."""
        records = self.provenance.get("facts", [])
        if not records:
            return ""
        rewrite = records[0].get("requested_rewrite", {})
        prompt = rewrite.get("prompt", "").replace("{}", rewrite.get("subject", ""))
        text = f"{prompt} {rewrite.get('target_new', {}).get('str', '')}".strip()
        return text if len(records) == 1 else f"{text}, and {len(records) - 1} more"

    @property
    def _where(self) -> str:
        return ", ".join(map(str, self.layers))

    @property
    def _maker(self) -> str | None:
        own = self.provenance.get("method") or self.provenance.get("editor") or {}
        name = own.get("name")
        return None if name is None else str(name)

    def panel(self) -> Panel:
        """The components of the edit, and how its value was found."""
        plots: list[Any] = []
        if self.losses:
            plots.append(
                Plot(
                    title="loss of the value optimisation",
                    series={"loss": self.losses},
                    x_label="step",
                    y_label="loss",
                    log=True,
                )
            )
        lines = [list(line) for line in shown_components(self)]
        kind = "rank-one edit" if self._is_rank_one else "edit"
        return Panel(
            title=f"{kind} of layer {self._where}: {self._text}",
            parts=[Table(columns=("component", "value"), lines=lines), *plots],
            source=self.origin,
        )

    @property
    def _is_rank_one(self) -> bool:
        return len(self.deltas) == 1 and self.deltas[0].rank == 1

    @property
    def title(self) -> str:
        """The facts, the editor and the layers, for messages and records."""
        layers = f"layer{'s' if len(self.layers) > 1 else ''} {self._where}"
        return (
            f"{self._text or 'an edit of no fact'} ({self._maker or 'no named method'}, {layers})"
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 of what it does to the weights."""
        hashes = [delta.content_hash for delta in self.deltas]
        return hashes[0] if len(hashes) == 1 else content_hash(sorted(hashes))

    @property
    def places(self) -> tuple[Place, ...]:
        """The edit sites that it changes."""
        return tuple(delta.place for delta in self.deltas)

    def __add__(self, other: "Edit") -> "Edit":
        """One edit that does what both do.

        The second one may have been computed on the model as it was, or with the first one in it.

        Raises:
            EditMismatchError: If they were made for different models, or states of one.
        """
        made, after = self.provenance.get("model", {}), other.provenance.get("model", {})
        if made.get("fingerprint") != after.get("fingerprint"):
            raise EditMismatchError(
                f"the edits {self.title} and {other.title} were made for different models and do "
                "not add up"
            )
        first, second = ([e["hash"] for e in m.get("edits", [])] for m in (made, after))
        if second not in (first, [*first, self.content_hash]):
            raise EditMismatchError(
                f"the edit {other.title} was made on other edits than {self.title}, and not on it "
                "either; apply them one after another"
            )
        places = dict.fromkeys([*self.places, *other.places])
        own = {delta.place: delta for delta in self.deltas}
        others = {delta.place: delta for delta in other.deltas}
        deltas = [
            own[place] + others[place] if place in own and place in others
            else own.get(place) or others[place]
            for place in places
        ]  # fmt: skip
        parts = [self.provenance, other.provenance]
        facts: list[Any] = []
        for fact in (fact for part in parts for fact in part.get("facts", [])):
            if fact not in facts:
                facts.append(fact)
        names = dict.fromkeys(str(edit._maker) for edit in (self, other))
        return Edit(
            deltas=tuple(deltas),
            provenance={
                "model": made,
                "facts": facts,
                "editor": {"name": " + ".join(names)},
                "parameters": {
                    k: v for part in parts for k, v in part.get("parameters", {}).items()
                },
                "parts": parts,
                "versions": versions(),
            },
        )

    @taken
    def scaled(self, factor: float) -> "Edit":
        """The edit with all its changes multiplied by a factor, such as 0.5, or -1 to take it back.

        Args:
            factor: The factor.
        """
        return replace(
            self,
            deltas=tuple(delta * factor for delta in self.deltas),
            provenance={**self.provenance, "scaled by": self._scale * factor},
        )

    @property
    def _scale(self) -> float:
        return self.provenance.get("scaled by", 1.0)

    def changed(
        self, site: EditSite, weight: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows columns"]:
        """Return the content of a site's weight with its change added.

        Raises:
            NonFiniteError: If the sum does not fit into the weight's type.
        """
        (delta,) = (each for each in self.deltas if each.place == site.place)
        update = delta.matrix.to(device=weight.device, dtype=weight.dtype)
        content = weight + site.in_layout(update)
        if not bool(torch.isfinite(content).all()) and bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"the edit {self.title} does not fit into {str(weight.dtype)[6:]}: an entry of the "
                "weight would become infinite; load the model in float32 or bfloat16"
            )
        return content

    def apply_(
        self, model: "Model | PreTrainedModel", *, cast: bool = False, anyway: bool = False
    ) -> AppliedEdit:
        """Add the edit to the model's weight in place, until ``undo_`` of the result.

        Args:
            model: The model; or one that transformers loaded, which has to hold the very weights
                that the edit was made for.
            cast: As for :meth:`applied`; not for a model of transformers.
            anyway: As for :meth:`applied`; not for a model of transformers.

        Raises:
            EditMismatchError: As for :meth:`applied`.
            NonFiniteError: As for :meth:`applied`.
            ViewError: If the model is a view whose edits do not stand in the weights.
        """
        if not isinstance(model, Model):
            return self._put_into(model)
        self.check(model, cast=cast, anyway=anyway)
        if not model.stands:
            raise ViewError(
                "apply_ changes the model itself, and this view holds edits that the model does "
                "not; use view.edited(edit), or apply_ with the model"
            )
        return AppliedEdit(edit=self, undo=model.weights.apply((self,)))

    def applied(self, model: Model, *, cast: bool = False, anyway: bool = False) -> Standing[Model]:
        """Edit the model inside a ``with`` block; it is restored bit for bit, whatever happens.

        Edits nest, and compose in order. The block is given a view in which they stand, which goes
        on to hold them after the block, as one of :meth:`firsttok.models.Model.edited` does.

        Args:
            model: The model, which holds the edit for the time of the block.
            cast: Apply an edit made on the model in another type; it is rounded with the weight.
            anyway: Apply an edit made on other edits, on a changed weight, or under another
                configuration or tokenizer, none of which it fits.

        Raises:
            EditMismatchError: If the edit was made for another model, or another state of it; or if
                another thread holds an edit in the model.
            NonFiniteError: If it does not fit into the weights' type.
        """

        def enter() -> tuple[tuple[WeightEdit, ...], Model]:
            view = model.edited(self, cast=cast, anyway=anyway)
            return view.edits, view

        return Standing(model.weights, enter, is_pass=False, cache={})

    @taken
    def check(self, model: Model, *, cast: bool = False, anyway: bool = False) -> None:
        """Refuse a model that the edit does not belong to.

        Args:
            model: The model.
            cast: As for :meth:`applied`.
            anyway: As for :meth:`applied`.

        Raises:
            EditMismatchError: If it was made for another model, or another state of it.
        """
        made = self.provenance.get("model", {})
        if made.get("fingerprint") != model.fingerprint:
            self._check_type(made, model, cast=cast)
        if not anyway:
            self._check_state(made, model)
        for delta in self.deltas:
            shape = tuple(model.site_at(delta.place).matrix.shape)
            if shape != delta.shape:
                raise EditMismatchError(
                    f"the edit has shape {list(delta.shape)}, but {delta.place} of {model.name} "
                    f"has {list(shape)}"
                )

    def _check_type(self, made: ModelRecord, model: Model, *, cast: bool) -> None:
        own = model.record_of_type
        same = all(made.get(name) == own[name] for name in ("config", "tokenizer"))
        # Other weights of the same architecture come from elsewhere.
        same = same and made.get("source") == model.source
        if same and made.get("dtype") != own["dtype"]:
            if cast:
                return
            raise EditMismatchError(
                f"the edit was made for {made.get('name')} in {made.get('dtype')}, and this is "
                f"{model.name} in {own['dtype']}; load that model, or pass cast=True to round it"
            )
        raise EditMismatchError(
            f"the edit was made for {made.get('name', 'an unknown model')} (weights "
            f"{str(made.get('fingerprint'))[:12]}), not for {model.name} (weights "
            f"{model.fingerprint[:12]}); load that model"
        )

    def _check_state(self, made: ModelRecord, model: Model) -> None:
        """Whether configuration, tokenizer and what else stands in the weights are as they were."""
        own = model.record_of_type
        for name, what in (("config", "configuration"), ("tokenizer", "tokenizer")):
            if made.get(name, own[name]) != own[name]:
                raise EditMismatchError(
                    f"the edit was made for the weights of {model.name} with another {what}; load "
                    "that model, or pass anyway=True"
                )
        below = made.get("edits", [])
        standing = [edit.content_hash for edit in model.edits]
        if [edit["hash"] for edit in below] != standing[: len(below)]:
            titles = ", then ".join(edit["title"] for edit in below)
            raise EditMismatchError(
                f"the edit was computed on a model with other edits in it ({titles}); this one has "
                f"{'others' if standing else 'none'}. Give those first, in that order (on the "
                "command line before this file, in Python with model.edited), or pass anyway=True "
                "in Python"
            )
        changed = made.get("changed", {})
        if changed and not changed.items() <= model.weights.changes().items():
            raise EditMismatchError(
                f"the edit was computed on weights that had been changed otherwise "
                f"({', '.join(changed)}), and they are not so now; pass anyway=True to apply it "
                "all the same"
            )

    def _put_into(self, hf_model: "PreTrainedModel") -> AppliedEdit:
        names = self.provenance.get("parameters", {})
        parameters = dict(hf_model.named_parameters())
        targets: list[tuple[torch.nn.Parameter, Tensor]] = []
        made = self.provenance.get("model", {})
        found = hash_weights(hf_model).fingerprint
        if found != made.get("fingerprint") or made.get("edits") or made.get("changed"):
            raise EditMismatchError(
                f"the edit {self.title} was made for weights {str(made.get('fingerprint'))[:12]}"
                f"{' with other edits in them' if made.get('edits') else ''}, and those of this "
                f"model are {found[:12]}; load that model in that type"
            )
        for delta in self.deltas:
            name = names.get(str(delta.place), "")
            if name not in parameters:
                raise EditMismatchError(
                    f"the edit {self.title} does not name the weight of {delta.place}; compute it "
                    "again, or apply it to a model of firsttok"
                )
            weight = parameters[name]
            layout = delta.matrix.to(weight)
            owner = hf_model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, torch.nn.Linear):
                layout = layout.T
            targets.append((weight, weight.data + layout))
        before = [(weight, weight.data, content) for weight, content in targets]
        for weight, content in targets:
            weight.data = content

        def undo() -> None:
            if any(weight.data_ptr() != content.data_ptr() for weight, _, content in before):
                raise EditMismatchError(
                    "the weight was changed after this edit was applied; undo the later edit first"
                )
            for weight, data, _ in before:
                weight.data = data

        return AppliedEdit(edit=self, undo=undo)

    def save(self, path: str | Path) -> None:
        """Write the factors as safetensors, with all else as metadata.

        A change of layer L is ``layer{L}.{port}.left`` ``[d_in, rank]`` and ``.right``
        ``[rank, d_out]``, or ``.dense`` ``[d_in, d_out]``; outside a decoder the stack stands
        before that.

        Raises:
            BadInputError: If a field of the provenance is not of its type in
                :class:`~firsttok.editing.EditRecord`.
            CacheError: If the file cannot be written.
        """
        record = {
            "components": dict(self.components) if self.components_of == self.content_hash else {},
            "losses": list(self.losses),
            "provenance": self.provenance,
        }
        checked_record(record)
        tensors: dict[str, Tensor] = {}
        for delta in self.deltas:
            stack, layer, port = delta.place
            name = f"{'' if stack == 'blocks' else f'{stack}.'}layer{layer}.{port}"
            if delta.right is None:
                tensors[f"{name}.dense"] = delta.left.clone()
            else:
                # Several changes may share a factor, which safetensors does not write.
                tensors[f"{name}.left"] = delta.left.clone()
                tensors[f"{name}.right"] = delta.right.clone()
        write_tensors(Path(path), tensors, {"firsttok_edit": json.dumps(record)})


def shown_components(edit: Edit) -> list[tuple[str, float]]:
    """The components of an edit that tables show, by label; those of the ROME family first."""
    report = edit.report
    names = [name for name in _LABELS if name in report]
    names += [name for name in report if name not in _LABELS and name not in _UNSHOWN]
    return [(_LABELS.get(name, name), report[name]) for name in names]


@runtime_checkable
class EditSettings(Protocol):
    """What a study gives to an editor that leaves something open."""

    @property
    def model(self) -> Model:
        """The model before the edits."""
        ...

    @property
    def layer(self) -> int:
        """Layer to edit."""
        ...

    @property
    def contexts(self) -> ContextSet:
        """Contexts of Equation 1."""
        ...

    @property
    def asked(self) -> Mapping[str, int | float]:
        """Settings of the value optimisation that were asked for in place of the model's own."""
        ...

    def moment(self, layer: int) -> SecondMoment:
        """Return C of a layer.

        Raises:
            BadInputError: If the study has none.
        """
        ...


@runtime_checkable
class OpenEditor(Protocol):
    """An editor that takes from a study what it leaves open itself."""

    def moments_of(self, model: Model, layer: int) -> tuple[int, ...]:
        """Layers whose second moment it needs when ``layer`` is edited."""
        ...

    def completed(self, settings: EditSettings) -> "Editor":
        """Return the editor with nothing left open."""
        ...


@runtime_checkable
class Editor(Protocol):
    """What makes edits: a class with a name, a label and this method."""

    @property
    def name(self) -> str:
        """Name on the command line and in files."""
        ...

    @property
    def label(self) -> str:
        """Name in tables."""
        ...

    def edit(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Compute one edit that writes all the facts, such as with :meth:`Edit.of`.

        Args:
            model: The model, or a view of it, which is left as it is.
            facts: The facts.
        """
        ...


@runtime_checkable
class SideBySideEditor(Editor, Protocol):
    """An editor that edits many facts, each alone, in less time than one after another."""

    def edit_all(
        self,
        model: Model,
        facts: Sequence[Fact],
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Edit]:
        """Compute the edit of each fact alone, in order, as ``edit`` does up to rounding.

        Args:
            model: The model, or a view of it, which is left as it is.
            facts: The facts.
            on_step: Called with the number of facts that took one optimisation step.

        Raises:
            FirsttokError: As ``edit`` does.
        """
        ...
