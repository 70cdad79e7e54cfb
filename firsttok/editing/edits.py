"""From facts to edits: keys, value, closed form, with full provenance."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from firsttok.arguments import taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing.methods import Method, Slot
from firsttok.editing.own_methods import find_methods
from firsttok.editing.patch import RankOneEdit
from firsttok.editing.store import ValueStore
from firsttok.editing.update import solve_update
from firsttok.editing.value import Value, optimise_values
from firsttok.errors import BadInputError, EditMismatchError
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import ORDINARY_KEYS, FactKeys, KeySource, keys_of_facts
from firsttok.models import Model
from firsttok.provenance import described, versions
from firsttok.second_moment import SecondMoment
from firsttok.tensors import ValueMatrix

__all__ = ["compute_edit", "compute_edits"]

WINDOW = 24
"""Facts looked at together, to find those that fit into one batch; no more are in memory."""


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
) -> RankOneEdit:
    """Compute one edit; the model is left as it is.

    Args:
        model: The model.
        fact: The fact to write.
        method: Which key goes into which slot; a method, or the name of one.
        contexts: The contexts of Equation 1 and of the value optimisation.
        second_moment: C; ``SecondMoment.identity`` for the released configurations.
        layer: Layer to edit; None for the model's default.
        hyperparameters: Settings; None for the model's own.

    Raises:
        BadInputError: If no method, or more than one, goes by the name.
    """
    chosen = find_methods(method)
    if len(chosen) != 1:
        raise BadInputError(f"{method} holds {len(chosen)} methods; give one, or ft.compute_edits")
    ((_, edits),) = compute_edits(
        model,
        [fact],
        methods=chosen,
        contexts=contexts,
        second_moment=second_moment,
        layer=layer,
        hyperparameters=hyperparameters,
    )
    return edits[chosen[0].name]


@taken
def compute_edits(
    model: Model,
    facts: Sequence[Fact],
    *,
    methods: Sequence[Method | str],
    contexts: ContextSet,
    second_moment: SecondMoment,
    layer: int | None = None,
    hyperparameters: Hyperparameters | None = None,
    key_source: KeySource = ORDINARY_KEYS,
    store: ValueStore | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[Fact, dict[str, RankOneEdit]]]:
    """Compute the edits of many facts by several methods, a window of facts at a time.

    Methods whose values are anchored alike share the optimisation. With a store, values that are
    there already are read and not computed again, and new ones are kept when their batch is done;
    not so while something disturbs the model (``Model.disturbance``).

    The values are optimised on ``model`` with the interventions and edits of its view; the keys
    come from ``key_source``, which may intervene otherwise.

    Args:
        model: The model.
        facts: The facts to write.
        methods: The methods, or their names as ``--method`` takes them.
        contexts: The contexts of Equation 1 and of the value optimisation.
        second_moment: C.
        layer: Layer to edit; None for the model's default.
        hyperparameters: Settings; None for the model's own.
        key_source: Where the keys come from.
        store: Where values are kept; None to keep none.
        on_step: Called with the number of facts that took one optimisation step.

    Yields:
        Each fact with its edits by method name, in order.

    Raises:
        BadInputError: If no method goes by a name, two different ones go by one, or the second
            moment is of another layer or model.
        EditMismatchError: If the model is changed while edits are computed.
    """
    chosen = find_methods(methods)
    site = model.site(layer)
    second_moment.check(model, site.layer)
    return _windows(
        model,
        facts,
        chosen,
        contexts,
        second_moment,
        site.layer,
        hyperparameters or model.hyperparameters,
        key_source,
        store,
        on_step,
    )


def _windows(
    model: Model,
    facts: Sequence[Fact],
    methods: Sequence[Method],
    contexts: ContextSet,
    moment: SecondMoment,
    layer: int,
    hyperparameters: Hyperparameters,
    key_source: KeySource,
    store: ValueStore | None,
    on_step: Callable[[int], None] | None,
) -> Iterator[tuple[Fact, dict[str, RankOneEdit]]]:
    slots = sorted({method.anchor for method in methods}, key=lambda slot: slot.value)
    for start in range(0, len(facts), WINDOW):
        chunk = facts[start : start + WINDOW]
        # Edits may stand in the model by now that did not when the window before was computed.
        identity, record, site = model.identity(), model.record(), model.site(layer)
        if key_source is ORDINARY_KEYS:
            keys = keys_of_facts(model, chunk, contexts, layer=layer)
        else:
            keys = [key_source.keys(model, fact, contexts, layer=layer) for fact in chunk]
        kept = store if _may_be_kept(model, key_source) else None
        values = {
            slot: _values(
                model,
                chunk,
                keys,
                identity=identity,
                contexts=contexts,
                slot=slot,
                layer=layer,
                hyperparameters=hyperparameters,
                key_source=key_source,
                store=kept,
                on_step=on_step,
            )
            for slot in slots
        }
        # All before the first is handed out: whoever gets it may put it into the weights.
        found: list[tuple[Fact, dict[str, RankOneEdit]]] = []
        for index, fact in enumerate(chunk):
            edits: dict[str, RankOneEdit] = {}
            for method in methods:
                value = values[method.anchor][index]
                left, right, report = solve_update(site, keys[index], value, method, moment)
                edits[method.name] = RankOneEdit(
                    left=left,
                    right=right,
                    layer=layer,
                    stack=site.stack,
                    report=report,
                    losses=value.losses,
                    provenance=_provenance(
                        record, fact, method, contexts, moment, layer, hyperparameters
                    )
                    | {"keys": key_source.name},
                )
            found.append((fact, edits))
        if model.identity() != identity:
            raise EditMismatchError(
                f"{model.name} was changed while edits were computed on it; compute them again"
            )
        yield from found


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
    *,
    identity: str,
    contexts: ContextSet,
    slot: Slot,
    layer: int,
    hyperparameters: Hyperparameters,
    key_source: KeySource,
    store: ValueStore | None,
    on_step: Callable[[int], None] | None,
) -> list[Value]:
    site = model.site(layer)
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


def _provenance(
    model: dict[str, Any],
    fact: Fact,
    method: Method,
    contexts: ContextSet,
    moment: SecondMoment,
    layer: int,
    hyperparameters: Hyperparameters,
) -> dict[str, Any]:
    return {
        "model": model,
        "layer": layer,
        "fact": fact.as_record(),
        "method": {"name": method.name, **method.slots},
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
        "versions": versions(),
    }
