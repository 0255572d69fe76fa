"""Attention some of whose rows give a share of what donors hold to receivers, from few rows.

With a_ij the weights of row i, D the donors, R the receivers (disjoint), m_i and r_i their masses
in it, and p_i the share that is moved,

    a'_id = (1 - p_i) a_id for d in D,    a'_ij = a_ij (1 + p_i m_i / r_i) for j in R

and so, with u_A the sum over j in A of a_ij v_j,

    z'_i = z_i + p_i ((m_i / r_i) u_R - u_D)

which needs the weights of the rows that are edited, and leaves all others to the fast kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from interp.model.attention import Attention
from interp.model.edits import LEAST_RECEIVED, Deferred, Rescale


class Moved(NamedTuple):
    """In which rows weight is moved, and how much of what the donors hold."""

    rows: Bool[Tensor, "batch head rows"]
    share: Float[Tensor, "#batch #head #rows"] | float


Choose = Callable[
    [Float[Tensor, "batch head rows set"], Bool[Tensor, "batch 1 rows"], Int[Tensor, " rows"]],
    Moved,
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Redistributed(Attention):
    """What `redistributed` gives: an `Attention` with one more edit, whose output is known.

    With another edit on top, or anything else changed, it is an `Attention` like any other.
    """

    base: Attention
    queries: Int[Tensor, " rows"]
    chosen: Bool[Tensor, "batch head rows"]
    added: Float[Tensor, "batch head rows d_value"]

    def output(self) -> Float[Tensor, "batch head query d_value"]:
        """z, as `Attention.output`."""
        more = len(self.edits) > len(self.base.edits) + 1
        if more or not self.differs_in_edits_only(self.base):
            return super().output()
        z = self.base.output()
        every = len(self.queries) == self.n_queries
        before = z if every else z[:, :, self.queries]
        after = torch.where(self.chosen[..., None], (before + self.added).to(z.dtype), before)
        return after if every else z.index_copy(2, self.queries, after)


def redistributed(
    attention: Attention,
    sets: Bool[Tensor, "batch set key"],
    allowed: Bool[Tensor, "batch query"],
    queries: Int[Tensor, " rows"],
    choose: Choose,
) -> Attention:
    """Move weight from the first of some sets of keys to the second, in rows that `choose` says.

    Only `allowed` rows are edited; `queries` are those that any prompt allows, in order. `choose`
    is asked block by block: what rows hold on each set, which are allowed, and their numbers. The
    same as `attention.rescale(donors, 1 - share, receivers, rows=...)`, and less work. A row whose
    receivers hold less than 1e-6 stays as it is; without any row left, `attention` itself.
    """
    every = len(queries) == attention.n_queries
    members, found = sets.float(), []
    for rows, weights in attention.blocks(None, None if every else queries):
        seen = members[..., : weights.shape[-1]]
        mass = (weights.flatten(1, 2) @ seen.mT).unflatten(1, weights.shape[1:3])
        may = allowed[:, None] if len(rows) == allowed.shape[1] else allowed[:, None, rows]
        moved = choose(mass, may, rows)
        given, held = mass[..., 0], mass[..., 1]
        here = moved.rows & may & (held >= LEAST_RECEIVED)
        if not bool(here.any()):
            continue
        share = here * moved.share
        gain = share * given / held.clamp_min(LEAST_RECEIVED)
        change = torch.stack([-share, gain], dim=-1) @ seen[:, None, :2]
        found.append((rows, here, share, _mixed(weights * change, attention)))
    if not found:
        return attention
    parts = zip(zip(*found, strict=True), (0, 2, 2, 2), strict=True)
    queries, chosen, share, added = (_joined(blocks, axis) for blocks, axis in parts)
    edit = Deferred(partial(_edit, sets, queries, chosen, share, attention.n_queries))
    facts = attention.facts() | {"edits": (*attention.edits, edit)}
    return Redistributed(**facts, base=attention, queries=queries, chosen=chosen, added=added)


def _edit(
    sets: Bool[Tensor, "batch set key"],
    queries: Int[Tensor, " rows"],
    chosen: Bool[Tensor, "batch head rows"],
    share: Float[Tensor, "batch head rows"],
    n_queries: int,
) -> Rescale:
    """What `attention.rescale` would make of it, for all rows of the layer."""

    def in_all_rows(part: Shaped[Tensor, "batch head rows"]) -> Tensor:
        whole = part.new_zeros(*part.shape[:2], n_queries)
        return whole.index_copy(2, queries, part)[..., None]

    donors, receivers = (sets[:, None, None, which] for which in (0, 1))
    heads = chosen.new_ones(1, chosen.shape[1], 1, 1)
    return Rescale(donors, receivers, 1 - in_all_rows(share), in_all_rows(chosen), heads)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Blocks of rows, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _mixed(
    weights: Float[Tensor, "batch head rows seen_keys"], attention: Attention
) -> Float[Tensor, "batch head rows d_value"]:
    """Weights times values, the query heads of a key-value head together."""
    v = attention.v[:, :, : weights.shape[-1]].float()
    stacked = weights.reshape(len(v), v.shape[1], -1, weights.shape[-1])
    return (stacked @ v).view(*weights.shape[:3], v.shape[-1])
