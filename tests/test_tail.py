"""A replay of the upper blocks is the full pass, with and without a cut."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    LAYERS,
    SENTENCES,
    TinyFactory,
    build,
    fact_prompts,
    relative,
    sentence_prompts,
)

from firsttok.engine.forward import call_arguments
from firsttok.engine.replay import find_replay
from firsttok.engine.tail import Replay
from firsttok.errors import LayerOutOfRangeError, UnsupportedModelError
from firsttok.evaluation import score_edits
from firsttok.exploration import prepare_study
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model, capture_tail, load, logits
from firsttok.probes import SeesAll
from firsttok.prompts import Prompt, fact_prompt, pad, positions, with_target
from firsttok.second_moment import SecondMoment
from firsttok.tensors import TokenBatch

SHORTCUTS = dict.fromkeys(DECODERS, (Replay.ABOVE, Replay.FROM)) | {"gemma3": (Replay.FROM,)}
"""What gives the same as a whole pass."""


def batch_with_cut(model: Model, prompts: list[Prompt]) -> tuple[TokenBatch, int]:
    """Prompts aligned at their subjects, and the column of these."""
    return pad(model, prompts, side="subject"), int(positions(prompts).max())


def some_prompts(model: Model) -> list[Prompt]:
    """Subjects at position 0 beside subjects after long prefixes."""
    return fact_prompts(model)[::2]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_equals_the_full_pass(tiny: TinyFactory, arch: str, layer: int) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model))
    where = batch.attention_mask.bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=layer).logits(model.bridge, where)
    assert relative(found, logits(model, batch)[where]) < 1e-5


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_behind_a_cut_equals_the_full_pass(tiny: TinyFactory, arch: str, layer: int) -> None:
    model = tiny(arch)
    batch, cut = batch_with_cut(model, some_prompts(model))
    assert cut > 0
    assert int(batch.starts.max()) in (cut, cut - len(model.leading_ids))
    where = batch.attention_mask[:, cut:].bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=layer, cut=cut).logits(model.bridge, where)
    assert relative(found, logits(model, batch)[:, cut:][where]) < 1e-5


@pytest.mark.parametrize("cut", [0, None])
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_of_some_rows_equals_the_full_pass(
    tiny: TinyFactory, arch: str, cut: int | None
) -> None:
    model = tiny(arch)
    prompts = some_prompts(model)
    batch, first = batch_with_cut(model, prompts)
    cut = first if cut is None else cut
    rows = torch.tensor([0, 3, 4])
    where = batch.attention_mask[rows, cut:].bool()
    with torch.no_grad():
        tail = capture_tail(model, batch, layer=1, cut=cut)
        found = tail.rows(rows).logits(model.bridge, where)
    assert relative(found, logits(model, batch)[rows, cut:][where]) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_rows_are_told_from_columns_when_there_are_as_many(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    prompts = sentence_prompts(model)
    width = max(len(prompt.token_ids) for prompt in prompts)
    square = [prompts[i % len(prompts)] for i in range(width)]
    batch = pad(model, square)
    assert batch.tokens.shape == (width, width)
    rows = torch.tensor([1, 4, 2])
    where = batch.attention_mask[rows].bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=1).rows(rows).logits(model.bridge, where)
    assert relative(found, logits(model, batch)[rows][where]) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_a_tail_of_one_row_can_be_narrowed(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model)[:1])
    rows = torch.tensor([0])
    where = batch.attention_mask.bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=2).rows(rows).logits(model.bridge, where)
    assert relative(found, logits(model, batch)[where]) < 1e-5


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("arch", DECODERS)
def test_replay_follows_a_hook_at_the_cut(tiny: TinyFactory, arch: str, layer: int) -> None:
    model = tiny(arch)
    batch, cut = batch_with_cut(model, some_prompts(model))
    site = model.site(layer)
    delta = torch.linspace(-2, 2, site.d_model)

    def add(output: torch.Tensor, hook: object) -> torch.Tensor:
        output = output.clone()
        output[:, cut] += delta
        return output

    where = batch.attention_mask[:, cut:].bool()
    bridge: Any = model.bridge
    with torch.no_grad():
        full = bridge.run_with_hooks(
            batch.tokens, fwd_hooks=[(site.value_hook, add)], **call_arguments(model.bridge, batch)
        )[:, cut:][where]
        for replay in SHORTCUTS[arch]:
            tail = capture_tail(model, batch, layer=layer, cut=cut, replay=replay)
            change = torch.zeros_like(tail.residual)
            change[:, 0] = delta
            found = tail.logits(model.bridge, where, change)
            assert relative(found, full) < 1e-5
            assert relative(tail.logits(model.bridge, where), full) > 1e-3


@pytest.mark.parametrize("arch", DECODERS)
def test_a_whole_pass_gives_the_same(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model))
    where = batch.attention_mask.bool()
    with torch.no_grad():
        found = [
            capture_tail(model, batch, layer=1, replay=replay)
            for replay in (Replay.WHOLE, *SHORTCUTS[arch])
        ]
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(found[0].residual.shape, generator=generator)
        whole, *others = (tail.logits(model.bridge, where, change) for tail in found)
    assert all(relative(other, whole) < 1e-5 for other in others)
    # At padding, there is no key.
    assert all(torch.allclose(tail.keys[where], found[0].keys[where], atol=1e-5) for tail in found)


@pytest.mark.parametrize("arch", DECODERS)
def test_a_rank_one_change_is_that_of_the_weights(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model))
    where = batch.attention_mask.bool()
    site = model.site(1)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(site.d_mlp, generator=generator)
    right = torch.randn(site.d_model, generator=generator)
    tail = capture_tail(model, batch, layer=1)
    before = site.weight.detach().clone()
    with torch.no_grad():
        found = tail.logits(model.bridge, where, (tail.keys @ left)[..., None] * right)
        site.weight.add_(site.in_layout(torch.outer(left, right)))
        try:
            expected = logits(model, batch)[where]
        finally:
            site.weight.copy_(before)
    assert relative(found, expected) < 1e-4
    assert relative(logits(model, batch)[where], expected) > 1e-2


@pytest.mark.parametrize("arch", DECODERS)
def test_logits_come_in_chunks_of_any_size(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch = pad(model, sentence_prompts(model))
    where = batch.attention_mask.bool()
    with torch.no_grad():
        for replay in Replay:
            tail = capture_tail(model, batch, layer=1, replay=replay)
            chunks = list(tail.logit_chunks(model.bridge, where, size=7))
            assert {len(chunk) for chunk in chunks[:-1]} == {7}
            expected = tail.logits(model.bridge, where)
            assert relative(torch.cat(chunks), expected) < 1e-5
            again = tail.logit_chunks(model.bridge, where, size=7, overwrite=True)
            assert relative(torch.cat([chunk.clone() for chunk in again]), expected) < 1e-5


@pytest.mark.parametrize("arch", DECODERS)
def test_a_tail_can_be_replayed_again(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    batch, cut = batch_with_cut(model, some_prompts(model))
    where = batch.attention_mask[:, cut:].bool()
    with torch.no_grad():
        tail = capture_tail(model, batch, layer=1, cut=cut)
        first = tail.logits(model.bridge, where)
        second = tail.logits(model.bridge, where)
    assert torch.equal(first, second)


@pytest.mark.parametrize("arch", DECODERS)
def test_capture_leaves_no_hook_behind(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    bridge: Any = model.bridge

    def state() -> list[object]:
        parts = [*bridge.blocks, bridge.ln_final]
        hooks = [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in parts]
        return [hooks, ["forward" in vars(part) for part in parts]]

    before = state()
    batch, cut = batch_with_cut(model, some_prompts(model))
    for replay in (Replay.ABOVE, Replay.FROM):
        capture_tail(model, batch, layer=0, cut=cut, replay=replay)
    capture_tail(model, pad(model, sentence_prompts(model)), layer=0, replay=Replay.WHOLE)
    assert state() == before
    with pytest.raises(LayerOutOfRangeError):
        capture_tail(model, batch, layer=99)
    broken = replace(batch, tokens=batch.tokens + 100_000)
    for replay in Replay:
        with pytest.raises(IndexError):
            capture_tail(model, broken, layer=0, replay=replay)
    assert state() == before


def test_an_encoder_decoder_has_no_tail(tiny: TinyFactory) -> None:
    model = tiny("t5")
    with pytest.raises(UnsupportedModelError, match="not a decoder"):
        capture_tail(model, pad(model, sentence_prompts(model)), layer=0)


def test_a_tail_keeps_no_graph(tiny: TinyFactory) -> None:
    model = tiny("llama")
    batch, cut = batch_with_cut(model, some_prompts(model))
    tail = capture_tail(model, batch, layer=1, cut=cut)
    assert not tail.residual.requires_grad
    assert not any(part.requires_grad for pair in tail.past for part in pair)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("arch", DECODERS)
def test_a_trial_finds_what_has_to_run_again(tiny: TinyFactory, arch: str, dtype: str) -> None:
    # Gemma has a norm after the MLP.
    expected = Replay.FROM if arch == "gemma3" else Replay.ABOVE
    assert find_replay(tiny(arch, dtype).bridge) is expected


@pytest.mark.parametrize("arch", DECODERS)
def test_the_trial_is_made_once(
    tiny: TinyFactory, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(arch)
    model.weights.findings.pop("replay", None)
    calls: list[object] = []

    def trial(bridge: Any) -> Replay:
        calls.append(bridge)
        return find_replay(bridge)

    monkeypatch.setattr("firsttok.models.model.find_replay", trial)
    found = model.replay
    views = [model, model.with_bos(BosPolicy.WITHOUT), model.intervened(SeesAll())]
    assert all(view.replay is found for view in views)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_logit_cap_is_seen_whatever_the_type(tmp_path: Path, dtype: str) -> None:
    build("gemma2", tmp_path)
    assert load(str(tmp_path), dtype=dtype).replay is Replay.WHOLE


def test_a_full_device_is_not_taken_for_an_odd_model(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("firsttok.engine.replay.capture_tail", full)
    with pytest.raises(torch.OutOfMemoryError):
        find_replay(tiny("llama").bridge)


def test_a_model_no_shortcut_is_right_for_runs_whole_and_says_so(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    bridge: Any = model.bridge
    # The logits are scaled after the unembedding, where a replay does not see it.
    plain = bridge.original_model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(bridge.original_model, "forward", scaled)
    with caplog.at_level("WARNING"):
        assert find_replay(bridge) is Replay.WHOLE
    assert "the logits are others" in caplog.text
    assert "runs the whole model" in caplog.text


def test_a_replay_keeps_to_a_sliding_window(tmp_path: Path) -> None:
    build("gemma3", tmp_path, window=8)
    model = load(str(tmp_path))
    batch, cut = batch_with_cut(model, some_prompts(model))
    assert batch.tokens.shape[1] > 2 * 8
    where = batch.attention_mask[:, cut:].bool()
    with torch.no_grad():
        found = capture_tail(model, batch, layer=1, cut=cut).logits(model.bridge, where)
    assert relative(found, logits(model, batch)[:, cut:][where]) < 1e-5


def test_a_mask_is_not_changed_beyond_a_sliding_window(tmp_path: Path) -> None:
    build("gemma3", tmp_path, window=8)
    model = load(str(tmp_path)).intervened(SeesAll())
    short, *_, long = sorted(sentence_prompts(model), key=lambda prompt: len(prompt.token_ids))
    assert pad(model, [short]).visible is not None
    with pytest.raises(UnsupportedModelError, match="no further back than 8 tokens"):
        pad(model, [long])


def measured(model: Model, work: Path) -> list[float]:
    """Keys, a value, an edit's vectors, perplexity and scores of a model, as numbers."""
    study = prepare_study(
        model,
        layer=1,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        hyperparameters=Hyperparameters(steps=3),
        texts=SENTENCES[:2],
        work=work,
    )
    ((_, edits),) = study.edits(FACTS[:1], ["rome", "c-rome"])
    found = [float(x) for edit in edits.values() for x in (*edit.left, *edit.right, *edit.losses)]
    found += [each.mean for each in study.perplexities(list(edits.values()))]
    prompts = [with_target(model, fact_prompt(model, FACTS[0]), FACTS[0].target_new)]
    for scores in score_edits(model, prompts, list(edits.values())):
        found += [score.nll for score in scores]
    return found


def test_no_fast_path_is_taken_where_all_are_off_and_the_numbers_are_the_same(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arch in DECODERS:
        model = tiny(arch)
        fast = measured(model, tmp_path / arch)
        identity = model.identity()
        with monkeypatch.context() as patch:
            patch.setenv("FIRSTTOK_PLAIN", "1")
            for module, name in FAST:
                patch.setattr(import_module(f"firsttok.engine.{module}"), name, refuse)
            assert model.replay is Replay.WHOLE
            assert model.identity() != identity
            plain = measured(model, tmp_path / arch)
        assert plain == pytest.approx(fast, rel=1e-3, abs=1e-5)
        assert model.identity() == identity


FAST = [
    *(("tail", name) for name in ("run_packed", "_mlp_only_at")),
    *(("fused", name) for name in ("run_packed", "linear", "linear_into")),
    ("replay", "_seen_packed"),
    ("replay", "_prefix_pass"),
    ("products", "_product"),
]


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a fast path was taken")
