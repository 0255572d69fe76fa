"""One layer's attention on one forward pass, computed only as far as somebody asks.

An `Attention` holds the rotated queries and keys, the values and the mask: never the pattern. What
is asked for is computed in blocks of query rows, so that memory grows with the number of tokens and
not with its square. With logits s_ij = scale * q_i.k_j (soft-capped where the model does that),
V_i the keys that query i may see and, where a model has one, a sink logit s_0 that takes mass but
brings no value:

    a_ij = exp(s_ij - lse_i) for j in V_i,   lse_i = log(exp(s_0) + sum over V_i of exp(s_ij))

Edits return a new `Attention` and compose: logit edits first, weight edits after them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, wraps
from math import isqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from interp.model import statistics
from interp.model.edits import Bias, Block, Edit, EditError, Rescale, SetRows, Temperature
from interp.model.places import Places
from interp.model.rotary import Rotary, RotaryError

# Weights in a block: enough rows for the matrix product to be fast, few enough that the allocator
# hands the same memory out again (from 32 MB on, glibc returns it to the system each time).
BLOCK_ELEMENTS = 1 << 21
# On a GPU: enough that it is the GPU that works, and not the processor that queues the work.
GPU_BLOCK_ELEMENTS = 1 << 26
# In a tile: few enough for a cache.
TILE_ELEMENTS = 1 << 20

# Indices, flags (a tensor of booleans), a slice, or None: all.
Chosen = Sequence[int] | Tensor | slice | None


def kept(compute: Callable) -> property:
    """A cached property; what was computed without gradients does not serve where they are on."""

    @wraps(compute)
    def value(self):
        key = compute.__name__, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        values = self.__dict__.setdefault("_kept", {})
        if key not in values:
            values[key] = compute(self)
        return values[key]

    return property(value)


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of one layer on one forward pass. Rows are queries, columns are keys.

    `positions` and `key_positions` count each prompt's own tokens from 0, padding left out. While
    decoding with a sliding window only the window's keys are here: a key's index is not its
    position. `real_queries` and `real_keys` are False on padding.

    `mask` is True where a key may be seen, or a float added to the logits; without one, `causal`
    says whether later keys are hidden. `sink_logits` belong to a virtual key (GPT-OSS): the weights
    of real keys then sum to less than 1.

    `rotary` is how the layer turned q and k by their position (None: it did not, or in a way of its
    own, as GPT-J), and `places` who stands where for whom, where somebody has given positions anew.
    """

    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    v: Float[Tensor, "batch kv_head key d_value"]
    scale: float
    positions: Int[Tensor, "batch query"]
    key_positions: Int[Tensor, "batch key"]
    real_queries: Bool[Tensor, "batch query"]
    real_keys: Bool[Tensor, "batch key"]
    mask: Tensor | None = None
    causal: bool = True
    softcap: float | None = None
    sink_logits: Float[Tensor, "#batch head #query"] | None = None
    edits: tuple[Edit, ...] = ()
    rotary: Rotary | None = None
    places: Places | None = None

    @property
    def n_heads(self) -> int:
        return self.q.shape[1]

    @property
    def n_queries(self) -> int:
        return self.q.shape[2]

    @property
    def n_keys(self) -> int:
        return self.k.shape[2]

    # What somebody may ask for.

    def output(self) -> Float[Tensor, "batch head query d_value"]:
        """z, each head's mix of values. Only heads that an edit touches leave the fast kernel."""
        if not self.edits:
            return self._unedited_output
        touched = torch.stack([edit.heads.flatten() for edit in self.edits]).any(0)
        touched = touched.nonzero().squeeze(1)
        edited = self._mix(touched)
        if len(touched) == self.n_heads:
            return edited
        return self._unedited_output.index_copy(1, touched, edited)

    def pattern(
        self, heads: Chosen = None, queries: Chosen = None, keys: Chosen = None
    ) -> Float[Tensor, "batch heads queries keys"]:
        """That block of the softmax and nothing more; float32, differentiable.

        Raises `IndexError` where an index is out of range.
        """
        heads = None if heads is None else self._index(heads, self.n_heads, "heads")
        columns = self._index(keys, self.n_keys, "keys")
        parts = []
        for _, weights in self.blocks(heads, queries):
            weights = pad(weights, (0, self.n_keys - weights.shape[-1]))
            parts.append(weights if keys is None else weights[..., columns])
        return torch.cat(parts, dim=2)

    def scores(self) -> Float[Tensor, "batch head query key"]:
        """All logits as they enter the softmax; hidden keys have the lowest finite number."""
        return self._masked(self._logits(self._whole), self._whole)

    def pattern_of(
        self, scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The pattern that `scores` (as `scores()` gives them, perhaps changed) would make."""
        weights = self._softmax(scores, self._whole) * sees_something(scores)
        return self._edit_weights(weights, self._whole)

    @kept
    def q_unrotated(self) -> Float[Tensor, "batch head query d_head"] | None:
        """q before the layer turned it by its position, float32; None without `rotary`."""
        return None if self.rotary is None else self.rotary.undo(self.q, self.positions)

    @kept
    def k_unrotated(self) -> Float[Tensor, "batch kv_head key d_head"] | None:
        """k before the layer turned it by its position, float32; None without `rotary`."""
        return None if self.rotary is None else self.rotary.undo(self.k, self.key_positions)

    def rotate(
        self, x: Float[Tensor, "batch heads *pos d_head"], positions: Int[Tensor, "*at"]
    ) -> Float[Tensor, "batch heads *new d_head"]:
        """x as this layer turns it at `positions`, `[batch pos]` or one for each vector; float32.

        Raises `RotaryError` without `rotary`.
        """
        return self._turning.rotate(x, positions)

    @kept
    def lse(self) -> Float[Tensor, "batch head query"]:
        """Log-sum-exp of each row's logits (and of the sink logit where there is one), float32."""
        if self._fused is not None and not self.edits:
            return self._fused[1]
        parts = []
        for block in self.row_blocks(None):
            lse = self._masked(self._logits(block), block).logsumexp(-1)
            if self.sink_logits is not None:
                lse = lse.logaddexp(self._sinks(block).squeeze(-1))
            parts.append(lse)
        return torch.cat(parts, dim=2)

    def blocks(
        self, heads: Tensor | None = None, queries: Chosen = None
    ) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, "batch heads rows seen_keys"]]]:
        """The weights, some query rows at a time: (row indices, weights), float32.

        Under plain causal attention the keys after the block's last row are left off.
        """
        for block in self.row_blocks(heads, queries):
            yield block.rows, self._weights(block)

    def tiles(
        self, heads: Tensor | None = None
    ) -> Iterator[tuple[Int[Tensor, " rows"], slice, Float[Tensor, "batch heads rows keys"]]]:
        """The weights of all queries in pieces: (row indices, keys, weights), float32.

        For sums that want no whole rows: a piece fits into a processor's cache, where the
        normaliser is known beforehand. Elsewhere pieces are those of `blocks`.
        """
        if self._fused is None or self.edits:
            for rows, weights in self.blocks(heads):
                yield rows, slice(0, weights.shape[-1]), weights
            return
        n_heads = self.n_heads if heads is None else len(heads)
        side = max(1, isqrt(TILE_ELEMENTS // max(1, len(self.q) * n_heads)))
        for rows in torch.arange(self.n_queries, device=self.q.device).split(side):
            seen = min(int(rows[-1]) + 1, self.n_keys) if self.causal else self.n_keys
            for start in range(0, seen, side):
                block = Block(heads, rows, min(start + side, seen))
                yield rows, slice(start, block.n_keys), self._weights_from_lse(block, start)

    # Statistics, streamed: their definitions are in interp.model.statistics.

    def queries_per_key(self) -> Int[Tensor, "batch key"]:
        """How many real queries of this pass may see each key; 0 on padding."""
        return statistics.queries_per_key(self)

    def mass_received(self, heads: Chosen = None) -> Float[Tensor, "batch heads key"]:
        """Mean weight that a key gets from the real queries that may see it; NaN without any."""
        return statistics.mass_received(self, self._heads(heads))

    def largest_received(self, heads: Chosen = None) -> Float[Tensor, "batch heads key"]:
        """The largest weight that any real query gives to each key."""
        return statistics.largest_received(self, self._heads(heads))

    def entropy(self, heads: Chosen = None) -> Float[Tensor, "batch heads query"]:
        """Entropy of each row's weights on real keys, in nats."""
        return statistics.entropy(self, self._heads(heads))

    def top_keys(
        self, k: int = 1, heads: Chosen = None, queries: Chosen = None
    ) -> tuple[Float[Tensor, "batch heads queries k"], Int[Tensor, "batch heads queries k"]]:
        """The `k` largest weights of each row and their keys' indices, largest first."""
        return statistics.top_keys(self, k, self._heads(heads), queries)

    def mass_on(
        self, keys: Bool[Tensor, "..."], heads: Chosen = None, queries: Chosen = None
    ) -> Float[Tensor, "batch heads queries"]:
        """Each row's weight on a set of keys, `[key]`, `[batch key]` or more axes."""
        return statistics.mass_on(self, whole_layer(keys), self._heads(heads), queries)

    # Edits: each returns a new Attention.

    def reposition(
        self,
        group: Int[Tensor, "batch key"],
        at: Int[Tensor, "#batch #head query group"],
        base: Int[Tensor, "#batch #head query"] | None = None,
        seen: Bool[Tensor, "#batch #head query group"] | None = None,
    ) -> "Attention":
        """Let query i stand at position `at[i, g]` for keys of group g, which stay where they are.

        Keys of group -1 see it at `base[i]` (None: there are none but hidden ones). `seen` is False
        where a query may not look at a group. Moving keys by s is moving queries by -s:

            s_ij = scale * (R(at_ig) q_i) . (R(t_j) k_j)        q_i, k_j before rotation

        Raises `EditError` after another edit, `RotaryError` without `rotary`.
        """
        if self.edits or self.places is not None:
            raise EditError("positions can't be given anew after another edit: do it first.")
        self._turning  # noqa: B018, raises
        return replace(self, places=Places.of(group, at, base, seen))

    def bias(
        self,
        delta: Tensor | float | Callable[[Tensor], Tensor],
        heads: Chosen = None,
        queries: Chosen = None,
        keys: Chosen = None,
    ) -> "Attention":
        """Add `delta` to the logits at the chosen heads, queries and keys (−inf hides a key).

        `delta` is a number, a tensor that broadcasts to `[batch head query key]` of the whole
        layer, or a function of a block of logits. Raises `EditError` after a weight edit,
        `IndexError` on an index out of range.
        """
        if not callable(delta):
            delta = torch.as_tensor(delta, dtype=torch.float32, device=self.q.device)
            delta = delta[(None,) * (4 - delta.dim())]
        where = (
            self._flags(heads, self.n_heads, "heads")[None, :, None, None],
            self._flags(queries, self.n_queries, "queries")[None, None, :, None],
            self._flags(keys, self.n_keys, "keys")[None, None, None, :],
        )
        return self._edited(Bias(delta, *where))

    def temperature(self, temperature: Tensor | float, heads: Chosen = None) -> "Attention":
        """Divide the logits of `heads` by a number or by a tensor like `[batch head query]`.

        Raises `EditError` unless it is above 0, and after a weight edit.
        """
        value = torch.as_tensor(temperature, dtype=torch.float32, device=self.q.device)
        if not bool((value > 0).all()):
            raise EditError(f"temperature={temperature}: must be above 0.")
        value = value[(None,) * (3 - value.dim())][..., None]
        flags = self._flags(heads, self.n_heads, "heads")[None, :, None, None]
        return self._edited(Temperature(value, flags))

    def rescale(
        self,
        keys: Bool[Tensor, "..."],
        factor: float | Tensor,
        receivers: Bool[Tensor, "..."] | None = None,
        heads: Chosen = None,
        rows: Bool[Tensor, "..."] | None = None,
    ) -> "Attention":
        """Multiply the weights of `keys` by `factor`; `receivers` take up the freed mass.

        Selections are boolean, `[key]`, `[batch key]` or broadcast to `[batch head query key]`;
        `rows` and a tensor `factor` broadcast to `[batch head query]`. Receivers default to all
        other keys. With m_i and r_i the mass of row i on keys and on receivers,

            a'_ij = factor a_ij for keys,   a'_ij = a_ij (1 + (1 - factor) m_i / r_i) for receivers

        and a row with r_i < 1e-6 stays as it is. Raises `EditError` where the two overlap.
        """
        keys = whole_layer(keys)
        receivers = ~keys if receivers is None else whole_layer(receivers)
        if bool((keys & receivers).any()):
            raise EditError("receivers: some are among keys too; a key gives or receives.")
        factor = torch.as_tensor(factor, dtype=torch.float32, device=self.q.device)
        factor = factor[(None,) * (3 - factor.dim())][..., None]
        flags = self._flags(heads, self.n_heads, "heads")[None, :, None, None]
        return self._edited(Rescale(keys, receivers, factor, self._rows(rows), flags))

    def set_rows(
        self,
        weights: Float[Tensor, "..."] | None = None,
        heads: Chosen = None,
        rows: Bool[Tensor, "..."] | None = None,
    ) -> "Attention":
        """Replace rows: by `weights` (broadcast to the whole layer), or uniformly where None.

        Uniform means equal weights on the keys that the query may see; `rows` as in `rescale`.
        """
        if weights is not None:
            weights = weights[(None,) * (4 - weights.dim())]
        flags = self._flags(heads, self.n_heads, "heads")[None, :, None, None]
        return self._edited(SetRows(weights, self._rows(rows), flags))

    # How it is computed.

    def facts(self) -> dict[str, Any]:
        """What an `Attention` of a more special kind is made from."""
        return {name: self.__dict__[name] for name in _facts()}

    def differs_in_edits_only(self, other: "Attention") -> bool:
        """Is all but the edits the same?"""
        own, others = self.__dict__, other.__dict__
        return all(own[name] is others[name] for name in _facts() if name != "edits")

    @property
    def _turning(self) -> Rotary:
        if self.rotary is None:
            raise RotaryError(
                "rotate: this layer is not known to turn q and k by their position (learned "
                "positions, ALiBi, none at all; GPT-J's way), so they can't be given others."
            )
        return self.rotary

    @property
    def _whole(self) -> Block:
        return Block(None, self._index(None, self.n_queries, "queries"), self.n_keys)

    def _edited(self, edit: Edit) -> "Attention":
        if edit.on_logits and any(not previous.on_logits for previous in self.edits):
            raise EditError("a logit edit can't follow a weight edit: edit the logits first.")
        return replace(self, edits=(*self.edits, edit))

    def _mix(self, heads: Tensor | None) -> Float[Tensor, "batch heads query d_value"]:
        values = self.per_query_head(self.v, heads).float()
        parts = [w @ values[..., : w.shape[-1], :] for _, w in self.blocks(heads)]
        return torch.cat(parts, dim=2).to(self.v.dtype)

    @kept
    def _unedited_output(self) -> Float[Tensor, "batch head query d_value"]:
        if self._fused is not None:
            return self._fused[0]
        if any(x is not None for x in (self.softcap, self.sink_logits, self.places)):
            return replace(self, edits=())._mix(None)
        k, v, grouped = self.k, self.v, self.q.device.type == "cpu"
        if not grouped:  # with a mask, CUDA's fast kernels want a key for each query head
            k, v = self.per_query_head(k), self.per_query_head(v)
        causal = self.causal and self.mask is None
        return scaled_dot_product_attention(
            self.q, k, v, self.mask, scale=self.scale, is_causal=causal, enable_gqa=grouped
        )

    @kept
    def _fused(self) -> tuple[Tensor, Tensor] | None:
        """(z, lse) in one go from the CPU's flash kernel, where that is exact.

        Not with gradients (the kernel's lse carries none), nor with a mask (it takes no boolean).
        """
        if self.mask is not None or self.softcap is not None or self.sink_logits is not None:
            return None
        needs_grad = torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad)
        same_width = self.q.shape[-1] == self.v.shape[-1]
        if self.places is not None or needs_grad or not same_width or self.q.device.type != "cpu":
            return None
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(self.q, self.k, self.v, 0.0, self.causal, scale=self.scale)

    def per_query_head(self, x: Tensor, heads: Tensor | None = None) -> Tensor:
        """Keys or values as the query heads see them: kv heads shared by a group of heads."""
        group = self.n_heads // x.shape[1]
        if heads is not None:
            return x[:, heads // group]
        return x if group == 1 else x.repeat_interleave(group, dim=1)

    def row_blocks(self, heads: Tensor | None, queries: Chosen = None) -> Iterator[Block]:
        n_heads = self.n_heads if heads is None else len(heads)
        size = rows_in_block(self.q.shape[0] * n_heads * self.n_keys, self.q.device)
        whole_rows = any(isinstance(edit, SetRows) and edit.any_key for edit in self.edits)
        later_hidden = self.causal and self.mask is None and not whole_rows
        index = self._index(queries, self.n_queries, "queries")
        # asked once for all blocks: each time the GPU would have to finish what it has to do
        numbers = range(len(index)) if queries is None else index.tolist()
        for start, rows in zip(range(0, max(1, len(index)), size), index.split(size), strict=True):
            here = numbers[start : start + size] or (0,)
            ends = (here[0], here[-1]) if queries is None else (min(here), max(here))
            last = ends[1] if later_hidden and len(rows) else self.n_keys - 1
            yield Block(heads, rows, last + 1, ends[0])

    def _logits(self, block: Block) -> Float[Tensor, "batch heads rows seen_keys"]:
        """Scaled, soft-capped, with a float mask's numbers, edited; nothing hidden yet."""
        if self.places is not None:
            logits = self.places.logits(self, block)
        elif self._half_on_gpu:
            logits = self._product_of_halves(block)
        else:
            logits = self.product(self._scaled_queries(block), self.keys_transposed, block)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.mask is not None and self.mask.dtype != torch.bool:
            logits = logits + block.of(self.mask).float()
        if self.places is not None:  # after the cap, which would make a number of -inf
            logits = self.places.hide(logits, block)
        for edit in self.edits:
            if edit.on_logits:
                logits = edit.apply(logits, block, None)
        return logits

    def _scaled_queries(self, block: Block) -> Float[Tensor, "batch heads rows d_head"]:
        q = self.q if block.heads is None else self.q[:, block.heads]
        q = q if len(block.rows) == self.n_queries == 1 else q[:, :, block.rows]
        return q.float() * self.scale

    def product(
        self,
        q: Float[Tensor, "batch heads rows d"],
        k: Float[Tensor, "batch kv_head d key"],
        block: Block,
    ) -> Float[Tensor, "batch heads rows seen_keys"]:
        """Each query of a block with each key."""
        k = k[..., : block.n_keys]
        group = self.n_heads // k.shape[1]
        if block.heads is not None:
            return q @ k[:, block.heads // group]
        # one product per kv head, the rows of its query heads stacked
        stacked = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        return (stacked @ k).view(*q.shape[:3], block.n_keys)

    @property
    def _half_on_gpu(self) -> bool:
        """Can the GPU multiply what is in half precision and give float32?"""
        needs_grad = torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad)
        halves = self.q.dtype in (torch.bfloat16, torch.float16)
        return halves and self.q.device.type == "cuda" and not needs_grad

    def _product_of_halves(self, block: Block) -> Float[Tensor, "batch heads rows seen_keys"]:
        """As `product`: the same numbers, without making float32 of q and k first."""
        q, k = self.q[:, :, block.rows], self.k[:, :, : block.n_keys]
        if block.heads is not None:
            q, k = q[:, block.heads], self.per_query_head(k, block.heads)
        shape = *q.shape[:3], block.n_keys
        stacked = q.reshape(q.shape[0] * k.shape[1], -1, q.shape[-1])
        logits = torch.bmm(stacked, k.flatten(0, 1).mT, out_dtype=torch.float32)
        return logits.view(shape).mul_(self.scale)

    @kept
    def keys_transposed(self) -> Float[Tensor, "batch kv_head d_head key"]:
        """As products want them, float32."""
        return self.k.float().transpose(2, 3)

    @kept
    def keys_by_group(self) -> Float[Tensor, "batch kv_head group d_head place"]:
        """As `places` has them, float32."""
        return self.places.groups.gather(self.k.float()).transpose(3, 4)

    def visible(self, block: Block) -> Bool[Tensor, "#batch #head rows seen_keys"] | None:
        """Which keys each row may see; None: all."""
        if self.mask is not None:
            mask = block.of(self.mask)
            return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if not self.causal:
            return None
        keys = torch.arange(block.n_keys, device=block.rows.device)
        return (keys <= block.rows[:, None])[None, None]

    @kept
    def _keys_and_one(self) -> Float[Tensor, "batch kv_head d_head_and_1 key"]:
        return pad(self.keys_transposed, (0, 0, 0, 1), value=1.0)

    def _masked(self, logits: Tensor, block: Block) -> Tensor:
        """Hidden keys get the lowest finite number, and so do those that an edit hid with −inf."""
        lowest = torch.finfo(logits.dtype).min
        if self.causal and self.mask is None and not logits.requires_grad:
            hide_later(logits, block, lowest)
        elif (visible := self.visible(block)) is not None:
            logits = logits.masked_fill(~visible, lowest)
        return logits.clamp_min(lowest) if self.edits or self.places is not None else logits

    def _weights(self, block: Block) -> Float[Tensor, "batch heads rows seen_keys"]:
        # for one row the softmax is cheaper than to copy the keys
        many = self.n_queries > 1 and not any(edit.on_logits for edit in self.edits)
        if many and self._fused is not None:
            weights = self._weights_from_lse(block)
        else:
            logits = self._masked(self._logits(block), block)
            weights = self._softmax(logits, block)
            if self.mask is not None or self.edits or self.places is not None:
                weights = weights * sees_something(logits)
        return self._edit_weights(weights, block)

    def _edit_weights(self, weights: Tensor, block: Block) -> Tensor:
        for edit in self.edits:
            if not edit.on_logits:
                weights = edit.apply(weights, block, self.visible(block))
        return weights

    def _weights_from_lse(self, block: Block, start: int = 0) -> Tensor:
        """exp(s - lse) for the keys from `start` on.

        The subtraction is done within the product: one more dimension of q and k.
        """
        lse = self._fused[1] if block.heads is None else self._fused[1][:, block.heads]
        q = torch.cat([self._scaled_queries(block), -lse[:, :, block.rows, None]], dim=-1)
        keys = self._keys_and_one[..., start : block.n_keys]
        weights = self.product(q, keys, replace(block, n_keys=keys.shape[-1])).exp_()
        if self.causal:
            hide_later(weights, block, 0.0, start)
        return weights

    def _softmax(self, logits: Tensor, block: Block) -> Tensor:
        """Softmax over keys; a virtual sink takes its share and is dropped."""
        if self.sink_logits is None:
            return logits.softmax(-1)
        sinks = self._sinks(block).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]

    def _sinks(self, block: Block) -> Float[Tensor, "#batch heads #rows 1"]:
        return block.of(self.sink_logits.float()[..., None])

    # How a selection is read.

    def _index(self, chosen: Chosen, size: int, name: str) -> Int[Tensor, " chosen"]:
        if chosen is None or isinstance(chosen, slice):
            every = torch.arange(size, device=self.q.device)
            return every if chosen is None else every[chosen]
        if torch.is_tensor(chosen) and chosen.dtype == torch.bool:
            chosen = chosen.nonzero().flatten()
        index = torch.as_tensor(chosen, dtype=torch.long, device=self.q.device).reshape(-1)
        if len(index) and not (-size <= int(index.min()) and int(index.max()) < size):
            raise IndexError(f"{name}={index.tolist()}: this layer has 0-{size - 1}.")
        return index % size

    def _heads(self, chosen: Chosen) -> Tensor | None:
        return None if chosen is None else self._index(chosen, self.n_heads, "heads")

    def _flags(self, chosen: Chosen, size: int, name: str) -> Bool[Tensor, " size"]:
        flags = torch.zeros(size, dtype=torch.bool, device=self.q.device)
        flags[self._index(chosen, size, name)] = True
        return flags

    def _rows(self, rows: Tensor | None) -> Bool[Tensor, "#batch #head #query 1"]:
        if rows is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.q.device)
        if rows.dim() == 2:  # [batch query]
            rows = rows[:, None]
        return rows[(None,) * (3 - rows.dim())][..., None]


