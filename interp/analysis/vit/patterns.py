"""Where the heads of an image encoder look: how far away, in which direction, and is it always so?

The patches of an image lie on a grid of g x g; D(i, j) = max(|rows apart|, |columns apart|) is how
many hops patch j is from patch i (square rings; 0 is i itself). With a_ij a head's weights,

    s_k = mean over images and patches i of  [sum of a_ij over patches j with D = k] / [sum over all
          patches j]

its *hop profile*, k = 0 ... g - 1, which sums to 1. Rings grow with k, so s_k is set against the
u_k of a head that looks at all patches alike: s_k / u_k is the *excess*.

Everything about direction and distance is in the *offsets*: the same shares, by (rows, columns)
from i to j, [2g - 1, 2g - 1]. s_k is its sum over a ring. What offsets don't show:

- `on_special`: mean weight from patches to tokens that are no patch (CLS, distillation, registers);
- `key_share`: the largest share that one patch gets, whoever looks: high for a sink;
- `spread`: with A_i row i of the head's map over patches and A its mean over n images,

      spread = n / (n - 1) * sum_i (mean |A_i|^2 - |mean A_i|^2) / sum_i mean |A_i|^2

  the share of the map that changes from image to image: 0 for one that ignores what it sees.

Source of the three readouts: Li et al. 2023, "How Does Attention Work in Vision Transformers? A
Visual Analytics Attempt" (arXiv 2303.13731), which has no public code; its abstract names k-hop
profiles and an atlas of patterns, the formulas are ours.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import UserError
from interp.model.attention import Attention
from interp.model.hooked import HookedModel
from interp.model.pictures import Pictures
from interp.model.towers import Tower, towers

CLEAR = 0.5  # a head that gives so much to one kind of offset is called after it
EVEN = 0.25  # total variation from looking at all patches alike


class PatternError(UserError):
    """Images whose patches lie on no square grid, or patterns that nothing can be told from."""


@dataclass(frozen=True)
class Grid:
    """g x g patches, row by row, behind `n_special` other tokens."""

    side: int
    n_special: int

    @property
    def hops(self) -> Int[Tensor, "patch patch"]:
        """How many hops from each patch to each."""
        rows, columns = (part.abs() for part in self._apart)
        return torch.maximum(rows, columns)

    @property
    def offsets(self) -> Int[Tensor, "patch patch"]:
        """Which cell of the offsets, counted row by row, leads from each patch to each."""
        rows, columns = (part + self.side - 1 for part in self._apart)
        return rows * (2 * self.side - 1) + columns

    @property
    def ring_of_offset(self) -> Int[np.ndarray, "rows columns"]:
        """How many hops an offset is."""
        apart = np.abs(np.arange(1 - self.side, self.side))
        return np.maximum(apart[:, None], apart[None, :])

    @property
    def even_offsets(self) -> Float[np.ndarray, "rows columns"]:
        """The offsets of a head that looks at all patches alike."""
        width = 2 * self.side - 1
        counts = torch.bincount(self.offsets.flatten(), minlength=width**2)
        return (counts / self.side**4).reshape(width, width).double().numpy()

    @property
    def even_hops(self) -> Float[np.ndarray, " hop"]:
        """u_k: the hop profile of a head that looks at all patches alike."""
        return (np.bincount(self.hops.flatten().numpy()) / self.side**4).astype(float)

    @property
    def _apart(self) -> tuple[Int[Tensor, "patch patch"], Int[Tensor, "patch patch"]]:
        place = torch.arange(self.side**2)
        row, column = place // self.side, place % self.side
        return row[None, :] - row[:, None], column[None, :] - column[:, None]


@dataclass(frozen=True, eq=False)
class Looked:
    """What an encoder's heads looked at; arrays start [layer, head] or [image, layer, head]."""

    grid: Grid
    layers: tuple[int, ...]
    hops: Float[np.ndarray, "image layer head hop"]
    offsets: Float[np.ndarray, "layer head rows columns"]
    on_special: Float[np.ndarray, "image layer head"]
    key_share: Float[np.ndarray, "layer head"]
    spread: Float[np.ndarray, "layer head"]
    metadata: dict[str, Any]

    @property
    def columns(self) -> pd.DataFrame:
        """A row a head, in the order of `HeadScores`: what `vit_heads` adds to its table."""
        profile = self.hops.mean(0)
        ring = np.arange(self.grid.side)
        n_layers, n_heads = self.spread.shape
        found = {
            "mean_hop": profile @ ring,
            "near": profile[..., :2].sum(-1),
            "on_special": self.on_special.mean(0),
            "key_share": self.key_share,
            "spread": self.spread,
            **{f"hop_{k}": profile[..., k] for k in ring},
        }
        table = pd.DataFrame({name: value.reshape(-1) for name, value in found.items()})
        table.insert(0, "layer", np.repeat(self.layers, n_heads))
        table.insert(1, "head", np.tile(np.arange(n_heads), n_layers))
        return table

    @property
    def kinds(self) -> list[str]:
        """What each head draws, in a word or two; see `kind_of`."""
        flat = self.offsets.reshape(-1, *self.offsets.shape[2:])
        shares = self.key_share.reshape(-1)
        return [kind_of(o, float(s), self.grid) for o, s in zip(flat, shares, strict=True)]


