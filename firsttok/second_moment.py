"""C, the uncentred second moment of the keys, and the solves with it (Equation 3's C^-1)."""

import hashlib
import logging
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from firsttok.arguments import taken
from firsttok.data import Corpus, find_corpus
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.errors import BadInputError, EditMismatchError, NonFiniteError
from firsttok.models import Model, capture
from firsttok.options import DEFAULT_CORPUS
from firsttok.prompts import Prompt, batches, pad, text_prompt
from firsttok.storage import (
    cache_folder,
    content_hash,
    locked,
    read_safetensors,
    read_tensors,
    write_tensors,
)
from firsttok.tensors import SecondMomentMatrix

__all__ = [
    "SecondMoment",
    "compute_second_moment",
    "compute_second_moments",
    "default_corpus",
    "load_second_moment",
]

logger = logging.getLogger(__name__)

WINDOW = 128
MAX_TOKENS = 100_000
_ROWS = 256
_LAYER_IN_NAME = re.compile(r"\.(?:h|layers|blocks)\.(\d+)\.")
_RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SecondMoment(Shown):
    """Mean of ``k k^T`` over all tokens of a corpus, in float64.

    Raises:
        BadInputError: If the matrix is not square and symmetric.
        NonFiniteError: If it holds NaN or infinity.
    """

    matrix: Float[Tensor, "d_mlp d_mlp"]
    """Float64, on the CPU."""
    tokens: int
    """Number of tokens it was taken over; 0 for an identity."""
    corpus: str
    corpus_hash: str
    layer: int | None
    """Layer of the keys; None for an identity."""
    model_fingerprint: str | None
    """The model's weights as loaded; None if the file does not say."""
    model_identity: str | None = None
    """All that decides the keys: ``Model.base_identity(below=layer)``; None if it is not known."""

    def __post_init__(self) -> None:
        """Check the matrix."""
        matrix = self.matrix
        if not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError("the second moment holds NaN or infinity; compute it again")
        if matrix.shape[0] != matrix.shape[1] or not _is_symmetric(matrix):
            raise BadInputError("the second moment is not a symmetric square matrix")

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over corpus, model, layer and matrix."""
        digest = hashlib.sha256(self.matrix.contiguous().numpy().data).hexdigest()
        return content_hash(
            [self.corpus_hash, self.tokens, self.layer, self.model_fingerprint, digest]
        )

    @cached_property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue; infinite if the matrix is singular."""
        eigenvalues = torch.linalg.eigvalsh(self.matrix)
        smallest = float(eigenvalues[0])
        return float(eigenvalues[-1]) / smallest if smallest > 0 else math.inf

    @property
    def ridge(self) -> float:
        """What is added to the diagonal, as a fraction of its mean, before Cholesky; usually 0."""
        return self._factor[1]

    def panel(self) -> Panel:
        """Size and corpus; the condition number only where it is known: it takes long."""
        lines: list[list[Any]] = [
            ["shape", str(list(self.matrix.shape))],
            ["layer", self.layer],
            ["tokens", self.tokens],
        ]
        if "condition_number" in vars(self):
            lines.append(["condition number", self.condition_number])
        return Panel(
            title="second moment of the keys" if self.tokens else "C = I, no second moment",
            parts=[Table(columns=("", "value"), lines=lines)],
            source={
                "corpus": self.corpus,
                "corpus hash": short_hash(self.corpus_hash) if self.tokens else None,
                "weights": short_hash(self.model_fingerprint),
            },
        )

    def check(self, model: Model, layer: int) -> None:
        """Refuse to stand for C of a layer that it was not computed at.

        The identity fits everywhere. C of the model as loaded may be used while edits stand in it,
        as released sequences of edits do.

        Raises:
            BadInputError: If it was computed at another layer, or on another model.
        """
        site = model.site(layer)
        if self.layer is not None and self.layer != site.layer:
            raise BadInputError(
                f"the second moment was computed for layer {self.layer}, and the edit is of layer "
                f"{site.layer}; compute it with layer={site.layer}"
            )
        if self.matrix.shape[0] != site.d_mlp:
            raise BadInputError(
                f"the second moment has shape {list(self.matrix.shape)}, and the keys of layer "
                f"{site.layer} of {model.name} have {site.d_mlp} components"
            )
        other = self.model_fingerprint not in (None, model.fingerprint)
        if self.model_identity is not None and not other:
            # What is dear is asked last.
            other = self.model_identity != model.loaded_identity and (
                self.model_identity != model.base_identity(site.layer)
            )
        if other:
            raise BadInputError(
                f"the second moment was computed for another model than {model.name}, or with "
                f"other edits below layer {site.layer}; compute it for this one"
            )

    def solve(self, key: Float[Tensor, "d_mlp"]) -> Float[Tensor, "d_mlp"]:
        """Return ``C^-1 key`` by Cholesky, in the key's own type and place."""
        return self.solve_all(key[:, None])[:, 0]

    def solve_all(self, keys: Float[Tensor, "d_mlp fact"]) -> Float[Tensor, "d_mlp fact"]:
        """As :meth:`solve` for several keys."""
        factor, _ = self._factor
        return torch.cholesky_solve(keys.detach().double().cpu(), factor).to(keys)

    def below(self, threshold: float) -> Float[Tensor, "d_mlp kept"]:
        """Eigenvectors of C whose eigenvalue is below a threshold, in float64."""
        values, vectors = self._eigen
        return vectors[:, values < threshold]

    def save(self, path: str | Path) -> None:
        """Write the matrix as safetensors, with its metadata."""
        metadata = {
            "tokens": str(self.tokens),
            "corpus": self.corpus,
            "corpus_hash": self.corpus_hash,
            "layer": "" if self.layer is None else str(self.layer),
            "model_fingerprint": self.model_fingerprint or "",
            "model_identity": self.model_identity or "",
            "condition_number": repr(self.condition_number),
            "ridge": f"{self.ridge:g}",
        }
        write_tensors(Path(path), {"second_moment": self.matrix}, metadata)

    @staticmethod
    def identity(d_mlp: int) -> "SecondMoment":
        """C = I: the left vector is the key itself (``mom2_adjustment: false`` in releases)."""
        return SecondMoment(
            matrix=torch.eye(d_mlp, dtype=torch.float64),
            tokens=0,
            corpus="identity",
            corpus_hash="identity",
            layer=None,
            model_fingerprint=None,
        )

    @cached_property
    def _eigen(self) -> tuple[Float[Tensor, "d_mlp"], SecondMomentMatrix]:
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    @cached_property
    def _factor(self) -> tuple[SecondMomentMatrix, float]:
        """The Cholesky factor, and the ridge that it took."""
        scale = float(self.matrix.diagonal().mean())
        for ridge in _RIDGES:
            shifted = self.matrix.clone()
            shifted.diagonal().add_(ridge * scale)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if int(info) == 0:
                if ridge:
                    logger.warning("the second moment is singular; a ridge of %g was added", ridge)
                return factor, ridge
        raise NonFiniteError("the second moment is not positive definite; use a larger corpus")


