"""Measurements against plain ones: whole passes of one text at a time."""

import math
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import hmean
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    ON_BOTH,
    SENTENCES,
    TinyFactory,
    build,
    naive_logits,
    naive_nlls,
)

from firsttok.data import Fact
from firsttok.editing import C_ROME, ROME, Edit, Method, compute_edit
from firsttok.engine.tail import Replay
from firsttok.errors import BadInputError, EditMismatchError
from firsttok.evaluation import (
    COLLAPSE_THRESHOLD,
    CounterfactScores,
    Perplexity,
    continuation,
    counterfact_scores,
    edit_accuracies,
    edit_accuracy,
    perplexity,
    prepare_texts,
    score_targets,
    target_probabilities,
    top_predictions,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model, load
from firsttok.probes import SeesAll
from firsttok.prompts import fact_prompt, text_prompt, with_target
from firsttok.second_moment import SecondMoment


@cache
def strong_edit(
    model: Model, fact: Fact = FACTS[0], *, layer: int = 1, method: Method = ROME
) -> Edit:
    """An edit that changes a good deal; of a model without another one in it."""
    return compute_edit(
        model,
        fact,
        method=method,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(layer).d_mlp),
        layer=layer,
        hyperparameters=Hyperparameters(steps=12, learning_rate=2.0, clamp=20.0),
    )


def plain_tokens(model: Model, text: str) -> list[int]:
    """Tokens of a text without BOS."""
    tokenizer: Any = model.tokenizer
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def naive_perplexities(model: Model, bos: BosPolicy) -> tuple[list[float], float]:
    """Perplexity of each sentence, and of all tokens together."""
    leading = list(model.with_bos(bos).leading_ids)
    nlls = [
        naive_nlls(model, leading + plain_tokens(model, text))[len(leading) :] for text in SENTENCES
    ]
    for text, nll in zip(SENTENCES, nlls, strict=True):
        assert len(nll) == len(plain_tokens(model, text)) - 1
    return [math.exp(float(nll.mean())) for nll in nlls], math.exp(float(torch.cat(nlls).mean()))


def naive_target(model: Model, text: str, target: str) -> tuple[float, list[int], list[int]]:
    """Mean NLL of a target after a text, its tokens, and what would be said at their places."""
    ids = [*model.leading_ids, *plain_tokens(model, text)]
    wanted = plain_tokens(model, f" {target}")
    output = naive_logits(model, ids + wanted)[len(ids) - 1 : -1].double()
    nll = -output.log_softmax(-1)[torch.arange(len(wanted)), torch.tensor(wanted)]
    return float(nll.mean()), wanted, output.argmax(-1).tolist()


