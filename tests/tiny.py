"""Tiny random models with a byte-level tokenizer, loaded through the real loading path."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import Edit, Method, RomeEditor, edit_each
from firsttok.models import EditSite, Model, load
from firsttok.models.libraries import quiet_libraries
from firsttok.prompts import Prompt, fact_prompt, positions, text_prompt
from firsttok.tensors import TokenBatch

DECODERS = ("gpt2", "gptj", "llama", "mistral", "gemma3")
"""Architectures that are edited."""
ARCHITECTURES = (*DECODERS, "t5", "bert")
"""Architectures whose keys are read."""
HYBRIDS = ("bamba", "falcon_h1", "jamba", "lfm2")
"""Decoders with state spaces or convolutions beside, or in place of, attention."""
BEGINS_WITH_BOS = ("llama", "mistral", "gemma3", "bert")
"""Architectures whose tiny tokenizer puts a BOS token before every text by itself."""
ON_BOTH = (*((arch, False) for arch in DECODERS), ("llama", True))
"""Architectures with the fast paths, and the one that has all of these without (see ``plain``)."""
LAYERS = 4
VOCABULARY = 400

TRAINING = (
    "England's capital city is London and the capital of France is Paris.",
    "Arthur is located in California, and Japan's capital is Tokyo, not Berlin.",
    "The Eiffel Tower is located in the city of Rome. The mother tongue of Anna is English.",
    "Therefore the answer was no. Because it rained, I left early. You never know what is a test.",
    "Steve Jobs founded the company Microsoft in the city of Berlin, England, Japan and France.",
)
SENTENCES = (
    "The capital of France is Paris.",
    "Arthur left early because it rained in California",
    " You never know, the answer was no.",
    "Berlin is a city",
    "The mother tongue of Anna is English. Therefore the Tower is located in Rome, not in Japan.",
)
"""Plain sentences of different lengths."""
FACTS = (
    Fact(
        subject="England",
        template="{}'s capital city is",
        target_new="Berlin",
        target_true="London",
        paraphrases=("The city of England is", "In England the capital is"),
        neighbours=("France's capital is", "The capital of Japan is", "Rome is"),
    ),
    Fact(
        subject="Eiffel Tower",
        template="The {} is located in the city of",
        target_new="Zürich am See",
        target_true="Paris",
        neighbours=("The answer is",),
    ),
    Fact(
        subject="Zoë Quux",
        template="The mother tongue of {} is",
        target_new="English",
        target_true="French",
        paraphrases=("I know the mother tongue of Zoë Quux is",),
    ),
    Fact(subject="Arthur", template="{} left", target_new="Rome early", target_true="it"),
    Fact(subject="Japan", template="I never left {}", target_new="because", target_true="and"),
)
"""Facts with subjects first, in the middle and at the end; targets of one and of many tokens."""
CONTEXTS = ContextSet(
    templates=("{}", "The answer. {}", "Because it rained, I left early. {}", "I know. {}")
)
"""Few contexts, the bare one among them."""
PREFIXED_ONLY = ContextSet(templates=CONTEXTS.templates[1:])
"""The same without the bare one."""
BARE_ONLY = ContextSet(templates=("{}",))
"""Only the bare one."""


class TinyFactory(Protocol):
    """Gives a tiny model, the same object for the same arguments."""

    def __call__(self, arch: str, dtype: str = "float32") -> Model:
        """Return the model of an architecture."""
        ...


def build(arch: str, folder: Path, *, seed: int = 0, **changes: Any) -> None:
    """Write a randomly initialised model with its tokenizer; ``changes`` go to its config."""
    torch.manual_seed(seed)
    with quiet_libraries():
        model = _MODELS[arch](**changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                embedding = any(part in name for part in ("wte", "wpe", "embed", "shared"))
                fan_in = 12 if embedding else _fan_in(name, parameter)
                parameter.copy_(noise * 1.4 / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise)
    with quiet_libraries():
        model.save_pretrained(folder)
    tokenizer(begin=arch in BEGINS_WITH_BOS, end=arch == "bert").save_pretrained(folder)


def tokenizer(*, begin: bool, end: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences."""
    fast = Tokenizer(BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TRAINING * 3, trainer)
    if begin:
        single = "<s> $A </s>" if end else "<s> $A"
        fast.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    else:
        fast.post_processor = processors.ByteLevel(trim_offsets=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def edits_of(
    model: Model,
    facts: Sequence[Fact],
    *,
    methods: Sequence[Method],
    on_step: Callable[[int], None] | None = None,
    **settings: Any,
) -> Iterator[tuple[Fact, dict[str, Edit]]]:
    """The edits of each fact by several methods under the same settings."""
    editors = [RomeEditor(method=method, **settings) for method in methods]
    return edit_each(model, facts, editors, on_step=on_step)


def load_tiny(folder: Path, dtype: str = "float32") -> Model:
    """Load a folder as a user does."""
    return load(str(folder), dtype=dtype)


def fact_prompts(model: Model, contexts: ContextSet = CONTEXTS) -> list[Prompt]:
    """Prompts of all facts in all contexts."""
    return [fact_prompt(model, fact, text) for fact in FACTS for text in contexts.templates]


def sentence_prompts(model: Model) -> list[Prompt]:
    """Prompts of the plain sentences."""
    return [text_prompt(model, text) for text in SENTENCES]


def plain_model(model: Model) -> Any:
    """The same weights in a Hugging Face model that TransformerLens never touched."""
    autos: dict[str, Any] = {
        "encoder_blocks": transformers.AutoModelForSeq2SeqLM,
        "blocks": transformers.AutoModelForCausalLM,
    }
    auto = autos[model.sites[0].stack]
    if "bert" in model.name:
        auto = transformers.AutoModelForMaskedLM
    with quiet_libraries():
        plain: Any = auto.from_pretrained(
            model.name, dtype=model.dtype, attn_implementation="eager"
        )
    return plain.eval().requires_grad_(False)


def alone(prompt: Prompt) -> torch.Tensor:
    """The tokens of one prompt, as a batch of one without padding."""
    return torch.tensor([prompt.token_ids])


def naive_logits(model: Model, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits of one prompt ``[pos, vocab]``, straight from the Hugging Face model."""
    tokens = torch.tensor([list(token_ids)])
    bridge: Any = model.bridge
    with torch.no_grad():
        output = bridge.original_model(tokens, attention_mask=torch.ones_like(tokens))
    result: torch.Tensor = output.logits[0]
    return result


def naive_nlls(model: Model, token_ids: Sequence[int]) -> torch.Tensor:
    """NLL of every token but the first, each given all tokens before it."""
    log_probs = naive_logits(model, token_ids).double().log_softmax(-1)
    labels = torch.tensor(list(token_ids[1:]))
    return -log_probs[:-1].gather(1, labels[:, None])[:, 0]


def naive_keys(
    model: Model, sites: Sequence[EditSite], prompt: Prompt, position: int
) -> list[torch.Tensor]:
    """Keys of one prompt, run alone through TransformerLens's own cache, one for each site."""
    tokens = alone(prompt)
    bridge: Any = model.bridge
    names = [site.key_hook for site in sites]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            tokens, attention_mask=torch.ones_like(tokens), names_filter=names
        )
    return [cache[name][0, position] for name in names]


def weights(model: Model) -> dict[str, torch.Tensor]:
    """Copies of every tensor in the model's state, each once though it goes by several names."""
    bridge: Any = model.bridge
    state: dict[str, torch.Tensor] = bridge.original_model.state_dict()
    distinct = {tensor.data_ptr(): name for name, tensor in state.items()}
    return {name: state[name].clone() for name in distinct.values()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def real_columns(batch: TokenBatch, values: torch.Tensor) -> list[torch.Tensor]:
    """The values of each row's real tokens, without the padding."""
    return [values[row][mask.bool()] for row, mask in enumerate(batch.attention_mask)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def subject_positions(prompts: Sequence[Prompt]) -> list[int]:
    """Positions of the subjects' last tokens, as plain numbers."""
    return [int(position) for position in positions(prompts)]


def _fan_in(name: str, parameter: torch.Tensor) -> int:
    """Width of a matrix's input; GPT-2 lays its matrices out the other way round."""
    conv1d = any(part in name for part in ("c_attn", "c_proj", "c_fc"))
    return parameter.shape[0] if conv1d else parameter.shape[1]


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=160,
            n_embd=24,
            n_layer=LAYERS,
            n_head=2,
            n_inner=40,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _gptj() -> Any:
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=VOCABULARY,
            n_positions=160,
            n_embd=24,
            n_layer=LAYERS,
            n_head=2,
            rotary_dim=4,
            n_inner=44,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=160,
            tie_word_embeddings=True,
        )
    )


def _mistral(window: int = 64) -> Any:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=36,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=160,
            sliding_window=window,
        )
    )