def default_corpus() -> tuple[str, ...]:
    """Return the documents of the corpus that is taken where none is named."""
    return find_corpus(DEFAULT_CORPUS).documents


@taken
def compute_second_moment(
    model: Model,
    *,
    layer: int | None = None,
    corpus: Sequence[str] | None = None,
    corpus_name: str | None = None,
    max_tokens: int = MAX_TOKENS,
    first_tokens: bool = True,
    progress: Progress | None = None,
) -> SecondMoment:
    """Compute C over a corpus, streaming in float64; cached, and resumed after an interruption.

    It is kept by what decides it: edits below the layer count, those at the layer or above do not.
    Documents are cut into windows of at most 128 tokens; every token counts, first positions
    included (note 3 of Section "C" in Meng et al.'s code).

    Args:
        model: The model.
        layer: Layer of the keys; None for the model's default.
        corpus: Documents, such as those of :func:`~firsttok.data.find_corpus`; None for
            :func:`default_corpus`.
        corpus_name: Name for the records.
        max_tokens: Stop after about this many tokens.
        first_tokens: Whether the first token of a window counts, as released.
        progress: Where to show progress.

    Raises:
        BadInputError: If the corpus yields no token.
        EditMismatchError: If the model is changed meanwhile.
    """
    number = model.site(layer).layer
    return compute_second_moments(
        model,
        layers=[number],
        corpus=corpus,
        corpus_name=corpus_name,
        max_tokens=max_tokens,
        first_tokens=first_tokens,
        progress=progress,
    )[number]


