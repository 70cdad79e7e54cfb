"""What a model says: its top predictions, a greedy continuation, sampled ones and their entropy."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from firsttok.arguments import taken, whole_number
from firsttok.data import Fact
from firsttok.engine.products import fast_products, runs_plain
from firsttok.errors import BadInputError, SpecialTokenError, UnsupportedModelError
from firsttok.models import Model, logits
from firsttok.prompts import Prompt, fact_prompt, pad, text_prompt, with_target

__all__ = [
    "GeneratedMatch",
    "continuation",
    "distinct_ngrams",
    "generated_match",
    "generation_entropy",
    "greedy_text",
    "sample_continuations",
    "sample_documents",
    "top_predictions",
]

_STOP = re.compile(r"(?<=\w)[.!?](?=\s)|(?<=\S)\s*\n")
"""Where a text ends by itself. A mark counts once a space follows it: 3.5 has none."""
_WORD = re.compile(r"\w+|[^\w\s]")
"""A word, or a mark of its own: a collapsed model may write nothing but commas."""
_WIDEST = 1000
"""Tokens that a nucleus is taken of: to sort a whole vocabulary takes as long as a pass."""


@taken
def top_predictions(model: Model, text: str, *, count: int = 5) -> list[tuple[str, float]]:
    """Return the most probable next tokens of a text with their probabilities."""
    prompt = text_prompt(model, text)
    last = logits(model, pad(model, [prompt]))[0, prompt.last_position].float().softmax(-1)
    best = last.topk(whole_number(count, "count", least=1, most=len(last)))
    tokenizer: Any = model.tokenizer
    return [
        (tokenizer.decode([token]), probability)
        for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@taken
def continuation(model: Model, text: str, *, tokens: int = 20) -> str:
    """Continue a text greedily; returns the new text only."""
    whole_number(tokens, "tokens", least=0)
    prompt = text_prompt(model, text)
    tokenizer: Any = model.tokenizer
    return tokenizer.decode(list(islice(_greedy(model, prompt), tokens)))


@dataclass(frozen=True, kw_only=True)
class GeneratedMatch:
    """What a model writes after a fact's prompt by itself, beside the fact's new target.

    Teacher-forced accuracy gives the model all earlier tokens of the target, and asks for no end;
    this does neither ("The Mirage of Model Editing", Yang et al. 2025).
    """

    text: str
    """What it wrote, up to a natural stop."""
    exact: bool
    """Whether that is the target, both normalised."""
    first_words: bool
    """Whether it begins with the target's words, both normalised."""


@taken
def generated_match(
    model: Model, fact: Fact, *, context: str = "{}", tokens: int = 20
) -> GeneratedMatch:
    """Let a model write greedily after a fact's prompt, and look for the new target in it.

    It stops where the text does: at a token that ends texts, at a line break after a word, or
    after a full stop, question or exclamation mark. Case, punctuation, articles and spaces do not
    count (SQuAD's normalisation).

    Args:
        model: The model; inside ``edit.applied(model)`` or as ``model.edited(edit)`` an edited one.
        fact: The fact.
        context: Put before the prompt.
        tokens: Most tokens that are written; more if the target has more.
    """
    whole_number(tokens, "tokens", least=1)
    prompt = fact_prompt(model, fact, context)
    tokenizer: Any = model.tokenizer
    target = with_target(model, prompt, fact.target_new, join=fact.join).target_ids
    ends, ids, text = set(_end_ids(model)), list[int](), ""
    for token in islice(_greedy(model, prompt), max(tokens, len(target) + 1)):
        if token in ends:
            break
        text = tokenizer.decode([*ids, token])
        found = _STOP.search(text)
        if found is not None:
            text = text[: found.start() + 1]
            break
        ids.append(token)
    said, wanted = _normalised(text), _normalised(fact.target_new)
    if not wanted:
        # A target of marks or of an article alone is compared as it stands.
        said, wanted = text.casefold().split(), fact.target_new.casefold().split()
    return GeneratedMatch(
        text=text.strip(), exact=said == wanted, first_words=said[: len(wanted)] == wanted
    )


@torch.no_grad()
def _greedy(model: Model, prompt: Prompt) -> Iterator[int]:
    """The most probable tokens after a prompt, one after another, without end."""
    from transformers import DynamicCache

    rows, cache = torch.tensor([prompt.token_ids]), DynamicCache()
    while True:
        token = int(_last_logits(model, rows, cache)[0].argmax())
        rows = torch.cat([rows, torch.tensor([[token]])], dim=1)
        yield token


@taken
def greedy_text(model: Model, prompt: Prompt, *, tokens: int, stops: Sequence[str] = ()) -> str:
    """Continue a prompt greedily up to a token that ends texts, or to the first of some texts.

    Args:
        model: The model.
        prompt: The prompt.
        tokens: Most tokens that are written.
        stops: Texts that end the answer; they are not part of it.

    Returns:
        The new text, without special tokens.
    """
    tokenizer: Any = model.tokenizer
    ends, ids = set(_end_ids(model)), list[int]()
    for token in islice(_greedy(model, prompt), tokens):
        if token in ends:
            break
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return text[: min(text.find(stop) for stop in stops if stop in text)]
    return tokenizer.decode(ids, skip_special_tokens=True)


