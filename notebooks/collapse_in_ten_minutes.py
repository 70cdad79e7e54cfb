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
# # Collapse in ten minutes
#
# ROME writes one fact into a language model by adding one rank-one matrix to one weight. "The Fall of
# ROME" (Yang et al., Findings of EMNLP 2024) found that for some facts this single edit destroys the
# whole model. Here you make that happen, see why, and make it go away.
#
# The model is SmolLM2-135M, which the package index carries; two CPU cores are enough. To be quick we
# take 6 contexts instead of 21, 12 optimisation steps instead of 25, and 15 sentences instead of 50 to
# measure with; `make reproduce` uses the full settings.

# %%
from dataclasses import replace

import firsttok as ft

model = ft.load("smollm2-135m")
model

# %% [markdown]
# ## A fact, and the token an edit looks up
#
# ROME stores the fact at the **subject's last token**. In this prompt that token is the very first one.

# %%
fact = ft.Fact(
    subject="France",
    template="{} is located on the continent of",
    target_new="Asia",
    target_true="Europe",
)
ft.tokens(model, fact)

# %% [markdown]
# ## What every edit shares
#
# `prepare_study` fixes the rest: the contexts that are put before the prompt while its key is averaged,
# the second moment C of the keys, and the sentences on which we measure perplexity. Whatever you leave
# out is computed with the papers' settings. The contexts lie in this repository; C is taken over 20,000
# tokens here (the default is 100,000) and kept in your cache.

# %%
contexts = ft.load_contexts("../figures/smollm2-135m/contexts-seed0.json")
study = ft.prepare_study(
    model,
    contexts=replace(contexts, templates=contexts.templates[:6]),
    second_moment=ft.compute_second_moment(model, max_tokens=20_000),
    hyperparameters=replace(model.hyperparameters, steps=12),
    texts=ft.builtin_sentences()[:15],
)
study

# %% [markdown]
# ## One edit
#
# One call computes the edit, looks at the model before and after it, and leaves the model as it was.

# %%
broken = ft.what_if(study, fact, method=ft.ROME)
broken

# %% [markdown]
# The perplexity tells that the model no longer speaks any language, about anything: those sentences have
# nothing to do with France.

# %%
assert broken.collapsed
print(f"{broken.before.perplexity.mean:.1f} -> {broken.after.perplexity.mean:.3g}")

# %% [markdown]
# ## Why
#
# The update is
#
# $$\Delta = \frac{(v_* - W k)\,(C^{-1} k)^\top}{(C^{-1} k)^\top k}$$
#
# and there should be *one* key $k$ in it. The released code uses two: the mean $\bar k$ over the
# contexts for the direction $C^{-1}k$, and the key $k^u$ of the bare prompt in the denominator. Usually
# they are nearly the same.

# %%
keys = ft.fact_keys(model, fact, study.contexts, layer=study.layer)
keys

# %% [markdown]
# Here they are not. At the first token $k^u$ is almost orthogonal to $\bar k$ and far shorter, so the
# denominator nearly vanishes and the update is huge. The same subject later in a sentence has an
# ordinary key, and an ordinary denominator:

# %%
later = replace(fact, template="As everybody knows, {} is located on the continent of")
bare, behind = (
    ft.fact_keys(model, each, study.contexts, layer=study.layer) for each in (fact, later)
)
print(f"cosine of k_bar and k^u, first token: {bare.cosine:.3f}, later token: {behind.cosine:.3f}")

# %% [markdown]
# Is it the token, or its place? A probe asks without any edit. Each row takes $k^u$ from somewhere else:
# in the second the first token may attend to all others, in the last a *later* token sees only itself.

# %%
attention = ft.probe(study, fact, "attention")
attention

# %% [markdown]
# On this model a token that attends to nothing but itself has the anomalous key, the first one and this later
# one. Of attention sinks that was known; here it decides on an edit.

# %%
denominator = {row["k^u from"]: abs(row["denominator"]) for row in attention.rows}
assert denominator["first token"] < denominator["later token"] / 10
assert denominator["later token sees itself only"] < denominator["later token"] / 10
assert denominator["first token sees all"] > 10 * denominator["first token"]

# %% [markdown]
# ## The cure
#
# **C-ROME** puts $\bar k$ into every slot of the update. **FC-ROME** also starts the optimised value
# $v_* = \text{anchor} + \delta$ from the output for $\bar k$.

# %%
compared = ft.compare_methods(study, fact, methods=[ft.ROME, ft.C_ROME, ft.FC_ROME])
compared

# %% [markdown]
# Neither destroys the model. Look at the target's probability behind prefixes, too: C-ROME saves the
# model, but hardly writes the fact; FC-ROME writes it.

# %%
for name in ("rome", "c-rome", "fc-rome"):
    seen = compared[name].after
    print(
        f"{name:8} perplexity {seen.perplexity.mean:10.4g}   "
        f"P({fact.target_new}) behind prefixes {seen.target_probability_prefixed:.3f}"
    )
assert not compared["c-rome"].collapsed
assert not compared["fc-rome"].collapsed
assert compared["c-rome"].after.target_probability_prefixed < 0.1
assert compared["fc-rome"].after.target_probability_prefixed > 0.5

# %% [markdown]
# ## The other cure: do not edit a first token
#
# The same fact, with words before it. Now even ROME as released is harmless, because its two keys agree.

# %%
ft.what_if(study, later, method=ft.ROME)

# %% [markdown]
# ## It was all on one model, unchanged
#
# An edit is an object. Inside `with edit.applied(model):` it stands in the weights, and TransformerLens
# sees the edited model; outside it is gone, to the bit.

# %%
weight = model.site(study.layer).weight.detach().clone()
with broken.edit.applied(model):
    print("edited:  ", ft.continuation(model, "The best thing about summer is", tokens=8))
print("restored:", ft.continuation(model, "The best thing about summer is", tokens=8))
assert (model.site(study.layer).weight == weight).all()

# %% [markdown]
# Next: *Hooks and keys* follows the first token through the layers.
