"""What changes a model's numbers and is no part of its identity: hooks, modes, other modules."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from firsttok.engine.fusibility import hooks_of

__all__ = ["Baseline", "has_dropout"]


@dataclass(frozen=True, eq=False)
class Baseline:
    """The modules of a bridge as it was loaded, with the hooks and the forwards of their own."""

    modules: tuple[Any, ...]
    """Every module, once."""
    hooks: tuple[tuple[Any, ...], ...]
    """The hooks on each, those that libraries leave for themselves left out."""
    forwards: tuple[Any, ...]
    """What was put in place of each one's ``forward``, or None."""

    @staticmethod
    def of(bridge: Any) -> "Baseline":
        """Look at a bridge."""
        modules = tuple(bridge.modules())
        return Baseline(
            modules,
            tuple(hooks_of(module) for module in modules),
            tuple(vars(module).get("forward") for module in modules),
        )

    def disturbance(self, bridge: Any) -> str | None:
        """What makes a pass differ from one of the model as loaded, or None.

        Args:
            bridge: The bridge that this was made of.
        """
        return _mode() or self._difference(bridge)

    def _difference(self, bridge: Any) -> str | None:
        now = tuple(bridge.modules())
        if len(now) != len(self.modules) or any(
            one is not other for one, other in zip(now, self.modules, strict=True)
        ):
            return "a module was replaced, put in or taken out"
        for module, hooks, forward in zip(now, self.hooks, self.forwards, strict=True):
            if module.training:
                return "the model is in training mode"
            if vars(module).get("forward") is not forward:
                return f"the forward of a {type(module).__name__} was replaced"
            if hooks_of(module) != hooks:
                return f"a hook is on {getattr(module, 'name', None) or type(module).__name__}"
        return None


def has_dropout(bridge: Any) -> bool:
    """Whether training mode makes passes random."""
    config: dict[str, Any] = bridge.original_model.config.to_dict()
    rates = [value for name, value in config.items() if "drop" in name]
    modules = [module.p for module in bridge.modules() if isinstance(module, torch.nn.Dropout)]
    return any(isinstance(rate, int | float) and rate > 0 for rate in (*rates, *modules))


def _mode() -> str | None:
    modes = torch.overrides._get_current_function_mode_stack()
    # ``torch.set_default_device`` is one, and says only where new tensors are made.
    hooks = torch.nn.modules.module
    found = {
        "autocast is on": any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
        "PyTorch's default type is not float32": torch.get_default_dtype() is not torch.float32,
        "products are in reduced precision": torch.get_float32_matmul_precision() != "highest",
        "a TorchFunctionMode is on": any(
            type(mode).__module__ != "torch.utils._device" for mode in modes
        ),
        "a TorchDispatchMode is on": bool(_get_current_dispatch_mode_stack()),
        "a hook is on all modules": bool(
            hooks._global_forward_hooks or hooks._global_forward_pre_hooks
        ),
    }
    return next((reason for reason, holds in found.items() if holds), None)
