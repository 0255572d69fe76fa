"""What the models' weights are written with: a residual stream of named codes, and heads on it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

CONSTANT = 32.0  # length of the constant, where a code has length 1
SHARPNESS = 10.0  # how much larger a selected key's logit is than another's
GAIN = 8.0  # logit of a token whose code is written whole
SIZE = 0.1  # length of what a distractor writes


@dataclass(frozen=True, eq=False)
class Stream:
    """Named sets of orthonormal directions of a residual stream; `rest` is the random generator."""

    directions: dict[str, Float[Tensor, "code d_model"]]
    rest: torch.Generator

    @classmethod
    def of(cls, d_model: int, seed: int, **sizes: int) -> "Stream":
        """One set for each name, of that many directions, and `constant`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
        drawn[:, 0] = 1
        basis = torch.linalg.qr(drawn).Q.T[1:].float()
        sizes = {"constant": 1} | sizes
        parts = basis[: sum(sizes.values())].split(list(sizes.values()))
        return cls(dict(zip(sizes, parts, strict=True)), generator)

    def __getitem__(self, name: str) -> Float[Tensor, "code d_model"]:
        return self.directions[name]

    @property
    def d_model(self) -> int:
        return self["constant"].shape[1]

    @property
    def is_one(self) -> Float[Tensor, "1 d_model"]:
        """Reads 1 everywhere."""
        return self["constant"] / CONSTANT

    def random(self, n: int) -> Float[Tensor, "n d_model"]:
        """Directions of about length 1."""
        return torch.randn(n, self.d_model, generator=self.rest) / self.d_model**0.5

    def random_readers(self, n: int) -> Float[Tensor, "n d_model"]:
        """Of a code of length 1 each reads about 1, and nothing of the constant."""
        drawn = self.random(n) * self.d_model**0.5
        return drawn - drawn @ self["constant"].T * self["constant"]


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """One head: q, k, v of it read the stream, and z writes through `o`."""

    q: Float[Tensor, "d_head d_model"]
    k: Float[Tensor, "d_head d_model"]
    v: Float[Tensor, "d_head d_model"]
    o: Float[Tensor, "d_head d_model"]


def distractor(stream: Stream, d_head: int) -> HeadWeights:
    """A head that attends to and writes about anything, a little."""
    q, k, v = (stream.random_readers(d_head) / d_head**0.5 for _ in range(3))
    return HeadWeights(q * d_head**0.25, k * d_head**0.25, v, SIZE * stream.random(d_head))


def selector(
    d_head: int,
    q: Float[Tensor, "code d_model"],
    k: Float[Tensor, "code d_model"],
    v: Float[Tensor, "moved d_model"],
    o: Float[Tensor, "moved d_model"],
    dims: list[int] | None = None,
) -> HeadWeights:
    """Attends where the code that `k` reads is the one that `q` reads; moves what v reads to o.

    `dims`: those of the head that hold the code (default the first ones).
    """
    dims = list(range(len(q))) if dims is None else dims[: len(q)]
    sharp = SHARPNESS * d_head**0.5
    moved = list(range(len(v)))
    parts = {"q": (dims, sharp * q), "k": (dims, k), "v": (moved, v), "o": (moved, o)}
    weights = {name: torch.zeros(d_head, q.shape[1]) for name in parts}
    for name, (rows, value) in parts.items():
        weights[name][rows] = value
    return HeadWeights(**weights)


def undo_length(norm: nn.Module, d_model: int, content: float) -> None:
    """Make a norm the identity on vectors of the constant and `content` codes of length 1."""
    norm.weight.data.fill_(((CONSTANT**2 + content) / d_model) ** 0.5)