def _end_ids(model: Model) -> list[int]:
    """Tokens that end texts: those of the tokenizer and of the generation configuration."""
    generation: Any = getattr(model.weights.bridge.original_model, "generation_config", None)
    given: Any = getattr(generation, "eos_token_id", None)
    tokenizer: Any = model.tokenizer
    listed = given if isinstance(given, list) else [given]
    return [token for token in (*listed, tokenizer.eos_token_id) if token is not None]


def _normalised(text: str) -> list[str]:
    """Words of a text, without case, punctuation and articles."""
    words = re.sub(r"[^\w\s]", "", text.casefold()).split()
    return [word for word in words if word not in ("a", "an", "the")]


@taken
def sample_continuations(
    model: Model,
    text: str,
    *,
    count: int = 10,
    tokens: int = 20,
    top_k: int = 5,
    seed: int = 0,
) -> list[str]:
    """Continue a text several times at once by seeded top-k sampling.

    Ten generations are what "Rebuilding ROME" takes (Section 3.1). It prints no length; after six
    edits of the embedded model, the entropy of 20 tokens was within 0.05 of that of 40. Inside
    ``edit.applied(model)`` the edited model is sampled.

    Where a model puts out NaN or infinity, as one that an edit has destroyed may, there is nothing
    to sample: the largest logit's token is taken, NaN counting as the smallest. So a broken model
    repeats itself, as one that merely collapsed does, and is measured, not refused.

    Args:
        model: The model.
        text: What is continued.
        count: Number of continuations.
        tokens: New tokens of each; what follows an end-of-text token is cut off.
        top_k: How many of the most probable tokens are drawn from.
        seed: Seed of the sampler; the same seed gives the same continuations.

    Returns:
        The new texts only.

    Raises:
        BadInputError: If a number is below 1, or the text gets longer than the model reads.
        UnsupportedModelError: If the model is no decoder.
    """
    _check_decoder(model)
    for name, value in (("count", count), ("tokens", tokens), ("top_k", top_k)):
        if value < 1:
            raise BadInputError(f"{name} is {value}; give at least 1")
    prompt = text_prompt(model, text)
    length = len(prompt.token_ids) + tokens
    if length > model.max_tokens:
        raise BadInputError(
            f"{text[:60]!r} with {tokens} more tokens has {length}, but {model.name} reads at most "
            f"{model.max_tokens}; shorten it or ask for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = _sampled(
        model,
        [prompt.token_ids] * count,
        tokens=tokens,
        draw=lambda scores: _draw(scores, generator, top_k=top_k),
    )
    return [_decode(model, row) for row in drawn]


