"""The sampled contexts: what they look like, and when a saved set is used again."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DECODERS, TinyFactory, build, load_tiny, naive_logits

from firsttok.contexts import ContextSet, load_contexts, sample_contexts
from firsttok.errors import BadInputError
from firsttok.models import BosPolicy, Model

WORDS = ("The", "Therefore", "Because", "I", "You")


def refuse_to_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any sampling an error."""

    def fail(*_args: object) -> list[str]:
        raise AssertionError("sampled again")

    monkeypatch.setattr(import_module("firsttok.contexts"), "_sample", fail)


@pytest.mark.parametrize("arch", DECODERS)
def test_there_are_21_templates_with_the_bare_one_first(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    contexts = sample_contexts(model, seed=3)
    assert len(contexts.templates) == 21
    assert contexts.templates[0] == "{}"
    assert contexts.prefixed == contexts.templates[1:]
    assert (contexts.seed, contexts.model_fingerprint) == (3, model.fingerprint)
    expected = [word for _ in (5, 10) for word in WORDS for _ in (1, 2)]
    for word, template in zip(expected, contexts.templates[1:], strict=True):
        assert template.startswith(word)
        assert template.endswith(". {}")


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_samples_are_of_the_asked_length_and_likely(
    tiny: TinyFactory, arch: str, bos: BosPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(arch).with_bos(bos)
    tokenizer: Any = model.tokenizer
    decoded: list[list[int]] = []

    def decode(ids: list[int], **_options: object) -> str:
        decoded.append(list(ids))
        return "plain"

    monkeypatch.setattr(type(tokenizer), "decode", lambda _self, ids, **o: decode(ids, **o))
    sample_contexts(model, seed=0)
    assert [len(ids) for ids in decoded] == [
        max(length, len(tokenizer(word, add_special_tokens=False)["input_ids"]))
        for length in (5, 10)
        for word in WORDS
        for _ in (1, 2)
    ]
    for ids, word in zip(decoded, [w for _ in (5, 10) for w in WORDS for _ in (1, 2)], strict=True):
        start = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert ids[: len(start)] == start
        full = [*model.leading_ids, *ids]
        best = naive_logits(model, full).topk(5, dim=-1).indices
        shift = len(model.leading_ids)
        for place in range(len(start), len(ids)):
            assert ids[place] in best[shift + place - 1].tolist()


def test_the_seed_fixes_the_set(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    first = sample_contexts(model, seed=1)
    torch.manual_seed(99)
    assert sample_contexts(model, seed=1) == first
    assert sample_contexts(model, seed=1).content_hash == first.content_hash
    other = sample_contexts(model, seed=2)
    assert other.templates != first.templates
    assert other.content_hash != first.content_hash


def test_sampling_leaves_the_global_generator_alone(tiny: TinyFactory) -> None:
    before = torch.get_rng_state()
    sample_contexts(tiny("gpt2"), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_set_is_used_again(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "contexts.json"
    model = tiny("gpt2")
    first = sample_contexts(model, seed=1, path=path)
    assert load_contexts(path) == first
    refuse_to_sample(monkeypatch)
    assert sample_contexts(model, seed=1, path=path) == first


def test_a_saved_set_of_another_seed_or_model_is_not_used(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    path = tmp_path / "contexts.json"
    model = tiny("gpt2")
    sample_contexts(model, seed=1, path=path)
    second = sample_contexts(model, seed=2, path=path)
    assert second == sample_contexts(model, seed=2)
    assert load_contexts(path) == second
    build("gpt2", tmp_path / "other", seed=5)
    other = load_tiny(tmp_path / "other")
    third = sample_contexts(other, seed=2, path=path)
    assert third.model_fingerprint == other.fingerprint != model.fingerprint
    assert third.templates != second.templates
    assert load_contexts(path) == third


def test_a_saved_set_of_another_bos_policy_is_not_used(tiny: TinyFactory, tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    model = tiny("gpt2")
    without = sample_contexts(model.with_bos(BosPolicy.WITHOUT), seed=1, path=path)
    direct = sample_contexts(model.with_bos(BosPolicy.WITH), seed=1)
    assert direct.templates != without.templates
    assert sample_contexts(model.with_bos(BosPolicy.WITH), seed=1, path=path) == direct


def test_braces_in_samples_are_taken_out(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def braces(_model: Model, word: str, length: int, _generator: torch.Generator) -> list[str]:
        return [f"{word} {{}} {length}", f"{word} }}{{{{"]

    monkeypatch.setattr(import_module("firsttok.contexts"), "_sample", braces)
    contexts = sample_contexts(tiny("gpt2"), seed=0)
    assert contexts.templates[1:3] == ("The    5. {}", "The    . {}")
    assert all(template.count("{") == template.count("}") == 1 for template in contexts.templates)


def test_a_plain_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps(["{}", "I know. {}"]))
    contexts = load_contexts(path)
    assert contexts == ContextSet(templates=("{}", "I know. {}"))
    assert contexts.seed is None
    assert contexts.prefixed == ("I know. {}",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no templates"),
        (["{}", "no place"], "context 1 .'no place'"),
        (["{} {}"], "context 0 .'{} {}'"),
        ([1], "template 0 is not a text"),
        ("{}", "JSON list"),
        ({"seed": 1}, "JSON list"),
    ],
)
def test_malformed_contexts_are_refused_with_file_and_place(
    tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BadInputError, match=message) as raised:
        load_contexts(path)
    assert str(path) in str(raised.value)


def test_a_damaged_saved_set_is_named(tiny: TinyFactory, tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    path.write_text('{"templates": ["{}"')
    with pytest.raises(BadInputError, match="not valid JSON at line 1"):
        sample_contexts(tiny("gpt2"), path=path)
