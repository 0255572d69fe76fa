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
# # Circuits
#
# Which parts of a model carry a task? **Patch** one value at a time, exactly; **estimate** the
# same with gradients; follow **paths** from head to head; **find** the circuit, and measure what it
# does by itself; **compare** two tasks; and **steer** the heads that were found. It runs on
# SmolLM2-135M; set `INTERP_MODEL=mini-llama` for our embedded model, which takes seconds.

# %%
import os

import interp

model = interp.load(os.environ.get("INTERP_MODEL", "smollm2-135m"))

# %% [markdown]
# ## A task is pairs of prompts
# A clean and a corrupted prompt of equal length, aligned token by token, with the two answers and
# named positions. Names that are several tokens of this model's are skipped, and counted.

# %%
pairs = interp.tasks.ioi(model, n=16, seed=0)
print(pairs[0]["clean_text"], "->", pairs[0]["answer"])
print(pairs[0]["corrupted_text"], "->", pairs[0]["corrupted_answer"])
interp.evaluate(model, pairs, progress=False)

# %% [markdown]
# ## Patch: where is the answer?
# The residual stream of the clean run, put into the corrupted one: 0 leaves it corrupted, 1 makes
# it clean. Each cell is a run of the model, but only from the layer and position that changed.

# %%
where = interp.activation_patching(
    model, pairs, site="resid_pre", by=("layer", "position"),
    positions=["IO", "S1", "S2", "end"], progress=False,
)  # fmt: skip
where.plot(title="Residual stream, clean into corrupted")

# %%
heads = interp.activation_patching(model, pairs, site="z", by=("layer", "head"), progress=False)
heads.plot(title="What each head's output brings back", mark=heads.heads.top(5))

# %% [markdown]
# ## Estimate: the same with two passes
# Attribution patching takes gradients in place of runs. How good is the estimate?

# %%
from interp.analysis.patching.attribution import compare_estimate

estimate = interp.attribution_patching(model, pairs, site="z", ig_steps=5, progress=False)
agreement = compare_estimate(estimate, heads)
agreement.plot()

# %% [markdown]
# ## Find the circuit
# Heads are scored on one half of the pairs, and kept from the strongest down until they do 80 % of
# the task with all others as on the corrupted prompt. All numbers are from the other half.

# %%
ioi = interp.find_circuit(model, pairs, progress=False)
ioi

# %%
ioi.plot()

# %% [markdown]
# ## Follow the paths
# Which heads speak to the logits directly, and which through the queries of those?

# %%
movers = interp.path_patching(model, pairs, "logits", sender_position="end", progress=False).heads
to_movers = interp.path_patching(
    model, pairs, movers.top(3), "q", sender_position="end", progress=False
).heads
print("write the answer:", *movers.top(3))
print("tell them where to look:", *to_movers.top(3))

# %%
roles = interp.head_roles(model, pairs, n_repeats=8, progress=False)
roles.plot(title="What heads do, from their behaviour")

# %% [markdown]
# ## Compare two tasks
# Shared heads, beside what chance within layers would share.

# %%
colored = interp.tasks.colored_objects(model, n=16, seed=0)
try:
    other = interp.find_circuit(model, colored, progress=False)
except ValueError as reason:  # a model that does not do the task has no circuit of it
    print(reason)
    other = interp.find_circuit(model, colored, metric="kl", progress=False)
overlap = interp.circuit_overlap(ioi, other)
overlap.plot()

# %%
overlap.table.T

# %% [markdown]
# ## Steer
# Make the circuit's strongest heads look at other words, and see what becomes of the answers.
# (Which words are wrong is known from the answers: a probe of what these heads do, no method to
# deploy.)

# %%
fresh = interp.tasks.ioi(model, n=24, seed=1)
strongest = list(ioi.members[:2])
interp.compare(
    model,
    fresh,
    {
        "none": [],
        "looking at the giver": interp.SteerAttention(strongest, "S2"),
        "looking at the receiver": interp.SteerAttention(strongest, "IO"),
        "two others, at the giver": interp.SteerAttention(heads.heads.random(2, seed=1), "S2"),
    },
    progress=False,
).plot()
