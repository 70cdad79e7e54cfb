"""From facts to edits: keys, value, closed form, with full provenance."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from firsttok.arguments import taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit, Editor, SideBySideEditor
from firsttok.editing.memit import MemitEditor, spread_each
from firsttok.editing.methods import Method, Slot
from firsttok.editing.own_methods import find_methods
from firsttok.editing.record import edit_record
from firsttok.editing.store import ValueStore
from firsttok.editing.update import solve_update
from firsttok.editing.value import Value, optimise_values
from firsttok.errors import (
    BadInputError,
    CacheError,
    EditMismatchError,
    FirsttokError,
    NonFiniteError,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import ORDINARY_KEYS, FactKeys, KeySource, keys_of_facts
from firsttok.models import Model
from firsttok.provenance import described
from firsttok.second_moment import SecondMoment
from firsttok.tensors import ValueMatrix

__all__ = ["RomeEditor", "Turn", "compute_edit", "edit_each", "edit_in_step"]

WINDOW = 24
"""Facts looked at together, to find those that fit into one batch; no more are in memory."""
_Shared = tuple[str, Slot, str]
"""What a value depends on, under one editor's settings: the fact's hash, the slot of the anchor and
the identity of the model's view."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RomeEditor:
    """ROME and its family: one fact, one layer, an update of rank one (Equation 3).

    It holds all settings; ``dataclasses.replace`` makes another one.
    """

    method: Method
    """Which key goes into which slot."""
    contexts: ContextSet
    """The contexts of Equation 1 and of the value optimisation."""
    second_moment: SecondMoment
    """C; ``SecondMoment.identity`` for the released configurations."""
    layer: int | None = None
    """Layer to edit; None for the model's default."""
    hyperparameters: Hyperparameters | None = None
    """Settings of the value optimisation; None for the model's own."""
    key_source: KeySource = ORDINARY_KEYS
    """Where the keys come from."""
    store: ValueStore | None = None
    """Where values are kept; None to keep none."""

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return self.method.label

    def edit(self, model: Model, facts: Sequence[Fact]) -> Edit:
        """Compute the edit of one fact; the model is left as it is.

        Args:
            model: The model, or a view of it.
            facts: The fact.

        Raises:
            BadInputError: If there is not one fact, or the second moment is of another layer or
                model.
            EditMismatchError: If the model is changed while the edit is computed.
        """
        if len(facts) != 1:
            raise BadInputError(f"{self.label} writes one fact at a time, not {len(facts)}")
        ((_, edits),) = edit_each(model, facts, [self])
        return edits[self.name]

    @property
    def _settings(self) -> tuple[Any, ...]:
        """All but the method, for telling which editors share their work."""
        parts = (self.contexts, self.second_moment, self.key_source, self.store)
        return (*map(id, parts), self.layer, self.hyperparameters)


@taken
def compute_edit(
    model: Model,
    fact: Fact,
    *,
    method: Method | str,
    contexts: ContextSet,
    second_moment: SecondMoment,
    layer: int | None = None,
    hyperparameters: Hyperparameters | None = None,
) -> Edit:
    """Compute one edit; the model is left as it is.

    Args:
        model: The model.
        fact: The fact to write.
        method: Which key goes into which slot; a method, or the name of one.
        contexts: As in :class:`RomeEditor`, like all that follow.
        second_moment: C.
        layer: Layer to edit.
        hyperparameters: Settings of the value optimisation.

    Raises:
        BadInputError: If no method, or more than one, goes by the name.
    """
    chosen = find_methods(method)
    if len(chosen) != 1:
        raise BadInputError(f"{method} holds {len(chosen)} methods; give one, or ft.edit_each")
    editor = RomeEditor(
        method=chosen[0],
        contexts=contexts,
        second_moment=second_moment,
        layer=layer,
        hyperparameters=hyperparameters,
    )
    return editor.edit(model, [fact])


