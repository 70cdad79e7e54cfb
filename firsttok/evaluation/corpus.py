"""A corpus that a model writes itself, in rounds that are kept."""

import logging
from typing import Any

from rich.progress import Progress

from firsttok.arguments import taken, whole_number
from firsttok.errors import BadInputError
from firsttok.evaluation.generation import sample_documents
from firsttok.models import Model
from firsttok.prompts import text_prompt
from firsttok.storage import cache_folder, content_hash, locked, read_record, write_record

__all__ = ["sample_corpus"]

logger = logging.getLogger(__name__)

_COUNT, _LENGTH = 128, 128
"""Texts of a round, and their most tokens: a window of the second moment."""


@taken
def sample_corpus(
    model: Model,
    tokens: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 0.9,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Sample documents until they hold ``tokens`` tokens, in rounds of 128.

    A finished round is kept by all that decides it, and no round depends on another: an
    interrupted run resumes with the round that was not finished, and a smaller number of tokens
    gives the first documents of a larger one. While something disturbs the model no round is read
    or kept.

    Args:
        model: A decoder.
        tokens: Fewest tokens of all documents together, by the model's own tokenizer.
        seed: Seed of the sampler.
        temperature: As for :func:`~firsttok.evaluation.sample_documents`, which says why these.
        top_p: As for :func:`~firsttok.evaluation.sample_documents`.
        progress: Where to show progress.

    Returns:
        The documents. Blank lines are taken out of them, since in a file one parts two documents.

    Raises:
        BadInputError: If a number is out of its range, or a round has no text at all.
        UnsupportedModelError: As for :func:`~firsttok.evaluation.sample_documents`.
    """
    whole_number(tokens, "tokens", least=1)
    bar = progress or Progress(disable=True)
    task = bar.add_task("sampling tokens", total=tokens)
    documents: list[str] = []
    total = index = 0
    while total < tokens:
        texts = _round(model, index, seed, temperature, top_p, bar, task)
        if not texts:
            raise BadInputError(
                f"{model.name} writes no text at temperature {temperature:g} and top_p {top_p:g}; "
                "choose others"
            )
        for text in texts:
            if total >= tokens:
                break
            documents.append(text)
            total += len(text_prompt(model, text).token_ids) - len(model.leading_ids)
        bar.update(task, completed=min(total, tokens))
        index += 1
    return tuple(documents)


def _round(
    model: Model,
    index: int,
    seed: int,
    temperature: float,
    top_p: float,
    bar: Progress,
    task: Any,
) -> list[str]:
    """The documents of one round: those that were kept, or else sampled."""

    def sample() -> list[str]:
        texts = sample_documents(
            model,
            count=_COUNT,
            tokens=min(_LENGTH, model.max_tokens - 1),
            temperature=temperature,
            top_p=top_p,
            seed=int(content_hash([seed, index])[:8], 16),
            on_step=lambda drawn: bar.advance(task, drawn),
        )
        # Line ends as every file has them, so that it is read as it was written.
        lines = ([line.rstrip() for line in text.splitlines()] for text in texts)
        return ["\n".join(line for line in each if line) for each in lines]

    if model.disturbance is not None:
        return sample()
    decisive = [model.identity(), seed, temperature, top_p, _COUNT, _LENGTH, index]
    path = cache_folder("documents") / f"{content_hash(decisive)[:20]}.json"
    with locked(path):
        if path.is_file():
            try:
                return read_record(path, "documents")["documents"]
            except (BadInputError, KeyError):
                logger.warning("a kept round of documents is damaged and is sampled again")
        texts = sample()
        write_record(path, {"documents": texts})
        return texts
