"""Which later keys are sinks of a head on one prompt: found at once, or as tokens come.

With t_j the weight that key j has received from n_j queries so far, of a prompt of T tokens,

    S = {j : t_j / n_j > threshold and n_j >= min_queries}, but for one that is spared

`Search` finds S in each pass of a generation: from the prompt, which is then remembered by the
places of tokens (a window or padding moves columns about, not tokens); or, `running`, from all rows
up to the one that is edited, so that a pass over prompt and answer says what single steps would.

Source: see `interp.intervention.act`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from interp.intervention.base import InterventionError
from interp.intervention.following import check_goes_on
from interp.model.attention import Attention
from interp.model.call import Call, at_places, to_places
from interp.model.edits import Block

Spare = Literal["first_over_threshold", "bos"]
Decode = Literal["prefill", "frozen", "running"]

# Numbers of each cached key that tell one beam's history from another's.
N_TRACED = 4


@dataclass(frozen=True)
class LaterRule:
    """When a key is a later sink; as in `interp.ACT`."""

    alpha: float = 5.0
    theta: float | None = None
    min_queries: int = 1
    spare: Spare = "first_over_threshold"

    def __post_init__(self):
        if self.theta is None and not self.alpha > 0:
            raise InterventionError(f"alpha={self.alpha}: above 0 (5: five times uniform).")
        if self.theta is not None and not 0 < self.theta < 1:
            raise InterventionError(f"theta={self.theta}: a share of attention, between 0 and 1.")
        if self.min_queries < 1:
            raise InterventionError(f"min_queries={self.min_queries}: a whole number from 1 on.")
        if self.spare not in get_args(Spare):
            names = ", ".join(get_args(Spare))
            raise InterventionError(f"spare={self.spare!r}: one of {names}.")

    def over(
        self,
        received: Float[Tensor, "batch heads row key"],
        queries: Int[Tensor, "batch row key"],
        n_tokens: Int[Tensor, "batch row"],
    ) -> Bool[Tensor, "batch heads row key"]:
        """Keys whose mean is over the threshold; `received` are sums over `queries`."""
        n = queries[:, None]
        if self.theta is None:
            threshold = self.alpha / n_tokens.clamp_min(1)[:, None, :, None]
        else:
            threshold = self.theta
        return (received / n.clamp_min(1) > threshold) & (n >= self.min_queries)

    def without_spared(
        self, over: Bool[Tensor, "batch heads row key"], positions: Int[Tensor, "batch key"]
    ) -> Bool[Tensor, "batch heads row key"]:
        """The sinks: all of `over` but the first of it, or but the first token."""
        if self.spare == "bos":
            return over & (positions > 0)[:, None, None]
        return over & (over.cumsum(-1) > 1)


@dataclass(frozen=True, eq=False)
class Found:
    """Keys that lose weight, of which heads, what they keep of it, and in which rows.

    `each_has_some`: every head has a key in some prompt.
    """

    heads: Int[Tensor, " heads"]
    keys: Bool[Tensor, "batch heads #query key"]
    factor: Float[Tensor, "#batch #heads 1"]
    rows: Bool[Tensor, "batch query"]
    each_has_some: bool = False


class Search:
    """The sinks of some heads of a layer, pass after pass: one object for each block and layer.

    With `seed` the keys found are others, drawn at random, which lose as much weight in all.
    """

    def __init__(
        self,
        heads: Int[Tensor, " heads"],
        rule: LaterRule,
        factor: float,
        decode: Decode,
        seed: int | None = None,
    ):
        self.heads, self.rule, self.factor = heads, rule, factor
        self.decode, self.seed = decode, seed
        # of the prompt that is being continued, by the places of its tokens
        self._with_some: Any = None  # Int[Tensor, " some"], heads that have sinks
        self._keys: Any = None  # Bool[Tensor, "batch some 1 place"]
        self._kept: Any = None  # Float[Tensor, "#batch #heads 1"]
        self._received: Any = None  # Float[Tensor, "batch heads 1 place"]
        self._queries: Any = None  # Int[Tensor, "batch 1 1 place"]
        self._trace: Any = None  # Float[Tensor, "batch key traced"]

    def find(self, attention: Attention, call: Call) -> Found | None:
        """What to edit in this pass; None where it has no row that is edited.

        Raises `InterventionError` where this pass goes on from a prompt that was not seen whole.
        """
        device = attention.q.device
        self.heads = self.heads.to(device)
        prompt, later = (call.rows(when).to(device) for when in ("prompt", "generated"))
        if self.decode == "running":
            return self._running(attention, call, prompt, later)
        if self.decode == "prefill" and not bool(prompt.any()):
            return None
        rows = prompt if self.decode == "prefill" else prompt | later
        if call.whole:
            keys, factor = self._in_prompt(attention, prompt)
            self._remember(keys, factor, attention, call)
            return Found(self.heads, keys, factor, rows)
        if not call.step and bool(prompt.any()):
            raise InterventionError(
                f"decode={self.decode!r}: this prompt comes in chunks, and its sinks are known "
                "only from all of it; pass it whole, or use decode='running'."
            )
        check_goes_on(f"decode={self.decode!r}", self._keys, len(attention.q))
        if not len(self._with_some):
            return None
        keys = at_columns(self._keys, attention)
        return Found(self._with_some, keys, self._kept, rows, each_has_some=True)

    def _remember(
        self,
        keys: Bool[Tensor, "batch heads 1 key"],
        factor: Float[Tensor, "#batch #heads 1"],
        attention: Attention,
        call: Call,
    ) -> None:
        some = keys.flatten(2).any(-1).any(0).nonzero().squeeze(1)
        self._with_some = self.heads[some]
        self._keys = by_place(keys[:, some].long(), attention, call) > 0
        self._kept = factor[:, some] if factor.shape[1] > 1 else factor

    def _in_prompt(
        self, attention: Attention, prompt: Bool[Tensor, "batch query"]
    ) -> tuple[Bool[Tensor, "batch heads 1 key"], Float[Tensor, "#batch #heads 1"]]:
        received, queries = received_by(attention, self.heads, prompt)
        over = self.rule.over(received[:, :, None], queries[:, None], prompt.sum(1, keepdim=True))
        places = attention.key_positions
        keys = self.rule.without_spared(over, places)
        if self.seed is None:
            return keys, received.new_full((1, 1, 1), self.factor)
        of_prompt = attention.real_keys & (queries > 0) & (places > 0)
        others = of_prompt[:, None] & ~over.squeeze(2)
        order = self._random_order(places)
        chosen, share = as_much_from_others(received, keys.squeeze(2), others, order, self.factor)
        return chosen[:, :, None], share

    def _random_order(self, places: Int[Tensor, "batch key"]) -> Float[Tensor, "batch heads key"]:
        """A random number for each place and head, the same in any batch."""
        assert self.seed is not None
        generator = torch.Generator().manual_seed(self.seed)
        n_heads, n_places = int(self.heads.max()) + 1, int(places.max()) + 1
        # row by row, so that a longer prompt only adds numbers
        drawn = torch.rand(n_places, n_heads, generator=generator).to(places.device)
        return drawn[places][..., self.heads].transpose(1, 2)

    def _running(
        self,
        attention: Attention,
        call: Call,
        prompt: Bool[Tensor, "batch query"],
        later: Bool[Tensor, "batch query"],
    ) -> Found:
        received, queries = received_by(attention, self.heads, prompt)
        received = by_place(received[:, :, None], attention, call)
        queries = by_place(queries[:, None, None], attention, call)
        if not call.whole:
            check_goes_on(f"decode={self.decode!r}", self._received, len(attention.q))
            self._follow_beams(attention, call)
            # what a window has let go of still counts where the first one is spared
            longer = (0, received.shape[3] - self._received.shape[3])
            received = received + pad(self._received, longer)
            queries = queries + pad(self._queries, longer)
        n_tokens = torch.where(prompt, attention.positions + 1, 0).amax(1, keepdim=True)
        keys = self._tested(received, queries, n_tokens)
        if bool(later.any()):
            columns = later.any(0).nonzero().squeeze(1)
            mine = later[:, None, columns, None]
            weights = attention.pattern(self.heads, columns) * mine
            seen = seen_by(attention, columns)[:, None] & mine
            received = received + by_place(weights, attention, call).cumsum(2)
            queries = queries + by_place(seen.long(), attention, call).cumsum(2)
            own = self._tested(received, queries, attention.positions[:, columns] + 1)
            own = torch.where(mine, own, keys)
            keys = keys.expand(-1, -1, attention.n_queries, -1).index_copy(2, columns, own)
        self._received, self._queries = received[:, :, -1:], queries[:, :, -1:]
        self._trace = trace_of(attention, call)
        factor = received.new_full((1, 1, 1), self.factor)
        return Found(self.heads, at_columns(keys, attention), factor, prompt | later)

    def _tested(
        self,
        received: Float[Tensor, "batch heads row place"],
        queries: Int[Tensor, "batch 1 row place"],
        n_tokens: Int[Tensor, "batch row"],
    ) -> Bool[Tensor, "batch heads row place"]:
        over = self.rule.over(received, queries.squeeze(1), n_tokens)
        places = torch.arange(received.shape[3], device=over.device).expand(len(over), -1)
        return self.rule.without_spared(over, places)

    def _follow_beams(self, attention: Attention, call: Call) -> None:
        """Put what is remembered in the order that the rows of the cache were put into."""
        if len(attention.q) == 1:
            return
        now = trace_of(attention, call)[:, : -attention.n_queries]
        size = min(now.shape[1], self._trace.shape[1])  # a window has let go of the first keys
        now, before = now[:, now.shape[1] - size :], self._trace[:, self._trace.shape[1] - size :]
        if torch.equal(now, before):
            return
        same = (now[:, None] == before[None]).flatten(2).all(-1)
        if not bool(same.any(1).all()):
            raise InterventionError(
                "decode='running': the rows of this pass do not go on from those of the one before."
            )
        parents = same.int().argmax(1)
        self._received, self._queries = self._received[parents], self._queries[parents]


def received_by(
    attention: Attention, heads: Int[Tensor, " heads"], rows: Bool[Tensor, "batch query"]
) -> tuple[Float[Tensor, "batch heads key"], Int[Tensor, "batch key"]]:
    """The weight that each key receives from `rows` in all, and how many of them may see it."""
    total = torch.zeros(len(rows), len(heads), attention.n_keys, device=rows.device)
    queries = replace(attention, real_queries=rows).queries_per_key()
    if not bool(rows.any()):
        return total, queries
    for index, keys, weights in attention.tiles(heads):
        chosen = rows[:, None, None, index].to(weights.dtype)
        total[..., keys] += (chosen @ weights).squeeze(2)
    return total, queries


def seen_by(
    attention: Attention, columns: Int[Tensor, " columns"]
) -> Bool[Tensor, "batch columns key"]:
    """Which real keys each of these queries may see."""
    visible = attention.visible(Block(None, columns, attention.n_keys))
    real = attention.real_keys[:, None].expand(-1, len(columns), -1)
    return real if visible is None else real & visible.any(1)


def as_much_from_others(
    received: Float[Tensor, "batch heads key"],
    keys: Bool[Tensor, "batch heads key"],
    others: Bool[Tensor, "batch heads key"],
    order: Float[Tensor, "batch heads key"],
    factor: float,
) -> tuple[Bool[Tensor, "batch heads key"], Float[Tensor, "batch heads 1"]]:
    """Of `others` the first by `order` that hold what `keys` hold, and the share that they keep.

    All they lose is all that `keys` would lose at `factor`; where they do not have so much, all.
    """
    wanted = (received * keys).sum(-1, keepdim=True)
    ranks = torch.where(others, order, torch.inf).argsort(-1)
    held = (received * others).gather(-1, ranks)
    enough = held.cumsum(-1) - held < wanted
    chosen = torch.zeros_like(keys).scatter(-1, ranks, enough) & others & (wanted > 0)
    mass = (received * chosen).sum(-1, keepdim=True)
    share = 1 - (1 - factor) * wanted / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    return chosen, share.clamp(0, 1)


def by_place(
    columns: Shaped[Tensor, "batch heads row key"], attention: Attention, call: Call
) -> Shaped[Tensor, "batch heads row place"]:
    """By the places of tokens in their prompt instead of columns; 0 where there is no key."""
    size = call.real_keys.shape[1]
    return to_places(columns, attention.key_positions, attention.real_keys, size)


def at_columns(
    by_place: Bool[Tensor, "batch heads row place"], attention: Attention
) -> Bool[Tensor, "batch heads row key"]:
    """The way back; False for tokens that came later."""
    return at_places(by_place, attention.key_positions, attention.real_keys)


def trace_of(attention: Attention, call: Call) -> Float[Tensor, "batch key traced"]:
    """What the cache remembers of each row's tokens: equal numbers are equal histories."""
    filled = min(attention.n_keys, call.real_keys.shape[1])
    return attention.k[:, 0, :filled, :N_TRACED].clone()
