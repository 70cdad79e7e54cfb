"""The prefixes x_i that simulate different contexts (Equation 1), sampled once and saved."""

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from firsttok.arguments import converters, take_fields, taken
from firsttok.data import Fact
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.errors import BadInputError, DamagedFileError
from firsttok.models import Model, logits
from firsttok.prompts import Prompt, pad, text_prompt
from firsttok.storage import cache_folder, content_hash, locked, read_json, write_record

__all__ = ["ContextSet", "kept_contexts", "load_contexts", "sample_contexts"]

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
    seed: int | None = None
    """Seed they were sampled with; None for a hand-made set."""
    model_fingerprint: str | None = None
    """Fingerprint of the model they were sampled from; None for a hand-made set."""
    leading_ids: tuple[int, ...] | None = None
    """BOS tokens they were sampled after; None for a hand-made set."""
    model_identity: str | None = None
    """Identity of that model, its edits included (``Model.identity``); None for a hand-made set."""

    def __post_init__(self) -> None:
        take_fields(self)
        if not self.templates:
            raise BadInputError("a context set holds no templates; give at least '{}'")
        for index, template in enumerate(self.templates):
            if template.count("{}") != 1:
                raise BadInputError(
                    f"context {index} ({template!r}) does not hold '{{}}' exactly once; correct it"
                )

    @property
    def prefixed(self) -> tuple[str, ...]:
        """The templates that really put something before the prompt."""
        return tuple(template for template in self.templates if not template.startswith("{}"))

    def draw_prefix(self, fact: Fact, *, seed: int) -> str:
        """Draw one of the prefixes used for editing, as Section 4 does at test time (Table 5).

        The draw depends on seed and fact alone, so that every method is tested after the same one.

        Raises:
            BadInputError: If no template has a prefix.
        """
        if not self.prefixed:
            raise BadInputError(
                "no context has a prefix that could be put before the prompt; give one"
            )
        return random.Random(f"{seed} {fact.content_hash}").choice(self.prefixed)  # noqa: S311

    @property
    def first_prefix(self) -> str:
        """The first template with a prefix and nothing after the prompt, for probes of one place.

        Raises:
            BadInputError: If there is none.
        """
        for template in self.prefixed:
            if template.endswith("{}"):
                return template
        raise BadInputError(
            "no context puts something before the prompt and nothing after it; give one as "
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
        write_record(Path(path), asdict(self))


@taken
def load_contexts(path: str | Path) -> ContextSet:
    """Read contexts from JSON: a list of templates, or a set saved by firsttok.

    Raises:
        BadInputError: If the file is missing, not JSON, or holds no templates.
        DamagedFileError: If a saved set was changed, which then is not what was sampled.
    """
    try:
        content = read_json(Path(path), "context templates")
    except DamagedFileError:
        raise DamagedFileError(
            f"{path} is a saved set of contexts that was changed after firsttok wrote it; for "
            "templates of your own give a plain JSON list, or delete the file to sample them again"
        ) from None
    saved = content if isinstance(content, dict) else {"templates": content}
    if not isinstance(saved.get("templates"), list):
        raise BadInputError(f"{path} should hold a JSON list of templates with one '{{}}' each")
    for index, template in enumerate(saved["templates"]):
        if not isinstance(template, str):
            raise BadInputError(f"{path}, template {index} is not a text")
    try:
        fields: dict[str, Any] = {
            name: convert(tuple(value) if isinstance(value, list) else value)
            for name, convert in converters(ContextSet).items()
            if (value := saved.get(name)) is not None
        }
        return ContextSet(**fields)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None


@taken
def sample_contexts(
    model: Model,
    *,
    seed: int = 0,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> ContextSet:
    """Sample the 21 contexts of the released code: the bare one and 20 prefixes.

    Two prefixes for each of five seed words and each of two lengths (5 and 10 tokens, the seed
    word counted), by top-5 sampling, joined to the prompt by ``". "``. The released code draws
    them unseeded; here the seed fixes them. The model's BOS policy holds while sampling, and so do
    edits that stand in it; interventions of a view do not, since all views share the contexts.

    A set of the same model, seed and BOS in the JSON file ``path`` is reused, else it is written.
    While something disturbs the model it is neither read nor written.
    """
    model = replace(model, interventions=())
    if path is None or model.disturbance is not None:
        return _sampled(model, seed, progress)
    contexts = _saved(Path(path), model, seed)
    if contexts is None:
        contexts = _sampled(model, seed, progress)
        contexts.save(path)
    return contexts


def kept_contexts(
    model: Model,
    seed: int = 0,
    *,
    look_in: Sequence[Path] = (),
    leave_in: Path | None = None,
    progress: Progress | None = None,
) -> ContextSet:
    """Return the contexts of a seed that were kept for this model, or else sample and keep them.

    The cache keeps one set for each model, seed and BOS policy, whoever asked for it. A set may lie
    in the folders ``look_in``, too; if none has it, it is copied to ``leave_in``.

    Raises:
        BadInputError: If a file in one of the folders is no set of contexts.
    """
    model = replace(model, interventions=())
    if model.disturbance is not None:
        return _sampled(model, seed, progress)
    bos = "" if model.bos.value == "as_tokenizer" else f"-bos-{model.bos.value}"
    name = f"contexts-seed{seed}{bos}.json"
    cached = cache_folder("contexts") / f"{model.identity()[:20]}-seed{seed}.json"
    for folder in (*look_in, *([leave_in] if leave_in else [])):
        saved = _saved(folder / name, model, seed)
        if saved is not None:
            return saved
    with locked(cached):
        try:
            contexts = _saved(cached, model, seed)
        except BadInputError:
            logger.warning("cached contexts are damaged and are sampled again")
            contexts = None
        if contexts is None:
            contexts = _sampled(model, seed, progress)
            contexts.save(cached)
    if leave_in is not None:
        contexts.save(leave_in / name)
    return contexts


def _saved(path: Path, model: Model, seed: int) -> ContextSet | None:
    """The set in a file, if there is one, and of this model and seed."""
    saved = load_contexts(path) if path.is_file() else None
    same = saved is not None and (saved.seed, saved.model_identity) == (seed, model.identity())
    return saved if same else None


def _sampled(model: Model, seed: int, progress: Progress | None) -> ContextSet:
    generator = torch.Generator().manual_seed(seed)
    templates = ["{}"]
    total = len(LENGTHS) * len(SEED_WORDS)
    task = None if progress is None else progress.add_task("sampling contexts", total=total)
    for length, word in product(LENGTHS, SEED_WORDS):
        for text in _sample(model, word, length, generator):
            plain = text.replace("{", " ").replace("}", " ")
            templates.append(plain + ". {}")
        if progress is not None and task is not None:
            progress.advance(task)
    return ContextSet(
        templates=tuple(templates),
        seed=seed,
        model_fingerprint=model.fingerprint,
        leading_ids=model.leading_ids,
        model_identity=model.identity(),
    )


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
