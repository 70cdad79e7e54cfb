"""COUNTERFACT's own scores (Meng et al. 2022; "Rebuilding ROME", Table 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import hmean

from firsttok.data import Fact
from firsttok.evaluation.targets import score_targets
from firsttok.models import Model
from firsttok.prompts import Prompt, fact_prompt, text_prompt, with_target

__all__ = ["CounterfactScores", "counterfact_scores"]


@dataclass(frozen=True, kw_only=True)
class CounterfactScores:
    """Scores of one fact on a model as it is, as fractions of 1; None where prompts are missing."""

    es: float
    """Efficacy score: P(new) > P(true) on the rewriting prompt."""
    ps: float | None
    """Paraphrase score: the same on the paraphrases."""
    ns: float | None
    """Neighbourhood score: P(true) > P(new) on the neighbours."""
    em: float
    """Efficacy magnitude: P(new) - P(true)."""
    pm: float | None
    """Paraphrase magnitude."""
    nm: float | None
    """Neighbourhood magnitude: P(true) - P(new)."""

    @property
    def score(self) -> float | None:
        """Harmonic mean of ES, PS and NS; 0 if one of them is 0, None if one is missing."""
        if self.ps is None or self.ns is None:
            return None
        parts = [self.es, self.ps, self.ns]
        return float(hmean(parts)) if all(parts) else 0.0


def counterfact_scores(model: Model, fact: Fact) -> CounterfactScores:
    """Score a fact on a model, inside ``edit.applied(model)`` for an edited one.

    P is exp of minus the mean token NLL of the target.
    """
    es, em = _compare(model, [fact_prompt(model, fact)], fact.target_new, fact.target_true)
    paraphrases = [text_prompt(model, text) for text in fact.paraphrases]
    neighbours = [text_prompt(model, text) for text in fact.neighbours]
    ps = pm = ns = nm = None
    if paraphrases:
        ps, pm = _compare(model, paraphrases, fact.target_new, fact.target_true)
    if neighbours:
        ns, nm = _compare(model, neighbours, fact.target_true, fact.target_new)
    return CounterfactScores(es=es, ps=ps, ns=ns, em=em, pm=pm, nm=nm)


def _compare(
    model: Model, prompts: Sequence[Prompt], wanted: str, other: str
) -> tuple[float, float]:
    """Share of prompts that prefer ``wanted``, and the mean difference of probabilities."""
    scores = score_targets(
        model,
        [with_target(model, prompt, target) for target in (wanted, other) for prompt in prompts],
    )
    pairs = list(zip(scores[: len(prompts)], scores[len(prompts) :], strict=True))
    share = sum(first.nll < second.nll for first, second in pairs) / len(pairs)
    gap = sum(first.probability - second.probability for first, second in pairs) / len(pairs)
    return share, gap
