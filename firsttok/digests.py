"""Digests: what firsttok puts into a file of its own, so that damage and changes are found."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from firsttok.errors import DamagedFileError

__all__ = ["content_hash", "is_sealed", "sealed", "tensors_hash", "unsealed"]

_DIGEST = "digest"
_NAME = "filed_as"
_KIND = "sha256:"


def content_hash(content: Any) -> str:
    """SHA-256 of a JSON-serialisable object, independent of the order of its keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # Half of a surrogate pair is no text, but whoever hashes it says so better than the encoder.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def tensors_hash(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over name, type, shape and bytes of tensors, independent of their order.

    Args:
        tensors: Contiguous tensors on the CPU, of any shape and type, by name.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(f"{header}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sealed(record: Mapping[str, Any], name: str, *, beside: str = "") -> dict[str, Any]:
    """Return a record with the name it is filed under and a digest of all of it.

    Args:
        record: Plain JSON content.
        name: Name of the file.
        beside: Hash of what the file holds beside the record.
    """
    filed = {**record, _NAME: name}
    return {**filed, _DIGEST: f"{_KIND}{content_hash([filed, beside])}"}


def is_sealed(content: Any) -> bool:
    """Whether content read from a file says that it holds a digest."""
    if not isinstance(content, Mapping):
        return False
    record = cast(Mapping[Any, Any], content)
    return _NAME in record or str(record.get(_DIGEST)).startswith(_KIND)


def unsealed(
    content: Any, path: Path, what: str, *, name: str | None = None, beside: str = ""
) -> dict[str, Any]:
    """Return the record that :func:`sealed` was given.

    Args:
        content: What was read.
        path: The file, for the message.
        what: What it should hold, for the message.
        name: The name it has to be filed under; None for any.
        beside: Hash of what the file holds beside the record.

    Raises:
        DamagedFileError: If the digest is lacking or does not belong to the content, or the file
            was filed under another name.
    """
    if not is_sealed(content):
        raise DamagedFileError(f"{path} holds no digest, so it is not used as {what}")
    filed = dict(cast(Mapping[str, Any], content))
    try:
        intact = filed.pop(_DIGEST, None) == f"{_KIND}{content_hash([filed, beside])}"
    except RecursionError:
        intact = False
    if not intact:
        raise DamagedFileError(
            f"{path} was damaged or changed after firsttok wrote it (its digest does not belong to "
            f"its content), so it is not used as {what}; make it again"
        )
    filed_as = filed.pop(_NAME, None)
    if name not in (None, filed_as):
        raise DamagedFileError(
            f"{path} was written as {filed_as}, so it is not used as {what} under this name"
        )
    return filed