@taken
def compute_second_moments(
    model: Model,
    *,
    layers: Iterable[int],
    corpus: Sequence[str] | None = None,
    corpus_name: str | None = None,
    max_tokens: int = MAX_TOKENS,
    first_tokens: bool = True,
    progress: Progress | None = None,
) -> dict[int, SecondMoment]:
    """Compute C at several layers in one pass over a corpus.

    Each is kept as :func:`compute_second_moment` keeps it, and those that are there already are not
    computed again.

    Args:
        model: The model.
        layers: Layers of the keys.
        corpus: As for :func:`compute_second_moment`, like all that follow.
        corpus_name: Name for the records.
        max_tokens: Stop after about this many tokens.
        first_tokens: Whether the first token of a window counts.
        progress: Where to show progress.

    Returns:
        The second moments by layer, in the given order.

    Raises:
        BadInputError: If there is no layer, or the corpus yields no token.
        EditMismatchError: If the model is changed meanwhile.
    """
    sites = {site.layer: site for site in map(model.site, layers)}
    if not sites:
        raise BadInputError("there is no layer; give at least one")
    if corpus is None:
        found = find_corpus(DEFAULT_CORPUS)
    else:
        found = Corpus(name="text", documents=tuple(corpus))
    documents, name = found.documents, corpus_name or found.name
    name += "" if first_tokens else ", without first tokens"
    settings = [list(documents), max_tokens, WINDOW, list(model.leading_ids), str(model.dtype)]
    # Files of before, in which first tokens always counted, keep their names.
    settings += [] if first_tokens else ["without first tokens"]
    pass_over = _Pass(
        documents=documents,
        name=name,
        corpus_hash=content_hash(settings),
        max_tokens=max_tokens,
        first_tokens=first_tokens,
    )
    if model.disturbance is not None:
        return _stream(model, pass_over, tuple(sites), None, progress)
    identities = {layer: model.identity(layer) for layer in sites}
    stems = {
        layer: content_hash([pass_over.corpus_hash, identities[layer], site.stack, layer])[:20]
        for layer, site in sites.items()
    }
    folder = cache_folder("second_moments")
    paths = {layer: folder / f"{stem}.safetensors" for layer, stem in stems.items()}
    kept: dict[int, SecondMoment] = {}
    with ExitStack() as locks:
        # Always in one order, so that no two processes wait for each other.
        for path in sorted(paths.values()):
            locks.enter_context(locked(path))
        for layer, path in paths.items():
            if path.is_file():
                try:
                    tensors, metadata = read_tensors(path, "a second moment")
                    kept[layer] = _second_moment(path, tensors, metadata, d_mlp=sites[layer].d_mlp)
                except (BadInputError, NonFiniteError):
                    logger.warning("a cached second moment is damaged and is computed again")
        missing = tuple(layer for layer in sites if layer not in kept)
        if missing:
            own = [stems[layer] for layer in missing]
            stem = own[0] if len(own) == 1 else content_hash(own)[:20]
            partial = folder / f"{stem}.partial"
            kept |= _stream(model, pass_over, missing, partial, progress)
            if any(model.identity(layer) != identities[layer] for layer in missing):
                raise EditMismatchError(
                    f"{model.name} was changed while its second moment was computed; compute it "
                    "again"
                )
            for layer in missing:
                kept[layer].save(paths[layer])
            partial.unlink(missing_ok=True)
    return {layer: kept[layer] for layer in sites}


