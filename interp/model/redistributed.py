"""Attention some of whose rows give a share of what donors hold to receivers, from few rows.

With a_ij the weights of row i, D the donors, R the receivers (disjoint), m_i and r_i their masses
in it, and p_i the share that is moved,

    a'_id = (1 - p_i) a_id for d in D,    a'_ij = a_ij (1 + p_i m_i / r_i) for j in R

and so, with u_A the sum over j in A of a_ij v_j,

    z'_i = z_i + p_i ((m_i / r_i) u_R - u_D)

which needs the weights of the rows that are edited, and leaves all others to the fast kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.attention import Attention
from interp.model.edits import LEAST_RECEIVED, Rescale


class Moved(NamedTuple):
    """In which rows weight is moved, and how much of what the donors hold."""

    rows: Bool[Tensor, "batch head rows"]
    share: Float[Tensor, "#batch #head #rows"]


Choose = Callable[[Float[Tensor, "batch head rows set"], Int[Tensor, " rows"]], Moved]


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
    sets: Bool[Tensor, "batch key set"],
    queries: Int[Tensor, " rows"],
    choose: Choose,
) -> Attention:
    """Move weight from the first of some sets of keys to the second, in rows that `choose` says.

    `choose` is asked block by block: what rows hold on each set, and which rows they are. The same
    as `attention.rescale(donors, 1 - share, receivers, rows=...)`, and less work. A row whose
    receivers hold less than 1e-6 stays as it is; without any row left, `attention` itself.
    """
    shares, chosen, added = [], [], []
    for rows, weights in attention.blocks(None, queries):
        members = sets[:, None, : weights.shape[-1]].to(weights.dtype)
        mass = weights @ members
        given, held = mass[..., 0], mass[..., 1]
        moved = choose(mass, rows)
        here = moved.rows & (held >= LEAST_RECEIVED)
        share = torch.where(here, moved.share, 0.0)
        gain = share * given / held.clamp_min(LEAST_RECEIVED)
        change = torch.stack([-share, gain], dim=-1) @ members[..., :2].transpose(-1, -2)
        shares.append(share)
        chosen.append(here)
        added.append(_mixed(weights * change, attention))
    if not any(bool(part.any()) for part in chosen):
        return attention
    whole = _joined(chosen)
    shape = len(sets), attention.n_heads, attention.n_queries
    edit = Rescale(
        keys=sets[:, None, None, :, 0],
        receivers=sets[:, None, None, :, 1],
        factor=1 - _in_all_rows(_joined(shares), queries, shape)[..., None],
        rows=_in_all_rows(whole, queries, shape)[..., None],
        heads=torch.ones(1, shape[1], 1, 1, dtype=torch.bool, device=sets.device),
    )
    facts = {field.name: getattr(attention, field.name) for field in fields(Attention)}
    facts["edits"] = (*attention.edits, edit)
    return Redistributed(
        **facts, base=attention, queries=queries, chosen=whole, added=_joined(added)
    )


def _joined(parts: list[Tensor]) -> Tensor:
    """Blocks of rows, one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _mixed(
    weights: Float[Tensor, "batch head rows seen_keys"], attention: Attention
) -> Float[Tensor, "batch head rows d_value"]:
    """Weights times values, the query heads of a key-value head together."""
    v = attention.v[:, :, : weights.shape[-1]].float()
    stacked = weights.reshape(len(v), v.shape[1], -1, weights.shape[-1])
    return (stacked @ v).view(*weights.shape[:3], v.shape[-1])


def _in_all_rows(part: Tensor, queries: Int[Tensor, " rows"], shape: tuple[int, int, int]):
    """At its rows; 0 in all others."""
    if len(queries) == shape[2]:
        return part
    return part.new_zeros(shape).index_copy(2, queries, part)