def rows_in_block(elements: int, device: torch.device) -> int:
    """How many query rows of so many elements are computed at a time."""
    most = BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return max(1, most // max(1, elements))


@cache
def _facts() -> tuple[str, ...]:
    return tuple(fact.name for fact in fields(Attention))


def hide_later(
    values: Float[Tensor, "batch heads rows keys"], block: Block, value: float, start: int = 0
) -> None:
    """Put `value` where a key, the first of which is `start`, comes after its query; in place."""
    # the first row sees all keys up to itself
    first = max(start, block.first_row) if len(block.rows) else block.n_keys
    if first < block.n_keys:
        later = torch.arange(first, block.n_keys, device=block.rows.device)
        values[..., first - start :].masked_fill_(later > block.rows[:, None], value)


def whole_layer(selection: Bool[Tensor, "..."]) -> Bool[Tensor, "#batch #head #query key"]:
    """`[key]` or `[batch key]` with the missing axes of `[batch head query key]` put in."""
    if selection.dim() == 2:
        return selection[:, None, None]
    return selection[(None,) * (4 - selection.dim())]


def sees_something(
    logits: Float[Tensor, "batch heads rows seen_keys"],
) -> Bool[Tensor, "batch heads rows 1"]:
    """A row that sees no key has no weights; its softmax alone would make them uniform."""
    return (logits > torch.finfo(logits.dtype).min).any(-1, keepdim=True)
