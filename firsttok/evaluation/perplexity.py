"""ME-PPL perplexity: exp of the mean token NLL per sentence, then the mean over sentences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from firsttok.data import builtin_sentences
from firsttok.errors import BadInputError
from firsttok.models import BosPolicy, Model, Tail, capture_tail, logits
from firsttok.prompts import Prompt, batches, pad, text_prompt

__all__ = ["COLLAPSE_THRESHOLD", "Perplexity", "PreparedTexts", "perplexity", "prepare_texts"]

COLLAPSE_THRESHOLD = 1000.0
"""An edit that lifts the perplexity above this has destroyed the model (Butterfly Effect)."""
_MAX_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a model on some sentences."""

    mean: float
    """Arithmetic mean of the sentences' perplexities; the papers' ME-PPL."""
    corpus: float
    """exp of the mean NLL over all scored tokens."""
    per_sentence: tuple[float, ...]
    """Perplexity of each sentence, in order."""

    @property
    def collapsed(self) -> bool:
        """Whether the mean is above the threshold, or no number at all."""
        return not self.mean <= COLLAPSE_THRESHOLD


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    indices: list[int]
    where: Bool[Tensor, "prompt pos"]
    labels: Int[Tensor, "place"]
    tail: Tail


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedTexts:
    """Sentences whose pass below one layer is done, for measuring many edits of that layer."""

    layer: int
    """The first layer that runs in every measurement."""
    groups: tuple[_Group, ...]
    """The batches."""

    @torch.no_grad()
    def measure(self, model: Model) -> Perplexity:
        """Measure the model these texts were prepared on, as it is now (an edit may be applied)."""
        nlls: dict[int, Tensor] = {}
        for group in self.groups:
            output = group.tail.run(model, group.where)
            nlls |= _sentence_nlls(output, group.labels, group.where, group.indices)
        return _perplexity(nlls)


def perplexity(
    model: Model,
    texts: Sequence[str] | None = None,
    *,
    bos: BosPolicy = BosPolicy.WITHOUT,
) -> Perplexity:
    """Measure perplexity as the papers do: no BOS, even for Llama; the first token is not scored.

    With BOS the same tokens are scored as without, so that the two can be compared.

    Args:
        model: The model.
        texts: Sentences; None for the built-in fifty.
        bos: BOS policy of the sentences, whatever the model's own.

    Raises:
        BadInputError: If a sentence has fewer than two tokens.
    """
    nlls: dict[int, Tensor] = {}
    prompts = _prompts(model.with_bos(bos), texts)
    skip = len(model.with_bos(bos).leading_ids)
    for indices in batches(prompts, max_tokens=_MAX_TOKENS):
        batch = pad(model, [prompts[i] for i in indices])
        where = _scored(batch.attention_mask, skip)
        output = logits(model, batch)[where]
        labels = batch.tokens[:, 1:][where[:, :-1]]
        nlls |= _sentence_nlls(output, labels, where, indices)
    return _perplexity(nlls)


def prepare_texts(
    model: Model,
    texts: Sequence[str] | None = None,
    *,
    layer: int,
    bos: BosPolicy = BosPolicy.WITHOUT,
) -> PreparedTexts:
    """Run the layers below ``layer`` once, so that edits at or above it are measured faster.

    Args:
        model: The model, unedited below ``layer``.
        texts: Sentences; None for the built-in fifty.
        layer: The lowest layer that edits will change.
        bos: BOS policy of the sentences.
    """
    prompts = _prompts(model.with_bos(bos), texts)
    skip = len(model.with_bos(bos).leading_ids)
    groups: list[_Group] = []
    for indices in batches(prompts, max_tokens=_MAX_TOKENS):
        batch = pad(model, [prompts[i] for i in indices])
        where = _scored(batch.attention_mask, skip)
        groups.append(
            _Group(
                indices=indices,
                where=where,
                labels=batch.tokens[:, 1:][where[:, :-1]],
                tail=capture_tail(model, batch, layer=layer),
            )
        )
    return PreparedTexts(layer=layer, groups=tuple(groups))


def _prompts(model: Model, texts: Sequence[str] | None) -> list[Prompt]:
    sentences = builtin_sentences() if texts is None else texts
    prompts = [text_prompt(model, text) for text in sentences]
    if not prompts:
        raise BadInputError("there are no sentences to measure; give at least one")
    for prompt in prompts:
        if len(prompt.token_ids) < 2 + len(model.leading_ids):
            raise BadInputError(
                f"sentence {prompt.text!r} has one token, and the first is not scored; lengthen it"
            )
    return prompts


def _scored(mask: Int[Tensor, "prompt pos"], skip: int) -> Bool[Tensor, "prompt pos"]:
    """Columns that predict a scored token (right padding): BOS and the first token are not."""
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    following[:, :skip] = 0
    return (mask * following).bool()


def _sentence_nlls(
    output: Float[Tensor, "place vocab"],
    labels: Int[Tensor, "place"],
    where: Bool[Tensor, "prompt pos"],
    indices: list[int],
) -> dict[int, Tensor]:
    nll = torch.nn.functional.cross_entropy(output.float(), labels, reduction="none").double()
    pieces = nll.split(where.sum(1).tolist())
    return dict(zip(indices, pieces, strict=True))


def _perplexity(nlls: dict[int, Tensor]) -> Perplexity:
    ordered = [nlls[index] for index in sorted(nlls)]
    each = tuple(math.exp(min(float(nll.mean()), 700.0)) for nll in ordered)
    return Perplexity(
        mean=sum(each) / len(each),
        corpus=math.exp(min(float(torch.cat(ordered).mean()), 700.0)),
        per_sentence=each,
    )
