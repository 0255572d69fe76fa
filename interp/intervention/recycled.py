"""Recycled attention: most generated tokens read only the keys that mattered at the last full step.

At a *full* step the token reads everything, and the K keys that get most weight are kept, one set S
for each key-value head:

    S = top K of  sum over its query heads of a_ij           (or the largest of them)

At a *recycled* step it reads S and itself; it joins S, and the least attended of S leaves it, so
that K stay. The prompt is read in full, its last token is the first full step, and after it comes

- one every `stride` tokens, or
- at every `check_every`-th token one where the query has turned: cos(q_t, q at the last full step)
  < `threshold`, all heads of the layer together, before rotation.

Nothing is renumbered or thrown away: keys keep their positions and come back at the next full step.
Weights of a recycled step are a_ij over their sum on S, so what is lost is exactly the mass outside
of it: with R the mass on S, |z - z'| <= 2 (1 - R) max |v_j|. No time is saved here: the full row is
computed to say what it would have been.

Source: Xu, Goyal & Choi 2024, "Recycled Attention" (arXiv 2411.05787); its repository could not be
had. How the query heads of one key-value head are pooled, and which query is compared, is a choice
of ours. Unlike eviction (H2O, StreamingLLM), what a later token needs can come back.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads import HeadsLike
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import by_layer, chosen, said
from interp.intervention.following import Rows
from interp.model.attention import Attention
from interp.model.call import Call
from interp.model.edits import Block
from interp.model.hooked import HookedModel
from interp.tasks.prompts import as_prompts, spans_of

Pool = Literal["sum", "max"]


@dataclass(frozen=True, eq=False, repr=False)
class RecycledAttention(Intervention):
    """Read `k` recycled keys at most generated tokens, as in the module's docstring.

    Give `stride`, or `threshold` and `check_every`. `heads` (None: all) are those that recycle; the
    others read everything, and still have a say in what is kept. A query head's set is that of its
    key-value head. `measure` says of a model and prompts what is selected by.

    The prompt is left as it is. With Hugging Face's `generate` and no KV cache each pass takes what
    was written for part of a longer prompt, so every step is a full one there.
    """

    k: int
    stride: int | None = None
    threshold: float | None = None
    check_every: int = 5
    pool: Pool = "sum"
    heads: HeadsLike | None = None

    def __post_init__(self):
        object.__setattr__(self, "heads", chosen(self.heads))
        for name in ("k", "stride", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InterventionError(f"{name}={value}: a whole number from 1 on.")
        if (self.stride is None) is (self.threshold is None):
            raise InterventionError(
                f"stride={self.stride}, threshold={self.threshold}: give one of them, how often "
                "everything is read, or how far a query may turn until it is."
            )
        if self.pool not in get_args(Pool):
            raise InterventionError(f"pool={self.pool!r}: one of {', '.join(get_args(Pool))}.")

    def __repr__(self) -> str:
        if self.stride is not None:
            often = f"all keys every {self.stride} tokens"
        else:
            often = (
                f"all keys where the query has turned below a cosine of {self.threshold:g}, looked "
                f"at every {self.check_every} tokens"
            )
        return (
            f"RecycledAttention({said(self.heads)}; the {self.k} keys of most weight ({self.pool} "
            f"over query heads), {often}; at generated tokens)"
        )

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched. Raises `HeadError` where the model lacks a head."""
        for layer, heads in by_layer(model, self.heads).items():
            recycling = _Recycling(self)

            def recycle(
                attention: Attention, hook, recycling=recycling, heads=heads
            ) -> Attention | None:
                edited = attention
                for step in recycling.steps(attention, model.call):
                    if step.recycled.any():
                        hidden = step.recycled[:, None, None] & ~step.allowed
                        delta = torch.where(hidden, -torch.inf, 0.0)
                        delta = attention.per_query_head(delta)[:, :, None]
                        edited = edited.bias(delta, heads, queries=[step.query])
                return None if edited is attention else edited

            yield f"blocks.{layer}.attn.hook_attention", recycle

    @torch.no_grad()
    def measure(self, model: HookedModel, prompts, *, batch_size: int = 4) -> pd.DataFrame:
        """What it selects by, on prompts and their answers, the model left as it is.

        One row a prompt, layer, head and generated token that would be recycled: `step` (tokens
        after the prompt's last), `mass` (R, on the recycled keys), `overlap` (share of the row's
        own top K that is among them) and `similarity` (cosine of this query and that of the last
        full step). Raises `InterventionError` where prompts have no answers of two tokens.
        """
        prompts = as_prompts(model, prompts)
        answers = prompts["answer_ids"] if "answer_ids" in prompts.column_names else []
        if not any(len(ids or ()) > 1 for ids in answers):
            raise InterventionError("prompts: no answer has two tokens, so nothing is recycled.")
        texts = [[*p, *a] for p, a in zip(prompts["input_ids"], answers, strict=True)]
        lengths, spans = [len(p) for p in prompts["input_ids"]], spans_of(prompts)
        parts = []
        for batch in model.batches(texts, batch_size):
            rows = batch.index.tolist()
            told = None if spans is None else [spans[i] for i in rows]

            def look(attention: Attention, hook, rows=rows) -> None:
                layer = int(hook.name.split(".")[1])
                for step in _Recycling(self).steps(attention, model.call):
                    parts.extend(_lines(step, rows, layer))

            names = [f"blocks.{layer}.attn.hook_attention" for layer in by_layer(model, self.heads)]
            looking = model.hooks(fwd_hooks=[(name, look) for name in names])
            with model.spans(told, [lengths[i] for i in rows]), looking:
                model.run(batch.input_ids, batch.attention_mask)
        table = pd.concat(parts, ignore_index=True)
        if self.heads is not None:
            own = [(head.layer, head.head) for head in self.heads]
            table = table[pd.MultiIndex.from_frame(table[["layer", "head"]]).isin(own)]
        return table.sort_values(["prompt", "layer", "head", "step"], ignore_index=True)


