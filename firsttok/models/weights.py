"""The weights of one loaded model, which all its views share, and the edits that stand in them.

An edit exchanges a weight's tensor for another one. What was loaded is not written to, so an edit
is undone to the bit by putting the tensor back.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from firsttok.errors import EditMismatchError
from firsttok.models.fingerprint import HashedWeights, tensor_hash
from firsttok.models.interrupts import Deferral
from firsttok.models.sites import EditSite, Place

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "ContentCache",
    "Standing",
    "WeightEdit",
    "Weights",
    "checkpoint_tensors",
    "same_edits",
]

ContentCache = dict[Place, tuple[Any, Tensor]]
"""Contents of edited weights: by site, what tells that it still holds, and the content."""
_Stamp = tuple[int, int, bytes]
_Yielded = TypeVar("_Yielded")
_GRID = 8
"""Places along each dimension at which a tensor is looked at to notice a change."""


@runtime_checkable
class WeightEdit(Protocol):
    """What can stand in a model's weights."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of what it does to the weights."""
        ...

    @property
    def title(self) -> str:
        """What it is, for messages."""
        ...

    @property
    def places(self) -> tuple[Place, ...]:
        """The edit sites that it changes."""
        ...

    def check(self, model: Any, *, cast: bool, anyway: bool) -> None:
        """Refuse a model that it does not belong to.

        Args:
            model: The model, or a view of it.
            cast: Whether it may have been made on the model in another type.
            anyway: Whether it may have been made on another state of the model.

        Raises:
            EditMismatchError: If it was made for another model, or on other edits.
        """
        ...

    def changed(
        self, site: EditSite, weight: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows columns"]:
        """Return the content of a site's weight with this edit added, in the model's layout.

        Raises:
            NonFiniteError: If it does not fit into the weight's type.
        """
        ...


@dataclass(kw_only=True, eq=False)
class _Known:
    """One tensor of the model, and what is known of its content."""

    name: str
    tensor: Tensor
    layer: int | None
    """Layer of ``blocks`` that it belongs to, or None."""
    is_output: bool
    """Whether it is the weight or bias of an MLP's output, which no key of its layer sees."""
    loaded: str
    """Hash of its content as loaded."""
    stamp: _Stamp
    """What it looked like when its content was last known."""
    digest: str | None
    """Hash of that content; None where it is only what edits made of the one before."""

    def look(self) -> None:
        """Hash the content again if it looks changed."""
        stamp = _stamp(self.tensor)
        if stamp != self.stamp:
            self.stamp, self.digest = stamp, tensor_hash(self.tensor)

    def reaches(self, layer: int | None) -> bool:
        """Whether the keys of a layer of ``blocks`` depend on it; None asks for all layers."""
        if layer is None or self.layer is None:
            return True
        return self.layer < layer or (self.layer == layer and not self.is_output)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Hold:
    """Edits that were put into the weights, until they are taken out again."""

    edits: tuple[WeightEdit, ...]
    """All edits that stand then, the earlier ones included."""
    thread: int | None
    """The thread that takes them out; None for edits made in place."""
    before: dict[Place, Tensor] = field(default_factory=dict[Place, Tensor])
    """The tensors that stood there before."""
    known: dict[str, tuple[_Stamp, str | None]] = field(
        default_factory=dict[str, tuple[_Stamp, str | None]]
    )
    """What was known of them, by their names."""


class Weights:
    """The weights of one loaded model; all its views hold the same object."""

    def __init__(
        self, bridge: "TransformerBridge", sites: Sequence[EditSite], hashed: HashedWeights
    ) -> None:
        """Take note of every tensor of a model.

        Args:
            bridge: The bridge of a model that was just loaded.
            sites: Its edit sites, those before the keys included.
            hashed: Hashes of its weights.
        """
        self.bridge: Any = bridge
        self.fingerprint: str = hashed.fingerprint
        """SHA-256 over names, shapes, types and bytes of all weights as loaded."""
        self.findings: dict[str, Any] = {}
        """What was found out about the model once, by what was asked."""
        self.sites: Mapping[Place, EditSite] = {site.place: site for site in sites}
        """The edit sites by place."""
        self.checkpoint: Mapping[str, Tensor] = checkpoint_tensors(bridge, hashed)
        """The live tensors by their names in the checkpoint; tied ones go by several."""
        self.taken_apart: tuple[str, ...] = tuple(sorted(hashed.places.keys() - self.checkpoint))
        """Names in the checkpoint whose tensors the bridge holds in pieces only."""
        self._known = {known.name: known for known in _known_tensors(bridge, sites, hashed)}
        owners = {id(known.tensor): known for known in self._known.values()}
        self._owners = {place: owners[id(site.weight)] for place, site in self.sites.items()}
        self._holds: list[_Hold] = []
        self._lock = threading.RLock()

    @property
    def edits(self) -> tuple[WeightEdit, ...]:
        """The edits that stand in the weights, in order."""
        return self._holds[-1].edits if self._holds else ()

    def changes(self, *, below: int | None = None) -> dict[str, str]:
        """Tensors that were changed by other means than edits, each with a hash of its content.

        A change shows in a tensor's address, in PyTorch's version counter, which counts operations
        in place, or in the values at 8 places along each dimension. What escapes: a write past the
        counter, through ``.data`` or NumPy, that leaves all those values as they are; and buffers
        that no checkpoint holds.

        Args:
            below: Leave out what the keys of this layer of ``blocks`` do not depend on.
        """
        found: dict[str, str] = {}
        with self._lock:
            for name, known in self._known.items():
                if not known.reaches(below):
                    continue
                known.look()
                digests = dict.fromkeys([self._before_edits(name), known.digest])
                changed = [each for each in digests if each not in (None, known.loaded)]
                if changed:
                    found[name] = " ".join(map(str, changed))
        return found

    def lost(self) -> list[str]:
        """Changes by other hands in what no checkpoint holds, such as the queries apart (GPT-2)."""
        held = {id(tensor) for tensor in self.checkpoint.values()}
        return [name for name in self.changes() if id(self._known[name].tensor) not in held]

    def name_of(self, place: Place) -> str:
        """Return the name of an edit site's weight in the checkpoint."""
        weight = self.sites[place].weight
        return next(name for name, tensor in self.checkpoint.items() if tensor is weight)

    def content(
        self, place: Place, edits: tuple[WeightEdit, ...], cache: ContentCache
    ) -> Float[Tensor, "rows columns"]:
        """Return what a site's weight holds when exactly these edits stand, in the model's layout.

        Args:
            place: The site.
            edits: All edits that stand.
            cache: Where what was computed is kept.

        Raises:
            EditMismatchError: If other edits stand there, and the weight was changed on top.
            NonFiniteError: If an edit does not fit into the weight's type.
        """
        with self._lock:
            site, standing, known = self.sites[place], self.edits, self._owners[place]
            known.look()
            start, rest = site.weight.data, edits[len(standing) :]
            made_from = [self._before_edits(known.name), known.digest, *_hashes(standing, place)]
            if not standing:
                # As it is told below, while edits of other views stand in the weights.
                made_from = made_from[:1]
            if not same_edits(edits[: len(standing)], standing):
                if known.digest is not None and len(made_from) > 2:
                    raise EditMismatchError(
                        f"{place} was changed by other means while edits stand in it; "
                        "take them out first"
                    )
                start, rest, made_from = self._without_edits(place), edits, made_from[:1]
            rest = tuple(edit for edit in rest if place in edit.places)
            if not rest:
                return start
            key, content = [made_from, *_hashes(rest, place)], start
            if place in cache:
                (known, stamp), kept = cache[place]
                if known == key[: len(known)] and stamp == _stamp(kept):
                    # A view of a view begins with what the first one holds.
                    content, rest = kept, rest[len(known) - 1 :]
            if not rest:
                return content
            for edit in rest:
                content = edit.changed(site, content)
            cache[place] = ((key, _stamp(content)), content)
            return content

    def apply(self, edits: tuple[WeightEdit, ...]) -> Callable[[], None]:
        """Let edits stand on top of what stands, until the returned function takes them out.

        Returns:
            A function that raises EditMismatchError if a later edit stands, or if the weights were
            changed since.

        Raises:
            EditMismatchError: If another thread holds an edit in the weights.
        """
        with self._undisturbed() as deferral:
            self.refuse_other_threads()
            hold = self._push((*self.edits, *edits), thread=None, cache={})
            if deferral.pending:
                self._pop(hold)
        if hold not in self._holds:
            # The interrupt was one that its handler took without raising, so the work goes on.
            return self.apply(edits)

        def undo() -> None:
            with self._undisturbed():
                known = [self._known[name] for name in hold.known]
                if self._holds[-1:] != [hold] or any(_stamp(k.tensor) != k.stamp for k in known):
                    raise EditMismatchError(
                        "the weight was changed after this edit was applied; "
                        "undo the later edit first"
                    )
                self._pop(hold)

        return undo

    def refuse_other_threads(self) -> None:
        """Refuse weights in which another thread holds an edit.

        Raises:
            EditMismatchError: If there is such a thread.
        """
        own = threading.get_ident()
        for hold in self._holds:
            if hold.thread not in (None, own):
                raise EditMismatchError(
                    f"another thread holds the edit {hold.edits[-1].title!r} in this model; wait "
                    "for it, or use model.edited(...), which no other thread sees"
                )

    def _push(
        self, edits: tuple[WeightEdit, ...], *, thread: int | None, cache: ContentCache
    ) -> "_Hold":
        touched = {place for edit in edits for place in edit.places}
        touched |= {place for hold in self._holds for place in hold.before}
        contents = {place: self.content(place, edits, cache) for place in touched}
        hold = _Hold(edits=edits, thread=thread)
        for place, content in contents.items():
            weight, known = self.sites[place].weight, self._owners[place]
            if content.data_ptr() != weight.data_ptr():
                known.look()
                hold.before[place] = weight.data
                hold.known[known.name] = (known.stamp, known.digest)
                _exchange(weight, content)
                known.stamp, known.digest = _stamp(weight), None
        self._holds.append(hold)
        return hold

    def _pop(self, hold: "_Hold") -> None:
        index = self._holds.index(hold)
        while hold.thread is not None and self._holds[-1].thread is None:
            # What was put in place within a block ends with the block.
            self._pop(self._holds[-1])
        del self._holds[index]
        if index < len(self._holds):
            # A later one still stands; with it goes what it stands on.
            later = self._holds[index]
            later.before.update(hold.before)
            later.known.update(hold.known)
            return
        for place, tensor in hold.before.items():
            weight, known = self.sites[place].weight, self._owners[place]
            stamp, digest = hold.known[known.name]
            _exchange(weight, tensor)
            known.stamp = _stamp(weight)
            same = (known.stamp[0], known.stamp[2]) == (stamp[0], stamp[2])
            known.digest = digest if same else tensor_hash(weight)

    def _before_edits(self, name: str) -> str | None:
        """Hash of a tensor as it is, or was, without edits in it."""
        for hold in self._holds:
            if name in hold.known:
                return hold.known[name][1]
        return self._known[name].digest

    def _without_edits(self, place: Place) -> Tensor:
        for hold in self._holds:
            if place in hold.before:
                return hold.before[place]
        return self.sites[place].weight.data

    @contextlib.contextmanager
    def _undisturbed(self) -> Generator[Deferral, None, None]:
        deferral = Deferral(__name__)
        deferral.begin()
        try:
            with self._lock:
                yield deferral
        finally:
            deferral.end()


class Standing(Generic[_Yielded]):
    """A ``with`` block in which edits stand in the weights; they are out again after it.

    Blocks nest, and may be left in any order: edits stand as long as a later block needs them.
    """

    def __init__(
        self,
        weights: Weights,
        enter: Callable[[], tuple[tuple[WeightEdit, ...] | None, _Yielded]],
        *,
        is_pass: bool,
        cache: ContentCache,
    ) -> None:
        """Prepare a block.

        Args:
            weights: The weights.
            enter: Called when the block begins: all edits that are to stand, or None for those that
                do, and what the block is given.
            is_pass: Whether the block is one forward pass, which no interrupt and no pass of
                another thread comes between.
            cache: Where contents of edited weights are kept.
        """
        self._weights, self._enter = weights, enter
        self._is_pass, self._cache = is_pass, cache
        self._hold: _Hold | None = None
        self._deferral = Deferral(__name__)

    def __enter__(self) -> _Yielded:
        """Put the edits in.

        Raises:
            EditMismatchError: If another thread holds edits in the weights.
        """
        weights = self._weights
        self._hold, self._deferral = None, Deferral(__name__)
        self._deferral.begin()
        weights._lock.acquire()
        try:
            edits, yielded = self._enter()
            if edits is None or not self._is_pass:
                weights.refuse_other_threads()
            if edits is not None and not (self._is_pass and same_edits(edits, weights.edits)):
                self._hold = weights._push(edits, thread=threading.get_ident(), cache=self._cache)
        except BaseException:
            weights._lock.release()
            self._deferral.end()
            raise
        if self._is_pass:
            self._deferral.passing = True
            return yielded
        weights._lock.release()
        self._deferral.entered(_ENTER, self._take_out)
        if self._deferral.pending:
            self._take_out()
            self._deferral.end()
            # The interrupt was one that its handler took without raising, so the block begins.
            return self.__enter__()
        return yielded

    def __exit__(self, *_: object) -> None:
        """Take the edits out."""
        self._take_out()
        if self._is_pass:
            self._weights._lock.release()
        self._deferral.end()

    def _take_out(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            with self._weights._lock:
                self._weights._pop(hold)


_ENTER = Standing.__enter__.__code__


def checkpoint_tensors(bridge: "TransformerBridge", hashed: HashedWeights) -> dict[str, Tensor]:
    """Return the live tensors of a model by their names in its checkpoint.

    Args:
        bridge: The bridge of a model that was just loaded.
        hashed: Hashes of its weights, from before the bridge was made.
    """
    module: Any = bridge.original_model
    return hashed.named(module.state_dict(keep_vars=True).values())


def same_edits(some: Sequence[WeightEdit], others: Sequence[WeightEdit]) -> bool:
    """Whether two sequences of edits do the same to the weights."""
    return [edit.content_hash for edit in some] == [edit.content_hash for edit in others]


def _hashes(edits: Sequence[WeightEdit], place: Place) -> list[str]:
    return [edit.content_hash for edit in edits if place in edit.places]


def _exchange(weight: torch.nn.Parameter, content: Tensor) -> None:
    weight.data = content
    if not weight.is_inference():
        # A backward pass over what was computed before is refused then, as after a write in place.
        torch.autograd.graph.increment_version(weight)


def _known_tensors(
    bridge: Any, sites: Sequence[EditSite], hashed: HashedWeights
) -> Iterator[_Known]:
    blocks: Sequence[torch.nn.Module] = getattr(bridge, "blocks", ())
    layers = {
        id(tensor): layer
        for layer, block in enumerate(blocks)
        for tensor in (*block.parameters(), *block.buffers())
    }
    outputs = {
        id(tensor) for site in sites for tensor in (site.weight, site.bias) if site.port == "out"
    }
    hidden = {
        id(module._buffers[name])
        for module in bridge.modules()
        for name in module._non_persistent_buffers_set
    }
    for name, tensor in (*bridge.named_parameters(), *bridge.named_buffers()):
        if id(tensor) not in hidden:
            loaded = hashed.hash_of(tensor)
            yield _Known(
                name=name.replace("_original_component.", ""),
                tensor=tensor,
                layer=layers.get(id(tensor)),
                is_output=id(tensor) in outputs,
                loaded=loaded,
                stamp=_stamp(tensor),
                digest=loaded,
            )


def _stamp(tensor: Shaped[Tensor, "..."]) -> _Stamp:
    version = 0 if tensor.is_inference() else tensor._version
    grid = tuple(slice(None, None, max(1, size // _GRID)) for size in tensor.shape)
    seen = tensor.detach()[grid].contiguous().cpu().reshape(-1).view(torch.uint8)
    return tensor.data_ptr(), version, seen.numpy().tobytes()
