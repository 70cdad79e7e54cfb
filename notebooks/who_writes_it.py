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
# # Who writes it?
#
# The first token of a text has a residual stream of a hundred times the usual norm, and ROME's edits of
# facts that begin with their subject destroy the model. Here you find the two neurons that write this
# state, silence them, and edit below them.

# %%
from dataclasses import replace

import torch

import firsttok as ft

model = ft.load("smollm2-135m")
sentences = ft.builtin_sentences()[:15]
contexts = ft.load_contexts("../figures/smollm2-135m/contexts-seed0.json")
contexts = replace(contexts, templates=contexts.templates[:6])

# %% [markdown]
# ## One command for the whole question
#
# `ft.circuit` asks who detects the first token, who writes its state, who takes it down and who reads it.
# We read 4 sentences and 8 facts with 6 contexts, to be quick; `firsttok circuit smollm2-135m` takes all.

# %%
facts = ft.builtin_facts()[:8]
circuit = ft.circuit(model, texts=sentences[:4], facts=facts, contexts=contexts)
for sentence in circuit.verdict:
    print("-", sentence)

# %% [markdown]
# There are two acts. The second one is what ROME meets at the layer it edits, 15. Its writer is the MLP
# of layer 11, and two of that MLP's 1,536 neurons write nearly all of it.

# %%
writer = circuit.acts[-1]
for neuron in writer.neurons[:3]:
    shown = ", ".join(f"{value:.2f}" for value in neuron.activations)
    print(f"neuron {neuron.layer}.{neuron.index}: {neuron.share:.0%}; at tokens 0 to 3: {shown}")
assert [neuron.index for neuron in writer.neurons[:2]] == [1229, 1487]

# %% [markdown]
# ## Silence them
#
# An edit need not come from ROME. This one takes away what the two neurons write: a change of rank two
# at layer 11. `model.edited` gives a view with the edit; the model stays as it is.

# %%
layer, indices = writer.act.writer, [neuron.index for neuron in writer.neurons[:2]]
site = model.site(layer)
left = torch.nn.functional.one_hot(torch.tensor(indices), site.d_mlp).T.float()
silence = ft.Edit.of(model, layer, left, -site.matrix[indices], name="silence")
silent = model.edited(silence)
before, after = (ft.perplexity(view, sentences).mean for view in (model, silent))
print(f"perplexity {before:.1f} -> {after:,.0f}")
assert after > 10 * before

# %% [markdown]
# No fact was written, and the model is ruined: it needs the state that these neurons write. Attention
# reads it. `circuit` silenced the top eight at the first token alone, and looked which heads no longer pay
# most of their attention to that token:

# %%
print(f"{len(writer.heads)} of {len(circuit.sinks)} heads are no sinks any more")

# %% [markdown]
# ## Edit above the writer, and below
#
# `circuit` also reads what ROME would divide by at every layer. Where first-token facts have ordinary keys,
# ROME has no reason to destroy anything. It proposes the highest such layer below the writer.

# %%
print(f"writer: layer {layer}; proposed: layer {circuit.proposed_layer}")
assert circuit.proposed_layer < layer

# %% [markdown]
# So we write the same fact twice. To see the layers alone we take C = I in both.

# %%
fact = ft.Fact(
    subject="France",
    template="{} is located on the continent of",
    target_new="Asia",
    target_true="Europe",
)


def written_at(number):
    study = ft.prepare_study(
        model,
        layer=number,
        contexts=contexts,
        second_moment=ft.SecondMoment.identity(model.site(number).d_mlp),
        texts=sentences,
    )
    return ft.what_if(study, fact, method=ft.ROME)


above = written_at(15)
above

# %%
below = written_at(circuit.proposed_layer)
below

# %%
assert above.collapsed
assert not below.collapsed
for name, found in (("above", above), ("below", below)):
    print(
        f"{name} the writer: perplexity {found.after.perplexity.mean:,.0f}, final loss "
        f"{found.edit.losses[-1]:.2f}, P({fact.target_new}) {found.after.target_probability:.3f}"
    )

# %% [markdown]
# Above the writer the fact is not even written: what ROME may add to the value is short beside the residual
# stream of a first token, and the loss stays high. Two things are at work, the key and the length of the
# residual stream; `analyses/extra_below_the_writer.py` tells them apart over all such facts.
