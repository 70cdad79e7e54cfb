"""A rank-one edit as an object: two vectors, where they go, and where they come from."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import take_fields, taken, whole_number
from firsttok.display import Panel, Plot, Shown, short_hash
from firsttok.editing.update import UpdateReport
from firsttok.errors import BadInputError, EditMismatchError, NonFiniteError, ViewError
from firsttok.models import EditSite, Model, Place, Standing, WeightEdit
from firsttok.models.fingerprint import tensor_hash
from firsttok.storage import content_hash, read_safetensors, write_tensors
from firsttok.tensors import KeyVector, ValueVector, WeightInOut

__all__ = ["AppliedEdit", "RankOneEdit", "load_edit"]

_OBJECTS = (
    (),
    *((name,) for name in ("contexts", "fact", "hyperparameters", "method", "model")),
    *((name,) for name in ("second_moment", "versions")),
    ("model", "changed"),
    ("fact", "requested_rewrite"),
    ("fact", "requested_rewrite", "target_new"),
)
"""Parts of the provenance that are read again, each an object if it is there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedEdit:
    """An edit that stands in a model's weights, and how to take it out again."""

    edit: "RankOneEdit"
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
class RankOneEdit(Shown):
    """``W + outer(left, right)`` at one edit site (Equation 3)."""

    left: KeyVector
    """u, unit norm."""
    right: ValueVector
    """``(v* - W k) / (u . k)``."""
    layer: int
    """Edited layer."""
    stack: str
    """Stack of blocks the layer belongs to."""
    report: UpdateReport
    """The components of the update."""
    losses: tuple[float, ...]
    """Loss trace of the value optimisation."""
    provenance: dict[str, Any]
    """Model, fact, method, contexts, second moment, hyperparameters, versions."""

    def __post_init__(self) -> None:
        """Check what a file may hold."""
        take_fields(self)

    @property
    def delta(self) -> WeightInOut:
        """The dense update, ``[d_mlp, d_model]``."""
        return torch.outer(self.left, self.right)

    @property
    def origin(self) -> dict[str, Any]:
        """What it was made with, in short; ``provenance`` has it all."""

        def part(name: str) -> dict[str, Any]:
            return self.provenance.get(name, {})

        keys = self.provenance.get("keys")
        return {
            "model": part("model").get("name"),
            "weights": short_hash(part("model").get("fingerprint")),
            "layer": self.layer,
            "method": part("method").get("name"),
            "keys": None if keys == "ordinary" else keys,
            "contexts": short_hash(part("contexts").get("hash")),
            "second moment": part("second_moment").get("corpus"),
            "firsttok": part("versions").get("firsttok"),
        }

    @property
    def _text(self) -> str:
        """What it says: the prompt and the new target; empty without a fact."""
        rewrite = self.provenance.get("fact", {}).get("requested_rewrite", {})
        prompt = str(rewrite.get("prompt", "")).replace("{}", str(rewrite.get("subject", "")))
        return f"{prompt} {rewrite.get('target_new', {}).get('str', '')}".strip()

    def panel(self) -> Panel:
        """The components of the update, and how its value was found."""
        plot = Plot(
            title="loss of the value optimisation",
            series={"loss": self.losses},
            x_label="step",
            y_label="loss",
            log=True,
        )
        return Panel(
            title=f"rank-one edit of layer {self.layer}: {self._text}",
            parts=[self.report.table(), plot],
            source=self.origin,
        )

    @property
    def title(self) -> str:
        """The fact and the method, for messages and records."""
        method = self.provenance.get("method", {}).get("name", "no named method")
        return f"{self._text or 'an edit of no fact'} ({method}, layer {self.layer})"

    @property
    def content_hash(self) -> str:
        """SHA-256 of what it does to the weights: both vectors and their place."""
        return content_hash(
            [self.stack, self.layer, tensor_hash(self.left), tensor_hash(self.right)]
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """The edit site that it changes."""
        return ((self.stack, self.layer),)

    def changed(
        self, site: EditSite, weight: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows columns"]:
        """Return the content of its site's weight with the update added.

        Raises:
            NonFiniteError: If the sum does not fit into the weight's type.
        """
        update = self.delta.to(device=weight.device, dtype=weight.dtype)
        content = weight + site.in_layout(update)
        if not bool(torch.isfinite(content).all()) and bool(torch.isfinite(weight).all()):
            raise NonFiniteError(
                f"the edit {self.title} does not fit into {str(weight.dtype)[6:]}: an entry of the "
                "weight would become infinite; load the model in float32 or bfloat16"
            )
        return content

    def apply_(self, model: Model, *, cast: bool = False, anyway: bool = False) -> AppliedEdit:
        """Add the edit to the model's weight in place, until ``undo_`` of the result.

        Args:
            model: The model.
            cast: As for :meth:`applied`.
            anyway: As for :meth:`applied`.

        Raises:
            EditMismatchError: As for :meth:`applied`.
            NonFiniteError: As for :meth:`applied`.
            ViewError: If the model is a view whose edits do not stand in the weights.
        """
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
        on to hold them behind the block, as one of :meth:`firsttok.models.Model.edited` does.

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
    def site_in(self, model: Model, *, cast: bool = False, anyway: bool = False) -> EditSite:
        """Return the model's edit site for this edit.

        Args:
            model: The model.
            cast: As for :meth:`applied`.
            anyway: As for :meth:`applied`.

        Raises:
            EditMismatchError: If the edit was made for another model, or does not fit.
        """
        self.check(model, cast=cast, anyway=anyway)
        return model.site(self.layer, stack=self.stack)

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
        site = model.site(self.layer, stack=self.stack)
        if (site.d_mlp, site.d_model) != (self.left.shape[0], self.right.shape[0]):
            raise EditMismatchError(
                f"the edit has shape [{self.left.shape[0]}, {self.right.shape[0]}], but layer "
                f"{self.layer} of {model.name} has [{site.d_mlp}, {site.d_model}]"
            )

    def _check_type(self, made: dict[str, Any], model: Model, *, cast: bool) -> None:
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

    def _check_state(self, made: dict[str, Any], model: Model) -> None:
        """Whether configuration, tokenizer and what else stands in the weights are as they were."""
        own = model.record_of_type
        for name, what in (("config", "configuration"), ("tokenizer", "tokenizer")):
            if made.get(name, own[name]) != own[name]:
                raise EditMismatchError(
                    f"the edit was made for the weights of {model.name} with another {what}; load "
                    "that model, or pass anyway=True"
                )
        below: list[dict[str, str]] = made.get("edits", [])
        standing = [edit.content_hash for edit in model.edits]
        if [edit["hash"] for edit in below] != standing[: len(below)]:
            titles = ", then ".join(edit["title"] for edit in below)
            raise EditMismatchError(
                f"the edit was computed on a model with other edits in it ({titles}); this one has "
                f"{'others' if standing else 'none'}. Give those first, in that order (on the "
                "command line before this file, in Python with model.edited), or pass anyway=True "
                "in Python"
            )
        changed: dict[str, str] = made.get("changed", {})
        if changed and not changed.items() <= model.weights.changes().items():
            raise EditMismatchError(
                f"the edit was computed on weights that had been changed otherwise "
                f"({', '.join(changed)}), and they are not so now; pass anyway=True to apply it "
                "all the same"
            )

    def save(self, path: str | Path) -> None:
        """Write ``left`` and ``right`` as safetensors, with the provenance as metadata.

        Raises:
            CacheError: If the file cannot be written.
        """
        record = {
            "layer": self.layer,
            "stack": self.stack,
            "report": self.report.as_dict(),
            "losses": list(self.losses),
            "provenance": self.provenance,
        }
        tensors = {"left": self.left, "right": self.right}
        write_tensors(Path(path), tensors, {"firsttok_edit": json.dumps(record)})


@taken
def load_edit(path: str | Path) -> RankOneEdit:
    """Read an edit written by :meth:`RankOneEdit.save`; applying it checks the model.

    Raises:
        BadInputError: If the file is missing, truncated or no edit.
        NonFiniteError: If a vector holds NaN or infinity.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path, "an edit")
    try:
        record = json.loads(metadata["firsttok_edit"])
        left, right = tensors["left"], tensors["right"]
        for parts in _OBJECTS:
            found = record["provenance"]
            for part in parts:
                found = found.get(part, {})
            if not isinstance(found, dict):
                raise TypeError(".".join(parts))
        for below in record["provenance"].get("model", {}).get("edits", []):
            if not (isinstance(below["hash"], str) and isinstance(below["title"], str)):
                raise TypeError("edits")
        edit = RankOneEdit(
            left=left,
            right=right,
            layer=whole_number(record["layer"], "layer", least=0),
            stack=record["stack"],
            report=UpdateReport(**record["report"]),
            losses=tuple(record["losses"]),
            provenance=record["provenance"],
        )
    except (AttributeError, BadInputError, KeyError, RecursionError, TypeError, ValueError):
        raise BadInputError(f"{path} is no edit saved by firsttok; save one with --save") from None
    if any(each.ndim != 1 or not each.is_floating_point() for each in (left, right)):
        raise BadInputError(f"{path} holds vectors of the wrong shape or type; save the edit again")
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NonFiniteError(f"{path} holds NaN or infinity; compute the edit again")
    return edit
