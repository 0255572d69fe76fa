"""What can be said of an attention pattern without holding it: sums over blocks of query rows.

Only real tokens count: rows of padding are left out, and padding as a key holds no weight. All are
float32 and take the memory of a block.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.edits import Block

if TYPE_CHECKING:
    from interp.model.attention import Attention


def queries_per_key(attention: "Attention") -> Int[Tensor, "batch key"]:
    """How many real queries of this pass may see each key; 0 on padding."""
    batch, n_keys = attention.real_keys.shape
    counts = torch.zeros(batch, n_keys, dtype=torch.long, device=attention.q.device)
    if attention.causal and attention.mask is None:  # key j is seen by the rows from j on
        from_end = attention.real_queries.flip(1).cumsum(1).flip(1)[:, :n_keys]
        counts[:, : from_end.shape[1]] = from_end
        return counts * attention.real_keys
    for block in attention.row_blocks(None):
        visible = attention.visible(block)
        real = attention.real_queries[:, block.rows]
        if visible is None:
            counts += real.sum(1, keepdim=True)
        else:
            seen = visible[:, 0] & real[:, :, None]
            counts[:, : seen.shape[-1]] += seen.sum(1)
    return counts * attention.real_keys


def mass_received(
    attention: "Attention", heads: Tensor | None = None
) -> Float[Tensor, "batch heads key"]:
    """a_j = (1 / n_j) * sum over the real queries i that may see key j of a_ij; NaN if n_j = 0."""
    total = _zeros_per_key(attention, heads)
    for rows, keys, weights in attention.tiles(heads):
        total[..., keys] += _sum_of_real_rows(attention, rows, weights)
    counts = queries_per_key(attention)[:, None]
    return torch.where(counts > 0, total / counts.clamp_min(1), torch.nan)


def largest_received(
    attention: "Attention", heads: Tensor | None = None
) -> Float[Tensor, "batch heads key"]:
    """max over the real queries i of a_ij."""
    largest = _zeros_per_key(attention, heads)
    for rows, keys, weights in attention.tiles(heads):
        real = attention.real_queries[:, None, rows, None]
        largest[..., keys] = largest[..., keys].maximum((weights * real).amax(2))
    return largest


def entropy(
    attention: "Attention", heads: Tensor | None = None
) -> Float[Tensor, "batch heads query"]:
    """H_i = - sum over j of a_ij log a_ij, in nats; NaN for rows of padding."""
    parts = [
        torch.special.entr(weights).sum(-1)
        for _, weights in attention.blocks(heads)
    ]  # fmt: skip
    return torch.where(attention.real_queries[:, None], torch.cat(parts, dim=2), torch.nan)


def top_keys(
    attention: "Attention", k: int, heads: Tensor | None, queries
) -> tuple[Float[Tensor, "batch heads queries k"], Int[Tensor, "batch heads queries k"]]:
    """The `k` largest weights of each row and their keys' indices, largest first."""
    if not 1 <= k <= attention.n_keys:
        raise IndexError(f"k={k}: this layer has 1-{attention.n_keys} keys.")
    values, indices = [], []
    for _, weights in attention.blocks(heads, queries):
        missing = max(0, k - weights.shape[-1])  # early causal rows see fewer than k keys
        found = torch.nn.functional.pad(weights, (0, missing)).topk(k, dim=-1)
        values.append(found.values)
        indices.append(found.indices)
    return torch.cat(values, dim=2), torch.cat(indices, dim=2)


def mass_on(
    attention: "Attention", keys: Bool[Tensor, "#batch #head #query key"], heads, queries
) -> Float[Tensor, "batch heads queries"]:
    """m_i(S) = sum over j in S of a_ij."""
    parts = []
    for rows, weights in attention.blocks(heads, queries):
        chosen = Block(heads, rows, weights.shape[-1]).of(keys)
        parts.append((weights * chosen).sum(-1))
    return torch.cat(parts, dim=2)


def _zeros_per_key(attention: "Attention", heads: Tensor | None) -> Tensor:
    n_heads = attention.n_heads if heads is None else len(heads)
    return torch.zeros(len(attention.q), n_heads, attention.n_keys, device=attention.q.device)


def _sum_of_real_rows(attention: "Attention", rows: Tensor, weights: Tensor) -> Tensor:
    """Sum over query rows, as a matrix product with the flags of the real ones."""
    real = attention.real_queries[:, None, None, rows].to(weights.dtype)
    return (real @ weights).squeeze(2)
