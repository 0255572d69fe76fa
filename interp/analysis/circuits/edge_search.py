"""Find a circuit of edges by dropping one edge after the other: ACDC.

From the whole model on, readers are visited from the logits back to layer 0. Each of their edges is
ablated, that is made to carry what it carries on the corrupted prompt; where the mean metric falls
by less than a threshold the edge is gone for good, else it is restored. One pass over all edges.

A falling metric is what counts. Edges whose loss *helps* are dropped too, so a logit difference
loses all that works against the answer; KL, the default, does not.

Source: Conmy et al. 2023, "Towards Automated Circuit Discovery" (arXiv 2304.14997). The paper does
not fix the order of edges and its releases differ; here it is `ORDER`, and the metadata say so. Its
test is on the rise of a loss, which is the fall of a metric.
"""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from interp.analysis.circuits.edges import EdgeSource, RewiredPairs, about, rewired_pairs
from interp.analysis.paired import Metric, PairError, metric_of
from interp.heads import Head
from interp.model.graph import Edge, Graph
from interp.model.hooked import HookedModel

ORDER = (
    "readers from the logits to layer 0 (in a layer MLP, v, k, q; heads from the last), the "
    "writers of a reader from the last to the embedding"
)
FIRST_BLOCK = 8


def greedy_edges(
    model: HookedModel,
    pairs: Dataset,
    threshold: float,
    metric: str | Metric = "kl",
    *,
    source: EdgeSource = "pair",
    batch_size: int = 8,
    progress: bool = True,
) -> "EdgeCircuit":
    """ACDC: visit every edge once, and ablate it for good where the metric falls by less.

    The result is that of one edge after the other. Several are tested in one pass, each on top of
    those before it as if all of these were dropped; from the first that has to stay on, the
    others' numbers are thrown away and they are tested again. Edges into a head or MLP that nobody
    listens to any more are dropped without a test: they change nothing.

    Args:
        pairs: All are used at every test, and held in memory, with what every writer writes.
        threshold: In units of the metric; inf: nothing stays, -inf: everything.
        source: As in `edge_patching`.

    Raises:
        PairError: A threshold that is no number; others as in `edge_patching`.
        GraphError, ReplayError: As in `edge_patching`.
    """
    name, function = metric_of(metric)
    if threshold != threshold:
        raise PairError("threshold=nan: a number, such as 0.01 (nats of KL).")
    graph = Graph.of(model)
    runs = list(rewired_pairs(model, graph, pairs, function, "noise", source, batch_size))
    search = _Search(graph, runs, threshold)
    n_readers = len(graph.readers)
    for reader in tqdm(
        range(n_readers - 1, -1, -1), desc="greedy edges", disable=not progress, leave=False
    ):
        search.visit(reader)
    floor = search.measure(graph.possible[None])[0]
    metadata = {
        "analysis": "greedy_edges",
        "metric": name,
        "threshold": threshold,
        "source": source,
        "order": ORDER,
        "tests": search.n_tests,
        "passes": search.n_passes,
    }
    return EdgeCircuit(
        graph,
        search.table(),
        whole=search.whole,
        value=search.value,
        floor=floor,
        metadata=metadata | about(model, pairs),
    )