@taken
def edit_each(
    model: Model,
    facts: Sequence[Fact],
    editors: Sequence[Editor],
    *,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[Fact, dict[str, Edit]]]:
    """Edit every fact alone by each editor; the model is left as it is.

    Editors of the ROME family that differ in nothing but the method work on a window of facts at a
    time, and share the optimisation where their values are anchored alike. With a store, values
    that are there already are read and not computed again, and new ones are kept when their batch
    is done; not so while something disturbs the model (``Model.disturbance``). Of other editors, a
    :class:`~firsttok.editing.SideBySideEditor` is given the window as a whole.

    The values are optimised on ``model`` with the interventions and edits of its view; the keys
    come from ``key_source``, which may intervene otherwise.

    Args:
        model: The model.
        facts: The facts to write.
        editors: The editors.
        on_step: Called with the number of facts that took one optimisation step.

    Yields:
        Each fact with its edits by the editor's name, in order.

    Raises:
        BadInputError: If two editors have one name, or a second moment is of another layer or
            model.
        EditMismatchError: If the model is changed while edits are computed.
    """
    names = [editor.name for editor in editors]
    for name in names:
        if names.count(name) > 1:
            raise BadInputError(f"two editors are called {name!r}; give each its own name")
    families: dict[Any, list[RomeEditor]] = {}
    for editor in editors:
        if isinstance(editor, RomeEditor):
            editor.second_moment.check(model, model.site(editor.layer).layer)
            families.setdefault(editor._settings, []).append(editor)
    return _each(model, facts, editors, list(families.values()), on_step)


