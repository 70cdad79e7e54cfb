"""Training of MEND's network: how it is trained, and how an interrupted training goes on.

The loss of an edit is ``c_edit * NLL(edit) + c_loc * KL(before || after)`` (Mitchell et al. 2022,
Section 3.2): the target after the prompt, or after a rephrase of it, after the edit; and the
divergence at text that has nothing to do with it. What lies below the first edited block is run
once for each text.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import taken
from firsttok.console import own_bar
from firsttok.editing.mend import Hooks, gradient_rows, target_nll
from firsttok.editing.mend_network import MendNetwork
from firsttok.editing.mend_plan import MendPlan, MendTarget
from firsttok.editing.mend_tensors import is_of_block
from firsttok.editing.mend_texts import EditPair, ReadyText, TrainingTexts, prepare_training
from firsttok.engine.tail import Replay
from firsttok.errors import BadInputError, NonFiniteError, UnsupportedModelError
from firsttok.models import Model, Place
from firsttok.storage import content_hash, read_tensors, write_tensors

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["CURVES", "TrainedMend", "train_mend"]

_MOST_NORM = 100.0
"""Gradients are clipped to it, as released."""
_ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of a parameter."""
CURVES = ("step", "loss", "edit_nll", "rephrase_nll", "kl", "success", "rephrase_success")
"""What a look at the validation edits measures: means over them, and the step."""


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
        BadInputError: If a setting does not go with the model, or the folder holds a damaged state
            or that of another training.
        NonFiniteError: If the loss becomes infinite or NaN.
        UnsupportedModelError: If the model is no plain stack of blocks.
    """
    if model.replay is Replay.WHOLE:
        raise UnsupportedModelError(
            f"{model.name} is no plain stack of blocks, so that its last ones cannot be run alone; "
            "MEND is not trained on it"
        )
    places = plan.places(model)
    network = MendNetwork.initial(model, places, rank=plan.rank, rate=plan.rate, seed=plan.seed)
    file = folder / "training.safetensors"
    of = content_hash({"plan": plan.as_dict(), "model": model.identity()})
    # Before the minutes in which the texts are run.
    state = _State.read(file, of, network)
    with own_bar(progress) as bar, model.standing():
        data = prepare_training(model, plan, min(place.layer for place in places), bar)
        trainer = _Trainer.begin(model, plan, _with_statistics(model, network, data.training))
        if state is not None:
            trainer.restore(state)
        task = bar.add_task("training MEND", total=plan.steps, completed=trainer.step)
        while not trainer.is_over:
            if trainer.step % plan.every == 0 and not trainer.looked:
                trainer.look(data)
                trainer.keep(file, of)
                continue
            trainer.advance(data)
            bar.advance(task)
        if not trainer.looked:
            trainer.look(data)
            trainer.keep(file, of)
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


def _rows(model: Model, network: MendNetwork, text: ReadyText) -> dict[Place, Tensor]:
    def run(hooks: Hooks) -> Tensor:
        with model.running() as bridge, bridge.hooks(fwd_hooks=list(hooks)):
            return target_nll(text.logits(bridge), text.labels)

    rows, _ = gradient_rows(model, network.places, run)
    return rows


def _with_statistics(
    model: Model, network: MendNetwork, examples: Sequence[EditPair]
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
    texts: Sequence[ReadyText],
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
        parameters = {
            name: each.clone().requires_grad_()
            for name, each in tensors.items()
            if _is_trained(name)
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

    def _loss(self, network: MendNetwork, example: EditPair, text: ReadyText) -> dict[str, Tensor]:
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

    def advance(self, data: TrainingTexts) -> None:
        """One step of Adam on the mean loss of some edits."""
        random = Random(f"{self.plan.seed} {self.step}")  # noqa: S311
        count = self.plan.batch
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
    def measured(self, data: TrainingTexts, network: MendNetwork) -> dict[str, float]:
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

    def look(self, data: TrainingTexts) -> None:
        """Measure the network as it is, and keep it if it is the best."""
        network = self.network
        means = self.measured(data, network)
        self.curves.append({"step": self.step, **means})
        if means["loss"] < self.best_loss:
            self.best_loss, self.best_step = means["loss"], self.step
            tensors = {name: each.detach().clone() for name, each in network.tensors().items()}
            self.best = network.with_tensors(tensors)

    def keep(self, file: Path, of: str) -> None:
        """Write all that the next step depends on, for :meth:`_State.read`."""
        tensors = {f"now.{name}": each for name, each in self.parameters.items()}
        tensors |= {f"best.{name}": each for name, each in self.best.tensors().items()}
        for name, parameter in self.parameters.items():
            for part, each in self.adam.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{part}"] = each
        # The digest asks for rows of one stride.
        plain = {name: each.detach().contiguous() for name, each in tensors.items()}
        state = {
            "of": of,
            "step": self.step,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "curves": self.curves,
        }
        write_tensors(file, plain, {"state": json.dumps(state)})

    def restore(self, state: "_State") -> None:
        """Go on from what :meth:`keep` wrote."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.tensors[f"now.{name}"])
                if state.step:
                    self.adam.state[parameter] = {
                        part: state.tensors[f"adam.{name}.{part}"].to(
                            "cpu" if part == "step" else parameter.device
                        )
                        for part in _ADAM
                    }
        self.best = self.start.with_tensors(
            {name: state.tensors[f"best.{name}"] for name in self.start.tensors()}
        )
        self.step, self.best_step = state.step, state.best_step
        self.best_loss, self.curves = state.best_loss, [dict(row) for row in state.curves]


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """What a file holds of a training that was interrupted, or has ended."""

    tensors: Mapping[str, Tensor]
    step: int
    best_step: int
    best_loss: float
    curves: Sequence[Mapping[str, float | int]]

    @staticmethod
    def read(file: Path, of: str, network: MendNetwork) -> "_State | None":
        """Read and check what :meth:`_Trainer.keep` wrote; None if there is no such file.

        Args:
            file: The file.
            of: Hash of the plan and the model that it has to belong to.
            network: A network of the tensors that it has to hold.

        Raises:
            BadInputError: If it is damaged, holds something else, or belongs to another training.
        """
        if not os.path.lexists(file):
            return None
        try:
            tensors, metadata = read_tensors(file, "the state of a training")
            held = json.loads(metadata["state"])
            another = held.pop("of") != of
            state = _State(tensors=tensors, **held)
        except (BadInputError, KeyError, TypeError, ValueError):
            raise BadInputError(
                f"{file} is damaged, or no state of a training that firsttok kept; delete it to "
                "begin again, or give another --out"
            ) from None
        if another or _shapes(tensors) != _shapes(_kept_with(network, stepped=bool(state.step))):
            raise BadInputError(
                f"{file} is the state of another training (other settings, or another model); "
                "give another --out, or delete it to begin again"
            )
        return state


def _is_trained(name: str) -> bool:
    """Whether a tensor of a network is trained; statistics are taken before."""
    return name == "rates" or is_of_block(name)


def _kept_with(network: MendNetwork, *, stepped: bool) -> dict[str, Tensor]:
    """Tensors of the names and shapes that are kept of a training of the network."""
    own = network.tensors()
    found = {f"best.{name}": each for name, each in own.items()}
    for name, each in own.items():
        if _is_trained(name):
            found[f"now.{name}"] = each
            if stepped:
                parts = (torch.zeros(()), each, each)
                found |= {f"adam.{name}.{p}": t for p, t in zip(_ADAM, parts, strict=True)}
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: each.shape for name, each in tensors.items()}
