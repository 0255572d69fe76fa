"""Positions given anew: where each query stands when it looks at one group of keys or another.

Rotated logits know only the distance of query and key, and moving a key by s is moving the query by
-s. So keys stay as they are (in the cache, too), and query i is turned once for each group g:

    s_ij = scale * (R(at_ig) q_i) . (R(t_j) k_j)        for key j of group g at its position t_j

One product with each key, as before; only queries are turned, one time for each group.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.edits import Block

if TYPE_CHECKING:
    from interp.model.attention import Attention


@dataclass(frozen=True, eq=False)
class Groups:
    """Keys by group: `columns[b, g]` are the keys of group g, `real` of them, filled up with 0.

    `slot` says where a key went, as one index into `[group place]`; -1: it is in no group.
    """

    group: Int[Tensor, "batch key"]
    columns: Int[Tensor, "batch group place"]
    real: Bool[Tensor, "batch group place"]
    slot: Int[Tensor, "batch key"]

    @classmethod
    def of(cls, group: Int[Tensor, "batch key"], n_groups: int) -> "Groups":
        """From each key's group; -1: in none."""
        batch, n_keys = group.shape
        there = group >= 0
        order = torch.where(there, group, n_groups).argsort(dim=1, stable=True)
        sizes = torch.zeros(batch, n_groups + 1, dtype=torch.long, device=group.device)
        sizes = sizes.scatter_add(1, torch.where(there, group, n_groups), torch.ones_like(group))
        first = sizes.cumsum(1) - sizes
        rank = torch.empty_like(order).scatter(
            1, order, torch.arange(n_keys, device=group.device).expand_as(order)
        )
        place = rank - first.gather(1, torch.where(there, group, n_groups))
        longest = int(sizes[:, :n_groups].max()) if n_groups else 0
        slot = torch.where(there, group * longest + place, n_groups * longest)
        columns = torch.zeros(
            batch, n_groups * longest + 1, dtype=torch.long, device=group.device
        ).scatter(1, slot, torch.arange(n_keys, device=group.device).expand_as(slot))
        real = torch.arange(longest, device=group.device) < sizes[:, :n_groups, None]
        columns = columns[:, :-1].view(batch, n_groups, longest) * real
        return cls(group, columns, real, torch.where(there, slot, -1))

    def gather(
        self, x: Float[Tensor, "batch head key d"]
    ) -> Float[Tensor, "batch head group place d"]:
        """Keys (or values) put together by group; what fills a group up means nothing."""
        index = self.columns.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
        return x.gather(2, index).unflatten(2, self.columns.shape[1:])


@dataclass(frozen=True, eq=False)
class Places:
    """Positions `at` of queries by group of keys, as `Attention.reposition` has them."""

    groups: Groups
    at: Int[Tensor, "#batch #head query group"]
    base: Int[Tensor, "#batch #head query"] | None = None
    seen: Bool[Tensor, "#batch #head query group"] | None = None

    @classmethod
    def of(cls, group: Int[Tensor, "batch key"], at: Tensor, base=None, seen=None) -> "Places":
        """From each key's group."""
        return cls(Groups.of(group, at.shape[-1]), at, base, seen)

    def logits(
        self, attention: "Attention", block: Block
    ) -> Float[Tensor, "batch heads rows seen_keys"]:
        """Scaled products of a block's queries, turned anew, with its keys."""
        q = _of(attention.q_unrotated, block) * attention.scale
        by_group = self._by_group(attention, q, block)
        slot = self.groups.slot[:, None, None, : block.n_keys]
        found = by_group.gather(-1, slot.clamp_min(0).expand(*by_group.shape[:3], -1))
        if self.base is None:
            return torch.where(slot >= 0, found, 0.0)
        at = _of(self.base, block)
        turned = attention.rotate(q, at if at.shape[1] > 1 else at[:, 0])
        others = attention.product(turned, attention.keys_transposed, block)
        return torch.where(slot >= 0, found, others)

    def hide(
        self, logits: Float[Tensor, "batch heads rows seen_keys"], block: Block
    ) -> Float[Tensor, "batch heads rows seen_keys"]:
        """-inf where a query may not look at a key's group."""
        if self.seen is None:
            return logits
        group, seen = self.groups.group[:, None, None, : block.n_keys], _of(self.seen, block)
        seen = seen.gather(-1, group.clamp_min(0).expand(*seen.shape[:3], -1))
        return logits.masked_fill(~seen & (group >= 0), -torch.inf)

    def _by_group(
        self, attention: "Attention", q: Float[Tensor, "batch heads rows d_head"], block: Block
    ) -> Float[Tensor, "batch heads rows slot"]:
        """Each query with each key of each group, side by side."""
        turned = attention.rotate(q[:, :, :, None], _of(self.at, block)).transpose(2, 3)
        keys = attention.keys_by_group
        share = attention.n_heads // keys.shape[1]
        if block.heads is not None:
            return (turned @ keys[:, block.heads // share]).transpose(2, 3).flatten(3)
        # one product per kv head and group, the rows of its query heads stacked
        stacked = turned.unflatten(1, (keys.shape[1], share)).transpose(2, 3).flatten(3, 4)
        found = (stacked @ keys).unflatten(3, (share, len(block.rows)))
        return found.permute(0, 1, 3, 4, 2, 5).flatten(1, 2).flatten(3)


def _of(x: Tensor, block: Block) -> Tensor:
    """The heads and rows of a block."""
    if block.heads is not None and x.shape[1] > 1:
        x = x[:, block.heads]
    return x[:, :, block.rows]