def _each(
    model: Model,
    facts: Sequence[Fact],
    editors: Sequence[Editor],
    families: Sequence[Sequence[RomeEditor]],
    on_step: Callable[[int], None] | None,
) -> Iterator[tuple[Fact, dict[str, Edit]]]:
    for start in range(0, len(facts), WINDOW):
        chunk = facts[start : start + WINDOW]
        identity = model.identity()
        # All before the first is handed out: whoever gets it may put it into the weights.
        found: list[dict[str, Edit]] = [{} for _ in chunk]
        for family in families:
            turns = [Turn(model=model, fact=f, editor=each) for f in chunk for each in family]
            made = _side_by_side(turns, on_step, store=family[0].store)
            for number, edit in made.items():
                edits = found[number // len(family)]
                edits[family[number % len(family)].name] = edit
        spread = [editor for editor in editors if isinstance(editor, MemitEditor)]
        for edits, own in zip(
            found, spread_each(model, chunk, spread, on_step=on_step), strict=True
        ):
            edits.update(own)
        for editor in editors:
            if isinstance(editor, RomeEditor | MemitEditor):
                continue
            if isinstance(editor, SideBySideEditor):
                made = editor.edit_all(model, chunk, on_step=on_step)
            else:
                made = [editor.edit(model, [fact]) for fact in chunk]
            for edits, edit in zip(found, made, strict=True):
                edits[editor.name] = edit
        if model.identity() != identity:
            raise EditMismatchError(
                f"{model.name} was changed while edits were computed on it; compute them again"
            )
        for fact, edits in zip(chunk, found, strict=True):
            yield fact, {editor.name: edits[editor.name] for editor in editors}


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """A fact that is to be edited on one state of a model."""

    model: Model
    """The view that holds the state."""
    fact: Fact
    editor: Editor


def edit_in_step(
    turns: Sequence[Turn], *, on_step: Callable[[int], None] | None = None
) -> list[Edit | FirsttokError]:
    """Compute the next edit of several sequences on one model, side by side.

    Sequences of the ROME family that differ in the weight of the edited layer alone share keys and
    optimisation: what is below that layer, and what is above, is the same in all of them. Others
    are edited one after another.

    Args:
        turns: The next edit of each sequence.
        on_step: Called with the number of facts that took one optimisation step.

    Returns:
        The edits, in order, or for a turn that fails, as on a model that puts out NaN by now, the
        error; the others are not computed again for that.

    Raises:
        CacheError: If a disk is full or cannot be written to; that is no fault of a turn.
    """
    found: dict[int, Edit | FirsttokError] = {}
    groups: dict[Any, list[int]] = {}
    for number, turn in enumerate(turns):
        key = _shared_by(turn)
        if key is None:
            found[number] = _edit_or_error(turn)
        else:
            groups.setdefault(key, []).append(number)
    for numbers in groups.values():
        outcomes = _edits_or_errors([turns[number] for number in numbers], on_step)
        found |= dict(zip(numbers, outcomes, strict=True))
    return [found[number] for number in range(len(turns))]


def _edit_or_error(turn: Turn) -> Edit | FirsttokError:
    try:
        return turn.editor.edit(turn.model, [turn.fact])
    except CacheError:
        raise
    except FirsttokError as error:
        return error


def _edits_or_errors(
    turns: Sequence[Turn], on_step: Callable[[int], None] | None
) -> list[Edit | FirsttokError]:
    failed: dict[int, FirsttokError] = {}
    try:
        made = _side_by_side(turns, on_step, on_failure=failed.__setitem__)
    except CacheError:
        raise
    except FirsttokError as error:
        if len(turns) == 1:
            return [error]
        # What they share fails before any value is optimised, such as the key of one fact.
        return [outcome for turn in turns for outcome in _edits_or_errors([turn], on_step)]
    return [failed[n] if n in failed else made[n] for n in range(len(turns))]


def _shared_by(turn: Turn) -> Any:
    """What turns have in common that can share their work; None if this one shares with none."""
    model, editor = turn.model, turn.editor
    if not isinstance(editor, RomeEditor) or editor.key_source is not ORDINARY_KEYS:
        return None
    place = model.site(editor.layer).place
    others = [edit.content_hash for edit in model.edits if edit.places != (place,)]
    same_below = model.identity(place.layer) if model.disturbance is None else id(model)
    return (*editor._settings, id(model.weights), same_below, *others)


def _side_by_side(
    turns: Sequence[Turn],
    on_step: Callable[[int], None] | None,
    *,
    store: ValueStore | None = None,
    on_failure: Callable[[int, FirsttokError], None] | None = None,
) -> dict[int, Edit]:
    """Edits of turns that share their work, by the turns' numbers.

    ``on_failure`` is told the number of a turn that fails by itself, and the error; None to raise
    that.
    """
    first, model = _rome(turns[0].editor), turns[0].model
    layer, settings = model.site(first.layer).layer, first.hyperparameters or model.hyperparameters
    editor = replace(first, layer=layer, hyperparameters=settings, store=store)
    editor.second_moment.check(model, layer)
    if not _may_be_kept(model, editor.key_source):
        editor = replace(editor, store=None)
    facts = {turn.fact.content_hash: turn.fact for turn in turns}
    if editor.key_source is ORDINARY_KEYS:
        found = keys_of_facts(model, [*facts.values()], editor.contexts, layer=layer)
    else:
        keys_of = editor.key_source.keys
        found = [keys_of(model, fact, editor.contexts, layer=layer) for fact in facts.values()]
    keys = dict(zip(facts, found, strict=True))
    # Each view is asked once. Edits may stand in it that did not when turns before were computed.
    states = {
        id(view): (view.identity(), view.record(), view.site(layer))
        for view in {id(turn.model): turn.model for turn in turns}.values()
    }
    # Editors of one slot share the value of a fact, as do sequences in the same state.
    wanted: dict[_Shared, Turn] = {}
    places: list[_Shared] = []
    for turn in turns:
        slot = _rome(turn.editor).method.anchor
        places.append((turn.fact.content_hash, slot, states[id(turn.model)][0]))
        wanted.setdefault(places[-1], turn)
    values: dict[_Shared, Value] = {}
    failed: dict[_Shared, NonFiniteError] = {}
    for slot in sorted({place[1] for place in wanted}, key=lambda each: each.value):
        some = {place: turn for place, turn in wanted.items() if place[1] is slot}
        _optimise(some, keys, editor, values, on_step, None if on_failure is None else failed)
    site = states[id(model)][2]
    about = _settings_of(editor, settings) | {
        "parameters": {str(site.place): model.weights.name_of(site.place)}
    }
    edits: dict[int, Edit] = {}
    for number, (turn, place) in enumerate(zip(turns, places, strict=True)):
        try:
            if place in failed:
                raise failed[place]
            _, record, site = states[id(turn.model)]
            method = _rome(turn.editor).method
            left, right, components = solve_update(
                site, keys[turn.fact.content_hash], values[place], method, editor.second_moment
            )
        except NonFiniteError as error:
            if on_failure is None:
                raise
            on_failure(number, error)
            continue
        edits[number] = Edit(
            deltas=(Delta(place=site.place, left=left[:, None], right=right[None]),),
            components=components,
            losses=values[place].losses,
            provenance=edit_record(
                record, [turn.fact], **about, method={"name": method.name, **method.slots}
            ),
        )
    return edits


def _rome(editor: Editor) -> RomeEditor:
    if not isinstance(editor, RomeEditor):
        raise TypeError(f"{editor.name} is not of the ROME family")
    return editor


def _may_be_kept(model: Model, key_source: KeySource) -> bool:
    try:
        described(key_source)
    except TypeError:
        return False
    return model.disturbance is None


def _optimise(
    wanted: Mapping[_Shared, Turn],
    keys: Mapping[str, FactKeys],
    editor: RomeEditor,
    values: dict[_Shared, Value],
    on_step: Callable[[int], None] | None,
    failed: dict[_Shared, NonFiniteError] | None,
) -> None:
    """Put the values of turns with one slot into ``values``, those that are kept and new ones.

    Errors go into ``failed``, or are raised if that is None.
    """
    contexts, store, source = editor.contexts, editor.store, editor.key_source
    (_, slot, _), turn = next(iter(wanted.items()))
    model = turn.model
    site, hyperparameters = model.site(editor.layer), editor.hyperparameters
    hyperparameters = hyperparameters or model.hyperparameters

    def path_of(place: _Shared, key_source: KeySource) -> Path | None:
        return store and store.path(
            place[2],
            wanted[place].fact,
            contexts=contexts,
            slot=slot,
            layer=site.layer,
            hyperparameters=hyperparameters,
            key_source=key_source,
        )

    paths = {place: path_of(place, source) for place in wanted}
    for place, path in paths.items():
        value = store.read(path, model) if store and path else None
        if value is not None:
            values[place] = value
            if on_step is not None:
                on_step(hyperparameters.steps)
    missing = [place for place in wanted if place not in values]
    if not missing:
        return
    picked = torch.stack([slot.pick(keys[place[0]]) for place in missing])
    views = [wanted[place].model for place in missing]
    if all(view is model for view in views):
        anchors = site.values_of(picked)
    else:
        each = zip(views, picked.split(1), strict=True)
        anchors = torch.cat([view.site(site.layer).values_of(key) for view, key in each])
    if store and source is not ORDINARY_KEYS:
        usual = [path_of(place, ORDINARY_KEYS) for place in missing]
        same = _same_anchors(model, store, usual, anchors)
        values |= {missing[number]: value for number, value in same.items()}
        if on_step is not None:
            on_step(hyperparameters.steps * len(same))
        rest = [number for number in range(len(missing)) if number not in same]
        missing, anchors = [missing[number] for number in rest], anchors[rest]

    def keep(number: int, value: Value) -> None:
        place = missing[number]
        values[place] = value
        path, view = paths[place], wanted[place].model
        if store and path and view.disturbance is None and view.identity() == place[2]:
            store.write(path, value)

    def fail(number: int, error: NonFiniteError) -> None:
        if failed is None:
            raise error
        failed[missing[number]] = error

    optimise_values(
        model,
        [wanted[place].fact for place in missing],
        anchors,
        contexts=contexts,
        slot=slot,
        layer=site.layer,
        hyperparameters=hyperparameters,
        views=[wanted[place].model for place in missing],
        on_step=on_step,
        on_value=keep,
        on_failure=fail,
    )


def _same_anchors(
    model: Model, store: ValueStore, paths: Sequence[Path | None], anchors: ValueMatrix
) -> dict[int, Value]:
    """Values whose anchor is the wanted one: v* does not ask where its anchor came from."""
    found: dict[int, Value] = {}
    for place, (path, anchor) in enumerate(zip(paths, anchors, strict=True)):
        value = store.read(path, model) if path else None
        # The same key differs in its last bits from batch to batch.
        nearly = 16 * torch.finfo(anchor.dtype).eps * float(anchor.norm())
        if value is not None and torch.allclose(value.anchor, anchor, rtol=0, atol=nearly):
            found[place] = value
    return found


def _settings_of(editor: RomeEditor, hyperparameters: Hyperparameters) -> dict[str, Any]:
    contexts, moment = editor.contexts, editor.second_moment
    return {
        "layer": editor.layer,
        "contexts": {
            "hash": contexts.content_hash,
            "seed": contexts.seed,
            "templates": list(contexts.templates),
        },
        "second_moment": {
            "corpus": moment.corpus,
            "corpus_hash": moment.corpus_hash,
            "hash": moment.content_hash,
            "tokens": moment.tokens,
            "ridge": moment.ridge,
        },
        "hyperparameters": hyperparameters.as_dict(),
        "keys": editor.key_source.name,
    }
