"""Benchmarks of what needs no optimisation: perplexity, keys, second moment."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from edit_cases import fast_edits
from measuring import Extras, Plan, Side, Table
from naive import (
    NaiveKeys,
    naive_fact_keys,
    naive_keys,
    naive_perplexities,
    naive_second_moment,
)
from setting import Setting

from firsttok.data import builtin_facts, builtin_sentences
from firsttok.editing import RankOneEdit, Slot
from firsttok.evaluation import Perplexity, prepare_texts
from firsttok.keys import FactKeys, Keys, capture_keys, fact_keys
from firsttok.prompts import fact_prompt, positions
from firsttok.second_moment import SecondMoment, compute_second_moment, default_corpus

__all__ = ["keys", "perplexity_of_edits", "second_moment"]

FACTS_IN_CONTEXTS = 8


def perplexity_of_edits(setting: Setting) -> Plan:
    """ME-PPL after each of some edits."""
    setting.prepare()
    model, layer, texts = (
        setting.model,
        setting.layer,
        builtin_sentences()[: setting.amounts.sentences],
    )
    facts = setting.facts[: setting.amounts.edits]
    # Enough to change the model; what an edit says makes no difference to the time.
    edits = fast_edits(setting, facts, replace(setting.hyperparameters, steps=4, stop_below=0.0))
    slow = edits[: setting.amounts.naive_edits]
    prepared = prepare_texts(model, texts, layer=layer)

    def naive(one_by_one: bool) -> list[list[float]]:
        found: list[list[float]] = []
        for edit in slow:
            with setting.naive.edited(edit.left, edit.right):
                found.append(naive_perplexities(setting.naive, texts, one_by_one=one_by_one))
        return found

    def fast(whole: bool) -> list[Perplexity]:
        ready = prepare_texts(model, texts, layer=layer) if whole else prepared
        return ready.measure_edits(model, edits)

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        worst = max(
            abs(found / expected - 1)
            for measured, plain in zip(results["prepared"], results["batched"], strict=False)
            for found, expected in zip(measured.per_sentence, plain, strict=True)
        )
        note = (
            f"{len(edits)} edits on the fast side, {len(slow)} on the naive side, "
            f"{len(texts)} sentences."
        )
        return Extras(
            tables=(_differences(("perplexity of a sentence, naive batched", worst)),),
            notes=(note,),
        )

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
        warm=lambda: prepared.measure_edits(model, edits[:1]),
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
        return Extras(
            tables=(_differences(("a bare key", bare_worst), ("k_bar and k^u", worst)),),
        )

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
        warm=lambda: capture_keys(model, facts[:2], layers=[layer]),
        check=check,
    )


def second_moment(setting: Setting) -> Plan:
    """C over the first tokens of the default corpus."""
    setting.prepare()
    model, layer, tokens = setting.model, setting.layer, setting.amounts.moment_tokens
    documents = default_corpus()

    def fast(most: int) -> SecondMoment:
        # It keeps what it computed: each run has a cache of its own.
        before = os.environ.get("FIRSTTOK_CACHE")
        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            os.environ["FIRSTTOK_CACHE"] = folder
            try:
                return compute_second_moment(model, layer=layer, max_tokens=most)
            finally:
                os.environ.pop("FIRSTTOK_CACHE")
                if before is not None:
                    os.environ["FIRSTTOK_CACHE"] = before

    def check(results: Mapping[str, Any], _seconds: Mapping[str, Sequence[float]]) -> Extras:
        matrix, count = results["naive"]
        found: SecondMoment = results["fast"]
        if found.tokens != count:
            raise ValueError(f"the fast side took {found.tokens} tokens, the naive side {count}")
        return Extras(
            tables=(_differences(("the second moment", _relative(found.matrix, matrix))),),
            notes=("The fast side also tokenises the corpus and saves the matrix.",),
        )

    return Plan(
        sides=(
            Side(label="fast", run=lambda: fast(tokens), items=tokens, unit="token"),
            Side(
                label="naive",
                run=lambda: naive_second_moment(setting.naive, documents, max_tokens=tokens),
                items=tokens,
                unit="token",
            ),
        ),
        pairs=(("second moment", "fast", "naive"),),
        warm=lambda: fast(64),
        check=check,
    )


def _side(label: str, run: Any, edits: Sequence[RankOneEdit]) -> Side:
    return Side(label=label, run=run, items=len(edits), unit="edit")


def _differences(*rows: tuple[str, float]) -> Table:
    return Table(
        title="Largest relative difference from the naive side",
        columns=("of", "difference"),
        rows=rows,
    )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().cpu().norm())