@pytest.mark.parametrize("bos", list(BosPolicy))
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("plain")
def test_perplexity_equals_that_of_each_sentence_alone(
    tiny: TinyFactory, arch: str, bos: BosPolicy
) -> None:
    model = tiny(arch)
    each, corpus = naive_perplexities(model, bos)
    found = perplexity(model, SENTENCES, bos=bos)
    assert found.per_sentence == pytest.approx(each, rel=1e-5)
    assert found.mean == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert found.corpus == pytest.approx(corpus, rel=1e-5)


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_perplexity_leaves_bos_out_unless_told(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    plain = perplexity(model, SENTENCES)
    assert plain == perplexity(model.with_bos(BosPolicy.WITHOUT), SENTENCES)
    assert plain.mean != pytest.approx(perplexity(model, SENTENCES, bos=BosPolicy.WITH).mean)


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize(("arch", "plain"), ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_prepared_texts_measure_what_perplexity_does(
    tiny: TinyFactory, arch: str, layer: int, bos: BosPolicy
) -> None:
    model = tiny(arch)
    prepared = prepare_texts(model, SENTENCES, layer=layer, bos=bos)
    before = perplexity(model, SENTENCES, bos=bos)
    edits = [strong_edit(model, layer=layer), strong_edit(model, FACTS[3], layer=layer)]
    found = prepared.measure_edits(model, edits)
    assert len({measured.mean for measured in found}) == 2
    for edit, measured in zip(edits, found, strict=True):
        with edit.applied(model):
            expected = perplexity(model, SENTENCES, bos=bos)
        assert expected.mean != pytest.approx(before.mean, rel=1e-3)
        assert measured.per_sentence == pytest.approx(expected.per_sentence, rel=1e-5)
        assert measured.corpus == pytest.approx(expected.corpus, rel=1e-5)


@pytest.mark.parametrize("change", [None, SeesAll(position=0)])
def test_a_last_token_is_run_only_where_others_see_it(
    tiny: TinyFactory, change: SeesAll | None
) -> None:
    model = tiny("llama") if change is None else tiny("llama").intervened(change)
    prepared = prepare_texts(model, SENTENCES, layer=1)
    run = sum(int(group.tail.batch.attention_mask.sum()) for group in prepared.groups)
    ids = [text_prompt(model.with_bos(BosPolicy.WITHOUT), text).token_ids for text in SENTENCES]
    assert run == sum(map(len, ids)) - (len(ids) if change is None else 0)
    nothing = strong_edit(tiny("llama")).scaled(0.0)
    (found,) = prepared.measure_edits(model, [nothing])
    assert found.per_sentence == pytest.approx(perplexity(model, SENTENCES).per_sentence, rel=1e-5)


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("at", ["first", "later", "all"])
def test_an_edit_acts_at_some_tokens_alone(arch: str, at: str, tiny: TinyFactory) -> None:
    """As a hook that adds the update there to every sentence, run by itself."""
    model = tiny(arch)
    edit = strong_edit(model, layer=1)
    found = prepare_texts(model, SENTENCES, layer=1).measure_edits(model, [edit, edit], at=at)
    site, keys = model.site(1), dict[str, torch.Tensor]()

    def keep(given: torch.Tensor, hook: Any) -> None:
        keys["keys"] = given

    def add(values: torch.Tensor, hook: Any) -> torch.Tensor:
        change = edit.delta.change(keys["keys"])
        where = torch.zeros(change.shape[1], 1, dtype=torch.bool)
        where[0] = at != "later"
        where[1:] = at != "first"
        return values + change * where

    with model.hooks([(site.key_hook, keep), (site.value_hook, add)]):
        expected = [perplexity(model, [text]).mean for text in SENTENCES]
    for measured in found:
        assert measured.per_sentence == pytest.approx(expected, rel=1e-4)


def test_an_edit_acts_at_known_tokens_only(tiny: TinyFactory) -> None:
    prepared = prepare_texts(tiny("gpt2"), SENTENCES, layer=1)
    with pytest.raises(BadInputError, match="first or later tokens, not at 'subject'"):
        prepared.measure_edits(tiny("gpt2"), [], at="subject")


@pytest.mark.parametrize("most", [1, 100_000])
def test_edits_side_by_side_or_one_by_one_measure_the_same(
    tiny: TinyFactory, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    prepared = prepare_texts(model, SENTENCES, layer=1)
    edits = [strong_edit(model, fact) for fact in FACTS]
    alone = [prepared.measure_edits(model, [edit])[0] for edit in edits]
    module = import_module("firsttok.evaluation.perplexity")
    monkeypatch.setattr(module, "_MAX_TOKENS", most)
    monkeypatch.setattr(module, "_PLACES", 5)
    for measured, other in zip(prepared.measure_edits(model, edits), alone, strict=True):
        assert measured.per_sentence == pytest.approx(other.per_sentence, rel=1e-5)


def test_a_model_that_runs_whole_is_measured_as_well(tmp_path: Path) -> None:
    build("gemma2", tmp_path)
    model = load(str(tmp_path))
    assert model.replay is Replay.WHOLE
    edits = [strong_edit(model, FACTS[0], method=method) for method in (ROME, C_ROME)]
    found = prepare_texts(model, SENTENCES, layer=1).measure_edits(model, edits)
    accuracies = edit_accuracies(model, FACTS[3], edits)
    for edit, measured, accuracy in zip(edits, found, accuracies, strict=True):
        with edit.applied(model):
            expected = perplexity(model, SENTENCES)
        assert measured.per_sentence == pytest.approx(expected.per_sentence, rel=1e-4)
        assert accuracy == edit_accuracy(model, FACTS[3], edit)


def test_prepared_texts_refuse_an_edited_layer_and_an_edit_of_another(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    prepared = prepare_texts(model, SENTENCES, layer=1)
    edit = strong_edit(model, layer=1)
    with edit.applied(model), pytest.raises(EditMismatchError, match="undo that edit"):
        prepared.measure_edits(model, [edit])
    with pytest.raises(BadInputError, match="prepared for the output of layer 1"):
        prepared.measure_edits(model, [strong_edit(model, layer=2)])
    assert prepared.measure_edits(model, []) == []


def test_an_edit_above_that_stands_in_the_weights_is_measured_along(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    prepared = prepare_texts(model, SENTENCES, layer=1)
    edit, above = strong_edit(model, layer=1), strong_edit(model, layer=2)
    with above.applied(model):
        (found,) = prepared.measure_edits(model, [edit])
        with edit.applied(model):
            expected = perplexity(model, SENTENCES)
    assert found.mean == pytest.approx(expected.mean, rel=1e-5)


def test_sentences_that_cannot_be_scored_are_named(tiny: TinyFactory) -> None:
    model = tiny("llama")
    with pytest.raises(BadInputError, match="no sentences"):
        perplexity(model, [])
    with pytest.raises(BadInputError, match="'England' has one token"):
        perplexity(model, ["Rome is", "England"])


def test_a_sentence_of_one_token_behind_bos_is_named(tiny: TinyFactory) -> None:
    with pytest.raises(BadInputError, match="'England' has one token"):
        perplexity(tiny("llama"), ["Rome is", "England"], bos=BosPolicy.WITH)


def test_collapse_is_above_the_threshold_or_no_number() -> None:
    def collapsed(mean: float) -> bool:
        return Perplexity(mean=mean, corpus=1.0, per_sentence=(mean,)).collapsed

    assert not collapsed(COLLAPSE_THRESHOLD)
    assert collapsed(math.nextafter(COLLAPSE_THRESHOLD, math.inf))
    assert collapsed(math.nan)
    assert collapsed(math.inf)


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("plain")
def test_scores_equal_those_of_each_prompt_alone(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    cases = [(fact.prompt, target) for fact in FACTS for target in (fact.target_new, "the city")]
    prompts = [with_target(model, text_prompt(model, text), target) for text, target in cases]
    scores = score_targets(model, prompts)
    for (text, target), score in zip(cases, scores, strict=True):
        nll, wanted, said = naive_target(model, text, target)
        assert score.nll == pytest.approx(nll, rel=1e-5)
        assert score.probability == pytest.approx(math.exp(-nll), rel=1e-4)
        assert list(score.target_ids) == wanted
        assert list(score.predicted_ids) == said
        hits = [a == b for a, b in zip(wanted, said, strict=True)]
        assert score.accuracy == sum(hits) / len(hits)
    assert score_targets(model, prompts[::-1])[0].nll == pytest.approx(scores[-1].nll, rel=1e-5)
    assert score_targets(model, []) == []


@pytest.mark.parametrize("target", [None, "the city"])
def test_target_probabilities_follow_the_contexts(tiny: TinyFactory, target: str | None) -> None:
    model = tiny("llama")
    found = target_probabilities(model, FACTS[1], CONTEXTS, target=target)
    expected = [
        math.exp(-naive_target(model, text, target or FACTS[1].target_new)[0])
        for text in (template.replace("{}", FACTS[1].prompt) for template in CONTEXTS.templates)
    ]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("context", ["{}", "I know. {}"])
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("plain")
def test_accuracy_equals_a_direct_computation(tiny: TinyFactory, arch: str, context: str) -> None:
    model = tiny(arch)
    # What the model says itself is the target, so that the shares are neither all 0 nor all 1.
    tokenizer: Any = model.tokenizer
    said = naive_target(model, FACTS[0].paraphrases[0], "Berlin")[2]
    target = tokenizer.decode(said).strip() or "Berlin"
    fact = Fact(
        subject="England",
        template=FACTS[0].template,
        target_new=f"{target} Berlin",
        target_true="London city of Rome",
        paraphrases=FACTS[0].paraphrases,
        neighbours=FACTS[0].neighbours,
    )
    edit = strong_edit(model, fact, method=C_ROME)
    found = edit_accuracy(model, fact, edit, context=context)
    before = naive_target(model, fact.neighbours[0], fact.target_true)[2]
    with edit.applied(model):
        _, new, said_new = naive_target(model, context.replace("{}", fact.prompt), fact.target_new)
        _, _, said_paraphrase = naive_target(model, fact.paraphrases[0], fact.target_new)
        after = naive_target(model, fact.neighbours[0], fact.target_true)[2]
    assert found.efficacy == share(new, said_new)
    assert found.generalization == share(new, said_paraphrase)
    assert found.locality == share(before, after)


def share(one: list[int], other: list[int]) -> float:
    """Share of places at which two lists agree."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def test_accuracy_without_prompts_to_measure_is_none(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    found = edit_accuracy(model, FACTS[3], strong_edit(model, FACTS[3]))
    assert (found.generalization, found.locality) == (None, None)
    assert 0 <= found.efficacy <= 1


def test_an_edit_that_changes_nothing_keeps_all_locality(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    edit = strong_edit(model)
    nothing = edit.scaled(0)
    assert edit_accuracy(model, FACTS[0], nothing).locality == 1.0


@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("plain")
def test_counterfact_scores_equal_a_direct_computation(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    fact = FACTS[0]

    def preferences(texts: list[str], wanted: str, other: str) -> tuple[float, float]:
        gaps = [
            math.exp(-naive_target(model, text, wanted)[0])
            - math.exp(-naive_target(model, text, other)[0])
            for text in texts
        ]
        return sum(gap > 0 for gap in gaps) / len(gaps), sum(gaps) / len(gaps)

    es, em = preferences([fact.prompt], fact.target_new, fact.target_true)
    ps, pm = preferences(list(fact.paraphrases), fact.target_new, fact.target_true)
    ns, nm = preferences(list(fact.neighbours), fact.target_true, fact.target_new)
    found = counterfact_scores(model, fact)
    assert (found.es, found.ps, found.ns) == (es, ps, ns)
    assert found.em == pytest.approx(em, rel=1e-3, abs=1e-8)
    assert found.pm == pytest.approx(pm, rel=1e-3, abs=1e-8)
    assert found.nm == pytest.approx(nm, rel=1e-3, abs=1e-8)


def test_counterfact_scores_see_an_edit(tiny: TinyFactory) -> None:
    model = tiny("gpt2", "float64")
    before = counterfact_scores(model, FACTS[0])
    with strong_edit(model).applied(model):
        after = counterfact_scores(model, FACTS[0])
    assert after.em is not None
    assert before.em is not None
    assert after.em > before.em


def test_missing_prompts_give_no_score(tiny: TinyFactory) -> None:
    found = counterfact_scores(tiny("gpt2"), FACTS[3])
    assert (found.ps, found.pm, found.ns, found.nm, found.score) == (None,) * 5


@pytest.mark.parametrize(
    ("es", "ps", "ns", "score"),
    [
        (1.0, 0.5, 0.25, 3 / (1 + 2 + 4)),
        (1.0, 1.0, 0.0, 0.0),
        (1.0, None, 0.5, None),
        (1.0, 0.5, None, None),
    ],
)
def test_the_score_is_the_harmonic_mean(
    es: float, ps: float | None, ns: float | None, score: float | None
) -> None:
    found = CounterfactScores(es=es, ps=ps, ns=ns, em=0.0, pm=None, nm=None).score
    assert found == (None if score is None else pytest.approx(score))
    if score and ps and ns:
        assert found == pytest.approx(float(hmean([es, ps, ns])))


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.parametrize("arch", DECODERS)
def test_top_predictions_are_the_most_probable_tokens(
    tiny: TinyFactory, arch: str, bos: BosPolicy
) -> None:
    model = tiny(arch).with_bos(bos)
    tokenizer: Any = model.tokenizer
    ids = [*model.leading_ids, *plain_tokens(model, FACTS[0].prompt)]
    expected = naive_logits(model, ids)[-1].softmax(-1).sort(descending=True)
    found = top_predictions(model, FACTS[0].prompt, count=7)
    assert [text for text, _ in found] == [
        tokenizer.decode([token]) for token in expected.indices[:7].tolist()
    ]
    assert [p for _, p in found] == pytest.approx(expected.values[:7].tolist(), rel=1e-4)


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.parametrize("arch", DECODERS)
def test_a_continuation_takes_the_argmax_each_time(
    tiny: TinyFactory, arch: str, bos: BosPolicy
) -> None:
    model = tiny(arch).with_bos(bos)
    tokenizer: Any = model.tokenizer
    ids = [*model.leading_ids, *plain_tokens(model, FACTS[1].prompt)]
    added: list[int] = []
    for _ in range(6):
        added.append(int(naive_logits(model, ids + added)[-1].argmax()))
    assert continuation(model, FACTS[1].prompt, tokens=6) == tokenizer.decode(added)
    assert continuation(model, FACTS[1].prompt, tokens=0) == ""


def test_measuring_is_the_same_inside_an_edit_made_by_hand(tiny: TinyFactory) -> None:
    model = tiny("gptj")
    edit = strong_edit(model)
    prompt = with_target(model, fact_prompt(model, FACTS[0]), FACTS[0].target_new)
    with edit.applied(model):
        (inside,) = score_targets(model, [prompt])
    weight = model.site(1).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.outer(edit.left, edit.right).T)
    try:
        nll, _, _ = naive_target(model, FACTS[0].prompt, FACTS[0].target_new)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert inside.nll == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("arch", "plain"), ON_BOTH, indirect=["plain"])
@pytest.mark.usefixtures("plain")
def test_edits_above_are_measured_from_the_layer_below_them(
    tiny: TinyFactory, arch: str, layer: int
) -> None:
    model = tiny(arch)
    edit = strong_edit(model, layer=layer + 1) + strong_edit(model, FACTS[3], layer=3)
    prepared = prepare_texts(model, SENTENCES, layer=layer)
    expected = perplexity(model.edited(edit), SENTENCES)
    found = prepared.measure(model.edited(edit))
    assert found.per_sentence == pytest.approx(expected.per_sentence, rel=1e-5)
    with pytest.raises(EditMismatchError, match="undo that edit"):
        prepared.measure(model.edited(strong_edit(model, layer=layer)))
