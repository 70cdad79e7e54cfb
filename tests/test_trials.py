"""What is asked of a model is obeyed or refused: masks and position ids, on every architecture.

Whether an architecture obeys is found here by replacing tokens on the whole model, and by the plain
Hugging Face model; the trial itself looks at gradients of one block.
"""

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    CONTEXTS,
    DECODERS,
    FACTS,
    HYBRIDS,
    SENTENCES,
    TinyFactory,
    alone,
    build,
    load_tiny,
    plain_model,
    relative,
    sentence_prompts,
)

from firsttok.data import Fact
from firsttok.editing import ROME, compute_edit
from firsttok.engine import trials
from firsttok.engine.trials import Change, Trials, changes_of
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation import perplexity
from firsttok.exploration import prepare_study
from firsttok.keys import IntervenedKeys, capture_keys, fact_keys, keys_at
from firsttok.models import BosPolicy, Model, capture, load, logits
from firsttok.probes import (
    FIRST2SECOND,
    SECOND2FIRST,
    MaskedKeys,
    PositionShift,
    PositionSwap,
    SeesAll,
    SeesItself,
    measure_stages,
    token_states,
)
from firsttok.probing import probe
from firsttok.prompts import Prompt, pad, text_prompt
from firsttok.second_moment import SecondMoment
from firsttok.tensors import Intervention, TokenBatch

MORE = ("gptneo", "falcon", "falcon_alibi", "gemma2", "smollm3", *HYBRIDS)
"""Decoders whose attention has something of its own: a mask, ALiBi, soft caps, none at all."""
MASKS: tuple[Intervention, ...] = (
    SeesAll(position=0),
    SeesAll(position=2),
    SeesItself(position=3),
)
MOVES: tuple[PositionSwap, ...] = (
    SECOND2FIRST,
    FIRST2SECOND,
    PositionSwap(name="4 like 2", of=4, like=2),
)
REFUSED = {
    "gptneo": {"sees all": "layer 0 .* later one .* causal mask of its own"},
    "falcon_alibi": {
        "sees": "ALiBi distances are made from a mask for each token",
        "2": "position embedding is alibi, neither learned nor rotary",
    },
    "bamba": {"sees": "layer 0 .* mixer"},
    "jamba": {"sees": "layer 0 .* mixer", "2": "position embedding is none"},
    "lfm2": {"sees": "layer 0 .* conv"},
    # Its attention stands beside the state space, so that a token is reached from later ones.
    "falcon_h1": {"sees itself": "layer 0 .* mamba"},
    "t5": {"sees": "no decoder", "2": "relative_positional_bias, neither learned nor rotary"},
    "bert": {"sees": "no decoder"},
}
"""By architecture: what an intervention's name has in it, and what the sentence must say then."""


@dataclass(frozen=True)
class Told:
    """An intervention made of a function, for what can go wrong."""

    does: Callable[[TokenBatch], Any]
    name: str = "told"

    def __call__(self, batch: TokenBatch) -> Any:
        return self.does(batch)


def without_bos(tiny: TinyFactory, arch: str, dtype: str = "float32") -> Model:
    return tiny(arch, dtype).with_bos(BosPolicy.WITHOUT)


def untried(view: Model) -> Model:
    """The view as it would be without any trial."""

    @dataclass(frozen=True, eq=False)
    class Trusting(Trials):
        def obstacle(self, bridge: Any, usual: TokenBatch, changed: TokenBatch) -> None:
            del bridge, usual, changed

    return replace(view, trials=Trusting())


def sentence_of(arch: str, change: Intervention) -> str | None:
    """What must be said of a change; None if it is to be obeyed."""
    return next((text for part, text in REFUSED.get(arch, {}).items() if part in change.name), None)


def breaks_the_law(view: Model, prompt: Prompt) -> bool:
    """Whether, after some block, a token does not depend on just what it may depend on.

    A token is replaced. Behind block L, those that it reaches in L + 1 steps may change and no
    others; those that attend to it change after the first block.
    """
    batch = pad(view, [prompt])
    assert batch.visible is not None
    visible = batch.visible[0]
    count = len(prompt.token_ids)
    names = [view.site(layer).residual_hook for layer in range(view.n_layers)]
    rows = batch.rows(torch.zeros(count + 1, dtype=torch.long))
    places = torch.arange(count)
    rows.tokens[places, places] = (rows.tokens[places, places] + 31) % 400
    seen = capture(view, rows, names, stop_at_layer=None)
    reached = torch.eye(count, dtype=torch.bool)
    for layer, name in enumerate(names):
        states = seen[name].double()
        changes = (states[:-1] - states[-1]).norm(dim=-1) / states[-1].norm(dim=-1)
        reached = (visible.float() @ reached.float()) > 0
        # Rows are replaced tokens, columns those that may change.
        if bool((changes.T[~reached] > 1e-5).any()):
            return True
        if layer == 0 and bool((changes.T[visible] < 1e-5).any()):
            return True
    return False


