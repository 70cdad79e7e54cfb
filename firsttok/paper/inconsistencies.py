"""Where "The Fall of ROME" contradicts itself or its code, computed from the printed numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import lcm

from firsttok.data import SLIDES, paper_values
from firsttok.evaluation import COLLAPSE_THRESHOLD

__all__ = ["Inconsistency", "find_inconsistencies", "fits_count", "printed_numbers"]

GPT = ("gpt2-xl", "gpt-j-6b")
LONGEST_TARGET = 6
"""Longest target, in tokens, that is granted when a percentage is checked against its cases."""

Numbers = Mapping[tuple[str, str, str], float]
"""Printed numbers by table, row and model."""


@dataclass(frozen=True, kw_only=True)
class Inconsistency:
    """Two places that do not agree, or a choice that is left open."""

    id: str
    """Short name, unique."""
    places: str
    """Where to look."""
    sentence: str
    """What does not agree, with the printed numbers where it is about numbers."""
    confirmed: bool | None = None
    """Whether the printed numbers do disagree as the sentence says; None where there are none."""


def printed_numbers() -> dict[tuple[str, str, str], float]:
    """All printed numbers of the paper's tables and text, and of the slides."""
    own = [paper_values(f"Table {number}") for number in range(1, 8)]
    slides = [paper_values(table, paper=SLIDES) for table in ("HardCF", "Task performance")]
    values = chain(*own, paper_values("Text"), *slides)
    return {(value.table, value.row, value.model): value.value for value in values}


def find_inconsistencies(numbers: Numbers | None = None) -> tuple[Inconsistency, ...]:
    """Return every inconsistency, each numeric one computed from the printed numbers, or others."""
    given = printed_numbers() if numbers is None else numbers
    numeric = (_maxima, _originals, _percentage, _numerators, _mitigated)
    worded = (
        Inconsistency(id=name, places=places, sentence=sentence)
        for (name, places), sentence in _WORDED.items()
    )
    return (*(check(given) for check in numeric), *worded)


def fits_count(percent: float, cases: int, *, parts: int = 1, decimals: int = 2) -> bool:
    """Whether a printed percentage can be a mean over some cases.

    Args:
        percent: The percentage as printed.
        cases: The number of cases.
        parts: A case counts 0, 1/parts, 2/parts, ... or 1: tokens of a target that are right.
        decimals: Printed decimals.
    """
    whole = cases * parts
    near = round(percent * whole / 100)
    return any(
        round(float(Fraction(100 * count, whole)), decimals) == percent
        for count in (near - 1, near, near + 1)
    )


def _maxima(numbers: Numbers) -> Inconsistency:
    pairs = {
        model: (
            numbers["Table 6", "Original/max", model],
            numbers["Table 2", "ROME/collapse", model],
        )
        for model in GPT
    }
    shown = " and ".join(
        f"{part:,.2f} against {whole:,.2f} on {model}" for model, (part, whole) in pairs.items()
    )
    return Inconsistency(
        id="maxima",
        places="Tables 2 and 6",
        sentence="Table 6 takes those collapse cases whose subject is the first token, Table 2 all "
        f"of them, both after ROME; yet the part has the higher maximum: {shown}.",
        confirmed=all(part > whole for part, whole in pairs.values()),
    )


def _originals(numbers: Numbers) -> Inconsistency:
    pairs = {
        model: (numbers["Table 2", "Original", model], numbers["Table 3", "Ori PPL", model])
        for model in GPT
    }
    shown = ", ".join(f"{model} {one} and {two}" for model, (one, two) in pairs.items())
    slides = numbers["Task performance", "perplexity/original", "llama2-7b"]
    llama = numbers["Table 2", "Original", "llama2-7b"]
    return Inconsistency(
        id="originals",
        places="Tables 2 and 3, slides",
        sentence=f"The unedited model has two perplexities in two tables: {shown}. The authors' "
        f"slides on the Butterfly Effect have Table 3's, and {slides} for llama2-7b where Table 2 "
        f"has {llama}.",
        confirmed=slides != llama
        and all(
            one != two == numbers["Task performance", "perplexity/original", model]
            for model, (one, two) in pairs.items()
        ),
    )


def _percentage(numbers: Numbers) -> Inconsistency:
    percent = numbers["Table 4", "generalization", "gpt-j-6b"]
    cases = int(numbers["HardCF", "collapse cases", "gpt-j-6b"])
    near = round(percent * cases / 100)
    # Any mixture of targets of up to so many tokens is a multiple of one over this.
    parts = lcm(*range(1, LONGEST_TARGET + 1))
    return Inconsistency(
        id="percentage",
        places="Table 4, slides",
        sentence=f"GPT-J's generalization of {percent} % is no mean over its {cases} collapse "
        f"cases: {near} of them are {100 * near / cases:.2f} %, {near + 1} are "
        f"{100 * (near + 1) / cases:.2f} %, and counting the right tokens of "
        f"targets of up to {LONGEST_TARGET} tokens does not reach it. (24 of 78 is 30.77 %.)",
        confirmed=not fits_count(percent, cases, parts=parts),
    )


def _numerators(numbers: Numbers) -> Inconsistency:
    factors = {
        model: numbers["Table 1", "numerator/normal", model]
        / numbers["Table 1", "numerator/collapse", model]
        for model in (*GPT, "llama2-7b")
    }
    llama = factors["llama2-7b"]
    shown = ", ".join(f"{model} {1 / factors[model]:.2f} times larger" for model in GPT)
    return Inconsistency(
        id="numerators",
        places="Table 1",
        sentence="The numerators are said to show no significant differences, but in its own "
        f"column llama2-7b's is {llama:.2f} times smaller on collapse cases; on the others it is "
        f"larger ({shown}).",
        confirmed=llama > 3 and all(factors[model] < 1 for model in GPT),
    )


def _mitigated(numbers: Numbers) -> Inconsistency:
    lowest = numbers["Table 6", "Second2First/min", "gpt2-xl"]
    return Inconsistency(
        id="mitigated",
        places="Table 6, Appendix A.4",
        sentence="Second2First is said to mitigate the collapse on GPT-2-XL, but its lowest "
        f"perplexity is {lowest:,.2f}: by the threshold of {COLLAPSE_THRESHOLD:g} that defines "
        "collapse, every case is still one.",
        confirmed=lowest > COLLAPSE_THRESHOLD,
    )


_WORDED = {
    ("normal-cases", "Section 3, Table 5"): "Normal cases are 1000 random samples of the remaining "
    "part of COUNTERFACT in Section 3, and all remaining data of it in Table 5.",
    ("anchor", "Section 3.1, released code"): "C-ROME is said to substitute every unprefixed key. "
    "The released code does so in the update, but the anchor of v*, and the norm that clamps its "
    "optimisation, still come from the bare prompt. FC-ROME closes this.",
    ("second-moment", "Equation 3, released configurations"): "Equation 3 holds C^-1; every "
    "released configuration switches it off (mom2_adjustment: false), so that the left vector is "
    "the key itself. Which of the two a table used is not said; firsttok uses C, and "
    "--second-moment identity leaves it out.",
    ("kl-direction", "Section 2, released code"): "The loss that v* is optimised with is not "
    "printed. The released code calls kl_div(before, after), which is KL(after || before) and is "
    "easily read the other way round. firsttok does what the code does.",
    ("swap-stage", "Tables 6 and 7"): "Whether a swapped position embedding acts on the keys only, "
    "on the value optimisation, or on the evaluation as well is not said. firsttok measures all "
    "three.",
}
"""What is in words only, by name and place."""
