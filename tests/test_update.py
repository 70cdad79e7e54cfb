"""The closed form: what the edited model does at the keys, and what cannot matter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    BARE_ONLY,
    CONTEXTS,
    DECODERS,
    FACTS,
    ON_BOTH,
    PREFIXED_ONLY,
    TinyFactory,
    edits_of,
    naive_keys,
    relative,
    same_weights,
    subject_positions,
    weights,
)

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import (
    C_ROME,
    FC_ROME,
    METHODS,
    P_ROME,
    ROME,
    Edit,
    Method,
    Slot,
    Value,
    ValueStore,
    compute_edit,
    find_method,
    solve_update,
)
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import FactKeys
from firsttok.models import BosPolicy, Model, Place
from firsttok.prompts import fact_prompt
from firsttok.second_moment import SecondMoment

SETTINGS = Hyperparameters(steps=5)
LAYER = 1


def some_moment(d_mlp: int, *, scale: float = 1.0) -> SecondMoment:
    """A positive definite matrix that is no multiple of the identity."""
    factor = torch.randn(d_mlp, d_mlp + 5, generator=torch.Generator().manual_seed(4)).double()
    return SecondMoment(
        matrix=scale * factor @ factor.T / (d_mlp + 5),
        tokens=1,
        corpus="random",
        corpus_hash="random",
        layer=None,
        model_fingerprint=None,
    )


def edits_by_name(
    model: Model,
    fact: Fact,
    *,
    contexts: ContextSet = CONTEXTS,
    moment: SecondMoment | None = None,
    store: ValueStore | None = None,
) -> dict[str, Edit]:
    """A fact's edits by all methods."""
    ((_, edits),) = edits_of(
        model,
        [fact],
        methods=METHODS,
        contexts=contexts,
        second_moment=moment or some_moment(model.site(LAYER).d_mlp),
        layer=LAYER,
        hyperparameters=SETTINGS,
        store=store,
    )
    return edits


def naive_pair(model: Model, fact: Fact, contexts: ContextSet) -> dict[Slot, torch.Tensor]:
    """k_bar and k^u, each prompt run alone."""
    prompts = [fact_prompt(model, fact, text) for text in ("{}", *contexts.templates)]
    bare, *rest = [
        naive_keys(model, [model.site(LAYER)], prompt, position)[0]
        for prompt, position in zip(prompts, subject_positions(prompts), strict=True)
    ]
    return {Slot.UNPREFIXED: bare, Slot.PREFIXED_MEAN: torch.stack(rest).mean(0)}


@pytest.fixture
def example() -> tuple[FactKeys, Value]:
    generator = torch.Generator().manual_seed(0)
    keys = FactKeys(
        prefixed_mean=torch.randn(40, generator=generator),
        unprefixed=torch.randn(40, generator=generator),
    )
    value = Value(
        target=torch.randn(24, generator=generator),
        anchor=torch.zeros(24),
        slot=Slot.UNPREFIXED,
        losses=(1.0,),
    )
    return keys, value


