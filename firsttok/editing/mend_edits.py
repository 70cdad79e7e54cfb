"""Edits to train MEND on: facts put together from real words, each with a rephrase of its prompt.

None is of a subject that a built-in fact has, so that editors can be tested on those.
"""

import hashlib
from dataclasses import dataclass, replace

from firsttok.arguments import taken, whole_number
from firsttok.data import Fact, builtin_facts
from firsttok.data.records import builtin_json
from firsttok.errors import BadInputError
from firsttok.models import Model
from firsttok.synthetic import synthetic_facts

__all__ = ["MOST_EDITS", "MendExamples", "mend_edits", "rephrased"]

MOST_EDITS = 20_000
"""More are not drawn: of each, states of the model at its tokens are held in memory."""

_ENDINGS = {
    "cities": ((" the city of", " a city called"),),
    "countries": (
        (" the country of", " a country called"),
        (" the army of", " the army that serves"),
    ),
    "languages": ((" in", " in a language called"), ("", " the language called")),
    "companies": (("", " a company called"),),
    "sports": (("", " the sport of"),),
    "instruments": (
        (" the", " the instrument called the"),
        (" old", " old instrument, a"),
        (" expensive", " expensive instrument, a"),
    ),
    "professions": ((" a", " a professional"),),
    "sciences": ((" the field of", " the science of"), ("", " the science of")),
    "months": ((" the month of", " a month called"),),
    "colours": ((" that is", " that has the colour"), ("", " the colour")),
}
"""How a clause may end otherwise with the same answer to follow, by the kind of answer: the first
ending that a clause has is replaced."""
_SPLIT = 10
"""Of so many subjects one is the validation's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MendExamples:
    """Edits to train on, and others to stop by."""

    training: tuple[Fact, ...]
    """Edits to train on."""
    validation: tuple[Fact, ...]
    """Edits of other subjects, to stop by."""


@taken
def mend_edits(model: Model, training: int, validation: int, *, seed: int) -> MendExamples:
    """Draw edits of :func:`firsttok.synthetic.synthetic_facts`, each with one rephrase.

    A subject is the training's or the validation's by its hash. Subjects of built-in facts, on
    which editors are tested, are left out.

    Args:
        model: The model, whose tokenizer takes them.
        training: How many to train on, at most :data:`MOST_EDITS`.
        validation: How many to stop by, as many at most.
        seed: Seed of the draws.

    Raises:
        BadInputError: If there are not so many.
    """
    for what, number in (("training", training), ("validation", validation)):
        whole_number(number, what, least=1, most=MOST_EDITS)
    tested = {fact.subject.casefold() for fact in builtin_facts()}
    wanted = {False: training, True: validation}
    found: dict[bool, list[Fact]] = {False: [], True: []}
    for fact in synthetic_facts(model, 4 * _SPLIT * (training + validation), seed=seed):
        digest = hashlib.sha256(fact.subject.encode()).hexdigest()
        own = found[int(digest, 16) % _SPLIT == 0]
        if fact.subject.casefold() in tested or len(own) == wanted[own is found[True]]:
            continue
        own.append(replace(fact, paraphrases=(rephrased(fact),)))
        if all(len(found[part]) == wanted[part] for part in found):
            return MendExamples(training=tuple(found[False]), validation=tuple(found[True]))
    raise BadInputError(
        f"the words do not make {training} and {validation} edits to train on; ask for fewer"
    )


def rephrased(fact: Fact) -> str:
    """The prompt of a synthetic fact with another opening and, where there is one, another ending.

    Args:
        fact: The fact, whose first paraphrase has the other opening.
    """
    other = fact.paraphrases[0]
    for relation in builtin_json("words.json")["relations"]:
        for clause in relation["clauses"]:
            if other.endswith(clause.removeprefix("{}")):
                for ending, instead in _ENDINGS[relation["answers"]]:
                    if other.endswith(ending):
                        return other.removesuffix(ending) + instead
    return other
