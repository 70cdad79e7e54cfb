"""Equation 4 and what goes with it: theorems, naive references, and the embedded model."""

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    DECODERS,
    TinyFactory,
    alone,
    fact_prompts,
    plain_model,
    sentence_prompts,
)

from firsttok.data import builtin_sentences
from firsttok.errors import (
    BadInputError,
    LayerOutOfRangeError,
    NonFiniteError,
    UnsupportedModelError,
)
from firsttok.models import BosPolicy, Model
from firsttok.probes import (
    LayerConcentration,
    concentration,
    effective_rank,
    later_positions,
    mean_distance,
    parts_at,
    spread,
)
from firsttok.prompts import Prompt, text_prompt

FEW = 50
"""Resamples, where the interval is not what is tested."""


def cloud(count: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Random points in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def naive_d(points: torch.Tensor) -> float:
    """Equation 4, term by term."""
    rows = points.double().tolist()
    centre = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    lengths = [sum((x - c) ** 2 for x, c in zip(row, centre, strict=True)) ** 0.5 for row in rows]
    return sum(lengths) / len(lengths)


def numbers(rows: tuple[LayerConcentration, ...]) -> torch.Tensor:
    """All fields of all rows."""
    return torch.tensor([list(asdict(row).values()) for row in rows], dtype=torch.float64)


def keys_alone(model: Model, prompt: Prompt) -> list[torch.Tensor]:
    """Keys ``[pos, d_mlp]`` of each layer, from TransformerLens's own cache."""
    tokens = alone(prompt)
    bridge: Any = model.bridge
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))
    return [cache[model.site(layer).key_hook][0] for layer in range(model.n_layers)]


