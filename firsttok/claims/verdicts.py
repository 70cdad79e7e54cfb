"""Claims, and the verdict a rule comes to on a script's result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from firsttok.claims.results import NotJudgedError, ScriptResult
from firsttok.evaluation import COLLAPSE_THRESHOLD

__all__ = ["Claim", "Status", "Verdict", "grade", "judge", "verdict"]


class Status(Enum):
    """What became of a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT = "not"
    NOT_JUDGED = "not judged"
    """The script ran, and its rows do not allow a verdict."""
    NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A status and the numbers it comes from."""

    status: Status
    """The status."""
    reason: str
    """One or two sentences with the measured numbers, or with what is missing."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim that a table or a figure supports, and the rule that decides on it."""

    id: str
    """Short name, unique."""
    script: str
    """The script whose rows decide, without suffix."""
    place: str
    """Where the paper makes it (``Table 1``)."""
    sentence: str
    """The claim in one sentence."""
    rule: str
    """The rule in words, thresholds included."""
    decide: Callable[[ScriptResult], Verdict]
    """The rule: a pure function of rows and provenance."""
    own: bool = False
    """Whether the claim is firsttok's and in no paper."""
    on_collapse: bool = False
    """Whether it speaks of collapse cases and its rows do not say that they collapse here."""


def verdict(status: Status, reason: str) -> Verdict:
    """Return a verdict."""
    return Verdict(status=status, reason=reason)


def grade(reproduced: bool, partly: bool) -> Status:
    """Return ``reproduced`` if the first holds, or else ``partly`` if the second does."""
    if reproduced:
        return Status.REPRODUCED
    return Status.PARTLY if partly else Status.NOT


def judge(claim: Claim, result: ScriptResult | None) -> Verdict:
    """Return a claim's verdict, ``not judged`` with a reason where the rows do not allow one.

    Args:
        claim: The claim.
        result: What its script left; None if it has not been run.
    """
    if result is None:
        return verdict(
            Status.NOT_RUN, f"There is no {claim.script}.json; run analyses/{claim.script}.py."
        )
    try:
        _check_original(result)
        if claim.on_collapse:
            _check_list(result)
        return claim.decide(result)
    except NotJudgedError as gap:
        return verdict(Status.NOT_JUDGED, str(gap))


def _check_original(result: ScriptResult) -> None:
    """No edit can collapse a model that is no language model on these sentences to begin with."""
    found = [row.get("original_perplexity") for row in result.rows]
    found.append(result.provenance.get("original_perplexity"))
    highest = max((value for value in found if isinstance(value, int | float)), default=0.0)
    if highest > COLLAPSE_THRESHOLD:
        raise NotJudgedError(
            f"The unedited model's perplexity is {highest:,.0f}, above {COLLAPSE_THRESHOLD:g} "
            "itself; run the script with --text-bos with."
        )


def _check_list(result: ScriptResult) -> None:
    """Cases that collapse another model are no collapse cases here."""
    listed = result.provenance.get("case_list")
    model = result.provenance.get("model")
    if not (isinstance(listed, Mapping) and isinstance(model, Mapping)):
        return
    if listed.get("fingerprint") != model.get("fingerprint"):
        raise NotJudgedError(
            f"The cases are those that collapse {listed.get('model')}; nothing says that they "
            "collapse this model."
        )