@taken
def sample_documents(
    model: Model,
    *,
    count: int = 128,
    tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> list[str]:
    """Let a model write texts of its own, after nothing but BOS (without one: after EOS).

    A text ends at the first special token, or at the limit, so that it holds none. Temperature 1
    leaves the model's own entropy, and with it the variety of its text; the nucleus cuts off the
    tail, where the probabilities of a small model are the least right (Holtzman et al. 2020). It is
    taken of the 1000 most probable tokens.

    Args:
        model: The model.
        count: Number of texts that are begun.
        tokens: Most tokens of each.
        temperature: What the logits are divided by.
        top_p: Share of the probability that is drawn from, the most probable tokens first.
        seed: Seed of the sampler; the same seed gives the same texts.
        on_step: Called after each step with the number of tokens that it drew.

    Returns:
        The texts; those without a word, or in which a special token is spelled out, are left out.

    Raises:
        BadInputError: If a number is out of its range.
        UnsupportedModelError: If the model is no decoder, or has neither BOS nor EOS.
    """
    _check_decoder(model)
    whole_number(count, "count", least=1)
    whole_number(tokens, "tokens", least=1, most=model.max_tokens - 1)
    if not 0 < temperature < math.inf:
        raise BadInputError(f"temperature is {temperature:g}; give a number above 0")
    if not 0 < top_p <= 1:
        raise BadInputError(f"top_p is {top_p:g}; give a number above 0, and at most 1")
    tokenizer: Any = model.tokenizer
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise UnsupportedModelError(
            f"the tokenizer of {model.name} has neither BOS nor EOS, after which a text begins"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(scores: Float[Tensor, "prompt vocab"]) -> Int[Tensor, "prompt 1"]:
        if on_step is not None:
            on_step(len(scores))
        return _draw(scores, generator, top_k=_WIDEST, temperature=temperature, top_p=top_p)

    special = model.special_ids.union(_end_ids(model))
    drawn = _sampled(model, [(begin,)] * count, tokens=tokens, draw=draw, ends=special)
    texts = [tokenizer.decode(row).strip("\ufffd \n") for row in drawn]
    return [text for text in texts if _WORD.search(text) and _is_plain(model, text, special)]


def _is_plain(model: Model, text: str, special: frozenset[int]) -> bool:
    """Whether a text spells out none of some special tokens."""
    try:
        ids = text_prompt(model, text).token_ids
    except SpecialTokenError:
        return False
    return special.isdisjoint(ids[len(model.leading_ids) :])


@taken
def generation_entropy(texts: Sequence[str]) -> float:
    """Entropy of the words of some generations, over the largest it could be (note 19).

    With p the share of each distinct word in all texts together, it is ``-sum p log2 p`` divided by
    log2 of the number of distinct words ("Rebuilding ROME", Section 3.1, Figure 2). 1 says that all
    words occur equally often; a collapsed model repeats few words, and comes near 0. The division
    takes the size of the vocabulary away, so that two words in turn give 1, too.

    A word is a run of letters and digits, or a single other mark. One distinct word gives 0, since
    nothing is uncertain, and so do texts without a word.

    Args:
        texts: The generations.

    Raises:
        BadInputError: If there are none.
    """
    if not texts:
        raise BadInputError("there are no generations to take the entropy of; give at least one")
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    if len(counts) < 2:
        return 0.0
    total = counts.total()
    entropy = math.fsum(n / total * math.log2(total / n) for n in counts.values())
    return min(1.0, entropy / math.log2(len(counts)))


@taken
def distinct_ngrams(texts: Sequence[str], *, size: int = 4) -> float:
    """Return the share of runs of ``size`` words in some texts that are different from each other.

    1 says that none comes twice. Words are those of :func:`generation_entropy`; no run reaches
    beyond a text.

    Raises:
        BadInputError: If no text has so many words.
    """
    whole_number(size, "size", least=1)
    words = [_WORD.findall(text) for text in texts]
    runs = [tuple(each[i : i + size]) for each in words for i in range(len(each) - size + 1)]
    if not runs:
        raise BadInputError(f"no text has {size} words; give longer ones")
    return len(set(runs)) / len(runs)


@torch.no_grad()
def _last_logits(
    model: Model, rows: Int[Tensor, "prompt pos"], cache: Any
) -> Float[Tensor, "prompt vocab"]:
    """Logits after the last token of each row; what the cache holds is not run again."""
    batch = pad(model, [Prompt(text="", token_ids=tuple(row)) for row in rows.tolist()])
    if model.interventions or runs_plain():
        # Interventions are made to whole prompts, and may let a token see later ones.
        return logits(model, batch)[:, -1]
    known = cache.get_seq_length()
    with model.running() as bridge, fast_products(model.device):
        output: Tensor = bridge(
            batch.tokens[:, known:],
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids[:, known:],
            past_key_values=cache,
            use_cache=True,
        )
    return output[:, -1]


def _sampled(
    model: Model,
    prompts: Sequence[tuple[int, ...]],
    *,
    tokens: int,
    draw: Callable[[Float[Tensor, "prompt vocab"]], Int[Tensor, "prompt 1"]],
    ends: Collection[int] = (),
) -> list[list[int]]:
    """New tokens after prompts of one length; a row ends before the first token of ``ends``."""
    from transformers import DynamicCache

    rows, cache = torch.tensor(prompts), DynamicCache()
    found: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(tokens):
        drawn = draw(_last_logits(model, rows, cache))
        rows = torch.cat([rows, drawn], dim=1)
        kept = [row for row, (token,) in enumerate(drawn.tolist()) if token not in ends]
        if len(kept) < len(running):
            rows, running = rows[kept], [running[row] for row in kept]
            if not running:
                break
            if cache.get_seq_length():
                cache.batch_select_indices(torch.tensor(kept, device=model.device))
        for row, index in enumerate(running):
            found[index].append(int(rows[row, -1]))
    return found


def _draw(
    scores: Float[Tensor, "prompt vocab"],
    generator: torch.Generator,
    *,
    top_k: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Int[Tensor, "prompt 1"]:
    """Draw a token of each row from its ``top_k`` most probable ones, and of those from a nucleus.

    The nucleus is the fewest of them that have the share ``top_p`` of their probability.
    """
    clean = scores.float().cpu().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    top = clean.topk(min(top_k, clean.shape[-1]), dim=-1)
    # An infinite logit less itself is NaN; then the first, the largest, is taken for certain.
    weights = ((top.values - top.values[:, :1]) / temperature).exp().nan_to_num(nan=0.0)
    weights[:, 0] = 1.0
    if top_p < 1:
        before = weights.cumsum(-1) - weights
        weights[before >= top_p * weights.sum(-1, keepdim=True)] = 0.0
    return top.indices.gather(1, torch.multinomial(weights, 1, generator=generator))


def _check_decoder(model: Model) -> None:
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is no decoder, and only a decoder continues a text"
        )


def _decode(model: Model, ids: list[int]) -> str:
    tokenizer: Any = model.tokenizer
    end = tokenizer.eos_token_id
    kept = ids[: ids.index(end)] if end in ids else ids
    return tokenizer.decode(kept, skip_special_tokens=True)
