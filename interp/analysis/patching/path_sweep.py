"""Running path patching: all senders on some pairs, many in one pass, by replay.

What the passes are, and why so little of them has to be run, is in `paths`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analysis.paired import Answers, Metric, PairBatch, pair_batch
from interp.analysis.patching.grid import Position
from interp.heads import Head
from interp.model.hooked import HookedModel
from interp.model.replay import Recording, record, tokens_at_once

Component = Literal["q", "k", "v", "z"]


@dataclass(frozen=True)
class Reading:
    """What is read, and by whom: heads of `component` by layer; nobody: the logits read."""

    heads: tuple[Head, ...]
    component: Component | None
    by_layer: dict[int, list[int]]

    @property
    def crosses_tokens(self) -> bool:
        """Can a change at one token be read at another? (a head's z reads all tokens before it)"""
        return self.component == "z"

    def reached_from(self, layer: int) -> bool:
        """May anything that a sender in `layer` writes be read?"""
        return not self.heads or layer < max(self.by_layer)

    def above(self, layer: int) -> dict[int, list[int]]:
        """The receivers that a sender in `layer` can reach."""
        return {reader: heads for reader, heads in self.by_layer.items() if reader > layer}


@dataclass(frozen=True, eq=False)
class Paths:
    """All senders of a sweep on some pairs; `positions` are the sender's and the receivers'."""

    model: HookedModel
    reading: Reading
    senders: list[Head]
    positions: tuple[Position | None, Position | None]
    freeze_mlps: bool
    metric: Metric
    batch_size: int | None

    @torch.no_grad()
    def run(self, pairs: Dataset) -> pd.DataFrame:
        """One row a pair: its metric on the clean and the corrupted prompt, and for each sender."""
        batch = pair_batch(self.model, pairs)
        mask = batch.attention_mask
        clean, mlps, corrupted = {}, {}, {}
        kept = [_keeping("attn.hook_z", layer, clean) for layer in self.model.attention_layers]
        if self.freeze_mlps:
            kept += [_keeping("hook_mlp_out", n, mlps) for n in range(len(self.model.blocks))]
        with self.model.hooks(fwd_hooks=kept):
            recording = record(self.model, batch.clean.input_ids, mask)
        sending = {head.layer for head in self.senders}
        kept = [_keeping("attn.hook_z", layer, corrupted) for layer in sending]
        with self.model.hooks(fwd_hooks=kept):
            logits = self.model.last_logits(batch.corrupted.input_ids, mask, 1)[:, -1]
        clean_logits = recording.logits[:, -1].float()
        answers = batch.answers(clean_logits)
        unpatched = self.metric(clean_logits, answers)
        frozen = Frozen(recording, clean, mlps, corrupted, batch, *self._columns(recording, batch))
        values = self._values(frozen, answers, unpatched)
        return pd.DataFrame(
            {
                "clean": unpatched.tolist(),
                "corrupted": self.metric(logits, answers).tolist(),
                "values": values.T.tolist(),
            }
        )

    def _columns(
        self, recording: Recording, batch: PairBatch
    ) -> tuple[Bool[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
        """Where senders are patched so that receivers may notice, and where receivers are set."""
        senders, readers = (batch.at(position) for position in self.positions)
        if not self.reading.heads:
            readers = batch.at(-1)
        if not self.reading.crosses_tokens:
            senders = senders & readers
        if recording.can_start_late:  # causal: the two runs are the same before their tokens differ
            senders = senders & batch.after_difference
        return senders, readers

    def _values(
        self, frozen: "Frozen", answers: Answers, unpatched: Float[Tensor, " batch"]
    ) -> Float[Tensor, "cell batch"]:
        """The metric for each sender; as unpatched where it reaches no receiver."""
        found = unpatched.repeat(len(self.senders), 1)
        by_layer: dict[int, list[int]] = defaultdict(list)
        for row, sender in enumerate(self.senders):
            if sender in self.reading.heads:
                found[row] = torch.nan
            elif self.reading.reached_from(sender.layer):
                by_layer[sender.layer].append(row)
        if not bool(frozen.patched_at.any()):
            return found
        for layer, rows in by_layer.items():
            for chunk in self._chunks(rows, frozen):
                logits = self._patched(frozen, layer, [self.senders[row].head for row in chunk])
                for row, part in zip(chunk, logits.split(len(unpatched)), strict=True):
                    found[row] = self.metric(part, answers)
        return found

    def _patched(
        self, frozen: "Frozen", layer: int, heads: list[int]
    ) -> Float[Tensor, "sender_and_batch d_vocab"]:
        """The last token's logits for each of some senders in a layer."""
        if not self.reading.heads:
            return self._replayed(frozen, layer, heads, [])
        above = self.reading.above(layer)
        read = self._read(frozen, layer, heads, above)
        return self._written(frozen, len(heads), read, above)

    def _chunks(self, rows: list[int], frozen: "Frozen") -> Iterator[list[int]]:
        """Senders for one pass each."""
        batch, n_tokens = frozen.patched_at.shape
        room = self.batch_size or max(1, tokens_at_once(self.model) // (n_tokens - frozen.start))
        size = max(1, room // batch)
        for first in range(0, len(rows), size):
            yield rows[first : first + size]

    def _read(
        self, frozen: "Frozen", layer: int, heads: list[int], above: dict[int, list[int]]
    ) -> dict[int, Tensor]:
        """Pass 2: what the receivers in `above` read at the tokens from the start on, by layer."""
        found: dict[int, Tensor] = {}

        def keep(value: Tensor, hook, reader: int) -> None:
            found[reader] = value[:, :, above[reader]]
            if reader == max(above):
                raise AllRead

        # before the hooks that freeze: a receiver's own z is worked out anew
        keeping = [(self._name(reader), partial(keep, reader=reader)) for reader in above]
        with suppress(AllRead):
            self._replayed(frozen, layer, heads, keeping)
        return found

    def _replayed(
        self,
        frozen: "Frozen",
        layer: int,
        heads: list[int],
        keeping: list[tuple[str, Callable]],
    ) -> Float[Tensor, "sender_and_batch d_vocab"]:
        """The clean run with senders patched and all other heads frozen."""
        with self.model.hooks(fwd_hooks=[*keeping, *frozen.hooks(layer, heads)]):
            logits = frozen.recording.replay(layer, frozen.rows(len(heads)), frozen.start)
        return logits[:, -1].float()

    def _written(
        self, frozen: "Frozen", n_senders: int, read: dict[int, Tensor], above: dict[int, list[int]]
    ) -> Float[Tensor, "sender_and_batch d_vocab"]:
        """Pass 3: the clean run with what the receivers read put in its place."""
        rows = frozen.rows(n_senders)
        there = frozen.read_at[rows, frozen.start :, None, None]

        def write(value: Tensor, hook, reader: int) -> Tensor:
            index = torch.tensor(above[reader], device=value.device)
            new = torch.where(there.to(value.device), read[reader], value[:, :, index])
            return value.index_copy(2, index, new)

        hooks = [(self._name(reader), partial(write, reader=reader)) for reader in above]
        with self.model.hooks(fwd_hooks=hooks):
            logits = frozen.recording.replay(min(above), rows, frozen.start)
        return logits[:, -1].float()

    def _name(self, layer: int) -> str:
        return f"blocks.{layer}.attn.hook_{self.reading.component}"


@dataclass(frozen=True, eq=False)
class Frozen:
    """The clean run that all else is frozen at, and the corrupted z that senders take.

    `patched_at`: the columns where senders take it, `read_at`: where receivers are set.
    """

    recording: Recording
    clean: dict[int, Float[Tensor, "batch token head d_head"]]
    mlps: dict[int, Float[Tensor, "batch token d_model"]]
    corrupted: dict[int, Float[Tensor, "batch token head d_head"]]
    batch: PairBatch
    patched_at: Bool[Tensor, "batch token"]
    read_at: Bool[Tensor, "batch token"]

    @property
    def start(self) -> int:
        """The first column where any sender changes."""
        return int(self.patched_at.any(0).int().argmax()) if self.recording.can_start_late else 0

    def rows(self, n_senders: int) -> Tensor:
        """The pairs, once for each sender."""
        return torch.arange(len(self.batch), device=self.patched_at.device).repeat(n_senders)

    def hooks(self, layer: int, heads: list[int]) -> Iterator[tuple[str, Callable]]:
        """Every z from `layer` on at its clean value but for one head in each sender's rows."""
        rows = self.rows(len(heads))

        def freeze(value: Tensor, hook, clean: Tensor) -> Tensor:
            return clean[rows, self.start :].to(value.device)

        def patch(value: Tensor, hook) -> Tensor:
            return self._patched(layer, heads).to(value.device)

        for later, z in self.clean.items():
            if later > layer:
                yield f"blocks.{later}.attn.hook_z", partial(freeze, clean=z)
        for later, written in self.mlps.items():
            if later >= layer:
                yield f"blocks.{later}.hook_mlp_out", partial(freeze, clean=written)
        yield f"blocks.{layer}.attn.hook_z", patch

    def _patched(
        self, layer: int, heads: list[int]
    ) -> Float[Tensor, "sender_and_batch token head d_head"]:
        clean, corrupted = (z[layer][:, self.start :] for z in (self.clean, self.corrupted))
        own = torch.arange(clean.shape[2]) == torch.tensor(heads)[:, None]
        where = self.patched_at[None, :, self.start :, None, None].to(clean.device)
        where = where & own.to(clean.device)[:, None, None, :, None]
        return torch.where(where, corrupted, clean).flatten(0, 1)


class AllRead(Exception):
    """Raised in pass 2 after the last receiver: what comes after it changes nothing."""


def _keeping(site: str, layer: int, values: dict[int, Tensor]) -> tuple[str, Callable]:
    """A hook that keeps a layer's value, the first time (`record` tries its replay afterwards)."""

    def keep(value: Tensor, hook) -> None:
        values.setdefault(layer, value)

    return f"blocks.{layer}.{site}", keep
