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
# # Your own method
#
# A method says which key stands in each slot of the update, and where the value starts; that is all. So
# a new one is five lines, and it goes through edits, tables, sweeps and the report without any change to
# the library. A new probe is about as short. The settings are small, to be quick.

# %%
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import firsttok as ft

model = ft.load("smollm2-135m")
contexts = ft.load_contexts("../figures/smollm2-135m/contexts-seed0.json")
study = ft.prepare_study(
    model,
    contexts=replace(contexts, templates=contexts.templates[:6]),
    second_moment=ft.compute_second_moment(model, max_tokens=20_000),
    hyperparameters=replace(model.hyperparameters, steps=8),
    texts=ft.builtin_sentences()[:10],
)

# %% [markdown]
# ## A new method
#
# ROME mixes the prefixed mean and the bare key. Which of its slots does the damage? Half-ROME mends one
# slot only: the denominator takes the prefixed mean, the residual keeps the bare key.

# %%
HALF_ROME = ft.Method(
    name="half-rome",
    label="Half-ROME",
    direction=ft.Slot.PREFIXED_MEAN,
    residual=ft.Slot.UNPREFIXED,
    denominator=ft.Slot.PREFIXED_MEAN,
    anchor=ft.Slot.UNPREFIXED,
)
HALF_ROME

# %% [markdown]
# ### Edit
#
# It is a method like any other.

# %%
facts = [ft.builtin_facts()[index] for index in (17, 35, 80, 100)]
compared = ft.compare_methods(study, facts[0], methods=[ft.ROME, HALF_ROME, ft.C_ROME])
compared

# %% [markdown]
# The denominator alone decides: mended, the model survives, with ROME's residual left as it was.

# %%
assert compared["rome"].collapsed
assert not compared["half-rome"].collapsed
assert compared["half-rome"].report["numerator"] == compared["rome"].report["numerator"]

# %% [markdown]
# ### Table
#
# `measure_facts` gives one row per fact and method.

# %%
import pandas as pd

first = [fact for fact in facts if ft.tokens(model, fact).first_token]
rows = ft.measure_facts(replace(study, work=Path(tempfile.mkdtemp())), first, [ft.ROME, HALF_ROME])
pd.DataFrame(
    [(row.prompt, row.method, row.denominator, row.perplexity, row.collapsed) for row in rows],
    columns=["prompt", "method", "denominator", "perplexity", "collapsed"],
).round(4)

# %% [markdown]
# ### Sweep
#
# A sweep is a folder that loses nothing when it is interrupted, and that other models can join. It holds
# the slots of each method, so that a run begun with other slots under the same name is refused.

# %%
out = Path(tempfile.mkdtemp())
run = ft.sweep_facts(
    out / "half-rome", study, facts, [ft.ROME, HALF_ROME], metrics=["perplexity", "accuracy"]
)
run

# %% [markdown]
# The papers' tables, the new method in its own line; `run.frame()` and `run.sql("SELECT ...")` give the
# rows.

# %%
run.tables()[1]

# %% [markdown]
# The same from a terminal, where a method is spelled out or read from a TOML file; nothing is executed:
#
# ```
# firsttok sweep runs/half --method rome half-rome=direction:prefixed,residual:bare,denominator:prefixed,anchor:bare
# firsttok sweep runs/half --method rome methods.toml
# ```

# %%
file = out / "methods.toml"
file.write_text("""
[half-rome]
label = "Half-ROME"
direction = "prefixed"
residual = "bare"
denominator = "prefixed"
anchor = "bare"
""")
assert ft.load_methods(file) == (HALF_ROME,)

# %% [markdown]
# ### Report
#
# A run can be published into a folder of results; `firsttok report --out FOLDER` then has a section
# on it, beside whatever the papers' scripts left there.

# %%
from firsttok.paper.pages import write_reports

run.publish(out / "figures")
html, markdown = write_reports(out / "figures")
text = markdown.read_text("utf-8")
print(text[text.index("## A sweep") : text.index("## The paper against itself")])

# %% [markdown]
# ## A new probe
#
# An *intervention* changes every batch before it is run: position ids, or what a token may attend to. It
# needs a name, which goes into provenance, and one function. What if the first token could see just
# one other token, the second?


# %%
@dataclass(frozen=True)
class SeesNext:
    """Let the first token attend to itself and to the second one."""

    name: str = "the first token sees the second"

    def __call__(self, batch):
        """Open one place of the mask."""
        rows, columns = batch.places(0)
        visible = batch.causally_visible() if batch.visible is None else batch.visible.clone()
        visible[rows, columns, columns + 1] = batch.attention_mask[rows, columns + 1].bool()
        return replace(batch, visible=visible)


ft.probe(study, facts[0], SeesNext())

# %% [markdown]
# One more token is enough: the denominator is ordinary again. The same intervention goes through every
# other call, as a view of the model (`model.intervened(SeesNext())`) or as the source of an edit's keys:

# %%
usual, changed = ft.probe(study, facts[0], SeesNext()).rows
print(f"|denominator| {abs(usual['denominator']):.4f} -> {abs(changed['denominator']):.4f}")
source = ft.IntervenedKeys(name=SeesNext().name, interventions=(SeesNext(),))
result = ft.what_if(study, facts[0], method=ft.ROME, key_source=source)
before, after = compared["rome"].after.perplexity.mean, result.after.perplexity.mean
print(f"perplexity under ROME: {before:.4g} as it is, {after:.4g} with these keys")
assert not result.collapsed
assert abs(changed["denominator"]) > 10 * abs(usual["denominator"])

# %% [markdown]
# A probe that asks something else is a class with a name, a question and a `measure`:


# %%
@dataclass(frozen=True)
class LayerProbe:
    """The angle between the two keys, layer by layer."""

    layers: tuple[int, ...]
    name: str = "keys by layer"
    question: str = "At which layers are the two keys of the fact apart?"

    def measure(self, study, fact):
        """Read both keys at every layer."""
        rows = []
        for layer in self.layers:
            keys = ft.fact_keys(study.model, fact, study.contexts, layer=layer)
            rows.append({"layer": layer, "cosine": keys.cosine, "norm ratio": keys.norm_ratio})
        return ft.ProbeResult(
            name=self.name, question=self.question, rows=tuple(rows), origin=study.origin
        )


ft.probe(study, facts[0], LayerProbe(layers=(0, 5, 10, 12, 15, 20, 25, 29)))
