"""Whether a model obeys an intervention, found out on a few tokens before its first use.

A mask or a position id that a model ignores would pass for one without effect, and a token that is
reached past the mask for one that attention does not explain. So each kind of change is tried.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.engine.blocks import undisturbed
from firsttok.engine.forward import call_arguments
from firsttok.engine.traits import (
    RESIDUAL,
    attention_window,
    position_embedding,
    some_tokens,
    some_weight,
)
from firsttok.tensors import TokenBatch

__all__ = ["Change", "Trials", "changes_of"]

_TOKENS = 5
"""Tokens of a trial, fewer where an attention window is shorter."""
_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)
"""What a model may raise that does not take what it is given."""


class Change(str, Enum):
    """A kind of change that an intervention makes to a batch."""

    MASK = "mask"
    """It says what tokens attend to, be it what they attend to anyway."""
    CLOSED = "closed"
    """Some token attends no longer to itself or to an earlier one."""
    OPENED = "opened"
    """Some token attends to a later one."""
    MOVED = "moved"
    """Some token has another position id."""


def changes_of(usual: TokenBatch, changed: TokenBatch) -> tuple[Change, ...]:
    """Kinds of change between a batch and what interventions made of it; padding does not count."""
    real = usual.attention_mask.bool()
    found: list[Change] = []
    if bool((changed.position_ids != usual.position_ids)[real].any()):
        found.append(Change.MOVED)
    if changed.visible is not None:
        causal = usual.causally_visible()
        found.append(Change.MASK)
        if bool((causal & ~changed.visible)[real].any()):
            found.append(Change.CLOSED)
        if bool((changed.visible & ~causal)[real].any()):
            found.append(Change.OPENED)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Trials:
    """What was tried on one model; all views of it share this object, so each trial runs once."""

    found: dict[Hashable, str | None] = field(default_factory=dict[Hashable, str | None])
    """The reason against each kind of change that was tried, None where there is none."""

    def obstacle(self, bridge: Any, usual: TokenBatch, changed: TokenBatch) -> str | None:
        """Why the model does not do what a changed batch asks for.

        Three laws are tried for a mask, on tokens and states that come from a seed:

        - Given the causal mask explicitly, the model computes what it computes without one. This is
          tried for every power of two that a batch's width reaches, since windows are cut off by
          the mask that a model makes itself.
        - In no block does a token change with one that it must not attend to.
        - In every block tokens change with later ones that they may attend to.

        Changed position ids must change some state, and must not change which tokens a token
        depends on: transformers may take repeated ids for packed sequences.

        Args:
            bridge: The bridge.
            usual: A batch as it was.
            changed: The same batch after the interventions.

        Returns:
            A clause that gives the reason; None if the model obeys.
        """
        for change in changes_of(usual, changed):
            reason = self._reason(bridge, change, usual.tokens.shape[1])
            if reason is not None:
                return reason
        return None

    def _reason(self, bridge: Any, change: Change, width: int) -> str | None:
        longest = min(int(bridge.cfg.n_ctx), attention_window(bridge) or int(bridge.cfg.n_ctx))
        if change is not Change.MASK:
            return self._kept(bridge, change, min(_TOKENS, longest))
        rounded = min(max(8, 1 << (width - 1).bit_length()), longest)
        reason = self._kept(bridge, change, rounded)
        # A window that ends between the two widths does not concern this batch.
        return self._kept(bridge, change, width) if reason and rounded > width else reason

    def _kept(self, bridge: Any, change: Change, width: int) -> str | None:
        attention = getattr(bridge.original_model.config, "_attn_implementation", None)
        weight = some_weight(bridge)
        key = (change, width, weight.dtype, weight.device, attention)
        if key not in self.found:
            self.found[key] = _tried(bridge, change, width)
        return self.found[key]


def _influences(bridge: Any, batch: TokenBatch) -> Float[Tensor, "layer row key"]:
    """How far each token after a block depends on each token before that block alone.

    It is the norm of the gradient of a random projection of the one by the other, so a token
    without influence has exactly 0, and one with a small weight has not. Every block is given
    noise: what is measured is the path, not what a trained model makes of it.

    Args:
        bridge: A bridge whose blocks have ``hook_in`` and ``hook_out``.
        batch: One prompt without padding, as many times as it has tokens or a multiple of that.
    """
    generator = torch.Generator().manual_seed(0)
    # Row by row, another token is the one that is looked at.
    rows = torch.arange(len(batch.tokens), device=batch.device)
    looked_at = rows % batch.tokens.shape[1]
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    def enter(hidden: Tensor, hook: Any) -> Tensor:
        entered[hook.name] = noise(hidden).requires_grad_(True)
        return entered[hook.name]

    def leave(output: Any, hook: Any) -> None:
        states = (output[0] if isinstance(output, tuple) else output)[rows, looked_at]
        left[hook.name] = (states * noise(states)).sum()

    before = [f"blocks.{layer}.hook_in" for layer in range(len(bridge.blocks))]
    after = [RESIDUAL.format(layer) for layer in range(len(bridge.blocks))]
    with torch.enable_grad():
        _run(bridge, batch, [(name, enter) for name in before] + [(name, leave) for name in after])
        total = torch.stack([left[name] for name in after]).sum()
        gradients = torch.autograd.grad(total, [entered[name] for name in before])
    return torch.stack([each.double().flatten(2).norm(dim=2) for each in gradients])


def _tried(bridge: Any, change: Change, width: int) -> str | None:
    try:
        with undisturbed(bridge):
            if change is Change.MASK:
                return _mask_trouble(bridge, width)
            if change is Change.MOVED:
                return _position_trouble(bridge, width)
            return _attention_trouble(bridge, width, opened=change is Change.OPENED)
    except torch.OutOfMemoryError:
        raise
    except _ERRORS as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        given = "such position ids" if change is Change.MOVED else "a mask for each pair of tokens"
        alibi = change is not Change.MOVED and position_embedding(bridge) == "alibi"
        why = "its ALiBi distances are made from a mask for each token: " if alibi else ""
        return f"it cannot be run with {given} ({why}{type(error).__name__}: {first})"


def _mask_trouble(bridge: Any, width: int) -> str | None:
    batch = _batch(bridge, width)
    explicit = replace(batch, visible=batch.causally_visible())
    states = [RESIDUAL.format(layer) for layer in range(len(bridge.blocks))]
    difference = _difference(bridge, explicit, batch, states)
    if difference <= _tolerance(bridge):
        return None
    return (
        "with its own causal mask given explicitly it computes something else on "
        f"{width} tokens (relative difference {difference:.0e})"
    )


def _attention_trouble(bridge: Any, width: int, *, opened: bool) -> str | None:
    """What is wrong with a mask that only opens, or only closes, about half of the places."""
    batch = _batch(bridge, width, rows=width)
    causal = batch.causally_visible()
    generator = torch.Generator().manual_seed(0)
    half = (torch.rand(width, width, generator=generator) < 0.5).to(batch.device)
    own = torch.eye(width, dtype=torch.bool, device=batch.device)
    if opened:
        visible = causal | half
        visible[:, 0] = True
    else:
        visible = causal & (half | own)
        visible[:, -1] = own[-1]
    found = _influences(bridge, replace(batch, visible=visible))
    leaking = ((found > 0) & ~visible[0]).any(2).any(1).tolist()
    # Not at all: in float16 some gradients vanish.
    deaf = ~((found != 0) & visible[0] & ~causal[0]).any(2).any(1) & opened
    for layer in range(len(bridge.blocks)):
        parts = " and ".join(_mixers(bridge.blocks[layer]))
        if leaking[layer]:
            through = f", through its {parts}, where no mask acts" if parts else ""
            return f"at layer {layer} a token depends on one that it must not attend to{through}"
        if bool(deaf[layer]):
            own_mask = "the model adds a causal mask of its own"
            why = f"no mask acts in its {parts}" if parts else own_mask
            return (
                f"at layer {layer} a token does not depend on a later one that it may attend to: "
                f"{why}"
            )
    return None


def _position_trouble(bridge: Any, width: int) -> str | None:
    usual = _batch(bridge, width)
    # Repeated, left out and out of order.
    ids = torch.tensor([[0, 0, 3, 1, 1]], device=usual.device)[:, :width]
    moved = replace(usual, position_ids=ids)
    keys = [name for name in bridge.hook_dict if name.endswith(".mlp.out.hook_in")]
    if not _difference(bridge, moved, usual, keys) > _tolerance(bridge):
        kind = position_embedding(bridge)
        named = kind in ("learned", "rotary")
        what = "" if named else f": its position embedding is {kind}, neither learned nor rotary"
        return f"position ids do not change what it computes{what}"
    both = _batch(bridge, width, rows=2 * width)
    both.position_ids[width:] = ids
    usually, then = (_influences(bridge, both) > 0).split(width, dim=1)
    cut = (usually != then).any(2).any(1)
    if not bool(cut.any()):
        return None
    layer = int(cut.nonzero()[0])
    return f"at layer {layer} a token depends on other tokens than before if position ids repeat"


def _batch(bridge: Any, width: int, rows: int = 1) -> TokenBatch:
    return TokenBatch.of(some_tokens(bridge, 1, width).expand(rows, width))


def _difference(bridge: Any, one: TokenBatch, other: TokenBatch, names: Sequence[str]) -> float:
    """Largest relative difference of any token's activation at some hook points."""
    pairs = zip(_states(bridge, one, names), _states(bridge, other, names), strict=True)
    found = [
        (a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)
        for a, b in pairs
        if not torch.equal(a, b)
    ]
    # Where the weights of an edited model overflow, both are NaN.
    return max((float(each.nan_to_num(0).max()) for each in found), default=0.0)


@torch.no_grad()
def _states(bridge: Any, batch: TokenBatch, names: Sequence[str]) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(output: Any, hook: Any) -> None:  # noqa: ARG001
        seen.append(output[0] if isinstance(output, tuple) else output)

    _run(bridge, batch, [(name, keep) for name in names])
    return seen


def _run(bridge: Any, batch: TokenBatch, hooks: Sequence[tuple[str, Any]]) -> None:
    bridge.run_with_hooks(batch.tokens, fwd_hooks=list(hooks), **call_arguments(bridge, batch))


def _tolerance(bridge: Any) -> float:
    """As for replays: the same kernels run, so that what is the same differs in the last bits."""
    precision = torch.finfo(some_weight(bridge).dtype)
    return precision.eps / 8 if precision.bits < 32 else 1e-5


def _mixers(block: Any) -> list[str]:
    """Names of a block's composite parts beside attention and MLP: convolutions, state spaces."""
    return [
        name
        for name, part in block.submodules.items()
        if name not in ("attn", "mlp") and any(part.original_component.children())
    ]
