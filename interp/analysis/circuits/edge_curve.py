"""How much of the answer circuits of the best edges keep, and how much is left without them.

A circuit C is a set of edges; F(C) is the mean metric when every other edge is ablated, M the whole
model, 0 the empty circuit. For growing circuits of the top edges

    faithfulness(C) = (F(C) - F(0)) / (F(M) - F(0))        a ratio of means over pairs

and for their complements M - C the same: a complete circuit leaves little. With edges ablated to
what they carry on the corrupted prompt, F(0) is the metric there.

Sources: both as in Marks et al. 2024, "Sparse Feature Circuits" (arXiv 2403.19647), for edges as in
Hanna, Pezzelle & Belinkov 2024 (arXiv 2403.17806). (Wang et al. 2022, arXiv 2211.00593, call
something else completeness: |F(C - K) - F(M - K)| for parts K of C.) Areas: MIB, Mueller et al.
2025 (arXiv 2504.13151), over the share of edges; as half of that is about circuits of half the
model and more, the area over its logarithm stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from tqdm.auto import tqdm

from interp.analysis.circuits.edge_scores import EdgeScores, as_edges
from interp.analysis.circuits.edges import EdgeSource, about, rewired_pairs
from interp.analysis.paired import Metric, PairError, metric_of
from interp.model.graph import Edge, Graph
from interp.model.hooked import HookedModel

# shares of all edges: the grid of MIB's curves
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RESAMPLES = 2000


def edge_curve(
    model: HookedModel,
    pairs: Dataset,
    scores: EdgeScores | Sequence[Edge],
    sizes: Sequence[int | float] = SIZES,
    metric: str | Metric = "logit_diff",
    *,
    source: EdgeSource = "pair",
    batch_size: int = 8,
    progress: bool = True,
) -> "EdgeCurve":
    """How faithful the circuits of the top edges are, and how complete. Several in one pass.

    Args:
        pairs: Better other ones than those that the edges were scored on.
        scores: What `edge_attribution` or `edge_patching` gave, or edges, the best first.
        sizes: Whole numbers of edges, or shares of all edges (between 0 and 1, with a point).
        source: What ablated edges carry, as in `edge_patching`.

    Raises:
        PairError: A size that is not there; others as in `edge_patching`.
        GraphError, ReplayError: As in `edge_patching`.
    """
    name, function = metric_of(metric)
    graph = Graph.of(model)
    ranking = scores.top(len(scores)) if isinstance(scores, EdgeScores) else as_edges(scores)
    counts = _counts(sizes, graph.n_edges, len(ranking))
    kept = torch.stack([graph.mask(ranking[:count]) for count in counts])
    left = graph.possible & ~kept  # what a complement keeps
    ablated = torch.cat([graph.possible[None], left, kept])
    values, base = [], []
    with tqdm(total=len(pairs), desc="edge curve", disable=not progress, leave=False) as bar:
        for runs in rewired_pairs(model, graph, pairs, function, "noise", source, batch_size):
            at_once = runs.rewiring.circuits_at_once(graph.n_layer_readers, len(graph.writers))
            found = [runs.under(chunk) for chunk in ablated.split(at_once)]
            values.append(torch.cat(found).T.cpu())
            base.append(runs.base.cpu())
            bar.update(len(base[-1]))
    floor, circuit, complement = torch.cat(values).double().split([1, len(counts), len(counts)], 1)
    metadata: dict[str, Any] = {"analysis": "edge_curve", "metric": name, "source": source}
    if isinstance(scores, EdgeScores):
        metadata["scores"] = scores.metadata
    return EdgeCurve(
        pd.DataFrame(
            {
                "n_edges": counts,
                "share": [count / graph.n_edges for count in counts],
                "connected": [int(graph.live(one).sum()) for one in kept],
            }
        ),
        circuit.numpy(),
        complement.numpy(),
        torch.cat(base).double().numpy(),
        floor[:, 0].numpy(),
        metadata | about(model, pairs),
    )


@dataclass(frozen=True, eq=False)
class EdgeCurve:
    """The metric of each pair for growing circuits, their complements, the whole, and nothing.

    `sizes` has the columns `n_edges, share, connected` (how many of these edges lie on a path of
    them from the embedding to the logits).
    """

    sizes: pd.DataFrame
    circuit: Float[np.ndarray, "pair size"]
    complement: Float[np.ndarray, "pair size"]
    whole: Float[np.ndarray, " pair"]
    floor: Float[np.ndarray, " pair"]
    metadata: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row a size: `n_edges, share, connected`, then `value` (mean metric), `faithfulness`,
        `low`, `high`, and of the complement `without`, `without_low`, `without_high`, and `n`.

        Both are normalised: 1 as the whole model, 0 as with every edge ablated. Intervals: 95 %,
        bootstrap over pairs of the ratio of means.
        """
        low, high = self._interval(self.circuit)
        without_low, without_high = self._interval(self.complement)
        return self.sizes.assign(
            value=self.circuit.mean(0),
            faithfulness=self._normalised(self.circuit),
            low=low,
            high=high,
            without=self._normalised(self.complement),
            without_low=without_low,
            without_high=without_high,
            n=len(self.whole),
        )

    def area(self, log: bool = False) -> float:
        """Mean faithfulness over the share of edges, or over its logarithm; 1 is as the model.

        By trapezoids between the smallest and the largest size (above 0 where `log`). Linear: CPR
        of MIB, divided by the width of the grid.
        """
        return self._mean(self._normalised(self.circuit), log)

    def distance(self, log: bool = False) -> float:
        """Mean distance of faithfulness from 1, over the same axis: CMD of MIB; 0 is best."""
        return self._mean(np.abs(1 - self._normalised(self.circuit)), log)

    def plot(self, **options):
        """Faithfulness and what the complement keeps, over the number of edges (log)."""
        from interp import figures

        table = self.table[self.table["n_edges"] > 0]
        both = pd.concat([table, table])
        without = table[["without", "without_low", "without_high"]].to_numpy()
        lines = np.concatenate([table[["faithfulness", "low", "high"]].to_numpy(), without])
        labels = ["circuit"] * len(table) + ["model without it"] * len(table)
        options.setdefault("x_title", "edges")
        options.setdefault("y_title", "share of the effect kept")
        figure = figures.profile(
            both["n_edges"].to_numpy(),
            lines[:, 0],
            low=lines[:, 1],
            high=lines[:, 2],
            series=np.array(labels),
            **options,
        )
        return figure.update_xaxes(type="log")

    def __repr__(self) -> str:
        table = self.table
        enough = table[table["faithfulness"] >= 0.8]
        smallest = f"{enough['n_edges'].iloc[0]} edges" if len(enough) else "none of them"
        return (
            f"EdgeCurve({self.metadata['metric']}, {len(table)} circuits of "
            f"{table['n_edges'].min()}-{table['n_edges'].max()} edges x {len(self.whole)} pairs; "
            f"80 % kept by {smallest}; area {self.area():.2f}, over log size "
            f"{self.area(log=True):.2f})"
        )

    def _normalised(self, values: Float[np.ndarray, "pair size"]) -> Float[np.ndarray, " size"]:
        gap = self.whole.mean() - self.floor.mean()
        return (values.mean(0) - self.floor.mean()) / (gap or np.nan)

    def _mean(self, values: Float[np.ndarray, " size"], log: bool) -> float:
        share = self.sizes["share"].to_numpy()
        there = share > 0 if log else share >= 0
        x, y = share[there], values[there]
        if len(x) < 2:
            return float("nan")
        x = np.log10(x) if log else x
        return float(np.trapezoid(y, x) / (x[-1] - x[0]))

    def _interval(self, values: Float[np.ndarray, "pair size"]) -> tuple[np.ndarray, np.ndarray]:
        n, n_sizes = values.shape
        if n < 2:
            return np.full(n_sizes, np.nan), np.full(n_sizes, np.nan)
        draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES) / n
        gaps = draws @ (self.whole - self.floor)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = (draws @ (values - self.floor[:, None])) / gaps[:, None]
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
        return low, high


def _counts(sizes: Sequence[int | float], n_edges: int, n_ranked: int) -> list[int]:
    """Numbers of edges, the smallest first."""
    counts = set()
    for size in sizes:
        is_share = isinstance(size, float)
        if size < 0 or (is_share and size > 1):
            raise PairError(f"sizes: {size} is neither a number of edges nor a share of them.")
        count = max(1, round(size * n_edges)) if is_share and size else int(size)
        if count > n_ranked:
            raise PairError(f"sizes: {size} wants {count} edges, and {n_ranked} are ranked.")
        counts.add(count)
    if not counts:
        raise PairError("sizes: none given.")
    return sorted(counts)