@dataclass(frozen=True, eq=False)
class EdgeCircuit:
    """What a search left. `table` has all edges in the order in which they were visited.

    Its columns: `writer, reader, kept, fall` (by how much the metric fell when the edge was tested;
    NaN: dropped untested, as its reader had no way to the logits). `whole`, `value` and `floor` are
    the mean metric of the model, of the circuit, and with every edge ablated.
    """

    graph: Graph
    table: pd.DataFrame
    whole: float
    value: float
    floor: float
    metadata: dict[str, Any]

    @property
    def edges(self) -> list[Edge]:
        """Those that stayed, by reader, then by writer."""
        kept = self.table[self.table["kept"]]
        return self.graph.edges_of(self.graph.mask(zip(kept["writer"], kept["reader"])))

    @property
    def heads(self) -> list[Head]:
        """Those on a path of kept edges from the embedding to the logits."""
        live = self.graph.live(self.graph.mask(self.edges)).any(0)
        names = [name for name, there in zip(self.graph.writers, live.tolist()) if there]
        return [Head.parse(name) for name in names if name.startswith("L")]

    @property
    def faithfulness(self) -> float:
        """(value - floor) / (whole - floor), on the pairs of the search."""
        return (self.value - self.floor) / ((self.whole - self.floor) or float("nan"))

    def __len__(self) -> int:
        return int(self.table["kept"].sum())

    def __repr__(self) -> str:
        about = self.metadata
        return (
            f"EdgeCircuit({len(self)} of {self.graph.n_edges} edges at threshold "
            f"{about['threshold']:g}; {about['metric']} {self.whole:.3g} whole, {self.value:.3g} "
            f"circuit, {self.floor:.3g} nothing)"
        )


@dataclass(eq=False, repr=False)
class _Search:
    """A search under way: what is ablated so far, and the mean metric under it."""

    graph: Graph
    runs: list[RewiredPairs]
    threshold: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    n_tests: int = 0
    n_passes: int = 0

    def __post_init__(self):
        self.ablated = torch.zeros_like(self.graph.possible)
        self.n_pairs = sum(len(run.base) for run in self.runs)
        self.whole = sum(float(run.base.double().sum()) for run in self.runs) / self.n_pairs
        self.value = self.whole
        sizes = self.graph.n_layer_readers, len(self.graph.writers)
        self.most = min(run.rewiring.circuits_at_once(*sizes) for run in self.runs)
        self.block = min(FIRST_BLOCK, self.most)

    def visit(self, reader: int) -> None:
        """Test every edge into a reader, the latest writer first."""
        queue = list(range(self.graph.n_seen[reader] - 1, -1, -1))
        if not bool(self.graph.heard(self.graph.possible & ~self.ablated)[reader]):
            self.ablated[reader, queue] = True
            self._note(reader, queue, [float("nan")] * len(queue), kept=False)
            return
        while queue:
            tested = queue[: self.block]
            values = self.measure(self._one_by_one(reader, tested))
            falls, done = [], 0
            for value in values:
                falls.append(self.value - value)
                done += 1
                if not falls[-1] < self.threshold:
                    break
                self.value = value
                self.ablated[reader, tested[done - 1]] = True
            stays = not falls[-1] < self.threshold
            self._note(reader, tested[: done - stays], falls[: done - stays], kept=False)
            self._note(reader, tested[done - stays : done], falls[done - stays :], kept=True)
            self.n_tests += done
            queue = queue[done:]
            self.block = max(1, self.block // 2) if stays else min(2 * self.block, self.most)

    def measure(self, ablated: Bool[Tensor, "circuit reader writer"]) -> list[float]:
        """The mean metric over all pairs under each set."""
        total: Tensor | float = 0.0
        for run in self.runs:
            total = total + run.under(ablated).double().sum(1)
            self.n_passes += 1
        return (torch.as_tensor(total) / self.n_pairs).tolist()

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["writer", "reader", "kept", "fall"])

    def _one_by_one(self, reader: int, writers: list[int]) -> Bool[Tensor, "circuit reader writer"]:
        """What is ablated if the first, the first two, ... of these edges go too."""
        sets = self.ablated.repeat(len(writers), 1, 1)
        for count, writer in enumerate(writers):
            sets[count:, reader, writer] = True
        return sets

    def _note(self, reader: int, writers: list[int], falls: list[float], kept: bool) -> None:
        names, name = self.graph.writers, self.graph.readers[reader]
        self.rows += [
            {"writer": names[writer], "reader": name, "kept": kept, "fall": fall}
            for writer, fall in zip(writers, falls)
        ]
