"""A bridge's blocks: what they are called with, and something else in their place."""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CACHE_NAMES",
    "block_arguments",
    "named_arguments",
    "passed_by",
    "replaced_forward",
    "stopped_above",
    "undisturbed",
]

CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")
"""What blocks call the cache they are given."""
_OWN_ARGUMENTS = frozenset({"hidden_states", "kwargs", "use_cache", *CACHE_NAMES})
"""Arguments that whoever runs a block again gives it himself."""


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass whose rest nobody needs."""


@contextlib.contextmanager
def replaced_forward(module: Any, forward: Callable[..., Any]) -> Generator[None, None, None]:
    """Let a module do something else when it is called."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextlib.contextmanager
def stopped_above(bridge: Any) -> Generator[None, None, None]:
    """End what is run in here, which is one forward pass, before the final norm."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = bridge.ln_final.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        handle.remove()


def named_arguments(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block's arguments by name, less the hidden states and the model's own cache."""
    bound = inspect.signature(block.original_component.forward).bind_partial(*args, **kwargs)
    named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    return {name: value for name, value in named.items() if name not in _OWN_ARGUMENTS}


@contextlib.contextmanager
def passed_by(
    blocks: Iterable[Any], calls: list[dict[str, Any]], hand_on: Callable[[Tensor], Any]
) -> Generator[list[Tensor], None, None]:
    """Let blocks hand on what they are given, for what they are called with is of interest only.

    Args:
        blocks: Blocks of a bridge.
        calls: Where to put what each is called with.
        hand_on: What a block gives back, from the hidden states it was given.

    Yields:
        The hidden states that each was given.
    """
    entered: list[Tensor] = []

    def passer(block: Any) -> Callable[..., Any]:
        def pass_by(*args: Any, **kwargs: Any) -> Any:
            calls.append(named_arguments(block, args, kwargs))
            entered.append(args[0] if args else kwargs["hidden_states"])
            return hand_on(entered[-1])

        return pass_by

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, passer(block)))
        yield entered


@torch.no_grad()
def block_arguments(
    bridge: Any, tokens: Tensor, arguments: Mapping[str, Any]
) -> tuple[Tensor, list[dict[str, Any]]]:
    """What enters the first block, and what each block is called with; no block is run.

    Args:
        bridge: A bridge whose blocks return a tensor.
        tokens: Token ids ``[prompt, pos]``.
        arguments: What else the model is called with.
    """
    calls: list[dict[str, Any]] = []
    with (
        passed_by(bridge.blocks, calls, lambda hidden: hidden) as entered,
        stopped_above(bridge),
    ):
        bridge(tokens, **arguments)
    return entered[0], calls


@contextlib.contextmanager
def undisturbed(bridge: Any) -> Generator[None, None, None]:
    """Run a bridge without users' hooks, dropout, autocast or inference mode."""
    from transformer_lens.hook_points import HookPoint

    with contextlib.ExitStack() as stack:

        def put(part: Any, name: str, value: Any) -> None:
            stack.callback(setattr, part, name, getattr(part, name))
            setattr(part, name, value)

        for part in {*bridge.modules(), *bridge.original_model.modules()}:
            if part.training:
                put(part, "training", False)
            for kind in ("fwd", "bwd") if isinstance(part, HookPoint) else ():
                handles = getattr(part, f"{kind}_hooks")
                kept = [handle for handle in handles if handle.is_permanent]
                if len(kept) < len(handles):
                    name = {"fwd": "_forward_hooks", "bwd": "_backward_hooks"}[kind]
                    ids = {handle.hook.id for handle in kept}
                    hooks = getattr(part, name).items()
                    put(part, f"{kind}_hooks", kept)
                    put(part, name, OrderedDict((i, hook) for i, hook in hooks if i in ids))
        device = next(bridge.original_model.parameters()).device
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
