"""Generations and their entropy, against plain sampling and plain arithmetic."""

import math
import random
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    TinyFactory,
    build,
    load_tiny,
    naive_logits,
    same_weights,
    weights,
)

from firsttok import probes
from firsttok.editing import ROME, compute_edit
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation import (
    continuation,
    generated_match,
    generation_entropy,
    sample_continuations,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import Model
from firsttok.prompts import text_prompt
from firsttok.second_moment import SecondMoment

generation = import_module("firsttok.evaluation.generation")
TEXT = "England's capital"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["one two", "three four"], 1.0),
        (["one two one two"], 1.0),
        (["the the the", "the"], 0.0),
        ([",,,,", ", ,"], 0.0),
        (["", " \n"], 0.0),
        (["a a a b"], 2 - 0.75 * math.log2(3)),
        (["Ab ab."], 1.0),
        (["é é ß"], math.log2(3) - 2 / 3),
    ],
)
def test_entropy_by_hand(texts: list[str], expected: float) -> None:
    assert generation_entropy(texts) == pytest.approx(expected, abs=1e-12)


def test_entropy_is_that_of_the_words_of_all_texts() -> None:
    draw = random.Random(0)
    for _ in range(50):
        words = draw.choices(["a", "b2", "C", "über", "!", "?"], k=draw.randint(2, 60))
        cut = draw.randint(0, len(words))
        found = generation_entropy([" ".join(words[:cut]), " ".join(words[cut:])])
        counts = [words.count(word) for word in set(words)]
        expected = scipy_entropy(counts, base=2) / math.log2(len(counts)) if counts[1:] else 0.0
        assert found == pytest.approx(float(expected), abs=1e-12)
        assert 0 <= found <= 1
        draw.shuffle(words)
        assert generation_entropy([" ".join(words)]) == pytest.approx(found, abs=1e-12)


def test_entropy_of_nothing_is_refused() -> None:
    with pytest.raises(BadInputError, match="no generations"):
        generation_entropy([])


def naive_samples(
    model: Model, text: str = TEXT, *, count: int, tokens: int, top_k: int, seed: int
) -> list[str]:
    """The same draws from whole passes of one text at a time."""
    generator = torch.Generator().manual_seed(seed)
    start = text_prompt(model, text).token_ids
    rows = [list(start) for _ in range(count)]
    for _ in range(tokens):
        last = torch.stack([naive_logits(model, row)[-1] for row in rows])
        top = last.topk(top_k, dim=-1)
        drawn = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        for row, token in zip(rows, top.indices.gather(1, drawn)[:, 0].tolist(), strict=True):
            row.append(token)
    tokenizer: Any = model.tokenizer
    return [
        tokenizer.decode(row[len(start) :]).split("</s>")[0].replace("<s>", "").replace("<pad>", "")
        for row in rows
    ]


