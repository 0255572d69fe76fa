"""How well does a number tell right words from wrong ones?

    AUC = P(value of a right word > that of a wrong one) + P(equal) / 2

over pairs of the same stratum (such as words at the same place in their captions), 1/2 by chance.
Words of one caption depend on each other, so the interval comes from drawing captions, with
replacement, all their words together; a pair then counts as often as both of its captions do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped

from interp.errors import UserError

RESAMPLES = 2000


class SeparationError(UserError):
    """Words among which nothing can be told apart."""


@dataclass(frozen=True)
class Separation:
    """AUC with its 95 % interval, and how many words and pairs it is from."""

    auc: float
    low: float
    high: float
    n_right: int
    n_wrong: int
    n_pairs: int

    def __str__(self) -> str:
        return f"{self.auc:.2f} ({self.low:.2f} to {self.high:.2f})"


def separation(
    values: Sequence[float] | Float[np.ndarray, " word"],
    right: Sequence[bool] | Bool[np.ndarray, " word"],
    groups: Shaped[np.ndarray, " word"] | Sequence,
    strata: Shaped[np.ndarray, " word"] | Sequence | None = None,
) -> Separation:
    """AUC of `values` for `right`; `groups` says which words belong together (captions).

    Raises `SeparationError` where no stratum has both right and wrong words.
    """
    values, right = np.asarray(values, float), np.asarray(right, bool)
    member, weights = _draws(np.asarray(groups))
    same = np.ones((right.sum(), (~right).sum()), bool)
    if strata is not None:
        places = np.asarray(strata)
        same = places[right][:, None] == places[~right][None]
    if not same.any():
        raise SeparationError(
            f"right: {right.sum()} words are right and {(~right).sum()} wrong, and no stratum has "
            "both; give more captions, or no strata."
        )
    above = np.sign(values[right][:, None] - values[~right][None]) / 2 + 0.5
    ours, theirs = weights[:, member[right]], weights[:, member[~right]]
    wins = ((ours @ (above * same)) * theirs).sum(1)
    pairs = ((ours @ same.astype(float)) * theirs).sum(1)
    drawn = wins[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Separation(
        float((above * same).sum() / same.sum()),
        float(low),
        float(high),
        int(right.sum()),
        int((~right).sum()),
        int(same.sum()),
    )


def _draws(
    groups: Shaped[np.ndarray, " word"],
) -> tuple[Shaped[np.ndarray, " word"], Float[np.ndarray, "draw group"]]:
    """Which group each word is in, and how often each draw has each group."""
    names, member = np.unique(groups, return_inverse=True)
    n = len(names)
    rng = np.random.default_rng(0)
    return member, rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)
