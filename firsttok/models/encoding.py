"""A text's tokens under a model's BOS policy, and which characters each of them holds."""

import unicodedata
from dataclasses import dataclass
from functools import partial
from typing import Any

from firsttok.data import Straddle
from firsttok.errors import BadInputError, SpecialTokenError, SubjectBoundaryError
from firsttok.models.bos import BosPolicy, bos_ids, boundary_ids
from firsttok.models.model import Model

__all__ = ["Encoding", "encode", "encode_subject"]

_DROPPED = ("Cc", "Cf", "Me", "Mn")
_LONGEST = 1000
"""Characters of the longest text whose tokens are kept: a fact's prompts are asked for again."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The tokens of one text."""

    text: str
    """The text."""
    ids: tuple[int, ...]
    """Leading special tokens, the text's own, and what ends an encoder's text."""
    spans: tuple[tuple[int, int], ...]
    """Start and end of the characters of each token; empty for leading and trailing ones."""

    def reach(self, position: int) -> int:
        """Where the characters of a token end, with the marks that a normaliser took into it.

        A tokenizer that composes letters (NFC) reports ``e`` of ``e`` + U+0301, and one that strips
        accents does, too; the mark belongs to that token, since no other one holds it.
        """
        end = self.spans[position][1]
        base = end - 1
        while end < len(self.text) and not any(a <= end < b for a, b in self.spans):
            is_mark = unicodedata.category(self.text[end]) in ("Mn", "Me")
            composed = unicodedata.normalize("NFKC", self.text[base : end + 1])
            if not is_mark and len(composed) > 1:
                break
            end += 1
        return end

    def within(self, span: tuple[int, int]) -> range:
        """Positions of the tokens that hold characters of a span; the last one holds its last.

        Raises:
            SubjectBoundaryError: If no token holds the span's last character.
        """
        found = [
            position
            for position, (start, end) in enumerate(self.spans)
            if start < end and start < span[1] and end > span[0]
        ]
        unheld = self.text[self.reach(found[-1]) if found else span[0] : span[1]]
        # A tokenizer may drop what is no letter: joiners, control characters, marks after those.
        if not found or any(unicodedata.category(each) not in _DROPPED for each in unheld):
            raise SubjectBoundaryError(
                f"no token of {self.text!r} holds the end of subject "
                f"{self.text[slice(*span)]!r}; the tokenizer does not know it"
            )
        return range(found[0], found[-1] + 1)


def encode(model: Model, text: str) -> Encoding:
    """Tokenise a text, once; special tokens stand where the BOS policy puts them, and nowhere else.

    A BOS that is written out in the text would be a second one, or one in spite of ``without``.
    Under ``as_tokenizer``, where the tokenizer puts none by itself, a text may begin with one.

    Args:
        model: The model, whose BOS policy holds.
        text: The text.

    Raises:
        BadInputError: If it yields no token, or holds half a character.
        SpecialTokenError: If it holds a special token that begins or ends whole texts.
    """
    if len(text) > _LONGEST:
        return _encoded(model, text)
    what = (text, model.bos, model.can_be_edited)
    return model.texts.get(model.tokenizer, what, partial(_encoded, model, text))


def _encoded(model: Model, text: str) -> Encoding:
    tokenizer: Any = model.tokenizer
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInputError(
            f"{text!r} holds half a character (a lone surrogate); write it whole"
        ) from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    leading, own, trailing = model.leading_ids, encoded["input_ids"], model.trailing_ids
    if not own:
        raise BadInputError(f"{text!r} yields no token; give some text")
    if not model.special_ids.isdisjoint(own):
        _refuse_boundaries(model, text, own)
    empty = ((0, 0),)
    spans = map(tuple, encoded["offset_mapping"])
    return Encoding(
        text=text,
        ids=(*leading, *own, *trailing),
        spans=(*empty * len(leading), *spans, *empty * len(trailing)),
    )


def _refuse_boundaries(model: Model, text: str, own: list[int]) -> None:
    tokenizer: Any = model.tokenizer
    free = model.bos is BosPolicy.AS_TOKENIZER and not model.leading_ids
    boundaries, begins = boundary_ids(tokenizer), bos_ids(tokenizer).union(model.leading_ids)
    for place, token in enumerate(own):
        # The id of an unknown token also stands for characters that the tokenizer does not know.
        written = tokenizer.convert_ids_to_tokens(token)
        second = place == 0 and token in begins and not free
        inside = token in boundaries and not (place == 0 and free) and written in text
        if second or inside:
            where = "begins with" if place == 0 else "holds"
            hint = ""
            if token in begins:
                hint = ", since --bos says whether a prompt begins with one"
                if place == 0 and not model.with_bos(BosPolicy.AS_TOKENIZER).leading_ids:
                    hint = ", or take the text as it is with --bos as_tokenizer"
            raise SpecialTokenError(
                f"{text[:80]!r} {where} {written!r}, which begins or ends whole texts, under the "
                f"BOS policy {model.bos.value!r}; leave it out{hint}"
            )


def encode_subject(
    model: Model, text: str, span: tuple[int, int], *, straddle: Straddle = "refuse"
) -> tuple[Encoding, range]:
    """Tokenise a text, and find the tokens of a subject in it; the last one is looked up.

    Args:
        model: The model, whose BOS policy holds.
        text: The text.
        span: Start and end of the subject's characters.
        straddle: As for :func:`firsttok.prompts.subject_prompt`.

    Returns:
        The tokens, and the positions of those that hold characters of the subject.

    Raises:
        SpecialTokenError: If a special token is written in the subject, or as for :func:`encode`.
        SubjectBoundaryError: If the last of them also holds what stands around the subject, or if
            there is none.
    """
    tokenizer: Any = model.tokenizer
    found = encode(model, text)
    subject, held = text[slice(*span)], found.within(span)
    special = model.special_ids
    for place in held:
        if found.ids[place] not in special:
            continue
        written = tokenizer.convert_ids_to_tokens(found.ids[place])
        if written in subject or place == held[-1]:
            raise SpecialTokenError(
                f"subject {subject!r} has the special token {written!r} in {text!r}; name a "
                "subject in words that the tokenizer knows"
            )
    start, end = found.spans[held[-1]][0], found.reach(held[-1])
    if end <= span[1] and not text[start : span[0]].strip():
        return found, held
    cause = f"in {text!r} the token {text[start:end]!r} goes beyond subject {subject!r}"
    counted = len(encode(model, text[: span[1]]).ids) - len(model.trailing_ids) - 1
    if counted != held[-1]:
        raise SubjectBoundaryError(
            f"{cause}, which ends in another token where nothing follows; put a space or a mark "
            "after it"
        )
    if straddle == "refuse":
        raise SubjectBoundaryError(
            f"{cause}; reword the template there, or look that token up, as the released code "
            "does (--straddle token; in Python, the fact's straddle)"
        )
    return found, held
