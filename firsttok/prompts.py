"""Tokens, subject positions, padding: the only module that tokenises.

Every other module gets its prompts from here, so there is one answer to "where is the subject's
last token?" and to "is there a BOS token?".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from firsttok.arguments import taken
from firsttok.data import Fact, Join, Straddle, text_joint
from firsttok.engine.batching import cheapest_split
from firsttok.engine.trials import Change, changes_of
from firsttok.errors import (
    BadInputError,
    EmptyTargetError,
    SpecialTokenError,
    TargetTokenError,
    TemplateError,
    UnsupportedModelError,
)
from firsttok.models import Model, refuse_processed
from firsttok.models.encoding import encode, encode_subject
from firsttok.tensors import TokenBatch

__all__ = [
    "Prompt",
    "batches",
    "fact_prompt",
    "is_changed",
    "join_prompts",
    "joined_target",
    "pad",
    "plain_ids",
    "positions",
    "subject_prompt",
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
        BadInputError: If it yields no token, or holds half a character.
        SpecialTokenError: If it holds a special token that begins or ends whole texts.
    """
    return Prompt(text=text, token_ids=encode(model, text).ids)


def plain_ids(model: Model, text: str, *, leading: bool = True) -> list[int]:
    """Tokenise text as it stands, where a special token that is written in it is one.

    Args:
        model: The model, whose BOS policy holds.
        text: The text; it may be empty.
        leading: Put BOS before it where the policy wants one, unless it begins with BOS already.
    """
    tokenizer: Any = model.tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    first = list(model.leading_ids) if leading else []
    return ids if first and ids[: len(first)] == first else [*first, *ids]


def subject_prompt(
    model: Model, text: str, span: tuple[int, int], *, straddle: Straddle = "refuse"
) -> Prompt:
    """Tokenise text with a subject and find the subject's last token by character offsets.

    Args:
        model: The model, whose BOS policy holds.
        text: The text.
        span: Start and end of the subject's characters.
        straddle: Whether a token that also holds what stands around the subject may be looked up.
            The released code looks up the token at the count of the tokens up to the subject's end,
            less one (note 12); ``"token"`` gives that one.

    Raises:
        SpecialTokenError: If a special token is written in the subject, or as for
            :func:`text_prompt`.
        SubjectBoundaryError: If the token that holds the subject's last character holds marks
            around the subject, too, or if no token holds it.
    """
    found, held = encode_subject(model, text, span, straddle=straddle)
    return Prompt(
        text=text,
        token_ids=found.ids,
        subject_position=held[-1],
        subject_length=len(held),
    )


@taken
def fact_prompt(model: Model, fact: Fact, context: str = "{}") -> Prompt:
    """Tokenise a fact's prompt in the place of a context's one ``{}``; ``"{}"`` leaves it bare.

    Raises:
        TemplateError: If the context does not hold exactly one ``{}``.
    """
    if context.count("{}") != 1:
        raise TemplateError(f"context {context!r} does not hold '{{}}' exactly once")
    start = context.index("{}") + fact.template.index("{}")
    text = context.replace("{}", fact.prompt)
    span = (start, start + len(fact.subject))
    return subject_prompt(model, text, span, straddle=fact.straddle)


