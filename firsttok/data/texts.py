"""Sentences to measure perplexity on: the built-in set, and ME-PPL files."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, cast

from firsttok.arguments import taken
from firsttok.errors import TextFormatError
from firsttok.storage import read_json

__all__ = ["builtin_sentences", "load_texts"]


def builtin_sentences() -> tuple[str, ...]:
    """Return 50 plain sentences of mixed register, 10 to 60 words each."""
    text = resources.files("firsttok.data.builtin").joinpath("sentences.json").read_text("utf-8")
    return tuple(json.loads(text)["sentences"])


@taken
def load_texts(path: str | Path) -> tuple[str, ...]:
    """Read sentences from JSON: a list of strings, or of objects with ``Text`` (ME-PPL's schema).

    Texts are kept as they are, leading spaces included, since they change the tokens.

    Raises:
        BadInputError: If the file is missing or not JSON.
        TextFormatError: If it is no list of sentences, or holds none.
    """
    path = Path(path)
    content = read_json(path, "sentences")
    if isinstance(content, Mapping):
        content = cast(Mapping[str, Any], content).get("sentences")
    if not isinstance(content, list):
        raise TextFormatError(f"{path} should hold a list of sentences")
    texts: list[str] = []
    for index, item in enumerate(cast(list[Any], content)):
        text: Any = cast(Mapping[str, Any], item).get("Text") if isinstance(item, Mapping) else item
        if not isinstance(text, str) or not text.strip():
            raise TextFormatError(
                f"{path}, record {index} is no sentence; give a text or an object with 'Text'"
            )
        texts.append(text)
    if not texts:
        raise TextFormatError(f"{path} holds no sentences; give at least one")
    return tuple(texts)
