"""Training of MEND's network: edits of our own making, and text that is to stay as it was.

The loss of an edit is ``c_edit * NLL(edit) + c_loc * KL(before || after)`` (Mitchell et al. 2022,
Section 3.2): the target behind the prompt, or behind a rephrase of it, after the edit; and the
divergence at text that has nothing to do with it. What lies below the first edited block is run
once for each text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from firsttok.arguments import LARGEST, seed_number, take_fields, taken
from firsttok.console import own_bar
from firsttok.data import Fact, find_corpus
from firsttok.editing.mend import Hooks, edit_labels, gradient_rows, target_nll
from firsttok.editing.mend_edits import mend_edits
from firsttok.editing.mend_network import MendNetwork
from firsttok.engine.tail import Replay, Tail
from firsttok.errors import BadInputError, NonFiniteError, UnsupportedModelError
from firsttok.models import PORTS, Model, Place, capture_tail
from firsttok.prompts import Prompt, batches, pad, text_prompt
from firsttok.storage import content_hash, read_tensors, write_tensors
from firsttok.tensors import TokenBatch

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["CURVES", "MendPlan", "MendTarget", "TrainedMend", "train_mend"]

_MOST_NORM = 100.0
"""Gradients are clipped to it, as released."""
_WINDOW = 24
"""Tokens of a text that is to stay as it was."""
_READ = 8
"""At how many of its last tokens the divergence is measured."""
_CAPTURED = 2048
"""Tokens of a batch that is run once."""
CURVES = ("step", "loss", "edit_nll", "rephrase_nll", "kl", "success", "rephrase_success")
"""What a look at the validation edits measures: means over them, and the step."""


class MendTarget(str, Enum):
    """Behind which prompt the target is to be likely after the edit."""

    SAME = "same"
    """The very prompt of the edit, as in the fork of EasyEdit."""
    REPHRASE = "rephrase"
    """A rephrase of it, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class MendPlan:
    """What fixes a training; two trainings of one plan on one model give the same network.

    Raises:
        BadInputError: If a number is out of range.
    """

    layers: tuple[int, ...] = ()
    """Layers whose MLPs are changed, all matrices of each; empty for the last three."""
    target: MendTarget = MendTarget.REPHRASE
    """Where the edit's loss is read."""
    steps: int = 300
    """Most steps of Adam."""
    batch: int = 4
    """Edits of a step, each made alone on the unedited model."""
    seed: int = 0
    """Seed of the network, of the edits and of the text."""
    edits: int = 1000
    """Edits to train on."""
    texts: int = 500
    """Windows of text that is to stay as it was."""
    validation: int = 40
    """Edits to stop by, of other subjects, each with a window of its own."""
    rank: int = 64
    """Rank of the networks' blocks."""
    lr: float = 1e-4
    """Adam's learning rate of the networks."""
    rate: float = -1e-3
    """The rate that every matrix begins with; negative ones go down the gradient."""
    rate_lr: float = 1e-5
    """Adam's learning rate of the rates."""
    edit_weight: float = 0.1
    """Weight of the edit's NLL in the loss."""
    locality_weight: float = 1.0
    """Weight of the divergence."""
    every: int = 50
    """Steps between two looks at the validation edits, at which the training is saved, too."""
    patience: int = 10
    """Looks without a better one, after which the training ends."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        take_fields(self)
        for name in ("steps", "batch", "edits", "texts", "validation", "rank", "every", "patience"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("lr", "rate_lr"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise BadInputError(f"{name} is {getattr(self, name)}; give a number above 0")
        if not abs(self.rate) <= LARGEST:
            raise BadInputError(f"rate is {self.rate}; give a finite number")
        weights = (self.edit_weight, self.locality_weight)
        if not all(0 <= weight <= LARGEST for weight in weights) or not any(weights):
            raise BadInputError(
                f"edit_weight and locality_weight are {weights[0]} and {weights[1]}; give numbers "
                "of at least 0, and one above it"
            )
        if len(set(self.layers)) < len(self.layers):
            raise BadInputError(f"the layers are {list(self.layers)}; give each once")
        seed_number(self.seed)

    def places(self, model: Model) -> tuple[Place, ...]:
        """The matrices of a model that are changed, layer by layer.

        Raises:
            BadInputError: If a layer is the first one, below which there is nothing to keep.
            LayerOutOfRangeError: If there is no such layer.
        """
        count = model.n_layers
        layers = self.layers or tuple(range(max(count - 3, 1), count))
        found: list[Place] = []
        for layer in sorted(layers):
            if layer < 1:
                raise BadInputError("MEND is trained on layers above the first; leave layer 0 out")
            place = model.site(layer).place
            every = [place._replace(port=port) for port in PORTS]
            found += [each for each in every if each in model.weights.sites]
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain content for records."""
        return asdict(self) | {"layers": list(self.layers), "target": self.target.value}


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedMend:
    """The best network of a training, and its curves."""

    network: MendNetwork
    """The network at the best look, its blocks rounded to float16, in which it is stored."""
    validation: Mapping[str, float]
    """What that network does on the validation edits, by name."""
    curves: tuple[Mapping[str, float | int], ...]
    """What each look at the validation edits found, by name; the first is before any step."""
    best_step: int
    """The step of the best one."""
    steps: int
    """Steps that were made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    """One text with what is below the edited blocks run, and the places that are read."""

    tail: Tail
    where: Tensor
    labels: Int[Tensor, "label"]

    def logits(self, bridge: Any) -> Float[Tensor, "label vocab"]:
        return self.tail.logits(bridge, self.where)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Example:
    """An edit, and where its success is read."""

    edit: _Text
    rephrase: _Text


@dataclass(frozen=True, kw_only=True, eq=False)
class _Data:
    training: tuple[_Example, ...]
    validation: tuple[_Example, ...]
    text: tuple[_Text, ...]
    validation_text: tuple[_Text, ...]


@taken
def train_mend(
    model: Model,
    plan: MendPlan,
    *,
    folder: Path,
    progress: "Progress | None" = None,
) -> TrainedMend:
    """Train a network, or go on with a training that was interrupted.

    The statistics by which rows are standardised are those of all training edits, taken before the
    first step: every edit is made on the unedited model, so they do not depend on the network. The
    released training counts them up as it goes. Every step draws its edits from the seed and its
    own number, so that a training that goes on makes the same steps.

    Args:
        model: The model.
        plan: The settings.
        folder: Where the state is kept, as ``training.safetensors``.
        progress: Where to show progress.

    Raises:
        BadInputError: If a setting does not go with the model, or the folder holds the state of
            another training.
        NonFiniteError: If the loss becomes infinite or NaN.
        UnsupportedModelError: If the model is no plain stack of blocks.
    """
    if model.replay is Replay.WHOLE:
        raise UnsupportedModelError(
            f"{model.name} is no plain stack of blocks, so that its last ones cannot be run alone; "
            "MEND is not trained on it"
        )
    places = plan.places(model)
    # What a kept state belongs to.
    of_plan = {"plan": plan.as_dict(), "model": model.identity()}
    with own_bar(progress) as bar, model.standing():
        data = _prepared(model, plan, min(place.layer for place in places), bar)
        network = MendNetwork.initial(model, places, rank=plan.rank, rate=plan.rate, seed=plan.seed)
        trainer = _Trainer.begin(model, plan, _with_statistics(model, network, data.training))
        file = folder / "training.safetensors"
        if file.is_file():
            trainer.restore(file, of_plan)
        task = bar.add_task("training MEND", total=plan.steps, completed=trainer.step)
        while not trainer.is_over:
            if trainer.step % plan.every == 0 and not trainer.looked:
                trainer.look(data)
                trainer.keep(file, of_plan)
                continue
            trainer.advance(data)
            bar.advance(task)
        if not trainer.looked:
            trainer.look(data)
            trainer.keep(file, of_plan)
        bar.update(task, completed=plan.steps)
        network = trainer.best.rounded()
        validation = trainer.measured(data, network)
    return TrainedMend(
        network=network,
        validation=validation,
        curves=tuple(trainer.curves),
        best_step=trainer.best_step,
        steps=trainer.step,
    )


def _prepared(model: Model, plan: MendPlan, first: int, bar: "Progress") -> _Data:
    examples = mend_edits(model, plan.edits, plan.validation, seed=plan.seed)
    facts = [*examples.training, *examples.validation]
    windows = _windows(model, plan)
    texts = [
        *(edit_labels(model, fact) for fact in facts),
        *(edit_labels(model, _rephrased(fact)) for fact in facts),
        *((window, []) for window in windows),
    ]
    ready = _run_below(model, texts, first - 1, bar)
    count, held_out = len(facts), len(examples.training)
    pairs = [
        _Example(edit=edit, rephrase=rephrase)
        for edit, rephrase in zip(ready[:count], ready[count : 2 * count], strict=True)
    ]
    rest = ready[2 * count :]
    return _Data(
        training=tuple(pairs[:held_out]),
        validation=tuple(pairs[held_out:]),
        text=tuple(rest[: -plan.validation]),
        validation_text=tuple(rest[-plan.validation :]),
    )


def _rephrased(fact: Fact) -> Fact:
    return replace(fact, template=fact.paraphrases[0].replace(fact.subject, "{}", 1))


def _windows(model: Model, plan: MendPlan) -> list[Prompt]:
    """Windows of the shipped corpus, those of the validation last."""
    found: list[Prompt] = []
    lead = list(model.leading_ids)
    for document in find_corpus("sampled").documents:
        ids = list(text_prompt(model, document).token_ids)[len(lead) :]
        for start in range(0, len(ids) - _WINDOW + 1, _WINDOW):
            window = (*lead, *ids[start : start + _WINDOW])
            found.append(Prompt(text=document[:40], token_ids=window))
    wanted = plan.texts + plan.validation
    if wanted > len(found):
        raise BadInputError(
            f"the shipped text has {len(found)} windows, and {wanted} are asked for; ask for fewer"
        )
    random = Random(f"text {plan.seed}")  # noqa: S311
    return random.sample(found, wanted)


def _run_below(
    model: Model, texts: Sequence[tuple[Prompt, list[int]]], layer: int, bar: "Progress"
) -> list[_Text]:
    """Run all texts up to a layer, those of one length together, so that nothing is padded."""
    lengths: dict[int, list[int]] = {}
    for index, (prompt, _) in enumerate(texts):
        lengths.setdefault(len(prompt.token_ids), []).append(index)
    task = bar.add_task("running what is below", total=len(texts))
    found: dict[int, _Text] = {}
    for same in lengths.values():
        for group in batches([texts[i][0] for i in same], max_tokens=_CAPTURED):
            chosen = [same[place] for place in group]
            batch = pad(model, [texts[i][0] for i in chosen])
            tail = capture_tail(model, batch, layer=layer, replay=Replay.ABOVE)
            for row, index in enumerate(chosen):
                found[index] = _text(tail.rows(torch.tensor([row])), texts[index][1])
            bar.advance(task, len(chosen))
    bar.remove_task(task)
    return [found[index] for index in range(len(texts))]


def _text(tail: Tail, labels: list[int]) -> _Text:
    batch: TokenBatch = tail.batch
    where = torch.zeros_like(batch.tokens, dtype=torch.bool)
    where[:, -(len(labels) or _READ) :] = True
    # The keys are not needed, and the rows of a batch are views of it, which would keep all of it.
    tail = replace(tail, residual=tail.residual.clone(), keys=tail.keys[..., :0])
    return _Text(
        tail=tail, where=where, labels=torch.tensor(labels, dtype=torch.long, device=batch.device)
    )


def _rows(model: Model, network: MendNetwork, text: _Text) -> dict[Place, Tensor]:
    def run(hooks: Hooks) -> Tensor:
        with model.running() as bridge, bridge.hooks(fwd_hooks=list(hooks)):
            return target_nll(text.logits(bridge), text.labels)

    rows, _ = gradient_rows(model, network.places, run)
    return rows


def _with_statistics(
    model: Model, network: MendNetwork, examples: Sequence[_Example]
) -> MendNetwork:
    statistics = network.statistics
    for example in examples:
        rows = _rows(model, network, example.edit)
        for place, shape in zip(network.places, network.shapes, strict=True):
            statistics[shape] = statistics[shape].with_rows(rows[place])
    transforms = {
        shape: replace(
            each,
            statistics=replace(
                statistics[shape],
                mean=statistics[shape].mean.float(),
                squares=statistics[shape].squares.float(),
            ),
        )
        for shape, each in network.transforms.items()
    }
    return replace(network, transforms=transforms)


def _edited(
    model: Model,
    network: MendNetwork,
    factors: Mapping[Place, tuple[Tensor, Tensor]],
    texts: Sequence[_Text],
) -> list[Float[Tensor, "label vocab"]]:
    """Log-probabilities of some texts with an edit in the model, differentiable in its factors."""
    given: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        given[hook.name] = activation

    def changed(place: Place) -> Any:
        left, right = factors[place]
        key = model.site_at(place).key_hook

        def add(output: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return output + (given[key].to(left) @ left @ right).to(output.dtype)

        return add

    sites = [model.site_at(place) for place in network.places]
    hooks = [(name, keep) for name in dict.fromkeys(site.key_hook for site in sites)]
    hooks += [(site.value_hook, changed(site.place)) for site in sites]
    with model.running() as bridge, bridge.hooks(fwd_hooks=hooks):
        return [text.logits(bridge).to(model.wide_dtype).log_softmax(-1) for text in texts]


@dataclass(kw_only=True, eq=False)
class _Trainer:
    """The state of a training, which a file holds all of."""

    model: Model
    plan: MendPlan
    start: MendNetwork
    parameters: dict[str, Tensor]
    adam: torch.optim.Adam
    best: MendNetwork
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    curves: list[dict[str, float | int]]

    @staticmethod
    def begin(model: Model, plan: MendPlan, network: MendNetwork) -> "_Trainer":
        device = model.device
        tensors = {name: each.to(device) for name, each in network.tensors().items()}
        network = network.with_tensors(tensors)
        frozen = ("mean", "squares", "tokens")
        parameters = {
            name: each.clone().requires_grad_()
            for name, each in tensors.items()
            if name.rpartition(".")[2] not in frozen
        }
        own = [each for name, each in parameters.items() if name != "rates"]
        groups = [
            {"params": own, "lr": plan.lr},
            {"params": [parameters["rates"]], "lr": plan.rate_lr},
        ]
        return _Trainer(
            model=model,
            plan=plan,
            start=network,
            parameters=parameters,
            adam=torch.optim.Adam(groups, lr=plan.lr),
            best=network,
            curves=[],
        )

    @property
    def looked(self) -> bool:
        return bool(self.curves) and self.curves[-1]["step"] == self.step

    @property
    def is_over(self) -> bool:
        waited = sum(row["step"] > self.best_step for row in self.curves)
        return self.step >= self.plan.steps or waited >= self.plan.patience

    @property
    def network(self) -> MendNetwork:
        return self.start.with_tensors({**self.start.tensors(), **self.parameters})

    def _loss(self, network: MendNetwork, example: _Example, text: _Text) -> dict[str, Tensor]:
        rows = _rows(self.model, network, example.edit)
        with torch.no_grad(), self.model.running() as bridge:
            before = text.logits(bridge).to(self.model.wide_dtype).log_softmax(-1)
        factors = {
            place: network.factors(number, rows[place], network.statistics[shape])
            for number, (place, shape) in enumerate(
                zip(network.places, network.shapes, strict=True)
            )
        }
        chosen = [example.rephrase, text]
        if self.plan.target is MendTarget.SAME or not torch.is_grad_enabled():
            chosen = [example.edit, *chosen]
        *found, after = _edited(self.model, network, factors, chosen)
        names = ["rephrase"] if len(found) == 1 else ["edit", "rephrase"]
        measured: dict[str, Tensor] = {}
        for name, log_probs in zip(names, found, strict=True):
            labels = example.edit.labels if name == "edit" else example.rephrase.labels
            measured[f"{name}_nll"] = torch.nn.functional.nll_loss(log_probs, labels)
            right = (log_probs.argmax(1) == labels).all()
            measured["success" if name == "edit" else "rephrase_success"] = right.to(log_probs)
        measured["kl"] = (before.exp() * (before - after)).sum(1).mean()
        nll = measured["edit_nll" if self.plan.target is MendTarget.SAME else "rephrase_nll"]
        measured["loss"] = self.plan.edit_weight * nll + self.plan.locality_weight * measured["kl"]
        return measured

    def advance(self, data: _Data) -> None:
        """One step of Adam on the mean loss of some edits."""
        random = Random(f"{self.plan.seed} {self.step}")  # noqa: S311
        count = min(self.plan.batch, len(data.training))
        chosen = random.sample(data.training, count)
        texts = random.choices(data.text, k=count)
        self.adam.zero_grad()
        for example, text in zip(chosen, texts, strict=True):
            with torch.enable_grad():
                loss = self._loss(self.network, example, text)["loss"] / count
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"the loss of the training became {float(loss)} at step {self.step}; "
                        "lower the learning rate"
                    )
                loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), _MOST_NORM)
        self.adam.step()
        self.step += 1

    @torch.no_grad()
    def measured(self, data: _Data, network: MendNetwork) -> dict[str, float]:
        """Means over the validation edits, each with a text of its own."""
        rows = [
            self._loss(network, example, text)
            for example, text in zip(data.validation, data.validation_text, strict=True)
        ]
        means = {name: float(sum(row[name] for row in rows) / len(rows)) for name in CURVES[1:]}
        if not math.isfinite(means["loss"]):
            raise NonFiniteError(
                f"the loss of the validation edits became {means['loss']} at step {self.step}; "
                "lower the learning rate, or bring the rate that matrices begin with nearer to 0"
            )
        return means

    def look(self, data: _Data) -> None:
        """Measure the network as it is, and keep it if it is the best."""
        network = self.network
        means = self.measured(data, network)
        self.curves.append({"step": self.step, **means})
        if means["loss"] < self.best_loss:
            self.best_loss, self.best_step = means["loss"], self.step
            tensors = {name: each.detach().clone() for name, each in network.tensors().items()}
            self.best = network.with_tensors(tensors)

    def keep(self, file: Path, of_plan: Mapping[str, Any]) -> None:
        """Write all that the next step depends on."""
        tensors = {f"now.{name}": each for name, each in self.parameters.items()}
        tensors |= {f"best.{name}": each for name, each in self.best.tensors().items()}
        for name, parameter in self.parameters.items():
            for part, each in self.adam.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{part}"] = each
        # The digest asks for rows of one stride.
        plain = {name: each.detach().contiguous() for name, each in tensors.items()}
        state = {
            "of": content_hash(dict(of_plan)),
            "step": self.step,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "curves": self.curves,
        }
        write_tensors(file, plain, {"state": json.dumps(state)})

    def restore(self, file: Path, of_plan: Mapping[str, Any]) -> None:
        """Go on from what :meth:`keep` wrote."""
        tensors, metadata = read_tensors(file, "a training of MEND")
        state: dict[str, Any] = json.loads(metadata.get("state", "{}"))
        if state.get("of") != content_hash(dict(of_plan)):
            raise BadInputError(
                f"{file} is the state of another training (other settings, or another model); "
                "give another --out, or delete it to begin again"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"now.{name}"])
                parts = {
                    part: tensors[f"adam.{name}.{part}"].to(
                        "cpu" if part == "step" else parameter.device
                    )
                    for part in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{name}.{part}" in tensors
                }
                if parts:
                    self.adam.state[parameter] = parts
        best = {
            name.removeprefix("best."): each
            for name, each in tensors.items()
            if name.startswith("best.")
        }
        self.best = self.start.with_tensors(best)
        self.step, self.best_step = state["step"], state["best_step"]
        self.best_loss, self.curves = state["best_loss"], state["curves"]
