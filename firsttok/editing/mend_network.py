"""The network of MEND: what it makes of a gradient's factors, and the file that holds it.

The gradient of a linear map's weight is a sum over tokens of ``u delta^T``: u is what the map is
given, delta the gradient at what it puts out. A small network for each shape of weight takes both
factors of a token, standardised, and gives those of the change (Mitchell et al. 2022, Section 3).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor
from typing_extensions import TypedDict

from firsttok.arguments import taken
from firsttok.digests import tensors_hash
from firsttok.editing.mend_tensors import (
    BLOCK,
    STORED,
    Shape,
    blocks_in,
    check_numbers,
    check_shapes,
    is_of_block,
    named,
    released_tensors,
    start_of,
)
from firsttok.errors import BadInputError
from firsttok.models import Model, Place
from firsttok.storage import content_hash, read_safetensors, write_tensors

__all__ = ["MendBlock", "MendNetwork", "MendRecord", "MendTransform", "RowStatistics"]

_TINY = 1e-7
Rows = Float[Tensor, "token width"]

_open = with_config(ConfigDict(extra="allow", strict=True))


@_open
class MendRecord(TypedDict, total=False):
    """Where a network is from."""

    model: dict[str, Any]
    """The model that it was trained on, as ``Model.record`` tells it."""
    training: dict[str, Any]
    """Command, settings, steps and what was measured on the validation edits."""


@_open
class _SavedRecord(MendRecord):
    """What the file of a network says besides the tensors."""

    places: list[tuple[str, int, str]]
    """Stack, layer and port of each matrix, in the network's order."""
    shapes: list[tuple[int, int]]
    """``d_in`` and ``d_out`` of each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowStatistics:
    """Mean and spread of rows ``[u; delta]``, coordinate by coordinate, over all tokens seen.

    As released, sums of squared deviations are kept, and the variance is over one token less.
    """

    tokens: int
    """Tokens seen."""
    mean: Float[Tensor, "width"]
    """Mean of each coordinate."""
    squares: Float[Tensor, "width"]
    """Sum of squared deviations from that mean."""

    @staticmethod
    def none(width: int) -> "RowStatistics":
        """Those of no token."""
        return RowStatistics(tokens=0, mean=torch.zeros(width), squares=torch.zeros(width))

    def with_rows(self, rows: Rows) -> "RowStatistics":
        """Those after more tokens; the order of tokens does not matter.

        Args:
            rows: The tokens' rows.
        """
        if not len(rows):
            return self
        tokens, wide = self.tokens + len(rows), rows.double()
        mean, own = self.mean.to(wide), wide.mean(0)
        squares = self.squares.to(wide) + ((wide - own) ** 2).sum(0)
        squares = squares + (own - mean) ** 2 * (self.tokens * len(rows) / tokens)
        mean = mean + (own - mean) * (len(rows) / tokens)
        return RowStatistics(tokens=tokens, mean=mean, squares=squares)

    def standardised(self, rows: Rows) -> Rows:
        """``(row - mean) / (std + 1e-7)``, in the rows' type.

        Args:
            rows: The tokens' rows.

        Raises:
            BadInputError: If fewer than two tokens were seen, so that there is no variance.
        """
        if self.tokens < 2:
            raise BadInputError(
                f"MEND has seen {self.tokens} token with a gradient, and a variance needs two; "
                "take a longer prompt or target, or keep the network's own statistics"
            )
        std = (self.squares.to(rows) / (self.tokens - 1)).sqrt()
        return (rows - self.mean.to(rows)) / (std + _TINY)


@dataclass(frozen=True, kw_only=True, eq=False)
class MendBlock:
    """One residual block of low rank, ``x + max(0, scale * (U V x + b) + shift)``."""

    up: Float[Tensor, "width rank"]
    """U; zero at first, so that the block passes on what it is given."""
    down: Float[Tensor, "rank width"]
    """V."""
    bias: Float[Tensor, "width"]
    """b."""
    scale: Float[Tensor, "mode width"]
    """Scale of each matrix that shares the network."""
    shift: Float[Tensor, "mode width"]
    """Shift of each matrix that shares the network."""

    def __call__(self, rows: Rows, mode: int) -> Rows:
        """What the block makes of some tokens' rows.

        Args:
            rows: The rows.
            mode: Which of the matrices they are of.
        """
        before = rows @ self.down.to(rows).T @ self.up.to(rows).T + self.bias.to(rows)
        before = before * self.scale[mode].to(rows) + self.shift[mode].to(rows)
        # A clamp passes the gradient on at zero, where everything is at first; relu does not.
        return rows + before.clamp(min=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class MendTransform:
    """The network of all matrices of one shape."""

    blocks: tuple[MendBlock, ...]
    """Its blocks, in order."""
    statistics: RowStatistics
    """What rows are standardised by, as the training left it."""

    def __call__(self, rows: Rows, mode: int, statistics: RowStatistics) -> Rows:
        """Rows ``[u~; delta~]`` of the change; they are not de-standardised.

        Args:
            rows: Rows ``[u; delta]``.
            mode: Which of the matrices they are of.
            statistics: What they are standardised by.
        """
        found = statistics.standardised(rows)
        for block in self.blocks:
            found = block(found, mode)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class MendNetwork:
    """MEND's networks, one for each shape of weight, and the learned rate of each matrix.

    Raises:
        BadInputError: If matrices, rates and networks do not go together.
    """

    places: tuple[Place, ...]
    """The matrices that it changes, in its own order: that of the rates, of the modes, and of the
    statistics that are restarted."""
    shapes: tuple[Shape, ...]
    """``d_in`` and ``d_out`` of each."""
    rates: Float[Tensor, "matrix"]
    """What the change of each is multiplied by before it is added."""
    transforms: Mapping[Shape, MendTransform]
    """The networks, by the shape of their matrices."""
    record: MendRecord = field(default_factory=MendRecord)
    """Where it is from."""

    def __post_init__(self) -> None:
        """Check that all belongs together."""
        for shape in dict.fromkeys(self.shapes):
            if shape not in self.transforms or not self.transforms[shape].blocks:
                raise BadInputError(f"the MEND network has no part for matrices {list(shape)}")
        check_shapes(self.tensors(), self.places, self.shapes)

    @staticmethod
    def initial(
        model: Model,
        places: Sequence[Place],
        *,
        rank: int = 1920,
        blocks: int = 2,
        rate: float = 1e-4,
        seed: int = 0,
    ) -> "MendNetwork":
        """The network before training: it passes on the standardised factors as they are.

        Args:
            model: The model.
            places: The matrices.
            rank: Rank of a block, at most the width of its rows.
            blocks: Blocks of each network.
            rate: The rate that every matrix begins with.
            seed: Seed of V.

        Raises:
            LayerOutOfRangeError: If there is no such layer.
            UnsupportedModelError: If an MLP has no such matrix.
        """
        generator = torch.Generator().manual_seed(seed)
        sizes = [tuple(model.site_at(place).matrix.shape) for place in places]
        shapes = tuple((int(d_in), int(d_out)) for d_in, d_out in sizes)

        def block(modes: int, width: int) -> MendBlock:
            inner = min(rank, width)
            return MendBlock(
                up=torch.zeros(width, inner),
                down=torch.randn(inner, width, generator=generator),
                bias=torch.zeros(width),
                scale=torch.ones(modes, width),
                shift=torch.zeros(modes, width),
            )

        transforms = {
            shape: MendTransform(
                blocks=tuple(block(shapes.count(shape), sum(shape)) for _ in range(blocks)),
                statistics=RowStatistics.none(sum(shape)),
            )
            for shape in dict.fromkeys(shapes)
        }
        return MendNetwork(
            places=tuple(places),
            shapes=shapes,
            rates=torch.full((len(places),), rate),
            transforms=transforms,
            record={"model": model.record()},
        )

    @property
    def statistics(self) -> dict[Shape, RowStatistics]:
        """What the training left, by shape."""
        return {shape: each.statistics for shape, each in self.transforms.items()}

    def factors(
        self, number: int, rows: Rows, statistics: RowStatistics
    ) -> tuple[Float[Tensor, "d_in token"], Float[Tensor, "token d_out"]]:
        """Left and right factor of the change of one matrix, a column and a row for each token.

        The product of both is added to the weight. The released code does so, too, while the
        paper's algorithm subtracts: the rates are learned and take either sign.

        Args:
            number: Which of :attr:`places`.
            rows: Rows ``[u; delta]`` of the tokens that have a gradient.
            statistics: What they are standardised by.
        """
        shape = self.shapes[number]
        mode = self.shapes[:number].count(shape)
        made = self.transforms[shape](rows, mode, statistics)
        left, right = made.split(list(shape), dim=1)
        return left.T, self.rates[number].to(right) * right

    def check(self, model: Model) -> None:
        """Refuse a model that the network does not belong to.

        Args:
            model: The model, or a view of it.

        Raises:
            BadInputError: If it was trained on another model, or the model has no such matrix, or
                one of another shape.
        """
        made = self.record.get("model", {})
        known = made.get("fingerprint", model.fingerprint)
        if made.get("source", model.source) != model.source or known != model.fingerprint:
            raise BadInputError(
                f"the MEND network was trained on {made.get('name')} ({made.get('source')}), and "
                f"this is {model.name} ({model.source}), with other weights or from another place; "
                "train one with: firsttok train-mend"
            )
        for place, shape in zip(self.places, self.shapes, strict=True):
            if place not in model.weights.sites:
                raise BadInputError(
                    f"the MEND network changes a matrix at {place}, which {model.name} does not "
                    "have; train one with: firsttok train-mend"
                )
            found = tuple(model.site_at(place).matrix.shape)
            if found != shape:
                raise BadInputError(
                    f"the MEND network changes matrices {list(shape)} at {place}, and that of "
                    f"{model.name} is {list(found)}; train one with: firsttok train-mend"
                )

    @property
    def content_hash(self) -> str:
        """SHA-256 of what it computes."""
        plain = {name: each.cpu().contiguous() for name, each in self.tensors().items()}
        return content_hash([list(map(list, self.places)), tensors_hash(plain)])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as its file holds them: ``rates``, ``1536x576.0.up``, and so on."""
        found = {"rates": self.rates}
        for shape, transform in self.transforms.items():
            about = transform.statistics
            stored = (about.mean, about.squares, torch.tensor(float(about.tokens)))
            own = dict(zip(STORED, stored, strict=True))
            for number, block in enumerate(transform.blocks):
                own |= {f"{number}.{name}": getattr(block, name) for name in BLOCK}
            found |= {f"{start_of(shape)}.{name}": each for name, each in own.items()}
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "MendNetwork":
        """The same network with other numbers, named as :meth:`tensors` does.

        Args:
            tensors: The numbers.

        Raises:
            BadInputError: If one is missing, or does not go with the others.
        """
        return replace(
            self,
            rates=named(tensors, "rates"),
            transforms={
                shape: _transform(tensors, shape, len(each.blocks))
                for shape, each in self.transforms.items()
            },
        )

    def rounded(self, dtype: torch.dtype = torch.float16) -> "MendNetwork":
        """The network as :meth:`save` stores it in that type, and :meth:`load` reads it.

        Args:
            dtype: Type of the blocks.
        """
        own = self.tensors()
        return self.with_tensors(
            {name: each.to(own[name]).detach().cpu() for name, each in self._stored(dtype).items()}
        )

    def _stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            name: each.to(dtype) if is_of_block(name) else each
            for name, each in self.tensors().items()
        }

    def with_record(
        self, *, model: Mapping[str, Any], training: Mapping[str, Any]
    ) -> "MendNetwork":
        """The same network with a record of how it was made.

        Args:
            model: The model that it was trained on, as ``Model.record`` tells it.
            training: Command, settings, steps and what was measured.
        """
        return replace(self, record={"model": dict(model), "training": dict(training)})

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write it as safetensors, with its record as metadata.

        Args:
            path: The file.
            dtype: Type of the blocks; rates and statistics stay as they are.

        Raises:
            CacheError: If the file cannot be written.
        """
        record = {**self.record, "places": list(self.places), "shapes": list(self.shapes)}
        write_tensors(Path(path), self._stored(dtype), {"firsttok_mend": json.dumps(record)})

    @staticmethod
    @taken
    def load(path: str | Path) -> "MendNetwork":
        """Read what :meth:`save` wrote; numbers are in float32, statistics as they were written.

        Args:
            path: The file.

        Raises:
            BadInputError: If it is missing or damaged, or holds no whole MEND network of finite
                numbers.
        """
        path = Path(path)
        tensors, metadata = read_safetensors(path, "a MEND network")
        if "firsttok_mend" not in metadata:
            raise BadInputError(
                f"{path} holds no MEND network that firsttok wrote; convert a released one with "
                "MendNetwork.from_released, or train one with: firsttok train-mend"
            )
        try:
            record: _SavedRecord = _records().validate_json(metadata["firsttok_mend"])
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInputError(
                f"{path}: the MEND network's record has an unusable "
                f"{'.'.join(map(str, first['loc'])) or 'content'} ({first['msg']}); train it again"
            ) from None
        try:
            return _built(
                tensors,
                tuple(Place(*place) for place in record["places"]),
                tuple(record["shapes"]),
                record,
            )
        except BadInputError as error:
            raise BadInputError(f"{path}: {error}") from None

    @staticmethod
    @taken
    def from_released(
        tensors: Mapping[str, Tensor],
        places: Sequence[Place],
        *,
        applied: Sequence[Place] | None = None,
    ) -> "MendNetwork":
        """Convert the released code's parameters, named as its state dict does.

        These are ``edit_lrs`` and, for each shape, ``mend.(d_in, d_out).u_mean``,
        ``mend.(d_in, d_out).mlp.layers.0.u`` and so on; with one shape the prefix ``network.`` does
        for all. Nothing is unpickled: write an archive's tensors as safetensors first.

        Args:
            tensors: The tensors.
            places: The matrices in the order of ``inner_params``.
            applied: The matrices in the order in which the model lists its parameters, in which the
                released code applies the rates that it stores by ``inner_params`` (for GPT-2-XL the
                two orders differ, so that rates were trained, and are used, for each other's
                matrix); None where the orders are the same.

        Raises:
            BadInputError: If a tensor is missing, does not go with the others, or is not finite; or
                if ``applied`` names other matrices.
        """
        renamed, shapes = released_tensors(tensors, places, applied or places)
        return _built(renamed, tuple(places), shapes, MendRecord())


def _transform(tensors: Mapping[str, Tensor], shape: Shape, count: int) -> MendTransform:
    start = start_of(shape)
    mean, squares, tokens = (named(tensors, f"{start}.{name}") for name in STORED)
    blocks = [
        MendBlock(**{name: named(tensors, f"{start}.{number}.{name}") for name in BLOCK})
        for number in range(count)
    ]
    statistics = RowStatistics(tokens=round(float(tokens)), mean=mean, squares=squares)
    return MendTransform(blocks=tuple(blocks), statistics=statistics)


def _built(
    tensors: Mapping[str, Tensor],
    places: tuple[Place, ...],
    shapes: tuple[Shape, ...],
    record: MendRecord,
) -> MendNetwork:
    """The network that somebody wrote, once all of it is known to be right."""
    # A number of tokens may stand in a vector of one, as released.
    given = {
        name: each.reshape(()) if name.endswith(".tokens") and each.numel() == 1 else each
        for name, each in tensors.items()
    }
    check_shapes(given, places, shapes)
    check_numbers(given)
    wide = {name: each.float() if is_of_block(name) else each for name, each in given.items()}
    return MendNetwork(
        places=places,
        shapes=shapes,
        rates=wide["rates"],
        transforms={
            shape: _transform(wide, shape, blocks_in(wide, shape))
            for shape in dict.fromkeys(shapes)
        },
        record=record,
    )


@cache
def _records() -> Any:
    # Made on first use, as that of edits.
    return TypeAdapter(_SavedRecord)
