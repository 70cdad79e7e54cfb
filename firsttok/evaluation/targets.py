"""How a model scores given targets behind given prompts, teacher-forced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.models import Model, logits
from firsttok.prompts import Prompt, batches, fact_prompt, pad, with_target
from firsttok.tensors import TokenBatch, TokenMask

__all__ = [
    "TargetScore",
    "score_targets",
    "scores_from",
    "target_places",
    "target_probabilities",
]


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """One target behind one prompt."""

    nll: float
    """Mean NLL of the target's tokens, in nats."""
    target_ids: tuple[int, ...]
    """The target's tokens."""
    predicted_ids: tuple[int, ...]
    """The argmax at each of the target's places, all earlier target tokens given."""

    @property
    def probability(self) -> float:
        """exp(-nll): the geometric mean of the target tokens' probabilities."""
        return math.exp(-self.nll)

    @property
    def accuracy(self) -> float:
        """Share of the target's tokens that are the argmax (note 16)."""
        hits = sum(a == b for a, b in zip(self.target_ids, self.predicted_ids, strict=True))
        return hits / len(self.target_ids)


def score_targets(model: Model, prompts: Sequence[Prompt]) -> list[TargetScore]:
    """Score prompts that end in a target (see :func:`firsttok.prompts.with_target`)."""
    scores: dict[int, TargetScore] = {}
    for group in batches(prompts, max_tokens=1024):
        chosen = [prompts[i] for i in group]
        batch = pad(model, chosen)
        found = scores_from(chosen, logits(model, batch)[target_places(batch, chosen)])
        scores |= dict(zip(group, found, strict=True))
    return [scores[index] for index in range(len(prompts))]


def target_places(batch: TokenBatch, prompts: Sequence[Prompt]) -> TokenMask:
    """Where a right-padded batch predicts the tokens of its prompts' targets."""
    where = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        end = len(prompt.token_ids) - 1
        where[row, end - prompt.target_length : end] = True
    return where


def scores_from(
    prompts: Sequence[Prompt], logits_there: Float[Tensor, "place vocab"]
) -> list[TargetScore]:
    """Score prompts by the logits at their targets' places, in row-major order."""
    chosen = logits_there.float()
    labels = torch.tensor([i for prompt in prompts for i in prompt.target_ids])
    nll = torch.nn.functional.cross_entropy(chosen, labels.to(chosen.device), reduction="none")
    lengths = [prompt.target_length for prompt in prompts]
    pieces = zip(prompts, nll.split(lengths), chosen.argmax(-1).split(lengths), strict=True)
    return [
        TargetScore(
            nll=float(loss.double().mean()),
            target_ids=prompt.target_ids,
            predicted_ids=tuple(predicted.tolist()),
        )
        for prompt, loss, predicted in pieces
    ]


def target_probabilities(
    model: Model, fact: Fact, contexts: ContextSet, *, target: str | None = None
) -> list[float]:
    """Probability of a fact's target behind its prompt in each context, in their order.

    Args:
        model: The model, possibly with an edit applied.
        fact: The fact.
        contexts: Contexts put before the prompt; ``"{}"`` is the bare prompt.
        target: The target; None for the fact's new one.
    """
    wanted = fact.target_new if target is None else target
    prompts = [
        with_target(model, fact_prompt(model, fact, template), wanted)
        for template in contexts.templates
    ]
    return [score.probability for score in score_targets(model, prompts)]
