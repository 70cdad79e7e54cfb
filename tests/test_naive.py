"""The fast path against the plain one of benchmarks/naive.py, from keys to perplexity."""

import statistics
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    ON_BOTH,
    PREFIXED_ONLY,
    SENTENCES,
    TRAINING,
    TinyFactory,
    build,
    edits_of,
    load_tiny,
    plain_model,
    relative,
    same_weights,
    weights,
)

import benchmarks.naive as naive_module
from benchmarks.flops import blocks_of, count_executed
from benchmarks.naive import (
    NaiveEdit,
    naive_edit,
    naive_fact_keys,
    naive_inverse,
    naive_keys,
    naive_model,
    naive_perplexities,
    naive_second_moment,
)
from firsttok.contexts import ContextSet, load_contexts
from firsttok.data import Fact, builtin_facts, builtin_sentences
from firsttok.editing import METHODS, ROME, Edit, Method, Slot, load_edit
from firsttok.engine import products
from firsttok.evaluation import perplexity, prepare_texts
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import capture_keys, fact_keys
from firsttok.models import BosPolicy, Model
from firsttok.prompts import fact_prompt, positions, with_target
from firsttok.second_moment import SecondMoment, compute_second_moment
from firsttok.sequences import EditSequence, SequencePlan, run_sequences
from firsttok.study import Study

RAGGED = (
    *FACTS,
    *(replace(fact, target_new=fact.target_true) for fact in FACTS),
    Fact(subject="Rome", template="{} is", target_new="a", target_true="the"),
    Fact(
        subject="Steve Jobs",
        template="It rained, and I left early. The founder of Microsoft is {} and he",
        target_new="was a test in Rome",
        target_true="was",
    ),
)
"""Facts of many lengths, several of them equally long after their subject."""
STOPS = {"gpt2": 8.54, "gptj": 6.9, "llama": 8.4, "mistral": 6.75, "gemma3": 13.75}
"""Losses below which some facts are at once, some soon, some never."""
SETTINGS = Hyperparameters(steps=9, learning_rate=0.5)
CLAMPED = Hyperparameters(
    steps=6, learning_rate=2.0, clamp=0.2, kl=1.5, weight_decay=0.5, stop_below=0.0
)
TOLERANCES = {"float64": (1e-6, 1e-6), "float32": (2e-3, 1e-2)}
"""Largest relative differences of a loss and of v*."""
TYPED = [*((arch, "float64") for arch in DECODERS), ("gpt2", "float32"), ("llama", "float32")]
"""All in the type that shows a difference; in the usual one, one with padding and one without."""
TYPED_ON_BOTH = [
    (arch, dtype, plain) for arch, dtype in TYPED for known, plain in ON_BOTH if known == arch
]
"""The same with and without fast paths."""


pytestmark = pytest.mark.usefixtures("softmax_in_float64")


@pytest.fixture(autouse=True)
def products_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products are made like large ones; the naive model multiplies as PyTorch does."""
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        monkeypatch.setattr(products, "_LEAST", 0)
        monkeypatch.setattr(products, "_is_faster", lambda: True)


def moment_of(size: int) -> SecondMoment:
    """A second moment that is well conditioned, but not the identity."""
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(size, 3 * size, generator=generator, dtype=torch.float64)
    return SecondMoment(
        matrix=factor @ factor.T / size,
        tokens=1,
        corpus="text",
        corpus_hash="text",
        layer=None,
        model_fingerprint=None,
    )


def v_star(
    edit: Edit, model: Model, fact: Fact, method: Method, contexts: ContextSet
) -> torch.Tensor:
    """The value an edit was made for, from the closed form read backwards."""
    keys = fact_keys(model, fact, contexts, layer=edit.layer)
    output = model.site(edit.layer).values_of(method.residual.pick(keys)[None])[0]
    return output + (edit.left @ method.denominator.pick(keys)) * edit.right


@pytest.fixture(autouse=True)
def shared_by_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive keys of a fact, and its naive value, once for all methods that need the same."""
    for name in ("naive_fact_keys", "naive_value"):
        monkeypatch.setattr(naive_module, name, cache(getattr(naive_module, name)))


