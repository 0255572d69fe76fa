"""PINE: what a model says does not depend on the order in which exchangeable segments stand.

A prompt is *prefix, {segment_1 ... segment_k}, suffix*; answers to judge, documents, premises. In
every layer and head

1. tokens of a segment see the prefix, their own segment up to themselves, and every other segment
   whole, earlier or later; the suffix sees what it always saw;
2. each query sees the segments packed in an order that it chooses, the most important one nearest.

Importance is attention without positions. With l_ib = logsumexp over j in b of scale * q_i.k_j,
before rotation, and L_b tokens in b, a query i of the suffix ranks by l_ib - log L_b, and a segment
a (one order for all its tokens, itself always nearest) by

    I_ab = sum over i in a of  exp(l_ib) / (L_b * sum over b' != a of exp(l_ib'))

Let segment b of query i be followed by s_ib tokens of segments that are nearer, and c_b tokens of
segments in the text. A key at t_j stands at t_j + c_b - s_ib, so all segments together fill the
same places [p, E) for every query, without gaps; a query of segment a stands at t_i + c_a. No key
is turned for it (nor is a cache of its own needed): query i is turned to another place for each
segment (`interp.model.places`).

Source: Wang et al. 2024, "Eliminating Position Bias of Language Models: A Mechanistic Approach"
(arXiv 2407.01100) and its code, where importance is normalised within the segments, the own one
left out (the paper's formula: over the whole row; for the suffix the order is the same). Unlike the
code: batches, left padding, any number of segments per prompt, the model's own cache.

What it removes is the bias of *order*. Letters or numbers inside segments still tell them apart,
and must move with the text. Tokens of a segment see later tokens, so their own likelihoods are not
those of a language model; the suffix (question, answer) is read causally.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads import HeadsLike
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import by_layer, check_when, chosen, said, said_when
from interp.intervention.reach import check_plainly_causal, earlier
from interp.intervention.segments import Layout
from interp.model.attention import Attention, rows_in_block
from interp.model.call import Call, When
from interp.model.hooked import HookedModel
from interp.model.places import Groups

Order = Literal["importance", "reversed", "input"]

Scores = Float[Tensor, "batch head query segment"]


@dataclass(frozen=True, eq=False, repr=False)
class PINE(Intervention):
    """Position-invariant attention over `segments`, as in the module's docstring.

    `segments` names spans of the prompts that run ("segment_*": all whose names begin so), or gives
    slices of the prompt's own tokens ("3:10"); `interp.evaluate` tells spans, elsewhere
    `with model.spans(prompts["spans"])`. They have to touch each other.

    Invariance needs all heads (None) at all tokens ("both"). The rest is for finding out what does
    it: some `heads`, or `order="reversed"` (the least important nearest), or "input" (each where it
    stands in the text, so that only what is seen has changed).

    Raises, when the model runs, `InterventionError` on layers that do not rotate q and k (learned
    positions), on a window shorter than the text, and on prompts given in chunks.
    """

    segments: str | Sequence[str] = "segment_*"
    heads: HeadsLike | None = None
    order: Order = "importance"
    when: When = "both"
    causal: ClassVar[bool] = False  # over the prompt

    def __post_init__(self):
        names = (self.segments,) if isinstance(self.segments, str) else tuple(self.segments)
        object.__setattr__(self, "segments", names)
        object.__setattr__(self, "heads", chosen(self.heads))
        check_when(self.when)
        if self.order not in get_args(Order):
            raise InterventionError(f"order={self.order!r}: one of {', '.join(get_args(Order))}.")
        if not names or not all(isinstance(name, str) and name.strip("*") for name in names):
            raise InterventionError(
                f"segments={self.segments!r}: names of spans, such as 'segment_*'."
            )

    def __repr__(self) -> str:
        order = {
            "importance": "the most important nearest",
            "reversed": "the least important nearest",
            "input": "where they stand in the text",
        }[self.order]
        return (
            f"PINE({said(self.heads)}; segments {', '.join(self.segments)} see each other, "
            f"{order}; {said_when(self.when)})"
        )

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook a layer. Raises `HeadError` where the model lacks a head."""
        passes = _Passes(model, self.segments)
        for layer, heads in by_layer(model, self.heads).items():
            flags = torch.zeros(model.cfg.n_heads, dtype=torch.bool)
            flags[heads] = True
            yield (
                f"blocks.{layer}.attn.hook_attention",
                partial(self._attend, model, passes, flags),
            )

    def _attend(
        self,
        model: HookedModel,
        passes: "_Passes",
        heads: Bool[Tensor, " head"],
        attention: Attention,
        hook,
    ) -> Attention | None:
        rows = model.call.rows(self.when).to(attention.q.device)
        if not rows.any():
            return None
        layout, mask = passes.read(attention)
        edited = rows[:, None] & heads.to(rows.device)[None, :, None]
        at, base = places(attention, layout, self.order)
        seen = None
        if not edited.all():
            own = attention.positions[:, None]
            at = torch.where(edited[..., None], at, own[..., None])
            base = torch.where(edited, base, own)
            seen = edited[..., None] | _earlier_segments(layout)[:, None]
        # both ways for all heads: `seen` takes it back from those that are left alone
        both_ways = replace(attention, mask=mask, causal=False)
        return both_ways.reposition(layout.of_key, at, base, seen)


