"""What the options of commands and scripts may be, checked before anything is computed."""

import argparse
import re
from typing import Any

from firsttok.arguments import LARGEST, seed_number
from firsttok.errors import BadInputError
from firsttok.file_options import check_places, option_of
from firsttok.hyperparameters import Hyperparameters

__all__ = ["HYPERPARAMETERS", "check_device_name", "check_options"]

HYPERPARAMETERS = {
    "steps": "steps",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "clamp": "clamp",
    "kl": "kl",
}
"""Fields of :class:`Hyperparameters` by the option that sets them."""
_COUNTS = (
    "actors",
    "batch",
    "chunk",
    "collapse",
    "count",
    "cpus_per_actor",
    "edits",
    "every",
    "jobs",
    "ft_steps",
    "limit",
    "normal",
    "patience",
    "rank",
    "tokens",
    "validation",
    "windows",
)
_POSITIVE = (
    *("sql_seconds", "temperature", "threshold"),
    *("mom2_weight", "nullspace_threshold", "l2", "eps", "ft_lr"),
)
_TEXTS = ("subject", "target", "template", "true")
"""Options whose text is a fact's, which says itself what may be empty."""


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that cannot be right whatever the model; what is not given is passed over.

    Raises:
        BadInputError: If a number is outside its range, or nothing can be written where it is to
            be; names the option.
        CacheError: If there can be no such file as an option names.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name, value in given.items():
        if name in _COUNTS and value < 1:
            raise BadInputError(f"{option_of(name)} is {value}; give at least 1")
        values: list[Any] = value if isinstance(value, list) else [value]
        if name not in _TEXTS and any(isinstance(v, str) and not v.strip() for v in values):
            raise BadInputError(f"{option_of(name)} is empty; give a value, or leave it out")
    if "seed" in given:
        seed_number(given["seed"], "--seed")
    for name in ("layer", "layers"):
        layers = given.get(name, 0)
        for layer in layers if isinstance(layers, list) else [layers]:
            if layer < 0:
                raise BadInputError(
                    f"--{name} is {layer}, but a model has no layer {layer}; count them from 0"
                )
    for name in _POSITIVE:
        if not 0 < given.get(name, 1.0) <= LARGEST:
            raise BadInputError(
                f"{option_of(name)} is {given[name]}; give a number above 0, and no larger than "
                f"{LARGEST:g}"
            )
    if not 0 < given.get("top_p", 1.0) <= 1:
        raise BadInputError(f"--top-p is {given['top_p']}; give a number above 0, and at most 1")
    Hyperparameters(**{f: given[name] for name, f in HYPERPARAMETERS.items() if name in given})
    if "device" in given:
        check_device_name(given["device"])
    methods = {"c-rome" if name == "r-rome" else name for name in given.get("method", ())}
    if "save" in given and len(methods) > 1:
        raise BadInputError(f"--save takes one method, not {len(methods)}; run it for each")
    check_places(given)


def check_device_name(device: str) -> None:
    """Refuse a device that is not supported.

    Raises:
        BadInputError: If it is neither ``cpu`` nor ``cuda`` nor ``cuda:N``.
    """
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,2}))?", device):
        raise BadInputError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
