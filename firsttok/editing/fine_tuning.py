"""Fine-tuning one matrix, with or without a bound: the baselines FT and FT-M of the papers.

Adam changes the last matrix of one MLP until the new target is likely; FT keeps every entry in a
ball around the weight it began with (Zhu et al. 2020). The edited layer's key depends on nothing
that changes, so that in a step only ``k D`` is made anew, and the blocks above run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from firsttok.arguments import LARGEST, take_fields, taken
from firsttok.data import Fact
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit, EditSettings
from firsttok.editing.record import edit_record
from firsttok.editing.value import memory_budget
from firsttok.engine.batching import BATCH_COST, cheapest_split
from firsttok.engine.fused import Packing
from firsttok.engine.tail import Replay, Tail
from firsttok.errors import (
    BadInputError,
    EditMismatchError,
    EmptyTargetError,
    HyperparameterError,
    NonFiniteError,
)
from firsttok.models import EditSite, Model, capture_tail
from firsttok.prompts import Prompt, pad, text_prompt, with_target
from firsttok.tensors import WeightInOut

__all__ = ["FINE_TUNING", "FT", "FT_M", "FT_UNBOUND", "FineTuningEditor", "FineTuningLoss"]


class FineTuningLoss(str, Enum):
    """Where the target's tokens are read; the loss is the mean of ``-log p`` over them."""

    PROMPT_LAST = "prompt-last"
    """All at the prompt's last token, as if each were the next one: the released loss.

    The target is tokenised on its own after one more space, with the tokens that begin every
    prompt; tokens that the tokenizer does not know do not count.
    """
    TEACHER_FORCED = "teacher-forced"
    """Each after the prompt and the target's tokens before it: FT-M."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One fact: what is run, and what is read where."""

    prompt: Prompt
    """The tokens that are run."""
    reads: tuple[int, ...]
    """Position that each token of the target is predicted at, in order."""
    labels: tuple[int, ...]
    """The target's tokens."""

    @property
    def width(self) -> int:
        """Number of tokens that are run."""
        return len(self.prompt.token_ids)


_EditRows = tuple[_Row, ...]
"""The rows of one edit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """The rows of several edits, each with a change of its own."""

    edits: tuple[_EditRows, ...]
    """The rows of each edit."""
    tail: Tail
    packing: Packing
    """Where the real tokens are."""
    keys: tuple[Float[Tensor, "_ d_mlp"], ...]
    """Each edit's keys at the real tokens of its rows."""
    where: Bool[Tensor, "row pos"]
    """Places whose logits are read."""
    places: Int[Tensor, "label"]
    """Which of them each label is read at."""
    labels: Int[Tensor, "label"]
    """Tokens that are to be predicted."""
    owners: Int[Tensor, "label"]
    """Edit of each."""
    shares: Float[Tensor, "label"]
    """Weight of each in its edit's loss: a mean over rows of the mean over the row's tokens."""

    @staticmethod
    def of(edits: Sequence[_EditRows], tail: Tail) -> "_Batch":
        """Put rows and their tail together."""
        mask = tail.batch.attention_mask.bool()
        where = torch.zeros(mask.shape, dtype=torch.bool)
        places: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        shares: list[float] = []
        keys: list[Tensor] = []
        row = known = 0
        starts = tail.batch.starts.tolist()
        for owner, rows in enumerate(edits):
            keys.append(tail.keys[row : row + len(rows)][mask[row : row + len(rows)]])
            for one in rows:
                found = {read: known + i for i, read in enumerate(sorted(set(one.reads)))}
                known += len(found)
                where[row, [starts[row] + read for read in found]] = True
                places += [found[read] for read in one.reads]
                labels += one.labels
                owners += [owner] * len(one.labels)
                shares += [1 / (len(one.labels) * len(rows))] * len(one.labels)
                row += 1
        device = mask.device
        return _Batch(
            edits=tuple(edits),
            tail=tail,
            packing=Packing(mask),
            keys=tuple(keys),
            where=where.to(device),
            places=torch.tensor(places, device=device),
            labels=torch.tensor(labels, device=device),
            owners=torch.tensor(owners, device=device),
            shares=torch.tensor(shares, device=device, dtype=torch.float64),
        )

    def only(self, kept: Sequence[int]) -> "_Batch":
        """Drop all other edits."""
        ends = [0]
        for rows in self.edits:
            ends.append(ends[-1] + len(rows))
        index = [row for edit in kept for row in range(ends[edit], ends[edit + 1])]
        rows = torch.tensor(index, device=self.where.device)
        return _Batch.of([self.edits[edit] for edit in kept], self.tail.rows(rows))

    def gained(self, changes: Sequence[WeightInOut]) -> Float[Tensor, "place d_model"]:
        """What each real token's MLP puts out besides, ``k D``."""
        pairs = zip(self.keys, changes, strict=True)
        return torch.cat([keys.to(change) @ change for keys, change in pairs])

    def losses(self, model: Model, gained: Float[Tensor, "place d_model"]) -> Float[Tensor, "edit"]:
        """The loss of each edit."""
        with model.running() as bridge:
            logits = self.tail.logits(bridge, self.where, self.packing.unpack(gained))
        log_probs = logits.to(gained.dtype).log_softmax(-1)
        nll = -log_probs[self.places, self.labels]
        none = gained.new_zeros(len(self.edits))
        return none.index_add(0, self.owners, nll * self.shares.to(nll))

    def put_gradients(
        self, changes: Sequence[WeightInOut], gradient: Float[Tensor, "place d_model"]
    ) -> None:
        """Overwrite the gradient of each change, from that of what was gained."""
        parts = gradient.split([len(keys) for keys in self.keys])
        for change, keys, part in zip(changes, self.keys, parts, strict=True):
            # In place: pages of a large new tensor take longer than the product.
            torch.mm(keys.to(part).T, part, out=change.grad)


