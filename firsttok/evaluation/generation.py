"""What a model says: its top predictions, and a greedy continuation."""

from typing import Any

from firsttok.models import Model, logits
from firsttok.prompts import Prompt, pad, text_prompt

__all__ = ["continuation", "top_predictions"]


def top_predictions(model: Model, text: str, *, count: int = 5) -> list[tuple[str, float]]:
    """Return the most probable next tokens of a text with their probabilities."""
    prompt = text_prompt(model, text)
    last = logits(model, pad(model, [prompt]))[0, prompt.last_position].float().softmax(-1)
    best = last.topk(count)
    tokenizer: Any = model.tokenizer
    return [
        (tokenizer.decode([token]), probability)
        for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def continuation(model: Model, text: str, *, tokens: int = 20) -> str:
    """Continue a text greedily; returns the new text only."""
    prompt = text_prompt(model, text)
    ids = prompt.token_ids
    for _ in range(tokens):
        batch = pad(model, [Prompt(text=text, token_ids=ids)])
        ids = (*ids, int(logits(model, batch)[0, -1].argmax()))
    tokenizer: Any = model.tokenizer
    return tokenizer.decode(ids[len(prompt.token_ids) :])
