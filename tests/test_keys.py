"""Keys: the site's arithmetic, and that batching and padding change nothing."""

from importlib import import_module
from typing import Any

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    BEGINS_WITH_BOS,
    CONTEXTS,
    DECODERS,
    FACTS,
    PREFIXED_ONLY,
    TinyFactory,
    alone,
    fact_prompts,
    naive_keys,
    naive_logits,
    plain_model,
    real_columns,
    relative,
    sentence_prompts,
    subject_positions,
)

from firsttok.contexts import ContextSet
from firsttok.engine import replay as replay_module
from firsttok.errors import LayerOutOfRangeError, NonFiniteError
from firsttok.evaluation import perplexity
from firsttok.keys import capture_keys, fact_keys, keys_at, keys_of_facts
from firsttok.models import BosPolicy, capture, logits
from firsttok.prompts import PadSide, fact_prompt, pad, positions, text_prompt
from firsttok.tensors import TokenBatch

SIDES: tuple[PadSide, ...] = ("left", "right", "subject")


def projections(plain: Any) -> list[torch.nn.Module]:
    """Second matrices of all MLPs in the plain model, in the order of the sites."""
    endings = ("mlp.c_proj", "mlp.fc_out", "mlp.down_proj", "DenseReluDense.wo")
    found = [m for name, m in plain.named_modules() if name.endswith(endings)]
    if not found:
        found = [layer.output.dense for layer in plain.bert.encoder.layer]
    return found


