"""LongHeads: every head, for every query, reads as many chunks of a long text as fit its window.

The text is cut into chunks of w tokens. A query at position t reads C = T / w of them: the first
one, its own and the one before it, and those of the others that are like it most,

    score_g = q_t . c_g        q_t before rotation, c_g the chunk's representation

They are packed, in the order of the text, to positions 0, 1, 2, ..., and the query takes the next
ones: with r chunks before it, it stands at r w + (t mod w). So no distance is above T, whatever the
length of the text, and different heads may read different parts of it. A query before `begin` reads
everything at its own place, and so does one whose text has C chunks or fewer.

The representation of a head's chunk: q and k rotated by their places in the chunk, o_i what token i
reads of all the chunk's values (not causal), o their mean, and

    c = sum over j of softmax_j(o . k_j / sqrt(d)) k_j

Source: Lu et al. 2024, "LongHeads: Multi-Head Attention is Secretly a Long Context Processor"
(arXiv 2402.10685) and its code, whose scores compare q before rotation with keys after it, too.
Differences: a query reads itself while the prompt goes in, too (in their code only while decoding);
w need not divide anything but T, batches may be padded, and keys may be shared by several heads.
Take T well below the length that the model was trained with.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.heads import HeadsLike
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import by_layer, check_when, chosen, said, said_when
from interp.intervention.following import Rows
from interp.intervention.reach import check_plainly_causal
from interp.model.attention import Attention
from interp.model.call import Call, When
from interp.model.hooked import HookedModel
from interp.model.places import Groups
from interp.tasks.prompts import as_prompts, spans_of


@dataclass(frozen=True, eq=False, repr=False)
class LongHeads(Intervention):
    """Read `window` tokens in chunks of `chunk`, as in the module's docstring.

    `begin` (None: `window`) is the first position whose query chooses. `heads` (None: all) are
    those that choose, at the tokens of `when`; the others read everything at its own place.
    `measure` says of a model and prompts what is chosen, and by which scores.

    The queries of a chunk are needed once it is complete and no cache has them, so the prompt has
    to go in within the block. Raises `InterventionError` where it did not, on layers that do not
    rotate q and k, and on those whose own window is shorter than the text.
    """

    window: int
    chunk: int = 256
    begin: int | None = None
    heads: HeadsLike | None = None
    when: When = "both"

    def __post_init__(self):
        object.__setattr__(self, "heads", chosen(self.heads))
        check_when(self.when)
        if self.chunk < 1 or self.window % self.chunk or self.window < 3 * self.chunk:
            raise InterventionError(
                f"window={self.window}, chunk={self.chunk}: the window holds whole chunks, three "
                "at least (the first, the one before and its own)."
            )
        if self.begin is not None and self.begin < 0:
            raise InterventionError(f"begin={self.begin}: a position, from 0 on.")

    def __repr__(self) -> str:
        n = self.window // self.chunk
        return (
            f"LongHeads({said(self.heads)}; {n} chunks of {self.chunk} tokens each, the first, the "
            f"last two and the {n - 3} most alike, from position {self.first} on; "
            f"{said_when(self.when)})"
        )

    @property
    def first(self) -> int:
        """The first position whose query chooses."""
        return self.window if self.begin is None else self.begin

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched. Raises `HeadError` where the model lacks a head."""
        for layer, heads in by_layer(model, self.heads).items():
            chunks, flags = _Chunks(self), torch.zeros(model.cfg.n_heads, dtype=torch.bool)
            flags[heads] = True

            def choose(attention: Attention, hook, chunks=chunks, flags=flags) -> Attention | None:
                found = chunks.choose(attention, model.call)
                rows = model.call.rows(self.when).to(attention.q.device) & found.choosing
                if not rows.any():
                    return None
                edited = rows[:, None] & flags.to(rows.device)[None, :, None]
                return packed(attention, found, edited, self.chunk)

            yield f"blocks.{layer}.attn.hook_attention", choose

    @torch.no_grad()
    def measure(
        self, model: HookedModel, prompts, span: str | None = None, *, batch_size: int = 4
    ) -> pd.DataFrame:
        """What the last token of each prompt chooses, the model left as it is.

        One row a prompt, layer, head and chunk: `chunk`, `score`, `chosen`, `mass` (the weight it
        has in full attention), and with `span` whether the chunk holds a token of that span
        (`holds`). Prompts that are too short to choose have no rows. Raises `InterventionError`
        where a prompt lacks the span.
        """
        prompts = as_prompts(model, prompts)
        spans, parts = spans_of(prompts), []
        places = None if span is None else _places_of(spans, span, len(prompts))
        for batch in model.batches(prompts["input_ids"], batch_size):
            rows = batch.index.tolist()
            own = None if places is None else [places[row] for row in rows]

            def look(attention: Attention, hook, rows=rows, own=own) -> None:
                found = _Chunks(self).choose(attention, model.call)
                parts.append(_table(attention, found, self.chunk, rows, own, hook.name))

            names = [f"blocks.{layer}.attn.hook_attention" for layer in by_layer(model, self.heads)]
            with model.hooks(fwd_hooks=[(name, look) for name in names]):
                model.run(batch.input_ids, batch.attention_mask)
        table = pd.concat(parts, ignore_index=True)
        if self.heads is not None:
            chosen_heads = [(head.layer, head.head) for head in self.heads]
            table = table[pd.MultiIndex.from_frame(table[["layer", "head"]]).isin(chosen_heads)]
        return table.sort_values(["prompt", "layer", "head", "chunk"], ignore_index=True)


