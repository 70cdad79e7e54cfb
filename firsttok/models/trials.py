"""Whether a model obeys an intervention, found out on a few tokens before its first use.

A mask or a position id that a model ignores would pass for one without effect, and a token that is
reached past the mask for one that attention does not explain. So each kind of change is tried.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.models.blocks import undisturbed
from firsttok.models.forward import call_arguments
from firsttok.tensors import TokenBatch

if TYPE_CHECKING:
    from firsttok.models.model import Model

__all__ = ["Change", "Trials", "changes_of", "influences"]

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

    def obstacle(self, model: "Model", usual: TokenBatch, changed: TokenBatch) -> str | None:
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
            model: The model; its interventions are left out.
            usual: A batch as it was.
            changed: The same batch after the interventions.

        Returns:
            A clause that gives the reason; None if the model obeys.
        """
        for change in changes_of(usual, changed):
            reason = self._reason(model, change, usual.tokens.shape[1])
            if reason is not None:
                return reason
        return None

    def _reason(self, model: "Model", change: Change, width: int) -> str | None:
        window = model.attention_window or model.max_tokens
        if change is not Change.MASK:
            return self._kept(model, change, min(_TOKENS, window))
        longest = min(model.max_tokens, window)
        rounded = min(max(8, 1 << (width - 1).bit_length()), longest)
        reason = self._kept(model, change, rounded)
        # A window that ends between the two widths does not concern this batch.
        return self._kept(model, change, width) if reason and rounded > width else reason

    def _kept(self, model: "Model", change: Change, width: int) -> str | None:
        config: Any = model.weights.bridge.original_model.config
        attention = getattr(config, "_attn_implementation", None)
        key = (change, width, model.dtype, model.device, attention)
        if key not in self.found:
            self.found[key] = _tried(model, change, width)
        return self.found[key]


def influences(model: "Model", batch: TokenBatch) -> Float[Tensor, "layer row key"]:
    """How far each token behind a block depends on each token before that block alone.

    It is the norm of the gradient of a random projection of the one by the other, so a token
    without influence has exactly 0, and one with a small weight has not. Every block is given
    noise: what is measured is the path, not what a trained model makes of it.

    Args:
        model: A model whose blocks have ``hook_in`` and ``hook_out``.
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

    before = [f"blocks.{layer}.hook_in" for layer in range(model.n_layers)]
    behind = [f"blocks.{layer}.hook_out" for layer in range(model.n_layers)]
    with torch.enable_grad():
        _run(model, batch, [(name, enter) for name in before] + [(name, leave) for name in behind])
        total = torch.stack([left[name] for name in behind]).sum()
        gradients = torch.autograd.grad(total, [entered[name] for name in before])
    return torch.stack([each.double().flatten(2).norm(dim=2) for each in gradients])


def _tried(model: "Model", change: Change, width: int) -> str | None:
    try:
        with model.running() as bridge, undisturbed(bridge):
            if change is Change.MASK:
                return _mask_trouble(model, width)
            if change is Change.MOVED:
                return _position_trouble(model, width)
            return _attention_trouble(model, width, opened=change is Change.OPENED)
    except torch.OutOfMemoryError:
        raise
    except _ERRORS as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        given = "such position ids" if change is Change.MOVED else "a mask for each pair of tokens"
        alibi = change is not Change.MOVED and model.position_embedding == "alibi"
        why = "its ALiBi distances are made from a mask for each token: " if alibi else ""
        return f"it cannot be run with {given} ({why}{type(error).__name__}: {first})"


def _mask_trouble(model: "Model", width: int) -> str | None:
    batch = _batch(model, width)
    explicit = replace(batch, visible=batch.causally_visible())
    difference = _difference(model, explicit, batch, [site.residual_hook for site in model.sites])
    if difference <= _tolerance(model):
        return None
    return (
        "with its own causal mask given explicitly it computes something else on "
        f"{width} tokens (relative difference {difference:.0e})"
    )


def _attention_trouble(model: "Model", width: int, *, opened: bool) -> str | None:
    """What is wrong with a mask that only opens, or only closes, about half of the places."""
    batch = _batch(model, width, rows=width)
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
    found = influences(model, replace(batch, visible=visible))
    leaking = ((found > 0) & ~visible[0]).any(2).any(1).tolist()
    # Not at all: in float16 some gradients vanish.
    deaf = ~((found != 0) & visible[0] & ~causal[0]).any(2).any(1) & opened
    for layer in range(model.n_layers):
        parts = " and ".join(_mixers(model.weights.bridge.blocks[layer]))
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


def _position_trouble(model: "Model", width: int) -> str | None:
    usual = _batch(model, width)
    # Repeated, left out and out of order.
    ids = torch.tensor([[0, 0, 3, 1, 1]], device=usual.device)[:, :width]
    moved = replace(usual, position_ids=ids)
    keys = [site.key_hook for site in model.sites]
    if not _difference(model, moved, usual, keys) > _tolerance(model):
        kind = model.position_embedding
        named = kind in ("learned", "rotary")
        what = "" if named else f": its position embedding is {kind}, neither learned nor rotary"
        return f"position ids do not change what it computes{what}"
    both = _batch(model, width, rows=2 * width)
    both.position_ids[width:] = ids
    usually, then = (influences(model, both) > 0).split(width, dim=1)
    cut = (usually != then).any(2).any(1)
    if not bool(cut.any()):
        return None
    layer = int(cut.nonzero()[0])
    return f"at layer {layer} a token depends on other tokens than before if position ids repeat"


def _batch(model: "Model", width: int, rows: int = 1) -> TokenBatch:
    device = model.device
    tokens = (torch.arange(width, device=device) * 7 + 11) % int(model.weights.bridge.cfg.d_vocab)
    tokens = tokens.expand(rows, width)
    ones = torch.ones_like(tokens)
    return TokenBatch(
        tokens=tokens,
        attention_mask=ones,
        position_ids=ones.cumsum(1) - 1,
        starts=torch.zeros(rows, dtype=torch.long, device=device),
    )


def _difference(model: "Model", one: TokenBatch, other: TokenBatch, names: Sequence[str]) -> float:
    """Largest relative difference of any token's activation at some hook points."""
    pairs = zip(_states(model, one, names), _states(model, other, names), strict=True)
    found = [
        (a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)
        for a, b in pairs
        if not torch.equal(a, b)
    ]
    # Where the weights of an edited model overflow, both are NaN.
    return max((float(each.nan_to_num(0).max()) for each in found), default=0.0)


@torch.no_grad()
def _states(model: "Model", batch: TokenBatch, names: Sequence[str]) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(output: Any, hook: Any) -> None:  # noqa: ARG001
        seen.append(output[0] if isinstance(output, tuple) else output)

    _run(model, batch, [(name, keep) for name in names])
    return seen


def _run(model: "Model", batch: TokenBatch, hooks: Sequence[tuple[str, Any]]) -> None:
    bridge: Any = model.weights.bridge
    bridge.run_with_hooks(batch.tokens, fwd_hooks=list(hooks), **call_arguments(model, batch))


def _tolerance(model: "Model") -> float:
    """As for replays: the same kernels run, so that what is the same differs in the last bits."""
    eps = torch.finfo(model.dtype).eps
    return eps / 8 if torch.finfo(model.dtype).bits < 32 else 1e-5


def _mixers(block: Any) -> list[str]:
    """Names of a block's composite parts beside attention and MLP: convolutions, state spaces."""
    return [
        name
        for name, part in block.submodules.items()
        if name not in ("attn", "mlp") and any(part.original_component.children())
    ]