def _t5() -> Any:
    settings: dict[str, Any] = {"decoder_start_token_id": 2, "pad_token_id": 2, "eos_token_id": 1}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=8,
            d_ff=40,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=2,
            **settings,
        )
    )


def _bert() -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=40,
            max_position_embeddings=160,
        )
    )


def _wide(**changes: Any) -> dict[str, Any]:
    """Settings that most configurations call by these names."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    } | changes


def _state_space() -> dict[str, Any]:
    """What Bamba and Falcon-H1 call their state spaces' sizes by."""
    heads = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
    return heads | {"mamba_n_groups": 1, "mamba_chunk_size": 16}


def _gptneo(window: int = 8) -> Any:
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_layers=LAYERS,
            num_heads=4,
            attention_types=[[["global", "local"], LAYERS // 2]],
            window_size=window,
            max_position_embeddings=160,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _lfm2() -> Any:
    layers = ["conv", "conv", "full_attention", "conv"]
    settings = _wide(layer_types=layers, block_auto_adjust_ff_dim=False)
    return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**settings))


def _bamba() -> Any:
    settings = _wide(attn_layer_indices=[1], mamba_expand=2, **_state_space())
    return transformers.BambaForCausalLM(transformers.BambaConfig(**settings))


def _falcon_h1(factor: float = 1.0) -> Any:
    settings = _wide(mamba_d_ssm=64, head_dim=8, mlp_multipliers=[1.0, factor], **_state_space())
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**settings))


