"""What an edit did: perplexity, accuracy, COUNTERFACT's scores, generation."""

from firsttok.evaluation.accuracy import Accuracy, edit_accuracies, edit_accuracy
from firsttok.evaluation.corpus import sample_corpus
from firsttok.evaluation.counterfact import (
    CounterfactScores,
    counterfact_scores,
    edit_counterfact_scores,
)
from firsttok.evaluation.generation import (
    GeneratedMatch,
    continuation,
    distinct_ngrams,
    generated_match,
    generation_entropy,
    sample_continuations,
    sample_documents,
    top_predictions,
)
from firsttok.evaluation.perplexity import (
    COLLAPSE_THRESHOLD,
    DAMAGE_RATIO,
    Damage,
    Perplexity,
    PreparedTexts,
    damage,
    perplexity,
    prepare_texts,
)
from firsttok.evaluation.targets import (
    TargetScore,
    score_edits,
    score_targets,
    target_probabilities,
)
from firsttok.evaluation.tasks import (
    OWN_TASKS,
    TaskScores,
    check_tasks,
    data_hash,
    score_tasks,
)

__all__ = [
    "COLLAPSE_THRESHOLD",
    "DAMAGE_RATIO",
    "OWN_TASKS",
    "Accuracy",
    "CounterfactScores",
    "Damage",
    "GeneratedMatch",
    "Perplexity",
    "PreparedTexts",
    "TargetScore",
    "TaskScores",
    "check_tasks",
    "continuation",
    "counterfact_scores",
    "damage",
    "data_hash",
    "distinct_ngrams",
    "edit_accuracies",
    "edit_accuracy",
    "edit_counterfact_scores",
    "generated_match",
    "generation_entropy",
    "perplexity",
    "prepare_texts",
    "sample_continuations",
    "sample_corpus",
    "sample_documents",
    "score_edits",
    "score_targets",
    "score_tasks",
    "target_probabilities",
    "top_predictions",
]
