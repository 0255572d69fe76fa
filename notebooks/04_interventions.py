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
# # Interventions that travel
#
# An intervention is a small frozen thing: it says what it changes, can be saved, loaded, composed
# and measured, and knows nothing of the model's insides. Here: **positions** (PINE, RE2),
# **temperature**, **ACT** on attention sinks, **LoFiT** and **ITI** on head outputs, and the same
# edits inside an evaluation harness. It runs on SmolLM2-135M; set `INTERP_MODEL=mini-llama` for our
# embedded model, which takes seconds.

# %%
import os
import tempfile
from pathlib import Path

import interp

model = interp.load(os.environ.get("INTERP_MODEL", "smollm2-135m"))
runs = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Where the answer stands
# Eight lines tell what somebody found, and one of them is asked for. The line that is needed is
# moved to each place: what changes then is the model's position bias.

# %%
documents = interp.tasks.documents(model, n=24, seed=0, lines=8)
print(documents[0]["text"], "->", documents[0]["answer"])
bias = interp.position_bias(model, documents, progress=False)
bias.plot("choice", title="Is the right thing the likeliest of the eight?")

# %% [markdown]
# PINE lets the lines see each other regardless of their order: the answer no longer depends on it
# (every number of a row is the same), whatever that does to its quality. RE2 asks twice.

# %%
with model.intervene(interp.PINE()):
    invariant = interp.position_bias(model, documents, progress=False)
invariant.plot("choice", title="The same with PINE")

# %%
invariant.changes(bias)

# %%
interp.compare(
    model,
    documents,
    {"as it is": [], "RE2": interp.RE2(), "sharper attention": interp.Temperature(temperature=0.8)},
    progress=False,
).differences

# %% [markdown]
# ## ACT: do later attention sinks hurt?
# Each head is calibrated by itself on prompts that only choose; those that it helps are calibrated
# together on others, beside as many other heads.

# %%
letters = interp.tasks.multiple_choice(model, n=32, seed=0)
unseen = interp.tasks.multiple_choice(model, n=64, seed=1)
layer = model.attention_layers[-2]
act = interp.ACT.fit(
    model, letters, [(layer, head) for head in range(model.cfg.n_heads)], progress=False
)
print(act.describe())
act.sinks(model, unseen.select(range(4))).head()

# %% [markdown]
# ## LoFiT and ITI: a vector for a few heads
# LoFiT learns which heads, then a vector for each; ITI measures a direction. Both are a few hundred
# numbers that are added to head outputs. They see training prompts only.

# %%
from dataclasses import replace

from interp.intervention.lofit import OFFSETS, SELECTION

train = interp.tasks.multiple_choice(model, n=96, seed=2)
lofit = interp.LoFiT.fit(
    model,
    train,
    k=0.1,
    selection=replace(SELECTION, epochs=2),
    tuning=replace(OFFSETS, epochs=4),
    progress=False,
)
iti = interp.ITI.fit(model, train, k=0.1, strength=5.0, progress=False)
print(lofit.describe(model))

# %%
comparison = interp.compare(
    model,
    unseen,
    {"none": [], "LoFiT": lofit, "LoFiT, half": replace(lofit, strength=0.5), "ITI": iti},
    progress=False,
)
comparison.plot()

# %%
comparison.differences

# %% [markdown]
# ## Save, load, compose, fold
# A saved intervention is JSON and safetensors. It remembers the shape of the model that it was made
# on, and is refused on another one. Several are applied in their order.

# %%
lofit.save_pretrained(runs / "lofit")
again = interp.load_intervention(runs / "lofit")
assert again == lofit
with model.intervene(runs / "lofit", interp.Temperature(temperature=0.9)):
    print(*model.interventions, sep="\n")
    both = interp.evaluate(model, unseen, progress=False)
both

# %% [markdown]
# Offsets at all tokens are a bias: folded into the weights they cost nothing, and the model that is
# left is a plain Hugging Face one.

# %%
folded = interp.load(lofit.fold(model), model.tokenizer)
with model.intervene(lofit):
    edited = interp.evaluate(model, unseen, progress=False)
print(edited.accuracy, interp.evaluate(folded, unseen, progress=False).accuracy)

# %% [markdown]
# ## In a harness
# lm-evaluation-harness asks the same model with the same edit; on the command line it is
# `interp lm-eval --model_args pretrained=smollm2-135m,intervention=runs/lofit --tasks ...`.

# %%
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from interp.integrations.lm_eval import InterpLM

tasks = TaskManager(include_path=str(Path("../data/tasks").resolve()), include_defaults=False)
for name, edit in {"none": [], "LoFiT": lofit}.items():
    found = simple_evaluate(
        InterpLM(model, intervention=edit, batch_size=8),
        tasks=["interp_letters"],
        task_manager=tasks,
        limit=32,
        bootstrap_iters=0,
    )
    print(name, found["results"]["interp_letters"]["acc,none"])