def states(model: Model, prompt: Prompt) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Residual streams ``[pos, d_model]`` and patterns ``[head, pos, pos]`` of each layer.

    From plain transformers, where the last hidden state has gone through the final norm; the last
    block's own output is taken by a hook.
    """
    plain = plain_model(model)
    if any(site.stack != "blocks" for site in model.sites):
        plain = plain.encoder
    blocks: Any = next(m for m in plain.modules() if isinstance(m, torch.nn.ModuleList))
    last: list[Any] = []
    blocks[-1].register_forward_hook(lambda _module, _args, output: last.append(output))
    tokens = alone(prompt)
    with torch.no_grad():
        found = plain(
            tokens,
            attention_mask=torch.ones_like(tokens),
            output_hidden_states=True,
            output_attentions=True,
        )
    final = last[0][0] if isinstance(last[0], tuple) else last[0]
    residuals = [*found.hidden_states[1 : len(blocks)], final]
    return [state[0] for state in residuals], [pattern[0] for pattern in found.attentions]


@pytest.mark.parametrize(("count", "width"), [(2, 1), (7, 3), (30, 50)])
def test_d_equals_equation_4_term_by_term(count: int, width: int) -> None:
    points = cloud(count, width)
    assert mean_distance(points) == pytest.approx(naive_d(points), rel=1e-12)


def test_d_ignores_translation_and_scales_linearly() -> None:
    points = cloud(20, 8)
    expected = mean_distance(points)
    assert mean_distance(points + 1000 * cloud(1, 8, seed=1)) == pytest.approx(expected, rel=1e-9)
    for factor in (0.0, 1e-3, -7.0, 1e6):
        assert mean_distance(factor * points) == pytest.approx(abs(factor) * expected, rel=1e-9)


def test_d_of_equal_points_is_zero_and_of_a_pair_half_its_distance() -> None:
    assert mean_distance(torch.full((9, 4), 22977.0)) == 0
    assert spread(torch.full((9, 4), 22977.0)).high == 0
    assert mean_distance(torch.tensor([[0.0, 0.0], [6.0, 8.0]])) == 5


def test_d_of_massive_values_in_half_precision_is_exact() -> None:
    points = torch.tensor([[60000.0, 0.0], [60000.0, 512.0]], dtype=torch.float16)
    assert mean_distance(points) == 256


@pytest.mark.parametrize("resamples", [40, 250])
def test_the_interval_is_that_of_resamples_with_a_centroid_of_their_own(resamples: int) -> None:
    points = cloud(12, 5) + 100
    draws = torch.randint(12, (resamples, 12), generator=torch.Generator().manual_seed(3))
    values = torch.tensor([naive_d(points[draw]) for draw in draws], dtype=torch.float64)
    found = spread(points, resamples=resamples, seed=3)
    assert found.value == pytest.approx(naive_d(points), rel=1e-12)
    assert found.low == pytest.approx(float(values.quantile(0.025)), rel=1e-9)
    assert found.high == pytest.approx(float(values.quantile(0.975)), rel=1e-9)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = mean_distance(cloud(200_000, 3, seed=10**6))
    hits = 0
    for seed in range(200):
        found = spread(cloud(60, 3, seed=seed), resamples=200, seed=seed)
        hits += found.low <= truth <= found.high
    assert 0.88 <= hits / 200 <= 0.98


def test_intervals_narrow_with_the_number_of_points() -> None:
    few, many = spread(cloud(20, 4)), spread(cloud(500, 4))
    assert many.high - many.low < (few.high - few.low) / 2
    assert many.low < many.value < many.high
    assert spread(cloud(500, 4)) == many
    assert spread(cloud(500, 4), seed=1) != many


@pytest.mark.parametrize("count", [0, 1])
def test_the_spread_of_less_than_two_points_is_refused(count: int) -> None:
    with pytest.raises(BadInputError, match=f"distances of {count} points"):
        spread(torch.ones(count, 3))


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("width", [8, 40])
def test_effective_rank_of_equal_orthogonal_directions_is_their_number(k: int, width: int) -> None:
    basis = torch.linalg.qr(cloud(width, width))[0][:k]
    points = torch.cat([basis, -basis]) * 3 + 17
    assert effective_rank(points) == pytest.approx(k, rel=1e-6)
    assert effective_rank(points.repeat(5, 1)) == pytest.approx(k, rel=1e-6)


def test_effective_rank_weighs_directions_by_their_singular_values() -> None:
    points = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    entropy = float(-(shares * shares.log()).sum())
    assert effective_rank(points) == pytest.approx(torch.tensor(entropy).exp().item(), rel=1e-6)


def test_effective_rank_equals_that_of_a_plain_decomposition_and_has_its_bounds() -> None:
    for count, width in ((10, 200), (200, 10)):
        points = cloud(count, width)
        values = torch.linalg.svdvals(points - points.mean(0))
        shares = values / values.sum()
        expected = float(torch.special.entr(shares).sum().exp())
        assert effective_rank(points) == pytest.approx(expected, rel=1e-5)
        assert effective_rank(-4 * points + 9) == pytest.approx(expected, rel=1e-5)
        assert expected <= min(count - 1, width)


def test_points_equal_but_for_rounding_have_no_rank() -> None:
    points = (22977 * (1 + 1e-7 * cloud(30, 50))).float()
    assert mean_distance(points) > 0
    assert effective_rank(points) == 0
    assert effective_rank(torch.zeros(4, 3)) == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_distances_equal_equation_4_over_keys_of_prompts_run_alone(
    tiny: TinyFactory, arch: str
) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)[::3]
    rows = concentration(model, prompts, resamples=FEW)
    assert [row.layer for row in rows] == list(range(model.n_layers))
    of_prompts = [keys_alone(model, prompt) for prompt in prompts]
    end = -len(model.trailing_ids) or None
    for row in rows:
        read = [layers[row.layer][:end] for layers in of_prompts]
        first = torch.stack([keys[0] for keys in read])
        later = torch.cat([keys[1:] for keys in read])
        assert (row.n_first, row.n_subsequent) == (len(first), len(later))
        assert row.d_subsequent == pytest.approx(naive_d(later), rel=1e-5)
        assert row.d_first == pytest.approx(naive_d(first), rel=1e-5, abs=1e-5)
        interval = spread(later, resamples=FEW)
        assert row.d_subsequent_low == pytest.approx(interval.low, rel=1e-4)
        assert row.d_subsequent_high == pytest.approx(interval.high, rel=1e-4)
    assert rows[0].distinct_first == len({prompt.token_ids[0] for prompt in prompts})


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_attention_and_shares_equal_those_of_plain_transformers(
    tiny: TinyFactory, arch: str, place: int
) -> None:
    model = tiny(arch)
    prompts = sentence_prompts(model)
    rows = concentration(model, prompts, place=place, resamples=FEW)
    alone_states = [states(model, prompt) for prompt in prompts]
    end = -len(model.trailing_ids) or None
    for row in rows:
        residuals = [found[0][row.layer].double() for found in alone_states]
        patterns = [found[1][row.layer].double() for found in alone_states]
        first = torch.stack([state[place] for state in residuals])
        later = torch.cat([state[place + 1 : end] for state in residuals])
        assert row.residual_first == pytest.approx(float(first.norm(dim=1).mean()), rel=1e-5)
        assert row.residual_subsequent == pytest.approx(float(later.norm(dim=1).mean()), rel=1e-5)
        paid = torch.cat([pattern[:, place + 1 : end, place].mean(0) for pattern in patterns])
        assert row.attention_to_first == pytest.approx(float(paid.mean()), rel=1e-5)
        shares = [(own**2 / (own**2).sum(1, keepdim=True)).mean(0) for own in (first, later)]
        assert row.massive_dimension == int(shares[0].argmax())
        assert row.massive_share == pytest.approx(float(shares[0].max()), rel=1e-5)
        other = float(shares[1][row.massive_dimension])
        assert row.massive_share_subsequent == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_number_depends_on_batch_size_or_padding(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    assert len({len(prompt.token_ids) for prompt in prompts}) > 3
    together = numbers(concentration(model, prompts, resamples=FEW))
    for max_tokens in (1, 70):
        apart = numbers(concentration(model, prompts, resamples=FEW, max_tokens=max_tokens))
        torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_effective_ranks_are_compared_over_equal_numbers(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    prompts = sentence_prompts(model)
    for row in concentration(model, prompts, resamples=FEW):
        assert row.n_subsequent > 5 * row.n_first
        # Random keys span all the directions their number allows, less one for the centroid.
        assert row.effective_rank_subsequent <= row.n_first - 1 + 1e-6
        assert row.effective_rank_first == pytest.approx(row.effective_rank_subsequent, rel=0.3)


def test_the_end_token_of_an_encoder_is_no_subsequent_token(tiny: TinyFactory) -> None:
    for arch, ends in (("bert", 1), ("gpt2", 0)):
        model = tiny(arch)
        prompt = text_prompt(model, "England is")
        last = prompt.last_position
        assert later_positions(model, prompt, 0) == range(1, last + 1 - ends)
        bare = replace(prompt, token_ids=prompt.token_ids[: last + 1 - ends])
        assert later_positions(model, bare, 1) == range(2, last + 1 - ends)


def test_the_encoder_of_an_encoder_decoder_is_read(tiny: TinyFactory) -> None:
    model = tiny("t5")
    prompts = sentence_prompts(model)
    named = concentration(model, prompts, stack="encoder_blocks", resamples=FEW)
    assert named == concentration(model, prompts, resamples=FEW)
    with pytest.raises(UnsupportedModelError, match="measure its encoder"):
        concentration(model, prompts, stack="decoder_blocks")


def test_a_layer_is_measured_the_same_beside_others_and_blocks_above_do_not_run(
    tiny: TinyFactory,
) -> None:
    model = tiny("llama")
    prompts = sentence_prompts(model)
    every = concentration(model, prompts, resamples=FEW)
    bridge: Any = model.bridge
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(bridge.blocks)
    ]
    try:
        some = concentration(model, prompts, layers=iter([2, 0]), resamples=FEW)
    finally:
        for handle in handles:
            handle.remove()
    assert [row.layer for row in some] == [2, 0]
    torch.testing.assert_close(numbers(some), numbers((every[2], every[0])), rtol=1e-5, atol=1e-6)
    assert set(ran) == {0, 1, 2}


@pytest.mark.parametrize("arch", DECODERS)
def test_bos_is_one_point_and_the_place_behind_it_is_the_text(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch).with_bos(BosPolicy.WITH)
    prompts = [text_prompt(model, text) for text in ("England is", "Rome was", "I know it", "no")]
    at_bos = concentration(model, prompts, resamples=FEW)
    behind = concentration(model, prompts, place=1, resamples=FEW)
    for bos, text in zip(at_bos, behind, strict=True):
        assert bos.distinct_first == 1
        assert bos.d_first < 1e-4
        assert bos.effective_rank_first == 0
        assert text.distinct_first == 4
        assert text.d_first > 0.1
        assert bos.n_subsequent == text.n_first + text.n_subsequent


def test_first_tokens_alone_in_a_causal_model_depend_on_nothing_else(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    pairs = [("England is", "England was not so"), ("Rome I", "Rome, the city")]
    one, other = (
        concentration(model, [text_prompt(model, pair[i]) for pair in pairs], resamples=FEW)
        for i in range(2)
    )
    for row, changed in zip(one, other, strict=True):
        assert row.d_first == pytest.approx(changed.d_first, rel=1e-5)
        assert row.residual_first == pytest.approx(changed.residual_first, rel=1e-5)
        assert row.d_subsequent != pytest.approx(changed.d_subsequent, rel=1e-3)


def test_many_subsequent_tokens_are_drawn_with_the_seed(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    prompts = fact_prompts(model)

    def drawn(count: int, seed: int = 0) -> LayerConcentration:
        (row,) = concentration(
            model, prompts, layers=[1], max_subsequent=count, resamples=FEW, seed=seed
        )
        return row

    total = sum(len(prompt.token_ids) - 1 for prompt in prompts)
    assert drawn(10**6).n_subsequent == total
    assert drawn(total) == drawn(10**6)
    assert drawn(40).n_subsequent == 40
    assert drawn(40) == drawn(40)
    assert drawn(40).d_subsequent != drawn(40, seed=1).d_subsequent
    assert drawn(40).d_first == drawn(10**6).d_first
    assert drawn(40).d_subsequent == pytest.approx(drawn(total).d_subsequent, rel=0.2)


def test_a_massive_activation_is_found_in_half_precision(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float16")
    bias = model.site(1).bias
    assert bias is not None
    before = bias.detach().clone()
    with torch.no_grad():
        bias[5] = 3000.0
    try:
        prompts = sentence_prompts(model)
        low, high = concentration(model, prompts, layers=[0, 1], resamples=FEW)
    finally:
        with torch.no_grad():
            bias.copy_(before)
    # 3000 squared is infinite in float16.
    assert high.massive_dimension == 5
    assert high.massive_share > 0.99
    assert high.massive_share_subsequent > 0.99
    assert high.residual_first == pytest.approx(3000, rel=0.01)
    assert low.residual_first < 100


def test_an_activation_that_is_not_finite_is_refused(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    weight = model.site(0).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.inf)
    try:
        with pytest.raises(NonFiniteError, match="load the model in float32"):
            concentration(model, sentence_prompts(model), layers=[1], resamples=FEW)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def rows_of(
    *intervals: tuple[tuple[float, float], tuple[float, float]],
) -> list[LayerConcentration]:
    """Layers with given intervals of D(F) and D(S), and nothing else of interest."""
    blank: dict[str, Any] = {
        field.name: 0 if field.type in (int, "int") else 0.0 for field in fields(LayerConcentration)
    }
    empty = LayerConcentration(**blank)
    return [
        replace(
            empty,
            layer=layer,
            d_first_low=first[0],
            d_first_high=first[1],
            d_subsequent_low=later[0],
            d_subsequent_high=later[1],
        )
        for layer, (first, later) in enumerate(intervals)
    ]


def test_parts_at_is_where_disjoint_intervals_begin_to_stay() -> None:
    apart, touching, above = (
        ((1.0, 2.0), (3.0, 4.0)),
        ((1.0, 3.0), (3.0, 4.0)),
        ((5.0, 6.0), (3.0, 4.0)),
    )
    assert parts_at(rows_of(touching, apart, apart)) == 1
    assert parts_at(rows_of(apart, touching, apart, apart)) == 2
    assert parts_at(rows_of(apart, above, apart)) == 2
    assert parts_at(rows_of(apart, apart)) == 0
    assert parts_at(rows_of(apart, apart, touching)) is None
    assert parts_at(rows_of(above, above)) is None
    assert parts_at([]) is None
    assert parts_at(rows_of(touching, apart, apart)[::-1]) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, prompts: concentration(model, prompts, place=40), "none at position 40"),
        (lambda model, prompts: concentration(model, prompts, place=-1), "none at position -1"),
        (lambda model, prompts: concentration(model, []), "0 first and 0 subsequent"),
        (lambda model, prompts: concentration(model, prompts[:1]), "1 first"),
        (lambda model, prompts: concentration(model, prompts, layers=[]), "no layer"),
        (
            lambda model, prompts: concentration(model, [text_prompt(model, "a")] * 3),
            "3 first and 0 subsequent",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tiny: TinyFactory, call: Callable[[Model, list[Prompt]], object], message: str
) -> None:
    model = tiny("gpt2")
    with pytest.raises(BadInputError, match=message):
        call(model, sentence_prompts(model))


def test_a_layer_that_is_not_there_is_named(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with pytest.raises(LayerOutOfRangeError, match="no layer 9"):
        concentration(model, sentence_prompts(model), layers=[9])


@pytest.mark.real_model
def test_first_tokens_of_the_embedded_model_are_concentrated(real_model: Model) -> None:
    sentences = builtin_sentences()[:20]
    prompts = [text_prompt(real_model, text) for text in sentences]
    rows = concentration(real_model, prompts, layers=[0, 12, 15], max_subsequent=400)
    start, twelve, fifteen = rows
    assert 0.01 < fifteen.d_first < 0.06
    assert fifteen.d_subsequent > 5
    assert start.d_first > 1
    assert twelve.residual_first > 20_000
    assert twelve.residual_subsequent < 300
    assert fifteen.massive_share > 0.5 > fifteen.massive_share_subsequent
    assert parts_at(rows) == 12
