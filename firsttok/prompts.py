"""Tokens, subject positions, padding: the only module that tokenises.

Every other module gets its prompts from here, so there is one answer to "where is the subject's
last token?" and to "is there a BOS token?".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from firsttok.arguments import check_text, taken
from firsttok.batching import cheapest_split
from firsttok.data import Fact
from firsttok.errors import (
    BadInputError,
    EmptyTargetError,
    SubjectAmbiguousError,
    SubjectBoundaryError,
    SubjectNotFoundError,
    TargetTokenError,
    TemplateError,
    UnsupportedModelError,
)
from firsttok.models import Model
from firsttok.tensors import TokenBatch

__all__ = [
    "Prompt",
    "batches",
    "fact_prompt",
    "join_prompts",
    "pad",
    "positions",
    "sees_later",
    "subject_prompt",
    "subject_span",
    "text_prompt",
    "with_target",
]

PadSide = Literal["left", "right", "subject"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One tokenised prompt."""

    text: str
    """The text, without BOS and without the target."""
    token_ids: tuple[int, ...]
    """All tokens: BOS where the policy wants one, the text, then the target if there is one."""
    subject_position: int | None = None
    """Absolute index of the subject's last token in ``token_ids``, or None without a subject."""
    subject_length: int = 0
    """How many tokens hold the subject's characters."""
    target_length: int = 0
    """How many of the last tokens are the target's."""

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.token_ids[len(self.token_ids) - self.target_length :]

    @property
    def last_position(self) -> int:
        """Absolute index of the last token."""
        return len(self.token_ids) - 1


@taken
def text_prompt(model: Model, text: str) -> Prompt:
    """Tokenise plain text under the model's BOS policy.

    Raises:
        BadInputError: If it yields no token.
    """
    ids, _ = _encode(model, text)
    return Prompt(text=text, token_ids=ids)


def subject_span(text: str, subject: str) -> tuple[int, int]:
    """Return start and end of the subject's characters in a text.

    Raises:
        SubjectNotFoundError: If it does not occur.
        SubjectAmbiguousError: If it occurs more than once.
    """
    count = text.count(subject) if subject else 0
    if count == 0:
        raise SubjectNotFoundError(
            f"subject {subject!r} does not occur in {text!r}; write it as it stands there"
        )
    if count > 1:
        raise SubjectAmbiguousError(
            f"subject {subject!r} occurs {count} times in {text!r}; use a template with '{{}}'"
        )
    start = text.index(subject)
    return start, start + len(subject)


def subject_prompt(model: Model, text: str, span: tuple[int, int]) -> Prompt:
    """Tokenise text with a subject and find the subject's last token by character offsets.

    Args:
        model: The model, whose BOS policy holds.
        text: The text.
        span: Start and end of the subject's characters.

    Raises:
        SubjectBoundaryError: If the token that holds the subject's last character goes on beyond
            it, or if no token holds it.
    """
    ids, offsets = _encode(model, text)
    last = span[1] - 1
    holders = [i for i, (start, end) in enumerate(offsets) if start <= last < end]
    subject = text[span[0] : span[1]]
    if not holders:
        raise SubjectBoundaryError(f"no token of {text!r} holds the end of subject {subject!r}")
    position = holders[-1]
    if offsets[position][1] > span[1]:
        raise SubjectBoundaryError(
            f"in {text!r} the token {text[slice(*offsets[position])]!r} goes on beyond the end of "
            f"subject {subject!r}; put a space or a mark behind the subject"
        )
    first = next(i for i, (start, end) in enumerate(offsets) if start < end and end > span[0])
    return Prompt(
        text=text,
        token_ids=ids,
        subject_position=position,
        subject_length=position - first + 1,
    )


@taken
def fact_prompt(model: Model, fact: Fact, context: str = "{}") -> Prompt:
    """Tokenise a fact's prompt inside a context template.

    Args:
        model: The model.
        fact: The fact.
        context: A template with one ``{}`` for the whole prompt; ``"{}"`` is the bare prompt.

    Raises:
        TemplateError: If the context does not hold exactly one ``{}``.
    """
    if context.count("{}") != 1:
        raise TemplateError(f"context {context!r} does not hold '{{}}' exactly once")
    start = context.index("{}") + fact.template.index("{}")
    text = context.replace("{}", fact.prompt)
    return subject_prompt(model, text, (start, start + len(fact.subject)))


def join_prompts(model: Model, first: Prompt, second: Prompt) -> Prompt:
    """Put the tokens of two prompts one behind the other; nothing is tokenised again.

    The second prompt's BOS is dropped; its subject is the subject of the whole.
    """
    own = second.token_ids[len(model.leading_ids) :]
    shift = len(first.token_ids) - len(model.leading_ids)
    subject = second.subject_position
    return Prompt(
        text=first.text + second.text,
        token_ids=(*first.token_ids, *own),
        subject_position=None if subject is None else subject + shift,
        subject_length=second.subject_length,
        target_length=second.target_length,
    )


