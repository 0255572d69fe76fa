"""Steer attention: make chosen heads look at named parts of the prompt, or look away from them.

With S the tokens of the named spans that query i may see, m their number, and a_ij the weights:

- `force`: a_ij = 1/m for j in S, 0 elsewhere. So z_i is the mean of their values.
- `suppress`: a_ij = 0 for j in S, and the others keep their proportions (logits of S to -inf).
- `boost`: the logits of S get `amount` more (after a soft cap; a negative amount dampens them).

A row to which an edit leaves nothing stays as it is: forced where it sees none of S (earlier
tokens, a window that has moved on), suppressed where it sees nothing else.

Source: Merullo et al. 2024, "Circuit Component Reuse Across Tasks in Transformer Language Models"
(arXiv 2310.08744), section 5. There the last row of four heads of GPT-2 Medium is forced onto the
wrong colours of a list of objects, and the model then mostly names the right one:

    SteerAttention(["L12H3", "L13H4", "L13H13", "L19H1"], "wrong_*")

Which colours are wrong is known from the answer: a causal probe of what these heads do, not a
method to deploy. Controls: other tokens, other heads of the same layers, answers that were right.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import groupby
from math import inf, isfinite
from operator import attrgetter
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.heads import HeadsLike, heads_of
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.model.attention import Attention
from interp.model.call import Call, When
from interp.model.edits import Block
from interp.model.hooked import HookedModel

How = Literal["force", "suppress", "boost"]
Query = Literal["end", "all"]

SLICE = re.compile(r"(-?\d*):(-?\d*)")


@dataclass(frozen=True, eq=False, repr=False)
class SteerAttention(Intervention):
    """Edit the weights of `heads` on the tokens of `span`; `how` as in the module's docstring.

    `span` names spans of the prompts that run (`interp.evaluate` tells them; elsewhere
    `with model.spans(prompts["spans"])`). "wrong_*" is every span whose name begins so, several
    names are taken together, and "0:1" or "-3:" is a slice of the prompt's own tokens, special
    tokens included.

    Which rows: with `query="end"` those that a next token is read from, that is the prompt's last
    (`when="prompt"`), those of generated tokens ("generated"), or "both"; with `query="all"` every
    row of these kinds, which may hold a matrix of queries and keys, heads aside. Without its KV
    cache Hugging Face's `generate` reads all it wrote as a prompt, whose last token then moves on.
    """

    heads: HeadsLike
    span: str | Sequence[str]
    how: How = "force"
    query: Query = "end"
    when: When = "prompt"
    amount: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "heads", tuple(sorted(heads_of(self.heads))))
        names = (self.span,) if isinstance(self.span, str) else tuple(self.span)
        object.__setattr__(self, "span", names)
        allowed = {"how": get_args(How), "query": get_args(Query), "when": get_args(When)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                value = getattr(self, name)
                raise InterventionError(f"{name}={value!r}: one of {', '.join(values)}.")
        if not names or not all(isinstance(name, str) and name.strip("*") for name in names):
            raise InterventionError(f"span={self.span!r}: names of spans, such as 'wrong_*'.")
        if (self.how == "boost") is (self.amount is None):
            raise InterventionError(
                f"amount={self.amount}: how='boost' needs one (added to the logits), others none."
            )
        if self.amount is not None and not isfinite(self.amount):
            raise InterventionError(f"amount={self.amount}: a finite number; to hide: 'suppress'.")

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.heads[:4])) + (", ..." if len(self.heads) > 4 else "")
        heads = f"{len(self.heads)} heads: {shown}" if self.heads else "no heads"
        spans = ", ".join(self.span)
        done = {"force": "look only at", "suppress": "look away from"}
        what = done.get(self.how) or f"{self.amount:+g} on the logits of"
        last = {
            "prompt": "the prompt's last token",
            "generated": "generated tokens",
            "both": "the prompt's last token and generated ones",
        }
        every = {"prompt": "the prompt's tokens", "both": "all tokens"}
        when = last[self.when] if self.query == "end" else every.get(self.when, last["generated"])
        return f"SteerAttention({heads}; {what} {spans}; at {when})"

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched. Raises `HeadError` where the model lacks a head."""
        model.check_heads(self.heads)
        for layer, heads in groupby(self.heads, key=attrgetter("layer")):
            index = [head.head for head in heads]
            yield f"blocks.{layer}.attn.hook_attention", partial(self._steer, model, index)

    def _steer(
        self, model: HookedModel, heads: list[int], attention: Attention, hook
    ) -> Attention | None:
        call = model.call
        rows = call.rows(self.when)
        if self.query == "end":
            rows = rows & (call.positions >= call.prompt_lengths[:, None] - 1)
        rows = rows.to(attention.q.device)
        if not rows.any():
            return None
        keys = tokens_of(self.span, call, attention)
        if self.how == "force":
            return forced(attention, heads, rows, keys)
        if self.how == "suppress":
            return suppressed(attention, heads, rows, keys)
        return shifted(attention, heads, rows, keys, float(self.amount or 0))


