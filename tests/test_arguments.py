"""What is easily mistaken in Python is taken as it was meant, or refused in one sentence."""

import dataclasses as dc
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory

import firsttok
import firsttok.evaluation
import firsttok.keys
import firsttok.probes
import firsttok.tensors
from firsttok.arguments import SEEDS, converters, seed_number, taken, whole_number
from firsttok.data import Fact
from firsttok.editing import find_methods
from firsttok.errors import BadInputError, FactFormatError, FirsttokError
from firsttok.models import BosPolicy, Model
from firsttok.prompts import with_target

# As a program that nobody checks has them.
ft: Any = firsttok
probes: Any = firsttok.probes
evaluation: Any = firsttok.evaluation
FACT: Any = FACTS[0]
FEW = ft.Hyperparameters(steps=2)


class Given:
    """A tiny model, with all that an edit of it takes."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model: Any = model
        self.folder = folder
        self.moment = ft.SecondMoment.identity(model.site(1).d_mlp)
        self.settings: dict[str, Any] = {
            "contexts": CONTEXTS,
            "second_moment": self.moment,
            "layer": 1,
            "hyperparameters": FEW,
        }
        self.study: Any = ft.prepare_study(model, texts=SENTENCES, work=folder, **self.settings)
        self.edit: Any = ft.compute_edit(model, FACT, method=ft.ROME, **self.settings)
        self.prompt: Any = ft.fact_prompt(model, FACT)


@pytest.fixture(scope="module")
def given(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tiny("llama"), tmp_path_factory.mktemp("work"))


def made(kind: type[Any], **fields: Any) -> Any:
    """An object as it is made without the tests' own check of types."""
    thing = object.__new__(kind)
    inspect.unwrap(kind.__init__)(thing, **fields)
    return thing


def changed(thing: Any, **fields: Any) -> Any:
    """As dataclasses.replace, likewise."""
    return made(
        type(thing), **{f.name: getattr(thing, f.name) for f in dc.fields(thing) if f.init} | fields
    )


def vectors(edit: Any) -> list[list[float]]:
    return [edit.left.tolist(), edit.right.tolist()]


def edited(given: Given, method: Any) -> Any:
    return vectors(ft.compute_edit(given.model, FACT, method=method, **given.settings))


def all_edited(found: Iterable[tuple[Any, dict[str, Any]]]) -> Any:
    return [(fact, {n: vectors(edit) for n, edit in each.items()}) for fact, each in found]


def rows(found: Sequence[Any]) -> Any:
    return [repr(row) for row in found]