@pytest.mark.parametrize("contexts", [CONTEXTS, PREFIXED_ONLY])
@pytest.mark.parametrize(("arch", "plain"), ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_the_edited_layer_maps_the_methods_key_to_its_value(
    tiny: TinyFactory, arch: str, contexts: ContextSet, tmp_path: Path
) -> None:
    model = tiny(arch, "float64").with_bos(BosPolicy.WITHOUT)
    site = model.site(LAYER)
    store = ValueStore(tmp_path)
    for fact in FACTS[:2]:
        keys = naive_pair(model, fact, contexts)
        edits = edits_by_name(model, fact, contexts=contexts, store=store)
        for method in METHODS:
            path = store.path(
                model.identity(),
                fact,
                contexts=contexts,
                slot=method.anchor,
                layer=LAYER,
                hyperparameters=SETTINGS,
            )
            value = store.read(path, model)
            assert value is not None
            assert method.residual is method.denominator
            key = keys[method.residual]
            before = site.values_of(key[None])[0]
            assert relative(before, value.target) > 1e-2
            assert relative(site.values_of(keys[method.anchor][None])[0], value.anchor) < 5e-6
            with edits[method.name].applied(model):
                after = site.values_of(key[None])[0]
            assert relative(after, value.target) < 5e-6


@pytest.mark.parametrize("arch", DECODERS)
def test_a_running_model_puts_out_the_value_at_the_subject(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64").with_bos(BosPolicy.WITHOUT)
    fact = FACTS[1]
    prompt = fact_prompt(model, fact)
    site = model.site(LAYER)
    edit = edits_by_name(model, fact)["p-rome"]
    tokens = torch.tensor([prompt.token_ids])
    place = subject_positions([prompt])[0]

    def value_there() -> torch.Tensor:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(
                tokens, attention_mask=torch.ones_like(tokens), names_filter=[site.value_hook]
            )
        value: torch.Tensor = cache[site.value_hook][0, place]
        return value

    before = value_there()
    with edit.applied(model):
        after = value_there()
    key = naive_keys(model, [site], prompt, place)[0]
    assert relative(after - before, (key @ edit.left) * edit.right) < 1e-6
    assert float((after - before).norm()) == pytest.approx(edit.report["numerator"], rel=1e-6)


@pytest.mark.parametrize("arch", DECODERS)
def test_the_change_of_the_weight_has_rank_one(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    site = model.site(LAYER)
    for edit in edits_by_name(model, FACTS[0]).values():
        before = weights(model)
        plain = site.matrix.clone()
        with edit.applied(model):
            change = site.matrix - plain
            touched = [k for k, w in weights(model).items() if not torch.equal(w, before[k])]
        assert int(torch.linalg.matrix_rank(change)) == 1
        assert relative(change, torch.outer(edit.left, edit.right)) < 1e-9
        assert torch.equal(edit.delta.matrix, torch.outer(edit.left, edit.right))
        assert len(touched) == 1
        assert float(edit.left.norm()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("arch", DECODERS)
def test_the_left_vector_is_the_whitened_direction_key(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    moment = some_moment(model.site(LAYER).d_mlp)
    keys = naive_pair(model, FACTS[0], CONTEXTS)
    edits = edits_by_name(model, FACTS[0], moment=moment)
    for method in METHODS:
        edit = edits[method.name]
        whitened = torch.linalg.solve(moment.matrix, keys[method.direction])
        assert relative(edit.left, whitened / whitened.norm()) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_with_identity_the_left_vector_is_the_unit_key(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    edits = edits_by_name(model, FACTS[0], moment=SecondMoment.identity(model.site(LAYER).d_mlp))
    keys = naive_pair(model, FACTS[0], CONTEXTS)
    for method in METHODS:
        key = keys[method.direction]
        assert relative(edits[method.name].left, key / key.norm()) < 1e-6


@pytest.mark.parametrize("arch", DECODERS)
def test_with_the_bare_context_alone_all_methods_are_one(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    edits = edits_by_name(model, FACTS[0], contexts=BARE_ONLY)
    for method in (C_ROME, P_ROME, FC_ROME):
        assert relative(edits[method.name].left, edits["rome"].left) < 1e-6
        assert relative(edits[method.name].right, edits["rome"].right) < 1e-6
    assert edits["rome"].report["key_cosine"] == pytest.approx(1, abs=1e-9)
    assert edits["rome"].report["key_norm_ratio"] == pytest.approx(1, abs=1e-6)


def test_with_prefixes_all_methods_differ(tiny: TinyFactory) -> None:
    model = tiny("llama", "float32").with_bos(BosPolicy.WITHOUT)
    deltas = [edit.delta.matrix for edit in edits_by_name(model, FACTS[0]).values()]
    for index, delta in enumerate(deltas):
        for other in deltas[:index]:
            assert relative(delta, other) > 1e-2


@pytest.mark.parametrize("arch", DECODERS)
def test_the_scale_of_the_second_moment_does_not_matter(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    d_mlp = model.site(LAYER).d_mlp
    plain = edits_by_name(model, FACTS[0], moment=some_moment(d_mlp))
    scaled = edits_by_name(model, FACTS[0], moment=some_moment(d_mlp, scale=1e-7))
    for name, edit in plain.items():
        assert relative(scaled[name].left, edit.left) < 1e-9
        assert relative(scaled[name].right, edit.right) < 1e-9
        assert scaled[name].report["denominator"] == pytest.approx(
            edit.report["denominator"], rel=1e-9
        )
        assert scaled[name].report["raw_denominator"] == pytest.approx(
            1e7 * edit.report["raw_denominator"], rel=1e-9
        )


@pytest.mark.parametrize("arch", DECODERS)
def test_the_model_is_left_as_it_was(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    before = weights(model)
    edits_by_name(model, FACTS[0])
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_the_report_says_what_the_formula_says(
    tiny: TinyFactory, example: tuple[FactKeys, Value], method: Method
) -> None:
    site = tiny("gpt2").site(LAYER)
    keys, value = example
    moment = some_moment(40)
    left, right, report = solve_update(site, keys, value, method, moment)
    named = {Slot.UNPREFIXED: keys.unprefixed, Slot.PREFIXED_MEAN: keys.prefixed_mean}
    raw = torch.linalg.solve(moment.matrix, named[method.direction].double())
    W, bias = site.matrix.double(), site.bias
    assert bias is not None
    residual = value.target.double() - named[method.residual].double() @ W - bias.double()
    raw_numerator = torch.outer(raw, residual)
    raw_denominator = float(raw @ named[method.denominator].double())
    update = raw_numerator / raw_denominator
    assert relative(torch.outer(left, right), update) < 1e-4
    assert report["numerator"] == pytest.approx(float(residual.norm()), rel=1e-5)
    assert report["denominator"] == pytest.approx(raw_denominator / float(raw.norm()), rel=1e-4)
    assert report["raw_numerator"] == pytest.approx(float(raw_numerator.norm()), rel=1e-4)
    assert report["raw_denominator"] == pytest.approx(raw_denominator, rel=1e-4)
    cosine = torch.cosine_similarity(keys.unprefixed, keys.prefixed_mean, dim=0)
    assert report["key_cosine"] == pytest.approx(float(cosine), rel=1e-4)
    ratio = keys.unprefixed.norm() / keys.prefixed_mean.norm()
    assert report["key_norm_ratio"] == pytest.approx(float(ratio), rel=1e-5)


def test_a_key_orthogonal_to_the_left_vector_is_refused(
    tiny: TinyFactory, example: tuple[FactKeys, Value]
) -> None:
    site = tiny("gpt2").site(LAYER)
    keys, value = example
    one, other = torch.eye(40)[:2]
    orthogonal = FactKeys(prefixed_mean=one, unprefixed=other)
    identity = SecondMoment.identity(40)
    with pytest.raises(NonFiniteError, match=r"ROME update is not finite .denominator 0.0"):
        solve_update(site, orthogonal, value, ROME, identity)
    zero = replace(keys, prefixed_mean=torch.zeros(40))
    with pytest.raises(NonFiniteError, match="C-ROME update is not finite"):
        solve_update(site, zero, value, C_ROME, identity)


def test_many_facts_give_the_edits_of_each_alone(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("gpt2", "float64")
    moment = some_moment(model.site(LAYER).d_mlp)
    store = ValueStore(tmp_path / "values")

    def run(on_step: list[int] | None = None) -> list[tuple[Fact, dict[str, Edit]]]:
        return list(
            edits_of(
                model,
                FACTS,
                methods=[ROME, FC_ROME],
                contexts=CONTEXTS,
                second_moment=moment,
                layer=LAYER,
                hyperparameters=SETTINGS,
                store=store,
                on_step=None if on_step is None else on_step.append,
            )
        )

    first = run()
    assert [fact for fact, _ in first] == list(FACTS)
    for fact, edits in first:
        assert list(edits) == ["rome", "fc-rome"]
        alone = compute_edit(
            model,
            fact,
            method=FC_ROME,
            contexts=CONTEXTS,
            second_moment=moment,
            layer=LAYER,
            hyperparameters=SETTINGS,
        )
        assert relative(alone.right, edits["fc-rome"].right) < 1e-8
        assert alone.losses == pytest.approx(edits["fc-rome"].losses, rel=1e-9)
    assert len(list((tmp_path / "values").glob("*.safetensors"))) == 2 * len(FACTS)


def test_stored_values_are_not_computed_again(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    store = ValueStore(tmp_path)
    first = edits_by_name(model, FACTS[0], store=store)

    def fail(*_args: object, **_kwargs: object) -> list[Value]:
        raise AssertionError("optimised again")

    monkeypatch.setattr("firsttok.editing.edits.optimise_values", fail)
    again = edits_by_name(model, FACTS[0], store=store)
    for name, edit in first.items():
        assert torch.equal(again[name].left, edit.left)
        assert torch.equal(again[name].right, edit.right)
        assert again[name].losses == edit.losses
        assert again[name].report == edit.report
    with pytest.raises(AssertionError, match="optimised again"):
        edits_by_name(model, FACTS[1], store=store)


def test_an_edit_knows_where_it_comes_from(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    moment = some_moment(model.site(LAYER).d_mlp)
    edit = edits_by_name(model, FACTS[0], moment=moment)["c-rome"]
    record = edit.provenance
    assert record["model"]["fingerprint"] == model.fingerprint
    assert record["model"]["dtype"] == "float32"
    assert record["model"]["bos"] == "as_tokenizer"
    assert record["facts"] == [FACTS[0].as_record() | {"source": FACTS[0].source}]
    assert record["method"] == {
        "name": "c-rome",
        "direction": "prefixed_mean",
        "residual": "prefixed_mean",
        "denominator": "prefixed_mean",
        "anchor": "unprefixed",
    }
    assert record["contexts"]["templates"] == list(CONTEXTS.templates)
    assert record["second_moment"]["hash"] == moment.content_hash
    assert record["hyperparameters"] == SETTINGS.as_dict()
    assert (edit.places, record["layer"]) == ((Place("blocks", LAYER),), LAYER)
    assert len(edit.losses) == SETTINGS.steps


@pytest.mark.parametrize(
    ("name", "method"),
    [("rome", ROME), ("R-ROME", C_ROME), ("fc_rome", FC_ROME), ("P-ROME", P_ROME)],
)
def test_methods_are_found_by_any_spelling(name: str, method: Method) -> None:
    assert find_method(name) is method


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(BadInputError, match="'memit'; choose from rome, c-rome, p-rome, fc-rome"):
        find_method("memit")
