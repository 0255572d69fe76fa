"""Attribution patching: what activation patching would find, estimated from one gradient.

With a_base and a_source an activation in the run that is patched and in the one that patches, and
m the metric, the effect of a patch is estimated to first order, for all cells at once:

    m_patched - m_base  ~  (a_source - a_base) . dm/da      (AtP; the gradient in the base run)

summed over the numbers of the cell. It is exact where m is affine in a. Three things it gets wrong,
and what is to be done:

- A gradient at one point misses what saturates. With `ig_steps` m > 1 it is averaged over m points
  between what the two prompts send into the first block, as in EAP-IG.
- A linearised softmax is worst for q and k. `qk_fix` takes the true change of the head's output
  under the patched q or k, and only then the gradient: g_z . (z' - z). As z_i = sum_j a_ij v_j,
  this is the fix of AtP*, sum_j (a'_ij - a_ij) dm/da_ij, and needs no pattern.
- Paths that cancel leave nothing: patch what matters, and see how far the estimate holds
  (`compare_estimate`).

Sources: Nanda 2023, "Attribution Patching" (neelnanda.io); Syed, Rager & Conmy 2023 (arXiv
2310.10348); AtP*: Kramár, Lieberum, Shah & Nanda 2024 (arXiv 2403.00745); EAP-IG: Hanna, Pezzelle &
Belinkov 2024 (arXiv 2403.17806), which takes the path's points at k / m, k = 0 ... m - 1; here they
are midpoints (`interp.model.gradients`). In a grouped-query model a key is patched for its group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from interp.analysis.paired import (
    Metric,
    PairBatch,
    PairError,
    check_pairs,
    metric_of,
    pair_batch,
)
from interp.analysis.patching.activation import Patching
from interp.analysis.patching.gradients import (
    PairGradients,
    check_gradient,
    pair_gradients,
    where_taken,
)
from interp.analysis.patching.grid import SITES, Grid, Position
from interp.analysis.patching.sweep import Direction
from interp.analysis.shards import in_shards
from interp.model.gradients import Trace
from interp.model.hooked import HookedModel
from interp.tasks.prompts import describe


def attribution_patching(
    model: HookedModel,
    pairs: Dataset,
    site: str = "z",
    by: Sequence[str] = ("layer", "head"),
    metric: str | Metric = "logit_diff",
    *,
    direction: Direction = "denoise",
    ig_steps: int = 1,
    qk_fix: bool = False,
    layers: Sequence[int] | None = None,
    positions: Sequence[Position] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Patching:
    """Estimate the metric under the patch of every cell: two forward passes and one backward.

    The result is that of `activation_patching`, whose arguments these are, with the base run's
    metric plus the estimate in place of the patched run's. A cell that covers several layers, heads
    or positions has the sum of their estimates.

    Args:
        ig_steps: 1: the gradient in the base run. Above: the mean over so many points, with a pass
            both ways for each.
        qk_fix: For `q`, and for `k` without positions: through the exact softmax.
        batch_size: Pairs in one pass.

    Raises:
        PairError: As for `activation_patching`; `qk_fix` where it does not apply; KL with the
            gradient in the clean run, where it vanishes.
        GradientError: Inside `torch.inference_mode()`, a model in training mode, a metric without
            gradient.
    """
    check_pairs(pairs)
    name, function = metric_of(metric)
    grid = Grid.of(model, pairs, site, by, layers, None, positions, 1)
    check_gradient(direction, ig_steps, name)
    if qk_fix:
        _check_qk_fix(model, site, grid)
    estimate = Estimate(model, site, grid, function, direction, ig_steps, qk_fix)
    desc = "attribution" if progress else None
    table = in_shards(estimate.run, pairs, batch_size, {}, None, False, desc)
    metadata = {
        "analysis": "attribution_patching",
        "site": site,
        "by": grid.cells.columns.tolist(),
        "metric": name,
        "direction": direction,
        "gradient": where_taken(direction, ig_steps),
        "ig_steps": ig_steps,
        "qk_fix": qk_fix,
        "head_kind": SITES[site].heads,
        "task": describe(pairs),
        **model.provenance(),
    }
    return Patching(
        grid.cells,
        np.stack(table["values"].to_list()),
        table["clean"].to_numpy(float),
        table["corrupted"].to_numpy(float),
        metadata,
    )


def compare_estimate(estimate: Patching, exact: Patching) -> "EstimateComparison":
    """An estimate beside the exact sweep of the same cells on the same pairs.

    Raises `PairError` where they are of other cells, sites, metrics, directions or pairs.
    """
    for key in ("site", "metric", "direction", "task"):
        one, other = estimate.metadata[key], exact.metadata[key]
        if one != other:
            raise PairError(f"{key}: {one} in the estimate and {other} in the exact sweep.")
    by = estimate.by
    if set(by) != set(exact.by):
        raise PairError(f"by: {by} in the estimate and {exact.by} in the exact sweep.")
    table = _changes(estimate, "estimate").merge(_changes(exact, "exact"), on=by)
    if len(table) < max(len(estimate.cells), len(exact.cells)):
        raise PairError(
            f"cells: {len(estimate.cells)} are estimated and {len(exact.cells)} patched, of which "
            f"only {len(table)} are the same; give both the same layers, heads and positions."
        )
    keys = ("gradient", "ig_steps", "qk_fix", "site", "metric", "direction", "task", "model")
    return EstimateComparison(table, {key: estimate.metadata.get(key) for key in keys})


@dataclass(frozen=True, eq=False)
class EstimateComparison:
    """`table`: one row a cell, `by`, and the mean change of the metric, `estimate` and `exact`."""

    table: pd.DataFrame
    metadata: dict[str, Any]

    @property
    def spearman(self) -> float:
        """Rank correlation over cells; NaN where one of the two is constant."""
        return float(self.table["estimate"].corr(self.table["exact"], method="spearman"))

    def top_recall(self, k: int = 10) -> float:
        """Share of the k cells with the largest exact change that are among the k of the estimate.

        Changes of either sign count by their size. Raises `PairError` for a k out of range.
        """
        if not 1 <= k <= len(self.table):
            raise PairError(f"k={k}: there are {len(self.table)} cells.")
        best = [self.table[column].abs().nlargest(k).index for column in ("estimate", "exact")]
        return len(best[0].intersection(best[1])) / k

    def plot(self, **options):
        """Estimate against exact change, one point a cell (L3H5@last: layer, head, position)."""
        from interp import figures

        signs = {"layer": "L", "head": "H", "position": "@"}
        parts = [[f"{signs[by]}{k}" for k in self.table[by]] for by in signs if by in self.table]
        labels = ["".join(part) for part in zip(*parts)]
        options = {"x_title": "patched", "y_title": "estimated", "diagonal": True} | options
        return figures.scatter(self.table["exact"], self.table["estimate"], labels, **options)

    def __repr__(self) -> str:
        k = min(10, len(self.table))
        return (
            f"EstimateComparison({self.metadata['site']}, {len(self.table)} cells; Spearman "
            f"{self.spearman:.2f}, {self.top_recall(k):.0%} of the top {k})"
        )


@dataclass(frozen=True, eq=False)
class Estimate:
    """All cells of a grid, to first order, on some pairs."""

    model: HookedModel
    site: str
    grid: Grid
    metric: Metric
    direction: Direction
    ig_steps: int
    qk_fix: bool

    def run(self, pairs: Dataset) -> pd.DataFrame:
        """One row a pair: its metric on both prompts, and the base metric plus each estimate."""
        batch, layers = pair_batch(self.model, pairs), self.grid.touched
        names, looks = self._hooks
        found = pair_gradients(
            self.model, batch, self.metric, self.direction, self.ig_steps, names, looks
        )
        with torch.no_grad():
            changes = [self._change(layer, found) for layer in layers]
            total = torch.zeros((), device=batch.right.device)
            for point in found.points:
                pieces = [self._estimate(*piece, point) for piece in zip(changes, layers)]
                total = total + torch.stack(pieces, dim=1)
            real = batch.attention_mask.bool()[:, None, :, None]
            estimates = self._by_cell((total / self.ig_steps).masked_fill(~real, 0.0), batch)
        base = found.corrupted if self.direction == "denoise" else found.clean
        return pd.DataFrame(
            {
                "clean": found.clean.tolist(),
                "corrupted": found.corrupted.tolist(),
                "values": (base[:, None] + estimates).tolist(),
            }
        )

    @property
    def _hooks(self) -> tuple[list[str], list[str]]:
        """Where gradients are needed, and where only values are."""
        layers = self.grid.touched
        if self.qk_fix:
            return [_z(layer) for layer in layers], [_attention(layer) for layer in layers]
        return [self.grid.name(layer) for layer in layers], []

    def _change(self, layer: int, found: PairGradients) -> Tensor:
        """What the patch of a whole layer changes where the gradient is taken."""
        if not self.qk_fix:
            name = self.grid.name(layer)
            return (found.source[name] - found.base[name]).float()
        base, source = (side[_attention(layer)] for side in (found.base, found.source))
        patched = replace(base, **{self.site: getattr(source, self.site)})
        return (patched.output() - base.output()).float().transpose(1, 2)

    def _estimate(
        self, change: Tensor, layer: int, point: Trace
    ) -> Float[Tensor, "batch pos head"]:
        """Change times gradient, by position and head; one head where the site has none."""
        name = _z(layer) if self.qk_fix else self.grid.name(layer)
        estimate = (change * point.gradients[name].float()).sum(-1)
        if self.grid.site.is_pattern:
            return estimate.transpose(1, 2)
        if self.grid.site.heads is None:
            return estimate[..., None]
        if self.qk_fix and self.site == "k":  # z is by query heads, and a key is its group's
            n_kv_heads = getattr(self.model.cfg, "n_key_value_heads", None)
            return estimate.unflatten(2, (n_kv_heads or self.model.cfg.n_heads, -1)).sum(-1)
        return estimate

    def _by_cell(
        self, estimates: Float[Tensor, "batch layer pos head"], batch: PairBatch
    ) -> Float[Tensor, "batch cell"]:
        """Each cell's own, summed over the axes that the cells do not name."""
        cells = self.grid.cells
        positions = self.grid.column("position")
        places = {position: index for index, position in enumerate(dict.fromkeys(positions))}
        chosen = torch.stack([batch.at(position) for position in places])
        at = torch.einsum("blph,nbp->blnh", estimates, chosen.to(estimates.dtype))
        at = at if "layer" in cells else at.sum(1, keepdim=True)
        at = at if "head" in cells else at.sum(3, keepdim=True)
        rows = {layer: index for index, layer in enumerate(self.grid.touched)}
        layer = [rows[k] for k in cells["layer"]] if "layer" in cells else [0] * len(cells)
        head = cells["head"].tolist() if "head" in cells else [0] * len(cells)
        return at[:, layer, [places[position] for position in positions], head]


