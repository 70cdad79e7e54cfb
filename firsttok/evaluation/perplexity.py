"""ME-PPL perplexity: exp of the mean token NLL per sentence, then the mean over sentences."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from firsttok.arguments import taken
from firsttok.data import builtin_sentences
from firsttok.display import Panel, Shown, Table
from firsttok.editing import Edit
from firsttok.engine.tail import Tail
from firsttok.errors import BadInputError, EditMismatchError
from firsttok.models import BosPolicy, Model, capture_tail, logits
from firsttok.prompts import Prompt, batches, pad, text_prompt

__all__ = [
    "COLLAPSE_THRESHOLD",
    "DAMAGE_RATIO",
    "Damage",
    "Perplexity",
    "PreparedTexts",
    "damage",
    "perplexity",
    "prepare_texts",
]

COLLAPSE_THRESHOLD = 1000.0
"""An edit that lifts the perplexity above this has destroyed the model (Butterfly Effect)."""
DAMAGE_RATIO = 1.5
"""An edit that multiplies the perplexity by this or more has damaged the model."""
_MAX_TOKENS = 1024
_MAX_TOKENS_CUDA = 16_384
_AT = ("all", "first", "later")
_PLACES = 256
"""Places whose logits are in memory at once."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Perplexity(Shown):
    """Perplexity of a model on some sentences."""

    mean: float
    """Arithmetic mean of the sentences' perplexities; the papers' ME-PPL."""
    corpus: float
    """exp of the mean NLL over all scored tokens."""
    per_sentence: tuple[float, ...]
    """Perplexity of each sentence, in order."""

    def panel(self) -> Panel:
        """Mean and extremes."""
        lines = [
            ["mean over sentences", self.mean],
            ["over all tokens", self.corpus],
            ["lowest sentence", min(self.per_sentence, default=None)],
            ["highest sentence", max(self.per_sentence, default=None)],
            ["collapsed", self.collapsed],
        ]
        return Panel(
            title=f"perplexity on {len(self.per_sentence)} sentences",
            parts=[Table(columns=("", "value"), lines=lines)],
        )

    @property
    def collapsed(self) -> bool:
        """Whether the mean is above the threshold, or no number at all."""
        return not self.mean <= COLLAPSE_THRESHOLD


class Damage(str, Enum):
    """What an edit did to a model, told from perplexities before and after."""

    INTACT = "intact"
    """The perplexity is less than :data:`DAMAGE_RATIO` times what it was."""
    DAMAGED = "damaged"
    """It is higher than that, and not above :data:`COLLAPSE_THRESHOLD`."""
    COLLAPSED = "collapsed"
    """It is above :data:`COLLAPSE_THRESHOLD`, or no number at all."""


