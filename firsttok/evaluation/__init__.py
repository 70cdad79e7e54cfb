"""What an edit did: perplexity, accuracy, COUNTERFACT's scores, generation."""

from firsttok.evaluation.accuracy import Accuracy, edit_accuracies, edit_accuracy
from firsttok.evaluation.counterfact import CounterfactScores, counterfact_scores
from firsttok.evaluation.generation import continuation, top_predictions
from firsttok.evaluation.perplexity import (
    COLLAPSE_THRESHOLD,
    Perplexity,
    PreparedTexts,
    perplexity,
    prepare_texts,
)
from firsttok.evaluation.targets import TargetScore, score_targets, target_probabilities

__all__ = [
    "COLLAPSE_THRESHOLD",
    "Accuracy",
    "CounterfactScores",
    "Perplexity",
    "PreparedTexts",
    "TargetScore",
    "continuation",
    "counterfact_scores",
    "edit_accuracies",
    "edit_accuracy",
    "perplexity",
    "prepare_texts",
    "score_targets",
    "target_probabilities",
    "top_predictions",
]