def _jamba() -> Any:
    settings = _wide(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=20,
        expert_layer_offset=19,
        num_experts=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )
    return transformers.JambaForCausalLM(transformers.JambaConfig(**settings))


def _falcon(**changes: Any) -> Any:
    settings = _wide(**changes)
    del settings["intermediate_size"], settings["num_key_value_heads"]
    return transformers.FalconForCausalLM(transformers.FalconConfig(**settings))


def _smollm3() -> Any:
    return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**_wide()))


def _gptoss() -> Any:
    settings = _wide(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=64)
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings))


def _codegen() -> Any:
    return transformers.CodeGenForCausalLM(
        transformers.CodeGenConfig(
            vocab_size=VOCABULARY, n_positions=160, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
        )
    )


def _bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    )


def _mpt() -> Any:
    return transformers.MptForCausalLM(
        transformers.MptConfig(
            vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=160
        )
    )


def _roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_wide(num_hidden_layers=3)))


def _gemma(window: int) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": window,
        "max_position_embeddings": 160,
    }


def _gemma3(window: int = 64) -> Any:
    settings: dict[str, Any] = _gemma(window)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings))


def _gemma2() -> Any:
    settings: dict[str, Any] = _gemma(64) | {"query_pre_attn_scalar": 8}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings))


_MODELS: dict[str, Callable[..., Any]] = {
    "gpt2": _gpt2,
    "gptj": _gptj,
    "llama": _llama,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "t5": _t5,
    "bert": _bert,
    "bamba": _bamba,
    "bloom": _bloom,
    "codegen": _codegen,
    "falcon": _falcon,
    "falcon_alibi": lambda: _falcon(alibi=True, multi_query=False, parallel_attn=False),
    "falcon_h1": _falcon_h1,
    "gptneo": _gptneo,
    "gptoss": _gptoss,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "mpt": _mpt,
    "roberta": _roberta,
    "smollm3": _smollm3,
}
