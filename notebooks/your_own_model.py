# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model
#
# `ft.load` takes a name of the catalog, a hub id (`org/name` or `org/name@commit`) or a folder with
# `config.json`, safetensors and a tokenizer. Any causal model that TransformerLens's bridge supports
# will do. To need no network, this notebook builds a tiny random Llama and treats it as yours: replace
# the folder by your own and everything below stays the same.
#
# The numbers mean nothing here, since random weights know nothing. What matters is that each step works.

# %%
import os
import tempfile

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import firsttok as ft

os.chdir(tempfile.mkdtemp())
folder = "tiny-llama"

words = Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.decoder = decoders.ByteLevel()
words.post_processor = processors.ByteLevel(trim_offsets=True)
words.train_from_iterator(
    ["England's capital city is London. The capital of France is Paris, not Berlin."] * 3,
    trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="<s>", eos_token="</s>"
).save_pretrained(folder)

torch.manual_seed(0)
transformers.utils.logging.disable_progress_bar()
transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
).save_pretrained(folder)

# %% [markdown]
# ## Load it
#
# On loading, the edit site of every layer is found and checked with a real pass. An architecture that
# does not fit raises an error with one sentence that says which check failed and what to do.

# %%
model = ft.load(folder)
model

# %% [markdown]
# ## Is there a BOS?
#
# Whether the subject is the first token depends on it. The policy is part of the model, and you can look
# at both sides:

# %%
fact = ft.Fact(
    subject="England",
    template="{}'s capital city is",
    target_new="Berlin",
    target_true="London",
)
ft.tokens(model, fact)

# %%
ft.tokens(model.with_bos(ft.BosPolicy.WITH), fact)

# %% [markdown]
# ## Keys at any layer

# %%
other = ft.Fact(
    subject="France", template="The capital of {} is", target_new="London", target_true="Paris"
)
ft.capture_keys(model, [fact, other])

# %% [markdown]
# ## What if?
#
# With a real model you would leave the arguments out: 21 contexts are sampled from your model, and the
# second moment is computed over 100,000 tokens, once, and kept in your cache. For random weights an
# identity and three contexts say as much.

# %%
study = ft.prepare_study(
    model,
    contexts=ft.ContextSet(templates=("{}", "The capital. {}", "France is not. {}")),
    second_moment=ft.SecondMoment.identity(model.site().d_mlp),
    texts=ft.builtin_sentences()[:3],
)
compared = ft.compare_methods(study, fact, methods=[ft.ROME, ft.C_ROME])
compared

# %% [markdown]
# Random weights may be above the collapse threshold before any edit; then the result says so instead of
# blaming the edit:

# %%
before = compared["rome"].before.perplexity
print(f"perplexity before any edit: {before.mean:,.0f}, collapsed: {before.collapsed}")

# %% [markdown]
# ## Where is the anomaly?
#
# On a trained model D(F) far below D(S) and a massive residual stream at the first token are the signs
# that ROME will collapse on first-token subjects. Here there is no reason for either:

# %%
ft.probe(study, fact, "concentration")

# %%
ft.probe(study, fact, "attention")

# %% [markdown]
# ## All of it at once
#
# `firsttok inspect MODEL` does this for you on any model: the edit sites it checked, the BOS policy,
# first-token concentration by layer, whether ROME would collapse on a dozen built-in facts, and a
# configuration that every command takes by `--config`. From Python:

# %%
from firsttok.inspection import inspect_model

found = inspect_model(model)
found
