"""Randomly initialised models of any size, written to a folder and loaded as a user's are."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from firsttok.data import builtin_facts, builtin_sentences

__all__ = ["GROWTH", "SIZES", "Size", "random_folder"]

VOCABULARY = 4096
"""Tokens of the trained tokenizer; a model may have more."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a model."""

    name: str
    """Name on the command line and in tables."""
    config: Callable[[], Any]
    """Its configuration."""
    layer: int
    """Layer to edit."""


def _llama(name: str, *, width: int, layers: int) -> Size:
    def config() -> Any:
        return transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 192,
            max_position_embeddings=1024,
        )

    return Size(name=name, config=config, layer=layers // 2)


def _gpt2_xl() -> Any:
    return transformers.GPT2Config(
        vocab_size=50257, n_positions=1024, n_embd=1600, n_layer=48, n_head=25
    )


GROWTH = (
    _llama("llama-small", width=192, layers=8),
    _llama("llama-medium", width=384, layers=16),
    _llama("llama-large", width=768, layers=24),
)
"""Sizes between which the time is seen to grow."""
SIZES = {size.name: size for size in GROWTH} | {
    "gpt2-xl": Size(name="gpt2-xl", config=_gpt2_xl, layer=17)
}
"""Every size, by name."""


def random_folder(size: Size, parent: Path) -> Path:
    """Return the folder of a randomly initialised model; write it unless it is there."""
    folder = parent / size.name
    if not folder.is_dir():
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM.from_config(
            size.config(), dtype=torch.bfloat16
        )
        unfinished = folder.with_suffix(".part")
        model.save_pretrained(unfinished)
        _tokenizer().save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the built-in facts and sentences, without BOS."""
    fast = Tokenizer(BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    facts = [f"{fact.prompt} {fact.target_true} {fact.target_new}." for fact in builtin_facts()]
    fast.train_from_iterator([*facts, *builtin_sentences()], trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special)
