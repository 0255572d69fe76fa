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
# # Vision
#
# Which heads of a vision-language model look at the picture, which words does it make up, and can
# one make it look more closely? It runs on shapes-llava, whose language model is SmolLM2-135M as
# it was published (`interp models get smollm2-135m`), with an image encoder that we trained on
# coloured shapes; set `INTERP_MODEL=mini-llava` for a small model that needs no download. The same
# calls take `llava-hf/llava-1.5-7b-hf` and a dataset with a column `image`.

# %%
import os

import interp
from interp.metrics import chair, write_captions

model = interp.load(os.environ.get("INTERP_MODEL", "shapes-llava"))
model.provenance()

# %% [markdown]
# ## Pictures and what is said of them
# Scenes of coloured shapes that training never showed. "Broken" ones have a red circle without the
# blue square that nearly always came with it in training: what is said then tells habit from sight.

# %%
scenes = interp.tasks.scenes(model, n=24, seed=0, questions=("caption",), bias="broken")
written = write_captions(model, scenes, max_new_tokens=40, progress=False)
print(scenes[0]["objects"], "->", written["caption"][0])
scenes[0]["image"].resize((192, 192))

# %%
objects, words = scenes["objects"][:], interp.metrics.scenes()
chair(written["caption"], objects, words).summary()

# %% [markdown]
# ## Which heads look, and which are moved by what they see?
# The share of attention on the picture; and how far a head's output moves when it is taken away.

# %%
looked = interp.image_attention(model, scenes, progress=False)
looked.plot()

# %%
seen = interp.vision_head_divergence(model, scenes, max_new_tokens=40, progress=False)
seen.heads.plot(title="Vision-aware head divergence", mark=seen.heads.top(5))

# %% [markdown]
# T-VHD of a word is low where it is written from habit. Right object words beside made-up ones:

# %%
named = seen.of_words(chair(seen.captions, objects, words))
named.groupby("right")[["first", "mean"]].describe().T

# %% [markdown]
# ## Sinks in the picture
# Tokens that all text looks at whatever they show. A model may have none; then this says so.

# %%
sinks = interp.visual_sinks(model, scenes, progress=False)
sinks

# %%
sinks.layers

# %% [markdown]
# ## Intervene and measure
# VHR lets the heads that see say more, VAR moves attention from sinks to the rest of the picture.
# A caption that says less is wrong less often, so recall and length stand beside CHAIR.

# %%
edits = {"as it is": [], "VHR": interp.VHR(), "random half": interp.VHR(which="random")}
if sinks.dimensions:
    edits["VAR"] = interp.VAR(sinks.dimensions)
found = {}
for name, edit in edits.items():
    with model.intervene(edit):
        captions = write_captions(model, scenes, max_new_tokens=40, progress=False)["caption"]
    found[name] = chair(captions, objects, words)
interp.metrics.table_of(found).query("metric in ('chair_i', 'recall', 'words')")

# %%
questions = interp.tasks.polls(model, n=24, seed=1, negatives="adversarial")
interp.compare(model, questions, edits, progress=False).differences