@pytest.mark.parametrize("arch", DECODERS)
def test_sampling_is_that_of_whole_passes(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    found = sample_continuations(model, TEXT, count=3, tokens=9, top_k=4, seed=3)
    assert found == naive_samples(model, count=3, tokens=9, top_k=4, seed=3)
    assert found == sample_continuations(model, TEXT, count=3, tokens=9, top_k=4, seed=3)
    assert found != sample_continuations(model, TEXT, count=3, tokens=9, top_k=4, seed=4)


@pytest.mark.parametrize(("arch", "changes"), [("mistral", {}), ("gemma3", {"window": 8})])
def test_a_sliding_window_is_kept(arch: str, changes: dict[str, int], tmp_path: Path) -> None:
    build(arch, tmp_path, **changes)
    model = load_tiny(tmp_path)
    window, text = model.attention_window, TEXT * 16
    assert window is not None
    assert len(text_prompt(model, text).token_ids) + 20 > window
    found = sample_continuations(model, text, count=2, tokens=24, seed=0)
    assert found == naive_samples(model, text, count=2, tokens=24, top_k=5, seed=0)


@pytest.mark.parametrize("arch", DECODERS)
def test_the_first_of_one_is_the_greedy_continuation(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    found = sample_continuations(model, TEXT, count=2, tokens=6, top_k=1)
    assert found == [continuation(model, TEXT, tokens=6).replace("<s>", "")] * 2


def test_interventions_of_a_view_hold(tiny: TinyFactory) -> None:
    view = tiny("llama").intervened(probes.SeesAll(position=1))
    found = sample_continuations(view, TEXT, count=2, tokens=8, top_k=1)
    assert found == [continuation(view, TEXT, tokens=8)] * 2
    assert found[0] != continuation(tiny("llama"), TEXT, tokens=8)


def test_an_edited_model_is_sampled_and_left_as_it_was(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    edit = compute_edit(
        model,
        FACTS[0],
        method=ROME,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=Hyperparameters(steps=12, learning_rate=2.0, clamp=20.0),
    )
    before = weights(model)
    plain = sample_continuations(model, TEXT, count=2, tokens=8)
    with edit.applied(model):
        found = sample_continuations(model, TEXT, count=2, tokens=8)
        assert found == naive_samples(model, count=2, tokens=8, top_k=5, seed=0)
    assert found != plain
    assert sample_continuations(model, TEXT, count=2, tokens=8) == plain
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_broken_model_repeats_itself(arch: str, value: float, tmp_path: Path) -> None:
    build(arch, tmp_path)
    model = load_tiny(tmp_path)
    with torch.no_grad():
        model.site(2).weight.fill_(value)
    texts = sample_continuations(model, TEXT, count=4, tokens=7)
    assert len(texts) == 4
    assert len(set(texts)) == 1
    assert generation_entropy(texts) < 0.5


def test_what_is_drawn_from_odd_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    inf, nan = math.inf, math.nan
    scores = torch.tensor(
        [
            [1.0, nan, 3.0, nan],
            [1.0, inf, 3.0, nan],
            [-inf, -inf, 3.0, -inf],
            [nan, -inf, 0.5, nan],
        ]
    )
    for _ in range(50):
        drawn = generation._draw(scores, generator, top_k=3)[:, 0].tolist()
        assert drawn[0] in (0, 2)
        assert drawn[1:] == [1, 2, 2]
    alike = generation._draw(torch.full((5, 4), nan), generator, top_k=3)[:, 0].tolist()
    assert len(set(alike)) == 1


def test_draws_follow_the_probabilities_of_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1]).log().repeat(20_000, 1)
    drawn = generation._draw(scores, generator, top_k=3)[:, 0]
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    assert shares.tolist() == pytest.approx([0, 0.25, 0.5, 0.25, 0], abs=0.015)
    assert generation._draw(scores[:4], generator, top_k=99).shape == (4, 1)


def test_nothing_is_said_behind_the_end_of_text(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    tokenizer: Any = model.tokenizer
    script = [*tokenizer("Rome", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    script += tokenizer(" again", add_special_tokens=False)["input_ids"]
    start = len(text_prompt(model, TEXT).token_ids)

    def last_logits(_model: Model, rows: torch.Tensor, _cache: object) -> torch.Tensor:
        scores = torch.full((len(rows), 400), -99.0)
        scores[:, script[rows.shape[1] - start]] = 99.0
        return scores

    monkeypatch.setattr(generation, "_last_logits", last_logits)
    assert sample_continuations(model, TEXT, count=2, tokens=len(script)) == ["Rome", "Rome"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_types_are_sampled(tiny: TinyFactory, dtype: str) -> None:
    assert len(sample_continuations(tiny("llama", dtype), TEXT, count=2, tokens=3)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"tokens": 1000}, "reads at most 160"),
    ],
)
def test_bad_numbers_are_refused(tiny: TinyFactory, settings: dict[str, int], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        sample_continuations(tiny("gpt2"), TEXT, **settings)


@pytest.mark.parametrize("arch", ["t5", "bert"])
def test_only_a_decoder_continues(tiny: TinyFactory, arch: str) -> None:
    with pytest.raises(UnsupportedModelError, match="only a decoder continues"):
        sample_continuations(tiny(arch), TEXT)


def spaced(model: Model, text: str) -> str:
    """What a model writes greedily after a text, found token by token without firsttok."""
    ids = list(text_prompt(model, text).token_ids)
    start = len(ids)
    for _ in range(20):
        ids.append(int(naive_logits(model, ids)[-1].argmax()))
    tokenizer: Any = model.tokenizer
    return tokenizer.decode(ids[start:])


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_what_is_generated_is_the_greedy_text_up_to_its_stop(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    for fact in FACTS:
        whole = spaced(model, fact.prompt)
        found = generated_match(model, fact)
        # The configuration of Llama names another token than its tokenizer, which ends texts, too.
        end = re.search("</s>|<pad>" if arch == "llama" else "</s>", whole)
        whole = whole if end is None else whole[: end.start()]
        stop = re.search(r"\w[.!?]\s|\S\s*\n", whole)
        expected = whole if stop is None else whole[: stop.start() + 2]
        assert found.text == expected.strip()
        # The last word may have been cut off.
        for word in found.text.split()[:-1][:1]:
            assert generated_match(model, replace(fact, target_new=word.upper())).first_words
        assert not generated_match(model, replace(fact, target_new="zebra crossing")).first_words


@pytest.mark.parametrize(
    ("said", "target", "exact", "first"),
    [
        (" Paris. It is", "Paris", True, True),
        (" the Paris", "paris", True, True),
        (" Paris, France", "Paris", False, True),
        (" Parisian food", "Paris", False, False),
        (" in Paris", "Paris", False, False),
        (" 3.5 km", "3.5", False, True),
        (" \nRome\nParis", "Rome", True, True),
        (" The", "the", True, True),
        ("", "Paris", False, False),
        (" New", "New York", False, False),
    ],
)
def test_text_and_target_are_compared_word_by_word(
    tiny: TinyFactory,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    target: str,
    exact: bool,
    first: bool,
) -> None:
    model = tiny("gpt2")
    tokenizer: Any = model.tokenizer
    ids = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
    monkeypatch.setattr(generation, "_greedy", lambda *_: iter(ids))
    found = generated_match(model, replace(FACTS[0], target_new=target), tokens=40)
    assert (found.exact, found.first_words) == (exact, first)
