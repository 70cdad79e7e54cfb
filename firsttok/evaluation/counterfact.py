"""COUNTERFACT's own scores (Meng et al. 2022; "Rebuilding ROME", Table 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import hmean

from firsttok.arguments import taken
from firsttok.data import Fact
from firsttok.editing import Edit
from firsttok.evaluation.targets import TargetScore, score_edits
from firsttok.models import Model
from firsttok.prompts import Prompt, fact_prompt, text_prompt, with_target

__all__ = ["CounterfactScores", "counterfact_scores", "edit_counterfact_scores"]


@dataclass(frozen=True, kw_only=True)
class CounterfactScores:
    """Scores of one fact on a model as it is, as fractions of 1; None where prompts are missing.

    Without the fact's old answer there is nothing to compare with but at neighbours that have
    answers of their own, so that all but the neighbourhood's scores are None.
    """

    es: float | None
    """Efficacy score: P(new) > P(true) on the rewriting prompt."""
    ps: float | None
    """Paraphrase score: the same on the paraphrases."""
    ns: float | None
    """Neighbourhood score: P(true) > P(new) on the neighbours."""
    em: float | None
    """Efficacy magnitude: P(new) - P(true)."""
    pm: float | None
    """Paraphrase magnitude."""
    nm: float | None
    """Neighbourhood magnitude: P(true) - P(new)."""

    @property
    def score(self) -> float | None:
        """Harmonic mean of ES, PS and NS; 0 if one of them is 0, None if one is missing."""
        parts = [part for part in (self.es, self.ps, self.ns) if part is not None]
        if len(parts) < 3:
            return None
        return float(hmean(parts)) if all(parts) else 0.0


@taken
def counterfact_scores(model: Model, fact: Fact) -> CounterfactScores:
    """Score a fact on a model, inside ``edit.applied(model)`` for an edited one.

    P is exp of minus the mean token NLL of the target.
    """
    return edit_counterfact_scores(model, fact, [])[0]


@taken
def edit_counterfact_scores(
    model: Model, fact: Fact, edits: Sequence[Edit]
) -> list[CounterfactScores]:
    """Score a fact on the model as it is, then under each edit alone.

    See :func:`~firsttok.evaluation.score_edits`.

    Args:
        model: The model, unedited.
        fact: The fact.
        edits: Edits.

    Returns:
        The scores without any edit, then under each of them, in order.

    Raises:
        EditMismatchError: If an edit was made for another model.
    """
    new, true = fact.target_new, fact.target_true
    rewriting: list[Prompt] = []
    paraphrases: list[Prompt] = []
    if true:
        rewriting.append(fact_prompt(model, fact))
        paraphrases += [text_prompt(model, text) for text in fact.paraphrases]
    asked = [(prompt, new, true) for prompt in (*rewriting, *paraphrases)]
    asked += [(text_prompt(model, text), kept, new) for text, kept in fact.answered_neighbours]
    prompts = [
        with_target(model, prompt, target, join=fact.join)
        for prompt, wanted, other in asked
        for target in (wanted, other)
    ]
    ends = (len(rewriting), len(rewriting) + len(paraphrases))
    found = score_edits(model, prompts, edits)
    return [_scores(list(zip(each[::2], each[1::2], strict=True)), *ends) for each in found]


def _scores(
    pairs: Sequence[tuple[TargetScore, TargetScore]], first: int, last: int
) -> CounterfactScores:
    es, em = _compare(pairs[:first])
    ps, pm = _compare(pairs[first:last])
    ns, nm = _compare(pairs[last:])
    return CounterfactScores(es=es, ps=ps, ns=ns, em=em, pm=pm, nm=nm)


def _compare(
    pairs: Sequence[tuple[TargetScore, TargetScore]],
) -> tuple[float | None, float | None]:
    """Share of prompts that prefer the first target, and the mean difference of probabilities."""
    if not pairs:
        return None, None
    share = sum(wanted.nll < other.nll for wanted, other in pairs) / len(pairs)
    gap = sum(wanted.probability - other.probability for wanted, other in pairs) / len(pairs)
    return share, gap
