"""Benchmarks of what needs no optimisation: perplexity, keys, second moment."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measuring import Extras, Plan, Side
from naive import (
    NaiveKeys,
    naive_fact_keys,
    naive_keys,
    naive_perplexities,
    naive_second_moment,
)
from setting import Setting
from tolerances import ALLOWED, Difference, judge

from firsttok.data import builtin_facts, builtin_sentences
from firsttok.editing import Edit, Slot
from firsttok.evaluation import Perplexity, PreparedTexts, prepare_texts
from firsttok.keys import FactKeys, Keys, capture_keys, fact_keys
from firsttok.prompts import fact_prompt, positions
from firsttok.second_moment import SecondMoment, _Pass, _stream, default_corpus

__all__ = ["keys", "perplexity_of_edits", "random_edits", "second_moment"]

FACTS_IN_CONTEXTS = 8


def perplexity_of_edits(setting: Setting) -> Plan:
    """ME-PPL after each of some edits."""
    setting.prepare()
    model, layer, texts = (
        setting.model,
        setting.layer,
        builtin_sentences()[: setting.amounts.sentences],
    )
    edits = random_edits(setting, setting.amounts.edits)
    slow = edits[: setting.amounts.naive_edits]

    @cache
    def prepared() -> PreparedTexts:
        return prepare_texts(model, texts, layer=layer)

    def naive(one_by_one: bool) -> list[list[float]]:
        found: list[list[float]] = []
        for edit in slow:
            with setting.naive.edited(edit.left, edit.right):
                found.append(naive_perplexities(setting.naive, texts, one_by_one=one_by_one))
        return found

    def fast(whole: bool) -> list[Perplexity]:
        ready = prepare_texts(model, texts, layer=layer) if whole else prepared()
        return ready.measure_edits(model, edits)

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        worst = max(
            abs(found / expected - 1)
            for measured, plain in zip(results["prepared"], results["batched"], strict=False)
            for found, expected in zip(measured.per_sentence, plain, strict=True)
        )
        note = (
            f"{len(edits)} edits of random vectors on the fast side, {len(slow)} of them on the "
            f"naive side, {len(texts)} sentences; what an edit says makes no difference to the "
            "time."
        )
        of = "perplexity of a sentence, naive batched"
        judged = _judge((of, worst, ALLOWED[setting.dtype].perplexity))
        return replace(judged, notes=(note,))

    def warm() -> None:
        prepared().measure_edits(model, edits[:1])
        for one_by_one in (False, True):
            naive_perplexities(setting.naive, texts[:2], one_by_one=one_by_one)

    return Plan(
        sides=(
            _side("prepared", lambda: fast(whole=False), edits),
            _side("with preparation", lambda: fast(whole=True), edits),
            _side("batched", lambda: naive(one_by_one=False), slow),
            _side("one by one", lambda: naive(one_by_one=True), slow),
        ),
        pairs=(
            ("perplexity of edits, against padded batches", "prepared", "batched"),
            ("perplexity of edits, against one sentence at a time", "prepared", "one by one"),
            ("the same, preparation included, against batches", "with preparation", "batched"),
        ),
        warm=warm,
        check=check,
    )


def keys(setting: Setting) -> Plan:
    """Keys of facts at the edited layer."""
    setting.prepare()
    model, layer, naive = setting.model, setting.layer, setting.naive
    facts = builtin_facts()
    some = setting.facts[:FACTS_IN_CONTEXTS]

    def bare() -> torch.Tensor:
        prompts = [fact_prompt(model, fact) for fact in facts]
        return naive_keys(naive, prompts, positions(prompts).tolist())[0]

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        captured: Keys = results["bare"]
        found: list[FactKeys] = results["in contexts"]
        expected: list[NaiveKeys] = results["naive in contexts"]
        worst = max(
            _relative(slot.pick(one), plain.keys[slot])
            for one, plain in zip(found, expected, strict=True)
            for slot in Slot
        )
        bare_worst = max(
            _relative(one, plain)
            for one, plain in zip(captured.at(layer), results["naive bare"], strict=True)
        )
        allowed = ALLOWED[setting.dtype].key
        return _judge(("a bare key", bare_worst, allowed), ("k_bar and k^u", worst, allowed))

    def warm() -> None:
        capture_keys(model, facts[:2], layers=[layer])
        fact_keys(model, some[0], setting.contexts, layer=layer)
        naive_fact_keys(naive, some[0], setting.contexts)

    return Plan(
        sides=(
            Side(
                label="bare",
                run=lambda: capture_keys(model, facts, layers=[layer]),
                items=len(facts),
                unit="fact",
            ),
            Side(label="naive bare", run=bare, items=len(facts), unit="fact"),
            Side(
                label="in contexts",
                run=lambda: [fact_keys(model, f, setting.contexts, layer=layer) for f in some],
                items=len(some),
                unit="fact",
            ),
            Side(
                label="naive in contexts",
                run=lambda: [naive_fact_keys(naive, f, setting.contexts) for f in some],
                items=len(some),
                unit="fact",
            ),
        ),
        pairs=(
            ("keys of bare prompts", "bare", "naive bare"),
            ("keys in all contexts", "in contexts", "naive in contexts"),
        ),
        warm=warm,
        check=check,
    )


def second_moment(setting: Setting) -> Plan:
    """C over the first tokens of the default corpus, against full forward passes.

    Timed is what grows with the corpus: the same windows are made and run on both sides. What comes
    once for a matrix (its eigenvalues, its factor, the file) is on neither.
    """
    setting.prepare()
    model, layer, tokens = setting.model, setting.layer, setting.amounts.moment_tokens
    documents = default_corpus()

    def fast(most: int) -> SecondMoment:
        # It goes on where it stopped: each run has a folder of its own.
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            over = _Pass(documents=documents, name="", corpus_hash="", max_tokens=most)
            return _stream(model, over, (layer,), Path(folder) / "moment.partial", None)[layer]

    def naive(most: int) -> tuple[torch.Tensor, int]:
        return naive_second_moment(setting.naive, documents, max_tokens=most)

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        matrix, count = results["naive"]
        found: SecondMoment = results["fast"]
        if found.tokens != count:
            raise ValueError(f"the fast side took {found.tokens} tokens, the naive side {count}")
        worst = _relative(found.matrix, matrix)
        judged = _judge(("the second moment", worst, ALLOWED[setting.dtype].moment))
        note = (
            f"{count} tokens in the same windows on both sides. The naive side is a full forward "
            "pass with logits, which the released code does not make for this: it stops at the "
            "edited layer, as the fast side does. Both cut the corpus into windows and sum up in "
            "float64 inside the clock; eigenvalues, factor and file are on neither side."
        )
        return replace(judged, notes=(note,))

    def warm() -> None:
        fast(256)
        naive(256)

    return Plan(
        sides=(
            Side(label="fast", run=lambda: fast(tokens), items=tokens, unit="token"),
            Side(label="naive", run=lambda: naive(tokens), items=tokens, unit="token"),
        ),
        pairs=(("second moment, against a full forward pass", "fast", "naive"),),
        warm=warm,
        check=check,
    )


def random_edits(setting: Setting, count: int) -> list[Edit]:
    """Edits of random vectors that move the perplexity and leave it finite."""
    site = setting.model.site(setting.layer)
    generator = torch.Generator().manual_seed(0)
    # Many times what the weight does to a unit key: most keys hardly meet a random direction.
    size = 30 * float(site.matrix.float().norm()) / site.d_mlp**0.5

    def unit(width: int) -> torch.Tensor:
        vector = torch.randn(width, generator=generator)
        return (vector / vector.norm()).to(site.matrix)

    return [
        Edit.of(setting.model, setting.layer, unit(site.d_mlp), size * unit(site.d_model))
        for _ in range(count)
    ]


def _side(label: str, run: Any, edits: Sequence[Edit]) -> Side:
    return Side(label=label, run=run, items=len(edits), unit="edit")


def _judge(*rows: tuple[str, float, float]) -> Extras:
    title = "Largest relative difference from the naive side"
    return judge(title, *(Difference(of=of, found=found, allowed=most) for of, found, most in rows))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().cpu().norm())