def compare(
    model: Model,
    facts: tuple[Fact, ...],
    methods: tuple[Method, ...],
    tolerances: tuple[float, float],
    *,
    layer: int,
    settings: Hyperparameters,
    contexts: ContextSet = CONTEXTS,
) -> list[NaiveEdit]:
    """Hold the edits of a list of facts against naive ones; returns those of the first method."""
    naive = naive_model(model, layer)
    moment = moment_of(model.site(layer).d_mlp)
    inverse = naive_inverse(moment.matrix)
    of_loss, of_value = tolerances
    firsts: list[NaiveEdit] = []
    found = edits_of(
        model,
        facts,
        methods=methods,
        contexts=contexts,
        second_moment=moment,
        layer=layer,
        hyperparameters=settings,
    )
    for (fact, edits), expected_fact in zip(found, facts, strict=True):
        assert fact is expected_fact
        for method in methods:
            edit = edits[method.name]
            plain = naive_edit(
                naive,
                fact,
                method,
                contexts=contexts,
                inverse=inverse,
                hyperparameters=settings,
            )
            assert edit.losses == pytest.approx(plain.value.losses, rel=of_loss)
            target = v_star(edit, model, fact, method, contexts)
            assert relative(target, plain.value.target) < of_value
            assert relative(edit.left, plain.left) < of_value
            assert edit.report["denominator"] == pytest.approx(plain.denominator, rel=of_value)
            # Where no step was made, v* is the anchor, and some numerators are zero.
            size = of_value * float(plain.value.target.norm())
            assert edit.report["numerator"] == pytest.approx(
                plain.numerator, rel=of_value, abs=size
            )
            if method is methods[0]:
                firsts.append(plain)
    return firsts


@pytest.mark.parametrize("arch", DECODERS)
def test_sequences_side_by_side_are_plain_editing_of_a_copy(arch: str, tmp_path: Path) -> None:
    build(arch, tmp_path / "model")
    model, copy = (load_tiny(tmp_path / "model", "float64") for _ in range(2))
    layer, moment = 1, moment_of(model.site(1).d_mlp)
    study = Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=moment,
        layer=layer,
        hyperparameters=replace(SETTINGS, steps=5),
        texts=SENTENCES,
    )
    numbered = tuple(replace(fact, case_id=number) for number, fact in enumerate(FACTS[:3]))
    # Another order of one of them is enough for states that differ in all.
    methods = {method.name: method for method in METHODS} | {"back": METHODS[0]}
    sequences = [
        EditSequence(name=name, facts=numbered[:: -1 if name == "back" else 1], editor=method)
        for name, method in methods.items()
    ]
    run_sequences(tmp_path / "run", study, sequences, plan=SequencePlan(every=3))
    inverse = naive_inverse(moment.matrix)
    for each in sequences:
        naive = naive_model(copy, layer)
        with ExitStack() as standing:
            for step, fact in enumerate(each.facts, 1):
                # The values of one state are none of another.
                cached: Any = naive_module
                cached.naive_fact_keys.cache_clear()
                cached.naive_value.cache_clear()
                found = load_edit(
                    tmp_path / "run" / each.name / "edits" / f"{step:04d}.safetensors"
                )
                plain = naive_edit(
                    naive,
                    fact,
                    methods[each.name],
                    contexts=CONTEXTS,
                    inverse=inverse,
                    hyperparameters=study.hyperparameters,
                )
                assert found.losses == pytest.approx(plain.value.losses, rel=1e-8)
                assert relative(found.left, plain.left) < 1e-8
                assert relative(found.right, plain.right) < 1e-8
                standing.enter_context(naive.edited(plain.left, plain.right))
    assert same_weights(weights(model), weights(load_tiny(tmp_path / "model", "float64")))


