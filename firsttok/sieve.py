"""Facts that cannot be edited: told from their tokens before any work, and kept apart within it."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.progress import Progress

from firsttok.data import SKIP_HINT, Fact, FactFile, LeftOut
from firsttok.errors import BadInputError, CacheError, FirsttokError
from firsttok.models import Model
from firsttok.prompts import fact_prompt, text_prompt, with_target

__all__ = [
    "FailedFact",
    "each_or_reason",
    "nothing_done",
    "reason_against",
    "usable_facts",
    "warn_of_failures",
]

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class FailedFact:
    """A fact that something went wrong with during the work."""

    case_id: int
    subject: str
    prompt: str
    reason: str
    """What went wrong, in one line."""


def reason_against(
    model: Model,
    fact: Fact,
    *,
    templates: Sequence[str] = ("{}",),
    asked: Iterable[tuple[str, str]] = (),
) -> str | None:
    """Why a fact cannot be edited or measured, as far as its tokens tell; None if it can.

    It is edited in the contexts ``templates``, and measured on ``asked``, prompts with answers.
    """
    try:
        with model.texts.unchanged(model.tokenizer):
            prompts = [
                with_target(model, fact_prompt(model, fact, each), fact.target_new, join=fact.join)
                for each in templates
            ]
            prompts += [
                with_target(model, text_prompt(model, text), answer, join=fact.join)
                for text, answer in asked
            ]
    except FirsttokError as error:
        return _one_line(error)
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if longest > model.max_tokens:
        return (
            f"a prompt has {longest} tokens with its answer, and {model.name} reads at most "
            f"{model.max_tokens}"
        )
    return None


def usable_facts(
    model: Model, facts: FactFile, *, skip_bad: bool = False, progress: Progress | None = None
) -> FactFile:
    """Look at the tokens of all facts, so that none of them stops the work later.

    With ``skip_bad`` those that cannot be edited are left out, with a message and in ``left_out``.

    Raises:
        BadInputError: If a fact cannot be edited and is not left out, or if none can be.
    """
    task = None if progress is None else progress.add_task("checking tokens", total=len(facts))

    def reason_of(fact: Fact) -> str | None:
        if progress is not None and task is not None:
            progress.advance(task)
        reason = reason_against(model, fact)
        if reason is not None and not skip_bad:
            raise BadInputError(
                f"case {fact.case_id} of {facts.name} cannot be edited: {reason}{SKIP_HINT}"
            )
        return reason

    return facts.without(reason_of)


def each_or_reason(
    facts: Sequence[Fact], do: Callable[[Sequence[Fact]], Iterable[_Result]]
) -> Iterator[tuple[Fact, _Result | FailedFact]]:
    """Do something with facts together; what fails is done in halves, down to the fact at fault.

    ``do`` gives a result for each fact, in order. It may be called again with facts for which it
    gave none.

    Yields:
        Each fact, in order, with its result or with what went wrong.

    Raises:
        CacheError: If a disk is full or cannot be written to; that is no fault of a fact.
        MemoryError: If there is not enough.
    """
    rest = list(facts)
    try:
        for result in do(facts):
            yield rest.pop(0), result
    except (CacheError, MemoryError):
        raise
    except Exception as error:
        if not rest:
            raise
        if len(facts) == 1:
            fact = facts[0]
            failed = FailedFact(
                case_id=fact.case_id,
                subject=fact.subject,
                prompt=fact.prompt,
                reason=_one_line(error),
            )
            yield fact, failed
            return
        told = "%d facts cannot be done together (%s) and are done in parts"
        logger.warning(told, len(rest), _one_line(error))
        middle = (len(rest) + 1) // 2
        for part in (rest[:middle], rest[middle:]):
            if part:
                yield from each_or_reason(part, do)


def nothing_done(what: str, failed: FailedFact | None) -> BadInputError:
    """The error for work (``what``) that no fact came through, of which ``failed`` is one."""
    if failed is None:
        return BadInputError(f"there are no facts to {what}; give at least one")
    return BadInputError(
        f"there is no fact that went well; case {failed.case_id} did not because: {failed.reason}"
    )


def warn_of_failures(failed: Iterable[FailedFact]) -> None:
    """Say how many facts failed, and why."""
    for each in LeftOut.grouped((fact.reason, f"case {fact.case_id}") for fact in failed):
        logger.warning("%d facts failed: %s (first %s)", each.count, each.reason, each.first)


def _one_line(error: Exception) -> str:
    """One line on an error; one that is not the user's goes with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FirsttokError) else f"{type(error).__name__}: {text}"
