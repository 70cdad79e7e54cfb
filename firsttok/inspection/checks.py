"""What a model has to pass before it can be edited, and what was measured on the way."""

import contextlib
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from firsttok.errors import CheckpointError, FirsttokError, UnsupportedModelError, sentence_of
from firsttok.models import EditSite, Model, capture
from firsttok.prompts import Prompt, pad

__all__ = ["SiteCheck", "check_sites", "named_checks"]

logger = logging.getLogger(__name__)
_DENSE = "give a model with one dense MLP in each block, such as those of: firsttok models list"
_CHECKS = (
    ("tokenizer", "character offsets", None),
    ("TransformerBridge", "TransformerLens does not support", None),
    ("causal decoder", "is not a decoder", "inspect one, or see firsttok.capture_keys"),
    ("edit sites", "", _DENSE),
)
"""Name of each check, words of its complaint, and what to do where that does not say it."""


@dataclass(frozen=True, kw_only=True)
class SiteCheck:
    """One layer's edit site (see :class:`~firsttok.models.EditSite`), and how exactly it is one."""

    layer: int
    key_hook: str
    value_hook: str
    residual_hook: str
    d_mlp: int
    d_model: int
    in_out: bool
    bias: bool
    error: float
    """``||key @ W + b - output|| / ||output||`` over the tokens of some real text."""


@contextlib.contextmanager
def named_checks(name: str) -> Generator[None, None, None]:
    """Say which check failed where a model of that name is refused.

    Raises:
        UnsupportedModelError: If the model is refused, or a library stumbles over it.
        CheckpointError: If its files cannot be loaded. Other errors pass through as they are.
    """
    try:
        yield
    except UnsupportedModelError as error:
        check, _, advice = next(each for each in _CHECKS if each[1] in str(error))
        raise UnsupportedModelError(
            f"check of {name} failed ({check}): {error}" + (f"; {advice}" if advice else "")
        ) from None
    except CheckpointError as error:
        check = "tokenizer" if str(error).startswith("the tokenizer of") else "files"
        raise CheckpointError(f"check of {name} failed ({check}): {error}") from None
    except FirsttokError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        if sentence_of(error) is not None:
            raise
        # An architecture that nobody tried can fail anywhere in two big libraries.
        logger.debug("%s was refused", name, exc_info=True)
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise UnsupportedModelError(
            f"check of {name} failed (a first forward pass): {type(error).__name__}: {lines[0]}; "
            f"{_DENSE}"
        ) from error


def check_sites(model: Model, prompts: Sequence[Prompt]) -> tuple[SiteCheck, ...]:
    """Compare ``key @ W + b`` with what the MLPs put out, at every layer and token of prompts.

    ``load`` has compared them on six made-up tokens, and refuses a model on which they differ.
    """
    batch = pad(model, prompts)
    names = [name for site in model.sites for name in (site.key_hook, site.value_hook)]
    seen = capture(model, batch, names, stop_at_layer=None)
    real = batch.attention_mask.bool()
    return tuple(
        SiteCheck(
            layer=site.layer,
            key_hook=site.key_hook,
            value_hook=site.value_hook,
            residual_hook=site.residual_hook,
            d_mlp=site.d_mlp,
            d_model=site.d_model,
            in_out=site.in_out,
            bias=site.bias is not None,
            error=_error(site, seen[site.key_hook][real], seen[site.value_hook][real]),
        )
        for site in model.sites
    )


def _error(site: EditSite, keys: torch.Tensor, values: torch.Tensor) -> float:
    difference = (site.values_of(keys) - values).double().norm()
    return float(difference / values.double().norm().clamp_min(torch.finfo(torch.float64).tiny))