@pytest.mark.parametrize("change", MASKS, ids=lambda change: change.name.replace(" ", "-"))
@pytest.mark.parametrize("arch", [*ARCHITECTURES, *MORE])
def test_a_mask_is_obeyed_or_refused(arch: str, change: Intervention, tiny: TinyFactory) -> None:
    view = without_bos(tiny, arch).intervened(change)
    prompt = sentence_prompts(view)[0]
    expected = sentence_of(arch, change)
    if expected is None:
        assert not breaks_the_law(view, prompt)
        return
    with pytest.raises(UnsupportedModelError, match=expected):
        pad(view, [prompt])
    # Refused for a reason: nobody who was not told would have noticed.
    if "no decoder" not in expected:
        try:
            assert breaks_the_law(untried(view), prompt)
        except ValueError as error:
            assert "falcon_alibi" in arch, error  # noqa: PT017


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *MORE, "roberta"])
def test_position_ids_are_obeyed_or_refused(arch: str, tiny: TinyFactory) -> None:
    model = without_bos(tiny, arch)
    plain = plain_model(model)
    for change in MOVES:
        view = model.intervened(change)
        prompt = sentence_prompts(view)[0]
        expected = sentence_of(arch, change)
        if expected is not None:
            with pytest.raises(UnsupportedModelError, match=expected):
                pad(view, [prompt])
            continue
        found = logits(view, pad(view, [prompt]))[0]
        ids = torch.arange(len(prompt.token_ids)) + model.first_position
        ids[change.of] = change.like + model.first_position
        tokens = alone(prompt)
        reference = plain(tokens, attention_mask=torch.ones_like(tokens), position_ids=ids[None])
        assert relative(found, reference.logits[0]) < 1e-5
        assert relative(found, logits(model, pad(model, [prompt]))[0]) > 1e-4


@pytest.mark.parametrize("arch", [*DECODERS, "falcon", "gemma2", "smollm3"])
def test_order_is_in_positions_and_mask_alone(arch: str, tiny: TinyFactory) -> None:
    """Tokens in another order, with their ids and what they see, have the same logits."""
    model = without_bos(tiny, arch)
    prompt = sentence_prompts(model)[1]
    count = len(prompt.token_ids)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))

    def reorder(batch: TokenBatch) -> TokenBatch:
        if batch.tokens.shape[1] != count:
            return replace(batch, visible=batch.causally_visible())
        visible = batch.causally_visible()[:, order][:, :, order]
        return replace(batch, position_ids=batch.position_ids[:, order], visible=visible)

    other = replace(prompt, token_ids=tuple(prompt.token_ids[i] for i in order.tolist()))
    view = model.intervened(Told(does=reorder, name="another order"))
    found = logits(view, pad(view, [other]))[0]
    assert relative(found, logits(model, pad(model, [prompt]))[0, order]) < 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
def test_roberta_counts_positions_from_behind_its_padding_id(side: Any, tiny: TinyFactory) -> None:
    model = without_bos(tiny, "roberta")
    plain = plain_model(model)
    assert model.first_position == plain.config.pad_token_id + 1 == 3
    prompts = sentence_prompts(model)
    batch = pad(model, prompts, side=side)
    found = logits(model, batch)
    for row, prompt in enumerate(prompts):
        start, count = int(batch.starts[row]), len(prompt.token_ids)
        expected = plain(alone(prompt)).logits[0]
        assert relative(found[row, start : start + count], expected) < 1e-5
    assert all(tiny(arch).first_position == 0 for arch in ARCHITECTURES)


def test_a_closed_mask_is_closed_beyond_a_local_window(tmp_path: Path) -> None:
    build("gptneo", tmp_path, window=3)
    view = load_tiny(tmp_path).intervened(SeesItself(position=3))
    prompt = sentence_prompts(view)[1]
    assert len(prompt.token_ids) > 6
    for place in (0, 1, 2):
        ids = list(prompt.token_ids)
        ids[place] = (ids[place] + 31) % 400
        other = replace(prompt, token_ids=tuple(ids))
        one, two = (token_states(view, [each], [3], layer=3).keys for each in (prompt, other))
        assert torch.equal(one, two)