def places(
    attention: Attention, layout: Layout, order: Order = "importance"
) -> tuple[Int[Tensor, "#batch #head query segment"], Int[Tensor, "batch 1 query"]]:
    """Where each query stands for keys of each segment, and for all others."""
    own = attention.positions[:, None]
    if order == "input":
        return own[..., None].expand(-1, -1, -1, layout.start.shape[1]), own
    base = own + layout.at_query(layout.before_end)[:, None]
    scores = importance(attention, layout)
    if order == "reversed":
        scores = torch.where(scores.isinf(), scores, -scores)
    pushed = shifts(scores, layout.lengths)
    return base[..., None] + pushed - layout.before_end[:, None, None], base


def shifts(
    scores: Scores, lengths: Int[Tensor, "batch segment"]
) -> Int[Tensor, "batch head query segment"]:
    """How many tokens of segments with higher scores stand between a segment and the suffix."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    sizes = lengths[:, None, None].expand_as(order).gather(-1, order)
    return torch.zeros_like(order).scatter(-1, order, sizes.cumsum(-1) - sizes)


def importance(attention: Attention, layout: Layout) -> Scores:
    """By which each query orders the segments; inf for its own, -inf for those that only fill up.

    Outside of segments log of the mean weight without positions, up to a constant of the row; the
    same for all tokens of a segment: the sum of such means.
    """
    seen = segment_lse(attention, layout)
    lengths, real = layout.lengths[:, None, None], layout.real[:, None, None]
    numbers = torch.arange(layout.start.shape[1], device=seen.device)
    own = (layout.of_query[..., None] == numbers)[:, None]
    # of a segment by itself nothing is left: its softmax would be NaN
    others = seen.masked_fill(own | ~real, -inf)
    shares = others.softmax(-1).nan_to_num(0.0) / lengths.clamp_min(1)
    pooled = own.to(shares.dtype).transpose(2, 3) @ shares  # [batch head segment segment]
    index = layout.of_query.clamp_min(0)[:, None, :, None].expand_as(seen)
    by_segment = pooled.gather(2, index).masked_fill(own, inf)
    by_token = seen - lengths.clamp_min(1).log()
    scores = torch.where(layout.inside[:, None, :, None], by_segment, by_token)
    return scores.masked_fill(~real, -inf)


def segment_lse(attention: Attention, layout: Layout) -> Scores:
    """Log-sum-exp of each query's logits on each segment, without positions."""
    q, k = attention.q_unrotated, attention.k_unrotated
    assert q is not None and k is not None  # checked before
    groups = Groups.of(layout.of_key, layout.start.shape[1])
    keys = attention.per_query_head(groups.gather(k)).transpose(3, 4)
    size = keys.shape[0] * keys.shape[1] * groups.real[0].numel()
    rows = rows_in_block(size, keys.device)
    parts = []
    for some in q.split(rows, dim=2):
        logits = (some[:, :, None] * attention.scale) @ keys
        if attention.softcap is not None:
            logits = torch.tanh(logits / attention.softcap) * attention.softcap
        logits = logits.masked_fill(~groups.real[:, None, :, None], -inf)
        parts.append(logits.logsumexp(-1).transpose(2, 3))
    return torch.cat(parts, dim=2)


class _Passes:
    """What all layers of a pass share: where segments lie, and who sees whom."""

    def __init__(self, model: HookedModel, names: Sequence[str]):
        self.model, self.names = model, names
        self.call: Call | None = None
        self.known: dict[tuple, tuple[Layout, Tensor, Tensor | None]] = {}

    def read(self, attention: Attention) -> tuple[Layout, Bool[Tensor, "batch 1 query key"]]:
        call = self.model.call
        if self.call is not call:
            self.call, self.known = call, {}
        key = attention.q.device, attention.n_keys, id(attention.mask)
        if key not in self.known:
            check_plainly_causal(attention, call, "PINE")
            layout = Layout.of(self.names, call, attention)
            # the mask is kept so that no other one gets its id
            self.known[key] = layout, _seen_both_ways(attention, layout), attention.mask
        return self.known[key][:2]


def _seen_both_ways(attention: Attention, layout: Layout) -> Bool[Tensor, "batch 1 query key"]:
    """Earlier tokens, and all of the other segments from within one."""
    a, b = layout.of_query[:, :, None], layout.of_key[:, None]
    others = (a >= 0) & (b >= 0) & (a != b)
    return ((earlier(attention) | others) & attention.real_keys[:, None])[:, None]


def _earlier_segments(layout: Layout) -> Bool[Tensor, "batch query segment"]:
    """Segments that a query sees where nothing is changed: from within one, up to its own."""
    numbers = torch.arange(layout.start.shape[1], device=layout.start.device)
    return (numbers <= layout.of_query[..., None]) | ~layout.inside[..., None]
