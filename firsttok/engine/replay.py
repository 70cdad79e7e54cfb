"""Capture what a replay needs, and find out by trial how much of a model has to run again."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.engine.blocks import named_arguments, passed_by, stopped_above
from firsttok.engine.forward import call_arguments, capture
from firsttok.engine.fused import pack_call, run_packed
from firsttok.engine.fusibility import is_fusible
from firsttok.engine.products import fast_products, runs_plain
from firsttok.engine.tail import Replay, Tail, new_cache
from firsttok.engine.traits import KEY, RESIDUAL, is_decoder, some_tokens
from firsttok.tensors import TokenBatch

__all__ = ["capture_tail", "find_replay", "keys_behind"]

logger = logging.getLogger(__name__)
_Past = tuple[tuple[Tensor, Tensor], ...]


def capture_tail(
    bridge: Any, batch: TokenBatch, *, layer: int, cut: int = 0, replay: Replay
) -> Tail:
    """Run a batch once and keep what is needed to replay it with a change at ``layer``.

    Args:
        bridge: A decoder's bridge.
        batch: The prompts, padded so that no column before ``cut`` depends on what will change.
        layer: The layer whose MLP's output will be changed.
        cut: The first column to be replayed.
        replay: What is to be run again.

    Raises:
        ValueError: If columns are cut off a batch whose tokens may see later ones, or off one of a
            model that runs whole.
    """
    if cut and batch.visible is not None:
        raise ValueError("a batch with its own visibility cannot be cut: cut must be 0")
    first = layer + (replay is Replay.ABOVE)
    past: _Past = ()
    if replay is Replay.WHOLE:
        if cut:
            raise ValueError("a model that runs whole cannot be cut: cut must be 0")
        names = {"keys": KEY.format(layer), "residual": RESIDUAL.format(layer)}
        whole = capture(bridge, batch, [*names.values()], stop_at_layer=None)
        seen, calls = {name: whole[hook] for name, hook in names.items()}, []
    else:
        arguments = call_arguments(bridge, batch)
        if cut:
            past = _prefix_pass(bridge, batch, cut, blocks=len(bridge.blocks))
            arguments |= _behind(batch, cut, past)
        found = None
        if replay is Replay.ABOVE:
            found = _seen_packed(bridge, batch, layer, cut, arguments, past)
        seen, calls = found or _seen_padded(bridge, batch, layer, cut, arguments, first)
    return Tail(
        replay=replay,
        layer=layer,
        cut=cut,
        batch=batch,
        keys=seen["keys"],
        residual=seen["residual"],
        arguments=tuple(calls),
        past=past[first:],
    )


def keys_behind(
    bridge: Any, batch: TokenBatch, *, layer: int, cut: int
) -> Float[Tensor, "prompt suffix d_mlp"] | None:
    """Keys at a layer in the columns from ``cut`` on, columns before it run once if they are equal.

    Args:
        bridge: A bridge.
        batch: The prompts, padded so that equal beginnings end at ``cut``.
        layer: The layer.
        cut: The first column whose keys are wanted.

    Returns:
        The keys, of no meaning at padding; None if this bridge cannot be run in parts like that.
    """
    if not is_decoder(bridge) or batch.visible is not None or not is_fusible(list(bridge.blocks)):
        return None
    past = _prefix_pass(bridge, batch, cut, blocks=layer + 1)
    arguments = call_arguments(bridge, batch) | _behind(batch, cut, past)
    found = _seen_packed(bridge, batch, layer, cut, arguments, past)
    return None if found is None else found[0]["keys"]


def find_replay(bridge: Any) -> Replay:
    """Find the least that has to run again on a bridge, by trial against whole passes.

    One that none of the shortcuts is right for runs whole, with a warning that says so.
    """
    if runs_plain() or not is_decoder(bridge):
        return Replay.WHOLE
    batch = TokenBatch.of(some_tokens(bridge, 2, 6))
    reasons: list[str] = []
    for mode in (Replay.ABOVE, Replay.FROM):
        try:
            reason = _difference(bridge, batch, mode)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return mode
        reasons.append(f"{mode.value}: {reason}")
    logger.warning(
        "%s cannot be replayed from a layer on (%s), so every step runs the whole model: the "
        "results are the same, only slower",
        bridge.cfg.architecture,
        "; ".join(reasons),
    )
    return Replay.WHOLE


@torch.no_grad()
def _difference(bridge: Any, batch: TokenBatch, mode: Replay) -> str | None:
    """In what a replay differs from a whole pass; None if in nothing.

    Unchanged, the same blocks run on the same input, so that the logits must be equal but for the
    last bits: a logit cap after the unembedding shows there. Then a small and a large change,
    since a norm after the MLP can be mistaken for none at one size only; and some prompts of it.
    """
    layer, cut = (len(bridge.blocks) - 1) // 2, 2
    everywhere = torch.ones_like(batch.tokens, dtype=torch.bool)
    whole = capture_tail(bridge, batch, layer=layer, replay=Replay.WHOLE)
    uncut = capture_tail(bridge, batch, layer=layer, replay=mode)
    tail = capture_tail(bridge, batch, layer=layer, cut=cut, replay=mode)
    before = whole.logits(bridge, everywhere).double()
    precision, device = torch.finfo(whole.residual.dtype), batch.device
    low = precision.bits < 32
    exact = precision.eps / 8 if low else 1e-5
    if not bool((uncut.logits(bridge, everywhere) - before).norm() <= exact * before.norm()):
        return "the logits are others"
    order = torch.tensor([1, 0, 1], device=device)
    seen = everywhere[order, cut:]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(whole.residual.shape, generator=generator).to(device)
    noise[:, :cut] = 0
    norms = whole.residual.double().norm(dim=-1)
    scale = float(norms.median() / noise.shape[-1] ** 0.5)
    for size in (scale, 8 * scale):
        change = size * noise
        expected = whole.logits(bridge, everywhere, change).double()
        found = tail.rows(order).logits(bridge, seen, change[order, cut:]).double()
        kept = expected.view(*everywhere.shape, -1)[order, cut:].flatten(0, 1)
        if not bool((found - kept).norm() <= (0.3 if low else 1e-2) * (expected - before).norm()):
            return "a change has another effect"
    return None


@torch.no_grad()
def _seen_packed(
    bridge: Any, batch: TokenBatch, layer: int, cut: int, arguments: dict[str, Any], past: _Past
) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """Keys, residual stream and arguments, the blocks up to ``layer`` run packed if they can be."""
    columns = slice(cut, None)
    call = pack_call(bridge, batch.tokens[:, columns], batch.attention_mask[:, columns], arguments)
    if call is None:
        return None
    seen: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen["keys"] = activation[0]

    with bridge.hooks(fwd_hooks=[(KEY.format(layer), keep)]):
        seen["residual"] = run_packed(call, layer + 1, past=past)
    unpacked = {name: call.packing.unpack(found) for name, found in seen.items()}
    return unpacked, [dict(each) for each in call.arguments[layer + 1 :]]


def _behind(batch: TokenBatch, cut: int, past: _Past) -> dict[str, Any]:
    """What a pass over the columns from ``cut`` on is called with besides."""
    return {"position_ids": batch.position_ids[:, cut:], "past_key_values": new_cache(past, 0)}


def _prefix_pass(bridge: Any, batch: TokenBatch, cut: int, *, blocks: int) -> _Past:
    """The lowest blocks' keys and values of the columns before ``cut``; equal prefixes run once."""
    parts = (batch.tokens, batch.attention_mask, batch.position_ids)
    columns = torch.cat([part[:, :cut] for part in parts], dim=1)
    distinct, inverse = torch.unique(columns, dim=0, return_inverse=True)
    tokens, mask, position_ids = distinct.split(cut, dim=1)
    arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids}
    found = _keys_and_values(bridge, tokens, mask, arguments, blocks)
    return tuple((keys[inverse], values[inverse]) for keys, values in found)


