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
# # Edit after edit
#
# "Rebuilding ROME" writes thousands of facts into one model, one after another. With ROME the model dies
# at a single edit; with r-ROME, which is C-ROME here, it does not. We write four facts in a row, see which
# one is the disabling edit, and whether it could have been told before.

# %%
import tempfile
from dataclasses import replace

import firsttok as ft

model = ft.load("smollm2-135m")
sentences = ft.builtin_sentences()[:15]
contexts = ft.load_contexts("../figures/smollm2-135m/contexts-seed0.json")
study = ft.prepare_study(
    model,
    contexts=replace(contexts, templates=contexts.templates[:6]),
    second_moment=ft.SecondMoment.identity(model.site(15).d_mlp),
    texts=sentences,
)
by_number = {fact.case_id: fact for fact in ft.builtin_facts()}
facts = tuple(by_number[number] for number in (102, 106, 17, 111))
for fact in facts:
    print(f"{fact.prompt} -> {fact.target_new}")

# %% [markdown]
# ## Two sequences side by side
#
# A sequence is a name, facts in an order, and an editor. Behind every edit we measure the perplexity and
# COUNTERFACT's scores of the fact that was just written. At every second edit we look back at all facts
# that were written until then.

# %%
methods = {"rome": ft.ROME, "c-rome": ft.C_ROME}
sequences = [
    ft.EditSequence(name=name, facts=facts, editor=method) for name, method in methods.items()
]
folder = tempfile.mkdtemp()
runs = ft.run_sequences(folder, study, sequences, plan=ft.SequencePlan(every=2))
runs["rome"]

# %%
runs["c-rome"]

# %% [markdown]
# The verdict names the disabling edit. Its subject is the first token of its prompt.

# %%
row = runs["rome"].disabling_edit
print(runs["rome"].verdict)
assert row is not None
assert row.first_token
assert runs["c-rome"].disabling_edit is None

# %% [markdown]
# ## It could have been told before
#
# Keys below the edited layer do not change in a sequence, so ROME's denominators are known before the
# first edit. `screen` ranks facts by the share of C-ROME's denominator that is left in ROME's.

# %%
for each in ft.screen(study, facts):
    print(f"{each.ratio:8.4f}  {each.subject}")

# %% [markdown]
# A guard does this by itself: `screen` leaves such facts out, `rollback` writes them and takes the edit out
# again, bit for bit, when the perplexity jumps.

# %%
guarded = ft.run_sequences(
    tempfile.mkdtemp(),
    study,
    sequences[:1],
    plan=ft.SequencePlan(every=2, guard=ft.Guard.ROLLBACK),
)["rome"]
print([(row.step, row.subject, row.get("guard")) for row in guarded.steps])
assert guarded.disabling_edit is None
assert len(guarded.written) == len(facts) - 1

# %% [markdown]
# ## What is left of the earlier facts
#
# The paper's scores are taken right behind each edit. What is left at the end is another number.

# %%
for name, run in runs.items():
    right, kept = run.mean("es"), run.mean("es", step=len(facts))
    print(f"{name}: ES right behind each edit {right:.0%}, of all at the end {kept:.0%}")

# %% [markdown]
# The edits are files, and the model is a view on them: any state of the sequence can be opened again.

# %%
for step in (2, 3):
    view = runs["rome"].edited(model, until=step)
    said = ft.continuation(view, "The train to the north leaves at", tokens=12)
    print(f"after {step} edits: {' '.join(said.split())}")

# %% [markdown]
# `firsttok sequence RUN` does the same for a file of facts, in several orders, on a cluster if there is one;
# `analyses/rebuilding_sequences.py` makes the paper's table and figures.