@pytest.mark.parametrize("arch", DECODERS)
def test_the_naive_model_is_the_plain_one_on_the_same_weights(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    naive = naive_model(model, 2)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(naive.network(tokens).logits, plain_model(model)(tokens).logits)
    assert naive.projection.get_parameter("weight") is model.site(2).weight
    before = weights(model)
    generator = torch.Generator().manual_seed(0)
    site = model.site(2)
    left = torch.randn(site.d_mlp, generator=generator, dtype=torch.float64)
    right = torch.randn(site.d_model, generator=generator, dtype=torch.float64)
    expected = site.matrix + torch.outer(left, right)
    with naive.edited(left, right):
        assert torch.equal(site.matrix, expected)
    assert same_weights(weights(model), before)


def test_a_joint_matrix_of_queries_keys_and_values_is_counted_once(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    blocks = naive_model(model, 1).blocks
    site = model.site(1)
    per_block = 4 * site.d_model**2 + 2 * site.d_model * site.d_mlp
    assert blocks_of(model, blocks, range(1, 4)).elements == 3 * per_block


@pytest.mark.parametrize("arch", DECODERS)
def test_one_token_needs_as_much_as_the_plain_network_executes(
    tiny: TinyFactory, arch: str
) -> None:
    model = tiny(arch)
    naive = naive_model(model, 1)
    embedding = naive.network.get_output_embeddings().weight
    executed = count_executed(lambda: naive.network(torch.tensor([[5]])))
    blocks = blocks_of(model, naive.blocks, range(model.n_layers))
    # Rotary angles are products, too, but small ones.
    assert blocks.forward(range(1)) + 2 * embedding.numel() == pytest.approx(executed, rel=0.02)


@pytest.mark.parametrize("arch", DECODERS)
def test_the_facts_are_as_ragged_as_the_tests_need(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch).with_bos(BosPolicy.WITHOUT)
    prompts = [fact_prompt(model, fact) for fact in RAGGED]
    targets = [
        with_target(model, prompt, fact.target_new).target_length
        for prompt, fact in zip(prompts, RAGGED, strict=True)
    ]
    assert min(targets) == 1
    assert max(targets) >= 4
    subjects = positions(prompts).tolist()
    assert 0 in subjects
    assert max(subjects) >= 10
    assert len({len(prompt.token_ids) for prompt in prompts}) >= 5


@pytest.mark.parametrize(("arch", "dtype", "plain"), TYPED_ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_edits_of_a_ragged_list_that_stop_at_different_steps(
    tiny: TinyFactory, arch: str, dtype: str
) -> None:
    model = tiny(arch, dtype).with_bos(BosPolicy.WITHOUT)
    settings = replace(SETTINGS, stop_below=STOPS[arch])
    naive = compare(model, RAGGED, (ROME,), TOLERANCES[dtype], layer=1, settings=settings)
    steps = [len(edit.value.losses) for edit in naive]
    # Some end in the middle, each at its own step, and some run to the end.
    assert len(set(steps)) >= 4
    assert max(steps) == settings.steps
    ended = [edit.value.losses[-1] for edit in naive if len(edit.value.losses) < settings.steps]
    assert ended
    assert max(ended) < settings.stop_below


@pytest.mark.parametrize(
    ("layer", "bos", "contexts", "facts"),
    [
        (0, BosPolicy.WITHOUT, PREFIXED_ONLY, FACTS),
        (2, BosPolicy.AS_TOKENIZER, CONTEXTS, FACTS),
        # Behind the last layer's MLP delta moves the subject's own logits only: elsewhere the
        # gradient is rounding noise, which Adam blows up.
        (3, BosPolicy.WITHOUT, CONTEXTS, FACTS[4:]),
    ],
)
@pytest.mark.parametrize("arch", DECODERS)
def test_every_method_at_every_depth(
    tiny: TinyFactory,
    arch: str,
    layer: int,
    bos: BosPolicy,
    contexts: ContextSet,
    facts: tuple[Fact, ...],
) -> None:
    model = tiny(arch, "float64").with_bos(bos)
    compare(
        model,
        facts,
        METHODS,
        TOLERANCES["float64"],
        layer=layer,
        settings=CLAMPED,
        contexts=contexts,
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("arch", "plain"), ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_keys(tiny: TinyFactory, arch: str, dtype: str) -> None:
    model = tiny(arch, dtype).with_bos(BosPolicy.WITHOUT)
    naive = naive_model(model, 2)
    # Parts of Llama's norm are float32 throughout, and padding may turn a last bit of them.
    tolerance = 1e-6 if dtype == "float64" else 1e-5
    prompts = [fact_prompt(model, fact) for fact in RAGGED]
    keys, values = naive_keys(naive, prompts, positions(prompts).tolist())
    found = capture_keys(model, RAGGED, layers=[2]).at(2)
    assert relative(found, keys) < tolerance
    assert relative(model.site(2).values_of(found), values) < tolerance
    for fact in RAGGED:
        one = fact_keys(model, fact, CONTEXTS, layer=2)
        plain = naive_fact_keys(naive, fact, CONTEXTS)
        for slot in Slot:
            assert relative(slot.pick(one), plain.keys[slot]) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("arch", "plain"), ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_the_second_moment(tiny: TinyFactory, own_cache: Path, arch: str, dtype: str) -> None:
    assert own_cache.name
    model = tiny(arch, dtype)
    corpus = tuple(f"{a} {b}" for a in TRAINING for b in SENTENCES)
    found = compute_second_moment(model, layer=2, corpus=corpus, max_tokens=700)
    matrix, tokens = naive_second_moment(naive_model(model, 2), corpus, max_tokens=700)
    assert found.tokens == tokens
    assert relative(found.matrix, matrix) < (1e-9 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize(("arch", "dtype", "plain"), TYPED_ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_the_perplexity_of_edited_models(
    tiny: TinyFactory, tmp_path: Path, arch: str, dtype: str
) -> None:
    model = tiny(arch, dtype).with_bos(BosPolicy.WITHOUT)
    study = Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=moment_of(model.site(1).d_mlp),
        layer=1,
        hyperparameters=replace(SETTINGS, steps=4),
        texts=SENTENCES,
        work=tmp_path,
    )
    edits = [
        edit
        for _, by_name in edits_of(
            model,
            FACTS,
            methods=METHODS,
            contexts=study.contexts,
            second_moment=study.second_moment,
            layer=study.layer,
            hyperparameters=study.hyperparameters,
        )
        for edit in by_name.values()
    ]
    naive = naive_model(model, study.layer)
    before = weights(model)
    together = study.prepared_texts.measure_edits(model, edits)
    assert same_weights(weights(model), before)
    assert len(together) == len(edits)
    tolerance = 1e-6 if dtype == "float64" else 1e-4
    # The naive way itself depends on no batch, which one edit shows as well as all of them.
    with naive.edited(edits[0].left, edits[0].right):
        alone = naive_perplexities(naive, SENTENCES, one_by_one=True)
        assert alone == pytest.approx(naive_perplexities(naive, SENTENCES), rel=tolerance)
    for edit, one in zip(edits, together, strict=True):
        with naive.edited(edit.left, edit.right):
            batched = naive_perplexities(naive, SENTENCES)
        with edit.applied(model):
            applied = perplexity(model, SENTENCES)
        for measured in (one, applied):
            assert measured.per_sentence == pytest.approx(batched, rel=tolerance)
            assert measured.mean == pytest.approx(statistics.fmean(batched), rel=tolerance)
    # Every edit moves the perplexity: none was left out.
    plain = statistics.fmean(naive_perplexities(naive, SENTENCES))
    assert all(abs(one.mean / plain - 1) > 1e-4 for one in together)


@pytest.mark.real_model
@pytest.mark.slow
def test_one_fact_of_the_embedded_model(real_model: Model) -> None:
    model = real_model.with_bos(BosPolicy.WITHOUT)
    settings = replace(model.hyperparameters, steps=6)
    folder = Path(__file__).resolve().parent.parent / "figures" / "smollm2-135m"
    contexts = load_contexts(folder / "contexts-seed0.json")
    contexts = replace(contexts, templates=contexts.templates[:4])
    fact = next(fact for fact in builtin_facts() if fact.subject == "England")
    moment = SecondMoment.identity(model.site().d_mlp)
    layer = model.default_layer
    ((_, edits),) = edits_of(
        model,
        [fact],
        methods=[ROME],
        contexts=contexts,
        second_moment=moment,
        hyperparameters=settings,
    )
    naive = naive_model(model, layer)
    plain = naive_edit(
        naive,
        fact,
        ROME,
        contexts=contexts,
        inverse=naive_inverse(moment.matrix),
        hyperparameters=settings,
    )
    assert edits["rome"].losses == pytest.approx(plain.value.losses, rel=2e-3)
    target = v_star(edits["rome"], model, fact, ROME, contexts)
    assert relative(target, plain.value.target) < 1e-2
    assert relative(edits["rome"].left, plain.left) < 1e-3
    assert relative(edits["rome"].right, plain.right) < 1e-2
    texts = builtin_sentences()[:4]
    with naive.edited(edits["rome"].left, edits["rome"].right):
        expected = naive_perplexities(naive, texts)
    (measured,) = prepare_texts(model, texts, layer=layer).measure_edits(model, [edits["rome"]])
    assert measured.per_sentence == pytest.approx(expected, rel=2e-3)