@torch.no_grad()
def look_at_patterns(
    model: HookedModel, images, *, batch_size: int = 32, progress: bool = True
) -> Looked:
    """One pass over the images: what `Looked` holds of every head of the encoder."""
    pictures = Pictures.of(model, images)
    tower = towers(model)["vision"]
    kept: dict[int, list[tuple[Tensor, ...]]] = defaultdict(list)
    grids: set[Grid] = set()

    def read(attention: Attention, hook, layer: int) -> None:
        grid = grid_of(model, attention)
        grids.add(grid)
        kept[layer].append(offset_shares(attention, grid))

    hooks = [(tower.hook(n, "hook_attention"), partial(read, layer=n)) for n in tower.layers]
    with model.hooks(fwd_hooks=hooks):
        for inputs in pictures.batches(batch_size, "patterns" if progress else None):
            pictures.run(inputs)
    (grid,) = grids
    return _looked(kept, grid, tower, {"images": pictures.describe(), **model.provenance()})


def grid_of(model: HookedModel, attention: Attention) -> Grid:
    """The grid of the patches in an encoder's attention; what is more stands before them.

    Raises `PatternError` where there is none: patches packed together, images of another shape.
    """
    config = model.original_model.config
    config = getattr(config, "vision_config", config)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        raise PatternError(
            f"model: {model.name} ({model.cfg.architecture}) has no grid of patches that is the "
            "same for all images, so distances in it have no common meaning."
        )
    side = size // patch
    n_special = attention.n_queries - side**2
    if not 0 <= n_special <= 8 or attention.n_keys != attention.n_queries:
        raise PatternError(
            f"images: {attention.n_queries} tokens, where {model.name} has {side} x {side} patches;"
            f" give images of {size} x {size} pixels."
        )
    return Grid(side, n_special)


def _looked(
    kept: dict[int, list[tuple[Tensor, ...]]], grid: Grid, tower: Tower, metadata: dict[str, Any]
) -> Looked:
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    width = 2 * grid.side - 1
    rings = np.eye(grid.side)[grid.ring_of_offset.reshape(-1)]
    for layer in tower.layers:
        offsets, special = (torch.cat(part).double() for part in list(zip(*kept[layer]))[:2])
        maps, squares = (torch.stack(part).double().sum(0) for part in list(zip(*kept[layer]))[2:])
        n_images = len(offsets)
        mean = maps / n_images
        squares = squares / n_images
        change = (squares - (mean**2).sum(-1)).sum(-1) / squares.sum(-1)
        found["hops"].append(offsets.cpu().numpy() @ rings)
        found["offsets"].append(offsets.mean(0).cpu().numpy().reshape(-1, width, width))
        found["on_special"].append(special.cpu().numpy())
        found["key_share"].append(mean.mean(1).amax(-1).cpu().numpy())
        spread = change * n_images / (n_images - 1) if n_images > 1 else change * float("nan")
        found["spread"].append(spread.cpu().numpy())
    by_image = {name: np.stack(found[name], axis=1) for name in ("hops", "on_special")}
    rest = {name: np.stack(found[name]) for name in ("offsets", "key_share", "spread")}
    return Looked(grid=grid, layers=tower.layers, metadata=metadata, **by_image, **rest)


def offset_shares(
    attention: Attention, grid: Grid
) -> tuple[
    Float[Tensor, "image head offset"],
    Float[Tensor, "image head"],
    Float[Tensor, "head patch patch"],
    Float[Tensor, "head patch"],
]:
    """Offsets and mass on special tokens of each image; sums over images of maps and their squares.

    Some query rows at a time; rows are shares of what they give to patches.
    """
    n_images, n_heads = attention.q.shape[:2]
    offsets = attention.q.new_zeros(
        n_images, n_heads, (2 * grid.side - 1) ** 2, dtype=torch.float32
    )
    special = offsets.new_zeros(n_images, n_heads)
    maps = offsets.new_zeros(n_heads, grid.side**2, grid.side**2)
    squares = offsets.new_zeros(n_heads, grid.side**2)
    cells = grid.offsets.to(offsets.device)
    for rows, weights in attention.blocks(queries=slice(grid.n_special, None)):
        patches = rows - grid.n_special
        special += weights[..., : grid.n_special].sum((-2, -1)) / grid.side**2
        weights = weights[..., grid.n_special :]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        where = cells[patches].flatten().expand(n_images, n_heads, -1)
        offsets.scatter_add_(2, where, weights.flatten(2) / grid.side**2)
        maps[:, patches] += weights.sum(0)
        squares[:, patches] += (weights**2).sum((0, -1))
    return offsets, special, maps, squares


def kind_of(offsets: Float[np.ndarray, "rows columns"], key_share: float, grid: Grid) -> str:
    """What a head draws, by where more than half of its attention to patches goes.

    "self", "neighbour up|down|left|right|..." (one of the eight), "ring 1" (all of them together),
    "row", "column", "few keys" (one patch has it, whoever looks), "even" (nearly all alike); else
    "near" or "far" by its mean hop against that of an even head.
    """
    middle = grid.side - 1
    ring = grid.ring_of_offset
    if key_share > CLEAR:
        return "few keys"
    if offsets[middle, middle] > CLEAR:
        return "self"
    row, column = np.unravel_index(offsets.argmax(), offsets.shape)
    if ring[row, column] == 1 and offsets[row, column] > CLEAR:
        words = ("up", "", "down")[row - middle + 1], ("left", "", "right")[column - middle + 1]
        return "neighbour " + " ".join(filter(None, words))
    if offsets[ring == 1].sum() > CLEAR:
        return "ring 1"
    if offsets[middle].sum() > CLEAR:
        return "row"
    if offsets[:, middle].sum() > CLEAR:
        return "column"
    if np.abs(offsets - grid.even_offsets).sum() / 2 < EVEN:
        return "even"
    return "near" if (offsets * ring).sum() < (grid.even_offsets * ring).sum() else "far"