@taken
def load_second_moment(path: str | Path, *, d_mlp: int) -> SecondMoment:
    """Read a second moment: a file of :meth:`SecondMoment.save`, or published statistics of ROME.

    Args:
        path: A safetensors file with a tensor ``second_moment``; or ``.npz`` with ``mom2.mom2``,
            the sum of ``k k^T``, and ``mom2.count``, the number of keys, as ROME and EasyEdit keep
            it. The name of such a file tells the layer (``transformer.h.17.mlp.c_proj_...``), if
            anything does.
        d_mlp: Width of a key.

    Raises:
        BadInputError: If the file is missing, truncated or of another shape.
        NonFiniteError: If the matrix holds NaN or infinity.
    """
    path = Path(path)
    read = _read_statistics if path.suffix.lower() == ".npz" else read_safetensors
    return _second_moment(path, *read(path, "a second moment"), d_mlp=d_mlp)


def _second_moment(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, d_mlp: int
) -> SecondMoment:
    matrix = tensors.get("second_moment")
    if matrix is None:
        raise BadInputError(f"{path} holds no tensor 'second_moment' but {sorted(tensors)}")
    if tuple(matrix.shape) != (d_mlp, d_mlp):
        raise BadInputError(
            f"{path} holds a second moment of shape {list(matrix.shape)}; this layer's keys need "
            f"[{d_mlp}, {d_mlp}]"
        )
    try:
        layer = int(metadata.get("layer") or -1)
        tokens = int(metadata.get("tokens", "0"))
        condition_number = float(metadata.get("condition_number") or math.nan)
    except ValueError as error:
        raise BadInputError(
            f"the metadata of {path} are damaged ({error}); compute the second moment again"
        ) from None
    moment = SecondMoment(
        matrix=matrix.double(),
        tokens=tokens,
        corpus=metadata.get("corpus", path.name),
        corpus_hash=metadata.get("corpus_hash", ""),
        layer=layer if layer >= 0 else None,
        model_fingerprint=metadata.get("model_fingerprint") or None,
        model_identity=metadata.get("model_identity") or None,
    )
    if not math.isnan(condition_number):
        # Finding it takes longer than all the rest of reading a file.
        vars(moment)["condition_number"] = condition_number
    return moment