def with_target(model: Model, prompt: Prompt, target: str) -> Prompt:
    """Append a target, joined by one space, and count its own tokens (note: tokens, not spaces).

    Raises:
        EmptyTargetError: If the target is empty.
        TargetTokenError: If it adds no token, or changes the prompt's own tokens.
        UnsupportedModelError: If the model is an encoder.
    """
    if model.trailing_ids:
        raise UnsupportedModelError(
            f"{model.name} is no decoder, and a target can only follow a decoder's prompt"
        )
    target = target.strip()
    if not target:
        raise EmptyTargetError(f"the target behind {prompt.text!r} is empty; give a word")
    ids, _ = _encode(model, f"{prompt.text} {target}")
    known = prompt.token_ids[: len(prompt.token_ids) - prompt.target_length]
    if ids[: len(known)] != known or len(ids) == len(known):
        raise TargetTokenError(
            f"target {target!r} has no tokens of its own behind {prompt.text!r} "
            "(the tokenizer merges them); reword the prompt's end or the target"
        )
    return Prompt(
        text=prompt.text,
        token_ids=ids,
        subject_position=prompt.subject_position,
        subject_length=prompt.subject_length,
        target_length=len(ids) - len(known),
    )


def pad(model: Model, prompts: Sequence[Prompt], *, side: PadSide = "right") -> TokenBatch:
    """Pad prompts into one batch with explicit mask and positions, then make the view's changes.

    Args:
        model: The model, for its device and pad token.
        prompts: The prompts.
        side: ``right`` or ``left``; ``subject`` puts every subject's last token into one column.

    Raises:
        BadInputError: If there are no prompts, or one is longer than the model reads.
        UnsupportedModelError: If the view changes what the model does not take.
    """
    if not prompts:
        raise BadInputError("there are no prompts to run; give at least one")
    lengths = [len(prompt.token_ids) for prompt in prompts]
    longest = max(range(len(prompts)), key=lambda i: lengths[i])
    if lengths[longest] > model.max_tokens:
        raise BadInputError(
            f"{prompts[longest].text[:60]!r}... has {lengths[longest]} tokens, but {model.name} "
            f"reads at most {model.max_tokens}; shorten it"
        )
    if side == "right":
        starts = [0] * len(prompts)
    elif side == "left":
        starts = [max(lengths) - length for length in lengths]
    else:
        found = positions(prompts).tolist()
        starts = [max(found) - position for position in found]
    width = max(start + length for start, length in zip(starts, lengths, strict=True))
    tokenizer: Any = model.tokenizer
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    tokens = torch.full((len(prompts), width), int(filler), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        end = start + len(prompt.token_ids)
        tokens[row, start:end] = torch.tensor(prompt.token_ids)
        mask[row, start:end] = 1
    batch = TokenBatch(
        tokens=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(model.device),
        starts=torch.tensor(starts, device=model.device),
    )
    return _intervene(model, batch) if model.interventions else batch


def sees_later(model: Model) -> bool:
    """Whether the view says itself what tokens attend to, so that one may see later ones."""
    if not model.interventions:
        return False
    return pad(model, [Prompt(text="", token_ids=(0, 0))]).visible is not None


def positions(prompts: Sequence[Prompt]) -> Int[Tensor, "prompt"]:
    """Absolute positions of the subjects' last tokens.

    Raises:
        BadInputError: If a prompt has no subject.
    """
    found: list[int] = []
    for prompt in prompts:
        if prompt.subject_position is None:
            raise BadInputError(f"{prompt.text!r} has no subject position; name its subject")
        found.append(prompt.subject_position)
    return torch.tensor(found)


def batches(
    prompts: Sequence[Prompt], *, max_tokens: int = 4096, lengths: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Group prompts of similar length so that little is padded.

    Yields:
        Lists of indices that cover every prompt once.

    Args:
        prompts: The prompts.
        max_tokens: Most tokens of a padded batch (a longer prompt stands alone).
        lengths: Tokens of each prompt that are run; None for all.
    """
    sizes = [len(prompt.token_ids) for prompt in prompts] if lengths is None else lengths
    order = sorted(range(len(prompts)), key=lambda i: sizes[i])

    def tokens(start: int, end: int) -> int:
        return (end - start) * sizes[order[end - 1]]

    for batch in cheapest_split(
        len(order), tokens, lambda start, end: tokens(start, end) <= max_tokens
    ):
        yield [order[place] for place in batch]


def _intervene(model: Model, batch: TokenBatch) -> TokenBatch:
    changed = batch
    for intervention in model.interventions:
        changed = intervention(changed)
    names = ", ".join(intervention.name for intervention in model.interventions)
    # An intervention that the model never sees would pass for one without effect.
    takes_positions = model.position_embedding in ("learned", "rotary")
    if not (takes_positions or torch.equal(changed.position_ids, batch.position_ids)):
        raise UnsupportedModelError(
            f"{model.name} has neither learned nor rotary positions, so position ids do not change "
            f"it ({names})"
        )
    if changed.visible is not None and not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is no decoder, and only a decoder's attention mask is opened or closed "
            f"({names})"
        )
    window = model.attention_window
    if changed.visible is not None and window is not None and changed.tokens.shape[1] > window:
        # The mask given stands for all layers, and some of this model's see no further than that.
        raise UnsupportedModelError(
            f"{model.name} attends no further back than {window} tokens in some layers, so a mask "
            f"is only opened or closed on prompts of at most as many ({names})"
        )
    return changed


def _encode(model: Model, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids with BOS and an encoder's end, and character offsets (empty spans for those)."""
    check_text(text, "the text")
    tokenizer: Any = model.tokenizer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    leading, own, trailing = model.leading_ids, encoded["input_ids"], model.trailing_ids
    if not own:
        raise BadInputError(f"{text!r} yields no token; give some text")
    spans = [(0, 0)] * len(leading) + list(encoded["offset_mapping"]) + [(0, 0)] * len(trailing)
    return (*leading, *own, *trailing), spans