def join_prompts(model: Model, first: Prompt, second: Prompt) -> Prompt:
    """Put the tokens of two prompts one after the other; nothing is tokenised again.

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


def joined_target(model: Model, prompt: Prompt, target: str, join: Join = "auto") -> str:
    """Return a target with what joins it to a prompt: one space before it, or nothing.

    The rule is that of :func:`~firsttok.data.joints.text_joint`. Behind a special token, in which
    the head of a chat's turn may end, ``auto`` puts nothing either. White space at the target's
    ends does not count, except with ``none``, which takes both texts as they are.

    Args:
        model: The model, whose tokenizer says what is special.
        prompt: The prompt; a target that it ends in does not count.
        target: The target.
        join: The rule.
    """
    if join == "none":
        return target
    target = target.strip()
    own = prompt.token_ids[: len(prompt.token_ids) - prompt.target_length]
    special = model.special_ids
    if join == "auto" and own and own[-1] in special and not model.trailing_ids:
        return target
    return text_joint(prompt.text, target, join) + target


def with_target(model: Model, prompt: Prompt, target: str, *, join: Join = "auto") -> Prompt:
    """Append a target, and count its own tokens (note 11: tokens, not spaces).

    Args:
        model: The model.
        prompt: The prompt; a target that it ends in is replaced.
        target: The target.
        join: As for :func:`joined_target`; a fact says it in its field of that name.

    Raises:
        EmptyTargetError: If the target is empty.
        SpecialTokenError: If the target holds a special token.
        TargetTokenError: If it adds no token, or changes the prompt's own tokens.
        UnsupportedModelError: If the model is an encoder.
    """
    if model.trailing_ids:
        raise UnsupportedModelError(
            f"{model.name} is no decoder, and a target can only follow a decoder's prompt"
        )
    if not target.strip():
        raise EmptyTargetError(f"the target after {prompt.text!r} is empty; give a word")
    joined = joined_target(model, prompt, target, join)
    ids = encode(model, prompt.text + joined).ids
    known = prompt.token_ids[: len(prompt.token_ids) - prompt.target_length]
    if ids[: len(known)] != known or len(ids) == len(known):
        hint = "reword the prompt's end or the target"
        if prompt.text.endswith(" "):
            hint = "leave the space at the prompt's end out, and join by one"
        raise TargetTokenError(
            f"target {joined!r} has no tokens of its own after {prompt.text!r} "
            f"(the tokenizer merges them); {hint}"
        )
    special = model.special_ids.intersection(ids[len(known) :])
    if special:
        tokenizer: Any = model.tokenizer
        written = tokenizer.convert_ids_to_tokens(min(special))
        raise SpecialTokenError(
            f"target {target!r} has the special token {written!r} after {prompt.text!r}; give "
            "words that the tokenizer knows"
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
        BadInputError: If there are no prompts, one is longer than the model reads, or an
            intervention of the view returns something else than such a batch.
        UnsupportedModelError: If the view asks for what the model does not do (see
            :meth:`Model.batch`), or if TransformerLens has changed the weights.
    """
    refuse_processed(model.weights.bridge, model.name)
    if not prompts:
        raise BadInputError("there are no prompts to run; give at least one")
    lengths = [len(prompt.token_ids) for prompt in prompts]
    longest = max(range(len(prompts)), key=lambda i: lengths[i])
    if lengths[longest] > model.max_tokens:
        raise BadInputError(
            f"{prompts[longest].text[:60]!r}... has {lengths[longest]} tokens, but {model.name} "
            f"reads at most {model.max_tokens}; shorten it"
        )
    # What is to stand in one column: the first tokens, the ends or the subjects' last tokens.
    at = {"right": [0] * len(prompts), "left": lengths}.get(side) or positions(prompts).tolist()
    starts = [max(at) - each for each in at]
    width = max(start + length for start, length in zip(starts, lengths, strict=True))
    tokenizer: Any = model.tokenizer
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    tokens = torch.full((len(prompts), width), int(filler), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        end = start + len(prompt.token_ids)
        tokens[row, start:end] = torch.tensor(prompt.token_ids)
        mask[row, start:end] = 1
    return model.batch(tokens, mask)


def is_changed(model: Model, prompts: Sequence[Prompt]) -> bool:
    """Whether the view runs any of these prompts in another way than the model as it is.

    A change at a place that no prompt has is none, and neither is a mask that says what is so
    anyway: what was measured under it must not pass for an effect, or for the lack of one.
    """
    plain = pad(replace(model, interventions=()), prompts)
    return bool({*changes_of(plain, pad(model, prompts))} - {Change.MASK})


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
