"""How concentrated first tokens are, layer by layer (Equation 4 and Figure 8), and why.

Beside the mean distance to the centroid, one pass tells what comes with it: the norm of the
residual stream, the dimension that carries it, the attention that others pay to the first token,
and the effective rank of the keys.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from firsttok.arguments import taken
from firsttok.errors import BadInputError, NonFiniteError, UnsupportedModelError
from firsttok.models import EditSite, Model, capture
from firsttok.prompts import Prompt, batches, pad

__all__ = [
    "Average",
    "LayerConcentration",
    "concentration",
    "effective_rank",
    "later_positions",
    "mean_distance",
    "parts_at",
    "resampled",
    "spread",
]

RESAMPLES = 1000
LEVEL = 0.95
TAILS = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
MAX_SUBSEQUENT = 2000
ROUNDING = 1e-5
"""Relative spread that a forward pass in float32 gives to equal vectors."""
_CHUNK = 100


@dataclass(frozen=True, kw_only=True)
class Average:
    """A mean with its percentile bootstrap interval."""

    n: int
    """How many points or facts it is the mean of."""
    value: float
    """The mean."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def columns(self, name: str) -> dict[str, float]:
        """Mean and interval under the names of a row: ``name``, ``name_low``, ``name_high``."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True, kw_only=True)
class LayerConcentration:
    """First tokens against subsequent tokens at one layer.

    ``_low`` and ``_high`` are the ends of 95 % bootstrap intervals.
    """

    layer: int
    n_first: int
    n_subsequent: int
    distinct_first: int
    """How many different tokens the first ones are; a repeated one adds no distance of its own."""
    d_first: float
    """D(F) of Equation 4, over keys."""
    d_first_low: float
    d_first_high: float
    d_subsequent: float
    """D(S) of Equation 4, over keys."""
    d_subsequent_low: float
    d_subsequent_high: float
    residual_first: float
    """Mean norm of the residual stream after the block, at first tokens."""
    residual_subsequent: float
    attention_to_first: float
    """Share of attention the first token gets: mean over heads and subsequent query tokens."""
    effective_rank_first: float
    """Effective rank of the first tokens' keys."""
    effective_rank_subsequent: float
    """The same of as many subsequent tokens."""
    massive_dimension: int
    """Dimension of the residual stream that carries most of the first tokens' squared norm."""
    massive_share: float
    """Its share of the squared norm, mean over first tokens."""
    massive_share_subsequent: float


def mean_distance(points: Float[Tensor, "point width"]) -> float:
    """D of Equation 4: mean Euclidean distance to the centroid, in float64."""
    return float(_centred(points).norm(dim=1).mean())


