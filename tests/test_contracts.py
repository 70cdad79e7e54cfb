"""Shapes and types in public signatures are enforced while the tests run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from beartype import beartype
from conftest import checked
from jaxtyping import TypeCheckError
from tiny import CONTEXTS, FACTS, TinyFactory, sentence_prompts

from firsttok.editing import ROME, Slot, Value, optimise_values, solve_update
from firsttok.editing.delta import Delta
from firsttok.editing.edit import Edit
from firsttok.engine.tail import Tail
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import FactKeys, Keys
from firsttok.models import Model, Place, capture_tail
from firsttok.prompts import pad
from firsttok.second_moment import SecondMoment
from firsttok.tensors import KeyVector, TokenBatch


def batch(**wrong: torch.Tensor) -> TokenBatch:
    """A good batch, less what is said to be wrong."""
    good: dict[str, Any] = {
        "tokens": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "position_ids": torch.ones(2, 3, dtype=torch.long),
        "starts": torch.zeros(2, dtype=torch.long),
    }
    return TokenBatch(**{**good, **wrong})


def moment(matrix: torch.Tensor) -> SecondMoment:
    """A second moment around any matrix."""
    return SecondMoment(
        matrix=matrix,
        tokens=1,
        corpus="text",
        corpus_hash="hash",
        layer=0,
        model_fingerprint=None,
    )


def keys(values: torch.Tensor) -> Keys:
    """Keys around any tensor."""
    return Keys(values=values, layers=(0,), prompts=(), positions=(), model_fingerprint="model")


def value(target: torch.Tensor, anchor: torch.Tensor) -> Value:
    """A value around any vectors."""
    return Value(target=target, anchor=anchor, slot=Slot.UNPREFIXED, losses=(1.0,))


def edit(left: torch.Tensor, right: torch.Tensor) -> Edit:
    """An edit around any vectors."""
    delta = Delta(place=Place("blocks", 0), left=left[:, None], right=right[None])
    return Edit(deltas=(delta,))


def fact_keys_of(mean: torch.Tensor, bare: torch.Tensor) -> FactKeys:
    """Keys of a fact around any vectors."""
    return FactKeys(prefixed_mean=mean, unprefixed=bare)


def optimise(model: Model, anchors: torch.Tensor) -> list[Value]:
    """Optimise with any anchors."""
    return optimise_values(
        model,
        FACTS[:1],
        anchors,
        contexts=CONTEXTS,
        slot=Slot.UNPREFIXED,
        layer=1,
        hyperparameters=Hyperparameters(steps=1),
    )


def tail(model: Model) -> Tail:
    """A tail of the sentences."""
    return capture_tail(model, pad(model, sentence_prompts(model)), layer=1)


def update(model: Model, key: torch.Tensor) -> object:
    """Solve with any key."""
    vector = torch.zeros(24)
    return solve_update(
        model.site(0),
        fact_keys_of(key, key),
        value(vector, vector),
        ROME,
        SecondMoment.identity(40),
    )


@pytest.mark.parametrize(
    "call",
    [
        batch,
        lambda: moment(torch.eye(4)),
        lambda: moment(torch.eye(4).double()).solve(torch.ones(4)),
        lambda: keys(torch.zeros(1, 2, 3)),
        lambda: value(torch.zeros(3), torch.zeros(3)),
        lambda: edit(torch.zeros(3), torch.zeros(4)),
        lambda: fact_keys_of(torch.zeros(3), torch.zeros(3)),
    ],
)
def test_what_is_right_is_taken(call: Callable[[], object]) -> None:
    call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: batch(tokens=torch.ones(2, 3)),
        lambda: batch(tokens=torch.ones(3, dtype=torch.long)),
        lambda: batch(attention_mask=torch.ones(2, 4, dtype=torch.long)),
        lambda: batch(position_ids=torch.ones(3, 3, dtype=torch.long)),
        lambda: batch(attention_mask=torch.ones(2, 3, dtype=torch.bool)),
        lambda: batch(starts=torch.zeros(3, dtype=torch.long)),
        lambda: batch().columns(torch.zeros(2)),
        lambda: moment(torch.ones(3, 4)),
        lambda: moment(torch.ones(3)),
        lambda: moment(torch.eye(3, dtype=torch.long)),
        lambda: moment(torch.eye(4).double()).solve(torch.ones(4, 1)),
        lambda: keys(torch.zeros(2, 3)),
        lambda: keys(torch.zeros(1, 2, 3, dtype=torch.long)),
        lambda: value(torch.zeros(3), torch.zeros(4)),
        lambda: value(torch.zeros(1, 3), torch.zeros(3)),
        lambda: edit(torch.zeros(3, 1), torch.zeros(4)),
        lambda: edit(torch.zeros(3), torch.zeros(4, dtype=torch.long)),
        lambda: fact_keys_of(torch.zeros(3), torch.zeros(4)),
    ],
)
def test_objects_of_the_wrong_shape_or_type_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.site(0).values_of(torch.zeros(40)),
        lambda model: model.site(0).values_of(torch.zeros(2, 3, 40)),
        lambda model: model.site(0).values_of(torch.zeros(2, 40, dtype=torch.long)),
        lambda model: model.site(0).in_layout(torch.zeros(40)),
        lambda model: optimise(model, torch.zeros(24)),
        lambda model: optimise(model, torch.zeros(1, 1, 24)),
        lambda model: tail(model).logits(model.bridge, torch.ones(5)),
        lambda model: tail(model).rows(torch.ones(2, 2, dtype=torch.long)),
        lambda model: update(model, torch.zeros(1, 40)),
        lambda model: update(model, torch.zeros(40, dtype=torch.long)),
    ],
)
def test_functions_given_the_wrong_shape_or_type_refuse(
    tiny: TinyFactory, call: Callable[[Model], object]
) -> None:
    model = tiny("gpt2")
    with pytest.raises(TypeCheckError):
        call(model)


def test_a_key_of_the_wrong_width_cannot_be_solved_with() -> None:
    with pytest.raises((TypeCheckError, RuntimeError)):
        moment(torch.eye(4).double()).solve(torch.ones(5))


def test_a_shape_is_seen_anywhere_in_an_annotation() -> None:
    """conftest.py gives jaxtyping only what has one; beartype alone checks the rest."""

    def inner(values: Sequence[tuple[str, KeyVector]] | None) -> None:
        del values

    def handed_on(values: Callable[[KeyVector], int]) -> None:
        del values

    for function in (inner, handed_on):
        assert checked(function, typechecker=beartype) is not function
    with pytest.raises(TypeCheckError):
        checked(inner, typechecker=beartype)([("a", torch.zeros(2, 2))])
    with pytest.raises(TypeError, match="violates type hint"):
        of_a_number("1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="violates type hint"):
        Numbered(number="1")  # pyright: ignore[reportArgumentType]


@partial(checked, typechecker=beartype)
def of_a_number(number: int) -> None:
    del number


@partial(checked, typechecker=beartype)
@dataclass(frozen=True, kw_only=True)
class Numbered:
    number: int