@dataclass(frozen=True, kw_only=True, eq=False)
class FineTuningEditor:
    """Fine-tuning of the MLP's last matrix at one layer, and of nothing else.

    The defaults are the released FT with its bound. On GPT-2-XL and GPT-J the released code also
    trains the bias of that matrix, since it takes every parameter whose name contains a pattern.
    Here the bias stays as it is, so that an edit is a change of one matrix on every architecture.

    Several facts in one edit are one batch: the loss is the mean over facts. The released code
    steps once for every 64 of them; here every step sees all.

    Raises:
        HyperparameterError: If a number is outside its range.
    """

    layer: int | None = None
    """Layer to edit; None for the model's default."""
    eps: float | None = 5e-4
    """How far each entry may be from its value at the beginning of *this* edit; None for no bound.

    In a sequence the ball moves along: after n edits an entry may be n times as far away."""
    learning_rate: float = 5e-4
    """Adam's learning rate; its state is new in each edit, and knows nothing of the bound."""
    steps: int = 25
    """Most losses, each followed by an update unless it is below ``stop_at``."""
    stop_at: float = 1e-2
    """The edit ends, without another update, as soon as the loss is below this."""
    loss: FineTuningLoss = FineTuningLoss.PROMPT_LAST
    """Where the target's tokens are read."""
    name: str = "ft"
    label: str = "FT"

    def __post_init__(self) -> None:
        """Check the ranges."""
        take_fields(self)
        if self.steps < 1:
            raise HyperparameterError(f"steps is {self.steps}; give a whole number of at least 1")
        for name in ("learning_rate", "eps"):
            value: float | None = getattr(self, name)
            if value is not None and not 0 < value <= LARGEST:
                what = ", or None for no bound" if name == "eps" else ""
                raise HyperparameterError(
                    f"{name} is {value}; give a finite number greater than 0{what}"
                )
        if not 0 <= self.stop_at < math.inf:
            raise HyperparameterError(
                f"stop_at is {self.stop_at}; give a finite number of at least 0"
            )

    @taken
    def edit(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Compute one edit that writes all the facts; the model is left as it is.

        Args:
            model: The model, or a view of it.
            facts: The facts.

        Raises:
            BadInputError: If there is no fact.
            EmptyTargetError: If a target is empty, or holds no token that the tokenizer knows.
            NonFiniteError: If a loss is not finite.
            EditMismatchError: If the model is changed while the edit is computed.
            UnsupportedModelError: If the model is no decoder.
        """
        if not facts:
            raise BadInputError(f"{self.label} was given no fact; give at least one")
        (edit,) = self._edits(model, [facts])
        return edit

    def edit_all(
        self,
        model: Model,
        facts: Sequence[Fact],
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Edit]:
        """As :meth:`~firsttok.editing.edit.SideBySideEditor.edit_all`: steps side by side."""
        return self._edits(model, [[fact] for fact in facts], on_step)

    def described(self, model: Model) -> dict[str, Any]:
        """Name and settings, as the record of an edit has them."""
        return {
            "name": self.name,
            "layer": model.site(self.layer).layer,
            "eps": self.eps,
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "stop_at": self.stop_at,
            "loss": self.loss.value,
        }

    def moments_of(self, model: Model, layer: int) -> tuple[int, ...]:
        """As :meth:`~firsttok.editing.edit.OpenEditor.moments_of`: it needs none."""
        del model, layer
        return ()

    def completed(self, settings: EditSettings) -> "FineTuningEditor":
        """Take the layer from a study where it is open."""
        return self if self.layer is not None else replace(self, layer=settings.layer)

    def _edits(
        self,
        model: Model,
        facts: Sequence[Sequence[Fact]],
        on_step: Callable[[int], None] | None = None,
    ) -> list[Edit]:
        """An edit for each group of facts."""
        identity, record, site = model.identity(), model.record(), model.site(self.layer)
        editor, names = self.described(model), {str(site.place): model.weights.name_of(site.place)}
        rows = [tuple(self._row(model, fact) for fact in group) for group in facts]
        found: dict[int, Edit] = {}
        for group in _groups(model, rows, site):
            changes, traces = self._optimised(model, [rows[i] for i in group], site, on_step)
            for index, change, losses in zip(group, changes, traces, strict=True):
                found[index] = Edit(
                    deltas=(Delta(place=site.place, left=change),),
                    components=self._components(change),
                    losses=tuple(losses),
                    provenance=edit_record(record, facts[index], editor=editor, parameters=names),
                )
        if model.identity() != identity:
            raise EditMismatchError(
                f"{model.name} was changed while edits were computed on it; compute them again"
            )
        return [found[index] for index in range(len(facts))]

    def _row(self, model: Model, fact: Fact) -> _Row:
        bare = text_prompt(model, fact.prompt)
        if self.loss is FineTuningLoss.TEACHER_FORCED:
            full = with_target(model, bare, fact.target_new, join=fact.join)
            # The last token is predicted but never read.
            run = Prompt(text=full.text, token_ids=full.token_ids[:-1])
            reads = range(len(bare.token_ids) - 1, len(run.token_ids))
            return _Row(prompt=run, reads=tuple(reads), labels=full.target_ids)
        tokenizer: Any = model.tokenizer
        known: tuple[int, ...] = ()
        if fact.target_new.strip():
            ids = text_prompt(model, f" {fact.target_new}").token_ids
            known = tuple(each for each in ids if each != tokenizer.unk_token_id)
        if not known:
            raise EmptyTargetError(
                f"the target after {fact.prompt!r} has no token that the tokenizer knows; give a "
                "word"
            )
        return _Row(prompt=bare, reads=(bare.last_position,) * len(known), labels=known)

    def _optimised(
        self,
        model: Model,
        edits: Sequence[_EditRows],
        site: EditSite,
        on_step: Callable[[int], None] | None,
    ) -> tuple[list[WeightInOut], list[list[float]]]:
        """The change of each edit, and its losses."""
        shape, wide, device = (site.d_mlp, site.d_model), model.wide_dtype, model.device
        changes = [torch.zeros(shape, dtype=wide, device=device) for _ in edits]
        for change in changes:
            change.grad = torch.empty_like(change)
        adam = torch.optim.Adam(changes, lr=self.learning_rate, fused=True)
        traces: list[list[float]] = [[] for _ in edits]
        prompts = [row.prompt for rows in edits for row in rows]
        active = list(range(len(edits)))
        with model.standing(), torch.no_grad():
            batch = _Batch.of(edits, capture_tail(model, pad(model, prompts), layer=site.layer))
            for step in range(self.steps):
                gained = batch.gained([changes[index] for index in active])
                with torch.enable_grad():
                    losses = batch.losses(model, gained.requires_grad_())
                found: list[float] = losses.tolist()
                for index, loss in zip(active, found, strict=True):
                    if not math.isfinite(loss):
                        text = edits[index][0].prompt.text
                        raise NonFiniteError(
                            f"the loss of {text!r} became {loss} at step {step}; lower the "
                            "learning rate or use float32"
                        )
                    traces[index].append(loss)
                if on_step is not None:
                    on_step(len(found))
                going = [place for place, loss in enumerate(found) if loss >= self.stop_at]
                if not going:
                    break
                # Not backward(): it would leave gradients on weights of the model that ask for one.
                (gradient,) = torch.autograd.grad(losses, gained, torch.ones_like(losses))
                batch.put_gradients([changes[index] for index in active], gradient)
                for place in set(range(len(active))).difference(going):
                    # An optimiser passes by what has none.
                    changes[active[place]].grad = None
                active = [active[place] for place in going]
                adam.step()
                if self.eps is not None:
                    for index in active:
                        changes[index].clamp_(-self.eps, self.eps)
                if len(going) < len(found):
                    batch = batch.only(going)
        return changes, traces

    def _components(self, change: WeightInOut) -> dict[str, float]:
        found = {"largest_entry": float(change.abs().max())}
        if self.eps is not None:
            # The bound as the weights' type has it.
            bound = change.new_tensor(self.eps)
            found["share_at_bound"] = float((change.abs() >= bound).double().mean())
        return found


def _groups(model: Model, edits: Sequence[_EditRows], site: EditSite) -> list[list[int]]:
    """Edits that share a batch, as many as the memory budget holds."""
    order = sorted(range(len(edits)), key=lambda i: max(row.width for row in edits[i]))
    budget, packed = memory_budget(model), model.runs_packed

    def tokens(start: int, end: int) -> int:
        widths = [row.width for i in order[start:end] for row in edits[i]]
        return sum(widths) if packed else len(widths) * max(widths)

    def held(start: int, end: int) -> int:
        """Bytes of each change with its gradient and moments, of activations, and of logits."""
        above = model.n_layers if model.replay is Replay.WHOLE else model.n_layers - site.layer
        each = above * (12 * site.d_model + 4 * site.d_mlp)
        places = sum(len(set(row.reads)) for i in order[start:end] for row in edits[i])
        logits = 4 * places * int(model.weights.bridge.cfg.d_vocab)
        own = 4 * (end - start) * site.d_mlp * site.d_model
        size = torch.finfo(model.wide_dtype).bits // 8
        return size * (own + each * tokens(start, end) + logits)

    split = cheapest_split(
        len(order),
        tokens,
        lambda start, end: held(start, end) <= budget,
        batch_cost=BATCH_COST["cuda" if model.device.type == "cuda" else "cpu"],
    )
    return [[order[place] for place in places] for places in split]


FT = FineTuningEditor()
"""FT with the bound released for GPT-2-XL, at the layer of the study (there: layer 0)."""
FT_UNBOUND = FineTuningEditor(name="ft-unbound", label="FT unbound", eps=None)
"""FT without a bound, as released for GPT-J and Llama2, at the layer of the study (there: 21)."""
FT_M = FineTuningEditor(name="ft-m", label="FT-M", loss=FineTuningLoss.TEACHER_FORCED)
"""FT with the proper loss: every target token after those before it."""
FINE_TUNING: tuple[FineTuningEditor, ...] = (FT, FT_UNBOUND, FT_M)
"""Fine-tuning by name."""