def test_the_training_of_the_architectures_differs_where_it_matters(tiny: TinyFactory) -> None:
    sites = {arch: tiny(arch).site(0) for arch in ARCHITECTURES}
    assert {arch for arch in ARCHITECTURES if sites[arch].in_out} == {"gpt2"}
    assert {arch for arch in ARCHITECTURES if sites[arch].bias is not None} == {
        "gpt2",
        "gptj",
        "bert",
    }
    assert {arch for arch in ARCHITECTURES if tiny(arch).leading_ids} == set(BEGINS_WITH_BOS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_key_times_weight_plus_bias_is_the_mlp_output(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    tokens = alone(sentence_prompts(model)[0])
    bridge: Any = model.bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))
    for site in model.sites:
        key, value = cache[site.key_hook][0], cache[site.value_hook][0]
        assert value.norm() > 0.1
        assert relative(site.values_of(key), value) < 1e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sites_are_the_output_projections_of_the_plain_model(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    plain = plain_model(model)
    modules = projections(plain)
    assert len(modules) == len(model.sites)
    seen: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    tokens = alone(sentence_prompts(model)[0])
    extra = {"decoder_input_ids": tokens} if arch == "t5" else {}
    with torch.no_grad():
        plain(tokens, attention_mask=torch.ones_like(tokens), **extra)
    layers = [site.layer for site in model.sites if site.stack == model.sites[0].stack]
    prompt = sentence_prompts(model)[0]
    last = prompt.last_position
    keys = keys_at(model, [prompt], [last], layers=layers)
    for layer in layers:
        weight: Any = modules[layer].weight
        assert torch.equal(weight, model.sites[layer].weight)
        assert relative(keys.at(layer)[0], seen[layer][0, last]) < 1e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_equal_a_naive_run_of_each_prompt(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    found = subject_positions(prompts)
    stack = model.sites[0].stack
    layers = list(range(model.n_layers))
    keys = keys_at(model, prompts, found, layers=layers, stack=stack)
    assert keys.positions == tuple(found)
    assert keys.model_fingerprint == model.fingerprint
    sites = [model.site(layer, stack=stack) for layer in layers]
    for index, prompt in enumerate(prompts):
        expected = naive_keys(model, sites, prompt, found[index])
        for layer in layers:
            assert relative(keys.at(layer)[index], expected[layer]) < 1e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("side", SIDES)
def test_keys_do_not_depend_on_the_padding_side(
    tiny: TinyFactory, arch: str, side: PadSide
) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    found = subject_positions(prompts)
    layers = list(range(model.n_layers))
    expected = keys_at(model, prompts, found, layers=layers, max_tokens=1)
    batch = pad(model, prompts, side=side)
    columns = batch.columns(torch.tensor(found))
    names = [model.site(layer).key_hook for layer in layers]
    seen = capture(model, batch, names, stop_at_layer=None)
    for layer, name in zip(layers, names, strict=True):
        at_subjects = seen[name][torch.arange(len(prompts)), columns]
        assert relative(at_subjects, expected.at(layer)) < 1e-5


@pytest.mark.parametrize("arch", [*DECODERS, "bert"])
@pytest.mark.parametrize("side", SIDES)
def test_logits_do_not_depend_on_padding_or_neighbours(
    tiny: TinyFactory, arch: str, side: PadSide
) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    batch = pad(model, prompts, side=side)
    assert int((batch.attention_mask == 0).sum()) > 0
    for prompt, found in zip(prompts, real_columns(batch, logits(model, batch)), strict=True):
        assert relative(found, naive_logits(model, prompt.token_ids)) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_ignoring_the_padding_would_be_noticed(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    batch = pad(model, prompts, side="left")
    careless = TokenBatch(
        tokens=batch.tokens,
        attention_mask=torch.ones_like(batch.attention_mask),
        position_ids=torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens),
        starts=batch.starts,
    )
    row = int(batch.starts.argmax())
    found = real_columns(batch, logits(model, careless))[row]
    assert relative(found, naive_logits(model, prompts[row].token_ids)) > 1e-2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_depend_neither_on_batch_size_nor_on_neighbours(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    found = subject_positions(prompts)
    layers = list(range(model.n_layers))
    together = keys_at(model, prompts, found, layers=layers)
    for max_tokens in (1, 60):
        apart = keys_at(model, prompts, found, layers=layers, max_tokens=max_tokens)
        assert relative(apart.values, together.values) < 1e-5
    some = [7, 2, 11]
    few = keys_at(model, [prompts[i] for i in some], [found[i] for i in some], layers=layers)
    assert relative(few.values, together.values[:, some]) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_perplexity_depends_neither_on_batch_size_nor_on_neighbours(
    tiny: TinyFactory, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(arch)
    texts = [prompt.text for prompt in sentence_prompts(model)]
    together = perplexity(model, texts)
    monkeypatch.setattr(import_module("firsttok.evaluation.perplexity"), "_MAX_TOKENS", 1)
    apart = perplexity(model, texts)
    assert together.per_sentence == pytest.approx(apart.per_sentence, rel=1e-5)
    for text, expected in zip(texts, together.per_sentence, strict=True):
        assert perplexity(model, [text]).mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("bos", list(BosPolicy))
def test_keys_follow_the_bos_policy(tiny: TinyFactory, arch: str, bos: BosPolicy) -> None:
    model = tiny(arch).with_bos(bos)
    tokenizer: Any = model.tokenizer
    begins = bos is BosPolicy.WITH or (bos is BosPolicy.AS_TOKENIZER and arch in BEGINS_WITH_BOS)
    plain = tokenizer(FACTS[0].prompt, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[tokenizer.bos_token_id] * begins + plain])
    site = model.site(2)
    bridge: Any = model.bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))
    found = capture_keys(model, FACTS[:1], layers=[2]).at(2)[0]
    assert relative(found, cache[site.key_hook][0, int(begins)]) < 1e-5


@pytest.mark.parametrize("contexts", [CONTEXTS, PREFIXED_ONLY])
@pytest.mark.parametrize("arch", DECODERS)
def test_fact_keys_are_the_mean_over_contexts_and_the_bare_key(
    tiny: TinyFactory, arch: str, contexts: ContextSet
) -> None:
    model = tiny(arch)
    site = model.site(1)
    for fact in FACTS:
        prompts = [fact_prompt(model, fact, text) for text in ("{}", *contexts.templates)]
        found = subject_positions(prompts)
        bare, *rest = [
            naive_keys(model, [site], prompt, position)[0]
            for prompt, position in zip(prompts, found, strict=True)
        ]
        keys = fact_keys(model, fact, contexts, layer=1)
        assert relative(keys.unprefixed, bare) < 1e-5
        assert relative(keys.prefixed_mean, torch.stack(rest).mean(0)) < 1e-5


def test_capture_keys_reads_facts_in_a_context(tiny: TinyFactory) -> None:
    model = tiny("llama")
    context = CONTEXTS.templates[1]
    prompts = [fact_prompt(model, fact, context) for fact in FACTS]
    expected = keys_at(model, prompts, subject_positions(prompts), layers=[2, 0])
    keys = capture_keys(model, FACTS, layers=iter([2, 0]), context=context)
    assert keys.layers == (2, 0)
    assert keys.prompts == tuple(prompts)
    assert torch.equal(keys.values, expected.values)
    assert torch.equal(keys.at(0), keys.values[1])
    with pytest.raises(ValueError, match="not in tuple"):
        keys.at(1)


@pytest.mark.parametrize("arch", DECODERS)
def test_blocks_above_the_highest_layer_do_not_run(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    bridge: Any = model.bridge
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(bridge.blocks)
    ]
    try:
        capture_keys(model, FACTS, layers=[1])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1]


