"""Which edges of the residual graph carry the answer: estimated all at once, or patched one by one.

An edge (u, v) is patched when reader v sees, in place of what writer u writes in this run, what u
wrote in the other run of the pair. To first order, for all edges at once,

    m_patched - m_base  ~  (u_source - u_base) . dm/dx_v                          (EAP)

with x_v what v reads of the residual stream, the gradient that goes through v alone, and the
product summed over positions and d_model. `ig_steps` m > 1 averages the gradient over m midpoints
between what the two prompts send into the first block (EAP-IG, "inputs"). `edge_patching` runs each
patch instead.

Scores count towards the clean answer: m_patched - m_base when denoising (clean values into the
corrupted run), m_base - m_patched when noising. Along a path both directions have the same EAP-IG
score; at one point they have not.

Sources: EAP: Syed, Rager & Conmy 2023 (arXiv 2310.10348); EAP-IG: Hanna, Pezzelle & Belinkov 2024
(arXiv 2403.17806). Their code takes the points k / m, k = 0 ... m - 1 (m = 1 is then the gradient
in the corrupted run), corrupted minus clean, and a loss, so that its scores have our sign; it needs
an input for each head, where here the gradients are pulled through the norm a layer at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.analysis.circuits.edge_scores import EdgeScores, as_edges
from interp.analysis.paired import (
    Answers,
    Metric,
    PairBatch,
    PairError,
    check_pairs,
    in_pair_batches,
    metric_of,
)
from interp.analysis.patching.gradients import check_gradient, pair_gradients, where_taken
from interp.analysis.patching.sweep import Direction
from interp.model.gradients import input_gradients, reader_hooks
from interp.model.graph import Edge, Graph
from interp.model.hooked import HookedModel
from interp.model.rewire import Rewiring, Writes, write_hooks, writes_at, writes_of
from interp.tasks.prompts import describe

EdgeSource = Literal["pair", "zero", "mean"]


def edge_attribution(
    model: HookedModel,
    pairs: Dataset,
    metric: str | Metric = "logit_diff",
    *,
    ig_steps: int = 5,
    direction: Direction = "noise",
    batch_size: int = 8,
    progress: bool = True,
) -> EdgeScores:
    """Estimate what every edge carries: EAP-IG, or EAP with `ig_steps=1`.

    Args:
        pairs: From `interp.tasks` (`ioi`, `pairs`, ...): clean and corrupted prompts.
        metric: A name in `METRICS`, or a function of logits and `Answers`.
        ig_steps: Points of the path, with a pass both ways for each; 1: the base run alone.
        direction: Which run is the base: the clean one ("noise"), or the corrupted one ("denoise").
        batch_size: Pairs in one pass. A pass holds as many residual streams as there are writers.

    Raises:
        GraphError: A model whose residual stream is no sum of heads and MLPs.
        PairError: An unknown metric or direction; KL with the gradient in the clean run.
        GradientError: As for `attribution_patching`.
    """
    check_pairs(pairs)
    name, function = metric_of(metric)
    check_gradient(direction, ig_steps, name)
    if batch_size < 1:
        raise PairError(f"batch_size={batch_size}: at least 1.")
    graph = Graph.of(model)
    samples = []
    with tqdm(total=len(pairs), desc="edges", disable=not progress, leave=False) as bar:
        for batch in in_pair_batches(model, pairs, batch_size):
            scores = _estimates(model, graph, batch, function, direction, ig_steps)
            samples.append(scores.cpu()[:, graph.possible])
            bar.update(len(batch))
    metadata = {
        "analysis": "edge_attribution",
        "metric": name,
        "direction": direction,
        "ig_steps": ig_steps,
        "gradient": where_taken(direction, ig_steps),
    }
    return EdgeScores.from_samples(graph, torch.cat(samples), metadata | about(model, pairs))


def edge_patching(
    model: HookedModel,
    pairs: Dataset,
    metric: str | Metric = "logit_diff",
    edges: Sequence[Edge] | None = None,
    *,
    direction: Direction = "noise",
    source: EdgeSource = "pair",
    batch_size: int = 8,
    progress: bool = True,
) -> EdgeScores:
    """Patch every edge by itself, many at once in stacked replays. Exact.

    Args:
        edges: (writer, reader) by name; default all, which takes a while: GPT-2 small has 32,491.
        source: "pair": what the edge carries on the other prompt. Instead of that, when noising:
            "zero", or "mean", each writer's mean over all tokens of all clean prompts.
        batch_size: Pairs in one recording.

    Others as in `edge_attribution`.

    Raises:
        GraphError: An edge that is not in the graph; a model without one.
        PairError: As for `edge_attribution`.
        ReplayError: A model that cannot be replayed, or is in training mode.
    """
    name, function = metric_of(metric)
    graph = Graph.of(model)
    mask = graph.possible if edges is None else graph.mask(as_edges(edges))
    if not bool(mask.any()):
        raise PairError("edges: none given.")
    samples, total = [], int(mask.sum()) * len(pairs)
    with tqdm(total=total, desc="edges", disable=not progress, unit="patch", leave=False) as bar:
        for runs in rewired_pairs(model, graph, pairs, function, direction, source, batch_size):
            carried = runs.base - _singly(runs, mask, bar)
            samples.append((carried if direction == "noise" else -carried).T.cpu())
    metadata = {
        "analysis": "edge_patching",
        "metric": name,
        "direction": direction,
        "source": source,
    }
    return EdgeScores.from_samples(graph, torch.cat(samples), metadata | about(model, pairs), mask)


@dataclass(frozen=True, eq=False, repr=False)
class RewiredPairs:
    """Some pairs, to be run with any of their edges patched."""

    rewiring: Rewiring
    metric: Metric
    answers: Answers

    @property
    def base(self) -> Float[Tensor, " batch"]:
        """The metric with nothing patched."""
        return self.metric(self.rewiring.logits, self.answers)

    def under(
        self, ablated: Bool[Tensor, "circuit reader writer"]
    ) -> Float[Tensor, "circuit batch"]:
        """The metric of each pair under each set of patched edges, all in one pass."""
        logits = self.rewiring.run(ablated)
        return torch.stack([self.metric(one, self.answers) for one in logits])


def rewired_pairs(
    model: HookedModel,
    graph: Graph,
    pairs: Dataset,
    metric: Metric,
    direction: Direction,
    source: EdgeSource,
    batch_size: int,
) -> Iterator[RewiredPairs]:
    """Batches of pairs in order, recorded; raises as `edge_patching` says."""
    check_pairs(pairs)
    for name, value, allowed in (
        ("direction", direction, get_args(Direction)),
        ("source", source, get_args(EdgeSource)),
    ):
        if value not in allowed:
            raise PairError(f"{name}={value!r}: one of {', '.join(allowed)}.")
    if source != "pair" and direction != "noise":
        raise PairError(f"source={source!r}: ablates the clean run; give direction='noise'.")
    if batch_size < 1:
        raise PairError(f"batch_size={batch_size}: at least 1.")
    if source == "mean":
        constant = _mean_writes(model, graph, pairs, batch_size)
    else:
        constant = torch.zeros(len(graph.writers), 1, 1, 1) if source == "zero" else None
    for batch in in_pair_batches(model, pairs, batch_size):
        yield _rewired(model, graph, batch, metric, direction, constant)


def about(model: HookedModel, pairs: Dataset) -> dict[str, Any]:
    """What every result on edges says of where it comes from."""
    return {"task": describe(pairs), **model.provenance()}


def _rewired(
    model: HookedModel,
    graph: Graph,
    batch: PairBatch,
    metric: Metric,
    direction: Direction,
    constant: Writes | None,
) -> RewiredPairs:
    base, other = batch.clean, batch.corrupted
    if direction == "denoise":
        base, other = other, base
    ids, mask = base.input_ids, batch.attention_mask
    if constant is not None:
        rewiring = Rewiring.of(model, graph, ids, mask, constant)
        return RewiredPairs(rewiring, metric, batch.answers(rewiring.logits))
    source, logits = writes_of(model, graph, other.input_ids, mask)
    rewiring = Rewiring.of(model, graph, ids, mask, source, batch.first_difference)
    clean_logits = logits if direction == "denoise" else rewiring.logits
    return RewiredPairs(rewiring, metric, batch.answers(clean_logits))


def _singly(
    runs: RewiredPairs, mask: Bool[Tensor, "reader writer"], bar: tqdm
) -> Float[Tensor, "edge batch"]:
    """The metric with each edge of `mask` patched by itself, the edges of a reader together."""
    # besides what comes before the block, an MLP reads what this layer's heads write
    at_once = runs.rewiring.circuits_at_once(1, runs.rewiring.graph.n_heads)
    found = []
    for reader in mask.any(1).nonzero().flatten().tolist():
        for writers in mask[reader].nonzero().flatten().split(at_once):
            circuits = torch.zeros(len(writers), *mask.shape, dtype=torch.bool)
            circuits[torch.arange(len(writers)), reader, writers] = True
            found.append(runs.under(circuits))
            bar.update(found[-1].numel())
    return torch.cat(found)


def _estimates(
    model: HookedModel,
    graph: Graph,
    batch: PairBatch,
    metric: Metric,
    direction: Direction,
    ig_steps: int,
) -> Float[Tensor, "batch reader writer"]:
    """Each edge of each pair to first order, one layer's readers at a time."""
    names, looks = reader_hooks(graph, model)
    looks = sorted({*looks, *write_hooks(graph)} - set(names))
    found = pair_gradients(model, batch, metric, direction, ig_steps, names, looks)
    change = writes_at(model, graph, found.source) - writes_at(model, graph, found.base)
    change = change.float() * batch.attention_mask[..., None]  # padding takes no part
    change = change.transpose(0, 1).flatten(2)  # [batch writer (pos d_model)]
    scores = change.new_zeros(len(batch), len(graph.readers), len(graph.writers))
    for point in found.points:
        for readers, gradient in input_gradients(graph, model, point):
            seen = graph.n_seen[readers.start]
            gradient = gradient.float().transpose(0, 1).flatten(2)
            scores[:, readers, :seen] += gradient @ change[:, :seen].mT
    towards_clean = 1 if direction == "denoise" else -1
    return towards_clean * scores / ig_steps


@torch.no_grad()
def _mean_writes(model: HookedModel, graph: Graph, pairs: Dataset, batch_size: int) -> Writes:
    """Each writer's mean over all real tokens of the clean prompts, for any prompt and position."""
    total, count = torch.zeros(()), 0
    for batch in in_pair_batches(model, pairs, batch_size):
        ids, real = batch.clean.input_ids, batch.attention_mask
        writes, _ = writes_of(model, graph, ids, real)
        total = total + (writes.double() * real[..., None]).sum((1, 2), keepdim=True).cpu()
        count += int(real.sum())
    return (total / count).float()
