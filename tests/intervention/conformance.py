"""What every intervention must survive: a new one joins by a line in one of the tables here.

A factory gets a tiny model (4 heads in each of 2 layers, words `w3` ... `w59`) and `when`; it
answers None where there is no such thing: an intervention without that `when`, or none for that
family of models. Each prompt of the trials has 3 tokens or more, and the spans of `SPANS`.

- `ONE_BY_ONE`: the result for a prompt depends neither on what else is in the batch, nor on the KV
  cache.
- `BATCHED`: these, and those that need the cache, or do something else without it.
- `INTERVENTIONS`: these, and those that look at the whole batch. What is left out of a table says
  in its docstring why it cannot be in it.
- `PREPARING`: those that change what goes in and attach no hooks.
- `SEEING`: those that want images.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from interp.intervention.ablate import Ablate
from interp.intervention.act import ACT
from interp.intervention.base import Intervention
from interp.intervention.head_modulation import HeadModulation
from interp.intervention.hide import HideTokens
from interp.intervention.iti import ITI
from interp.intervention.lofit import LoFiT
from interp.intervention.long_heads import LongHeads
from interp.intervention.low_rank import LowRank
from interp.intervention.pine import PINE
from interp.intervention.re2 import RE2
from interp.intervention.recycled import RecycledAttention
from interp.intervention.steer import SteerAttention
from interp.intervention.temperature import Temperature
from interp.intervention.var import VAR
from interp.intervention.vhr import VHR
from interp.intervention.vicrop import ViCrop
from interp.intervention.vtc import VTC
from interp.model.hooked import HookedModel
from tests.tiny import random_ids, words

HEADS = ["L0H1", "L0H2", "L1H3"]
TEXTS = [words(ids) for ids in random_ids(9, 5, seed=8)]

SPANS = {"segment_1": [0, 1], "segment_2": [1, 3]}
WHENS = ("both", "prompt", "generated")

Factory = Callable[[HookedModel, str], Intervention | None]


def rotates(model: HookedModel) -> bool:
    """Does every layer rotate q and k, and look as far back as the text goes?"""
    return model.name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "GPTNeoXForCausalLM")


def random_vectors() -> torch.Tensor:
    """A vector for each of HEADS, of the width of a tiny model's heads."""
    return torch.randn(len(HEADS), 8, generator=torch.Generator().manual_seed(5))


def random_push() -> tuple[torch.Tensor, torch.Tensor]:
    """A direction and a spread for each of HEADS."""
    return normalize(random_vectors()), torch.linspace(0.1, 0.2, len(HEADS))


def damped_sinks(decode: str | None, **settings) -> ACT | None:
    """At a threshold that random weights are over."""
    return None if decode is None else ACT(HEADS, alpha=1.2, decode=decode, **settings)


DECODES = {"prompt": "prefill", "both": "frozen"}

ONE_BY_ONE: dict[str, Factory] = {
    "zero": lambda model, when: Ablate(HEADS, "zero", when),
    "uniform": lambda model, when: Ablate(HEADS, "uniform", when),
    "mean of a bank": lambda model, when: Ablate.fit(model, TEXTS, HEADS, "mean", when),
    "resampled from a bank": lambda model, when: Ablate.fit(
        model, TEXTS, HEADS, "resample", when, samples=5, seed=3
    ),
    "forced attention": lambda model, when: SteerAttention(HEADS, "1:3", "force", "all", when),
    "no attention to": lambda model, when: SteerAttention(HEADS, "0:2", "suppress", "all", when),
    "boosted attention": lambda model, when: SteerAttention(HEADS, "2:5", "boost", "all", when, 2),
    "learned offsets": lambda model, when: LoFiT(HEADS, random_vectors(), when=when),
    "sharper queries": lambda model, when: Temperature(HEADS, 0.4, 0.5, random_vectors(), when),
    "segments in no order": lambda model, when: (
        PINE(heads=HEADS, when=when) if rotates(model) else None
    ),
    "chosen chunks": lambda model, when: (
        LongHeads(6, 2, heads=HEADS, when=when) if rotates(model) else None
    ),
    "pushed at every token": lambda model, when: ITI(HEADS, *random_push(), when=when, at="all"),
    "damped sinks": lambda model, when: damped_sinks(DECODES.get(when)),
    "sinks found anew": lambda model, when: damped_sinks({"both": "running"}.get(when)),
    "reinforced heads": lambda model, when: VHR(heads=HEADS, when=when),
    "damped others": lambda model, when: damped_sinks(DECODES.get(when), columns="random"),
}
BATCHED: dict[str, Factory] = ONE_BY_ONE | {
    "recycled attention": lambda model, when: (
        RecycledAttention(2, stride=3, heads=HEADS) if when == "generated" else None
    ),
    "forced at the end": lambda model, when: SteerAttention(HEADS, "1:3", when=when),
    "pushed at the end": lambda model, when: ITI(HEADS, *random_push(), when=when),
    "low rank from a bank": lambda model, when: LowRank.fit(
        model, TEXTS, HEADS, rank=1, at=(0, 1, 2, 3), when=when
    ),
}
INTERVENTIONS: dict[str, Factory] = BATCHED | {
    "mean of the batch": lambda model, when: Ablate(HEADS, "mean", when),
    "resampled from the batch": lambda model, when: Ablate(HEADS, "resample", when),
}
# With parameters at which nothing happens.
IDENTITIES: dict[str, Factory] = {
    "no heads": lambda model, when: Ablate((), "zero", when),
    "no heads, steered": lambda model, when: SteerAttention((), "1:3", when=when),
    "no heads, fitted": lambda model, when: Ablate.fit(model, TEXTS, (), "mean", when),
    "offsets of strength 0": lambda model, when: LoFiT(HEADS, random_vectors(), 0.0, when),
    "temperature 1": lambda model, when: Temperature(HEADS, when=when),
    "no push": lambda model, when: ITI(HEADS, *random_push(), 0.0, when),
    "reinforced by 1": lambda model, when: VHR(1.0, heads=HEADS, when=when),
    "sinks that keep all": lambda model, when: damped_sinks(DECODES.get(when), factor=1.0),
}
PREPARING: dict[str, Factory] = {
    "read twice": lambda model, when: RE2(cue=" w7 w8 ") if when == "prompt" else None,
}
# For a model that sees images, tiny and random; HideTokens takes a span of the prompts' own.
SEEING: dict[str, Factory] = {
    "reinforced heads": lambda model, when: VHR(3.0, layers=(0, 1), when=when),
    "redistributed sinks": lambda model, when: VAR(
        (3, 16, 19), 1.6, 0.3, layers=":", require_visual_sink=False, when=when
    ),
    "modulated heads": lambda model, when: HeadModulation(layers=(0, None), when=when),
    "hidden tokens": lambda model, when: HideTokens("text", when=when),
    "fewer patches": lambda model, when: VTC(2, score="least") if when == "both" else None,
    "a closer look": lambda model, when: (
        ViCrop(side=20, general="w30 w31") if when == "both" else None
    ),
}