def test_a_window_that_no_configuration_names_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("mistral", tmp_path, window=4)
    model = load_tiny(tmp_path).with_bos(BosPolicy.WITHOUT)
    view = model.intervened(SeesAll(position=0))
    prompt = text_prompt(view, SENTENCES[0])
    short = replace(prompt, token_ids=prompt.token_ids[:4])
    assert not breaks_the_law(view, short)
    with pytest.raises(UnsupportedModelError, match="no further back than 4 tokens"):
        pad(view, [prompt])
    for module in ("interventions", "trials"):
        monkeypatch.setattr(f"firsttok.engine.{module}.attention_window", lambda _: None)
    blind = replace(view, trials=Trials())
    count = len(prompt.token_ids)
    with pytest.raises(UnsupportedModelError, match=rf"computes something else on {count} tokens"):
        pad(blind, [prompt])
    # The next power of two lies beyond the window, the prompt does not.
    assert pad(blind, [short]).visible is not None


def test_repeated_ids_that_cut_attention_are_found(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a mask, transformers takes repeated ids for sequences packed one after the other."""
    model = replace(without_bos(tiny, "llama"), trials=Trials())
    monkeypatch.setattr(
        "firsttok.engine.trials.call_arguments",
        lambda _, batch: {"position_ids": batch.position_ids, "use_cache": False},
    )
    with pytest.raises(UnsupportedModelError, match=r"other tokens than before if .* ids repeat"):
        pad(model.intervened(SECOND2FIRST), sentence_prompts(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3", "gptneo", "bamba"])
def test_a_trial_ends_the_same_in_every_type(arch: str, dtype: str, tiny: TinyFactory) -> None:
    for change in (*MASKS, *MOVES):
        view = without_bos(tiny, arch, dtype).intervened(change)
        expected = sentence_of(arch, change)
        wrong = pytest.raises(UnsupportedModelError, match=expected) if expected else nullcontext()
        with wrong:
            pad(view, sentence_prompts(view))


def test_each_kind_of_change_is_tried_once_for_all_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[Change, int]] = []
    usual = trials._tried

    def count(bridge: Any, change: Change, width: int) -> str | None:
        tried.append((change, width))
        return usual(bridge, change, width)

    monkeypatch.setattr(trials, "_tried", count)
    build("llama", tmp_path)
    model = load_tiny(tmp_path).with_bos(BosPolicy.WITHOUT)
    views = [model.intervened(change) for change in (*MASKS, *MOVES)]
    assert tried == []
    for view in views:
        for sentence in SENTENCES[:3]:
            pad(view, [text_prompt(view, sentence)])
            source = IntervenedKeys(name="read", interventions=view.interventions)
            source.keys(model, FACTS[0], CONTEXTS, layer=1)
    assert len(tried) == len(set(tried))
    assert {change for change, _ in tried} == set(Change)
    widths = [width for change, width in tried if change is Change.MASK]
    assert all(width & (width - 1) == 0 for width in widths)


def test_kinds_of_change_are_those_of_real_tokens(tiny: TinyFactory) -> None:
    model = without_bos(tiny, "gpt2")
    usual = pad(model, sentence_prompts(model), side="left")
    causal = replace(usual, visible=usual.causally_visible())
    everything = replace(
        usual, visible=usual.attention_mask.bool()[:, None].expand_as(usual.causally_visible())
    )
    own = torch.eye(usual.tokens.shape[1], dtype=torch.bool).expand_as(usual.causally_visible())
    assert changes_of(usual, usual) == ()
    assert changes_of(usual, causal) == (Change.MASK,)
    assert changes_of(usual, everything) == (Change.MASK, Change.OPENED)
    assert changes_of(usual, replace(usual, visible=own)) == (Change.MASK, Change.CLOSED)
    ids = usual.position_ids.masked_fill(~usual.attention_mask.bool(), 7)
    assert changes_of(usual, replace(usual, position_ids=ids)) == ()
    assert changes_of(usual, replace(usual, position_ids=ids + 1)) == (Change.MOVED,)


@contextmanager
def hooked(model: Model) -> Generator[None, None, None]:
    """A user's hooks, which take all effect from attention and count what they are given."""
    seen: list[int] = []

    def silence(output: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(len(output))
        return torch.zeros_like(output)

    names = [f"blocks.{layer}.attn.hook_out" for layer in range(model.n_layers)]
    with model.bridge.hooks(fwd_hooks=[(name, silence) for name in names]):
        yield
        assert seen == []
        model.bridge(torch.zeros(3, 2, dtype=torch.long))
    assert seen == [3] * model.n_layers


@contextmanager
def training(model: Model) -> Generator[None, None, None]:
    modules: list[Any] = [*model.bridge.modules(), *model.bridge.original_model.modules()]
    was = [module.training for module in modules]
    model.bridge.original_model.train()
    during = [module.training for module in modules]
    try:
        yield
        assert [module.training for module in modules] == during
    finally:
        for module, mode in zip(modules, was, strict=True):
            module.training = mode


@pytest.mark.parametrize(
    "around",
    [
        hooked,
        training,
        lambda _: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda _: torch.inference_mode(),
        lambda _: torch.no_grad(),
    ],
    ids=["hooks", "training", "autocast", "inference", "no-grad"],
)
@pytest.mark.parametrize("arch", ["gpt2", "gptneo"])
def test_a_trial_is_of_the_model_as_it_was_loaded(
    arch: str, around: Callable[[Model], Any], tiny: TinyFactory
) -> None:
    model = replace(without_bos(tiny, arch), trials=Trials())
    prompts = sentence_prompts(model)
    with around(model):
        for change in (*MASKS, *MOVES):
            expected = sentence_of(arch, change)
            view = model.intervened(change)
            if expected is None:
                pad(view, prompts)
                continue
            with pytest.raises(UnsupportedModelError, match=expected):
                pad(view, prompts)
    assert not any(parameter.grad is not None for parameter in model.bridge.parameters())


@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_a_destroyed_model_obeys_as_well_as_a_sound_one(factor: float, tmp_path: Path) -> None:
    build("gpt2", tmp_path)
    model = load_tiny(tmp_path)
    with torch.no_grad():
        model.site(1).weight.mul_(factor)
    for change in (*MASKS, *MOVES):
        assert pad(model.intervened(change), sentence_prompts(model)).tokens.numel()


def test_weights_that_overflow_hide_no_leak(tmp_path: Path) -> None:
    build("bamba", tmp_path)
    view = load_tiny(tmp_path).intervened(SeesItself(position=3))
    with torch.no_grad():
        view.site(0).weight.mul_(float("nan"))
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .* mixer"):
        pad(view, sentence_prompts(view))


def forced(batch: TokenBatch, **parts: Any) -> TokenBatch:
    """The batch with parts of any form; the tests' own type checks would not let them pass."""
    changed = replace(batch)
    for name, part in parts.items():
        object.__setattr__(changed, name, part)
    return changed


def in_place(batch: TokenBatch) -> TokenBatch:
    batch.tokens[:, 0] = 5
    return batch


def blind(batch: TokenBatch) -> TokenBatch:
    visible = batch.causally_visible()
    visible[batch.places(1)] = False
    return replace(batch, visible=visible)


def one_row(batch: TokenBatch) -> TokenBatch:
    return forced(batch, visible=batch.causally_visible()[:1, :, :1])


WRONG: dict[str, tuple[Callable[[TokenBatch], Any], str]] = {
    "nothing": (lambda _: None, "'told' returned NoneType where a TokenBatch is needed"),
    "tensor": (lambda batch: batch.tokens, "returned Tensor where"),
    "tokens": (lambda batch: replace(batch, tokens=batch.tokens + 1), "changed the batch's tokens"),
    "tokens in place": (in_place, "changed the batch's tokens"),
    "fewer prompts": (lambda batch: batch.rows(torch.tensor([0])), "changed the batch's tokens"),
    "attention mask": (
        lambda batch: replace(batch, attention_mask=batch.attention_mask * 0),
        "changed the batch's attention_mask",
    ),
    "starts": (lambda batch: replace(batch, starts=batch.starts + 1), "changed the batch's starts"),
    "broadcast ids": (
        lambda batch: forced(batch, position_ids=batch.position_ids[:1]),
        r"no tensor of whole numbers of shape \[2, \d+\]",
    ),
    "fractions": (
        lambda batch: forced(batch, position_ids=batch.position_ids / 2),
        "no tensor of whole numbers",
    ),
    "no ids": (lambda batch: forced(batch, position_ids=None), "no tensor of whole numbers"),
    "broadcast mask": (one_row, r"no tensor of booleans of shape \[2, \d+, \d+\]"),
    "mask of numbers": (
        lambda batch: forced(batch, visible=batch.causally_visible().float()),
        "no tensor of booleans",
    ),
    "negative ids": (
        lambda batch: replace(batch, position_ids=batch.position_ids - 3),
        "outside 0 to 159",
    ),
    "ids beyond the table": (PositionShift(by=150), "outside 0 to 159"),
    "blind": (blind, "token 1 of prompt 0 attends to nothing"),
    "padding": (
        lambda batch: replace(batch, visible=torch.ones_like(batch.causally_visible())),
        "token 0 of prompt 0 attends to padding",
    ),
    "now and then": (
        lambda batch: (
            batch if batch.tokens.shape[1] < 3 else replace(batch, visible=batch.causally_visible())
        ),
        "for some batches and not for others",
    ),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("fault", WRONG)
def test_what_is_no_changed_batch_is_said_in_a_sentence(
    fault: str, side: Any, tiny: TinyFactory
) -> None:
    does, expected = WRONG[fault]
    view = without_bos(tiny, "gpt2").intervened(SECOND2FIRST, Told(does=does))
    prompts = sorted(sentence_prompts(view), key=lambda prompt: len(prompt.token_ids))[-4::2]
    with pytest.raises(BadInputError, match=expected) as caught:
        pad(view, prompts, side=side)
    assert "told" in str(caught.value)


def test_swaps_are_tried_before_anything_is_edited(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_bos(tiny, "jamba")
    moment = SecondMoment.identity(model.site(1).d_mlp)
    study = prepare_study(model, contexts=CONTEXTS, second_moment=moment, layer=1)
    monkeypatch.setattr("firsttok.probes.positions.measure_facts", None)
    with pytest.raises(UnsupportedModelError, match="position embedding is none"):
        measure_stages(study, FACTS[:2], SECOND2FIRST)


def test_a_token_that_no_prompt_has_is_neither_changed_nor_read(tiny: TinyFactory) -> None:
    model = without_bos(tiny, "gpt2")
    prompts = sentence_prompts(model)
    for change in (SeesAll(position=-1), PositionSwap(name="last", of=-1, like=0)):
        with pytest.raises(BadInputError, match="no token -1; positions count from 0"):
            pad(model.intervened(change), prompts)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    shortest = lengths.index(min(lengths))
    for side in ("right", "left"):
        batch = pad(model, prompts, side=side)
        last = torch.tensor(lengths) - 1
        rows = torch.arange(len(prompts))
        ends = [prompt.token_ids[-1] for prompt in prompts]
        assert batch.tokens[rows, batch.columns(last)].tolist() == ends
        for place in (-1, lengths[shortest]):
            last = last.index_fill(0, torch.tensor([shortest]), place)
            with pytest.raises(BadInputError, match=rf"no token {place} in a prompt of"):
                batch.columns(last)
    at = [lengths[shortest]] * len(prompts)
    with pytest.raises(BadInputError, match="positions count from 0"):
        token_states(model, prompts, at, layer=1)
    with pytest.raises(BadInputError, match="positions count from 0"):
        keys_at(model, prompts, at, layers=[1])


@pytest.mark.parametrize("change", [None, "SeesAll", SeesAll, lambda batch: batch])
def test_what_is_no_intervention_is_refused_at_once(change: Any, tiny: TinyFactory) -> None:
    # Without the type check that only the tests have.
    unchecked: Any = inspect.unwrap(Model.intervened)
    with pytest.raises(BadInputError, match="is no intervention; give an object with a `name`"):
        unchecked(tiny("gpt2"), change)


def test_a_change_made_in_place_is_a_change(tiny: TinyFactory) -> None:
    def move(batch: TokenBatch) -> TokenBatch:
        batch.position_ids[:, 0] = 1
        return batch

    model = without_bos(tiny, "gpt2")
    prompts = sentence_prompts(model)
    found, expected = (
        pad(model.intervened(change), prompts) for change in (Told(does=move), SECOND2FIRST)
    )
    assert torch.equal(found.position_ids, expected.position_ids)
    with pytest.raises(UnsupportedModelError, match="position ids do not change"):
        pad(tiny("jamba").intervened(Told(does=move)), sentence_prompts(tiny("jamba")))


def test_a_probe_prints_no_line_that_its_mask_did_not_change(tiny: TinyFactory) -> None:
    neo = without_bos(tiny, "gptneo")
    moment = SecondMoment.identity(neo.site(1).d_mlp)
    study = prepare_study(neo, contexts=CONTEXTS, second_moment=moment, layer=1)
    with pytest.raises(UnsupportedModelError, match="causal mask of its own"):
        probe(study, FACTS[0], "attention")
    # The same on a model that obeys: all lines are there, and the changed ones differ.
    model = without_bos(tiny, "llama")
    moment = SecondMoment.identity(model.site(1).d_mlp)
    study = prepare_study(model, contexts=CONTEXTS, second_moment=moment, layer=1)
    norms = {
        row["k^u from"]: row["norm of k^u"] for row in probe(study, FACTS[0], "attention").rows
    }
    assert len(set(norms.values())) == len(norms) == 4
    # Nothing stands after the token that is to see all.
    with pytest.raises(BadInputError, match="subject ends the prompt"):
        probe(study, FACTS[4], "attention")
    fact = Fact(subject="I", template="{}", target_new="it", target_true="and")
    with pytest.raises(BadInputError, match="subject ends the prompt"):
        MaskedKeys(later=False, changed=True).keys(model, fact, CONTEXTS, layer=1)
    for change in (SeesAll(position=90), PositionSwap(name="far", of=90, like=0)):
        usual, idle = probe(study, FACTS[0], change).rows
        assert idle["k^u from"] == f"{change.name} (changes nothing here)"
        assert idle["denominator"] == pytest.approx(usual["denominator"])
    # A key that a swap leaves as it is, though it is obeyed, is a finding.
    usual, swapped = probe(study, FACTS[0], SECOND2FIRST).rows
    assert swapped["k^u from"] == "Second2First"
    assert swapped["denominator"] != pytest.approx(usual["denominator"], rel=1e-3)
    assert swapped["norm of k^u"] == usual["norm of k^u"]


@pytest.mark.parametrize("processed", [True, False])
def test_a_bridge_in_compatibility_mode_is_refused(processed: bool, tmp_path: Path) -> None:
    build("gpt2", tmp_path)
    model = load_tiny(tmp_path)
    edit = compute_edit(
        model,
        FACTS[0],
        method=ROME,
        contexts=CONTEXTS,
        layer=1,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
    )
    model.bridge.enable_compatibility_mode(disable_warnings=True, no_processing=not processed)
    expected = "load it again"
    with pytest.raises(UnsupportedModelError, match=expected):
        capture_keys(model, FACTS[0])
    with pytest.raises(UnsupportedModelError, match=expected):
        perplexity(model, SENTENCES)
    with pytest.raises(UnsupportedModelError, match=expected), edit.applied(model):
        raise AssertionError
    view = model.intervened(SeesAll(position=0))
    with pytest.raises(UnsupportedModelError, match=expected):
        fact_keys(view, FACTS[0], CONTEXTS, layer=1)


def test_processed_weights_are_refused_without_that_mode(tmp_path: Path) -> None:
    build("llama", tmp_path)
    model = load_tiny(tmp_path)
    model.bridge.process_weights()
    with pytest.raises(UnsupportedModelError, match="load it again"):
        perplexity(model, SENTENCES)


@pytest.mark.parametrize(
    ("arch", "changes", "dtype", "expected"),
    [
        ("bloom", {}, "float32", "layer 0 .* MLP itself adds the residual stream .*BloomForCausal"),
        ("mpt", {}, "float32", "layer 0 .* MLP itself adds the residual stream .*MptForCausal"),
        ("falcon_h1", {"factor": 0.4}, "float32", "layer 0 .* MLP multiplies it by 0.4"),
        ("gptoss", {}, "float32", "no single MLP output projection"),
        (
            "falcon",
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            "float32",
            "TransformerLens cannot take .* apart .*another variant",
        ),
        ("codegen", {}, "bfloat16", "cannot be run on a few tokens in bfloat16 .* in float32"),
    ],
)
def test_an_edit_site_that_fails_says_why(
    arch: str, changes: dict[str, Any], dtype: str, expected: str, tmp_path: Path
) -> None:
    build(arch, tmp_path, **changes)
    with pytest.raises(UnsupportedModelError, match=expected):
        load(str(tmp_path), dtype=dtype)


@pytest.mark.real_model
def test_the_embedded_model_obeys_all_interventions(real_model: Model) -> None:
    model = real_model.with_bos(BosPolicy.WITHOUT)
    prompt = text_prompt(model, "Arthur went home early today")
    for change in MASKS:
        assert not breaks_the_law(model.intervened(change), prompt)
    for change in MOVES:
        assert pad(model.intervened(change), [prompt]).position_ids.tolist() != [[0, 1, 2, 3, 4]]
