"""Do two tasks share a circuit? The overlap of two sets of heads, with what chance would give.

With A and B the members of two circuits among N heads,

    jaccard = |A and B| / |A or B|,   shared = |A and B| / |A|, / |B|,
    weighted = sum over heads of min(|a|, |b|) / sum of max(|a|, |b|)     (a, b the heads' scores)

and the rank correlation of all scores. Two nulls, both exact: B drawn from all heads (a
hypergeometric law), and drawn with as many heads in each layer as B has there (a convolution of
such laws), since circuits of any two tasks prefer the same layers. Neither says that the overlap
means these two tasks: heads that matter everywhere overlap too. So give circuits of unrelated tasks
`beside`: later work (arXiv 2605.08348) reports overlaps far above chance between any two tasks.

Source: Merullo et al. 2024, "Circuit Component Reuse Across Tasks" (arXiv 2310.08744), whose 78 %
is a shared fraction, of the top 2 % of heads in each stage.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp.analysis.circuits.find import Circuit, CircuitError
from interp.heads import Head, HeadScores, overlap_null


@dataclass(frozen=True, eq=False)
class CircuitOverlap:
    """How far two circuits are one. `table`: this pair, then each of the circuits beside it.

    Columns `one, other, size_one, size_other, shared, jaccard, of_one, of_other, weighted,
    correlation, expected, p_value, expected_uniform, p_uniform`: `expected` shared heads and the
    chance of at least so many, drawn within layers; `..._uniform`: drawn from all heads.
    """

    one: Circuit
    other: Circuit
    table: pd.DataFrame

    @property
    def shared(self) -> tuple[Head, ...]:
        """The heads in both."""
        return tuple(sorted(set(self.one.members) & set(self.other.members)))

    @property
    def jaccard(self) -> float:
        """Shared heads over all heads of either."""
        return float(self.table["jaccard"].iloc[0])

    @property
    def p_value(self) -> float:
        """Chance of at least so many shared heads, drawn within layers."""
        return float(self.table["p_value"].iloc[0])

    def plot(self, **options):
        """The two layer x head maps side by side, members outlined, shared ones named."""
        from interp import figures

        panels = {_name(circuit): circuit for circuit in (self.one, self.other)}
        return figures.head_maps(
            [circuit.heads.matrix for circuit in panels.values()],
            list(panels),
            [circuit.members for circuit in panels.values()],
            both=self.shared,
            **options,
        )

    def __repr__(self) -> str:
        row = self.table.iloc[0]
        return (
            f"CircuitOverlap({row['shared']} heads shared by {row['size_one']} and "
            f"{row['size_other']} (chance within layers: {row['expected']:.1f}, p = "
            f"{row['p_value']:.2g}); jaccard {row['jaccard']:.2f}, rank correlation "
            f"{row['correlation']:.2f})"
        )


def circuit_overlap(
    one: Circuit, other: Circuit, *, beside: Mapping[str, Circuit] | None = None
) -> CircuitOverlap:
    """The overlap of two circuits of one model; `beside`: circuits of unrelated tasks.

    Raises `CircuitError` where the circuits are of different models, or empty.
    """
    rows = [_row(one, other, _name(one), _name(other))]
    for name, third in (beside or {}).items():
        rows += [_row(one, third, _name(one), name), _row(other, third, _name(other), name)]
    return CircuitOverlap(one, other, pd.DataFrame(rows))


def _row(one: Circuit, other: Circuit, name: str, other_name: str) -> dict[str, Any]:
    models = [circuit.metadata.get("model") for circuit in (one, other)]
    if models[0] != models[1]:
        raise CircuitError(f"other: a circuit of {models[1]}, and the first is of {models[0]}.")
    ours, theirs = set(one.members), set(other.members)
    if not ours or not theirs:
        raise CircuitError("circuits: one has no heads, so there is nothing to overlap.")
    both = len(ours & theirs)
    pool = sorted({*one.heads.heads, *other.heads.heads, *ours, *theirs})
    nulls = [overlap_null(pool, one.members, other.members, match) for match in ("layer", None)]
    within, anywhere = (
        (float(null @ np.arange(len(null))), float(min(1.0, null[both:].sum()))) for null in nulls
    )
    return {
        "one": name,
        "other": other_name,
        "size_one": len(ours),
        "size_other": len(theirs),
        "shared": both,
        "jaccard": both / len(ours | theirs),
        "of_one": both / len(ours),
        "of_other": both / len(theirs),
        "weighted": weighted_overlap(one.heads, other.heads),
        "correlation": one.heads.correlation(other.heads),
        "expected": within[0],
        "p_value": within[1],
        "expected_uniform": anywhere[0],
        "p_uniform": anywhere[1],
    }


def weighted_overlap(one: HeadScores, other: HeadScores) -> float:
    """Sum over heads of min(|a|, |b|) / sum of max(|a|, |b|): 1 for equal scores."""
    left, right = (np.abs(np.nan_to_num(scores.matrix)) for scores in (one, other))
    if left.shape != right.shape:
        raise CircuitError(f"scores: maps of {left.shape} and {right.shape}; of one model, please.")
    return float(np.minimum(left, right).sum() / max(np.maximum(left, right).sum(), 1e-30))


def _name(circuit: Circuit) -> str:
    return str(circuit.metadata.get("task", {}).get("task", "circuit"))
