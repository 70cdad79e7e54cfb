"""Tiny models with tokenizers of several kinds; only their tokens are looked at."""

import json
from dataclasses import replace
from typing import Any

import tokenizers
import transformers
from tiny import TRAINING
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

from firsttok.models import Model

ADDED = "<|role|>"
"""A special token without a role of its own, as chat templates use."""
_SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", ADDED]
_MARKS = ("the F.C.'s and the Inc., of Jr.'s Zoë, café, 東京は「パリ」。",) * 5
_CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{{ '<s>assistant\n' }}"
)


def byte_level(normalizer: Any = None) -> Tokenizer:
    """As GPT-2's, with merges over marks."""
    fast = Tokenizer(BPE())
    fast.normalizer = normalizer
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=450,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator((TRAINING + _MARKS) * 3, trainer)
    return fast


def sentence_piece() -> Tokenizer:
    """As Llama's: the text begins with a space, spaces are letters, bytes are the last resort."""
    fast = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=700, special_tokens=pieces, show_progress=False)
    # Merges within words are learnt; used, the tokenizer gets the whole text.
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.train_from_iterator((TRAINING + _MARKS) * 3, trainer)
    fast.pre_tokenizer = None
    record = json.loads(fast.to_str())
    # The trainer knows no other way to have them in its vocabulary.
    record["added_tokens"] = [t for t in record["added_tokens"] if t["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps(record))


def word_piece() -> Tokenizer:
    """As BERT's: accents and spaces are dropped, what is unknown is one token."""
    fast = Tokenizer(WordPiece(unk_token="<unk>"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False)
    fast.train_from_iterator(TRAINING * 3, trainer)
    return fast


def unigram() -> Tokenizer:
    """As T5's: NFKC, and a space before every word."""
    fast = Tokenizer(Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=300, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    fast.train_from_iterator((TRAINING + _MARKS) * 3, trainer)
    return fast


def spoken(model: Model, fast: Tokenizer, *, begins: bool = False, chat: bool = False) -> Model:
    """The model with another tokenizer.

    Args:
        model: The model.
        fast: The tokenizer.
        begins: Whether it puts a BOS before every text by itself.
        chat: Whether its chat template writes BOS and EOS around every turn, as SmolLM2's does.
    """
    copy = tokenizers.Tokenizer.from_str(fast.to_str())
    if begins:
        copy.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", copy.token_to_id("<s>"))]
        )
    found: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=copy,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[AddedToken(ADDED, special=True)],
    )
    found.chat_template = _CHAT if chat else None
    return replace(model, tokenizer=found)
