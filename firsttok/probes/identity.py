"""Other tokens in the subject's place: with a space, without one, or after BOS.

"Arthur" and " Arthur" are different tokens. The released code compares a subject at
the very beginning with the same subject after a prefix; there it also carries a leading space,
which makes it another token. Here the two are crossed, so that each effect stands alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from firsttok.arguments import taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.errors import BadInputError
from firsttok.keys import FactKeys, fact_keys, keys_at
from firsttok.models import BosPolicy, Model
from firsttok.prompts import Prompt, fact_prompt, join_prompts, positions, text_prompt
from firsttok.study import Study

__all__ = ["IDENTITY_CELLS", "IdentityCell", "bos_study", "distinct_with_space", "identity_prompt"]


@dataclass(frozen=True, kw_only=True)
class IdentityCell:
    """One of the four crossings; also a key source whose k^u is read there.

    As with :class:`~firsttok.probes.MaskedKeys`, the value's anchor goes with k^u.
    """

    later: bool
    """Whether the subject stands after a prefix."""
    space: bool
    """Whether the subject's token begins with a space."""

    @property
    def name(self) -> str:
        """Name in tables and provenance."""
        place = "later" if self.later else "first"
        return f"{place} position, {'with' if self.space else 'without'} space"

    def keys(self, model: Model, fact: Fact, contexts: ContextSet, *, layer: int) -> FactKeys:
        """Return the ordinary k_bar and the k^u of this cell."""
        ordinary = fact_keys(model, fact, contexts, layer=layer)
        prompt = identity_prompt(model, fact, self, prefix=contexts.first_prefix)
        place = int(positions([prompt])[0])
        key = keys_at(model, [prompt], [place], layers=[layer]).at(layer)[0]
        return replace(ordinary, unprefixed=key)


IDENTITY_CELLS = tuple(
    IdentityCell(later=later, space=space) for later in (False, True) for space in (False, True)
)
"""The four cells."""


@taken
def identity_prompt(model: Model, fact: Fact, cell: IdentityCell, *, prefix: str) -> Prompt:
    """Build a fact's prompt for a cell; tokens are put together, never tokenised again.

    Args:
        model: The model.
        fact: A fact whose prompt begins with its subject.
        cell: Where the subject stands, and whether with a space.
        prefix: A context with ``{}`` at its end; what is before it is put before the prompt.

    Raises:
        BadInputError: If the fact is none of :func:`distinct_with_space`.
    """
    if not _is_distinct(model, fact):
        raise BadInputError(
            f"{fact.prompt!r} does not begin with a subject that is one token without a leading "
            f"space and another one with it in {model.name}; choose another fact"
        )
    prompt = fact_prompt(model, fact, " {}" if cell.space else "{}")
    if not cell.later:
        return prompt
    return join_prompts(model, text_prompt(model, prefix.removesuffix("{}").rstrip()), prompt)


@taken
def distinct_with_space(model: Model, facts: Sequence[Fact]) -> list[Fact]:
    """Return the facts that begin with a subject of one token, another one after a space."""
    return [fact for fact in facts if _is_distinct(model, fact)]


@taken
def bos_study(study: Study, policy: BosPolicy, *, text_bos: BosPolicy | None = None) -> Study:
    """Return a study whose prompts follow another BOS policy (Section 3.2, Appendix A.2).

    The paper takes BOS away from models that have one, and they collapse. A model without BOS
    allows the reverse: put one there, and the collapse is gone.

    Contexts and second moment stay those of the given study, so that BOS is all that differs, and
    so does the policy of the perplexity's sentences unless another one is given.

    Raises:
        BadInputError: If a BOS token is asked for and the tokenizer has none.
    """
    model = study.model.with_bos(policy)
    if model.leading_ids == study.model.leading_ids:
        model = study.model
    return study.varied(model=model, text_bos=text_bos or study.text_bos)


def _is_distinct(model: Model, fact: Fact) -> bool:
    if not fact.template.startswith("{}"):
        return False
    plain, spaced = fact_prompt(model, fact), fact_prompt(model, fact, " {}")
    return (
        plain.subject_length == spaced.subject_length == 1
        and plain.subject_position == spaced.subject_position
        and plain.token_ids != spaced.token_ids
    )
