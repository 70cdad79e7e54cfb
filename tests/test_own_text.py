"""A prompt's own text: stray spaces, special tokens, letters that are composed, shared tokens."""

import json
import logging
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import ADDED, byte_level, sentence_piece, spoken, unigram, word_piece
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory
from tokenizers import normalizers

from firsttok.cli import main
from firsttok.data import JOINS, Fact, check_facts, load_facts, text_joint
from firsttok.errors import (
    BadInputError,
    EmptyTargetError,
    FactFormatError,
    FirsttokError,
    SpecialTokenError,
    SubjectBoundaryError,
)
from firsttok.evaluation import perplexity
from firsttok.models import BosPolicy, Model
from firsttok.models.bos import special_ids
from firsttok.models.encoding import encode
from firsttok.prompts import fact_prompt, joined_target, subject_prompt, text_prompt, with_target
from firsttok.token_strips import tokens

AS_TOKENIZER, WITH, WITHOUT = BosPolicy.AS_TOKENIZER, BosPolicy.WITH, BosPolicy.WITHOUT
BUILD: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "byte level, NFC": lambda: byte_level(normalizers.NFC()),
    "byte level, NFKC": lambda: byte_level(normalizers.NFKC()),
    "byte level, NFD": lambda: byte_level(normalizers.NFD()),
    "byte level, accents stripped": lambda: byte_level(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "SentencePiece": sentence_piece,
    "unigram, NFKC": unigram,
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module")
def speaking(tiny: TinyFactory) -> Callable[..., Model]:
    """Gives a model with a tokenizer of a kind."""
    built: dict[str, Any] = {}

    def get(kind: str, **options: bool) -> Model:
        if kind not in built:
            built[kind] = BUILD[kind]()
        return spoken(tiny("gpt2"), built[kind], **options)

    return get


def fact(subject: str, template: str, **changes: Any) -> Fact:
    """A fact of which only the prompt matters."""
    given: dict[str, Any] = {"target_new": "Rome", "target_true": "Paris"} | changes
    return Fact(subject=subject, template=template, **given)


# Stray spaces.

CLEAN = fact("England", "The city of {} is")
STRAY = [
    ("England ", "The city of {} is", "subject"),
    (" England", "The city of {} is", "subject"),
    ("\tEngland\n", "The city of {} is", "subject"),
    ("England\u00a0", "The city of {} is", "subject"),
    ("\u3000England\u2003", "The city of {} is", "subject"),
    ("England\u200b", "The city of {} is", "subject"),
    ("\ufeffEngland", "The city of {} is", "subject"),
    ("England\u2060\u200e", "The city of {} is", "subject"),
    ("England\u3164", "The city of {} is", "subject"),
    ("England", "The city of {} is ", "template"),
    ("England", "The city of {} is  ", "template"),
    ("England", " The city of {} is", "template"),
    ("England", "\u200bThe city of {} is\u00a0", "template"),
    ("England", "\ufeffThe city of {} is\u200b ", "template"),
    (" England ", " The city of {} is ", "subject, template"),
]


@pytest.mark.parametrize(("subject", "template", "named"), STRAY)
def test_stray_characters_are_left_out_with_one_notice(
    subject: str, template: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        given = fact(subject, template)
    assert given == CLEAN
    assert given.as_record() == CLEAN.as_record()
    (message,) = caplog.messages
    assert f"at the ends of {named} are left out" in message
    assert len(message.splitlines()) == 1
    assert given.notice == message
    # What was left out once is gone.
    assert replace(given, target_new="Berlin").notice == ""
    assert len(caplog.messages) == 1


def test_wordings_are_tidied_as_the_template_is(caplog: pytest.LogCaptureFixture) -> None:
    given = replace(CLEAN, paraphrases=("Is it ", "It is"), neighbours=(" Rome is\u200b",))
    assert (given.paraphrases, given.neighbours) == (("Is it", "It is"), ("Rome is",))
    assert "paraphrases, neighbours" in caplog.text


def test_a_target_loses_what_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    given = replace(CLEAN, target_new="\u200b Rome\ufeff", target_true=" Paris ")
    # White space needs no notice: it never counts.
    assert (given.target_new, given.target_true) == ("Rome", " Paris ")
    assert "at the ends of target_new are left out" in caplog.text
    with pytest.raises(EmptyTargetError):
        replace(CLEAN, target_new="\u200b")


@pytest.mark.parametrize(
    ("subject", "template"),
    [
        ("England", "{}  is"),
        ("New  York", "The city of  {} is"),
        ("J.\u00a0R.\u00a0R. Tolkien", "{}\u00a0is"),
        ("England", "\n{} is"),
        ("England", "{} is\n"),
        ("England", "{} is\r\n"),
        ("England", "Country\tCapital\n{}\t"),
        ("England", "La capitale de {} est «\u00a0"),
        ("England", "{}\u3000"),
        ("👨\u200d👩\u200d👧", "{} is"),
        ("❤\ufe0f", "{} is"),
        ("\u0645\u06cc\u200c\u062e\u0648", "{} is"),
    ],
)
def test_what_stands_inside_a_text_or_is_meant_stays(
    subject: str, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = fact(subject, template)
    assert (given.subject, given.template, given.notice) == (subject, template, "")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("subject", "template"), [(" England", "The city of{} is"), ("England ", "In {}people live")]
)
def test_a_space_that_parts_the_subject_from_a_word_belongs_into_the_template(
    subject: str, template: str
) -> None:
    with pytest.raises(FactFormatError, match="write that space in the template"):
        fact(subject, template)


@pytest.mark.parametrize("subject", [" ", "\u200b", "\u00a0\u3164", "\ufeff \n"])
def test_a_subject_that_shows_nothing_is_empty(subject: str) -> None:
    with pytest.raises(FactFormatError, match="is empty; name one"):
        fact(subject, "{} is")


def test_joined_by_nothing_prompts_and_targets_stay_as_they_are_given() -> None:
    given = fact("England ", " {} is ", target_new=" Rome ", join="none", neighbours=("It is ",))
    assert (given.subject, given.template, given.target_new) == ("England", " {} is ", " Rome ")
    assert given.neighbours == ("It is ",)


@pytest.mark.parametrize("kind", BUILD)
def test_a_bare_space_is_never_looked_up(speaking: Callable[..., Model], kind: str) -> None:
    model = speaking(kind)
    tokenizer: Any = model.tokenizer
    for subject, template, _ in STRAY:
        prompt = fact_prompt(model, fact(subject, template))
        assert prompt == fact_prompt(model, CLEAN), (subject, template)
        assert prompt.subject_position is not None
        assert tokenizer.decode([prompt.token_ids[prompt.subject_position]]).strip()


def test_a_file_with_stray_spaces_is_told_of_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flat = {"subject": "England ", "prompt": "England is ", "target_new": " Rome"}
    records = [
        flat | {"ground_truth": "Paris", "case_id": 0},
        flat | {"ground_truth": "Paris", "case_id": 1, "prompt": "In England people live in "},
        CLEAN.as_record() | {"case_id": 2},
    ]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(records), "utf-8")
    facts = check_facts(path)
    (message,) = caplog.messages
    assert "2 facts have stray characters; the first: " in message
    read = list(facts)
    assert len(caplog.messages) == 1
    assert [each.template for each in read] == ["{} is", "In {} people live in", CLEAN.template]
    assert {each.subject for each in read} == {"England"}
    # Taken as they are, the targets bring their own space; without one there is none.
    kept = list(check_facts(path, join="none"))
    assert [each.template for each in kept][:2] == ["{} is ", "In {} people live in "]


def test_texts_of_the_perplexity_keep_their_spaces(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    text = next(text for text in SENTENCES if text.startswith(" "))
    assert text_prompt(model, text).token_ids != text_prompt(model, text.strip()).token_ids
    assert perplexity(model, [text]).mean != perplexity(model, [text.strip()]).mean


def test_a_strip_writes_out_what_shows_nothing(tiny: TinyFactory) -> None:
    pieces = "".join(tokens(tiny("gpt2"), "a \u00a0\r\n\tb").pieces)
    assert "\\r" in pieces
    assert "\\t" in pieces
    assert all(character.isprintable() for character in pieces)


# Special tokens.

_TURNS = "<s>user\nThe city of {} is</s>\n<s>assistant\n"


@pytest.mark.parametrize(
    ("begins", "bos", "text", "holds"),
    [
        # A tokenizer that puts a BOS by itself: a written one would be the second.
        (True, AS_TOKENIZER, "<s>England is", None),
        (True, WITH, "<s>England is", None),
        (True, WITHOUT, "<s>England is", None),
        # One that puts none: the text may bring its own, unless the policy speaks against it.
        (False, AS_TOKENIZER, "<s>England is", [True]),
        (False, AS_TOKENIZER, "<s><s>England is", None),
        (False, WITH, "<s>England is", None),
        (False, WITHOUT, "<s>England is", None),
        # Inside a text none belongs.
        (False, AS_TOKENIZER, "I know. <s>England is", None),
        (False, AS_TOKENIZER, "England</s> is", None),
        (False, AS_TOKENIZER, "England is<pad>", None),
        (False, AS_TOKENIZER, "England is <unk>", None),
        (False, WITHOUT, "</s>England is", None),
        # Those without such a role mark turns, fields, files.
        (True, AS_TOKENIZER, f"{ADDED}England is{ADDED}", [True, True, True]),
        (True, WITHOUT, f"{ADDED}England is", [True]),
        (True, WITH, "England is", [True]),
        (True, WITHOUT, "England is", []),
    ],
)
@pytest.mark.parametrize("kind", ["byte level", "SentencePiece", "unigram, NFKC"])
def test_special_tokens_stand_where_the_policy_puts_them_and_nowhere_else(
    speaking: Callable[..., Model],
    kind: str,
    begins: bool,
    bos: BosPolicy,
    text: str,
    holds: list[bool] | None,
) -> None:
    model = speaking(kind, begins=begins).with_bos(bos)
    if holds is None:
        with pytest.raises(SpecialTokenError, match="begins or ends whole texts"):
            text_prompt(model, text)
        return
    special = special_ids(model.tokenizer)
    found = [token in special for token in text_prompt(model, text).token_ids]
    assert [each for each in found if each] == holds
    assert found[0] == bool(holds)


@pytest.mark.parametrize("context", CONTEXTS.templates)
def test_a_turn_marker_may_stand_inside_though_it_is_the_bos(
    speaking: Callable[..., Model], context: str
) -> None:
    model = speaking("byte level", chat=True)
    prompt = fact_prompt(model, fact("England", _TURNS), context)
    text = context.replace("{}", _TURNS.replace("{}", "England"))
    assert prompt.text == text
    assert prompt.token_ids.count(model.tokenizer.bos_token_id) == 2
    target = with_target(model, prompt, "Rome")
    assert target.token_ids[: len(prompt.token_ids)] == prompt.token_ids
    assert joined_target(model, prompt, "Rome") == "Rome"


@pytest.mark.parametrize("bos", [WITH, WITHOUT])
def test_a_turn_marker_is_no_second_bos_and_none_in_spite_of_the_policy(
    speaking: Callable[..., Model], bos: BosPolicy
) -> None:
    model = speaking("byte level", chat=True).with_bos(bos)
    with pytest.raises(SpecialTokenError, match=f"under the BOS policy '{bos.value}'") as raised:
        fact_prompt(model, fact("England", _TURNS))
    assert str(raised.value).endswith("or take the text as it is with --bos as_tokenizer")


@pytest.mark.parametrize("written", ["<s>", "</s>", "<pad>", "<unk>", ADDED])
@pytest.mark.parametrize("chat", [True, False])
def test_no_special_token_is_part_of_a_subject_or_a_target(
    speaking: Callable[..., Model], written: str, chat: bool
) -> None:
    model = speaking("byte level", chat=chat)
    for subject in (f"Eng{written}land", f"England{written}"):
        with pytest.raises(SpecialTokenError):
            fact_prompt(model, fact(subject, "The city of {} is"))
    prompt = fact_prompt(model, CLEAN)
    for target in (f"Rome{written}", f"{written} Rome"):
        with pytest.raises(SpecialTokenError):
            with_target(model, prompt, target)


def test_a_subject_that_the_tokenizer_does_not_know_is_refused(
    speaking: Callable[..., Model],
) -> None:
    model = speaking("WordPiece")
    with pytest.raises(SpecialTokenError, match="in words that the tokenizer knows"):
        fact_prompt(model, fact("東京", "The city of {} is"))
    assert fact_prompt(model, fact("England", "東京 {} is")).subject_length == 1


# Letters and marks.

LETTERS = [
    "Zoe\u0308",
    "cafe\u0301",
    "A\u030a\u0301",
    "e\u0301\u0323",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "ｶﾞ",
    "o\ufb03",
    "x\u0301",
    "❤\ufe0f",
    "👨\u200d👩\u200d👧",
    "אָ",
    "مُحَمَّد",
    "नमस्ते",
    "ก็",
    "!?",
    "...",
    "№",
    "½",
]


@pytest.mark.parametrize("kind", [kind for kind in BUILD if kind != "WordPiece"])
@pytest.mark.parametrize("template", ["{} is", "The city of {} is", "In {}\r\nit is", "I saw {}"])
def test_the_looked_up_token_ends_the_subject_as_the_tokenizer_writes_it(
    speaking: Callable[..., Model], kind: str, template: str
) -> None:
    model = speaking(kind)
    tokenizer: Any = model.tokenizer
    normalizer = tokenizer.backend_tokenizer.normalizer
    seen = 0
    for subject in LETTERS:
        try:
            prompt = fact_prompt(model, fact(subject, template))
        except SpecialTokenError:
            # The unigram model has no token for these letters.
            assert kind.startswith("unigram"), subject
            continue
        assert prompt.subject_position is not None
        if kind.startswith("unigram") and tokenizer.unk_token_id in prompt.token_ids:
            continue
        before = template[: template.index("{}")] + subject
        shown = tokenizer.decode(list(prompt.token_ids[: prompt.subject_position + 1]))
        expected = normalizer.normalize_str(before) if normalizer else before
        assert shown.strip() == expected.replace("▁", " ").strip(), subject
        seen += 1
    assert seen == len(LETTERS) or kind.startswith("unigram")


@pytest.mark.parametrize("template", ["{}\u0308 is", "{}\ufe0f is"])
def test_a_letter_is_not_parted_from_a_mark_that_is_composed_with_it(
    speaking: Callable[..., Model], template: str
) -> None:
    model = speaking("byte level, accents stripped")
    with pytest.raises(SubjectBoundaryError, match="goes beyond subject"):
        fact_prompt(model, fact("Zoe", template))
    # Where the mark has tokens of its own, the subject has, too.
    plain = fact_prompt(speaking("byte level"), fact("Zoe", template))
    assert plain.subject_position == plain.subject_length - 1


@pytest.mark.parametrize("field", ["subject", "template", "target_new", "target_true"])
def test_half_a_character_is_refused_by_name(tiny: TinyFactory, field: str) -> None:
    texts = {"subject": "England", "template": "{} is", "target_new": "a", "target_true": "b"}
    texts[field] += "\udc80"
    with pytest.raises(BadInputError, match=f"{field} .* holds half a surrogate pair"):
        Fact(**texts)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"paraphrases.* holds half a surrogate pair"):
        replace(CLEAN, paraphrases=("\ud800",))
    with pytest.raises(BadInputError, match="holds half a surrogate pair"):
        text_prompt(tiny("gpt2"), "a\udfff")


# Tokens that hold more than the subject.


@pytest.mark.parametrize(
    ("subject", "template", "piece"),
    [
        ("Partick F.C.", "The {}'s home is", ".'"),
        ("Greg Jr.", "{}'s mother tongue is", ".'"),
        ("tronc Inc.", "{}, of the city of", ".,"),
    ],
)
def test_a_straddling_token_is_named_and_looked_up_where_that_is_asked_for(
    speaking: Callable[..., Model], subject: str, template: str, piece: str
) -> None:
    model = speaking("byte level")
    tokenizer: Any = model.tokenizer
    for context in CONTEXTS.templates:
        with pytest.raises(SubjectBoundaryError, match="--straddle token") as raised:
            fact_prompt(model, fact(subject, template), context)
        assert f"the token {piece!r} goes beyond subject {subject!r}" in str(raised.value)
        prompt = fact_prompt(model, fact(subject, template, straddle="token"), context)
        position = prompt.subject_position
        assert position is not None
        assert tokenizer.decode([prompt.token_ids[position]]) == piece
        # Note 12: the released code counts the tokens up to the subject's end, and takes one away.
        text = prompt.text[: prompt.text.index(subject) + len(subject)]
        counted = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 1
        assert position == counted


def test_a_choice_on_straddling_tokens_changes_no_other_prompt(tiny: TinyFactory) -> None:
    for arch in ("gpt2", "llama"):
        for each in FACTS:
            free = replace(each, straddle="token")
            assert fact_prompt(tiny(arch), free) == fact_prompt(tiny(arch), each)


def test_where_released_code_counts_another_token_none_is_offered(tiny: TinyFactory) -> None:
    for straddle in ("refuse", "token"):
        with pytest.raises(SubjectBoundaryError, match="ends in another token"):
            subject_prompt(tiny("gpt2"), "Englands city", (0, 6), straddle=straddle)


def test_a_token_that_begins_before_the_subject_is_no_subjects_own(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with pytest.raises(SubjectBoundaryError, match="'England' goes beyond subject 'land'"):
        subject_prompt(model, "England is", (3, 7))
    assert subject_prompt(model, "England is", (3, 7), straddle="token").subject_position == 0
    # A space before the subject is no part of another word.
    assert subject_prompt(model, "The capital", (4, 11)).subject_length == 1


# On the command line.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--subject", "England<s>"], "holds '<s>', which begins or ends whole texts"),
        (["--template", "</s>{} is"], "begins with '</s>'"),
        (["--template", "<s>{} is", "--bos", "without"], "the BOS policy 'without'"),
        (["--template", "<s>{} is"], "the BOS policy 'as_tokenizer'"),
        (["--subject", "Eng\udc80"], "holds half a surrogate pair"),
        (["--subject", " "], "is empty"),
        (["--subject", "Engl", "--template", "{}ands city"], "goes beyond subject"),
    ],
)
def test_a_prompt_that_cannot_be_asked_for_is_one_sentence(
    tiny: TinyFactory, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    # What is given twice counts as it was given last.
    usual = ["--subject", "England", "--template", "{} is", "--model", tiny("llama").name]
    assert main(["tokens", *usual, *options]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("firsttok: ")
    assert said in line
    assert captured.out == ""


def test_a_stray_space_on_the_command_line_is_told_and_left_out(
    tiny: TinyFactory, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    usual = ["tokens", "--model", tiny("llama").name]
    assert main([*usual, "--subject", "England", "--template", "{} is a"]) == 0
    clean = capsys.readouterr().out
    assert caplog.messages == []
    assert main([*usual, "--subject", "England ", "--template", "{} is a "]) == 0
    assert capsys.readouterr().out == clean
    (message,) = caplog.messages
    assert "at the ends of subject, template are left out" in message


# Laws, tried on texts put together at random.

_PIECES = st.sampled_from(
    [
        *"aZé東か한ก.,'\"!?-()「」“”«» \n\t",
        *[
            "England",
            " is",
            "F.C.",
            "'s",
            " Jr.",
            "e\u0301",
            "\u0301",
            "\u200d",
            "\u200b",
            "👨",
            "ﬁ",
        ],
        *["\u1112\u1161", "\u00a0", "  ", "\r\n", "<s>", "</s>", ADDED, "<unk>", "ـ", "{", "}"],
    ]
)
_TEXTS = st.lists(_PIECES, max_size=5).map("".join)
_MODELS = st.tuples(
    st.sampled_from([kind for kind in BUILD if kind != "WordPiece"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(BosPolicy)),
)


_T = TypeVar("_T")


def asked(call: Callable[[], _T]) -> _T | None:
    """What a call gives; None where it is refused in one sentence."""
    refusal = ""
    try:
        return call()
    except FirsttokError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) == 1
    return None


@settings(max_examples=600, deadline=None, derandomize=True)
@given(_MODELS, _TEXTS, _TEXTS, _TEXTS, _TEXTS, st.sampled_from(["refuse", "token"]), st.data())
def test_what_is_asked_of_a_prompt_is_obeyed_or_refused(
    speaking: Callable[..., Model],
    chosen: tuple[str, bool, bool, BosPolicy],
    before: str,
    subject: str,
    after: str,
    target: str,
    straddle: Any,
    data: st.DataObject,
) -> None:
    kind, begins, chat, bos = chosen
    model = speaking(kind, begins=begins, chat=chat).with_bos(bos)
    tokenizer: Any = model.tokenizer
    special, leading = special_ids(tokenizer), model.leading_ids
    join = data.draw(st.sampled_from(JOINS))
    context = data.draw(st.sampled_from(CONTEXTS.templates))
    given = asked(
        lambda: fact(
            subject, f"{before}{{}}{after}", target_new=target, join=join, straddle=straddle
        )
    )
    prompt = asked(lambda: fact_prompt(model, given, context)) if given else None
    if given is None or prompt is None:
        return
    ids, position = prompt.token_ids, prompt.subject_position
    assert position is not None
    # No BOS but the one the policy puts; only turn markers inside, and none in the subject.
    assert ids[: len(leading)] == leading
    own = ids[len(leading) :]
    if not chat:
        begin = int(bos is AS_TOKENIZER and not leading)
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(own[begin:])
    if bos is not AS_TOKENIZER or leading:
        assert own[0] != tokenizer.bos_token_id
    assert ids[position] not in special
    # The looked-up token holds the subject's last character; with those up to it, all before.
    encoding = encode(model, prompt.text)
    end = prompt.text.index(given.prompt) + given.template.index("{}") + len(given.subject)
    covered = max(encoding.reach(place) for place in range(len(leading), position + 1))
    assert covered >= end or unicodedata.category(given.subject[-1]) in ("Cf", "Cc")
    assert encoding.spans[position][0] < end
    if straddle == "refuse":
        assert encoding.reach(position) <= end
    full = asked(lambda: with_target(model, prompt, given.target_new, join=join))
    if full is None:
        return
    # Prompt and target: the former's tokens begin those of both, and none is special in the latter.
    assert full.token_ids[: len(ids)] == ids
    assert full.target_length == len(full.token_ids) - len(ids) > 0
    assert not special & set(full.target_ids)
    if kind == "byte level":
        joined = joined_target(model, prompt, given.target_new, join)
        assert tokenizer.decode(list(full.target_ids)) == joined
        if join == "auto" and ids[-1] not in special:
            assert joined.startswith(" ") == (text_joint(prompt.text, joined.strip()) == " ")


def test_a_record_of_a_tidied_fact_is_read_as_the_same_fact(tmp_path: Path) -> None:
    given = fact(" England ", "{} is ")
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([given.as_record()]), "utf-8")
    (read,) = load_facts(path)
    assert replace(read, source=given.source) == given
