"""Attention with some keys damped and all others taking up what that frees, from few columns.

With a_ij the weights of row i, S the keys, m_i their mass in it, and a factor f <= 1,

    a'_is = f a_is for s in S,    a'_ij = c_i a_ij for all others,    c_i = (1 - f m_i) / (1 - m_i)

which keeps each row's sum. The output needs the unedited one and the columns of S only:

    z'_i = c_i z_i + (f - c_i) * sum over S of a_is v_s,    a_is = exp(s_is - lse_i)

Where others hold little of a row this subtracts nearly equal numbers, so a head with such a row is
computed from its weights (`Attention.rescale`, which also says what happens to a row without any
others), and so are a single row, as while decoding, and all attention whose rows do not sum to 1 or
are no plain softmax.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from interp.model.attention import Attention, kept, rows_in_block
from interp.model.edits import LEAST_RECEIVED, Deferred, Rescale

# Others that hold less than this lose a digit and more to the subtraction.
LEAST_LEFT = 0.05


def damped(
    attention: Attention,
    heads: Int[Tensor, " heads"],
    keys: Bool[Tensor, "batch heads #query key"],
    factor: Float[Tensor, "#batch #heads #query"],
    rows: Bool[Tensor, "batch query"],
    each_has_some: bool = False,
) -> Attention:
    """Multiply the weights of each head's `keys` by `factor` in `rows`; the others take it up.

    The same as `attention.rescale(...)` with all others as receivers, and less work. Without any
    key `attention` itself. `each_has_some`: every head is known to have one.
    """
    if not each_has_some:
        some = keys.flatten(2).any(-1).any(0).nonzero().squeeze(1)
        if not len(some):
            return attention
        factor = factor[:, some] if factor.shape[1] > 1 else factor
        heads, keys = heads[some], keys[:, some]
    edit = Deferred(partial(_edit, attention.n_heads, heads, keys, factor, rows))
    edited = replace(attention, edits=(*attention.edits, edit))
    unlike = (attention.softcap, attention.sink_logits, attention.places)
    if attention.edits or any(fact is not None for fact in unlike):
        return edited
    return Damped(
        **edited.facts(), base=attention, heads=heads, keys=keys, factor=factor, rows=rows
    )


def _edit(
    n_heads: int,
    heads: Int[Tensor, " heads"],
    keys: Bool[Tensor, "batch heads #query key"],
    factor: Float[Tensor, "#batch #heads #query"],
    rows: Bool[Tensor, "batch query"],
) -> Rescale:
    """What `attention.rescale` would make of it, for all heads of the layer."""
    whole = keys.new_zeros(len(keys), n_heads, *keys.shape[2:]).index_copy(1, heads, keys)
    if factor.shape[1] > 1:
        every = factor.new_ones(len(factor), n_heads, factor.shape[2])
        factor = every.index_copy(1, heads, factor)
    flags = keys.new_zeros(n_heads).index_fill(0, heads, True)
    return Rescale(
        whole, ~whole, factor[..., None], rows[:, None, :, None], flags[None, :, None, None]
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Damped(Attention):
    """What `damped` gives: an `Attention` with one edit, whose output is the closed form.

    With one more edit, or anything else changed, it is an `Attention` like any other.
    """

    base: Attention
    heads: Int[Tensor, " heads"]
    keys: Bool[Tensor, "batch heads #query key"]
    factor: Float[Tensor, "#batch #heads #query"]
    rows: Bool[Tensor, "batch query"]

    def output(self) -> Float[Tensor, "batch head query d_value"]:
        """z, as `Attention.output`."""
        if len(self.edits) > 1 or not self.differs_in_edits_only(self.base):
            return super().output()
        unedited = self.base.output()
        if self.n_queries == 1:
            return unedited.index_copy(1, self.heads, self._one_row(unedited[:, self.heads]))
        edited, too_close = self._closed_form(unedited[:, self.heads])
        if bool(too_close.any()):
            index = too_close.nonzero().squeeze(1)
            edited = edited.index_copy(1, index, self._mix(self.heads[index]))
        return unedited.index_copy(1, self.heads, edited)

    def _one_row(
        self, unedited: Float[Tensor, "batch heads 1 d_value"]
    ) -> Float[Tensor, "batch heads 1 d_value"]:
        """The heads' z from their weights, which are no more than the keys."""
        ((_, weights),) = self.base.blocks(self.heads)
        given, held = (weights * self.keys).sum(-1), (weights * ~self.keys).sum(-1)
        gain = 1 + (1 - self.factor) * given / held.clamp_min(LEAST_RECEIVED)
        edited = weights * torch.where(self.keys, self.factor[..., None], gain[..., None])
        z = edited @ self.per_query_head(self.v, self.heads).float()
        chosen = self.rows[:, None] & (given > 0) & (held >= LEAST_RECEIVED)
        return torch.where(chosen[..., None], z.to(unedited.dtype), unedited)

    def _closed_form(
        self, unedited: Float[Tensor, "batch heads query d_value"]
    ) -> tuple[Float[Tensor, "batch heads query d_value"], Bool[Tensor, " heads"]]:
        """The heads' z, and which of them have an edited row whose others hold too little."""
        z, lse = self._exact
        columns, there = columns_of(self.keys)
        k, v = self._at(self.k, columns), self._at(self.v, columns)
        size = rows_in_block(columns.numel(), columns.device)
        q = self.q[:, self.heads].float() * self.scale
        parts, least_left = [], []
        for start in range(0, self.n_queries, size):
            rows = slice(start, start + size)
            logits = q[:, :, rows] @ k.transpose(-1, -2)
            seen = there if self.keys.shape[2] == 1 else taken(self.keys[:, :, rows], columns)
            logits, seen = self._masked_at(logits, seen, rows, columns)
            # -inf before the exponential: a hidden key's logit may be far above lse
            shifted = (logits - lse[:, :, rows, None]).masked_fill(~seen, -torch.inf)
            weights = shifted.exp()
            factor = part_of(self.factor, rows)[..., None]
            mass = weights.sum(-1, keepdim=True)
            left = 1 - mass
            gain = (1 - factor * mass) / left.clamp_min(LEAST_LEFT)
            edited = gain * z[:, :, rows] + (factor - gain) * (weights @ v)
            chosen = self.rows[:, None, rows, None] & (mass > 0)
            least_left.append(torch.where(chosen, left, 1.0).amin((0, 2, 3)))
            parts.append(torch.where(chosen, edited.to(unedited), unedited[:, :, rows]))
        if len(parts) == 1:
            return parts[0], least_left[0] < LEAST_LEFT
        return torch.cat(parts, dim=2), torch.stack(least_left).amin(0) < LEAST_LEFT

    @property
    def _exact(
        self,
    ) -> tuple[Float[Tensor, "batch heads query d_value"], Float[Tensor, "batch heads query"]]:
        """z and lse of the unedited heads, float32 or better."""
        base = self.base
        if base._fused is not None and self.q.dtype in (torch.float32, torch.float64):
            return base.output()[:, self.heads], base.lse[:, self.heads]
        return self._alone.output(), self._alone.lse

    @kept
    def _alone(self) -> Attention:
        """The heads by themselves, unedited, in float32."""
        base, mask = self.base, self.mask
        if mask is not None:
            mask = mask[:, self.heads] if mask.shape[1] > 1 else mask
            mask = mask if mask.dtype == torch.bool else mask.float()
        return replace(
            base,
            q=base.q[:, self.heads].float(),
            k=base.per_query_head(base.k, self.heads).float(),
            v=base.per_query_head(base.v, self.heads).float(),
            mask=mask,
        )

    def _at(
        self, x: Tensor, columns: Int[Tensor, "batch heads chosen"]
    ) -> Float[Tensor, "batch heads chosen d"]:
        """Keys or values of the heads at their columns."""
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        kv_heads = self.heads // (self.n_heads // x.shape[1])
        return x[batch, kv_heads[:, None], columns].float()

    def _masked_at(
        self,
        logits: Float[Tensor, "batch heads rows chosen"],
        seen: Bool[Tensor, "batch heads #rows chosen"],
        rows: slice,
        columns: Int[Tensor, "batch heads chosen"],
    ) -> tuple[Tensor, Bool[Tensor, "batch heads #rows chosen"]]:
        """Logits with a float mask's numbers, and which of the keys a row may see."""
        if self.mask is None:
            if self.causal:
                numbers = torch.arange(self.n_queries, device=columns.device)[rows]
                seen = seen & (columns[:, :, None] <= numbers[:, None])
            return logits, seen
        mask = self.mask[:, self.heads] if self.mask.shape[1] > 1 else self.mask
        mask = taken(part_of(mask, rows).expand(*logits.shape[:3], -1), columns)
        if mask.dtype == torch.bool:
            return logits, seen & mask
        return logits + mask.float(), seen & (mask > torch.finfo(mask.dtype).min / 2)


def columns_of(
    keys: Bool[Tensor, "batch heads #query key"],
) -> tuple[Int[Tensor, "batch heads chosen"], Bool[Tensor, "batch heads 1 chosen"]]:
    """The keys that any row has, padded to the most that a head has, and which are no padding."""
    union = keys.squeeze(2) if keys.shape[2] == 1 else keys.any(2)
    there, columns = union.int().topk(int(union.sum(-1).max()), dim=-1)
    return columns, there.bool()[:, :, None]


def taken(
    whole: Shaped[Tensor, "batch heads rows key"], columns: Int[Tensor, "batch heads chosen"]
) -> Shaped[Tensor, "batch heads rows chosen"]:
    """Each head's own columns."""
    index = columns[:, :, None].expand(-1, -1, whole.shape[2], -1)
    return whole.gather(3, index)


def part_of(whole: Tensor, rows: slice) -> Tensor:
    """These rows of `[batch heads query ...]`, or all where it says the same for every row."""
    return whole[:, :, rows] if whole.shape[2] > 1 else whole
