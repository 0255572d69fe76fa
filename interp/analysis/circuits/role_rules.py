"""The rules of head roles: how strong each role is, from a head's measures.

With the measures of `roles` and thresholds t_a (attention), t_c (copying), t_e
(effect), the strength of a role is the smallest of

    previous token    previous / t_a
    duplicate token   duplicate / t_a
    induction         induction / t_a
    mover             on_answer / t_a,  copying / t_c,  direct / t_e
    negative mover    the larger of on_answer and on_repeat / t_a,  -copying / t_c,  |direct| / t_e
    inhibition        on_repeat / t_a,  to_movers / t_e
    content gatherer  on_question / t_a,  to_movers / t_e

and a head has every role of strength 1 or more. A negative mover may look at the answer (its effect
is then negative) or, lowering the wrong candidate, at the repeated one, as head 19.1 of GPT-2
Medium does (Merullo et al. 2024, arXiv 2310.08744). The papers describe roles and give no rule:
rules and thresholds are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from jaxtyping import Float

from interp.errors import UserError

ROLES = (
    "previous token",
    "duplicate token",
    "induction",
    "mover",
    "negative mover",
    "inhibition",
    "content gatherer",
)
ON_REPEATS = ("previous", "duplicate", "induction")
ON_PAIRS = ("on_answer", "on_repeat", "on_question", "copying")


class RoleError(UserError):
    """Roles that are none, or thresholds that have no meaning."""


@dataclass(frozen=True)
class Thresholds:
    """What counts, as in the module's docstring; `top`: how many logits copying looks at."""

    attention: float = 0.4
    copying: float = 0.5
    effect: float = 0.02
    top: int = 5

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            most = np.inf if field.name == "top" else 1
            if not 0 < value <= most:
                raise RoleError(f"{field.name}={value}: above 0{' and at most 1' * (most == 1)}.")


def strengths_of(
    measures: Mapping[str, Float[np.ndarray, " head"]], thresholds: Thresholds
) -> pd.DataFrame:
    """Each role's strength by the module's rules, a row a head; NaN where a measure is missing."""
    n_heads = len(next(iter(measures.values())))
    nothing = np.full(n_heads, np.nan)
    m = {name: measures.get(name, nothing) for name in (*ON_REPEATS, *ON_PAIRS)}
    direct, to_movers = (measures.get(name, nothing) for name in ("direct", "to_movers"))
    a, c, e = thresholds.attention, thresholds.copying, thresholds.effect
    either = np.fmax(m["on_answer"], m["on_repeat"])
    parts = {
        "previous token": [m["previous"] / a],
        "duplicate token": [m["duplicate"] / a],
        "induction": [m["induction"] / a],
        "mover": [m["on_answer"] / a, m["copying"] / c, direct / e],
        "negative mover": [either / a, -m["copying"] / c, np.abs(direct) / e],
        "inhibition": [m["on_repeat"] / a, to_movers / e],
        "content gatherer": [m["on_question"] / a, to_movers / e],
    }
    return pd.DataFrame({role: np.minimum.reduce(parts[role]) for role in ROLES})
