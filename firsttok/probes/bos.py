"""The BOS token: without it, the subject is the first token (Section 3.2, Appendix A.2).

The paper takes BOS away from models that have one, and they collapse. A model without BOS allows
the reverse: put one there, and the collapse is gone.
"""

from firsttok.arguments import taken
from firsttok.models import BosPolicy
from firsttok.study import Study

__all__ = ["bos_study"]


@taken
def bos_study(study: Study, policy: BosPolicy, *, text_bos: BosPolicy | None = None) -> Study:
    """Return a study whose prompts follow another BOS policy, all else being equal.

    Contexts and second moment stay those of the given study, so that BOS is all that differs.

    Args:
        study: A study.
        policy: The policy of keys and value optimisation.
        text_bos: The policy of the sentences of the perplexity; None keeps the study's.

    Raises:
        BadInputError: If a BOS token is asked for and the tokenizer has none.
    """
    model = study.model.with_bos(policy)
    if model.leading_ids == study.model.leading_ids:
        model = study.model
    return study.varied(model=model, text_bos=text_bos or study.text_bos)
