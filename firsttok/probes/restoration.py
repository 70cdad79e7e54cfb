"""States of a clean run, put back into runs whose subject is drowned in noise.

This is the experiment of causal tracing (Meng et al. 2022, Section 2.1): a clean run gives
P(answer), where the answer is the token that the model itself puts first; a run with noise on the
embeddings of the subject's tokens gives P*; and a run with the same noise, in which some states are
what they were in the clean run, says how much those states carry.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import take_fields, taken
from firsttok.data import Fact
from firsttok.engine.forward import call_arguments, logits
from firsttok.engine.products import fast_products
from firsttok.engine.tail import Replay, Tail, new_cache
from firsttok.errors import (
    BadInputError,
    HyperparameterError,
    NonFiniteError,
    UnsupportedModelError,
)
from firsttok.models import Model, capture, capture_tail
from firsttok.prompts import Prompt, fact_prompt, pad, positions
from firsttok.storage import content_hash
from firsttok.tensors import TokenBatch

__all__ = [
    "KINDS",
    "Corruption",
    "Plan",
    "Runs",
    "State",
    "corruption_for",
    "subject_range",
]

_HOOKS = {"hidden": "hook_out", "mlp": "mlp.hook_out", "attention": "attn.hook_out"}
KINDS = tuple(_HOOKS)
"""What is restored: the residual stream after a block, or what its MLP or attention puts out."""
_EMBEDDING = "embed.hook_out"


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Gaussian noise for the embeddings of a subject's tokens.

    Raises:
        HyperparameterError: If the scale is negative or not finite, or there is no sample.
    """

    scale: float
    """Standard deviation nu of the noise, in units of the embedding."""
    samples: int = 10
    """How many draws each probability is the mean of."""
    seed: int = 0
    """Seed; every prompt has noise of its own, the same for all of its states."""

    def __post_init__(self) -> None:
        """Check the fields."""
        take_fields(self)
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise HyperparameterError(
                f"the scale of the noise is {self.scale}; give a finite number of at least 0"
            )
        if self.samples < 1:
            raise HyperparameterError(f"{self.samples} samples of noise are none; give at least 1")

    def noise(self, fact: Fact, tokens: int, width: int) -> Float[Tensor, "sample token width"]:
        """Draw a fact's noise, in float64 on the CPU."""
        seed = int(content_hash([self.seed, fact.template, fact.subject])[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        shape = (self.samples, tokens, width)
        return self.scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class State:
    """One state of the clean run that a corrupted run may be given."""

    kind: str
    """One of :data:`KINDS`."""
    layer: int
    position: int
    """Absolute position of the token."""


Plan = tuple[State, ...]
"""States that are restored together."""


@taken
def corruption_for(
    model: Model, facts: Sequence[Fact], *, factor: float = 3.0, samples: int = 10, seed: int = 0
) -> Corruption:
    """Scale the noise to the model: ``factor`` times the deviation of the subjects' embeddings.

    The deviation is taken over all entries of all subject tokens' embeddings, as they stand in the
    prompts (the released code reads subjects without their prompts). The paper's factor is three.

    Raises:
        BadInputError: If there are no facts.
    """
    embeddings: list[Tensor] = []
    for fact in facts:
        prompt = fact_prompt(model, fact)
        with torch.no_grad():
            seen = capture(model, pad(model, [prompt]), [_EMBEDDING], stop_at_layer=1)
        embeddings.append(seen[_EMBEDDING][0, slice(*subject_range(prompt))].double().cpu())
    if not embeddings:
        raise BadInputError("there are no facts whose subjects could be corrupted; give one")
    deviation = float(torch.cat(embeddings).std())
    # Its last digits hang on the machine, and it is part of what names a finished trace.
    return Corruption(scale=float(f"{factor * deviation:.6g}"), samples=samples, seed=seed)


def subject_range(prompt: Prompt) -> tuple[int, int]:
    """Positions of the subject's first token and of the one after its last.

    Raises:
        BadInputError: If the prompt has no subject.
    """
    end = int(positions([prompt])[0]) + 1
    return end - prompt.subject_length, end


class Runs:
    """The clean run of one fact, its corrupted runs, and what it takes to run those again."""

    @torch.no_grad()
    def __init__(self, model: Model, fact: Fact, corruption: Corruption) -> None:
        """Run the fact's bare prompt clean and corrupted, side by side, and keep every state.

        Raises:
            NonFiniteError: If a probability is NaN.
            UnsupportedModelError: If the model is no decoder, or does not show its states.
        """
        if not model.can_be_edited:
            raise UnsupportedModelError(
                f"{model.name} is not a decoder with a final norm and an unembedding; only such a "
                "model predicts the answer that causal tracing follows"
            )
        self.model: Model = model
        self.fact: Fact = fact
        self.corruption: Corruption = corruption
        self.prompt: Prompt = fact_prompt(model, fact)
        self.batch: TokenBatch = pad(model, [self.prompt])
        self.replays: bool = model.replay is not Replay.WHOLE and not model.sees_later
        """Whether blocks can be run by themselves, and tokens without the earlier ones."""
        both = self.batch.rows(
            torch.zeros(1 + corruption.samples, dtype=torch.long, device=model.device)
        )
        layers = range(model.n_layers)
        names = {(kind, i): _hook_name(model, kind, i) for kind in KINDS for i in layers}
        entry = f"{model.sites[0].stack}.0.hook_in"
        seen: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            seen[hook.name] = activation

        hooks: list[tuple[str, Callable[..., Tensor | None]]] = [
            (_EMBEDDING, _corrupting(corruption, fact, self.prompt, clean=1))
        ]
        read = (_EMBEDDING, entry, *names.values())
        hooks += [(name, keep) for name in read]
        cache = new_cache((), 0)
        kept = {"past_key_values": cache} if self.replays else {}
        with (
            model.running() as bridge,
            bridge.hooks(fwd_hooks=hooks),
            fast_products(model.device),
        ):
            output: Tensor = bridge(both.tokens, **call_arguments(bridge, both), **kept)[:, -1]
        missing = [name for name in read if name not in seen]
        if missing:
            raise UnsupportedModelError(
                f"hook point {missing[0]} did not fire on {model.name}; its states cannot be "
                "restored"
            )
        self.answer_id: int = int(output[0].argmax())
        """The token that the model puts first in the clean run."""
        clean, *corrupted = self._probabilities(output).tolist()
        self.clean: float = clean
        """P: its probability there."""
        self.corrupted: float = sum(corrupted) / len(corrupted)
        """P*: its probability in the corrupted runs, mean over the samples."""
        self.states: dict[tuple[str, int], Tensor] = {
            key: seen[name][0] for key, name in names.items()
        }
        """The clean run's states ``[pos, d_model]``, by kind and layer."""
        before = [entry, *(names["hidden", layer] for layer in layers)]
        self.residuals: list[Tensor] = [seen[name][1:] for name in before]
        """The corrupted runs' residual stream ``[sample, pos, d_model]`` before each block, and
        after the last."""
        self.past: list[tuple[Tensor, Tensor]] = [
            (each.keys[1:], each.values[1:]) for each in cache.layers
        ]
        """Each block's attention keys and values in the corrupted runs; empty if nothing replays.
        """

    def norms(self, position: int) -> Float[Tensor, "2 layer"]:
        """Norms of the residual stream after each layer: clean, and mean of the corrupted."""
        pairs = [
            (self.states["hidden", layer][position], self.residuals[layer + 1][:, position])
            for layer in range(self.model.n_layers)
        ]
        rows = [(one.double().norm(), many.double().norm(dim=-1).mean()) for one, many in pairs]
        return torch.tensor(rows, dtype=torch.float64).T

    def whole(self, plans: Sequence[Plan]) -> Float[Tensor, "plan"]:
        """P* with the states of each plan restored, by passes through the whole model."""
        rows = torch.zeros(len(plans) * self.corruption.samples, dtype=torch.long)
        batch = self.batch.rows(rows.to(self.model.device))
        corrupt = _corrupting(self.corruption, self.fact, self.prompt)
        hooks = [(_EMBEDDING, corrupt), *self._hooks(plans, 0)]
        with self.model.running() as bridge, bridge.hooks(fwd_hooks=hooks):
            return self._means(logits(bridge, batch)[:, -1])

    def in_groups(
        self, plans: Sequence[Plan], *, max_tokens: int
    ) -> Iterator[tuple[list[int], Float[Tensor, "plan"]]]:
        """P* with the states of each plan restored, by as little as has to run again.

        A plan is of one position, its lowest layer first; a batch has at most ``max_tokens``.

        Yields:
            Indices of plans that ran side by side, with their probabilities.
        """
        base: Tail | None = None
        for group in self._groups(plans, max_tokens):
            chosen = [plans[index] for index in group]
            if not self.replays:
                yield group, self.whole(chosen)
                continue
            cut = chosen[0][0].position
            if base is None or base.cut != cut:
                # What a model passes to its blocks hangs on tokens and positions, not on the noise.
                base = capture_tail(self.model, self.batch, layer=0, cut=cut, replay=Replay.FROM)
            yield group, self._replayed(chosen, base)

    def _replayed(self, plans: Sequence[Plan], base: Tail) -> Float[Tensor, "plan"]:
        first, cut = min(state.layer for plan in plans for state in plan), base.cut
        samples = torch.arange(self.corruption.samples, device=self.model.device)
        rows = samples.repeat(len(plans))
        same = replace(base, past=()).rows(torch.zeros_like(rows))
        past = self.past[first:] if cut else ()
        tail = replace(
            same,
            layer=first,
            residual=self.residuals[first][rows, cut:],
            arguments=same.arguments[first:],
            past=tuple((keys[rows, :, :cut], values[rows, :, :cut]) for keys, values in past),
        )
        where = torch.zeros(tail.residual.shape[:2], dtype=torch.bool, device=rows.device)
        where[:, -1] = True
        hooks = self._hooks(plans, cut)
        with self.model.running() as bridge, bridge.hooks(fwd_hooks=hooks):
            return self._means(tail.logits(bridge, where))

    def _groups(self, plans: Sequence[Plan], max_tokens: int) -> Iterator[list[int]]:
        """Plans of one position and of neighbouring layers, which have most work in common."""
        width = len(self.prompt.token_ids)
        order = sorted(range(len(plans)), key=lambda i: (plans[i][0].position, plans[i][0].layer))
        group: list[int] = []
        for index in order:
            position = plans[index][0].position
            tokens = self.corruption.samples * (width - position if self.replays else width)
            moved = bool(group) and plans[group[0]][0].position != position
            if group and (moved or (len(group) + 1) * tokens > max_tokens):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _means(self, output: Float[Tensor, "row vocab"]) -> Float[Tensor, "plan"]:
        found = self._probabilities(output)
        return reduce(found, "(plan sample) -> plan", "mean", sample=self.corruption.samples)

    def _probabilities(self, output: Float[Tensor, "row vocab"]) -> Float[Tensor, "row"]:
        wide = output.to(self.model.wide_dtype)
        found = (wide[:, self.answer_id] - wide.logsumexp(-1)).double().exp().cpu()
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(
                f"a probability of {self.model.name} is NaN or infinite; load the model in float32"
            )
        return found

    def _hooks(self, plans: Sequence[Plan], cut: int) -> list[tuple[str, Callable[..., Tensor]]]:
        places: dict[tuple[str, int], list[tuple[int, int]]] = {}
        last = (self.model.n_layers - 1, self.prompt.last_position)
        for number, plan in enumerate(plans):
            for state in plan:
                # Nothing reads what the last block puts out at an earlier token, and a replay
                # does not compute it.
                if state.layer < last[0] or state.position == last[1]:
                    at = places.setdefault((state.kind, state.layer), [])
                    at.append((number, state.position))
        samples = self.corruption.samples
        return [
            (_hook_name(self.model, *key), _putting_back(self.states[key], at, samples, cut))
            for key, at in places.items()
        ]


def _corrupting(
    corruption: Corruption, fact: Fact, prompt: Prompt, *, clean: int = 0
) -> Callable[..., Tensor]:
    """A hook that adds the samples' noise to the subject, again and again after clean rows."""
    start, end = subject_range(prompt)

    def add(embedded: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        noise = corruption.noise(fact, end - start, embedded.shape[-1]).to(embedded)
        changed = embedded.clone()
        times = (len(changed) - clean) // len(noise)
        changed[clean:, start:end] += noise.repeat(times, 1, 1)
        return changed

    return add


def _putting_back(
    clean: Float[Tensor, "pos d_model"], places: Sequence[tuple[int, int]], samples: int, cut: int
) -> Callable[..., Tensor]:
    """A hook that gives the samples of some plans the clean state at some positions."""
    numbers, positions = torch.tensor(places, device=clean.device).T
    rows = samples * numbers[:, None] + torch.arange(samples, device=clean.device)
    columns = positions[:, None] - cut

    def put(output: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        changed = output.clone()
        changed[rows, columns] = clean[positions][:, None]
        return changed

    return put


def _hook_name(model: Model, kind: str, layer: int) -> str:
    return f"{model.site(layer).stack}.{layer}.{_HOOKS[kind]}"