def _read_statistics(path: Path, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Statistics of ROME as :func:`read_safetensors` would give them; arrays only, no pickle."""
    if not path.is_file():
        raise BadInputError(f"no file of {what} at {path}; check the path")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            total, count = arrays["mom2.mom2"], int(arrays["mom2.count"])
        matrix = torch.from_numpy(total.astype(np.float64))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zlib.error, BadZipFile) as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise BadInputError(
            f"{path} is no complete .npz file of ROME's statistics, with 'mom2.mom2' and "
            f"'mom2.count' as plain arrays ({reason}); fetch it again"
        ) from None
    if count < 1:
        raise BadInputError(f"{path} says that it was taken over {count} keys; fetch it again")
    named = _LAYER_IN_NAME.search(path.name)
    return {"second_moment": matrix / count}, {
        "tokens": str(count),
        "layer": named[1] if named else "",
    }


def _windows(model: Model, documents: Sequence[str], max_tokens: int) -> list[Prompt]:
    windows: list[Prompt] = []
    total = 0
    leading = model.leading_ids
    room = WINDOW - len(leading)
    for text in documents:
        if not text.strip():
            continue
        # The end token of an encoder belongs to whole texts, not to windows of them.
        end = -len(model.trailing_ids) or None
        ids = text_prompt(model, text).token_ids[len(leading) : end]
        for start in range(0, len(ids), room):
            window = (*leading, *ids[start : start + room])
            windows.append(Prompt(text="", token_ids=window))
            total += len(window)
            if total >= max_tokens:
                return windows
    return windows


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What is run, and which of its tokens count."""

    documents: tuple[str, ...]
    name: str
    corpus_hash: str
    max_tokens: int
    first_tokens: bool = True


def _stream(
    model: Model,
    over: _Pass,
    layers: Sequence[int],
    partial: Path | None,
    progress: Progress | None,
) -> dict[int, SecondMoment]:
    sites = [model.site(layer) for layer in layers]
    windows = _windows(model, over.documents, over.max_tokens)
    if not over.first_tokens:
        windows = [window for window in windows if len(window.token_ids) > 1]
    if not windows:
        least = "a sentence" if over.first_tokens else "a sentence of two tokens"
        raise BadInputError(f"the corpus holds no text; give at least {least}")
    groups = list(batches(windows))
    stop = max(layers) + 1 if sites[0].stack == "blocks" else None
    plan = content_hash(groups)
    sums = {_tensor_name(site.layer, layers): site.d_mlp for site in sites}
    totals, tokens, done = _resume(partial, sums, plan)
    bar = progress or Progress(disable=True)
    told = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
    task = bar.add_task(f"second moment, {told}", total=len(groups), completed=done)
    for index in range(done, len(groups)):
        batch = pad(model, [windows[i] for i in groups[index]])
        seen = capture(model, batch, [site.key_hook for site in sites], stop_at_layer=stop)
        counted = batch.attention_mask.bool()
        if not over.first_tokens:
            counted = counted & (counted.cumsum(1) > 1)
        for site, total in zip(sites, totals.values(), strict=True):
            keys = seen[site.key_hook][counted].double()
            total.add_((keys.T @ keys).cpu())
        tokens += int(counted.sum())
        bar.advance(task)
        if index % 10 == 9 and partial is not None:
            about = {"tokens": str(tokens), "done": str(index + 1), "plan": plan}
            write_tensors(partial, totals, about)
    return {
        site.layer: SecondMoment(
            matrix=total / tokens,
            tokens=tokens,
            corpus=over.name,
            corpus_hash=over.corpus_hash,
            layer=site.layer,
            model_fingerprint=model.fingerprint,
            model_identity=model.base_identity(site.layer),
        )
        for site, total in zip(sites, totals.values(), strict=True)
    }


def _tensor_name(layer: int, layers: Sequence[int]) -> str:
    return "sum" if len(layers) == 1 else f"sum{layer}"


def _resume(
    partial: Path | None, widths: Mapping[str, int], plan: str
) -> tuple[dict[str, SecondMomentMatrix], int, int]:
    """Sums by name, the tokens that they are over, and how many batches those are."""
    if partial is not None and partial.is_file():
        try:
            tensors, metadata = read_tensors(partial, "a partial second moment")
            fits = all(
                tensors[name].shape == (width, width) and bool(torch.isfinite(tensors[name]).all())
                for name, width in widths.items()
            )
            if fits and metadata["plan"] == plan:
                found = {name: tensors[name] for name in widths}
                return found, int(metadata["tokens"]), int(metadata["done"])
        except (BadInputError, KeyError, ValueError):
            logger.debug("%s cannot be read", partial.name)
        logger.warning("a partial second moment is damaged or of other batches; it starts again")
    zeros = {n: torch.zeros(width, width, dtype=torch.float64) for n, width in widths.items()}
    return zeros, 0, 0


def _is_symmetric(matrix: Float[Tensor, "n n"]) -> bool:
    """Whether it is, a few rows at a time: all at once would hold many times the matrix."""
    slack = 1e-6 * max(float(rows.abs().max()) for rows in matrix.split(_ROWS))
    pairs = zip(matrix.split(_ROWS), matrix.split(_ROWS, dim=1), strict=True)
    return all(torch.allclose(rows, columns.T, rtol=1e-4, atol=slack) for rows, columns in pairs)
