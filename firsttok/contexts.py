"""The prefixes x_i that simulate different contexts (Equation 1), sampled once and saved."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from firsttok.arguments import take_fields, taken
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.errors import BadInputError
from firsttok.models import Model, logits
from firsttok.prompts import Prompt, pad, text_prompt
from firsttok.storage import content_hash, read_json, write_json

__all__ = ["ContextSet", "load_contexts", "sample_contexts"]

logger = logging.getLogger(__name__)

SEED_WORDS = ("The", "Therefore", "Because", "I", "You")
LENGTHS = (5, 10)
PER_WORD = 2
TOP_K = 5


@dataclass(frozen=True, kw_only=True)
class ContextSet(Shown):
    """Templates into which a whole prompt is put; the bare one is ``"{}"``.

    Raises:
        BadInputError: If there is no template, or one does not hold ``{}`` exactly once.
    """

    templates: tuple[str, ...]
    """The templates in order, each with one ``{}``."""
    seed: int | None = None
    """Seed they were sampled with; None for a hand-made set."""
    model_fingerprint: str | None = None
    """Fingerprint of the model they were sampled from; None for a hand-made set."""
    leading_ids: tuple[int, ...] | None = None
    """BOS tokens they were sampled behind; None for a hand-made set."""

    def __post_init__(self) -> None:
        """Check the templates."""
        take_fields(self)
        if not self.templates:
            raise BadInputError("a context set holds no templates; give at least '{}'")
        for index, template in enumerate(self.templates):
            if template.count("{}") != 1:
                raise BadInputError(
                    f"context {index} ({template!r}) does not hold '{{}}' exactly once; mend it"
                )

    @property
    def includes_bare(self) -> bool:
        """Whether the bare template is among them, as it is in the released code."""
        return "{}" in self.templates

    @property
    def prefixed(self) -> tuple[str, ...]:
        """The templates that really put something before the prompt."""
        return tuple(template for template in self.templates if not template.startswith("{}"))

    @property
    def first_prefix(self) -> str:
        """The first template with a prefix and nothing behind the prompt, for probes of one place.

        Raises:
            BadInputError: If there is none.
        """
        for template in self.prefixed:
            if template.endswith("{}"):
                return template
        raise BadInputError(
            "no context puts something before the prompt and nothing behind it; give one as "
            "'The weather was fine. {}'"
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 of the templates."""
        return content_hash(list(self.templates))

    def panel(self) -> Panel:
        """The templates."""
        lines = [[index, repr(text)] for index, text in enumerate(self.templates)]
        return Panel(
            title=f"{len(self.templates)} contexts",
            parts=[Table(columns=("", "template"), lines=lines)],
            source={
                "seed": "none, made by hand" if self.seed is None else self.seed,
                "weights": short_hash(self.model_fingerprint),
                "hash": short_hash(self.content_hash),
            },
        )

    def save(self, path: str | Path) -> None:
        """Write the set as JSON."""
        record = {
            "templates": list(self.templates),
            "seed": self.seed,
            "model_fingerprint": self.model_fingerprint,
            "leading_ids": None if self.leading_ids is None else list(self.leading_ids),
        }
        write_json(Path(path), record)


@taken
def load_contexts(path: str | Path) -> ContextSet:
    """Read contexts from JSON: a list of templates, or a set saved by firsttok.

    Raises:
        BadInputError: If the file is missing, not JSON, or holds no templates.
    """
    content = read_json(Path(path), "context templates")
    seed: Any = None
    fingerprint: Any = None
    leading: Any = None
    if isinstance(content, dict):
        record = cast(dict[str, Any], content)
        content = record.get("templates")
        seed, fingerprint = record.get("seed"), record.get("model_fingerprint")
        leading = record.get("leading_ids")
    if not isinstance(content, list):
        raise BadInputError(f"{path} should hold a JSON list of templates with one '{{}}' each")
    templates = cast(list[Any], content)
    for index, template in enumerate(templates):
        if not isinstance(template, str):
            raise BadInputError(f"{path}, template {index} is not a text")
    try:
        return ContextSet(
            templates=tuple(cast(list[str], templates)),
            seed=seed if type(seed) is int else None,
            model_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
            leading_ids=tuple(cast(list[int], leading)) if _are_ids(leading) else None,
        )
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None


def _are_ids(content: Any) -> bool:
    if not isinstance(content, list):
        return False
    return all(type(part) is int for part in cast(list[Any], content))


@taken
def sample_contexts(model: Model, *, seed: int = 0, path: str | Path | None = None) -> ContextSet:
    """Sample the 21 contexts of the released code: the bare one and 20 prefixes.

    Two prefixes for each of five seed words and each of two lengths (5 and 10 tokens, the seed
    word counted), by top-5 sampling, joined to the prompt by ``". "``. The released code draws
    them unseeded; here the seed fixes them.

    Args:
        model: The model, whose BOS policy holds while sampling; interventions of its view do not,
            since contexts are text that every view shares.
        seed: Seed of the sampler.
        path: A JSON file; a set of the same model, seed and BOS in it is reused, else it is
            written.
    """
    path = None if path is None else Path(path)
    if path is not None and path.is_file():
        saved = load_contexts(path)
        wanted = (seed, model.fingerprint, model.leading_ids)
        if (saved.seed, saved.model_fingerprint, saved.leading_ids) == wanted:
            return saved
    model = replace(model, interventions=())
    generator = torch.Generator().manual_seed(seed)
    templates = ["{}"]
    for length in LENGTHS:
        for word in SEED_WORDS:
            for text in _sample(model, word, length, generator):
                plain = text.replace("{", " ").replace("}", " ")
                templates.append(plain + ". {}")
    contexts = ContextSet(
        templates=tuple(templates),
        seed=seed,
        model_fingerprint=model.fingerprint,
        leading_ids=model.leading_ids,
    )
    if path is not None:
        contexts.save(path)
    return contexts


def _sample(model: Model, word: str, length: int, generator: torch.Generator) -> list[str]:
    tokenizer: Any = model.tokenizer
    start = text_prompt(model, word)
    rows = [list(start.token_ids) for _ in range(PER_WORD)]
    leading = len(model.leading_ids)
    while len(rows[0]) - leading < length:
        batch = pad(model, [Prompt(text=word, token_ids=tuple(row)) for row in rows])
        top = logits(model, batch)[:, -1].float().cpu().topk(TOP_K, dim=-1)
        drawn = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
        chosen = top.indices.gather(1, drawn)[:, 0].tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.append(token)
    return [tokenizer.decode(row[leading:], skip_special_tokens=True) for row in rows]
