"""How a target is joined to its prompt: the rule, and that every measure goes by it."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from text_models import ADDED, byte_level, sentence_piece, spoken, unigram
from tiny import BARE_ONLY, CONTEXTS, FACTS, SENTENCES, TinyFactory, edits_of

from firsttok.cli import main
from firsttok.data import JOINS, Fact, builtin_facts, check_facts, load_facts, text_joint
from firsttok.data.joints import STRADDLES, Join
from firsttok.editing import FC_ROME, ROME, Slot, ValueStore
from firsttok.errors import FactFormatError, TargetTokenError
from firsttok.evaluation import counterfact_scores, score_targets, target_probabilities
from firsttok.exploration import observe
from firsttok.hyperparameters import Hyperparameters
from firsttok.measuring import Plan, measure_chunk, measure_facts
from firsttok.models import Model
from firsttok.options import add_prompt_options
from firsttok.paper.cases import measure_accuracy
from firsttok.probes import answered_facts
from firsttok.prompts import fact_prompt, joined_target, text_prompt, with_target
from firsttok.second_moment import SecondMoment
from firsttok.study import Study
from firsttok.token_strips import tokens

SPACE = [
    ("The capital of France is", "Paris"),
    ("The mother tongue of Nanalan'", "English"),
    ('It is led by All-Ukrainian Union "Svoboda"', "today"),
    ("Die Hauptstadt heißt „Berlin“", "heute"),
    ("Die Hauptstadt heißt »Berlin«", "heute"),
    ("La capitale est « Paris »", "depuis"),
    ("La capitale est « Paris\u00a0»", "depuis"),
    ("It is called (in France)", "Paris"),
    ('The screen of 5"', "is"),
    ("The Japanese name of Tokyo is", "東京"),
    ("日本の首都は", "Tokyo"),
    ("国は「東京」とOsaka", "です"),
    ('国は"東京"', "Tokyo"),
    ("프랑스의 수도는", "파리"),
    ("בירת צרפת היא", "פריז"),
    ("What is the capital? [/INST]", "Paris"),
    ("I never left 🦊", "Paris"),
    ("It costs $", "5"),
]
NOTHING = [
    ("Q: Where is France?\nA:\n", "Paris"),
    ("Q: Where is France?\r\n", "Paris"),
    ("France\t", "Paris"),
    ("首都は\u3000", "Paris"),
    ('The capital of France is "', "Paris"),
    ("The capital of France is '", "Paris"),
    ("The capital of France is `", "Paris"),
    ("England's capital is '", "London"),
    ("The capital of France is “", "Paris"),
    ("The capital of France is \u2018", "Paris"),
    ("La capitale de la France est «", "Paris"),
    ("La capitale de la France est «\u00a0", "Paris"),
    ("Die Hauptstadt heißt „", "Berlin"),
    ("Die Hauptstadt heißt »", "Berlin"),
    ("Huvudstaden är ”", "Paris"),
    ("The capital of France (", "Paris"),
    ("The capital of France [", "Paris"),
    ("The capital of France {", "Paris"),
    ("She said '\"", "Paris"),
    ('("', "Paris"),
    ('<a title="', "Paris"),
    ('{"capital":"', "Paris"),
    ("Pregunta: ¿", "Dónde"),
    ("法国的首都是", "巴黎"),
    ("法国的首都是\uff1a", "巴黎"),
    ("法国的首都是\uff1a", "Paris"),
    ('法国的首都是"', "Paris"),
    ("他说“", "Paris"),
    ("首都は「", "Paris"),
    ("フランスの首都は", "パリ"),
    ("フランスの人口は", "6700万"),
    ("人口は", "2020"),
    ("首都は(東京)", "です"),
    ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส"),
    ("ရန်ကုန်သည်", "မြန်မာ"),
]


@pytest.mark.parametrize(("prompt", "target"), SPACE)
def test_a_target_is_joined_by_one_space(prompt: str, target: str) -> None:
    assert [text_joint(prompt, target, join) for join in JOINS] == [" ", " ", ""]


@pytest.mark.parametrize(("prompt", "target"), NOTHING)
def test_a_target_is_joined_by_nothing(prompt: str, target: str) -> None:
    assert [text_joint(prompt, target, join) for join in JOINS] == ["", " ", ""]


@pytest.mark.parametrize("prompt", [f"{ADDED}user\nWho?{ADDED}", f"Who? {ADDED}"])
@pytest.mark.parametrize("build", [byte_level, sentence_piece, unigram])
def test_nothing_joins_a_target_to_the_end_marker_of_a_chat(
    tiny: TinyFactory, prompt: str, build: Callable[[], Any]
) -> None:
    model = spoken(tiny("gpt2"), build())
    found = [joined_target(model, text_prompt(model, prompt), " Paris ", join) for join in JOINS]
    assert found == ["Paris", " Paris", " Paris "]


@pytest.mark.parametrize("build", [byte_level, sentence_piece, unigram])
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("end", ["is", 'is "', "is\n", "is ("])
def test_targets_are_tokenised_behind_their_prompt_as_they_are_joined(
    tiny: TinyFactory, build: Callable[[], Any], join: Join, end: str
) -> None:
    model = spoken(tiny("gpt2"), build())
    tokenizer: Any = model.tokenizer
    prompt = text_prompt(model, f"The capital of France {end}")
    whole = prompt.text + joined_target(model, prompt, "Rome", join)
    try:
        found = with_target(model, prompt, "Rome", join=join)
    except TargetTokenError:
        ids = tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])
        assert ids[: len(prompt.token_ids)] != prompt.token_ids
        # Only where a word goes on: "isRome".
        assert (join, end) == ("none", "is")
        return
    assert found.token_ids == tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert found.token_ids[: len(prompt.token_ids)] == prompt.token_ids


def test_a_space_that_belongs_to_the_target_is_named(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with pytest.raises(TargetTokenError, match="leave the space at the prompt's end out"):
        with_target(model, text_prompt(model, "The capital is "), "Rome")


def test_every_wording_of_the_built_in_facts_is_joined_by_a_space() -> None:
    for fact in builtin_facts():
        assert (fact.notice, fact.join, fact.straddle) == ("", "auto", "refuse")
        assert "join" not in fact.as_record()
        assert "straddle" not in fact.as_record()
        wordings = [fact.prompt, *fact.paraphrases, *fact.neighbours]
        answers = (fact.target_new, fact.target_true, fact.answered_neighbours[0][1])
        assert {text_joint(text, answer) for text in wordings for answer in answers} == {" "}


STEPS = Hyperparameters(steps=3, learning_rate=0.5, weight_decay=0.1, clamp=4.0, kl=0.0625)
SPACED = replace(
    FACTS[0],
    target_new="Rome",
    join="space",
    neighbour_answers=("Paris",) * len(FACTS[0].neighbours),
)
WRITTEN = replace(
    SPACED,
    target_new=" Rome",
    target_true=" London",
    join="none",
    neighbour_answers=(" Paris",) * len(SPACED.neighbours),
)
"""The same texts as of ``SPACED``, since ``none`` takes them as they are."""
QUOTED = replace(
    SPACED,
    template=SPACED.template + ' "',
    paraphrases=tuple(f'{text} "' for text in SPACED.paraphrases),
    neighbours=tuple(f'{text} "' for text in SPACED.neighbours),
    join="auto",
)
"""Behind a quote ``auto`` puts nothing."""
BARE_TARGETS = replace(QUOTED, join="none")
SPACED_TARGETS = replace(QUOTED, join="space")


def study_of(model: Model, folder: Path) -> Study:
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=STEPS,
        texts=SENTENCES[:2],
        work=folder,
    )


def numbers(study: Study, fact: Fact) -> dict[str, Any]:
    """Everything that is measured after a target."""
    model = study.model
    ((_, edits),) = study.edits([fact], [ROME, FC_ROME])
    rows = measure_chunk(study, [fact], Plan(methods=(ROME,)))
    wanted = ("efficacy", "generalization", "locality", "em", "pm", "nm", "final_loss")
    return {
        "losses": {name: edit.losses for name, edit in edits.items()},
        "right": edits["rome"].right.tolist(),
        "probabilities": target_probabilities(model, fact, CONTEXTS),
        "old": target_probabilities(model, fact, BARE_ONLY, target=fact.target_true),
        "scores": asdict(counterfact_scores(model, fact)),
        "observed": observe(
            model, fact, study.original_perplexity, contexts=CONTEXTS
        ).target_probability,
        "accuracies": measure_accuracy(study, [fact], [ROME]),
        "rows": [{name: row[name] for name in wanted} for row in rows],
        "scan": measure_facts(study, [fact], [ROME])[0].final_loss,
    }


@pytest.fixture(scope="module")
def measured(
    tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    study = study_of(tiny("llama"), tmp_path_factory.mktemp("work"))
    facts = {
        "spaced": SPACED,
        "written": WRITTEN,
        "auto": replace(SPACED, join="auto"),
        "quoted": QUOTED,
        "bare targets": BARE_TARGETS,
        "spaced targets": SPACED_TARGETS,
    }
    return {name: numbers(study, fact) for name, fact in facts.items()}


MEASURES = ("losses", "right", "probabilities", "old", "scores", "observed", "rows", "scan")


@pytest.mark.parametrize(
    ("one", "other"),
    [("written", "spaced"), ("auto", "spaced"), ("quoted", "bare targets")],
)
@pytest.mark.parametrize(
    "name",
    [*MEASURES, "accuracies"],
)
def test_each_measure_depends_on_the_texts_as_they_are_joined(
    measured: dict[str, dict[str, Any]], one: str, other: str, name: str
) -> None:
    assert measured[one][name] == measured[other][name]


@pytest.mark.parametrize("name", MEASURES)
def test_another_joint_gives_other_numbers(measured: dict[str, dict[str, Any]], name: str) -> None:
    # The study's folder is one for all facts: nothing is kept under less than it depends on.
    assert measured["quoted"][name] != measured["spaced targets"][name]


def test_the_first_token_of_an_answer_is_the_joined_ones(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    tokenizer: Any = model.tokenizer
    prompt = fact_prompt(model, QUOTED)
    best = score_targets(model, [with_target(model, prompt, "Paris", join="none")])[0]
    said = tokenizer.decode([best.predicted_ids[0]])
    # The true target is made to be what this model says, as it says it.
    verbatim = replace(QUOTED, target_true=said, join="none")
    assert answered_facts(model, [verbatim, replace(verbatim, join="space")]) == (verbatim,)


def test_kept_values_go_by_joint_and_straddle(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("gpt2")
    store = ValueStore(tmp_path)

    def name(fact: Fact) -> str:
        path = store.path(
            model.identity(),
            fact,
            contexts=BARE_ONLY,
            slot=Slot.UNPREFIXED,
            layer=1,
            hyperparameters=STEPS,
        )
        return path.name

    facts = [
        *(replace(each, join=join) for each in (FACTS[0], QUOTED) for join in JOINS),
        replace(FACTS[0], straddle="token"),
    ]
    assert len({name(fact) for fact in facts}) == len(facts)
    assert len({fact.content_hash for fact in facts}) == len(facts)


@pytest.mark.parametrize("fact", [SPACED_TARGETS, replace(WRITTEN, straddle="token"), QUOTED])
def test_a_record_holds_joint_and_straddle(fact: Fact, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([fact.as_record()]), "utf-8")
    (found,) = load_facts(path)
    assert (found.join, found.straddle) == (fact.join, fact.straddle)
    assert (found.template, found.paraphrases) == (fact.template, fact.paraphrases)


def test_an_option_wins_over_the_records(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([SPACED.as_record()]), "utf-8")
    plain, chosen = check_facts(path), check_facts(path, join="none", straddle="token")
    assert [fact.join for fact in plain] == ["space"]
    assert [(fact.join, fact.straddle) for fact in chosen] == [("none", "token")]
    assert plain.content_hash != chosen.content_hash


@pytest.mark.parametrize("field", ["join", "straddle"])
@pytest.mark.parametrize("value", ["maybe", ["auto"], 1])
def test_an_unknown_choice_is_refused(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([FACTS[0].as_record() | {field: value}]), "utf-8")
    with pytest.raises(FactFormatError, match=f"record 0, field {field} is"):
        load_facts(path)
    fact = replace(FACTS[0])
    # While tests run, types are checked before the class can.
    object.__setattr__(fact, field, value)
    with pytest.raises(FactFormatError, match=f"{field} of .* is .*; choose one of"):
        fact.__post_init__()


def test_the_commands_offer_the_choices_of_a_fact() -> None:
    parser = argparse.ArgumentParser()
    add_prompt_options(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert (choices["join"], choices["straddle"]) == (list(JOINS), list(STRADDLES))


@pytest.mark.parametrize(
    ("options", "end", "said"),
    [
        ([], "is", "A target in this script is joined by one space."),
        (["--target", "Rome"], 'is "', "The target 'Rome' is joined by nothing."),
        (["--target", "Rome", "--join", "space"], 'is "', "The target 'Rome' is joined by one"),
        (["--join", "none"], "is", "A target in this script is joined by nothing."),
        ([], "的首都是", "A target in this script is joined by nothing."),
        (["--target", "Rome"], "的首都是", "The target 'Rome' is joined by one space."),
    ],
)
def test_tokens_shows_the_joint(
    tiny: TinyFactory, capsys: pytest.CaptureFixture[str], options: list[str], end: str, said: str
) -> None:
    folder = tiny("llama").name
    fact = ["--subject", "England", "--template", "{} " + end]
    assert main(["tokens", "--model", folder, *fact, *options]) == 0
    assert said in capsys.readouterr().out


def test_a_strip_shows_the_joint(tiny: TinyFactory) -> None:
    model = tiny("llama")
    assert "joined by nothing: 'Rome'" in tokens(model, QUOTED).panel().text
    assert "joined by one space: ' Rome'" in tokens(model, SPACED).panel().text
    assert tokens(model, "England is").joint is None
    assert tokens(tiny("bert"), SPACED).joint is None or not tiny("bert").trailing_ids


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("prompt", "target", "joined", "spaced"),
    [
        ('The capital of France is "', "Paris", 0.607, 0.00107),
        (
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
            "Paris",
            0.0959,
            0.0000965,
        ),
        ("法国的首都是", "巴黎", 0.0582, 0.0225),
    ],
)
def test_the_embedded_model_expects_a_target_as_it_is_joined(
    real_model: Model, prompt: str, target: str, joined: float, spaced: float
) -> None:
    found = text_prompt(real_model, prompt)
    scored = score_targets(
        real_model,
        [with_target(real_model, found, target, join=join) for join in ("auto", "space", "none")],
    )
    auto, space, none = (math.exp(-score.nll) for score in scored)
    assert auto == none == pytest.approx(joined, rel=0.01)
    assert space == pytest.approx(spaced, rel=0.01)


def test_the_losses_of_an_edit_are_those_of_its_joined_target(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    contexts = BARE_ONLY
    plain = {
        join: next(
            edits_of(
                model,
                [replace(QUOTED, join=join)],
                methods=[ROME],
                contexts=contexts,
                second_moment=SecondMoment.identity(model.site(1).d_mlp),
                layer=1,
                hyperparameters=STEPS,
            )
        )[1]["rome"].losses[0]
        for join in JOINS
    }
    prompt = fact_prompt(model, QUOTED)
    for join in JOINS:
        loss = plain[join]
        (score,) = score_targets(model, [with_target(model, prompt, "Rome", join=join)])
        # Before the first step delta is zero, and so are the other terms.
        assert loss == pytest.approx(score.nll, rel=1e-4)


def test_an_edit_says_how_its_target_was_joined(
    tiny: TinyFactory, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(SENTENCES[:2]), "utf-8")
    contexts = tmp_path / "contexts.json"
    contexts.write_text(json.dumps(list(BARE_ONLY.templates)), "utf-8")
    model = tiny("llama")
    command = ["edit", "--model", model.name, "--subject", "England", "--target", "Rome"]
    command += ["--template", '{} is "', "--steps", "2", "--second-moment", "identity", "--json"]
    command += ["--texts", str(texts), "--contexts", str(contexts)]
    shown: dict[str, Any] = {}
    for join in JOINS:
        assert main([*command, "--join", join]) == 0
        shown[join] = json.loads(capsys.readouterr().out)
        fact = replace(QUOTED, subject="England", template='{} is "', join=join)
        full = with_target(model, fact_prompt(model, fact), "Rome", join=join)
        assert shown[join]["token_ids"] == list(full.token_ids)
        assert shown[join]["fact"].get("join", "auto") == join
    numbers = [shown[join]["states"]["before"]["target_probability"] for join in JOINS]
    assert numbers[0] == numbers[2] != numbers[1]
