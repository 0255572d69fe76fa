"""What every intervention must survive: a new one joins by a line in `INTERVENTIONS`.

A factory gets a tiny model (4 heads in each of 2 layers, words `w3` ... `w59`) and `when`.
`ONE_BY_ONE` lists those whose result for a prompt must not depend on what else is in the batch, nor
on the KV cache; what is left out says in its docstring why it cannot be.
"""

from collections.abc import Callable

from interp.intervention.ablate import Ablate
from interp.intervention.base import Intervention
from interp.intervention.low_rank import LowRank
from interp.intervention.steer import SteerAttention
from interp.model.hooked import HookedModel
from tests.tiny import random_ids, words

HEADS = ["L0H1", "L0H2", "L1H3"]
TEXTS = [words(ids) for ids in random_ids(9, 5, seed=8)]

Factory = Callable[[HookedModel, str], Intervention]

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
}
INTERVENTIONS: dict[str, Factory] = ONE_BY_ONE | {
    "mean of the batch": lambda model, when: Ablate(HEADS, "mean", when),
    "resampled from the batch": lambda model, when: Ablate(HEADS, "resample", when),
    "forced at the end": lambda model, when: SteerAttention(HEADS, "1:3", when=when),
    "low rank from a bank": lambda model, when: LowRank.fit(
        model, TEXTS, HEADS, rank=1, at=(0, 1, 2, 3), when=when
    ),
}
# With parameters at which nothing happens.
IDENTITIES: dict[str, Factory] = {
    "no heads": lambda model, when: Ablate((), "zero", when),
    "no heads, steered": lambda model, when: SteerAttention((), "1:3", when=when),
    "no heads, fitted": lambda model, when: Ablate.fit(model, TEXTS, (), "mean", when),
}
