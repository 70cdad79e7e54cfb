"""The BOS policy, and the special tokens that stand around a prompt's own under it."""

from enum import Enum
from typing import Any

from firsttok.errors import BadInputError

__all__ = ["BosPolicy", "bos_ids", "boundary_ids", "leading_ids", "special_ids", "trailing_ids"]

_BOUNDARIES = ("bos", "eos", "cls", "sep", "pad", "unk")
"""Roles of special tokens that part whole texts or fill them up."""


class BosPolicy(str, Enum):
    """Whether prompts begin with the tokenizer's BOS token."""

    AS_TOKENIZER = "as_tokenizer"
    """What the tokenizer does by itself when it encodes text."""
    WITH = "with"
    """Always, also if the tokenizer would not."""
    WITHOUT = "without"
    """Never; on Llama-like models this makes the subject the first token (Appendix A.2)."""


def leading_ids(tokenizer: Any, policy: BosPolicy, model_name: str) -> tuple[int, ...]:
    """Token ids every prompt begins with under a policy.

    Args:
        tokenizer: The model's tokenizer.
        policy: The policy.
        model_name: The model, for the message.

    Raises:
        BadInputError: If a BOS token is asked for and the tokenizer has none.
    """
    if policy is BosPolicy.WITHOUT:
        return ()
    if policy is BosPolicy.AS_TOKENIZER:
        bare = len(tokenizer("a", add_special_tokens=False)["input_ids"])
        ids: list[int] = tokenizer("a")["input_ids"]
        special = set(tokenizer.all_special_ids)
        count = next((i for i, token in enumerate(ids) if token not in special), len(ids))
        return tuple(ids[: min(count, len(ids) - bare)])
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = tokenizer.cls_token_id
    if bos is None:
        raise BadInputError(f"the tokenizer of {model_name} has no BOS token; use --bos without")
    return (int(bos),)


def trailing_ids(tokenizer: Any) -> tuple[int, ...]:
    """Token ids a tokenizer appends to every text: [SEP], </s>."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return tuple(ids[start + len(bare) :])
    return ()


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of every special token: what no word of a text is made of."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids).union(
        number for number, token in added.items() if token.special
    )


def bos_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that ``with`` may put before a text: BOS, [CLS]."""
    return frozenset(
        int(number)
        for number in (tokenizer.bos_token_id, tokenizer.cls_token_id)
        if number is not None
    )


def boundary_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens that stand between whole texts and never inside one.

    They are BOS, EOS and the like, except those that the chat template writes around turns:
    ``<|im_start|>`` is SmolLM2's BOS and opens every turn. A chat template that puts a BOS only
    before the whole text gives it as a variable, not in letters.
    """
    chat = str(tokenizer.chat_template or "")
    found: set[int] = set()
    inside: set[int] = set()
    for role in _BOUNDARIES:
        text = getattr(tokenizer, f"{role}_token", None)
        number = getattr(tokenizer, f"{role}_token_id", None)
        if number is not None and text is not None:
            named = text in chat or (role == "eos" and "eos_token" in chat)
            (inside if named else found).add(int(number))
    return frozenset(found - inside)
