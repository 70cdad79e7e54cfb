"""Sentences to measure perplexity on: the built-in set, and ME-PPL files."""

from pathlib import Path

from firsttok.arguments import taken
from firsttok.data.records import builtin_json, iter_records
from firsttok.errors import BadInputError, FactFormatError, TextFormatError

__all__ = ["builtin_sentences", "load_texts"]

_NAMES = ("Text", "text", "sentence", "content")
"""Names of the field that holds the sentence."""


def builtin_sentences() -> tuple[str, ...]:
    """Return 50 plain sentences of mixed register, 10 to 60 words each."""
    return tuple(builtin_json("sentences.json")["sentences"])


@taken
def load_texts(path: str | Path) -> tuple[str, ...]:
    """Read sentences: texts, or objects with ``Text`` (ME-PPL's schema) or ``text``.

    The file is a JSON list, JSON Lines (``.jsonl``) or Parquet, perhaps in gzip, as for
    :func:`~firsttok.data.load_facts`. Texts are kept as they are, leading spaces included, since
    they change the tokens.

    Raises:
        BadInputError: If the file is missing or not JSON.
        TextFormatError: If it is no list of sentences, or holds none.
    """
    texts: list[str] = []
    try:
        for place, record in iter_records(Path(path), "sentences"):
            if isinstance(record, BadInputError):
                raise record
            text = record
            if isinstance(record, dict):
                given = (record.get(name) for name in _NAMES)
                text = next((value for value in given if value is not None), None)
            if not isinstance(text, str) or not text.strip():
                raise TextFormatError(
                    f"{place} is no sentence; give a text or an object with 'Text'"
                )
            texts.append(text)
    except FactFormatError as error:
        raise TextFormatError(str(error)) from None
    if not texts:
        raise TextFormatError(f"{path} holds no sentences; give at least one")
    return tuple(texts)
