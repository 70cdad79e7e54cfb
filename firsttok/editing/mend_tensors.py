"""The tensors of a MEND network by name: which there are, and whether those of a file are right.

A file of ours and a released network end as one mapping: ``rates``; ``1536x576.mean``, ``.squares``
and ``.tokens`` of the rows of a shape; and ``1536x576.0.up`` and so on of its blocks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from firsttok.errors import BadInputError
from firsttok.models import PORTS, Place

__all__ = [
    "BLOCK",
    "STORED",
    "Shape",
    "blocks_in",
    "check_numbers",
    "check_shapes",
    "is_of_block",
    "named",
    "released_tensors",
    "start_of",
]

BLOCK = ("up", "down", "bias", "scale", "shift")
"""Tensors of a block: its U, V and b, and a scale and shift for each matrix."""
STORED = ("mean", "squares", "tokens")
"""Statistics of the rows of a shape."""
Shape = tuple[int, int]
"""``d_in`` and ``d_out`` of a matrix."""
_RELEASED = ("u", "v", "bias", "mode_scale.weight", "mode_shift.weight")
"""The released code's names of a block's tensors."""
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TOLD = 3
"""Tensors that do not belong to a network and are told of; there may be thousands."""


def released_tensors(
    tensors: Mapping[str, Tensor], places: Sequence[Place], applied: Sequence[Place]
) -> tuple[dict[str, Tensor], tuple[Shape, ...]]:
    """What a released state dict holds, named as ours, and the shape of each matrix.

    Args:
        tensors: The state dict; what is not of MEND in it is passed over.
        places: The matrices in the order of the rates.
        applied: The matrices in the order in which the rates are applied.

    Raises:
        BadInputError: If a tensor is missing, or the matrices are others.
    """
    if sorted(applied) != sorted(places):
        raise BadInputError(
            "applied names other matrices than places; give the same ones, in the order in which "
            "the rates are applied"
        )
    last = {name.rpartition(".")[2]: name for name in tensors}
    rates = named(tensors, last.get("edit_lrs", "edit_lrs")).flatten()
    if len(rates) != len(places):
        raise BadInputError(
            f"the released network has {len(rates)} rates, and {len(places)} matrices are given; "
            "name its matrices, in the order of inner_params"
        )
    renamed = {"rates": rates[[list(applied).index(place) for place in places]]}
    found: list[Shape] = []
    for name in sorted(tensors):
        if name.rpartition(".")[2] == "u_mean":
            shape, own = _renamed(tensors, name.removesuffix("u_mean"))
            found.append(shape)
            renamed |= own
    return renamed, _shapes_of(found, places)


def _shapes_of(found: Sequence[Shape], places: Sequence[Place]) -> tuple[Shape, ...]:
    """The shape of each matrix of a released network, which names the shapes alone.

    The second matrix of an MLP narrows, the others widen.
    """
    narrow = {shape[0] > shape[1]: shape for shape in found}
    if not found or len(narrow) < len(found):
        raise BadInputError(
            f"the released network is for matrices {list(map(list, found))}; give one that has a "
            "part (with u_mean) for all, or one for those that narrow and one for those that widen"
        )
    if len(found) == 1:
        return (found[0],) * len(places)
    return tuple(narrow[place.port == PORTS[-1]] for place in places)


def _renamed(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Shape, dict[str, Tensor]]:
    """One of the released networks: the shape it is for, and its tensors named as ours."""
    sides = {name: named(tensors, prefix + name) for name in ("u_mean", "v_mean", "u_s", "v_s")}
    for name, side in sides.items():
        if side.dim() != 1:
            raise BadInputError(
                f"the released network's tensor {prefix}{name} is of shape {list(side.shape)}, and "
                "is to be a vector; give its state dict as it was released"
            )
    shape = (len(sides["u_mean"]), len(sides["v_mean"]))
    start = start_of(shape)
    found = {
        f"{start}.mean": torch.cat([sides["u_mean"], sides["v_mean"]]),
        f"{start}.squares": torch.cat([sides["u_s"], sides["v_s"]]),
        f"{start}.tokens": named(tensors, f"{prefix}k"),
    }
    layers = f"{prefix}mlp.layers."
    count = len({n.removeprefix(layers).split(".")[0] for n in tensors if n.startswith(layers)})
    for number in range(count):
        found |= {
            f"{start}.{number}.{ours}": named(tensors, f"{layers}{number}.{theirs}")
            for ours, theirs in zip(BLOCK, _RELEASED, strict=True)
        }
    return shape, found


def start_of(shape: Shape) -> str:
    """What the names of a shape's tensors begin with."""
    return f"{shape[0]}x{shape[1]}"


