"""The upper part of a decoder, run again with a change to one MLP's output.

An edit at layer L changes nothing below L but the output of L's own MLP, and a causal model
changes nothing before the edited token. So only the blocks above run again, on the tokens from the
edited one on, with the very arguments the model itself passed (see :mod:`firsttok.engine.replay`).
"""

import contextlib
import inspect
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from firsttok.engine.blocks import CACHE_NAMES, replaced_forward
from firsttok.engine.forward import logits
from firsttok.engine.fused import PackedCall, Packing, run_packed, unembed
from firsttok.engine.fusibility import has_plain_arguments, is_fusible
from firsttok.engine.products import fast_products
from firsttok.engine.traits import VALUE
from firsttok.tensors import TokenBatch

__all__ = ["Replay", "Tail", "new_cache"]


class Replay(str, Enum):
    """What has to run again after a change to the output of layer L's MLP."""

    ABOVE = "above"
    """The blocks above L: the MLP's output is added to the residual stream as it is."""
    FROM = "from"
    """Block L and those above: something in L follows the MLP, such as Gemma's second norm."""
    WHOLE = "whole"
    """The whole model: it is no plain stack of blocks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tail:
    """What it takes to run the model again on the columns from ``cut`` on, layer L changed."""

    replay: Replay
    """What is run."""
    layer: int
    """L, the layer whose MLP's output is changed."""
    cut: int
    """Columns before this one are not run again; their keys and values are kept."""
    batch: TokenBatch
    """The prompts, all columns."""
    keys: Float[Tensor, "prompt suffix d_mlp"]
    """Keys at layer L, unchanged by what happens above; of no meaning at padding."""
    residual: Float[Tensor, "prompt suffix d_model"]
    """The residual stream after layer L, or before it where block L runs, too."""
    arguments: tuple[dict[str, Any], ...]
    """Keyword arguments of each block that runs, without the cache."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Attention keys and values ``[prompt, head, cut, d_head]`` of each such block's kept columns;
    empty if ``cut`` is 0."""

    def rows(self, index: Int[Tensor, "row"]) -> "Tail":
        """Return the tail of some prompts only; one may be taken several times."""
        count = self.residual.shape[0]

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == count:
                return value[index]
            if isinstance(value, tuple):
                return tuple(pick(item) for item in cast(tuple[Any, ...], value))
            return value

        return replace(
            self,
            batch=self.batch.rows(index),
            keys=self.keys[index],
            residual=self.residual[index],
            arguments=tuple({k: pick(v) for k, v in block.items()} for block in self.arguments),
            past=cast(tuple[tuple[Tensor, Tensor], ...], pick(self.past)),
        )

    @staticmethod
    def joined(tails: "Sequence[Tail]") -> "Tail":
        """The tails of parts of one batch as one, their prompts one after another.

        What is above the changed layer has to be the same on all; what is at it and below need not.

        Args:
            tails: Tails of batches of the same width, cut at the same column.

        Raises:
            ValueError: If one is run with an argument that another is run without.
        """
        first = tails[0]
        counts = [each.residual.shape[0] for each in tails]

        def join(values: Sequence[Any]) -> Any:
            example = values[0]
            if len({type(value) for value in values}) > 1:
                raise ValueError("the parts of a batch are run with arguments of other kinds")
            if isinstance(example, Tensor) and example.ndim:
                if all(v.shape[0] == n for v, n in zip(values, counts, strict=True)):
                    return torch.cat([*values])
                return example
            if isinstance(example, tuple):
                return tuple(join(parts) for parts in zip(*values, strict=True))
            return example

        return replace(
            first,
            batch=TokenBatch.joined([each.batch for each in tails]),
            keys=torch.cat([each.keys for each in tails]),
            residual=torch.cat([each.residual for each in tails]),
            arguments=tuple(
                {name: join([block[name] for block in blocks]) for name in blocks[0]}
                for blocks in zip(*(each.arguments for each in tails), strict=True)
            ),
            past=cast(
                tuple[tuple[Tensor, Tensor], ...],
                join([each.past for each in tails]),
            ),
        )

    def logits(
        self,
        bridge: Any,
        where: Bool[Tensor, "prompt suffix"],
        change: Float[Tensor, "prompt suffix d_model"] | None = None,
    ) -> Float[Tensor, "place vocab"]:
        """All of :meth:`logit_chunks`."""
        return torch.cat(list(self.logit_chunks(bridge, where, change, size=int(where.sum()))))

    def logit_chunks(
        self,
        bridge: Any,
        where: Bool[Tensor, "prompt suffix"],
        change: Float[Tensor, "prompt suffix d_model"] | None = None,
        *,
        size: int,
        overwrite: bool = False,
    ) -> Iterator[Float[Tensor, "place vocab"]]:
        """Run what has to be run; logits at chosen places, which need not all be in memory at once.

        Args:
            bridge: The bridge the tail was captured on.
            where: The places whose logits are wanted, in row-major order.
            change: What is added to the MLP's output at layer L.
            size: Places of a chunk.
            overwrite: Put a chunk where the one before it was, which is lost; not for gradients.
        """
        if self.replay is Replay.WHOLE:
            with _changed(bridge, self.layer, change):
                whole = logits(bridge, self.batch)
            yield from whole[where].split(size)
            return
        found: Tensor | None = None
        for chunk in bridge.ln_final(self._run(bridge, where, change)).split(size):
            found = unembed(bridge, chunk, into=found if overwrite else None)
            yield found

    @torch.no_grad()
    def capture(self, bridge: Any, hook_names: Sequence[str], *, last: int) -> dict[str, Tensor]:
        """Run blocks again as the weights are now, and keep activations at hook points of them.

        Args:
            bridge: The bridge the tail was captured on.
            hook_names: Hook points of the blocks that run again.
            last: The last block that has to run.

        Returns:
            One tensor ``[prompt, suffix, ...]`` per hook point.

        Raises:
            ValueError: If the whole model has to run, or columns are cut off.
        """
        if self.replay is Replay.WHOLE or self.cut:
            raise ValueError("only whole columns of a plain stack of blocks are captured")
        seen: dict[str, Tensor] = {}

        def keep(activation: Any, hook: Any) -> None:
            seen[hook.name] = activation[0] if isinstance(activation, tuple) else activation

        hidden = self.residual
        with (
            bridge.hooks(fwd_hooks=[(name, keep) for name in hook_names]),
            fast_products(hidden.device),
        ):
            for layer in range(self._first, last + 1):
                output = bridge.blocks[layer](hidden, **self.arguments[layer - self._first])
                hidden = output[0] if isinstance(output, tuple) else output
        return seen

    def _run(
        self,
        bridge: Any,
        where: Bool[Tensor, "prompt suffix"],
        change: Float[Tensor, "prompt suffix d_model"] | None,
    ) -> Float[Tensor, "place d_model"]:
        hidden = self.residual
        above = self.replay is Replay.ABOVE
        if change is not None and above:
            hidden = hidden + change.to(hidden.dtype)
        # Nothing reads what an MLP puts out at padding, nor what the last one does elsewhere.
        packing = Packing(self.batch.attention_mask[:, self.cut :].bool())
        blocks = list(bridge.blocks[self._first :])
        if above and is_fusible(blocks) and has_plain_arguments(blocks, self.arguments):
            wanted = packing.pack(where)
            call = PackedCall(blocks, packing, packing.pack(hidden), self.arguments)
            at_end = partial(_mlp_only_at, where=wanted[None])
            return run_packed(call, past=self.past, last=at_end)[wanted]
        with _changed(bridge, self.layer, None if above else change):
            return self._run_padded(bridge, hidden, packing.real, where)[where]

    def _run_padded(
        self, bridge: Any, hidden: Tensor, real: Tensor, where: Tensor
    ) -> Float[Tensor, "prompt suffix d_model"]:
        cache = new_cache(self.past, self._first) if self.past else None
        last = len(bridge.blocks) - 1
        for layer, arguments in enumerate(self.arguments, self._first):
            block: Any = bridge.blocks[layer]
            with_cache = {} if cache is None else {_cache_name(block): cache}
            read = None if layer == self.layer else where if layer == last else real
            with _mlp_only_at(block, read), fast_products(hidden.device):
                output = block(hidden, **arguments, **with_cache)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @property
    def _first(self) -> int:
        return self.layer + (self.replay is Replay.ABOVE)


