"""The edits that an `Attention` composes: two on the logits, then two on the weights.

An edit speaks of the whole layer, `[batch head query key]`, with axes of size 1 where it says the
same along them; it is applied to one `Block` of query rows at a time and returns a new tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import UserError

# Receivers that hold less than this have directions made of rounding noise: the row is left alone.
LEAST_RECEIVED = 1e-6


class EditError(UserError):
    """An edit of attention that has no meaning."""


@dataclass(frozen=True, eq=False)
class Block:
    """Which part of a layer is being computed: heads (None: all), query rows, the first keys.

    `first` is the first of the rows, where that is known without asking the GPU.
    """

    heads: Int[Tensor, " heads"] | None
    rows: Int[Tensor, " rows"]
    n_keys: int
    first: int | None = None

    @property
    def first_row(self) -> int:
        """Of one row or more."""
        return int(self.rows.min()) if self.first is None else self.first

    def of(self, whole: Tensor) -> Tensor:
        """This block's part of a tensor that broadcasts to `[batch head query key]`."""
        if self.heads is not None and whole.shape[1] > 1:
            whole = whole[:, self.heads]
        if whole.shape[2] > 1:
            whole = whole[:, :, self.rows]
        return whole[..., : self.n_keys] if whole.shape[3] > 1 else whole


class Edit:
    """An edit, and which heads it may touch."""

    on_logits: ClassVar[bool]
    heads: Any  # Bool[Tensor, "1 heads 1 1"]

    def apply(self, values: Tensor, block: Block, visible: Tensor | None) -> Tensor:
        """A block of logits, or of weights, edited."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Bias(Edit):
    """logits + delta at the chosen heads, queries and keys."""

    delta: Float[Tensor, "#batch #head #query #key"] | Callable[[Tensor], Tensor]
    heads: Bool[Tensor, "1 heads 1 1"]
    queries: Bool[Tensor, "1 1 queries 1"]
    keys: Bool[Tensor, "1 1 1 keys"]
    on_logits: ClassVar[bool] = True

    def apply(self, values: Tensor, block: Block, visible: Tensor | None) -> Tensor:
        delta = self.delta(values) if callable(self.delta) else block.of(self.delta)
        chosen = block.of(self.heads) & block.of(self.queries) & block.of(self.keys)
        return torch.where(chosen, values + delta, values)


@dataclass(frozen=True, eq=False)
class Temperature(Edit):
    """logits / temperature, per head and query; 1 where a head is not chosen."""

    temperature: Float[Tensor, "#batch head #query 1"]
    heads: Bool[Tensor, "1 heads 1 1"]
    on_logits: ClassVar[bool] = True

    def apply(self, values: Tensor, block: Block, visible: Tensor | None) -> Tensor:
        return torch.where(block.of(self.heads), values / block.of(self.temperature), values)


@dataclass(frozen=True, eq=False)
class Rescale(Edit):
    """Weights of `keys` times `factor`; `receivers` take up the freed mass in proportion."""

    keys: Bool[Tensor, "#batch #head #query key"]
    receivers: Bool[Tensor, "#batch #head #query key"]
    factor: Float[Tensor, "#batch #head #query 1"]
    rows: Bool[Tensor, "#batch #head #query 1"]
    heads: Bool[Tensor, "1 heads 1 1"]
    on_logits: ClassVar[bool] = False

    def apply(self, values: Tensor, block: Block, visible: Tensor | None) -> Tensor:
        keys, receivers = block.of(self.keys), block.of(self.receivers)
        freed = 1 - block.of(self.factor)
        given = (values * keys).sum(-1, keepdim=True)
        held = (values * receivers).sum(-1, keepdim=True)
        gain = freed * given / held.clamp_min(LEAST_RECEIVED)
        edited = values * (1 - freed * keys + gain * receivers)
        chosen = block.of(self.heads) & block.of(self.rows) & (held >= LEAST_RECEIVED)
        return torch.where(chosen, edited, values)


@dataclass(frozen=True, eq=False)
class SetRows(Edit):
    """Whole rows replaced: by `weights`, or (None) by equal weights on all visible keys."""

    weights: Float[Tensor, "#batch #head #query key"] | None
    rows: Bool[Tensor, "#batch #head #query 1"]
    heads: Bool[Tensor, "1 heads 1 1"]
    on_logits: ClassVar[bool] = False

    @property
    def any_key(self) -> bool:
        """Given weights may lie on hidden keys too."""
        return self.weights is not None

    def apply(self, values: Tensor, block: Block, visible: Tensor | None) -> Tensor:
        if self.weights is not None:
            new = block.of(self.weights).to(values.dtype)
        elif visible is None:
            new = torch.full_like(values, 1 / values.shape[-1])
        else:
            seen = visible.sum(-1, keepdim=True).clamp_min(1)
            new = (visible / seen).to(values.dtype)
        return torch.where(block.of(self.heads) & block.of(self.rows), new, values)


@dataclass(frozen=True, eq=False)
class Deferred(Edit):
    """An edit of weights that is made when somebody asks for them."""

    make: Callable[[], Edit]
    on_logits: ClassVar[bool] = False

    @cached_property
    def heads(self) -> Bool[Tensor, "1 heads 1 1"]:
        return self._made.heads

    def apply(self, values: Tensor, block: Block, visible: Tensor | None) -> Tensor:
        return self._made.apply(values, block, visible)

    @cached_property
    def _made(self) -> Edit:
        return self.make()
