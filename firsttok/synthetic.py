"""Facts in COUNTERFACT's schema of any number, put together from real words."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from random import Random
from typing import Any

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.data.records import builtin_json
from firsttok.errors import BadInputError, SubjectBoundaryError, TargetTokenError
from firsttok.models import Model
from firsttok.prompts import Prompt, fact_prompt, subject_prompt, with_target

__all__ = ["synthetic_facts"]

_PEOPLE = "people"
_NEIGHBOURS = 4
_WEIGHTS = (7, 5, 4, 4)
"""How often, of 20 facts, the subject is: a first token, a name in the first place, a name in a
later one, another word in a later one."""


@dataclass(frozen=True, kw_only=True)
class _Clause:
    """One wording of a relation: ``{}`` stands first, and the answer follows."""

    number: int
    kind: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """What a fact is made of, before its new answer is chosen."""

    subject: str
    number: int
    """The subject's among its kind, which says what is true of it."""
    clause: _Clause
    opening: str = ""


@taken
def synthetic_facts(model: Model, count: int, *, seed: int) -> Iterator[Fact]:
    """Put facts together, all with different prompts; the answers are drawn, not looked up.

    Every fact has two paraphrases and four neighbours with its true answer. By the model's own
    tokenizer the subject's last token is found, and the two targets begin with different tokens.
    Where the words allow it, a third of the subjects are one token in the first place, the ones
    that ROME breaks on. Only one fact is in memory, and a smaller ``count`` gives the first ones
    of a larger.

    Raises:
        BadInputError: If the count is below 1, or there are not so many.
    """
    if count < 1:
        raise BadInputError(f"the count of facts is {count}; give at least 1")
    random = Random(f"firsttok {seed}")  # noqa: S311
    lists = _lists()
    lists["places"] = [*lists["cities"], *lists["countries"]]
    lists[_PEOPLE] = [f"{name} {family}" for family in lists["family"] for name in lists["given"]]
    return _generate(model, lists, count, random)


def _lists() -> dict[str, Any]:
    return builtin_json("words.json")


def _generate(model: Model, lists: dict[str, Any], count: int, random: Random) -> Iterator[Fact]:
    pools = _pools(model, lists, _clauses(lists, random), random)
    weights: list[int] = list(_WEIGHTS)
    made = 0
    while made < count:
        if not any(weights):
            raise BadInputError(
                f"the words make {made} facts that {model.name} takes, not {count}; ask for fewer"
            )
        chosen = random.choices(range(len(pools)), weights)[0]
        draw = next(pools[chosen], None)
        if draw is None:
            weights[chosen] = 0
            continue
        fact = _fact(model, lists, draw, made, random)
        if fact is not None:
            yield fact
            made += 1


def _clauses(lists: dict[str, Any], random: Random) -> list[_Clause]:
    clauses: list[_Clause] = []
    for relation in lists["relations"]:
        for text in relation["clauses"]:
            answers: list[str] = lists[relation["answers"]]
            mixed = tuple(random.sample(answers, len(answers)))
            number, kind = len(clauses), relation["of"]
            clauses.append(_Clause(number=number, kind=kind, text=text, answers=mixed))
    return clauses


def _pools(
    model: Model, lists: dict[str, Any], clauses: list[_Clause], random: Random
) -> tuple[Iterator[_Draw], ...]:
    """Four streams that share no prompt, each without repetition; see ``_WEIGHTS``."""
    people = [clause for clause in clauses if clause.kind == _PEOPLE]
    # People alone go by their given names.
    singles = [
        _Draw(subject=word, number=number, clause=clause)
        for clause in clauses
        for number, word in enumerate(lists["given" if clause.kind == _PEOPLE else clause.kind])
    ]
    first = {word for word in {draw.subject for draw in singles} if _is_one_token(model, word)}
    alone = [draw for draw in singles if draw.subject in first]
    names, turns = lists[_PEOPLE], len(lists["openings"])
    count = len(names) * len(people)

    def person(index: int) -> _Draw:
        which, number = divmod(index, len(names))
        return _Draw(subject=names[number], number=number, clause=people[which])

    def later(draw: _Draw, turn: int) -> _Draw:
        return replace(draw, opening=lists["openings"][turn])

    return (
        (alone[i] for i in _mixed(len(alone), random)),
        (person(i) for i in _mixed(count, random)),
        (later(person(i // turns), i % turns) for i in _mixed(count * turns, random)),
        (later(singles[i // turns], i % turns) for i in _mixed(len(singles) * turns, random)),
    )


def _mixed(size: int, random: Random) -> Iterator[int]:
    """Every number below ``size`` once, in an order that needs no memory."""
    if size == 0:
        return iter(())
    step = next(s for s in iter(lambda: random.randrange(1, size + 1), 0) if gcd(s, size) == 1)
    start = random.randrange(size)
    return ((start + i * step) % size for i in range(size))


def _is_one_token(model: Model, word: str) -> bool:
    try:
        prompt = subject_prompt(model, f"{word} is", (0, len(word)))
    except SubjectBoundaryError:
        return False
    return prompt.subject_length == 1


def _fact(
    model: Model, lists: dict[str, Any], draw: _Draw, number: int, random: Random
) -> Fact | None:
    """The fact with its answers; None if the tokenizer takes it with no two of them."""
    clause = draw.clause
    peers: list[str] = lists[clause.kind]
    # So few answers that each is true of enough subjects.
    answers = clause.answers[: max(2, len(peers) // (2 * _NEIGHBOURS))]
    true = answers[(draw.number + clause.number) % len(answers)]
    if draw.subject == true:
        return None
    opening = f"{draw.opening} " if draw.opening else ""
    others = random.sample([each for each in lists["openings"] if each != draw.opening], 2)
    draft = Fact(
        subject=draw.subject,
        template=opening + clause.text,
        target_new=true,
        target_true=true,
        paraphrases=tuple(f"{other} {draw.subject}{clause.text[2:]}" for other in others),
        neighbours=_neighbours(peers, draw, len(answers), random),
        source="synthetic",
        case_id=number,
    )
    try:
        prompt = fact_prompt(model, draft)
    except SubjectBoundaryError:
        return None
    known = _first_token(model, prompt, true)
    for new in random.sample(clause.answers, len(clause.answers)):
        if known is None or new == draw.subject:
            continue
        if _first_token(model, prompt, new) not in (None, known):
            return replace(draft, target_new=new)
    return None


def _neighbours(peers: list[str], draw: _Draw, answers: int, random: Random) -> tuple[str, ...]:
    """Prompts about other subjects of the same true answer: those with its number, modulo."""
    rounds = len(peers) // answers
    turns = random.sample(range(rounds), min(rounds, _NEIGHBOURS + 1))
    subjects = [peers[draw.number % answers + turn * answers] for turn in turns]
    others = [subject for subject in subjects if subject != draw.subject][:_NEIGHBOURS]
    return tuple(draw.clause.text.replace("{}", subject) for subject in others)


def _first_token(model: Model, prompt: Prompt, target: str) -> int | None:
    """The first token of a target; None if the tokenizer merges it into the prompt."""
    try:
        return with_target(model, prompt, target).target_ids[0]
    except TargetTokenError:
        return None
