"""Codes of attention maps: an autoencoder sums up what heads draw, image by image.

A map is what the patches of one image give each other in one head, each row a share of 1. Its
square root goes through a small convolutional autoencoder (a latent vector, mean squared error),
trained here on the maps of all heads and images. Roots, since raw maps are mostly told apart by how
sharp they are. A head's code is the mean over images; its `spread` the share of the variance of
codes that is between its images and not between heads:

    spread = mean over images of |code - own mean|^2 / mean over heads and images of |code - mean|^2

Li et al. 2023 (arXiv 2303.13731) make their atlas so; architecture and loss are ours, since the
abstract gives none. Offsets (`interp.analysis.vit.atlas`) need no training: `compared` says how far
the clusters of the two agree.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

from interp.analysis.vit.atlas import clustered
from interp.analysis.vit.patterns import grid_of
from interp.model.attention import Attention
from interp.model.hooked import HookedModel
from interp.model.pictures import Pictures
from interp.model.towers import towers


class MapCoder(nn.Module):
    """Maps of `size` x `size` to `latent` numbers and back, seen as what sets them apart.

    `mean` is the map that all others are compared with, `scale` how far they are from it.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int, latent: int, width: int = 8):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(size, size))
        self.register_buffer("scale", torch.ones(()))
        channels = list(pairwise([1, width, 2 * width, 4 * width]))
        down = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in channels]
        up = [nn.ConvTranspose2d(b, a, 4, stride=2, padding=1) for a, b in channels]
        self.side = -(-size // 8)
        n = 4 * width * self.side**2
        self.down = nn.Sequential(
            down[0], nn.GELU(), down[1], nn.GELU(), down[2], nn.GELU(), nn.Flatten(),
            nn.Linear(n, latent),
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.Linear(latent, n), nn.Unflatten(1, (4 * width, self.side, self.side)),
            up[2], nn.GELU(), up[1], nn.GELU(), up[0],
        )  # fmt: skip

    def forward(self, maps: Float[Tensor, "map size size"]) -> Float[Tensor, "map size size"]:
        return self.draw(self.encode(maps))

    def encode(self, maps: Float[Tensor, "map size size"]) -> Float[Tensor, "map latent"]:
        """The codes of maps."""
        return self.down(((maps - self.mean) / self.scale)[:, None])

    def draw(self, codes: Float[Tensor, "map latent"]) -> Float[Tensor, "map size size"]:
        """The maps that codes stand for."""
        made = interpolate(self.up(codes), (self.size, self.size)).squeeze(1)
        return self.mean + self.scale * made


@dataclass(frozen=True, eq=False)
class MapCodes:
    """Codes of each head on each image; `explained` is the share of held-out variance redrawn."""

    codes: Float[np.ndarray, "image layer head latent"]
    coder: MapCoder
    explained: float
    metadata: dict[str, Any]

    @property
    def by_head(self) -> Float[np.ndarray, "row latent"]:
        """The mean code of each head, layer by layer."""
        mean = self.codes.mean(0)
        return mean.reshape(-1, mean.shape[-1])

    @property
    def spread(self) -> Float[np.ndarray, "layer head"]:
        """How much of the variance of codes is a head's own, from image to image."""
        own = ((self.codes - self.codes.mean(0)) ** 2).sum(-1).mean(0)
        return own / max(((self.codes - self.codes.mean((0, 1, 2))) ** 2).sum(-1).mean(), 1e-30)

    def clusters(self, most: int = 8, seed: int = 0) -> Int[np.ndarray, " row"]:
        """k-means of the heads' mean codes, as in the atlas of offsets."""
        return clustered(self.by_head.astype(float), most, seed)

    @torch.no_grad()
    def drawn(self, codes: Float[np.ndarray, "row latent"]) -> Float[np.ndarray, "row size size"]:
        """The maps that codes stand for, such as the centre of a cluster; rows sum to 1."""
        roots = self.coder.draw(torch.from_numpy(codes).float()).clamp_min(0)
        return ((roots**2) / (roots**2).sum(-1, keepdim=True).clamp_min(1e-12)).numpy()


def map_codes(
    model: HookedModel,
    images,
    *,
    latent: int = 16,
    epochs: int = 15,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> MapCodes:
    """Train the autoencoder on the maps of all heads on `images`, a tenth of these held out.

    Raises `PatternError` where the patches lie on no square grid.
    """
    roots = map_roots(model, images, batch_size=batch_size, progress=progress)
    coder, codes, explained = coded(roots, latent, epochs, seed)
    metadata = {"analysis": "map_codes", "latent": latent, "epochs": epochs, "seed": seed}
    return MapCodes(codes.numpy(), coder, explained, metadata | model.provenance())


def coded(
    roots: Float[Tensor, "image layer head size size"], latent: int, epochs: int, seed: int
) -> tuple[MapCoder, Float[Tensor, "image layer head latent"], float]:
    """An autoencoder of these maps, their codes, and what it explains of those held out."""
    n_images, n_held = len(roots), max(1, len(roots) // 10)
    learned = roots[n_held:].flatten(0, 2) if n_images > 1 else roots.flatten(0, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        coder = MapCoder(roots.shape[-1], latent)
    with torch.enable_grad():
        _train(coder, learned, epochs, generator)
    coder.eval()
    with torch.no_grad():
        parts = roots.flatten(0, 2).split(256)
        codes = torch.cat([coder.encode(part) for part in parts])
        held = roots[:n_held].flatten(0, 2)
        missed = sum(float(((coder(part) - part) ** 2).sum()) for part in held.split(256))
        there = float(((held - learned.mean(0)) ** 2).sum())
    return coder, codes.view(*roots.shape[:3], latent), 1 - missed / max(there, 1e-30)


@torch.no_grad()
def map_roots(
    model: HookedModel, images, *, batch_size: int = 16, progress: bool = True
) -> Float[Tensor, "image layer head query key"]:
    """Square roots of the shares that patches give each other; all in memory."""
    pictures, tower = Pictures.of(model, images), towers(model)["vision"]
    kept: dict[int, list[Tensor]] = {layer: [] for layer in tower.layers}

    def read(attention: Attention, hook, layer: int) -> None:
        first = grid_of(model, attention).n_special
        weights = attention.pattern(queries=slice(first, None))[..., first:]
        kept[layer].append((weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)).sqrt().cpu())

    hooks = [(tower.hook(n, "hook_attention"), partial(read, layer=n)) for n in tower.layers]
    with model.hooks(fwd_hooks=hooks):
        for inputs in pictures.batches(batch_size, "maps" if progress else None):
            pictures.run(inputs)
    return torch.stack([torch.cat(kept[layer]) for layer in tower.layers], dim=1)


def compared(one: Int[np.ndarray, " row"], other: Int[np.ndarray, " row"]) -> float:
    """Adjusted Rand index of two clusterings: 1 where they are the same, 0 as by chance.

    Hubert & Arabie 1985: pairs that are together in both, minus what is expected of sizes alone.
    """
    table = np.zeros((int(one.max()) + 1, int(other.max()) + 1))
    np.add.at(table, (one, other), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, ours, theirs = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = ours * theirs / max(pairs(np.array([len(one)])), 1e-30)
    most = (ours + theirs) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _train(
    coder: MapCoder, maps: Float[Tensor, "map size size"], epochs: int, generator: torch.Generator
) -> None:
    coder.mean.copy_(maps.mean(0))
    coder.scale.copy_((maps - coder.mean).pow(2).mean().sqrt().clamp_min(1e-6))
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(maps), generator=generator).split(64):
            loss = mse_loss(coder(maps[rows]), maps[rows]) / coder.scale**2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
