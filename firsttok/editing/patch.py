"""A rank-one edit as an object: two vectors, where they go, and where they come from."""

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firsttok.arguments import take_fields, taken, whole_number
from firsttok.display import Panel, Plot, Shown, short_hash
from firsttok.editing.update import UpdateReport
from firsttok.errors import BadInputError, EditMismatchError, NonFiniteError
from firsttok.models import EditSite, Model
from firsttok.storage import atomic_path, read_safetensors
from firsttok.tensors import KeyVector, ValueVector, WeightInOut

__all__ = ["AppliedEdit", "RankOneEdit", "load_edit"]

_OBJECTS = (
    (),
    *((name,) for name in ("contexts", "fact", "method", "model", "second_moment", "versions")),
    ("fact", "requested_rewrite"),
    ("fact", "requested_rewrite", "target_new"),
)
"""Parts of the provenance that are read again, each an object if it is there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedEdit:
    """An edit that stands in a model's weight, and how to take it out again."""

    weight: torch.nn.Parameter
    """The edited weight."""
    before: Tensor
    """Its content before."""
    after: Tensor
    """Its content right after."""

    def undo_(self) -> None:
        """Put the weight back, bit for bit.

        Raises:
            EditMismatchError: If something else changed the weight since.
        """
        if not torch.equal(self.weight, self.after):
            raise EditMismatchError(
                "the weight was changed after this edit was applied; undo the later edit first"
            )
        with torch.no_grad():
            self.weight.copy_(self.before)


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

    def panel(self) -> Panel:
        """The components of the update, and how its value was found."""
        rewrite = self.provenance.get("fact", {}).get("requested_rewrite", {})
        prompt = str(rewrite.get("prompt", "")).replace("{}", str(rewrite.get("subject", "")))
        plot = Plot(
            title="loss of the value optimisation",
            series={"loss": self.losses},
            x_label="step",
            y_label="loss",
            log=True,
        )
        return Panel(
            title=f"rank-one edit of layer {self.layer}: {prompt} "
            f"{rewrite.get('target_new', {}).get('str', '')}",
            parts=[self.report.table(), plot],
            source=self.origin,
        )

    def apply_(self, model: Model) -> AppliedEdit:
        """Add the edit to the model's weight in place, until ``undo_`` of the result.

        Raises:
            EditMismatchError: If the edit was made for another model.
        """
        site = self.site_in(model)
        before = site.weight.detach().clone()
        with torch.no_grad():
            update = self.delta.to(device=before.device, dtype=before.dtype)
            site.weight.add_(site.in_layout(update))
        return AppliedEdit(weight=site.weight, before=before, after=site.weight.detach().clone())

    @contextlib.contextmanager
    def applied(self, model: Model) -> Generator[Model, None, None]:
        """Edit the model inside a ``with`` block; it is restored bit for bit, whatever happens.

        Edits nest, and compose in order.

        Raises:
            EditMismatchError: If the edit was made for another model.
        """
        site = self.site_in(model)
        before = site.weight.detach().clone()
        try:
            with torch.no_grad():
                update = self.delta.to(device=before.device, dtype=before.dtype)
                site.weight.add_(site.in_layout(update))
            yield model
        finally:
            with torch.no_grad():
                site.weight.copy_(before)

    @taken
    def site_in(self, model: Model) -> EditSite:
        """Return the model's edit site for this edit.

        Raises:
            EditMismatchError: If the edit was made for another model, or does not fit.
        """
        expected = self.provenance.get("model", {}).get("fingerprint")
        if expected != model.fingerprint:
            made_for = self.provenance.get("model", {}).get("name", "an unknown model")
            raise EditMismatchError(
                f"the edit was made for {made_for} (weights {str(expected)[:12]}), not for "
                f"{model.name} (weights {model.fingerprint[:12]}); load that model"
            )
        site = model.site(self.layer, stack=self.stack)
        if (site.d_mlp, site.d_model) != (self.left.shape[0], self.right.shape[0]):
            raise EditMismatchError(
                f"the edit has shape [{self.left.shape[0]}, {self.right.shape[0]}], but layer "
                f"{self.layer} of {model.name} has [{site.d_mlp}, {site.d_model}]"
            )
        return site

    def save(self, path: str | Path) -> None:
        """Write ``left`` and ``right`` as safetensors, with the provenance as metadata.

        Raises:
            CacheError: If the file cannot be written.
        """
        from safetensors.torch import save_file

        record = {
            "layer": self.layer,
            "stack": self.stack,
            "report": self.report.as_dict(),
            "losses": list(self.losses),
            "provenance": self.provenance,
        }
        tensors = {"left": self.left.contiguous().cpu(), "right": self.right.contiguous().cpu()}
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, str(temporary), {"firsttok_edit": json.dumps(record)})


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