@contextlib.contextmanager
def _changed(
    bridge: Any, layer: int, change: Float[Tensor, "prompt suffix d_model"] | None
) -> Generator[None, None, None]:
    """Add something to the MLP's output at a layer."""
    if change is None:
        yield
        return

    def add(output: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return output + change.to(output.dtype)

    with bridge.hooks(fwd_hooks=[(VALUE.format(layer), add)]):
        yield


@contextlib.contextmanager
def _mlp_only_at(
    block: Any, where: Bool[Tensor, "prompt suffix"] | None
) -> Generator[None, None, None]:
    """Run a block's MLP at some places only; it puts out zero at all others."""
    if where is None or bool(where.all()):
        yield
        return
    mlp = block.mlp
    plain = mlp.forward
    places = where.flatten().nonzero()[:, 0]

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = hidden.flatten(0, 1)
        output = plain(flat.index_select(0, places)[None], *args, **kwargs)[0]
        return torch.zeros_like(flat).index_copy(0, places, output).view_as(hidden)

    with replaced_forward(mlp, forward):
        yield


def new_cache(entries: Sequence[tuple[Tensor, Tensor]], first: int) -> Any:
    """A cache that holds keys and values ``[prompt, head, pos, d_head]`` from a layer on."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for offset, (keys, values) in enumerate(entries):
        cache.update(keys, values, first + offset)
    return cache


def _cache_name(block: Any) -> str:
    parameters = inspect.signature(block.original_component.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])
