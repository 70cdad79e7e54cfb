"""The interventions, exact on tiny models: position swaps, attention masks, token identity, BOS."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    SENTENCES,
    TinyFactory,
    alone,
    edits_of,
    plain_model,
    relative,
    sentence_prompts,
)

from firsttok.contexts import ContextSet, sample_contexts
from firsttok.data import Fact
from firsttok.editing import ROME, Slot, ValueStore, optimise_values
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation import perplexity
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import ORDINARY_KEYS, IntervenedKeys, capture_keys, fact_keys, keys_at
from firsttok.measuring import measure_facts
from firsttok.models import BosPolicy, Model, capture, logits
from firsttok.probes import (
    FIRST2SECOND,
    IDENTITY_CELLS,
    SECOND2FIRST,
    STAGES,
    MaskedKeys,
    PositionShift,
    PositionSwap,
    SeesAll,
    SeesItself,
    bos_study,
    distinct_with_space,
    first_key_change,
    identity_prompt,
    measure_stages,
    swapped_study,
    token_states,
)
from firsttok.prompts import Prompt, fact_prompt, join_prompts, pad, positions, text_prompt
from firsttok.second_moment import SecondMoment, compute_second_moment
from firsttok.study import Study
from firsttok.tensors import Intervention, TokenBatch

ROTARY = ("gptj", "llama", "mistral")
SWAPS = (SECOND2FIRST, FIRST2SECOND, PositionSwap(name="4 like 2", of=4, like=2))
MASKS = (SeesAll(position=0), SeesAll(position=2), SeesItself(position=3))
FEW = Hyperparameters(steps=4)


@dataclass(frozen=True)
class Causal:
    """Spells the ordinary causal mask out, which must change nothing."""

    name: str = "causal, spelt out"

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return replace(batch, visible=batch.causally_visible())


def without_bos(tiny: TinyFactory, arch: str, dtype: str = "float32") -> Model:
    return tiny(arch, dtype).with_bos(BosPolicy.WITHOUT)


def study_of(model: Model, folder: Path) -> Study:
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=FEW,
        texts=SENTENCES,
        work=folder,
    )


def hand_rotated(vectors: torch.Tensor, ids: torch.Tensor, arch: str) -> torch.Tensor:
    """Rotary embedding written out: pairs of one vector ``[head, pos, width]`` turn by an angle."""
    turned = 4 if arch == "gptj" else vectors.shape[-1]
    result = vectors.clone()
    for pair in range(turned // 2):
        one, other = (2 * pair, 2 * pair + 1) if arch == "gptj" else (pair, pair + turned // 2)
        for pos, position in enumerate(ids.tolist()):
            angle = position / 10000 ** (2 * pair / turned)
            a, b = vectors[:, pos, one], vectors[:, pos, other]
            result[:, pos, one] = a * math.cos(angle) - b * math.sin(angle)
            result[:, pos, other] = b * math.cos(angle) + a * math.sin(angle)
    return result


HAND_WRITTEN = tuple(arch for arch in DECODERS if arch != "gemma3")
"""Architectures whose attention is written out below; Gemma norms queries and keys besides."""


def hand_attention(
    arch: str, module: Any, hidden: torch.Tensor, ids: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """One attention layer of the plain model by hand, for one prompt ``[pos, d_model]``."""
    if arch == "gpt2":
        query, key, value = module.c_attn(hidden).chunk(3, dim=-1)
        heads, width = module.num_heads, module.head_dim
    else:
        query, key, value = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
        width = module.head_dim
        heads = query.shape[-1] // width

    def split(tensor: torch.Tensor) -> torch.Tensor:
        parts = tensor.reshape(len(hidden), -1, width).transpose(0, 1)
        return parts.repeat_interleave(heads // parts.shape[0], dim=0)

    query, key, value = split(query), split(key), split(value)
    if arch != "gpt2":
        query, key = hand_rotated(query, ids, arch), hand_rotated(key, ids, arch)
    scores = query @ key.transpose(1, 2) / width**0.5
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    mixed = (weights @ value).transpose(0, 1).reshape(len(hidden), -1)
    projection = {"gpt2": "c_proj", "gptj": "out_proj"}.get(arch, "o_proj")
    result: torch.Tensor = getattr(module, projection)(mixed)
    return result


def attention_modules(arch: str, plain: Any) -> list[Any]:
    if arch in ("gpt2", "gptj"):
        return [block.attn for block in plain.transformer.h]
    return [block.self_attn for block in plain.model.layers]


@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.name)
def test_learned_swap_is_a_position_table_edited_by_hand(
    swap: PositionSwap, tiny: TinyFactory
) -> None:
    model = without_bos(tiny, "gpt2")
    plain = plain_model(model)
    table = plain.transformer.wpe.weight
    with torch.no_grad():
        table[swap.of] = table[swap.like]
    for prompt in sentence_prompts(model):
        found = logits(model.intervened(swap), pad(model.intervened(swap), [prompt]))[0]
        tokens = alone(prompt)
        expected = plain(tokens, attention_mask=torch.ones_like(tokens)).logits[0]
        usual = logits(model, pad(model, [prompt]))[0]
        assert relative(found, expected) < 1e-5
        assert relative(usual, expected) > 1e-3


@pytest.mark.parametrize("arch", HAND_WRITTEN)
@pytest.mark.parametrize(
    "change", [*SWAPS[:2], *MASKS], ids=lambda change: change.name.replace(" ", "-")
)
def test_every_attention_layer_is_the_one_computed_by_hand(
    change: Intervention, arch: str, tiny: TinyFactory
) -> None:
    model = without_bos(tiny, arch)
    view = model.intervened(change)
    modules = attention_modules(arch, plain_model(model))
    for prompt in sentence_prompts(model):
        batch = pad(view, [prompt])
        names = [
            f"blocks.{i}.attn.{hook}"
            for i in range(len(modules))
            for hook in ("hook_in", "hook_out")
        ]
        seen = capture(view, batch, names, stop_at_layer=None)
        count = len(prompt.token_ids)
        visible = torch.ones(count, count).tril().bool()
        ids = torch.arange(count)
        if isinstance(change, PositionSwap) and change.of < count:
            ids[change.of] = change.like
        elif isinstance(change, SeesAll):
            visible[change.position] = True
        elif isinstance(change, SeesItself):
            visible[change.position] = False
            visible[change.position, change.position] = True
        for layer, module in enumerate(modules):
            hidden = seen[f"blocks.{layer}.attn.hook_in"][0]
            expected = hand_attention(arch, module, hidden, ids, visible)
            assert relative(seen[f"blocks.{layer}.attn.hook_out"][0], expected) < 1e-5


@pytest.mark.parametrize("arch", ROTARY)
def test_second2first_leaves_rotary_first_keys_as_they_are_to_the_bit(
    arch: str, tiny: TinyFactory
) -> None:
    model = without_bos(tiny, arch)
    prompts = sentence_prompts(model)
    for layer in range(model.n_layers):
        assert first_key_change(model, prompts, SECOND2FIRST, layer=layer) == 0.0
    # The swap is no empty act: what comes after the first token does change.
    last = [prompt.last_position for prompt in prompts]
    swapped = keys_at(model.intervened(SECOND2FIRST), prompts, last, layers=[2]).at(2)
    assert relative(swapped, keys_at(model, prompts, last, layers=[2]).at(2)) > 1e-3


def test_second2first_changes_learned_first_keys(tiny: TinyFactory) -> None:
    model = without_bos(tiny, "gpt2")
    assert first_key_change(model, sentence_prompts(model), SECOND2FIRST, layer=0) > 1e-2


@pytest.mark.real_model
def test_second2first_leaves_the_embedded_model_s_first_keys_as_they_are(
    real_model: Model,
) -> None:
    prompts = [text_prompt(real_model, text) for text in SENTENCES]
    first = [0] * len(prompts)
    layers = range(real_model.n_layers)
    swapped = keys_at(real_model.intervened(SECOND2FIRST), prompts, first, layers=layers)
    assert torch.equal(swapped.values, keys_at(real_model, prompts, first, layers=layers).values)


@pytest.mark.parametrize("arch", DECODERS)
def test_a_token_that_sees_itself_only_is_the_token_alone(arch: str, tiny: TinyFactory) -> None:
    model = without_bos(tiny, arch)
    view = model.intervened(SeesItself(position=3))
    for prompt in sentence_prompts(model):
        single = Prompt(text="", token_ids=(prompt.token_ids[3],))
        # A rotary token that attends to itself has no position; a learned one keeps its own.
        own = PositionSwap(name="own position", of=0, like=3)
        lone = model.intervened(own) if arch == "gpt2" else model
        layers = range(model.n_layers)
        found = keys_at(view, [prompt], [3], layers=layers).values
        assert relative(found, keys_at(lone, [single], [0], layers=layers).values) < 1e-5
        assert relative(keys_at(model, [prompt], [3], layers=layers).values, found) > 1e-3


@pytest.mark.parametrize("arch", DECODERS)
def test_masks_that_say_what_is_so_anyway_change_nothing(arch: str, tiny: TinyFactory) -> None:
    model = without_bos(tiny, arch)
    prompt = sentence_prompts(model)[1]
    usual = logits(model, pad(model, [prompt]))
    for change in (Causal(), SeesItself(position=0), SeesAll(position=prompt.last_position)):
        view = model.intervened(change)
        assert relative(logits(view, pad(view, [prompt])), usual) < 1e-5
    view = model.intervened(SeesAll(position=0))
    assert relative(logits(view, pad(view, [prompt])), usual) > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("change", [*SWAPS[:2], *MASKS], ids=lambda change: change.name)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_padding_does_not_matter_to_interventions(
    arch: str, change: Intervention, side: Any, tiny: TinyFactory
) -> None:
    view = without_bos(tiny, arch).intervened(change)
    prompts = [*sentence_prompts(view), text_prompt(view, "I")]
    batch = pad(view, prompts, side=side)
    together = logits(view, batch)
    for row, prompt in enumerate(prompts):
        start, count = int(batch.starts[row]), len(prompt.token_ids)
        single = logits(view, pad(view, [prompt]))[0]
        assert relative(together[row, start : start + count], single) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_values_without_the_prefix_cache_are_the_same(arch: str, tiny: TinyFactory) -> None:
    model = tiny(arch)
    keys = [fact_keys(model, fact, CONTEXTS, layer=1).unprefixed for fact in FACTS[:2]]
    anchors = model.site(1).values_of(torch.stack(keys))
    settings: dict[str, Any] = {
        "contexts": CONTEXTS,
        "slot": Slot.UNPREFIXED,
        "layer": 1,
        "hyperparameters": FEW,
    }
    usual = optimise_values(model, FACTS[:2], anchors, **settings)
    spelt_out = optimise_values(model.intervened(Causal()), FACTS[:2], anchors, **settings)
    for one, other in zip(usual, spelt_out, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
        assert relative(other.target, one.target) < 1e-3
    opened = optimise_values(model.intervened(SeesAll(position=0)), FACTS[:2], anchors, **settings)
    assert opened[0].losses[0] != pytest.approx(usual[0].losses[0], rel=1e-4)


def test_stages_act_where_they_say(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(without_bos(tiny, "gpt2"), tmp_path)
    plain, swapped = study.model, study.model.intervened(SECOND2FIRST)
    views = {
        "none": (plain, plain, plain),
        "keys": (swapped, plain, plain),
        "editing": (swapped, swapped, plain),
        "everything": (swapped, swapped, swapped),
    }
    assert set(views) == set(STAGES)
    found: dict[str, float] = {}
    for stage, (keys_view, value_view, judge) in views.items():
        changed = swapped_study(study, SECOND2FIRST, stage)
        fact = FACTS[0]
        keys = fact_keys(keys_view, fact, CONTEXTS, layer=1)
        anchor = plain.site(1).values_of(keys.unprefixed[None])
        (value,) = optimise_values(
            value_view,
            [fact],
            anchor,
            contexts=CONTEXTS,
            slot=Slot.UNPREFIXED,
            layer=1,
            hyperparameters=FEW,
        )
        left = keys.prefixed_mean / keys.prefixed_mean.norm()
        site = plain.site(1)
        residual = value.target - site.values_of(keys.unprefixed[None])[0]
        update = torch.outer(left, residual / (left @ keys.unprefixed))
        before = site.weight.detach().clone()
        try:
            with torch.no_grad():
                site.weight.add_(site.in_layout(update))
            expected = perplexity(judge, SENTENCES).mean
        finally:
            with torch.no_grad():
                site.weight.copy_(before)
        (row,) = measure_facts(changed, [fact], [ROME])
        assert row.perplexity == pytest.approx(expected, rel=1e-3)
        assert changed.original_perplexity.mean == pytest.approx(
            perplexity(judge, SENTENCES).mean, rel=1e-6
        )
        found[stage] = row.perplexity
    assert len({round(value, 4) for value in found.values()}) == 4
    with pytest.raises(ValueError, match="no stage"):
        swapped_study(study, SECOND2FIRST, "sometimes")


def test_stage_rows_name_their_stage(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(without_bos(tiny, "llama"), tmp_path)
    facts = [replace(fact, case_id=number) for number, fact in enumerate(FACTS[:2])]
    rows = measure_stages(study, facts, FIRST2SECOND)
    assert [row["stage"] for row in rows] == [stage for stage in STAGES for _ in range(2)]


def test_a_source_that_leaves_the_anchor_shares_the_value(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    study = study_of(without_bos(tiny, "llama"), tmp_path)
    first = FACTS[0]
    (usual,) = study.edits([first], [ROME])
    assert study.store is not None
    folder = study.store.folder
    (kept,) = folder.iterdir()
    for swap, shared in ((SECOND2FIRST, True), (SeesAll(position=0), False)):
        source = IntervenedKeys(name="changed", interventions=(swap,))
        (found,) = study.varied(key_source=source).edits([first], [ROME])
        assert (len(list(folder.iterdir())) == 1) == shared
        assert (found[1]["rome"].losses == usual[1]["rome"].losses) == shared
        # The keys are the source's own all the same.
        assert found[1]["rome"].report != usual[1]["rome"].report
    assert kept.is_file()


def test_values_of_different_views_and_sources_lie_apart(tiny: TinyFactory, tmp_path: Path) -> None:
    model = without_bos(tiny, "gpt2")
    store = ValueStore(tmp_path)
    settings: dict[str, Any] = {
        "contexts": CONTEXTS,
        "slot": Slot.UNPREFIXED,
        "layer": 1,
        "hyperparameters": FEW,
    }
    sources = [ORDINARY_KEYS, MaskedKeys(later=False, changed=True), *IDENTITY_CELLS]
    views = [model, model.intervened(SECOND2FIRST), model.intervened(FIRST2SECOND)]
    paths = {
        store.path(view.identity(), FACTS[0], key_source=source, **settings)
        for view in views
        for source in sources
    }
    assert len(paths) == len(sources) * len(views)


def test_provenance_says_what_was_changed_and_where(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(without_bos(tiny, "gpt2"), tmp_path)
    assert "stages" not in study.provenance()
    stages = swapped_study(study, SECOND2FIRST, "editing").provenance()["stages"]
    assert stages["key_source"] == "Second2First keys"
    assert stages["value_interventions"] == ["Second2First"]
    assert stages["evaluation_interventions"] == []
    ((_, edits),) = edits_of(
        study.model.intervened(SECOND2FIRST),
        FACTS[:1],
        methods=[ROME],
        contexts=CONTEXTS,
        second_moment=study.second_moment,
        layer=1,
        hyperparameters=FEW,
        key_source=IntervenedKeys(name="swapped", interventions=(SECOND2FIRST,)),
    )
    assert edits["rome"].provenance["keys"] == "swapped"
    assert edits["rome"].provenance["model"]["interventions"] == ["Second2First"]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_masked_keys_read_the_token_they_name(
    later: bool, changed: bool, tiny: TinyFactory
) -> None:
    model = without_bos(tiny, "llama")
    fact = FACTS[0]
    source = MaskedKeys(later=later, changed=changed)
    found = source.keys(model, fact, CONTEXTS, layer=2)
    assert torch.equal(found.prefixed_mean, fact_keys(model, fact, CONTEXTS, layer=2).prefixed_mean)
    template = CONTEXTS.prefixed[0] if later else "{}"
    prompt = fact_prompt(model, fact, template)
    place = int(positions([prompt])[0])
    assert (place > 0) == later
    change: Intervention = SeesItself(position=place) if later else SeesAll(position=0)
    view = model.intervened(change) if changed else model
    expected = capture_keys(view, [fact], layers=[2], context=template).at(2)[0]
    assert relative(found.unprefixed, expected) < 1e-5
    assert ("sees" in source.name) == changed


@pytest.mark.parametrize("policy", [BosPolicy.WITHOUT, BosPolicy.WITH])
def test_identity_prompts_cross_place_and_space(policy: BosPolicy, tiny: TinyFactory) -> None:
    model = tiny("llama").with_bos(policy)
    tokenizer: Any = model.tokenizer
    fact = Fact(subject="I", template="{} left early", target_new="it", target_true="and")
    assert distinct_with_space(model, [*FACTS, fact]) == [fact]
    shift = len(model.leading_ids)
    prefix = "The answer."
    for cell in IDENTITY_CELLS:
        prompt = identity_prompt(model, fact, cell, prefix="The answer. {}")
        place = prompt.subject_position
        assert place is not None
        before = len(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if cell.later else 0
        assert place == shift + before
        assert tokenizer.decode([prompt.token_ids[place]]) == (" I" if cell.space else "I")
        assert tokenizer.decode(prompt.token_ids[place + 1 :]) == " left early"
        text = (prefix if cell.later else "") + (" " if cell.space else "") + fact.prompt
        assert tokenizer.decode(prompt.token_ids[shift:]) == text
        assert prompt.token_ids[:shift] == model.leading_ids


def test_identity_refuses_subjects_it_cannot_cross(tiny: TinyFactory) -> None:
    model = without_bos(tiny, "llama")
    for fact in FACTS[:3]:
        with pytest.raises(BadInputError, match="begin with a subject"):
            identity_prompt(model, fact, IDENTITY_CELLS[0], prefix="I know. {}")


def test_joined_prompts_keep_tokens_subject_and_one_bos(tiny: TinyFactory) -> None:
    model = tiny("llama").with_bos(BosPolicy.WITH)
    first, second = text_prompt(model, "I know."), fact_prompt(model, FACTS[0])
    joined = join_prompts(model, first, second)
    assert joined.token_ids == first.token_ids + second.token_ids[1:]
    place = joined.subject_position
    assert place is not None
    assert joined.token_ids[place] == second.token_ids[second.subject_position or 0]


def test_token_states_are_residual_norm_and_key(tiny: TinyFactory) -> None:
    for arch in DECODERS:
        model = without_bos(tiny, arch)
        prompts = sentence_prompts(model)
        at = [1] * len(prompts)
        states = token_states(model, prompts, at, layer=1)
        assert relative(states.keys, keys_at(model, prompts, at, layers=[1]).at(1)) < 1e-6
        plain = plain_model(model)
        for index, prompt in enumerate(prompts):
            hidden = plain(alone(prompt), output_hidden_states=True).hidden_states[2][0, 1]
            assert float(states.residual_norms[index]) == pytest.approx(float(hidden.norm()), 1e-5)


def test_bos_study_changes_bos_and_nothing_else(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    assert bos_study(study, BosPolicy.WITHOUT).model is study.model
    with_bos = bos_study(study, BosPolicy.WITH)
    assert with_bos.model.leading_ids == (0,)
    assert with_bos.contexts is study.contexts
    assert with_bos.original_perplexity.mean == pytest.approx(study.original_perplexity.mean)
    same = bos_study(study, BosPolicy.WITH, text_bos=BosPolicy.WITH)
    assert same.original_perplexity.mean == pytest.approx(
        perplexity(study.model, SENTENCES, bos=BosPolicy.WITH).mean
    )
    assert same.original_perplexity.mean != pytest.approx(study.original_perplexity.mean, rel=1e-3)
    (plain,) = measure_facts(study, FACTS[:1], [ROME])
    (behind,) = measure_facts(with_bos, FACTS[:1], [ROME])
    assert plain.first_token
    assert not behind.first_token


def test_interventions_reach_every_batch_of_a_view(tiny: TinyFactory) -> None:
    model = without_bos(tiny, "gpt2")
    view = model.intervened(SECOND2FIRST).intervened(FIRST2SECOND)
    batch = pad(view, sentence_prompts(view))
    assert batch.position_ids[:, :3].tolist() == [[1, 0, 2]] * len(SENTENCES)
    assert pad(model, sentence_prompts(model)).position_ids[0, :3].tolist() == [0, 1, 2]
    assert model.interventions == ()


def test_a_context_is_needed_for_a_later_token(tiny: TinyFactory) -> None:
    fact = Fact(subject="Japan", template="In {} the", target_new="I", target_true="and")
    contexts = ContextSet(templates=("{}", "I know. {}"))
    model = without_bos(tiny, "llama")
    later = MaskedKeys(later=True, changed=False).keys(model, fact, contexts, layer=1)
    expected = capture_keys(model, [fact], layers=[1], context="I know. {}").at(1)[0]
    assert relative(later.unprefixed, expected) < 1e-6


@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_shifted_positions_are_a_shifted_table(arch: str, tiny: TinyFactory) -> None:
    model = without_bos(tiny, arch)
    plain = plain_model(model)
    name = "transformer.wpe" if arch == "gpt2" else "bert.embeddings.position_embeddings"
    table = plain.get_submodule(name).weight
    with torch.no_grad():
        table.copy_(table.roll(-1, dims=0))
    view = model.intervened(PositionShift(by=1))
    for prompt in sentence_prompts(model):
        tokens = alone(prompt)
        expected = plain(tokens, attention_mask=torch.ones_like(tokens)).logits[0]
        assert relative(logits(view, pad(view, [prompt]))[0], expected) < 1e-5
        assert relative(logits(model, pad(model, [prompt]))[0], expected) > 1e-3


@pytest.mark.parametrize("arch", ROTARY)
def test_shifted_positions_do_not_matter_to_rotary_models(arch: str, tiny: TinyFactory) -> None:
    model = without_bos(tiny, arch)
    view = model.intervened(PositionShift(by=1))
    for prompt in sentence_prompts(model):
        shifted = logits(view, pad(view, [prompt]))
        assert relative(shifted, logits(model, pad(model, [prompt]))) < 1e-4


@pytest.mark.parametrize(
    ("arch", "change"),
    [
        ("t5", SECOND2FIRST),
        ("t5", SeesAll()),
        ("bert", SeesAll()),
        ("bert", SeesItself(position=1)),
    ],
)
def test_a_view_refuses_what_its_model_does_not_take(
    arch: str, change: Intervention, tiny: TinyFactory
) -> None:
    view = tiny(arch).intervened(change)
    with pytest.raises(UnsupportedModelError, match=r"nor rotary|no decoder"):
        pad(view, sentence_prompts(view))


def test_a_view_has_a_second_moment_of_its_own(tiny: TinyFactory, own_cache: Path) -> None:
    model = without_bos(tiny, "llama")
    view = model.intervened(SeesAll(position=0))
    changed = compute_second_moment(view, layer=2, corpus=SENTENCES)
    plain = compute_second_moment(model, layer=2, corpus=SENTENCES)
    assert relative(changed.matrix, plain.matrix) > 1e-4
    again = compute_second_moment(view, layer=2, corpus=SENTENCES)
    assert torch.equal(again.matrix, changed.matrix)
    assert len(list(own_cache.rglob("*.safetensors"))) == 2


def test_contexts_are_those_of_the_plain_model(tiny: TinyFactory) -> None:
    model = without_bos(tiny, "gpt2")
    view = model.intervened(SECOND2FIRST)
    assert sample_contexts(view, seed=3).templates == sample_contexts(model, seed=3).templates


def test_equal_names_do_not_make_equal_values(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(without_bos(tiny, "gpt2"), tmp_path)
    found = set[float]()
    for like in (2, 5):
        swap = PositionSwap(name="mine", of=0, like=like)
        (row,) = measure_facts(swapped_study(study, swap, "editing"), FACTS[:1], [ROME])
        found.add(row.perplexity)
    assert len(found) == 2


def test_a_probe_of_one_place_needs_a_prefix() -> None:
    assert CONTEXTS.first_prefix == CONTEXTS.prefixed[0]
    for templates in (("{}",), ("{}", "Before {} behind")):
        with pytest.raises(BadInputError, match="no context puts something before"):
            _ = ContextSet(templates=templates).first_prefix