def forced(
    attention: Attention,
    heads: list[int],
    rows: Bool[Tensor, "batch query"],
    keys: Bool[Tensor, "batch key"],
) -> Attention | None:
    """Each row's weight spread evenly over those of `keys` that it may see."""
    columns = rows.any(0).nonzero().squeeze(1)
    onto = seen(attention, columns, keys)
    rows = within(rows, columns, onto.any(-1))
    if not rows.any():
        return None
    weights = onto / onto.sum(-1, keepdim=True).clamp_min(1)
    if int(rows.sum(1).max()) == 1:  # the same for every row of a prompt, since it has but one
        weights = (weights * rows[:, columns, None]).sum(1, keepdim=True)
    else:
        whole = weights.new_zeros(len(rows), attention.n_queries, attention.n_keys)
        weights = whole.index_copy(1, columns, weights)
    return attention.set_rows(weights[:, None], heads=heads, rows=rows)


def suppressed(
    attention: Attention,
    heads: list[int],
    rows: Bool[Tensor, "batch query"],
    keys: Bool[Tensor, "batch key"],
) -> Attention:
    """No weight on `keys`, in rows that see anything else."""
    columns = rows.any(0).nonzero().squeeze(1)
    others = seen(attention, columns, attention.real_keys & ~keys).any(-1)
    return shifted(attention, heads, within(rows, columns, others), keys, -inf)


def shifted(
    attention: Attention,
    heads: list[int],
    rows: Bool[Tensor, "batch query"],
    keys: Bool[Tensor, "batch key"],
    amount: float,
) -> Attention:
    """`amount` more on the logits of `keys`, in chosen rows."""
    # queries chosen for the same prompts go together, so that no [query key] matrix is needed
    kinds, kind_of = torch.unique(rows, dim=1, return_inverse=True)
    for kind, prompts in enumerate(kinds.T):
        if prompts.any():
            delta = torch.where(keys & prompts[:, None], amount, 0.0)
            attention = attention.bias(delta[:, None, None], heads, queries=kind_of == kind)
    return attention


def seen(
    attention: Attention, columns: Int[Tensor, " columns"], keys: Bool[Tensor, "batch key"]
) -> Bool[Tensor, "batch columns key"]:
    """Which of `keys` each of these queries may see."""
    visible = attention.visible(Block(None, columns, attention.n_keys))
    if visible is None:
        return keys[:, None].expand(-1, len(columns), -1)
    return visible.any(1) & keys[:, None]


def within(
    rows: Bool[Tensor, "batch query"],
    columns: Int[Tensor, " columns"],
    kept: Bool[Tensor, "batch columns"],
) -> Bool[Tensor, "batch query"]:
    """`rows` without those of `columns` that are not `kept`; it has no others."""
    return torch.zeros_like(rows).index_copy(1, columns, rows[:, columns] & kept)


def tokens_of(names: Sequence[str], call: Call, attention: Attention) -> Bool[Tensor, "batch key"]:
    """Which keys are tokens of the named spans, in each prompt.

    Raises `InterventionError` where a prompt lacks one, or nobody told where spans lie.
    """
    lengths = call.prompt_lengths.tolist()
    places = [
        [place for name in names for place in places_of(name, row, call, lengths[row])]
        for row in range(len(lengths))
    ]
    at, found = attention.key_positions, torch.zeros_like(attention.real_keys)
    for row, ranges in enumerate(places):
        for start, end in ranges:
            found[row] |= (start <= at[row]) & (at[row] < end)
    return found & attention.real_keys


def places_of(name: str, row: int, call: Call, length: int) -> list[Sequence[int]]:
    """The ranges [start, end) of the prompt's own tokens that a name stands for."""
    numbers = SLICE.fullmatch(name)
    if numbers is not None:
        start, end, _ = slice(*(int(n) if n else None for n in numbers.groups())).indices(length)
        return [(start, end)]
    if call.spans is None:
        raise InterventionError(
            f"span {name!r}: nobody told where the prompts' spans lie. Use interp.evaluate or "
            "compare, or run the model inside `with model.spans(prompts['spans'])`."
        )
    spans = {known: place for known, place in call.spans[row].items() if place is not None}
    stem = name.removesuffix("*")
    chosen = [
        known for known in spans if known == name or (stem != name and known.startswith(stem))
    ]
    if not chosen:
        near = get_close_matches(name, spans, n=3) or list(spans)
        raise InterventionError(
            f"span {name!r}: prompt {row} of the batch has none such; it has "
            f"{', '.join(near) or 'no spans at all'}."
        )
    return [spans[known] for known in chosen]
