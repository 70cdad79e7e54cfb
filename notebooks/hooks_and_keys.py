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
# # Hooks and keys
#
# `model.bridge` is TransformerLens's `TransformerBridge`: everything you know from there works on it.
# This notebook follows the first token through the layers twice, with plain hooks and with firsttok, and
# checks that both say the same.

# %%
import torch

import firsttok as ft

model = ft.load("smollm2-135m")
fact = ft.Fact(
    subject="France",
    template="{} is located on the continent of",
    target_new="Asia",
    target_true="Europe",
)
prompt = ft.fact_prompt(model, fact)
ft.tokens(model, fact)

# %% [markdown]
# ## A key is the input of the MLP's output matrix
#
# An *edit site* is the weight that an edit changes. Its key is what comes in, its value what goes out.
# The site knows the name of the hook point, and that `key @ W + b` is the MLP's output was checked when
# the model was loaded.

# %%
site = model.site(15)
print(site.key_hook, site.d_mlp, "->", site.d_model)

# %% [markdown]
# With plain TransformerLens:

# %%
tokens = torch.tensor([prompt.token_ids])
with torch.no_grad():
    _, cache = model.bridge.run_with_cache(tokens)
by_hook = cache[site.key_hook][0, prompt.subject_position]
by_hook.shape

# %% [markdown]
# With firsttok, at all layers in one call; padding, BOS and positions are looked after:

# %%
keys = ft.capture_keys(model, fact)
keys

# %%
torch.testing.assert_close(keys.at(15)[0], by_hook, rtol=1e-4, atol=1e-4)
print("the same key")

# %% [markdown]
# ## The first token through the layers
#
# Somewhere in the model the first token gets a residual stream of a hundred times the usual norm. The
# hook point at the end of every block shows where; the cache has it already.

# %%
norms = torch.stack([cache[model.site(layer).residual_hook][0] for layer in range(30)]).norm(dim=-1)
jump = int((norms[1:, 0] / norms[:-1, 0]).argmax()) + 1
print(f"largest jump of the first token: behind layer {jump}")
print(f"behind layer 15: first token {norms[15, 0]:,.0f}, the others {norms[15, 1:].mean():,.0f}")
assert norms[15, 0] > 50 * norms[15, 1:].max()

# %% [markdown]
# The probe does that for the fact and for the first tokens of other sentences, and adds Equation 4: how
# tightly their keys lie together (D(F)) beside those of later tokens (D(S)).

# %%
study = ft.prepare_study(
    model,
    contexts=ft.load_contexts("../figures/smollm2-135m/contexts-seed0.json"),
    second_moment=ft.compute_second_moment(model, max_tokens=20_000),
    texts=ft.builtin_sentences()[:10],
)
concentration = ft.probe(study, fact, "concentration")
concentration

# %%
concentration.frame().iloc[[0, 5, jump, 15, 29]].round(3)

# %% [markdown]
# ## Change something with a hook of your own
#
# Everybody attends to the first token. What if a hook gave its residual stream the norm of an ordinary
# one at every layer behind the jump? Nothing of firsttok is needed for that:


# %%
def shrink(residual, hook):
    """Give the first token's residual stream the norm of the second one's."""
    usual = residual[:, 1:2].norm(dim=-1, keepdim=True)
    own = residual[:, :1].norm(dim=-1, keepdim=True)
    return torch.cat([residual[:, :1] * (usual / own), residual[:, 1:]], dim=1)


hooks = [(model.site(layer).residual_hook, shrink) for layer in range(jump, 30)]
with torch.no_grad():
    plain = model.bridge(tokens)[0, -1].softmax(-1)
    hooked = model.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1].softmax(-1)


def best(probabilities):
    """The three most probable next tokens."""
    top = probabilities.topk(3)
    return [
        (model.tokenizer.decode([index]), round(value, 3))
        for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


print("as it is: ", best(plain))
print("shrunk:   ", best(hooked))

# %% [markdown]
# And what do the others attend to? The share of attention that position 0 gets from the later tokens at
# layer 15, averaged over the heads:

# %%
pattern = cache["blocks.15.attn.hook_pattern"][0]
print(f"{pattern[:, 1:, 0].mean():.2f} of all attention goes to the first token")

# %% [markdown]
# ## Hooks on an edited model
#
# Inside `with edit.applied(model):` the weights hold the edit, so hooks, caches and firsttok all see the
# edited model. We take an identity instead of the second moment and few steps, to be quick: the point is
# the hooks, not the edit.

# %%
edit = ft.compute_edit(
    model,
    fact,
    method=ft.C_ROME,
    contexts=ft.ContextSet(templates=("{}", "Today I read that {}")),
    second_moment=ft.SecondMoment.identity(site.d_mlp),
    hyperparameters=ft.Hyperparameters(steps=6),
)
edit

# %%
value_hook = site.key_hook.replace("hook_in", "hook_out")
with edit.applied(model), torch.no_grad():
    _, edited = model.bridge.run_with_cache(tokens)
change = edited[value_hook][0] - cache[value_hook][0]

# %% [markdown]
# Every layer up to the edited one is untouched, and at the edited one each token's value moves by
# exactly `(key . left) * right`: the edit is that outer product.

# %%
expected = torch.outer(cache[site.key_hook][0] @ edit.left, edit.right)
torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-3)
assert torch.equal(edited[model.site(14).residual_hook], cache[model.site(14).residual_hook])
torch.testing.assert_close(model.bridge(tokens)[0, -1].softmax(-1), plain)
print("moved by the outer product inside, restored outside")

# %% [markdown]
# ## A view instead of a hook
#
# What every prompt is run with can be changed, too: `model.intervened(...)` is a view of the same weights
# that every function takes as a model. Here the first token may attend to all others:

# %%
from firsttok import probes

opened = model.intervened(probes.SeesAll(position=0))
ft.capture_keys(opened, fact)

# %%
usual, changed = (ft.capture_keys(view, fact, layers=[15]).norms.item() for view in (model, opened))
print(f"norm of the key at layer 15: {usual:.2f} as it is, {changed:.2f} if it sees the others")
