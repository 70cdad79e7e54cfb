"""The upper part of a decoder, replayed from one block on.

An edit at layer L changes nothing below L, and a causal model changes nothing before the edited
token. So the blocks below L run once, the keys and values of the tokens before the first changed
column are kept, and only the rest is run again, with the very arguments the model itself passed.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from firsttok.errors import UnsupportedModelError
from firsttok.models.forward import call_arguments
from firsttok.tensors import TokenBatch

if TYPE_CHECKING:
    from firsttok.models.loading import Model

__all__ = ["Tail", "capture_tail"]

_CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tail:
    """What it takes to run blocks ``layer`` and up again on the columns from ``cut`` on."""

    layer: int
    """The first block that runs."""
    cut: int
    """Columns before this one are not run again; their keys and values are kept."""
    residual: Float[Tensor, "prompt suffix d_model"]
    """Input of block ``layer``."""
    arguments: tuple[dict[str, Any], ...]
    """Keyword arguments of each block from ``layer`` on, without the cache."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values of each block's kept columns; empty if ``cut`` is 0."""

    def rows(self, index: Int[Tensor, "row"]) -> "Tail":
        """Return the tail of some prompts only."""
        count = self.residual.shape[0]

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == count:
                return value[index]
            if isinstance(value, tuple):
                return tuple(pick(item) for item in cast(tuple[Any, ...], value))
            return value

        return replace(
            self,
            residual=self.residual[index],
            arguments=tuple({k: pick(v) for k, v in block.items()} for block in self.arguments),
            past=cast(tuple[tuple[Tensor, Tensor], ...], pick(self.past)),
        )

    def run(
        self,
        model: "Model",
        where: Bool[Tensor, "prompt suffix"],
        hooks: Sequence[tuple[str, Any]] = (),
    ) -> Float[Tensor, "place vocab"]:
        """Run the upper blocks and return logits at chosen places.

        Args:
            model: The model the tail was captured on, possibly with an edit applied.
            where: The places whose logits are wanted, in row-major order.
            hooks: TransformerLens hooks, as for ``run_with_hooks``.
        """
        hidden = self.residual
        cache = self._cache()
        with model.bridge.hooks(fwd_hooks=list(hooks)):
            for offset, arguments in enumerate(self.arguments):
                block: Any = model.bridge.blocks[self.layer + offset]
                with_cache = {} if cache is None else {_cache_name(block): cache}
                output = block(hidden, **arguments, **with_cache)
                hidden = output[0] if isinstance(output, tuple) else output
            bridge: Any = model.bridge
            result: Tensor = bridge.unembed(bridge.ln_final(hidden[where]))
        return result

    def _cache(self) -> Any:
        if not self.past:
            return None
        from transformers import DynamicCache

        cache = DynamicCache()
        for offset, (keys, values) in enumerate(self.past):
            cache.update(keys, values, self.layer + offset)
        return cache


def capture_tail(model: "Model", batch: TokenBatch, *, layer: int, cut: int = 0) -> Tail:
    """Run a batch once and keep what is needed to replay it from ``layer`` and ``cut`` on.

    Args:
        model: A decoder.
        batch: The prompts, padded so that no column before ``cut`` depends on what will change.
        layer: The first block to be replayed.
        cut: The first column to be replayed.

    Raises:
        UnsupportedModelError: If the model is no plain stack of decoder blocks.
        ValueError: If columns are cut off a batch whose tokens may see later ones.
    """
    if cut and batch.visible is not None:
        raise ValueError("a batch with its own visibility cannot be cut: cut must be 0")
    bridge: Any = model.bridge
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is not a decoder with a final norm and an unembedding; "
            "only such models can be edited"
        )
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def remember(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    from transformers import DynamicCache

    arguments = call_arguments(model, batch)
    cache = DynamicCache() if cut else None
    past: tuple[tuple[Tensor, Tensor], ...] = ()
    with torch.no_grad():
        if cache is not None:
            bridge(
                batch.tokens[:, :cut],
                attention_mask=batch.attention_mask[:, :cut],
                position_ids=batch.position_ids[:, :cut],
                past_key_values=cache,
            )
            entries: list[Any] = cast(Any, cache).layers
            past = tuple((entry.keys, entry.values) for entry in entries[layer:])
            arguments |= {
                "position_ids": batch.position_ids[:, cut:],
                "past_key_values": cache,
            }
        handles = [
            block.register_forward_pre_hook(remember, with_kwargs=True)
            for block in bridge.blocks[layer:]
        ]
        try:
            bridge(batch.tokens[:, cut:], **arguments)
        finally:
            for handle in handles:
                handle.remove()
    residual = calls[0][0][0] if calls[0][0] else calls[0][1]["hidden_states"]
    return Tail(
        layer=layer,
        cut=cut,
        residual=residual,
        arguments=tuple(
            _by_name(block, args, kwargs)
            for block, (args, kwargs) in zip(bridge.blocks[layer:], calls, strict=True)
        ),
        past=past,
    )


def _by_name(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments by name, less the hidden states and the model's own cache."""
    bound = inspect.signature(block.original_component.forward).bind_partial(*args, **kwargs)
    named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    dropped = {"hidden_states", "kwargs", "use_cache", *_CACHE_NAMES}
    return {name: value for name, value in named.items() if name not in dropped}


def _cache_name(block: Any) -> str:
    parameters = inspect.signature(block.original_component.forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[0])
