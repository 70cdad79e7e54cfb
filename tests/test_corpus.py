"""Corpora of the second moment: written by a model, shipped, named."""

import gzip
import hashlib
import json
from collections.abc import Callable, Collection
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import NO, NOT_JUDGED, PARTLY, YES
from tiny import SENTENCES, TinyFactory, build, load_tiny, naive_logits, relative

from analyses import extra_corpus
from firsttok.cli import main
from firsttok.console import progress_bar
from firsttok.data import find_corpus, write_corpus
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation import distinct_ngrams, sample_corpus, sample_documents
from firsttok.models import Model
from firsttok.models.bos import special_ids
from firsttok.options import DEFAULT_CORPUS
from firsttok.paper.claims import Result, Status, judge
from firsttok.prompts import text_prompt
from firsttok.second_moment import compute_second_moment

generation = import_module("firsttok.evaluation.generation")
corpus_module = import_module("firsttok.evaluation.corpus")
texts_module = import_module("firsttok.data.texts")
BUILTIN = resources.files("firsttok.data.builtin")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Path:
    """Rounds of 4 documents of at most 12 tokens; the folder that keeps them."""
    monkeypatch.setattr(corpus_module, "_COUNT", 4)
    monkeypatch.setattr(corpus_module, "_LENGTH", 12)
    return own_cache / "documents"