def _changes(patching: Patching, name: str) -> pd.DataFrame:
    """Each cell's mean change of the metric from the base run's."""
    denoised = patching.metadata["direction"] == "denoise"
    base = patching.corrupted if denoised else patching.clean
    return patching.cells.assign(**{name: (patching.values - base[:, None]).mean(0)})


def _z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def _attention(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_attention"


def _check_qk_fix(model: HookedModel, site: str, grid: Grid) -> None:
    if site not in ("q", "k"):
        raise PairError(f"qk_fix: for site='q' or 'k'; {site!r} goes through no softmax.")
    if site == "k" and "position" in grid.cells:
        raise PairError(
            "qk_fix: of a single key's position there is none here; leave 'position' out of by, "
            "or patch exactly with activation_patching."
        )
    if not model.lazy:
        raise PairError(f"qk_fix: {model.name} shows only finished patterns, no q and k.")
    for layer in grid.touched:
        norm = model.blocks[layer].attn._modules.get(f"{site}_norm")
        weight = getattr(getattr(norm, "original_component", None), "weight", None)
        if weight is not None and weight.numel() > model.cfg.d_head:
            raise PairError(
                f"qk_fix: {model.name} norms all heads' {site} together, so that one head's patch "
                "changes the others; give qk_fix=False."
            )