@dataclass(frozen=True, eq=False)
class Choice:
    """Which chunks each query of a pass reads, and the scores they were chosen by.

    `choosing` is False for queries that read everything. Scores of chunks that are not complete
    mean nothing.
    """

    of_key: Int[Tensor, "batch key"]
    scores: Float[Tensor, "batch head query chunk"]
    reads: Bool[Tensor, "batch head query chunk"]
    choosing: Bool[Tensor, "batch query"]


def packed(
    attention: Attention,
    choice: Choice,
    edited: Bool[Tensor, "batch head query"],
    chunk: int,
) -> Attention:
    """Where `edited`, the chosen chunks alone, side by side from position 0 on."""
    own = attention.positions[:, None, :, None]
    reads = choice.reads.long()
    rank = reads.cumsum(-1) - reads
    moved = (torch.arange(reads.shape[-1], device=rank.device) - rank) * chunk
    stands = (reads.sum(-1, keepdim=True) - 1) * chunk + own % chunk
    at = torch.where(edited[..., None], stands + moved, own)
    return attention.reposition(choice.of_key, at, seen=choice.reads | ~edited[..., None])


def representations(
    attention: Attention,
    q: Float[Tensor, "batch head chunk place d_head"],
    k: Float[Tensor, "batch head chunk place d_head"],
    v: Float[Tensor, "batch head chunk place d_value"],
) -> Float[Tensor, "batch head chunk d_head"]:
    """c of whole chunks, from their q and k before rotation."""
    places = torch.arange(q.shape[3], device=q.device).expand(*q.shape[:4])
    q, k = attention.rotate(q, places), attention.rotate(k, places)
    weights = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1)
    mean = (weights @ v.float()).mean(-2, keepdim=True)
    if mean.shape[-1] != k.shape[-1]:
        raise InterventionError(
            f"LongHeads: values of width {mean.shape[-1]} can't be compared with keys of width "
            f"{k.shape[-1]}, which a chunk's representation does."
        )
    return ((mean @ k.transpose(-1, -2) * attention.scale).softmax(-1) @ k).squeeze(-2)


