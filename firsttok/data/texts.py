"""Sentences to measure perplexity on, and corpora to take a second moment over."""

import gzip
import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from firsttok.arguments import taken
from firsttok.data.records import builtin_json, iter_records
from firsttok.errors import BadInputError, FactFormatError, TextFormatError
from firsttok.options import DEFAULT_CORPUS
from firsttok.storage import atomic_path, read_text

__all__ = ["Corpus", "builtin_sentences", "find_corpus", "load_texts", "write_corpus"]

_NAMES = ("Text", "text", "sentence", "content")
"""Names of the field that holds the sentence."""
_PARTED = "\n\n"
"""What stands between two documents of a file."""
_SAMPLED = "sampled_corpus.txt.gz"
_SAMPLED_SHA256 = "03cd304689540217d4c70d599b317d9e52c79103366e90b06bf11f01e8f95812"
"""Of the unpacked text: gzip may pack the same text in several ways."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that a second moment is taken over."""

    name: str
    """For the records; what the corpus holds is known by its hash there."""
    documents: tuple[str, ...]


@taken
def find_corpus(name: str = DEFAULT_CORPUS) -> Corpus:
    """Return the corpus of a name: ``pydoc``, ``sampled``, or a text file.

    ``pydoc`` is the documentation inside Python, one document per topic; its wording depends on the
    Python version. ``sampled`` is text that SmolLM2-135M wrote, the same everywhere;
    ``sampled_corpus.json`` beside it says how it was made. The documents of a file are parted by
    blank lines; one that has the name of a corpus is given as ``./pydoc``.

    Raises:
        BadInputError: If the file is missing, is no UTF-8 text or holds none; if the shipped corpus
            is not what was shipped.
    """
    if name == "pydoc":
        from pydoc_data.topics import topics

        return Corpus(name="pydoc topics", documents=tuple(topics[key] for key in sorted(topics)))
    if name == "sampled":
        # Whatever is called so elsewhere, this name tells which text it was.
        return Corpus(name=f"sampled {_SAMPLED_SHA256[:10]}", documents=_documents(_sampled()))
    documents = _documents(read_text(Path(name), "text"))
    if not documents:
        raise BadInputError(f"{name} holds no text; give at least one sentence")
    return Corpus(name=Path(name).name, documents=documents)


def write_corpus(path: Path, documents: Iterable[str]) -> None:
    """Write documents that hold no blank line as a text, from which they are read as they were.

    Raises:
        CacheError: If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes((_PARTED.join(documents) + "\n").encode())


def _documents(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.rstrip("\n").split(_PARTED) if part.strip())


def _sampled() -> str:
    file = resources.files("firsttok.data.builtin").joinpath(_SAMPLED)
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error):
        data = b""
    if hashlib.sha256(data).hexdigest() != _SAMPLED_SHA256:
        raise BadInputError(f"{file} is damaged or was changed; install firsttok again")
    return data.decode()


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