def naive_documents(
    model: Model,
    *,
    count: int,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    ends: Collection[int],
) -> list[list[int]]:
    """The same draws from whole passes of one text at a time, by a nucleus that is counted out."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer: Any = model.tokenizer
    found: list[list[int]] = [[] for _ in range(count)]
    running = list(range(count))
    for _ in range(tokens):
        weights: list[torch.Tensor] = []
        orders: list[torch.Tensor] = []
        for index in running:
            logits = naive_logits(model, [tokenizer.bos_token_id, *found[index]])[-1]
            shares, order = (logits / temperature).softmax(-1).sort(descending=True)
            held = 0.0
            for place, share in enumerate(shares.tolist()):
                if held >= top_p:
                    shares[place:] = 0.0
                    break
                held += share
            weights.append(shares)
            orders.append(order)
        drawn = torch.multinomial(torch.stack(weights), 1, generator=generator)[:, 0].tolist()
        chosen = [int(order[place]) for order, place in zip(orders, drawn, strict=True)]
        for index, token in zip(list(running), chosen, strict=True):
            if token in ends:
                running.remove(index)
            else:
                found[index].append(token)
        if not running:
            break
    return found


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_documents_are_those_of_whole_passes(
    arch: str, tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    model = tiny(arch)
    seen: list[list[list[int]]] = []
    sampled = generation._sampled
    monkeypatch.setattr(
        generation,
        "_sampled",
        lambda *args, **more: seen.append(sampled(*args, **more)) or seen[-1],
    )
    # A random model seldom ends a text by itself.
    ends = special_ids(model.tokenizer).union(range(0, 400, 13))
    monkeypatch.setattr(Model, "special_ids", ends)
    settings: dict[str, Any] = {"count": 8, "tokens": 24, "temperature": 1.3, "top_p": 0.8}
    found = sample_documents(model, **settings, seed=3)
    expected = naive_documents(model, **settings, seed=3, ends=ends)
    assert seen == [expected]
    # Rows that ended are run no further, and the others are none the worse for it.
    assert len({len(row) for row in expected}) > 2
    assert found == sample_documents(model, **settings, seed=3)
    assert found != sample_documents(model, **settings, seed=4)


def test_a_nucleus_is_the_fewest_tokens_with_the_share() -> None:
    scores = torch.tensor([0.1, 0.2, 0.4, 0.3]).log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings: Any) -> list[float]:
        drawn = generation._draw(scores, generator, top_k=4, **settings)[:, 0]
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares(top_p=0.65) == pytest.approx([0, 0, 4 / 7, 3 / 7], abs=0.015)
    assert shares(top_p=0.75) == pytest.approx([0, 2 / 9, 4 / 9, 3 / 9], abs=0.015)
    assert shares(top_p=1e-9) == [0, 0, 1, 0]
    roots = [value**0.5 for value in (0.1, 0.2, 0.4, 0.3)]
    cooled = [root / sum(roots) for root in roots]
    assert shares(temperature=2.0) == pytest.approx(cooled, abs=0.015)


def test_no_special_token_gets_into_a_text(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    tokenizer: Any = model.tokenizer
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "<s>"]
    assert tokenizer.decode(spelled) == "<s>"
    words = tokenizer("the answer", add_special_tokens=False)["input_ids"]
    written = [
        words,
        [*words, *spelled],
        [],
        tokenizer("  ", add_special_tokens=False)["input_ids"],
    ]
    monkeypatch.setattr(generation, "_sampled", lambda *_, **__: written)
    assert sample_documents(model) == ["the answer"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0; give a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0; give a number above 0, and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 10**6}, "tokens is 1000000"),
        ({"count": 0}, "count is 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    given: dict[str, Any], sentence: str, tiny: TinyFactory
) -> None:
    with pytest.raises(BadInputError, match=sentence):
        sample_documents(tiny("gpt2"), **given)


def test_only_a_decoder_writes(tiny: TinyFactory) -> None:
    with pytest.raises(UnsupportedModelError, match="no decoder"):
        sample_documents(tiny("bert"))


def test_an_interrupted_corpus_goes_on_with_the_round_that_was_not_finished(
    tiny: TinyFactory, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny("llama")
    whole = sample_corpus(model, 150)
    begun: list[int] = []

    def interrupted(*args: Any, seed: int, on_step: Callable[[int], None], **more: Any) -> Any:
        begun.append(seed)

        def step(drawn: int) -> None:
            on_step(drawn)
            if len(begun) == 3:
                raise KeyboardInterrupt

        return sample_documents(*args, seed=seed, on_step=step, **more)

    monkeypatch.setenv("FIRSTTOK_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(corpus_module, "sample_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_corpus(model, 150)
    kept = sorted((tmp_path / "other" / "documents").glob("*.json"))
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    assert sample_corpus(model, 150) == whole
    assert [path.stat().st_mtime_ns for path in kept] == times
    # Each round is begun once, the third one twice; the seeds tell them apart.
    assert begun[2] == begun[3]
    assert len(set(begun)) == len(begun) - 1 == len(list(small.glob("*.json")))


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one(tiny: TinyFactory, small: Path) -> None:
    model = tiny("gpt2")
    whole = sample_corpus(model, 120)
    lengths = [len(text_prompt(model, text).token_ids) for text in whole]
    assert sum(lengths[:-1]) < 120 <= sum(lengths)
    some = sample_corpus(model, 50)
    assert some == whole[: len(some)]
    assert 50 <= sum(lengths[: len(some)]) < 50 + lengths[len(some) - 1]
    for other in (
        sample_corpus(model, 50, seed=1),
        sample_corpus(model, 50, temperature=1.5),
        sample_corpus(model, 50, top_p=0.4),
    ):
        assert other != some


def test_a_damaged_round_is_sampled_again(
    tiny: TinyFactory, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("gpt2")
    whole = sample_corpus(model, 30)
    for path in small.glob("*.json"):
        path.write_text(path.read_text("utf-8").replace("e", "a"), "utf-8")
    assert sample_corpus(model, 30) == whole
    assert "damaged and is sampled again" in caplog.text


def test_distinct_ngrams_by_hand() -> None:
    assert distinct_ngrams(["a b c a b c"], size=3) == 3 / 4
    assert distinct_ngrams(["a b", "a b", "b a", "a"], size=2) == 2 / 3
    with pytest.raises(BadInputError, match="no text has 4 words"):
        distinct_ngrams(["one two three", ""])


@pytest.mark.usefixtures("small")
def test_the_command_writes_what_corpus_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama", tmp_path / "model")
    out = tmp_path / "text.txt"
    command = ["data", "sample", "--model", str(tmp_path / "model"), "--out", str(out)]
    assert main([*command, "--tokens", "90", "--seed", "2"]) == 0
    expected = sample_corpus(load_tiny(tmp_path / "model"), 90, seed=2)
    assert find_corpus(str(out)).documents == expected
    share = distinct_ngrams(expected)
    said = f"{len(expected)} documents, {share:.1%} of their 4-grams distinct: {out}\n"
    assert capsys.readouterr().out == said
    first = out.read_bytes()
    assert main([*command, "--tokens", "90", "--seed", "2"]) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tokens", "0"], "--tokens is 0; give at least 1"),
        (["--tokens", "9", "--temperature", "0"], "--temperature is 0.0; give a number above 0"),
        (["--tokens", "9", "--top-p", "1.5"], "--top-p is 1.5; give a number above 0"),
        (["--tokens", "9", "--seed", "-1"], "--seed is -1"),
        (["--tokens", "9", "--out", "no/such/f.txt"], "folder of --out"),
    ],
)
def test_the_command_refuses_bad_options_before_any_work(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "sample", "--model", "/none", "--out", str(tmp_path / "f.txt"), *options]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert sentence in said
    assert not list(tmp_path.iterdir())


def shipped() -> tuple[bytes, dict[str, Any]]:
    packed = BUILTIN.joinpath("sampled_corpus.txt.gz").read_bytes()
    return packed, json.loads(BUILTIN.joinpath("sampled_corpus.json").read_text("utf-8"))


def test_the_shipped_corpus_is_what_its_record_says() -> None:
    packed, record = shipped()
    text = gzip.decompress(packed)
    assert len(packed) <= 1_000_000
    # No time and no name of a file: packed again, it is the same.
    assert packed[3:8] == bytes(5)
    assert hashlib.sha256(text).hexdigest() == record["sha256"] == texts_module._SAMPLED_SHA256
    corpus = find_corpus("sampled")
    assert len(corpus.documents) == record["documents"]
    assert distinct_ngrams(corpus.documents) == pytest.approx(record["distinct_4grams"], abs=5e-4)
    assert not any(mark in text.decode() for mark in ("<|", "|>", "\r", "\x00"))


@pytest.mark.real_model
def test_the_shipped_corpus_has_the_tokens_that_are_said(real_model: Model) -> None:
    lengths = [
        len(text_prompt(real_model, each).token_ids) for each in find_corpus("sampled").documents
    ]
    assert sum(lengths) == shipped()[1]["tokens"] >= 150_000
    assert real_model.fingerprint == shipped()[1]["model"]["fingerprint"]


def test_a_corpus_that_is_not_what_was_shipped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "_SAMPLED_SHA256", "0" * 64)
    with pytest.raises(BadInputError, match="damaged or was changed; install firsttok again"):
        find_corpus("sampled")


def test_documents_come_back_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    documents = ("One.\nAnd more.", " Two: ä, \u2028 and \x0b.", "3")
    write_corpus(path, documents)
    assert find_corpus(str(path)).documents == documents


def test_names_of_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pydoc", "sampled"):
        Path(name).write_text(f"A text of one's own.\n\nNamed {name}.", "utf-8")
        own = find_corpus(f"./{name}")
        assert (own.name, len(own.documents)) == (name, 2)
        assert find_corpus(name).documents != own.documents
        assert find_corpus(name).name != own.name
    assert find_corpus() == find_corpus(DEFAULT_CORPUS)
    assert find_corpus("sampled").name == f"sampled {texts_module._SAMPLED_SHA256[:10]}"


@pytest.mark.usefixtures("own_cache")
def test_corpora_of_one_name_are_kept_apart(tiny: TinyFactory, own_cache: Path) -> None:
    model = tiny("gpt2")
    settings: dict[str, Any] = {"layer": 1, "corpus_name": "mine"}
    one = compute_second_moment(model, corpus=SENTENCES[:3], **settings)
    other = compute_second_moment(model, corpus=SENTENCES[2:], **settings)
    assert one.corpus == other.corpus == "mine"
    assert one.corpus_hash != other.corpus_hash
    assert one.content_hash != other.content_hash
    assert len(list((own_cache / "second_moments").glob("*.safetensors"))) == 2


@pytest.mark.usefixtures("own_cache")
def test_growing_parts_are_the_first_documents(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    documents = SENTENCES * 8
    monkeypatch.setattr(extra_corpus, "SIZES", (40, 200))
    with progress_bar() as progress:
        found = extra_corpus.growing(model, documents, name="own", layer=2, progress=progress)
    parts = extra_corpus.parts_of(model, documents, (40, 200))
    assert [text for part in parts for text in part] == list(documents)
    assert 40 <= found[0].tokens < 80 < 200 <= found[1].tokens < 240 < found[2].tokens
    for index, moment in enumerate(found):
        first = [text for part in parts[: index + 1] for text in part]
        whole = compute_second_moment(model, layer=2, corpus=first)
        assert moment.tokens == whole.tokens
        # The keys are float32, and batches of another make-up round them otherwise.
        assert relative(moment.matrix, whole.matrix) < 1e-5
    assert len({moment.content_hash for moment in found}) == 3


@pytest.mark.parametrize(
    ("whole", "half", "usual", "expected"),
    [
        (0.8, 0.76, 0.8, YES),
        (0.8, 0.84, 0.6, YES),
        (0.8, 0.74, 0.6, PARTLY),
        (0.8, 0.8, 0.81, NO),
        (0.8, None, 0.6, NOT_JUDGED),
    ],
)
def test_what_decides_that_the_text_is_enough(
    whole: float, half: float | None, usual: float, expected: Status
) -> None:
    tokens = {("sampled", 200): whole, ("sampled", 101): 0.0, ("pydoc topics", 100): usual}
    if half is not None:
        tokens |= {("sampled", 100): half, ("sampled", 10): 0.1}
    rows = [
        {"corpus": corpus, "tokens": count, "method": method, "locality": value + error}
        for (corpus, count), found in tokens.items()
        for method, value in (("C-ROME", found), ("ROME", 0.5))
        for error in (-0.01, 0.01) * 10
    ]
    claim = extra_corpus.CLAIMS[0]
    result = Result(script="extra_corpus", rows=tuple(rows), provenance={})
    assert judge(claim, result).status is expected
    fewer = Result(script="extra_corpus", rows=tuple(rows[1:]), provenance={})
    assert judge(claim, fewer).status is NOT_JUDGED