def is_of_block(name: str) -> bool:
    """Whether it is one of a block's; the others keep the type that they have."""
    return name.rpartition(".")[2] in BLOCK


def named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name; none is a BadInputError."""
    if name not in tensors:
        raise BadInputError(f"the MEND network lacks its tensor {name}; give the whole network")
    return tensors[name]


def blocks_in(tensors: Mapping[str, Tensor], shape: Shape) -> int:
    """How many blocks a shape's network has, by its tensors' names; one at least."""
    start = f"{start_of(shape)}."
    return max(1, sum(name.startswith(start) and name.endswith(".up") for name in tensors))


def check_shapes(
    tensors: Mapping[str, Tensor], places: Sequence[Place], shapes: Sequence[Shape]
) -> None:
    """Check that each matrix is named once, and that no tensor is missing, misshapen or one more.

    Raises:
        BadInputError: If one is.
    """
    count = len(places)
    if not count or len(set(places)) != count or len(shapes) != count:
        raise BadInputError(
            f"the MEND network names {count} matrices, {len(set(places))} of them different, and "
            f"{len(shapes)} shapes; it needs one matrix at least, each once and with its shape"
        )
    wanted: dict[str, tuple[int, ...]] = {"rates": (count,)}
    for shape in dict.fromkeys(shapes):
        start, width, modes = start_of(shape), sum(shape), shapes.count(shape)
        wanted |= {f"{start}.mean": (width,), f"{start}.squares": (width,), f"{start}.tokens": ()}
        for number in range(blocks_in(tensors, shape)):
            block = f"{start}.{number}."
            # Of what rank a block is, it says itself; none is of rank 0.
            rank = max([1, *named(tensors, f"{block}down").shape[:1]])
            wanted |= {f"{block}down": (rank, width), f"{block}up": (width, rank)}
            wanted |= {f"{block}bias": (width,)}
            wanted |= {f"{block}{name}": (modes, width) for name in ("scale", "shift")}
    for name, shape in wanted.items():
        own = tuple(named(tensors, name).shape)
        if own != shape:
            raise BadInputError(
                f"the MEND network's tensor {name} is of shape {list(own)}, and its matrices take "
                f"one of {list(shape)}; give the network that belongs to them"
            )
    if others := sorted(set(tensors) - set(wanted)):
        more = "" if len(others) <= _TOLD else f" and {len(others) - _TOLD} more"
        raise BadInputError(
            f"the MEND network has tensors that do not belong to its matrices "
            f"({', '.join(others[:_TOLD])}{more}); leave them out"
        )


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Check that all are finite floating-point numbers, and that statistics can be ones.

    Raises:
        BadInputError: If one is none.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise BadInputError(
                f"the MEND network's tensor {name} is of type {tensor.dtype}; give float16, "
                "bfloat16, float32 or float64"
            )
        # In the type in which it is used: a float64 may be too large for it.
        used = tensor.float()
        kind = name.rpartition(".")[2]
        if not bool(torch.isfinite(used).all()):
            raise BadInputError(f"the MEND network's tensor {name} is not finite; train it again")
        if kind in ("squares", "tokens") and bool((used < 0).any()):
            raise BadInputError(f"the MEND network's tensor {name} is below 0; train it again")
        if kind == "tokens" and not float(tensor).is_integer():
            raise BadInputError(
                f"the MEND network's tensor {name} is {float(tensor)}, which is no number of "
                "tokens; train it again"
            )
