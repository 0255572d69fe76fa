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
# # A first look
#
# One loop, in ten cells: **load** a model, **look** at its attention, **score** its heads,
# **intervene** on them, and **measure** what changed. It runs on SmolLM2-135M (fetched once by
# `interp models get smollm2-135m`); set `INTERP_MODEL=mini-llama` for our embedded model, which
# needs no download.

# %%
import os

import interp

model = interp.load(os.environ.get("INTERP_MODEL", "smollm2-135m"))
model.provenance()

# %% [markdown]
# ## Look
# The pattern of chosen heads on a prompt of one's own. Only these heads are computed: the model
# runs torch's fused attention kernel, and no pattern exists unless somebody asks for it.

# %%
text = "The secret code of Emma is blue river. The secret code of Emma is blue"
interp.attention(model, text, layers=[2, 3], heads=[0, 1]).plot()

# %% [markdown]
# ## Score: attention sinks
# What every token receives from the queries that may see it, in every layer and head, streamed.

# %%
filler = interp.tasks.text(model, max_tokens=96, n=4, seed=0)
sinks = interp.attention_sinks(model, filler)
sinks

# %%
sinks.heads.plot(title="Attention that the first token receives")

# %%
sinks.later(threshold=0.1).head(8)

# %% [markdown]
# ## Score: retrieval heads
# Which heads copy the answer out of a long text? Prompts are a `datasets.Dataset` with token spans.

# %%
needle = interp.tasks.needle(model, lengths=[160, 240], depths=4, n=16, seed=0)
scores = interp.retrieval_heads(model, needle)
scores.plot(title="Retrieval heads", mark=scores.top(5))

# %% [markdown]
# ## Intervene and measure
# The top heads against as many others of the same layers, on prompts that did not choose them.

# %%
fresh = interp.tasks.needle(model, lengths=[160], depths=4, n=16, seed=1)
comparison = interp.compare(
    model,
    fresh,
    {
        "none": [],
        "top 5": interp.Ablate(scores.top(5)),
        "5 others": interp.Ablate(scores.random(5, seed=1)),
    },
)
comparison.plot()

# %%
comparison.differences

# %%
with model.intervene(interp.Ablate(scores.top(5))):
    print(interp.evaluate(model, fresh))
print(interp.evaluate(model, fresh))  # undone: the model is what it was

# %%
scores.save("heads.parquet")
interp.HeadScores.load("heads.parquet").metadata["counts"]

# %% [markdown]
# ## Your own pass
# A pass reads the `Attention` of each layer, which computes only what is asked of it, and hands a
# table back. Here: the entropy of each head, a number for how widely it looks.

# %%
import torch


def head_entropy(model, prompts):
    """Mean entropy of each head's rows, in nats: 0 looks at one key, log(n) at all alike."""
    samples = []
    for batch in model.batches(prompts["input_ids"], batch_size=4):
        rows = model.read_attention(
            batch.input_ids,
            lambda attention: attention.entropy().nanmean(-1),  # NaN: padding
            attention_mask=batch.attention_mask,
        )
        samples.append(rows)
    return interp.HeadScores.from_samples(
        torch.cat(samples), analysis="head_entropy", **model.provenance()
    )


entropy = head_entropy(model, filler)
entropy.plot(title="How widely each head looks (nats)")

# %% [markdown]
# ## Your own intervention
# A frozen description that yields hooks. The model applies it, checks that its hooks exist and
# fired, and undoes it. `model.call` says what the running pass is about.

# %%
from dataclasses import dataclass

from interp.heads import Head


@dataclass(frozen=True, eq=False)
class Sharpen(interp.Intervention):
    """Divide the logits of chosen heads by a temperature: below 1 they look more narrowly."""

    heads: tuple[Head, ...]
    temperature: float

    def hooks(self, model):
        """One hook per head, on the layer's `Attention`."""
        model.check_heads(self.heads)
        for head in self.heads:
            yield f"blocks.{head.layer}.attn.hook_attention", self.edit(head.head)

    def edit(self, head):
        return lambda attention, hook: attention.temperature(self.temperature, heads=[head])


sharper = Sharpen(tuple(scores.top(5)), temperature=0.5)
interp.compare(model, fresh, {"none": [], "sharper": sharper})
