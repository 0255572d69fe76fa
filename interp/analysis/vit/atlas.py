"""The atlas: how far each head of an image encoder looks, what it draws, and which heads are alike.

What is measured is in `interp.analysis.vit.patterns`. Heads are set beside each other by their
offsets: with o the share of each offset, a head is the vector sqrt(o), whose distances are
Hellinger's; principal components lay the heads out, k-means in them finds heads of a kind.

Li et al. 2023 (arXiv 2303.13731) sum patterns up by an autoencoder over attention maps. Offsets are
exact, need no training and keep what its clusters are said to show (looking at oneself, at one
neighbour, along a row, everywhere); what they leave out is content, for which `spread` stands.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.spatial.distance import cdist

from interp.analysis.vit.patterns import look_at_patterns
from interp.heads import HeadScores
from interp.model.hooked import HookedModel


@dataclass(frozen=True, eq=False)
class HopProfile:
    """How far each head looks.

    `table`: a row a head and hop, `layer, head, hop, share, low, high, uniform, excess`, with t
    intervals over images.
    """

    table: pd.DataFrame
    metadata: dict[str, Any]

    def plot(self, **options):
        """A line a layer, the mean of its heads, and the uniform head's (`figures.profile`)."""
        from interp import figures

        means = self.table.groupby(["layer", "hop"], as_index=False)["share"].mean()
        even = self.table.drop_duplicates("hop")
        series = [*(f"layer {layer}" for layer in means["layer"]), *["uniform"] * len(even)]
        options = {"title": "How far heads look", "x_title": "hops", "y_title": "share"} | options
        return figures.profile(
            np.concatenate([means["hop"], even["hop"]]),
            np.concatenate([means["share"], even["uniform"]]),
            series=series,
            **options,
        )


@dataclass(frozen=True, eq=False)
class PatternAtlas:
    """What patterns heads draw: offsets `[layer head rows columns]`, and heads of a kind together.

    `table`: a row a head, `layer, head, kind, cluster, x, y, spread, key_share, on_special`; x and
    y are the first principal components of the square roots of the offsets, `cluster` the k-means
    cluster in as many components as hold 95 % of the variance, k by silhouette.
    """

    offsets: Float[np.ndarray, "layer head rows columns"]
    layers: tuple[int, ...]
    table: pd.DataFrame
    metadata: dict[str, Any]

    def plot(self, **options):
        """Every head's offsets in its place, layers down (`figures.offset_atlas`)."""
        from interp import figures

        options.setdefault("title", "Where heads look from a patch")
        return figures.offset_atlas(self.offsets, layers=self.layers, **options)

    def plot_map(self, **options):
        """Heads as points, near each other where they draw alike (`figures.scatter`)."""
        from interp import figures

        labels = [f"L{r.layer}H{r.head} {r.kind}" for r in self.table.itertuples()]
        options = {"title": "Heads by pattern", "x_title": "PC 1", "y_title": "PC 2"} | options
        return figures.scatter(
            self.table["x"].to_numpy(), self.table["y"].to_numpy(), labels, **options
        )


def hop_profile(
    model: HookedModel, images, *, batch_size: int = 32, progress: bool = True
) -> HopProfile:
    """How far each head of the image encoder looks, on `images` (as in `vit_heads`).

    Raises `PatternError` where the patches lie on no square grid.
    """
    looked = look_at_patterns(model, images, batch_size=batch_size, progress=progress)
    n_images, n_layers, n_heads, n_hops = looked.hops.shape
    hop = pd.DataFrame(
        {
            "layer": np.repeat(looked.layers, n_heads * n_hops),
            "head": np.tile(np.repeat(np.arange(n_heads), n_hops), n_layers),
            "hop": np.tile(np.arange(n_hops), n_layers * n_heads),
        }
    )
    flat = looked.hops.reshape(n_images, n_layers, n_heads * n_hops)
    table = HeadScores.from_samples(flat).interval()  # one "head" a head and hop
    uniform = np.tile(looked.grid.even_hops, n_layers * n_heads)
    share = table["score"].to_numpy()
    table = hop.assign(
        share=share,
        low=table["low"].to_numpy(),
        high=table["high"].to_numpy(),
        uniform=uniform,
        excess=share / uniform,
    )
    return HopProfile(table, looked.metadata | {"analysis": "hop_profile"})


def pattern_atlas(
    model: HookedModel,
    images,
    *,
    most_clusters: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> PatternAtlas:
    """What patterns the heads of the image encoder draw, and which are alike.

    Raises `PatternError` where the patches lie on no square grid.
    """
    looked = look_at_patterns(model, images, batch_size=batch_size, progress=progress)
    codes = components(looked.offsets)
    clusters = clustered(codes, most_clusters, seed)
    table = looked.columns[["layer", "head"]].assign(
        kind=looked.kinds,
        cluster=clusters,
        x=codes[:, 0],
        y=codes[:, 1] if codes.shape[1] > 1 else 0.0,
        spread=looked.spread.reshape(-1),
        key_share=looked.key_share.reshape(-1),
        on_special=looked.on_special.mean(0).reshape(-1),
    )
    metadata = looked.metadata | {"analysis": "pattern_atlas", "seed": seed}
    return PatternAtlas(looked.offsets, looked.layers, table, metadata)


def components(
    offsets: Float[np.ndarray, "layer head rows columns"], share: float = 0.95
) -> Float[np.ndarray, "row component"]:
    """Principal components of the square roots (Hellinger's distance), for `share` of variance."""
    roots = np.sqrt(offsets.reshape(offsets.shape[0] * offsets.shape[1], -1).astype(float))
    left, sizes, _ = np.linalg.svd(roots - roots.mean(0), full_matrices=False)
    held = np.cumsum(sizes**2) / max((sizes**2).sum(), 1e-30)
    n = int(np.searchsorted(held, share)) + 1
    return left[:, :n] * sizes[:n]


def clustered(
    codes: Float[np.ndarray, "row component"], most: int, seed: int
) -> Int[np.ndarray, " row"]:
    """k-means clusters, numbered by size; k from 2 to `most` by the best mean silhouette."""
    best, found = -1.0, np.zeros(len(codes), np.int64)
    for k in range(2, min(most, len(codes) - 1) + 1):
        for draw in range(10):
            rng = np.random.default_rng([seed, k, draw])
            try:
                _, labels = kmeans2(codes, k, minit="++", missing="raise", rng=rng)
            except ClusterError:  # an empty cluster: another draw may do
                continue
            score = silhouette(codes, labels)
            if score > best:
                best, found = score, labels.astype(np.int64)
    order = np.argsort(-np.bincount(found), kind="stable")
    return np.argsort(order, kind="stable")[found]


def silhouette(codes: Float[np.ndarray, "row component"], labels: Int[np.ndarray, " row"]) -> float:
    """Mean of (b - a) / max(a, b): a row's distance to its own cluster and to the next one."""
    kinds = np.unique(labels)
    if len(kinds) < 2:
        return -1.0
    apart = cdist(codes, codes)
    means = np.stack([apart[:, labels == kind].sum(1) for kind in kinds], axis=1)
    sizes = np.array([(labels == kind).sum() for kind in kinds])
    own = np.searchsorted(kinds, labels)
    rows = np.arange(len(codes))
    inside = means[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = means / sizes
    means[rows, own] = np.inf
    outside = means.min(1)
    value = (outside - inside) / np.maximum(np.maximum(outside, inside), 1e-30)
    return float(np.where(sizes[own] > 1, value, 0).mean())
