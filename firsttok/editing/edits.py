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
from firsttok.errors import BadInputError, EditMismatchError
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import ORDINARY_KEYS, FactKeys, KeySource, keys_of_facts
from firsttok.models import EditSite, Model
from firsttok.provenance import described
from firsttok.second_moment import SecondMoment
from firsttok.tensors import ValueMatrix

__all__ = ["RomeEditor", "Turn", "compute_edit", "edit_each", "edit_in_step"]

WINDOW = 24
"""Facts looked at together, to find those that fit into one batch; no more are in memory."""


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
            for edits, own in zip(found, _family(model, chunk, family, on_step), strict=True):
                edits.update(own)
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


def _family(
    model: Model,
    facts: Sequence[Fact],
    family: Sequence[RomeEditor],
    on_step: Callable[[int], None] | None,
) -> list[dict[str, Edit]]:
    """Edits of each fact by editors that differ in their methods alone."""
    first = family[0]
    # Edits may stand in the model by now that did not when the window before was computed.
    identity, record, site = model.identity(), model.record(), model.site(first.layer)
    settings = first.hyperparameters or model.hyperparameters
    one = replace(first, layer=site.layer, hyperparameters=settings)
    if one.key_source is ORDINARY_KEYS:
        keys = keys_of_facts(model, facts, one.contexts, layer=site.layer)
    else:
        source = one.key_source
        keys = [source.keys(model, fact, one.contexts, layer=site.layer) for fact in facts]
    if not _may_be_kept(model, one.key_source):
        one = replace(one, store=None)
    slots = sorted({editor.method.anchor for editor in family}, key=lambda slot: slot.value)
    values = {slot: _values(model, facts, keys, one, slot, identity, on_step) for slot in slots}
    about = _settings_of(one, settings) | {
        "parameters": {str(site.place): model.weights.name_of(site.place)}
    }
    return [
        {
            editor.name: _solved(
                record,
                site,
                fact,
                keys[index],
                values[editor.method.anchor][index],
                editor.method,
                one.second_moment,
                about,
            )
            for editor in family
        }
        for index, fact in enumerate(facts)
    ]