@torch.no_grad()
def _keys_and_values(
    bridge: Any, tokens: Tensor, mask: Tensor, arguments: dict[str, Any], count: int
) -> Sequence[tuple[Tensor, Tensor]]:
    call = pack_call(bridge, tokens, mask, arguments)
    if call is not None:
        kept: list[tuple[Tensor, Tensor]] = []
        run_packed(call, count, keep=kept)
        return kept
    cache = new_cache((), 0)
    with stopped_above(bridge), fast_products(tokens.device):
        bridge(tokens, **arguments, past_key_values=cache)
    return [(entry.keys, entry.values) for entry in cache.layers]


@torch.no_grad()
def _seen_padded(
    bridge: Any, batch: TokenBatch, layer: int, cut: int, arguments: dict[str, Any], first: int
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Keys, the residual stream and the arguments of the blocks from ``first`` on.

    Those above ``layer`` are passed by: only what they are called with is of interest.
    """
    edited: Any = bridge.blocks[layer]
    names = {KEY.format(layer): "keys"}
    names[f"blocks.{layer}.hook_in" if first == layer else RESIDUAL.format(layer)] = "residual"
    seen: dict[str, Tensor] = {}
    calls: list[dict[str, Any]] = []
    as_tuple: list[bool] = []

    def remember(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(named_arguments(block, args, kwargs))

    def leave(_block: Any, _args: Any, output: Any) -> None:
        as_tuple.append(isinstance(output, tuple))

    def keep(activation: Any, hook: Any) -> None:
        seen[names[hook.name]] = activation[0] if isinstance(activation, tuple) else activation

    with contextlib.ExitStack() as stack:
        stack.callback(edited.register_forward_hook(leave).remove)
        if first == layer:
            pre_hook = edited.register_forward_pre_hook(remember, with_kwargs=True)
            stack.callback(pre_hook.remove)
        above = bridge.blocks[layer + 1 :]
        stack.enter_context(
            passed_by(above, calls, lambda hidden: (hidden,) if as_tuple[0] else hidden)
        )
        stack.enter_context(stopped_above(bridge))
        stack.enter_context(bridge.hooks(fwd_hooks=[(name, keep) for name in names]))
        stack.enter_context(fast_products(batch.device))
        bridge(batch.tokens[:, cut:], **arguments)
    return seen, calls