def damage(before: Perplexity, after: Perplexity) -> Damage | None:
    """Return what an edit did, or None if the model had collapsed before it.

    Args:
        before: Perplexity of the model without the edit.
        after: Perplexity on the same sentences with it.
    """
    if before.collapsed:
        return None
    if after.collapsed:
        return Damage.COLLAPSED
    return Damage.INTACT if after.mean < DAMAGE_RATIO * before.mean else Damage.DAMAGED


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    indices: list[int]
    where: Bool[Tensor, "prompt pos"]
    labels: Int[Tensor, "place"]
    tail: Tail

    def nlls(self, model: Model, edits: Sequence[Edit], at: str) -> list[dict[int, Tensor]]:
        """NLLs of each sentence's tokens under each edit."""
        count = len(edits)
        tail = self.tail
        if count > 1:
            tail = tail.rows(torch.arange(len(self.indices), device=model.device).repeat(count))
        change = torch.cat([edit.delta.change(self.tail.keys) for edit in edits])
        if at != "all":
            # Padded on the right, every sentence begins in the first column.
            change[:, 1:] *= at == "later"
            change[:, :1] *= at == "first"
        return self._of(model, tail, change, count)

    def nlls_above(self, model: Model) -> dict[int, Tensor]:
        """NLLs of each sentence's tokens, with what stands in the layers above."""
        return self._of(model, self.tail, None, 1)[0]

    def _of(
        self, model: Model, tail: Tail, change: Tensor | None, count: int
    ) -> list[dict[int, Tensor]]:
        where = self.where.repeat(count, 1)
        with model.running() as bridge:
            chunks = tail.logit_chunks(bridge, where, change, size=_PLACES, overwrite=True)
            nll = _nlls(model, chunks, self.labels.repeat(count)).split(len(self.labels))
        return [_by_sentence(each, self.where, self.indices) for each in nll]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedTexts:
    """Sentences whose pass up to one layer is done, for measuring many edits of that layer."""

    layer: int
    """The layer that edits change."""
    groups: tuple[_Group, ...]
    """The batches."""
    bos: BosPolicy
    """BOS policy of the sentences."""
    made_on: tuple[str, str | None]
    """What decided the pass: identity of the view up to the layer, and what disturbed it."""

    @taken
    @torch.no_grad()
    def measure_edits(
        self, model: Model, edits: Sequence[Edit], *, at: str = "all"
    ) -> list[Perplexity]:
        """Measure the model under each edit alone, as if it stood in the weights.

        An edit enters as what it adds to the output of the edited layer's MLP, ``(k . u) r`` for
        one of rank one; no weight is touched. As many edits share a batch as the device takes. In a
        16-bit type an edit that stands in the weights is rounded with them; here it is not.

        An edit that stands in a layer above is measured along; what stands at the layer or below
        must be what stood there when the sentences were prepared.

        Args:
            model: The model these texts were prepared on.
            edits: Edits of the layer they were prepared for.
            at: Tokens whose MLP output an edit changes: ``all``, the ``first`` of the sequence
                (BOS where there is one), or those ``later``.

        Raises:
            EditMismatchError: If an edit was made for another model, or the model is not as it was.
            BadInputError: If an edit changes anything but the MLP's last matrix at that layer, or
                if there are no such tokens.
        """
        if at not in _AT:
            raise BadInputError(f"an edit acts at all, first or later tokens, not at {at!r}")
        self._check(model)
        for edit in edits:
            edit.check(model)
            if edit.output_layer != self.layer:
                raise BadInputError(
                    f"the edit {edit.title} cannot be measured on sentences prepared for the "
                    f"output of layer {self.layer}; use perplexity(model.edited(edit))"
                )
        nlls: list[dict[int, Tensor]] = [{} for _ in edits]
        most = _MAX_TOKENS if model.device.type == "cpu" else _MAX_TOKENS_CUDA
        for group in self.groups:
            together = max(1, most // group.where.numel())
            for start in range(0, len(edits), together):
                for offset, found in enumerate(
                    group.nlls(model, edits[start : start + together], at)
                ):
                    nlls[start + offset] |= found
        return [_perplexity(found) for found in nlls]

    @taken
    @torch.no_grad()
    def measure(self, model: Model) -> Perplexity:
        """Measure a view whose edits are all of layers above: they stand in the weights.

        Args:
            model: A view of the model these texts were prepared on.

        Raises:
            EditMismatchError: If the model is changed at the layer or below.
        """
        self._check(model)
        nlls: dict[int, Tensor] = {}
        for group in self.groups:
            nlls |= group.nlls_above(model)
        return _perplexity(nlls)

    def _check(self, model: Model) -> None:
        if _passing(model.with_bos(self.bos), self.layer) != self.made_on:
            raise EditMismatchError(
                f"{model.name} was changed at or below layer {self.layer} since the sentences were "
                "prepared; undo that edit first, or measure with perplexity(model)"
            )


@taken
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
        nlls |= _by_sentence(_nlls(model, [output], labels), where, indices)
    return _perplexity(nlls)


@taken
def prepare_texts(
    model: Model,
    texts: Sequence[str] | None = None,
    *,
    layer: int,
    bos: BosPolicy = BosPolicy.WITHOUT,
) -> PreparedTexts:
    """Run the layers up to ``layer`` once, so that edits of it are measured faster.

    Args:
        model: The model, unedited.
        texts: Sentences; None for the built-in fifty.
        layer: The layer that edits will change.
        bos: BOS policy of the sentences.

    Raises:
        BadInputError: If a sentence has fewer than two tokens.
        LayerOutOfRangeError: If there is no such layer.
        UnsupportedModelError: If the model is no decoder.
    """
    view = model.with_bos(bos)
    prompts, skip, made_on = _prompts(view, texts), len(view.leading_ids), _passing(view, layer)
    groups: list[_Group] = []
    for indices in batches(prompts, max_tokens=_MAX_TOKENS):
        batch = pad(model, [prompts[i] for i in indices])
        where = _scored(batch.attention_mask, skip)
        labels = batch.tokens[:, 1:][where[:, :-1]]
        if not model.sees_later:
            # Nothing is predicted from a sentence's last token, and no other one sees it.
            read = [replace(prompts[i], token_ids=prompts[i].token_ids[:-1]) for i in indices]
            batch, where = pad(model, read), where[:, :-1]
        tail = capture_tail(model, batch, layer=layer)
        groups.append(_Group(indices=indices, where=where, labels=labels, tail=tail))
    if _passing(view, layer) != made_on:
        raise EditMismatchError(
            f"{model.name} was changed while the sentences were prepared; prepare them again"
        )
    return PreparedTexts(layer=layer, groups=tuple(groups), bos=bos, made_on=made_on)


def _passing(view: Model, layer: int) -> tuple[str, str | None]:
    """What decides a pass up to the output of a layer."""
    return view.identity(layer + 1), view.disturbance


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


def _nlls(
    model: Model, chunks: Iterable[Float[Tensor, "place vocab"]], labels: Int[Tensor, "place"]
) -> Float[Tensor, "place"]:
    """NLL of each label, over logits that come a few places at a time; float64, for the sums.

    The logits are overwritten: another tensor of their size costs more than the arithmetic.
    """
    found: list[Tensor] = []
    start = 0
    for chunk in chunks:
        wide = chunk.to(model.wide_dtype)
        wide -= wide.amax(1, keepdim=True)
        wanted = wide.gather(1, labels[start : start + len(chunk), None])[:, 0]
        found.append(wide.exp_().sum(1).log_() - wanted)
        start += len(chunk)
    return torch.cat(found).double()


def _by_sentence(
    nll: Float[Tensor, "place"], where: Bool[Tensor, "prompt pos"], indices: list[int]
) -> dict[int, Tensor]:
    return dict(zip(indices, nll.split(where.sum(1).tolist()), strict=True))


def _perplexity(nlls: dict[int, Tensor]) -> Perplexity:
    ordered = [nlls[index] for index in sorted(nlls)]
    each = tuple(math.exp(min(float(nll.mean()), 700.0)) for nll in ordered)
    return Perplexity(
        mean=sum(each) / len(each),
        corpus=math.exp(min(float(torch.cat(ordered).mean()), 700.0)),
        per_sentence=each,
    )