def test_a_layer_that_is_not_there_is_named(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with pytest.raises(LayerOutOfRangeError, match="no layer 9; choose one from 0 to 3"):
        capture_keys(model, FACTS, layers=[0, 9])


def test_a_key_that_is_not_finite_is_refused(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    site = model.site(0)
    before = site.weight.detach().clone()
    with torch.no_grad():
        site.weight.fill_(torch.inf)
    try:
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            capture_keys(model, FACTS, layers=[1])
    finally:
        with torch.no_grad():
            site.weight.copy_(before)


def test_the_decoder_of_an_encoder_decoder_is_read_on_request(tiny: TinyFactory) -> None:
    model = tiny("t5")
    prompts = sentence_prompts(model)[:1]
    site = model.site(1, stack="decoder_blocks")
    keys = keys_at(model, prompts, [0], layers=[1], stack="decoder_blocks")
    assert relative(keys.at(1)[0], naive_keys(model, [site], prompts[0], 0)[0]) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "bert"])
def test_every_dtype_loads_and_gives_nearly_the_same_keys(
    tiny: TinyFactory, arch: str, dtype: str
) -> None:
    prompts = fact_prompts(tiny(arch))[:4]
    found = subject_positions(prompts)
    exact = keys_at(tiny(arch, "float64"), prompts, found, layers=[0, 2])
    keys = keys_at(tiny(arch, dtype), prompts, found, layers=[0, 2])
    assert keys.values.dtype is (torch.float64 if dtype == "float64" else torch.float32)
    limits = {"float64": 1e-9, "float32": 1e-5, "float16": 1e-2, "bfloat16": 0.1}
    assert relative(keys.values, exact.values) < limits[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_padding_never_spreads_nan(tiny: TinyFactory, arch: str, side: PadSide, dtype: str) -> None:
    model = tiny(arch, dtype)
    assert bool(torch.isfinite(logits(model, pad(model, fact_prompts(model), side=side))).all())


@pytest.mark.parametrize("arch", DECODERS)
def test_keys_of_facts_that_share_beginnings_are_those_of_each(
    tiny: TinyFactory, arch: str
) -> None:
    model = tiny(arch)
    together = keys_of_facts(model, FACTS * 2, CONTEXTS, layer=2)
    assert len(together) == 2 * len(FACTS)
    for fact, found in zip(FACTS * 2, together, strict=True):
        alone = fact_keys(model, fact, CONTEXTS, layer=2)
        assert relative(found.prefixed_mean, alone.prefixed_mean) < 1e-5
        assert relative(found.unprefixed, alone.unprefixed) < 1e-5


def test_what_prompts_begin_with_runs_once(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama").with_bos(BosPolicy.WITHOUT)
    tokens: list[int] = []
    run = replay_module.run_packed

    def counted(*args: Any, **options: Any) -> Any:
        tokens.append(len(args[0].hidden))
        return run(*args, **options)

    monkeypatch.setattr(replay_module, "run_packed", counted)
    facts = [fact for fact in FACTS if fact.template.startswith("{}")]
    keys_of_facts(model, facts, CONTEXTS, layer=2)
    beginnings, rest = tokens
    contexts = [text_prompt(model, text.removesuffix("{}")) for text in CONTEXTS.prefixed]
    # BPE may take the last blank to the word that follows it.
    assert beginnings <= sum(len(prompt.token_ids) for prompt in contexts)
    prompts = [fact_prompt(model, fact, t) for fact in facts for t in (*CONTEXTS.templates, "{}")]
    assert beginnings * len(facts) + rest == int((positions(prompts) + 1).sum())