def _solved(
    model: Mapping[str, Any],
    site: EditSite,
    fact: Fact,
    keys: FactKeys,
    value: Value,
    method: Method,
    second_moment: SecondMoment,
    about: Mapping[str, Any],
) -> Edit:
    left, right, components = solve_update(site, keys, value, method, second_moment)
    return Edit(
        deltas=(Delta(place=site.place, left=left[:, None], right=right[None]),),
        components=components,
        losses=value.losses,
        provenance=edit_record(
            model, [fact], **about, method={"name": method.name, **method.slots}
        ),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """A fact that is to be edited on one state of a model."""

    model: Model
    """The view that holds the state."""
    fact: Fact
    editor: Editor


def edit_in_step(
    turns: Sequence[Turn], *, on_step: Callable[[int], None] | None = None
) -> list[Edit]:
    """Compute the next edit of several sequences on one model, side by side.

    Sequences of the ROME family that differ in the weight of the edited layer alone share keys and
    optimisation: what is below that layer, and what is above, is the same in all of them. Others
    are edited one after another.

    Args:
        turns: The next edit of each sequence.
        on_step: Called with the number of facts that took one optimisation step.

    Returns:
        The edits, in order.

    Raises:
        BadInputError: If a second moment is of another layer or model.
    """
    found: dict[int, Edit] = {}
    groups: dict[Any, list[int]] = {}
    for number, turn in enumerate(turns):
        key = _shared_by(turn)
        if key is None:
            found[number] = turn.editor.edit(turn.model, [turn.fact])
        else:
            groups.setdefault(key, []).append(number)
    for numbers in groups.values():
        edits = _side_by_side([turns[number] for number in numbers], on_step)
        found |= dict(zip(numbers, edits, strict=True))
    return [found[number] for number in range(len(turns))]


def _shared_by(turn: Turn) -> Any:
    """What turns have in common that can share their work; None if this one shares with none."""
    model, editor = turn.model, turn.editor
    if not isinstance(editor, RomeEditor) or editor.key_source is not ORDINARY_KEYS:
        return None
    place = model.site(editor.layer).place
    others = [edit.content_hash for edit in model.edits if edit.places != (place,)]
    same_below = model.identity(place.layer) if model.disturbance is None else id(model)
    return (*editor._settings, id(model.weights), same_below, *others)


def _side_by_side(turns: Sequence[Turn], on_step: Callable[[int], None] | None) -> list[Edit]:
    first, model = _rome(turns[0].editor), turns[0].model
    layer, settings = model.site(first.layer).layer, first.hyperparameters or model.hyperparameters
    editor = replace(first, layer=layer, hyperparameters=settings, store=None)
    editor.second_moment.check(model, layer)
    facts = {turn.fact.content_hash: turn.fact for turn in turns}
    found = keys_of_facts(model, [*facts.values()], editor.contexts, layer=layer)
    keys = dict(zip(facts, found, strict=True))
    sites = [turn.model.site(layer) for turn in turns]
    # Sequences in the same state, as all are at first, share the value of a fact.
    wanted: dict[Any, int] = {}
    places: list[Any] = []
    for number, turn in enumerate(turns):
        slot = _rome(turn.editor).method.anchor
        places.append((turn.fact.content_hash, slot, turn.model.identity()))
        wanted.setdefault(places[-1], number)
    values: dict[Any, Value] = {}
    for slot in sorted({place[1] for place in wanted}, key=lambda each: each.value):
        some = {place: number for place, number in wanted.items() if place[1] is slot}
        picked = [slot.pick(keys[turns[n].fact.content_hash])[None] for n in some.values()]
        anchors = [sites[n].values_of(key) for n, key in zip(some.values(), picked, strict=True)]
        computed = optimise_values(
            model,
            [turns[number].fact for number in some.values()],
            torch.cat(anchors),
            contexts=editor.contexts,
            slot=slot,
            layer=layer,
            hyperparameters=settings,
            views=[turns[number].model for number in some.values()],
            on_step=on_step,
        )
        values |= dict(zip(some, computed, strict=True))
    place = sites[0].place
    about = _settings_of(editor, settings) | {
        "parameters": {str(place): model.weights.name_of(place)}
    }
    return [
        _solved(
            turn.model.record(),
            site,
            turn.fact,
            keys[turn.fact.content_hash],
            values[where],
            _rome(turn.editor).method,
            editor.second_moment,
            about,
        )
        for turn, site, where in zip(turns, sites, places, strict=True)
    ]


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


def _values(
    model: Model,
    facts: Sequence[Fact],
    keys: Sequence[FactKeys],
    editor: RomeEditor,
    slot: Slot,
    identity: str,
    on_step: Callable[[int], None] | None,
) -> list[Value]:
    site, contexts = model.site(editor.layer), editor.contexts
    layer, hyperparameters = site.layer, editor.hyperparameters or model.hyperparameters
    key_source, store = editor.key_source, editor.store
    found: dict[int, Value] = {}

    def path_of(fact: Fact, source: KeySource) -> Path | None:
        return store and store.path(
            identity,
            fact,
            contexts=contexts,
            slot=slot,
            layer=layer,
            hyperparameters=hyperparameters,
            key_source=source,
        )

    paths = [path_of(fact, key_source) for fact in facts]
    for index, path in enumerate(paths):
        value = store.read(path, model) if store and path else None
        if value is not None:
            found[index] = value
            if on_step is not None:
                on_step(hyperparameters.steps)
    missing = [index for index in range(len(facts)) if index not in found]
    if not missing:
        return [found[index] for index in range(len(facts))]
    anchors = site.values_of(torch.stack([slot.pick(keys[index]) for index in missing]))
    if store and key_source is not ORDINARY_KEYS:
        usual = [path_of(facts[index], ORDINARY_KEYS) for index in missing]
        same = _same_anchors(model, store, usual, anchors)
        found |= {missing[place]: value for place, value in same.items()}
        if on_step is not None:
            on_step(hyperparameters.steps * len(same))
        rest = [place for place in range(len(missing)) if place not in same]
        missing, anchors = [missing[place] for place in rest], anchors[rest]

    def keep(number: int, value: Value) -> None:
        index = missing[number]
        found[index] = value
        path = paths[index]
        if store and path and model.disturbance is None and model.identity() == identity:
            store.write(path, value)

    optimise_values(
        model,
        [facts[index] for index in missing],
        anchors,
        contexts=contexts,
        slot=slot,
        layer=layer,
        hyperparameters=hyperparameters,
        on_step=on_step,
        on_value=keep,
    )
    return [found[index] for index in range(len(facts))]


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
