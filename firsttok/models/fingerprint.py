"""Hashes of a model's parts: its weights, its configuration and its tokenizer."""

import contextlib
import hashlib
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from firsttok.errors import NonFiniteError
from firsttok.storage import content_hash

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "HashedWeights",
    "TokenizerFindings",
    "config_hash",
    "hash_weights",
    "tensor_hash",
    "tokenizer_hash",
]

_Found = TypeVar("_Found")
_MOST = 4096
"""Findings about a tokenizer that are kept."""

_UNDECIDING = frozenset({"dtype", "torch_dtype", "transformers_version", "use_cache"})
"""Fields of a configuration that change no number, or that are told elsewhere."""


@dataclass(frozen=True, kw_only=True)
class HashedWeights:
    """All weights of a model, hashed as a whole and one by one."""

    fingerprint: str
    """SHA-256 over names, shapes, types and bytes of all weights."""
    by_place: Mapping[tuple[Any, ...], str]
    """:func:`tensor_hash` of each, by where and how it is in memory."""
    places: Mapping[str, tuple[Any, ...]]
    """That place by the name in the checkpoint."""

    def hash_of(self, tensor: Shaped[Tensor, "..."]) -> str:
        """Return :func:`tensor_hash` of a tensor; one of the weights is not read again."""
        return self.by_place.get(_place(tensor)) or tensor_hash(tensor)

    def named(self, tensors: Iterable[Shaped[Tensor, "..."]]) -> dict[str, Shaped[Tensor, "..."]]:
        """Return tensors that are as they were hashed, by their names in the checkpoint.

        Args:
            tensors: The tensors of the model, in whatever module they are by now. A name whose
                tensor is not among them, since a bridge took it apart, is left out.
        """
        known = {_place(tensor): tensor for tensor in tensors}
        return {name: known[place] for name, place in self.places.items() if place in known}


def hash_weights(model: "nn.Module") -> HashedWeights:
    """Hash the weights of a model, which have to be finite.

    Args:
        model: The model as loaded; its weights are read only.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    by_place: dict[tuple[Any, ...], str] = {}
    places: dict[str, tuple[Any, ...]] = {}
    # Both digests of a weight at once: neither holds Python's lock.
    with ThreadPoolExecutor(max_workers=1) as beside:
        for key, weight in sorted(model.state_dict().items()):
            if weight.is_floating_point() and not _is_finite(weight):
                raise NonFiniteError(
                    f"weight {key} holds NaN or infinity; the model file is damaged, fetch it again"
                )
            digest.update(f"{key} {_kind(weight)}".encode())
            content = _bytes(weight)
            own = None
            places[key] = _place(weight)
            if _place(weight) not in by_place:
                own = beside.submit(_hash, weight, content)
            digest.update(content)
            if own is not None:
                by_place[_place(weight)] = own.result()
    return HashedWeights(fingerprint=digest.hexdigest(), by_place=by_place, places=places)


def tensor_hash(tensor: Shaped[Tensor, "..."]) -> str:
    """SHA-256 over shape, type and bytes of a tensor, wherever it is."""
    return _hash(tensor, _bytes(tensor))


def config_hash(config: Any) -> str:
    """SHA-256 of a Hugging Face configuration, less what changes no number.

    Args:
        config: The configuration; what a file leaves at the default of its class does not count.
    """
    fields: dict[str, Any] = config.to_diff_dict()
    kept = {
        name: value
        for name, value in fields.items()
        if name not in _UNDECIDING and not name.startswith("_")
    }
    return content_hash(_plain(kept))


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer: vocabulary, rules, special tokens."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [tokenizer.backend_tokenizer.to_str(), special, sorted(tokenizer.all_special_ids)]
    return content_hash(parts)


class TokenizerFindings:
    """What was found out about a tokenizer, for as long as it stays as it is."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._state: list[Any] = []
        self._found: dict[Hashable, Any] = {}
        self._looked_at: Any = None

    def get(self, tokenizer: Any, what: Hashable, find: Callable[[], _Found]) -> _Found:
        """Return a finding, which is made once in each state of a tokenizer.

        A change shows in the special and added tokens, the size of the vocabulary, the chat
        template or the rules before and after the vocabulary. What escapes is another vocabulary
        of the same size.

        Args:
            tokenizer: The tokenizer.
            what: What is asked, with everything besides the tokenizer that the answer depends on.
            find: Finds it; it leaves the tokenizer as it is.
        """
        with self.unchanged(tokenizer):
            if what not in self._found:
                if len(self._found) >= _MOST:
                    self._found = {}
                found = find()
                self._found[what] = found
            return self._found[what]

    @contextlib.contextmanager
    def unchanged(self, tokenizer: Any) -> Generator[None, None, None]:
        """Look at a tokenizer's state once for all questions of a block that leaves it as it is.

        To read 6 000 added tokens, as Gemma has, takes longer than to tokenise a prompt.

        Args:
            tokenizer: The tokenizer.
        """
        if self._looked_at is tokenizer:
            yield
            return
        state = _state(tokenizer)
        if self._state != state:
            self._state, self._found = state, {}
        self._looked_at = tokenizer
        try:
            yield
        finally:
            self._looked_at = None


def _state(tokenizer: Any) -> list[Any]:
    rules = tokenizer.backend_tokenizer
    parts = (rules.normalizer, rules.pre_tokenizer, rules.post_processor, rules.truncation)
    special = (tokenizer.special_tokens_map, tokenizer.all_special_ids)
    added, chat = tokenizer.added_tokens_decoder, tokenizer.chat_template
    return [tokenizer, rules, len(tokenizer), special, added, chat, *map(repr, parts)]


def _is_finite(weight: Shaped[Tensor, "..."]) -> bool:
    # The sum is finite only if each term is, and is quick; finite terms may overflow it, though.
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


def _place(tensor: Shaped[Tensor, "..."]) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _kind(tensor: Shaped[Tensor, "..."]) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _bytes(tensor: Shaped[Tensor, "..."]) -> memoryview:
    plain: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(plain.numpy())


def _hash(tensor: Shaped[Tensor, "..."], content: memoryview) -> str:
    digest = hashlib.sha256(_kind(tensor).encode())
    digest.update(content)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