@taken
def spread(
    points: Float[Tensor, "point width"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Average:
    """D of Equation 4 with a 95 % percentile bootstrap interval over points.

    Every resample has a centroid of its own. Two equal draws lie at distance 0 from each other, so
    the interval of a handful of points lies low.

    Raises:
        BadInputError: If there are no two points.
    """
    count = len(points)
    if count < 2:
        raise BadInputError(f"the distances of {count} points say nothing; give at least 2")
    centred = _centred(points)
    squares = centred.square().sum(1)
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for start in range(0, resamples, _CHUNK):
        # ||e - c||^2 = e.e - 2 e.c + c.c costs two products of matrices and no copy of the points.
        weights = resampled(count, min(_CHUNK, resamples - start), generator)
        centroids = weights @ centred
        distances = squares - 2 * centroids @ centred.T + centroids.square().sum(1, keepdim=True)
        found.append((weights * distances.clamp_min(0).sqrt()).sum(1))
    low, high = torch.cat(found).quantile(TAILS).tolist()
    return Average(n=count, value=float(centred.norm(dim=1).mean()), low=low, high=high)


def resampled(
    count: int, resamples: int, generator: torch.Generator
) -> Float[Tensor, "resample point"]:
    """Share that each point has in resamples of as many points, drawn with replacement."""
    draws = torch.randint(count, (resamples, count), generator=generator)
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    return weights.scatter_add_(1, draws, torch.full(draws.shape, 1 / count, dtype=torch.float64))


def effective_rank(points: Float[Tensor, "point width"]) -> float:
    """Exponential of the entropy of the normalised singular values of the centred points.

    ``k`` equally long orthogonal directions give ``k``; it is at most the number of points less
    one. Points that are equal but for the rounding of a float32 pass have none: 0.
    """
    centred = _centred(points)
    if float(centred.norm()) <= ROUNDING * float(points.double().norm()):
        return 0.0
    small = centred if len(centred) <= centred.shape[1] else centred.T
    values = torch.linalg.eigvalsh(small @ small.T).clamp_min(0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


@taken
def concentration(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Iterable[int] | None = None,
    place: int = 0,
    stack: str | None = None,
    max_subsequent: int = MAX_SUBSEQUENT,
    resamples: int = RESAMPLES,
    seed: int = 0,
    max_tokens: int = 1024,
) -> tuple[LayerConcentration, ...]:
    """Measure first tokens against subsequent ones (Equation 4, Figure 8), all layers in one pass.

    The token at ``place`` is the first one, and every later token of a prompt is a subsequent one;
    padding and the end token of an encoder never are. Without BOS ``place=0`` is the text's first
    token; with BOS it is the BOS, which is the same token in every prompt, and ``place=1`` is the
    text's first.

    Args:
        model: A decoder, an encoder, or an encoder-decoder, whose encoder is read.
        prompts: The prompts.
        layers: Layers to measure; None for all.
        place: Position of the first token.
        stack: ``encoder_blocks`` on encoder-decoders; None for the model's first stack.
        max_subsequent: Of more subsequent tokens than this, so many are drawn (the paper takes
            all); their keys are held at all layers at once.
        resamples: Number of bootstrap resamples.
        seed: Seed of the draw and of the bootstrap. Its unit is the token.
        max_tokens: Most tokens of a padded batch; all layers' activations are held for one.

    Raises:
        BadInputError: If a prompt has no token at ``place``, there are no two first and two
            subsequent tokens, or there is no layer.
        LayerOutOfRangeError: If a layer does not exist.
        NonFiniteError: If an activation is NaN or infinite.
        UnsupportedModelError: If the model does not show its attention, or for the decoder of an
            encoder-decoder, whose tokens are not those of the prompt.
    """
    if stack == "decoder_blocks":
        raise UnsupportedModelError(
            f"the decoder of {model.name} does not read the prompt's own tokens; "
            "measure its encoder"
        )
    chosen = range(model.n_layers) if layers is None else layers
    sites = [model.site(layer, stack=stack) for layer in chosen]
    if not sites:
        raise BadInputError("there is no layer to measure; give at least one")
    first, later = _choose(model, prompts, place, max_subsequent, seed)
    read = _read(model, prompts, first, later, sites=sites, place=place, max_tokens=max_tokens)
    distinct = len({prompt.token_ids[place] for prompt in prompts})
    return tuple(
        _measure(site.layer, len(first), distinct, *of_layer, resamples=resamples, seed=seed)
        for site, *of_layer in zip(sites, *read, strict=True)
    )


@taken
def parts_at(layers: Sequence[LayerConcentration]) -> int | None:
    """First layer from which on, to the last one given, D(F) lies below D(S).

    "Below" means that the bootstrap intervals are disjoint. None if the last layer is not so.
    """
    found: int | None = None
    for row in sorted(layers, key=lambda row: row.layer):
        if row.d_first_high >= row.d_subsequent_low:
            found = None
        elif found is None:
            found = row.layer
    return found


@taken
def later_positions(model: Model, prompt: Prompt, place: int) -> range:
    """Positions of a prompt's own tokens after a place, without the end token of an encoder."""
    end, trailing = len(prompt.token_ids), model.trailing_ids
    if trailing and prompt.token_ids[-len(trailing) :] == trailing:
        end -= len(trailing)
    return range(place + 1, end)


def _choose(
    model: Model, prompts: Sequence[Prompt], place: int, max_subsequent: int, seed: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """First and subsequent tokens, each as prompt and position."""
    for prompt in prompts:
        if not 0 <= place <= prompt.last_position:
            raise BadInputError(
                f"{prompt.text!r} has {len(prompt.token_ids)} tokens and none at position {place}; "
                "leave it out"
            )
    first = [(index, place) for index in range(len(prompts))]
    later = [
        (index, position)
        for index, prompt in enumerate(prompts)
        for position in later_positions(model, prompt, place)
    ]
    if len(later) > max_subsequent:
        later = sorted(random.Random(seed).sample(later, max_subsequent))  # noqa: S311
    if len(first) < 2 or len(later) < 2:
        raise BadInputError(
            f"{len(first)} first and {len(later)} subsequent tokens cannot be compared; "
            "give at least 2 of each"
        )
    return first, later


@torch.no_grad()
def _read(
    model: Model,
    prompts: Sequence[Prompt],
    first: Sequence[tuple[int, int]],
    later: Sequence[tuple[int, int]],
    *,
    sites: Sequence[EditSite],
    place: int,
    max_tokens: int,
) -> tuple[
    Float[Tensor, "layer token d_mlp"],
    Float[Tensor, "layer token"],
    Float[Tensor, "layer token"],
    Float[Tensor, "layer 2 d_model"],
]:
    """Keys, residual norms and attention to the first token, at first tokens, then at later ones.

    The last tensor is the mean share of each dimension in the squared norm, for either group.
    """
    of_prompt: list[list[tuple[int, int]]] = [[] for _ in prompts]
    for index, (prompt, position) in enumerate([*first, *later]):
        of_prompt[prompt].append((index, position))
    count = len(first) + len(later)
    keys = torch.empty(len(sites), count, sites[0].d_mlp, dtype=model.dtype)
    norms = torch.empty(len(sites), count, dtype=torch.float64)
    attention = torch.empty(len(sites), count, dtype=torch.float64)
    shares = torch.zeros(len(sites), 2, sites[0].d_model, dtype=torch.float64)
    stop = max(site.layer for site in sites) + 1 if sites[0].stack == "blocks" else None
    hooks = [
        (site.key_hook, site.residual_hook, f"{site.stack}.{site.layer}.attn.hook_pattern")
        for site in sites
    ]
    names = [name for hook_names in hooks for name in hook_names]
    for group in batches(prompts, max_tokens=max_tokens):
        batch = pad(model, [prompts[index] for index in group])
        seen = capture(model, batch, names, stop_at_layer=stop)
        here = [(row, *token) for row, index in enumerate(group) for token in of_prompt[index]]
        row, which, position = torch.tensor(here).T
        is_later = which >= len(first)
        row = row.to(batch.device)
        own = batch.starts[row] + position.to(batch.device)
        target = batch.starts[row] + place
        for index, hook_names in enumerate(hooks):
            if hook_names[2] not in seen:
                raise UnsupportedModelError(
                    f"{model.name} does not show the attention of layer {sites[index].layer} "
                    f"(hook point {hook_names[2]} did not fire)"
                )
            key, residual, pattern = (seen[name] for name in hook_names)
            keys[index, which] = key[row, own].cpu()
            # In float64: the square of a massive activation is infinite in float16.
            squares = residual[row, own].cpu().double().square()
            totals = squares.sum(1)
            norms[index, which] = totals.sqrt()
            share = squares / totals.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
            shares[index, 0] += share[~is_later].sum(0)
            shares[index, 1] += share[is_later].sum(0)
            attention[index, which] = pattern[row, :, own, target].cpu().double().mean(1)
    if not all(bool(torch.isfinite(values).all()) for values in (keys, norms, attention)):
        raise NonFiniteError(
            f"an activation of {model.name} is NaN or infinite; load the model in float32"
        )
    sizes = torch.tensor([len(first), len(later)], dtype=torch.float64)
    return keys, norms, attention, shares / sizes[:, None]


def _measure(
    layer: int,
    count: int,
    distinct: int,
    keys: Float[Tensor, "token d_mlp"],
    norms: Float[Tensor, "token"],
    attention: Float[Tensor, "token"],
    shares: Float[Tensor, "2 d_model"],
    *,
    resamples: int,
    seed: int,
) -> LayerConcentration:
    first, later = keys[:count], keys[count:]
    # The rank is bounded by the number of points, so both get the same number.
    equal = min(count, len(later))
    order = torch.randperm(len(later), generator=torch.Generator().manual_seed(seed))
    dimension = int(shares[0].argmax())
    return LayerConcentration(
        layer=layer,
        n_first=count,
        n_subsequent=len(later),
        distinct_first=distinct,
        **spread(first, resamples=resamples, seed=seed).columns("d_first"),
        **spread(later, resamples=resamples, seed=seed).columns("d_subsequent"),
        residual_first=float(norms[:count].mean()),
        residual_subsequent=float(norms[count:].mean()),
        attention_to_first=float(attention[count:].mean()),
        effective_rank_first=effective_rank(first[:equal]),
        effective_rank_subsequent=effective_rank(later[order[:equal]]),
        massive_dimension=dimension,
        massive_share=float(shares[0, dimension]),
        massive_share_subsequent=float(shares[1, dimension]),
    )


def _centred(points: Float[Tensor, "point width"]) -> Float[Tensor, "point width"]:
    points = points.detach().double().cpu()
    return points - points.mean(0)
