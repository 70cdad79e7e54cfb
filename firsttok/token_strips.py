"""A prompt's tokens as a strip, the looked-up one marked."""

from dataclasses import dataclass
from typing import Any

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.display import Note, Panel, Shown, Strip
from firsttok.models import Model
from firsttok.prompts import fact_prompt, joined_target, text_prompt

__all__ = ["TokenStrip", "show_tokens", "tokens"]


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenStrip(Shown):
    """The tokens of one prompt, as the model gets them."""

    text: str
    """The prompt, without BOS."""
    pieces: tuple[str, ...]
    """Each token as text; what shows nothing is written out, a line end as ``\\n``."""
    token_ids: tuple[int, ...]
    looked_up: int | None
    """Position of the subject's last token, whose key an edit looks up; None without a subject."""
    joined_target: str | None = None
    """A fact's new target with what joins it to the prompt; None without one."""
    origin: dict[str, Any]
    """The model whose tokenizer and BOS policy it was."""

    @property
    def first_token(self) -> bool:
        """Whether the looked-up token is the very first of the sequence (BOS counts as one)."""
        return self.looked_up == 0

    @property
    def lines(self) -> str:
        """Two lines: the tokens, and a mark under the looked-up one."""
        return self._strip().text

    @property
    def joint(self) -> str | None:
        """What joins the target to the prompt, in words; None without a target."""
        if self.joined_target is None:
            return None
        return "one space" if self.joined_target.startswith(" ") else "nothing"

    def panel(self) -> Panel:
        """The strip, how the target is joined, and whether the looked-up token is the first."""
        parts: list[Strip | Note] = [self._strip()]
        if self.first_token:
            parts.append(Note(text="The looked-up token is the first of the sequence."))
        if self.joint:
            text = f"The target is joined by {self.joint}: {self.joined_target!r}."
            parts.append(Note(text=text))
        return Panel(title=f"{len(self.pieces)} tokens", parts=parts, source=self.origin)

    def _strip(self) -> Strip:
        return Strip(pieces=self.pieces, marked=self.looked_up, mark=f"lookup at {self.looked_up}")


@taken
def tokens(model: Model, prompt: Fact | str, context: str = "{}") -> TokenStrip:
    """Show how a fact's prompt, or a plain text, falls into tokens under the model's BOS policy.

    Args:
        model: Whose tokenizer and BOS policy it is.
        prompt: A fact, or a text without a subject.
        context: Template put around it.

    Raises:
        BadInputError: If it yields no token, or has no subject token of its own.
    """
    joined: str | None = None
    if isinstance(prompt, Fact):
        found = fact_prompt(model, prompt, context)
        if not model.trailing_ids:
            joined = joined_target(model, found, prompt.target_new, prompt.join)
    else:
        found = text_prompt(model, context.replace("{}", prompt))
    tokenizer: Any = model.tokenizer
    return TokenStrip(
        text=found.text,
        pieces=tuple(_piece(tokenizer.decode([token])) for token in found.token_ids),
        token_ids=found.token_ids,
        looked_up=found.subject_position,
        joined_target=joined,
        origin=model.origin,
    )


@taken
def show_tokens(model: Model, fact: Fact, context: str = "{}") -> str:
    """Return two lines: the tokens of a fact's prompt, and a mark under the looked-up one."""
    return tokens(model, fact, context).lines


def _piece(text: str) -> str:
    """A token with its invisible characters written out."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown) or "?"
