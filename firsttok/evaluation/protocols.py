"""Tasks that lm-eval asks or scores otherwise: GLUE of "Rebuilding ROME", and SQuAD 2.0.

Their metrics need ``pip install 'firsttok[tasks]'``.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from firsttok.data.records import builtin_json

__all__ = ["PROTOCOL", "answer_scores", "protocol_task"]

_EACH = 100
"""Items of each class (note 82)."""
_SEED = 37
_TOKENS = 3
_FIRST = ("positive", "Yes", "False")
"""Words that the released code looks for before the other one."""

_QUESTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "glue_sst2": ("Review : {sentence}\nSentiment :", ("negative", "positive")),
    "glue_mrpc": (
        "Are the sentences paraphrases of each other.\nSentence 1: {sentence1}\n"
        "Sentence 2: {sentence2}\nAnswer:",
        ("No", "Yes"),
    ),
    "glue_cola": (
        "Is this sentence linguistically acceptable?\nSentence : {sentence}\nAnswer :",
        ("No", "Yes"),
    ),
    # Entailment, label 0, is asked for by "False" (note 84), in the shots as in the answers.
    "glue_rte": (
        "{sentence1}\nquestion: {sentence2} True or False?\nanswer:",
        ("False", "True"),
    ),
}
"""Of each task: how an item is put, and the word of each label."""
PROTOCOL = tuple(_QUESTIONS)
"""GLUE as "Rebuilding ROME" asks it (notes 82 to 87)."""


def protocol_task(name: str) -> dict[str, Any]:
    """Return the configuration of a task of Rebuilding ROME's GLUE protocol (notes 82 to 86).

    A few fixed examples with their answers precede each item, three tokens are generated greedily,
    and the first answer word that occurs in them counts, letters' case and all; without one the
    answer is -1, a class of its own. The examples are of the kinds and numbers of the released
    code, but not its sentences. Of longer data 100 items of each class are drawn with seed 37,
    where the released code has drawn its items already.

    Metrics are ``acc``, ``f1`` (weighted over all classes) and ``mcc``.
    """
    question, words = _QUESTIONS[name]
    short = name.removeprefix("glue_")
    shots = [
        f"{question.format(**shot)} {words[shot['label']]}"
        for shot in builtin_json("task_shots.json")[short]
    ]
    before = "".join(f"{shot}\n\n" for shot in shots)
    return {
        "task": name,
        "dataset_path": "nyu-mll/glue",
        "dataset_name": short,
        "validation_split": "validation",
        "output_type": "generate_until",
        "doc_to_text": lambda doc: before + question.format(**doc),
        "doc_to_target": lambda doc: words[doc["label"]],
        "process_docs": _drawn,
        "process_results": partial(_scored, words),
        "generation_kwargs": {"until": [], "max_gen_toks": _TOKENS, "do_sample": False},
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "f1", "aggregation": _weighted_f1, "higher_is_better": True},
            {"metric": "mcc", "aggregation": _mcc, "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }


def _drawn(docs: Any) -> Any:
    """As many items of each class as the protocol takes, in a fixed order."""
    by_label: dict[int, list[int]] = {}
    for place, label in enumerate(docs["label"]):
        by_label.setdefault(label, []).append(place)
    draw = random.Random(_SEED)  # noqa: S311
    chosen = [
        place
        for _, places in sorted(by_label.items())
        for place in (draw.sample(places, _EACH) if len(places) > _EACH else places)
    ]
    draw.shuffle(chosen)
    return docs.select(chosen)


def _scored(words: tuple[str, ...], doc: Mapping[str, Any], results: Sequence[str]) -> Any:
    said = results[0]
    order = sorted(range(len(words)), key=lambda label: words[label] not in _FIRST)
    answer = next((label for label in order if words[label] in said), -1)
    pair = (answer, doc["label"])
    return {"acc": float(answer == doc["label"]), "f1": pair, "mcc": pair}


def _weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    from sklearn.metrics import f1_score

    answers, labels = zip(*pairs, strict=True)
    known: Any = {"average": "weighted", "zero_division": 0}
    return float(f1_score(labels, answers, **known))


def _mcc(pairs: Sequence[tuple[int, int]]) -> float:
    from sklearn.metrics import matthews_corrcoef

    answers, labels = zip(*pairs, strict=True)
    return float(matthews_corrcoef(labels, answers))


def answer_scores(items: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, float]:
    """Exact match and F1 of SQuAD 2.0, in percent, as its official script defines them.

    Answers are compared without case, punctuation and articles; the best of the references counts;
    a question without an answer wants an empty text. ``HasAns`` and ``NoAns`` are those with and
    without one; ``best`` ones take the threshold of the no-answer probability under which an answer
    is given that makes them largest.

    Args:
        items: For each question the prediction (``prediction_text``, ``no_answer_probability``)
            and the reference (``answers`` with ``text``).
    """
    # Exact match, F1, probability of no answer, whether there is one, whether one was given.
    rows: list[tuple[float, float, float, bool, bool]] = []
    for prediction, reference in items:
        golds = [text for text in reference["answers"]["text"] if _words(text)]
        said = prediction["prediction_text"]
        pairs = [_match(said, gold) for gold in golds or [""]]
        exact, f1 = (max(pair[i] for pair in pairs) for i in (0, 1))
        has_answer = bool(reference["answers"]["text"])
        rows.append((exact, f1, prediction["no_answer_probability"], has_answer, bool(said)))
    found: dict[str, float] = {}
    for prefix, kept in (
        ("", rows),
        ("HasAns_", [row for row in rows if row[3]]),
        ("NoAns_", [row for row in rows if not row[3]]),
    ):
        if kept:
            found[f"{prefix}exact"] = 100 * sum(row[0] for row in kept) / len(kept)
            found[f"{prefix}f1"] = 100 * sum(row[1] for row in kept) / len(kept)
    for place, name in enumerate(("best_exact", "best_f1")):
        score = best = float(sum(not row[3] for row in rows))
        for row in sorted(rows, key=lambda row: row[2]):
            score += row[place] if row[3] else -float(row[4])
            best = max(best, score)
        found[name] = 100 * best / len(rows) if rows else float("nan")
    return found


def _match(said: str, gold: str) -> tuple[float, float]:
    """Exact match and F1 of a text and a reference."""
    a, b = _words(said), _words(gold)
    exact = float(a == b)
    if not a or not b:
        return exact, exact
    shared = (Counter(a) & Counter(b)).total()
    return exact, 2 * shared / (len(a) + len(b))


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