class _Chunks:
    """What one layer keeps: its complete chunks' representations, and the latest queries."""

    def __init__(self, settings: LongHeads):
        self.settings, self.size = settings, settings.chunk
        self.rows = Rows()
        self.known: Float[Tensor, "batch head chunk d_head"] | None = None
        self.complete: Int[Tensor, " batch"] | None = None
        self.queries: Float[Tensor, "batch head token d_head"] | None = None
        self.positions: Int[Tensor, "batch token"] | None = None

    def choose(self, attention: Attention, call: Call) -> Choice:
        check_plainly_causal(attention, call, "LongHeads")
        self._follow(attention, call)
        self._represent(attention)
        at = attention.positions
        own, n_chunks = at // self.size, int(attention.key_positions.max()) // self.size + 1
        numbers = torch.arange(n_chunks, device=at.device)
        scores = self._scores(attention, n_chunks)
        forced = (numbers == 0) | (own[..., None] - numbers == 0) | (own[..., None] - numbers == 1)
        candidate = (numbers < own[..., None] - 1) & (numbers > 0)
        n_free = self.settings.window // self.size - 3
        ranked = scores.masked_fill(~candidate[:, None], -torch.inf)
        # stable: of chunks that say the same, the earlier one
        top = ranked.argsort(dim=-1, descending=True, stable=True)[..., :n_free]
        best = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, top, True)
        choosing = attention.real_queries & (at >= self.settings.first)
        of_key = torch.where(attention.real_keys, attention.key_positions // self.size, -1)
        return Choice(of_key, scores, (best & candidate[:, None]) | forced[:, None], choosing)

    def _scores(
        self, attention: Attention, n_chunks: int
    ) -> Float[Tensor, "batch head query chunk"]:
        q = attention.q_unrotated
        assert q is not None and self.known is not None
        known = self.known[:, :, :n_chunks]
        scores = q @ known.transpose(2, 3)
        return torch.nn.functional.pad(scores, (0, n_chunks - known.shape[2]))

    def _follow(self, attention: Attention, call: Call) -> None:
        before = self.rows.go_on(attention, call)
        if before is not None and self.known is not None:
            names = ("known", "complete", "queries", "positions")
            for name in names:
                setattr(self, name, getattr(self, name)[before])
            return
        if call.real_keys.shape[1] > attention.n_queries:
            raise InterventionError(
                "LongHeads: this pass goes on from a prompt that was read outside of the block, "
                "and the queries of its tokens are gone; give the prompt inside of it."
            )
        q = attention.q
        self.known = q.new_zeros(*q.shape[:2], 0, q.shape[-1], dtype=torch.float32)
        self.complete = torch.zeros(len(q), dtype=torch.long, device=q.device)
        self.queries = q.new_zeros(*q.shape[:2], 0, q.shape[-1], dtype=torch.float32)
        self.positions = torch.zeros(len(q), 0, dtype=torch.long, device=q.device)

    def _represent(self, attention: Attention) -> None:
        """Take in this pass' queries; a representation for each chunk that they complete."""
        q, k = attention.q_unrotated, attention.k_unrotated
        assert q is not None and k is not None and self.queries is not None
        assert self.known is not None and self.positions is not None and self.complete is not None
        size = self.size
        queries = torch.cat([self.queries, q], dim=2)
        own = torch.where(attention.real_queries, attention.positions, -size)
        positions = torch.cat([self.positions, own], dim=1)
        done = (attention.positions.masked_fill(~attention.real_queries, -1).amax(1) + 1) // size
        done = torch.maximum(done, self.complete)
        first, last = int(self.complete.min()), int(done.max())
        if last > first and bool((done > self.complete).any()):
            new = self._of_chunks(attention, queries, positions, first, last)
            numbers = torch.arange(first, last, device=q.device)
            fresh = (numbers >= self.complete[:, None]) & (numbers < done[:, None])
            grown = max(0, last - self.known.shape[2])
            known = torch.nn.functional.pad(self.known, (0, 0, 0, grown))
            part = torch.where(fresh[:, None, :, None], new, known[:, :, first:last])
            self.known = torch.cat([known[:, :, :first], part, known[:, :, last:]], dim=2)
        self.complete = done
        # a view would keep all of the prompt's queries
        self.queries, self.positions = queries[:, :, -size:].clone(), positions[:, -size:]

    def _of_chunks(
        self, attention: Attention, queries: Tensor, positions: Tensor, first: int, last: int
    ) -> Float[Tensor, "batch head chunk d_head"]:
        """Representations of the chunks from `first` up to `last`; of rows that lack one, noise."""

        def groups(at: Int[Tensor, "batch token"], real: Bool[Tensor, "batch token"]) -> Groups:
            number = at // self.size - first
            inside = real & (number >= 0) & (number < last - first)
            return Groups.of(torch.where(inside, number, -1), last - first)

        of_key = groups(attention.key_positions, attention.real_keys)
        of_query = groups(positions, positions >= 0)
        k, v = of_key.gather(attention.k_unrotated), of_key.gather(attention.v)
        q = of_query.gather(queries)
        k, v = attention.per_query_head(k), attention.per_query_head(v)
        return representations(attention, q, k, v)


def _places_of(spans: list[dict] | None, span: str, n: int) -> list:
    places = [row.get(span) for row in spans or [{}] * n]
    if None in places:
        raise InterventionError(f"span={span!r}: prompt {places.index(None)} has no such span.")
    return places


def _table(
    attention: Attention, choice: Choice, size: int, rows: list[int], places, name: str
) -> pd.DataFrame:
    """The last query of each prompt (they are padded on the left), one line a head and chunk."""
    layer, parts = int(name.split(".")[1]), []
    weights = attention.pattern(queries=[-1])[:, :, 0]
    of_key = choice.of_key[..., None] == torch.arange(choice.reads.shape[-1], device=weights.device)
    mass = weights @ of_key.float()
    for row, prompt in enumerate(rows):
        if not choice.choosing[row, -1]:
            continue
        n_chunks = int(attention.positions[row, -1]) // size + 1
        head, chunk = np.indices((attention.n_heads, n_chunks)).reshape(2, -1)
        about = {"prompt": prompt, "layer": layer, "head": head, "chunk": chunk}
        values = {"score": choice.scores[:, :, -1], "chosen": choice.reads[:, :, -1], "mass": mass}
        about |= {n: value[row, :, :n_chunks].flatten().tolist() for n, value in values.items()}
        if places is not None:
            start, stop = places[row]
            about["holds"] = (start < (chunk + 1) * size) & (chunk * size < stop)
        parts.append(pd.DataFrame(about))
    columns = ["prompt", "layer", "head", "chunk", "score", "chosen", "mass"]
    return pd.concat(parts) if parts else pd.DataFrame(columns=columns)