SPELLED = "mine=direction:prefixed,residual:bare,denominator:bare,anchor:bare"
SAME: dict[str, Callable[[Given], tuple[Any, Any]]] = {
    "a method by name": lambda g: (edited(g, "rome"), edited(g, ft.ROME)),
    "its other name": lambda g: (edited(g, "R_ROME"), edited(g, find_methods("c-rome")[0])),
    "a method spelled out": lambda g: (edited(g, SPELLED), edited(g, ft.ROME)),
    "methods by name, one fact": lambda g: (
        all_edited(ft.edit_each(g.model, FACT, ft.RomeEditor(method=ft.ROME, **g.settings))),
        all_edited(ft.edit_each(g.model, [FACT], [ft.RomeEditor(method=ft.ROME, **g.settings)])),
    ),
    "a study's edits": lambda g: (
        all_edited(g.study.edits(FACT, ["rome", ft.FC_ROME])),
        all_edited(g.study.edits([FACT], [ft.ROME, ft.FC_ROME])),
    ),
    "what if": lambda g: (
        ft.what_if(g.study, FACT, method="fc-rome").panel().text,
        ft.what_if(g.study, FACT, method=ft.FC_ROME).panel().text,
    ),
    "a comparison": lambda g: (
        ft.compare_methods(g.study, FACT, methods=("rome", "r-rome")).panel().text,
        ft.compare_methods(g.study, FACT, methods=[ft.ROME, *find_methods("c-rome")]).panel().text,
    ),
    "rows of one fact": lambda g: (
        rows(ft.measure_facts(g.study, FACT, "rome")),
        rows(ft.measure_facts(g.study, (FACT,), [ft.ROME])),
    ),
    "a metric by its name alone": lambda g: (
        rows(ft.measure_facts(g.study, FACT, ft.ROME, metrics="perplexity")),
        rows(ft.measure_facts(g.study, [FACT], [ft.ROME], metrics=["perplexity"])),
    ),
    "a screening of one fact": lambda g: (
        rows(list(ft.screen(g.study, FACT))),
        rows(list(ft.screen(g.study, [FACT]))),
    ),
    "one sentence": lambda g: (
        ft.perplexity(g.model, "A cat sat."),
        ft.perplexity(g.model, ["A cat sat."]),
    ),
    "sentences one by one": lambda g: (
        ft.perplexity(g.model, iter(SENTENCES)),
        ft.perplexity(g.model, SENTENCES),
    ),
    "a policy by name": lambda g: (
        ft.perplexity(g.model, SENTENCES, bos="with"),
        ft.perplexity(g.model, SENTENCES, bos=BosPolicy.WITH),
    ),
    "a view's policy by name": lambda g: (
        g.model.with_bos("without").leading_ids,
        g.model.with_bos(BosPolicy.WITHOUT).leading_ids,
    ),
    "a study of one sentence": lambda g: (
        ft.prepare_study(g.model, texts="A cat sat.", work=str(g.folder), **g.settings).texts,
        ("A cat sat.",),
    ),
    "a study of lists": lambda g: (
        changed(g.study, texts=list(SENTENCES), layer=np.int64(1), work=str(g.folder)).provenance(),
        g.study.provenance(),
    ),
    "one layer": lambda g: (
        ft.capture_keys(g.model, FACT, layers=2).values.tolist(),
        ft.capture_keys(g.model, [FACT], layers=[2]).values.tolist(),
    ),
    "layers of NumPy": lambda g: (
        ft.capture_keys(g.model, FACT, layers=np.arange(3)).layers,
        (0, 1, 2),
    ),
    "layers of PyTorch": lambda g: (
        ft.capture_keys(g.model, FACT, layers=torch.arange(3)).layers,
        (0, 1, 2),
    ),
    "an edit's layer of NumPy, as JSON": lambda g: (
        json.dumps(
            ft.compute_edit(
                g.model, FACT, method="rome", **{**g.settings, "layer": np.int64(1)}
            ).provenance
        ),
        json.dumps(g.edit.provenance),
    ),
    "one prompt": lambda g: (
        ft.keys_at(g.model, g.prompt, 1, layers=1).values.tolist(),
        ft.keys_at(g.model, [g.prompt], [1], layers=[1]).values.tolist(),
    ),
    "positions of PyTorch": lambda g: (
        ft.keys_at(g.model, [g.prompt], torch.tensor([1]), layers=[1]).positions,
        (1,),
    ),
    "states of a tuple": lambda g: (
        probes.token_states(g.model, (g.prompt,), (1,), layer=1).residual_norms.tolist(),
        probes.token_states(g.model, [g.prompt], [1], layer=1).residual_norms.tolist(),
    ),
    "one document": lambda g: (
        ft.compute_second_moment(g.model, layer=1, corpus=" ".join(SENTENCES)).content_hash,
        ft.compute_second_moment(g.model, layer=1, corpus=[" ".join(SENTENCES)]).content_hash,
    ),
    "one template": lambda _: (
        made(ft.ContextSet, templates="{}"),
        made(ft.ContextSet, templates=("{}",)),
    ),
    "templates in a list": lambda _: (
        hash(made(ft.ContextSet, templates=["{}"])),
        hash(made(ft.ContextSet, templates=("{}",))),
    ),
    "a fact's one neighbour": lambda _: (
        changed(FACT, neighbours="Rome is", paraphrases=["a", "b"]).as_record(),
        changed(FACT, neighbours=("Rome is",), paraphrases=("a", "b")).as_record(),
    ),
    "one intervention": lambda _: (
        repr(made(ft.IntervenedKeys, name="a", interventions=probes.SECOND2FIRST)),
        repr(made(ft.IntervenedKeys, name="a", interventions=(probes.SECOND2FIRST,))),
    ),
    "a position of NumPy, in the name of a cache": lambda _: (
        repr(made(probes.SeesAll, position=np.int64(3))),
        repr(made(probes.SeesAll, position=3)),
    ),
    "whole numbers for settings": lambda _: (
        json.dumps(
            made(ft.Hyperparameters, clamp=4, steps=np.int32(25), kl=np.float64(0.0625)).as_dict()
        ),
        json.dumps(made(ft.Hyperparameters, clamp=4.0).as_dict()),
    ),
    "slots by name": lambda _: (
        made(
            ft.Method,
            name="rome",
            label="ROME",
            direction="prefixed_mean",
            residual="unprefixed",
            denominator="unprefixed",
            anchor="unprefixed",
        ),
        ft.ROME,
    ),
    "a seed of NumPy": lambda g: (
        ft.sample_contexts(g.model, seed=np.uint8(7), path=str(g.folder / "contexts.json")),
        ft.sample_contexts(g.model, seed=7, path=g.folder / "contexts.json"),
    ),
    "one edit": lambda g: (
        g.study.prepared_texts.measure_edits(g.model, g.edit),
        g.study.prepared_texts.measure_edits(g.model, [g.edit]),
    ),
    "accuracies of one edit": lambda g: (
        evaluation.edit_accuracies(g.model, FACT, g.edit),
        evaluation.edit_accuracies(g.model, FACT, [g.edit]),
    ),
    "scores of one prompt": lambda g: (
        evaluation.score_targets(g.model, with_target(g.model, g.prompt, "Rome")),
        evaluation.score_targets(g.model, [with_target(g.model, g.prompt, "Rome")]),
    ),
    "one generation": lambda _: (
        evaluation.generation_entropy("a a b"),
        evaluation.generation_entropy(["a a b"]),
    ),
    "noise for one fact": lambda g: (
        probes.corruption_for(g.model, FACT),
        probes.corruption_for(g.model, [FACT]),
    ),
    "a trace of one kind": lambda g: (
        tuple(
            probes.trace_fact(
                g.model, FACT, probes.corruption_for(g.model, [FACT], samples=1), kinds="mlp"
            ).restored
        ),
        ("mlp",),
    ),
    "an inspection's one fact": lambda g: (
        [each.keys.prompt for each in ft.inspect_model(g.study, facts=FACT).forecast.facts],
        [FACT.prompt],
    ),
    "a sweep by names": lambda g: (
        ft.sweep_facts(
            str(g.folder / "run"),
            g.study,
            FACT,
            "rome",
            metrics="perplexity",
            seed=np.int64(3),
        ).manifest["metrics"],
        ["perplexity"],
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_was_meant_is_taken(name: str, given: Given) -> None:
    found, right = SAME[name](given)
    assert found == right


REFUSED: dict[str, tuple[Callable[[Given], object], str]] = {
    "a text for a fact": (
        lambda g: ft.capture_keys(g.model, "text"),
        "facts is 'text'; give a Fact",
    ),
    "texts for facts": (
        lambda g: ft.capture_keys(g.model, ["text"]),
        "one of facts is 'text'; give a Fact",
    ),
    "a record for a fact": (
        lambda g: ft.what_if(g.study, FACT.as_record()),
        "fact is a dict; give a Fact",
    ),
    "a fact for a text": (lambda g: ft.text_prompt(g.model, FACT), "text is a Fact; give a text"),
    "no text": (lambda g: ft.continuation(g.model, None), "text is None; give a text"),
    "bytes": (lambda g: ft.perplexity(g.model, b"A cat"), "texts is b'A cat'; give a text"),
    "numbers for texts": (
        lambda g: ft.perplexity(g.model, [1]),
        "one of texts is 1; give a text",
    ),
    "a study for a model": (
        lambda g: ft.perplexity(g.study),
        "model is a Study; give a Model",
    ),
    "a text for a study": (
        lambda _: ft.what_if("gpt2", FACT),
        "model is 'gpt2'; give a Model or a Study",
    ),
    "a list for contexts": (
        lambda g: ft.prepare_study(g.model, contexts=["{}"]),
        "contexts is ['{}']; give a ContextSet",
    ),
    "a name for a second moment": (
        lambda g: ft.prepare_study(g.model, second_moment="identity"),
        "second_moment is 'identity'; give a SecondMoment",
    ),
    "a dictionary for settings": (
        lambda g: ft.prepare_study(g.model, hyperparameters={"steps": 3}),
        "hyperparameters is a dict; give a Hyperparameters",
    ),
    "no such policy": (
        lambda g: g.model.with_bos("maybe"),
        "bos is 'maybe'; choose from as_tokenizer, with, without",
    ),
    "no such method": (lambda g: edited(g, "memoir"), "no method is called 'memoir'"),
    "no method at all": (
        lambda g: ft.compare_methods(g.study, FACT, methods=[]),
        "methods need a name each, not none at all",
    ),
    "methods for one method": (
        lambda g: ft.compute_edit(g.model, FACT, method=["rome", "c-rome"], **g.settings),
        "give a Method or a text",
    ),
    "a layer as a text": (
        lambda g: ft.capture_keys(g.model, FACT, layers="1"),
        "layers is '1'; give a whole number",
    ),
    "half a layer": (
        lambda g: ft.capture_keys(g.model, FACT, layers=[1.0]),
        "one of layers is 1.0; give a whole number",
    ),
    "truth as a layer": (
        lambda g: ft.prepare_study(g.model, layer=True),
        "layer is True; give a whole number",
    ),
    "truth as a number of steps": (lambda _: made(ft.Hyperparameters, steps=True), "steps is True"),
    "steps as a float": (lambda _: made(ft.Hyperparameters, steps=5.0), "steps is 5.0"),
    "steps as a text": (lambda _: made(ft.Hyperparameters, steps="5"), "steps is '5'"),
    "a rate as a text": (lambda _: made(ft.Hyperparameters, learning_rate="1"), "give a number"),
    "a large seed": (lambda g: ft.sample_contexts(g.model, seed=2**70), "seed is 1180591620717"),
    "a negative seed": (lambda g: ft.sample_contexts(g.model, seed=-1), "seed is -1; give a whole"),
    "a seed of too many digits": (
        lambda g: ft.sample_contexts(g.model, seed=10**5000),
        "seed is a number of very many digits",
    ),
    "no seed": (lambda g: ft.sample_contexts(g.model, seed=None), "seed is None"),
    "half a character": (
        lambda g: ft.text_prompt(g.model, "a\ud800"),
        "text 'a\\ud800' holds half a surrogate pair at character 1",
    ),
    "half a character in a fact": (lambda _: changed(FACT, subject="\udcff"), "subject '\\udcff'"),
    "half a character in a context": (
        lambda _: made(ft.ContextSet, templates=("\ud800{}",)),
        "half a surrogate pair",
    ),
    "a number for a subject": (lambda _: changed(FACT, subject=1), "subject is 1; give a text"),
    "interventions in a list": (
        lambda g: g.model.intervened([probes.SECOND2FIRST]),
        "give an Intervention",
    ),
    "no predictions": (lambda g: ft.top_predictions(g.model, "a", count=0), "count is 0"),
    "too many predictions": (
        lambda g: ft.top_predictions(g.model, "a", count=10**6),
        "count is 1000000; give a whole number from 1 to",
    ),
    "fewer than no tokens": (lambda g: ft.continuation(g.model, "a", tokens=-1), "tokens is -1"),
    "an edit for edits": (
        lambda g: ft.edit_accuracy(g.model, FACT, [g.edit]),
        "give an Edit",
    ),
    "a study to edit": (
        lambda g: g.edit.check(g.study),
        "model is a Study; give a Model",
    ),
    "a path of numbers": (lambda _: ft.load_edit(3), "path is 3; give a text or a path"),
    "no such probe": (lambda g: ft.probe(g.study, FACT, "magic"), "no probe is called 'magic'"),
    "Apple's device": (lambda g: ft.load(g.folder, device="mps"), "'mps' is not supported"),
    "a device of PyTorch": (
        lambda g: ft.load(g.folder, device=torch.device("meta")),
        "'meta' is not supported",
    ),
    "a third CPU": (lambda g: ft.load(g.folder, device="cpu:3"), "'cpu:3' is not supported"),
    "no such type": (lambda g: ft.load(g.folder, dtype=torch.int8), "dtype 'int8' is unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_sentence(name: str, given: Given) -> None:
    call, said = REFUSED[name]
    with pytest.raises(FirsttokError) as raised:
        call(given)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def public_functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for module in (firsttok, firsttok.probes, firsttok.keys, firsttok.tensors):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                found[f"{module.__name__}.{name}"] = thing
    return found


def test_every_public_function_checks_the_arguments_it_can() -> None:
    functions = public_functions()
    assert len(functions) > 50
    for name, function in functions.items():
        known = converters(function)
        assert not known or "@taken" in inspect.getsource(function).partition("def ")[0], name
        for parameter, convert in known.items():
            with pytest.raises(
                BadInputError, match=rf"{parameter} is an? object; give|choose from"
            ):
                convert(object())


def test_a_stream_is_not_read_ahead() -> None:
    read: list[int] = []

    def stream() -> Iterable[Fact]:
        for index, fact in enumerate(FACTS):
            read.append(index)
            yield fact

    @taken
    def first(facts: Iterable[Fact]) -> Fact:
        return next(iter(facts))

    assert first(stream()) is FACTS[0]
    assert read == [0]


def test_what_python_says_about_missing_arguments_stays(tiny: TinyFactory) -> None:
    with pytest.raises(TypeError, match=r"missing a required argument: 'facts'|missing 1 required"):
        ft.capture_keys(tiny("gpt2"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        ft.load("x", colour="red")


@dc.dataclass(frozen=True)
class Index:
    """Whatever has an index is a whole number."""

    value: int

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("number", [3, np.int8(3), np.uint64(3), torch.tensor(3), Index(3)])
def test_a_whole_number_is_one_of_any_library(number: object) -> None:
    found = whole_number(number, "n")
    assert (type(found), found) == (int, 3)


@pytest.mark.parametrize(
    "number", [3.0, np.float64(3), torch.tensor(3.0), True, np.True_, "3", None, [3]]
)
def test_what_is_no_whole_number_is_refused(number: object) -> None:
    with pytest.raises(BadInputError, match=r"n is .*; give a whole number"):
        whole_number(number, "n")


def test_seeds_are_those_that_every_library_takes() -> None:
    assert [seed_number(seed) for seed in (0, SEEDS - 1)] == [0, SEEDS - 1]
    for seed in (0, SEEDS - 1):
        torch.Generator().manual_seed(seed)
        np.random.default_rng(seed)
        np.random.RandomState(seed)
    with pytest.raises(ValueError, match="Seed must be between"):
        np.random.RandomState(SEEDS)


def test_a_fact_that_is_empty_says_so_as_before() -> None:
    with pytest.raises(FactFormatError, match="is empty"):
        changed(FACT, subject=" ")


def test_settings_are_filed_alike_however_they_were_written() -> None:
    one = made(ft.Hyperparameters, clamp=4, kl=0, weight_decay=np.float32(0.5))
    other = made(ft.Hyperparameters, clamp=4.0, kl=0.0, weight_decay=0.5)
    assert repr(one) == repr(other)