@dataclass(frozen=True, eq=False)
class Step:
    """One token's row in a layer: what it may read, and what that is chosen by.

    `recycled` is False for rows that read everything (or belong to the prompt, or are padding).
    """

    query: int
    number: Int[Tensor, " batch"]
    recycled: Bool[Tensor, " batch"]
    allowed: Bool[Tensor, "batch kv_head key"]
    mass: Float[Tensor, "batch head"]
    overlap: Float[Tensor, "batch kv_head"]
    similarity: Float[Tensor, " batch"]


class _Recycling:
    """What one layer keeps from token to token."""

    def __init__(self, settings: RecycledAttention):
        self.settings = settings
        self.rows = Rows()
        self.kept: Bool[Tensor, "batch kv_head column"] | None = None
        self.query: Float[Tensor, "batch width"] | None = None

    def steps(self, attention: Attention, call: Call) -> list[Step]:
        """The rows of this pass from the prompt's last token on, in their order."""
        self._follow(attention, call)
        number = call.positions - call.prompt_lengths[:, None] + 1
        number = torch.where(call.real, number, -1).to(attention.q.device)
        columns = (number >= 0).any(0).nonzero().flatten().tolist()
        return [self._step(attention, call, column, number[:, column]) for column in columns]

    def _follow(self, attention: Attention, call: Call) -> None:
        before = self.rows.go_on(attention, call)
        if before is None or self.kept is None or self.query is None:
            self.kept = self.query = None
            return
        self.kept, self.query = self.kept[before], self.query[before]

    def _step(self, attention: Attention, call: Call, column: int, number: Tensor) -> Step:
        weights = attention.pattern(queries=[column])[:, :, 0]
        seen, query = _visible(attention, column), self._query(attention, column)
        total = min(call.real_keys.shape[1], attention.n_keys)  # a static cache has empty slots
        first = call.real_keys.shape[1] - total
        kept, last = self._known(attention, first)
        similarity = torch.cosine_similarity(query, last, dim=-1)
        full = (number <= 0) | self._is_full(number, similarity)
        if self.kept is None:  # the prompt went in before
            full = torch.ones_like(full)
        allowed = kept & seen
        allowed[..., total - attention.n_queries + column] = True
        top = self._top(self._pooled(attention, weights), seen)
        mass = (weights * attention.per_query_head(allowed)).sum(-1)
        overlap = (top & allowed).sum(-1) / top.sum(-1).clamp_min(1)
        going_on = self._without_least(attention, weights, allowed)
        new = torch.where(full[:, None, None], top, going_on) & (number >= 0)[:, None, None]
        self.kept = torch.nn.functional.pad(new, (first, 0))
        self.query = torch.where(full[:, None], query, last)
        return Step(column, number, ~full & (number > 0), allowed, mass, overlap, similarity)

    def _is_full(self, number: Tensor, similarity: Tensor) -> Bool[Tensor, " batch"]:
        settings = self.settings
        if settings.threshold is None:
            return number % (settings.stride or 1) == 0
        turned = similarity < settings.threshold
        return turned & (number % settings.check_every == 0)

    def _known(self, attention: Attention, first: int) -> tuple[Tensor, Tensor]:
        """What is kept, of the keys of this pass; and the query of the last full step."""
        batch, kv_heads, n_keys = attention.k.shape[:3]
        device = attention.q.device
        kept = torch.zeros(batch, kv_heads, n_keys, dtype=torch.bool, device=device)
        if self.kept is None or self.query is None:
            return kept, torch.zeros(batch, attention.q[0, :, 0].numel(), device=device)
        there = self.kept[..., first : first + n_keys]
        kept[..., : there.shape[-1]] = there
        return kept, self.query

    def _query(self, attention: Attention, column: int) -> Float[Tensor, "batch width"]:
        q = attention.q if attention.q_unrotated is None else attention.q_unrotated
        return q[:, :, column].flatten(1).float()

    def _pooled(
        self, attention: Attention, weights: Float[Tensor, "batch head key"]
    ) -> Float[Tensor, "batch kv_head key"]:
        by_group = weights.unflatten(1, (attention.k.shape[1], -1))
        return by_group.sum(2) if self.settings.pool == "sum" else by_group.amax(2)

    def _top(
        self, pooled: Float[Tensor, "batch kv_head key"], seen: Bool[Tensor, "batch 1 key"]
    ) -> Bool[Tensor, "batch kv_head key"]:
        k = min(self.settings.k, pooled.shape[-1])
        found = pooled.masked_fill(~seen, -1).topk(k, dim=-1)
        return torch.zeros_like(pooled, dtype=torch.bool).scatter(-1, found.indices, True) & seen

    def _without_least(
        self,
        attention: Attention,
        weights: Float[Tensor, "batch head key"],
        allowed: Bool[Tensor, "batch kv_head key"],
    ) -> Bool[Tensor, "batch kv_head key"]:
        """Without the key of least weight in this step, where that is one too many."""
        own = weights * attention.per_query_head(allowed)
        own = own / own.sum(-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
        pooled = self._pooled(attention, own).masked_fill(~allowed, torch.inf)
        least = torch.zeros_like(allowed).scatter(-1, pooled.argmin(-1, keepdim=True), True)
        too_many = allowed.sum(-1, keepdim=True) > self.settings.k
        return allowed & ~(least & too_many)


def _visible(attention: Attention, column: int) -> Bool[Tensor, "batch 1 key"]:
    """The keys that a query may see."""
    row = torch.tensor([column], device=attention.q.device)
    seen = attention.visible(Block(None, row, attention.n_keys))
    real = attention.real_keys[:, None]
    return real if seen is None else real & seen[:, :, 0].any(1, keepdim=True)


def _lines(step: Step, rows: list[int], layer: int) -> list[pd.DataFrame]:
    """A table for each prompt whose row is recycled, one line a head."""
    n_heads = step.mass.shape[1]
    overlap = step.overlap.repeat_interleave(n_heads // step.overlap.shape[1], dim=1)
    return [
        pd.DataFrame({
            "prompt": prompt,
            "layer": layer,
            "head": range(n_heads),
            "step": int(step.number[row]),
            "mass": step.mass[row].tolist(),
            "overlap": overlap[row].tolist(),
            "similarity": float(step.similarity[row]),
        })
        for row, prompt in enumerate(rows)
        if step.recycled[row]
    ]  # fmt: skip
