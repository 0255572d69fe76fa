"""Do two lists share more heads than chance has them share?"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from interp.heads.head import Head


@dataclass(frozen=True)
class Overlap:
    """How many of two top-k lists are the same heads, against chance.

    `p_value`: the chance of at least so many shared heads if one list had been drawn at random,
    `expected`: the mean number then.
    """

    shared: tuple[Head, ...]
    jaccard: float
    p_value: float
    expected: float
    k: int
    n_heads: int


def overlap_null(
    pool: Sequence[Head], ours: Sequence[Head], theirs: Sequence[Head], match: str | None = None
) -> Float[np.ndarray, " shared"]:
    """P(0, 1, ... shared heads) if one of two lists were drawn at random from `pool`.

    With `match="layer"` as many in each layer as it has there: a sum of hypergeometric laws, exact.
    """
    stratum = stratum_of(match)
    sizes, left, right = (Counter(map(stratum, heads)) for heads in (pool, ours, theirs))
    null = np.ones(1)
    for place, size in sizes.items():
        counts = np.arange(min(left[place], right[place]) + 1)
        null = np.convolve(null, stats.hypergeom.pmf(counts, size, left[place], right[place]))
    return np.pad(null, (0, max(0, len(ours) + 1 - len(null))))


def stratum_of(match: str | None) -> Callable[[Head], tuple]:
    """What a head must share with another to be drawn in its place."""
    return (lambda head: (head.tower, head.layer)) if match == "layer" else (lambda head: ())
