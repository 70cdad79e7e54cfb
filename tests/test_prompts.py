"""Subject positions, targets, padding and batches."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    TinyFactory,
    build,
    edits_of,
    fact_prompts,
    load_tiny,
    sentence_prompts,
)
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

from firsttok.data import Fact
from firsttok.editing import ROME
from firsttok.errors import (
    BadInputError,
    EmptyTargetError,
    FirsttokError,
    SubjectBoundaryError,
    TargetTokenError,
    TemplateError,
)
from firsttok.evaluation import target_probabilities
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model, fingerprint
from firsttok.probes import SeesAll
from firsttok.prompts import (
    Prompt,
    batches,
    fact_prompt,
    pad,
    positions,
    subject_prompt,
    text_prompt,
    with_target,
)
from firsttok.second_moment import SecondMoment
from firsttok.token_strips import show_tokens


def decode(model: Model, ids: tuple[int, ...]) -> str:
    """Text of some tokens."""
    tokenizer: Any = model.tokenizer
    text: str = tokenizer.decode(list(ids))
    return text


def fact(subject: str, template: str) -> Fact:
    """A fact of which only the prompt matters."""
    return Fact(subject=subject, template=template, target_new="Rome", target_true="Paris")


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("bos", list(BosPolicy))
@pytest.mark.parametrize("context", ["{}", "Because Zoë left. {} "])
@pytest.mark.parametrize(
    ("subject", "template"),
    [
        ("England", "{}'s capital city is"),
        ("Eiffel Tower", "The {} is located in the city of"),
        ("Quuxburgh an der Elbe", "The mother tongue of {} is"),
        ("Zoë", "The city of {} is"),
        ("café", "{}, and the city"),
        ("東京", "The capital of {} is"),
        ("🦊", "{} is a"),
        ("Japan", "I never left {}"),
        ("is", "This {} a test"),
    ],
)
def test_the_position_splits_the_text_behind_the_subject(
    tiny: TinyFactory, arch: str, bos: BosPolicy, context: str, subject: str, template: str
) -> None:
    model = tiny(arch).with_bos(bos)
    prompt = fact_prompt(model, fact(subject, template), context)
    leading = len(model.leading_ids)
    assert prompt.token_ids[:leading] == model.leading_ids
    assert (
        leading
        == {
            BosPolicy.WITH: 1,
            BosPolicy.WITHOUT: 0,
            BosPolicy.AS_TOKENIZER: int(arch in ("llama", "mistral")),
        }[bos]
    )
    assert prompt.text == context.replace("{}", template.replace("{}", subject))
    position = prompt.subject_position
    assert position is not None
    expected = context[: context.index("{}")] + template[: template.index("{}")] + subject
    assert decode(model, prompt.token_ids[leading : position + 1]) == expected
    first = position - prompt.subject_length + 1
    assert decode(model, prompt.token_ids[first : position + 1]).strip() == subject


def test_subjects_of_one_and_of_many_tokens(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    one = fact_prompt(model, fact("England", "{} is"))
    many = fact_prompt(model, fact("Quuxburgh", "{} is"))
    assert (one.subject_position, one.subject_length) == (0, 1)
    assert many.subject_position == many.subject_length - 1 > 2


def test_the_last_byte_of_a_split_character_is_the_subjects_last_token(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    tokenizer: Any = model.tokenizer
    pieces = tokenizer.tokenize("é")
    assert len(pieces) == 2
    prompt = fact_prompt(model, fact("é", "{} is"))
    assert (prompt.subject_position, prompt.subject_length) == (1, 2)


def test_the_policy_only_shifts_the_position(tiny: TinyFactory) -> None:
    for arch in DECODERS:
        without = fact_prompt(tiny(arch).with_bos(BosPolicy.WITHOUT), FACTS[1])
        with_bos = fact_prompt(tiny(arch).with_bos(BosPolicy.WITH), FACTS[1])
        assert without.subject_position is not None
        assert with_bos.subject_position == without.subject_position + 1
        assert with_bos.token_ids[1:] == without.token_ids
        assert with_bos.subject_length == without.subject_length


def end_with(model: Model, template: str) -> Model:
    """The model with a tokenizer that puts special tokens around every text."""
    tokenizer: Any = copy.deepcopy(model.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return replace(model, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("arch", "template", "leading"),
    [
        ("bert", "<s> $A </s>", 1),
        ("t5", "$A </s>", 0),
        ("t5", "$A </s> </s>", 0),
        ("t5", "$A", 0),
        ("bert", "<s> $A", 1),
    ],
)
def test_an_encoders_prompts_end_as_its_tokenizer_ends_them(
    tiny: TinyFactory, arch: str, template: str, leading: int
) -> None:
    model = end_with(tiny(arch), template)
    tokenizer: Any = model.tokenizer
    end = (1,) * template.count("</s>")
    assert model.trailing_ids == end
    for bos in BosPolicy:
        view = model.with_bos(bos)
        count = {BosPolicy.WITH: 1, BosPolicy.WITHOUT: 0, BosPolicy.AS_TOKENIZER: leading}[bos]
        for given in FACTS:
            own = tokenizer(given.prompt, add_special_tokens=False)["input_ids"]
            prompt = fact_prompt(view, given)
            assert prompt.token_ids == ((0,) * count + tuple(own) + end)
            position = prompt.subject_position
            assert position is not None
            before = given.template[: given.template.index("{}")]
            shown = decode(model, prompt.token_ids[count : position + 1])
            assert shown == before + given.subject
    text = "England is"
    assert text_prompt(model, text).token_ids == tuple(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_decoders_prompts_never_end_in_special_tokens(tiny: TinyFactory, arch: str) -> None:
    model = end_with(tiny(arch), "<s> $A </s>")
    assert model.trailing_ids == ()
    assert text_prompt(model, "England is").token_ids == (
        0,
        *text_prompt(model.with_bos(BosPolicy.WITHOUT), "England is").token_ids,
    )
    assert 1 not in text_prompt(model, "England is").token_ids


@pytest.mark.parametrize("arch", ["bert", "t5"])
def test_special_tokens_alone_are_no_text(tiny: TinyFactory, arch: str) -> None:
    with pytest.raises(BadInputError, match="no token"):
        text_prompt(end_with(tiny(arch), "<s> $A </s>"), "")


@pytest.mark.parametrize(
    ("cause", "error", "quoted"),
    [
        (
            lambda model: subject_prompt(model, "Englands city", (0, 4)),
            SubjectBoundaryError,
            ["Engl", "Englands city", "'England'"],
        ),
        (
            lambda model: with_target(model, text_prompt(model, "Rome is"), "  "),
            EmptyTargetError,
            ["Rome is"],
        ),
        (
            lambda model: fact_prompt(model, FACTS[0], "no place"),
            TemplateError,
            ["no place", "exactly once"],
        ),
        (
            lambda model: fact_prompt(model, FACTS[0], "{} and {}"),
            TemplateError,
            ["{} and {}", "exactly once"],
        ),
        (lambda _: fact("Rome", "no place"), TemplateError, ["no place", "0 times"]),
        (lambda _: fact("Rome", "{} {}"), TemplateError, ["{} {}", "2 times"]),
        (lambda model: text_prompt(model, ""), BadInputError, ["''", "no token"]),
        (lambda model: pad(model, []), BadInputError, ["no prompts"]),
        (
            lambda model: positions([text_prompt(model, "Rome is")]),
            BadInputError,
            ["Rome is", "no subject position"],
        ),
    ],
)
def test_errors_quote_the_text(
    tiny: TinyFactory,
    cause: Callable[[Model], object],
    error: type[FirsttokError],
    quoted: list[str],
) -> None:
    with pytest.raises(error) as raised:
        cause(tiny("gpt2"))
    for text in quoted:
        assert text in str(raised.value)


def test_a_target_that_changes_the_prompts_tokens_is_refused(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    prompt = text_prompt(model, "The capital of")
    changed = Prompt(text="The capital of", token_ids=(*prompt.token_ids[:-1], 5))
    with pytest.raises(TargetTokenError, match="has no tokens of its own"):
        with_target(model, changed, "Rome")


@pytest.mark.parametrize("bos", list(BosPolicy))
@pytest.mark.parametrize("target", ["Berlin", " Berlin", "  Berlin ", "Zürich am See", "東京"])
def test_a_target_gets_exactly_one_space(tiny: TinyFactory, bos: BosPolicy, target: str) -> None:
    model = tiny("llama").with_bos(bos)
    tokenizer: Any = model.tokenizer
    prompt = fact_prompt(model, FACTS[0])
    full = with_target(model, prompt, target)
    expected = tokenizer(f" {target.strip()}", add_special_tokens=False)["input_ids"]
    assert full.target_ids == tuple(expected)
    assert full.token_ids == (*prompt.token_ids, *expected)
    assert full.target_length == len(expected)
    assert full.last_position == len(full.token_ids) - 1
    assert full.text == prompt.text
    assert full.subject_position == prompt.subject_position
    assert full.subject_length == prompt.subject_length


def test_a_second_target_takes_the_place_of_the_first(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    prompt = fact_prompt(model, FACTS[0])
    again = with_target(model, with_target(model, prompt, "Zürich am See"), "Rome")
    assert again == with_target(model, prompt, "Rome")


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.parametrize("given", FACTS)
@pytest.mark.parametrize("context", ["{}", "I know. {}"])
def test_show_tokens_marks_the_looked_up_token(
    tiny: TinyFactory, bos: BosPolicy, given: Fact, context: str
) -> None:
    model = tiny("llama").with_bos(bos)
    prompt = fact_prompt(model, given, context)
    position = prompt.subject_position
    assert position is not None
    tokens, mark = show_tokens(model, given, context).split("\n")
    column = mark.index("^")
    assert mark[column:] == f"^ lookup at {position}"
    assert tokens[:column].count("|") == position
    assert column == 0 or tokens[column - 1] == "|"
    piece = decode(model, (prompt.token_ids[position],))
    assert tokens[column:].split("|")[0] == piece
    assert len(tokens.split("|")) == len(prompt.token_ids)


@pytest.mark.parametrize("max_tokens", [1, 20, 60, 10_000])
def test_batches_hold_every_prompt_once_and_not_too_many_tokens(
    tiny: TinyFactory, max_tokens: int
) -> None:
    prompts = fact_prompts(tiny("llama"))
    groups = list(batches(prompts, max_tokens=max_tokens))
    assert sorted(index for group in groups for index in group) == list(range(len(prompts)))
    for group in groups:
        width = max(len(prompts[index].token_ids) for index in group)
        assert len(group) == 1 or len(group) * width <= max_tokens
    assert (len(groups) == len(prompts)) == (max_tokens == 1)
    equal = [prompts[0]] * 5
    assert list(batches(equal, max_tokens=10_000)) == [list(range(5))]
    assert list(batches([])) == []


@pytest.mark.parametrize("arch", DECODERS)
def test_padding_places_tokens_masks_and_positions(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    prompts = fact_prompts(model)
    found = positions(prompts)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    for side in ("left", "right", "subject"):
        batch = pad(model, prompts, side=side)
        for row, prompt in enumerate(prompts):
            start = int(batch.starts[row])
            end = start + lengths[row]
            mask = torch.zeros(batch.tokens.shape[1], dtype=torch.long)
            mask[start:end] = 1
            assert batch.tokens[row, start:end].tolist() == list(prompt.token_ids)
            assert torch.equal(batch.attention_mask[row], mask)
            assert batch.position_ids[row, start:end].tolist() == list(range(lengths[row]))
            assert set(batch.tokens[row][mask == 0].tolist()) <= {2}
        columns = batch.columns(found)
        assert torch.equal(columns, batch.starts + found)
        if side == "subject":
            assert columns.tolist() == [int(found.max())] * len(prompts)
        elif side == "right":
            assert batch.starts.tolist() == [0] * len(prompts)
        else:
            assert (batch.starts + torch.tensor(lengths)).tolist() == [max(lengths)] * len(prompts)


def test_padding_at_the_subject_needs_a_subject(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    with pytest.raises(BadInputError, match="no subject position"):
        pad(model, sentence_prompts(model), side="subject")


def test_a_text_is_tokenised_once_in_each_state_of_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", tmp_path / "model")
    model = load_tiny(tmp_path / "model")
    tokenizer: Any = model.tokenizer
    asked: list[tuple[str, bool]] = []
    usual = type(tokenizer).__call__

    def count(self: Any, text: str, *, add_special_tokens: bool = True, **options: Any) -> Any:
        asked.append((text, add_special_tokens))
        return usual(self, text, add_special_tokens=add_special_tokens, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    moment = SecondMoment.identity(model.site(1).d_mlp)
    settings = Hyperparameters(steps=1)
    for _ in range(2):
        edits_of(
            model,
            FACTS,
            methods=[ROME],
            contexts=CONTEXTS,
            second_moment=moment,
            layer=1,
            hyperparameters=settings,
        )
        for each in FACTS:
            target_probabilities(model, each, CONTEXTS)
            target_probabilities(model.intervened(SeesAll()), each, CONTEXTS)
    assert len(asked) > len(FACTS) * len(CONTEXTS.templates)
    assert len(asked) == len(set(asked))
    first = fact_prompt(model, FACTS[0])
    asked.clear()
    assert fact_prompt(model, FACTS[0]) == first
    assert asked == []
    for change in (
        lambda: tokenizer.add_tokens(["England's"]),
        lambda: tokenizer.add_tokens(["is"], special_tokens=True),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase()),
    ):
        identity = model.identity()
        change()
        expected = tokenizer.backend_tokenizer.encode(FACTS[0].prompt, add_special_tokens=False).ids
        assert text_prompt(model, FACTS[0].prompt).token_ids == (*model.leading_ids, *expected)
        assert model.identity() != identity


def test_a_tokenizers_state_is_looked_at_once_where_it_stays_as_it_is(
    tiny: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    looked: list[str] = []
    usual: Any = fingerprint._state
    monkeypatch.setattr(fingerprint, "_state", lambda t: looked.append("once") or usual(t))
    with model.texts.unchanged(model.tokenizer):
        first = [fact_prompt(model, fact) for fact in FACTS]
        assert len(looked) == 1
    assert [fact_prompt(model, fact) for fact in FACTS] == first
    assert len(looked) > len(FACTS)
