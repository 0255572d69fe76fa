"""Corruption by noise: the clean prompt with Gaussian noise on the embeddings of chosen tokens.

Source: causal tracing in Meng et al. 2022, ROME (arXiv 2202.05262). It takes the model off its
distribution, and gives other maps than a natural second prompt does (Zhang & Nanda 2024, arXiv
2309.16042), which is to be preferred where there is one.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.analysis.paired import PairBatch, PairError
from interp.model.hooked import HookedModel


@dataclass(frozen=True)
class Noise:
    """Corrupt by Gaussian noise on the embeddings of the tokens at the positions `at`.

    Its standard deviation is `scale` times that of the model's token embeddings (3 in ROME). The
    draw of a pair depends on `seed` and its tokens alone.
    """

    at: str | tuple[str, ...]
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "at", (self.at,) if isinstance(self.at, str) else tuple(self.at))
        if not self.at or self.scale <= 0:
            raise PairError(f"at={self.at}, scale={self.scale}: some positions, and above 0.")


def noisy_columns(batch: PairBatch, corruption: Noise) -> Bool[Tensor, "batch token"]:
    places = torch.arange(batch.n_tokens, device=batch.right.device)
    return torch.stack([places == batch.columns(at)[:, None] for at in corruption.at]).any(0)


@contextmanager
def noised(model: HookedModel, batch: PairBatch, corruption: Noise) -> Iterator[None]:
    """Adds the noise to the embeddings of the batch's clean prompts, if they run in the block."""
    where = noisy_columns(batch, corruption)
    sigma = corruption.scale * _embedding_spread(model)
    noise = torch.zeros(*where.shape, model.cfg.d_model)
    for row, real in enumerate(batch.attention_mask.bool()):
        own = zlib.crc32(str(batch.clean.input_ids[row, real].tolist()).encode())
        generator = torch.Generator().manual_seed(own + corruption.seed)
        n_tokens = int(real.sum())
        noise[row, -n_tokens:] = torch.randn(n_tokens, model.cfg.d_model, generator=generator)
    noise *= sigma

    def add(value: Tensor, hook) -> Tensor | None:
        if value.shape[:2] != where.shape:
            return None  # a replay, which does not use what is embedded
        return torch.where(where[..., None], value + noise.to(value), value)

    with model.hooks(fwd_hooks=[("hook_embed", add)]):
        yield


def _embedding_spread(model: HookedModel) -> float:
    """Standard deviation of the numbers of token embeddings, over tokens spread evenly."""
    count = int(model.cfg.d_vocab)
    tokens = torch.arange(0, count, max(1, count // 2000), device=model.cfg.device)
    return float(model.embed(tokens[None]).float().std())
