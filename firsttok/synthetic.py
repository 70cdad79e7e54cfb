"""Facts in COUNTERFACT's schema: any number from real words, or true ones, like HardEdit's."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from math import gcd
from random import Random
from typing import Any, Literal

from firsttok.arguments import taken
from firsttok.data import Fact, builtin_facts
from firsttok.data.records import builtin_json
from firsttok.errors import BadInputError, SubjectBoundaryError, TargetTokenError
from firsttok.models import Model
from firsttok.prompts import Prompt, fact_prompt, subject_prompt, with_target

__all__ = ["known_facts", "synthetic_facts"]

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


@dataclass(frozen=True, kw_only=True)
class _Known:
    """One thing that is known of one subject."""

    subject: str
    answers: tuple[str, ...]
    """What is true, the usual answer first."""
    clause: str
    paraphrases: tuple[str, ...]
    peers: tuple[tuple[str, tuple[str, ...]], ...]
    """All subjects of the relation with their answers."""


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


@taken
def known_facts(
    model: Model,
    kind: Literal["hard", "normal"],
    *,
    seed: int,
    exclude: Collection[str] = (),
) -> Iterator[Fact]:
    """Put together what is known with a false answer of the same type, as HardEdit does.

    A hard candidate is of the pattern by which HardEdit was made: its subject is one common word,
    which stands first in the text and is a single token. A normal one says the same kind of thing
    of a subject that has more tokens, or that follows an opening. Each fact has two
    paraphrases and four neighbours with their own true answers. The facts come in a drawn order, in
    which every subject comes once before any comes twice.

    What the built-in facts say, the same true answer of a subject or the same template, is left
    out. A fact and its case id do not depend on ``kind`` or ``exclude``.

    Args:
        model: The model, whose tokenizer tells the kinds apart.
        kind: ``hard`` or ``normal``.
        seed: Seed of the order, the false answers, neighbours and openings.
        exclude: Subjects that no fact is to be about, in whatever case.
    """
    known = _known(builtin_json("known.json"))
    Random(f"firsttok known {seed}").shuffle(known)  # noqa: S311
    seen = Counter[str]()
    rounds: list[int] = []
    for each in known:
        rounds.append(seen[each.subject])
        seen[each.subject] += 1
    order = sorted(range(len(known)), key=rounds.__getitem__)
    refused = {subject.casefold() for subject in exclude}
    built_in = _told(builtin_facts())
    openings: list[str] = _lists()["openings"]
    for number, place in enumerate(order):
        draw = known[place]
        true = draw.answers[0]
        if draw.subject.casefold() in refused or not built_in.isdisjoint(
            {(draw.subject, draw.clause), (draw.subject, true)}
        ):
            continue
        random = Random(f"firsttok known {seed} {draw.subject} {draw.clause}")  # noqa: S311
        opening = random.choice(openings)
        alone = _is_one_token(model, draw.subject)
        if kind == "normal":
            template = f"{opening} {draw.clause}" if alone else draw.clause
            fact = _known_fact(model, draw, template, 2 * number + 1, random)
        elif alone:
            fact = _known_fact(model, draw, draw.clause, 2 * number, random)
        else:
            fact = None
        if fact is not None:
            yield fact


def _known(content: dict[str, Any]) -> list[_Known]:
    """Everything that the tables say, relation by relation; an empty cell says nothing."""
    found: list[_Known] = []
    for relation in content["relations"]:
        table = content["tables"][relation["of"]]
        column = 1 + table["columns"].index(relation["answer"])
        peers = tuple(
            (row[0], tuple(row[column].split("|"))) for row in table["rows"] if row[column]
        )
        found += [
            _Known(
                subject=subject,
                answers=answers,
                clause=relation["clause"],
                paraphrases=tuple(relation["paraphrases"]),
                peers=peers,
            )
            for subject, answers in peers
            # "Ring" is "Ring" in German: nothing would be known that the prompt does not say.
            if subject.casefold() not in {answer.casefold() for answer in answers}
        ]
    return found


def _told(facts: Iterable[Fact]) -> set[tuple[str, str]]:
    """What facts say: their subjects with their templates, and with their true answers."""
    pairs = ((fact.subject, part) for fact in facts for part in (fact.template, fact.target_true))
    return {(subject, part) for subject, part in pairs if part}


def _known_fact(
    model: Model, draw: _Known, template: str, number: int, random: Random
) -> Fact | None:
    """The fact with a false answer; None if the tokenizer takes it with none."""
    draft = Fact(
        subject=draw.subject,
        template=template,
        target_new=draw.answers[0],
        target_true=draw.answers[0],
        paraphrases=tuple(text.replace("{}", draw.subject) for text in draw.paraphrases),
        source="known",
        case_id=number,
    )
    others = dict.fromkeys(
        answers[0] for _, answers in draw.peers if answers[0] not in draw.answers
    )
    new = _new_answer(model, draft, random.sample(tuple(others), len(others)))
    if new is None:
        return None
    # Those of the same true answer first, as in COUNTERFACT; of capitals there are none.
    asked = [peer for peer in draw.peers if peer[0] != draw.subject and new not in peer[1]]
    random.shuffle(asked)
    asked.sort(key=lambda peer: peer[1][0] != draft.target_true)
    asked = asked[:_NEIGHBOURS]
    answers = tuple(answers[0] for _, answers in asked)
    return replace(
        draft,
        target_new=new,
        neighbours=tuple(draw.clause.replace("{}", subject) for subject, _ in asked),
        neighbour_answers=() if set(answers) <= {draft.target_true} else answers,
    )


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
    new = _new_answer(model, draft, random.sample(clause.answers, len(clause.answers)))
    return None if new is None else replace(draft, target_new=new)


def _new_answer(model: Model, draft: Fact, answers: Iterable[str]) -> str | None:
    """The first answer that begins with another token than the true one; None if none does."""
    try:
        prompt = fact_prompt(model, draft)
    except SubjectBoundaryError:
        return None
    known = _first_token(model, prompt, draft.target_true)
    if known is None:
        return None
    for new in answers:
        if new != draft.subject and _first_token(model, prompt, new) not in (None, known):
            return new
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
