"""How a model scores given targets behind given prompts, teacher-forced."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.models import Model, logits
from firsttok.prompts import Prompt, batches, fact_prompt, pad, with_target

__all__ = ["TargetScore", "score_targets", "target_probabilities"]


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
        batch = pad(model, [prompts[i] for i in group])
        where = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        for row, index in enumerate(group):
            end = len(prompts[index].token_ids) - 1
            where[row, end - prompts[index].target_length : end] = True
        chosen = logits(model, batch)[where].float()
        labels = batch.tokens[:, 1:][where[:, :-1]]
        nll = torch.nn.functional.cross_entropy(chosen, labels, reduction="none")
        lengths = [prompts[i].target_length for i in group]
        for index, loss, predicted in zip(
            group, nll.split(lengths), chosen.argmax(-1).split(lengths), strict=True
        ):
            scores[index] = TargetScore(
                nll=float(loss.double().mean()),
                target_ids=prompts[index].target_ids,
                predicted_ids=tuple(predicted.tolist()),
            )
    return [scores[index] for index in range(len(prompts))]


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
