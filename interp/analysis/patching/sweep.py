"""Running a sweep: all cells of a grid on some pairs, by replay, many prompts in one pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analysis.paired import Answers, Metric, PairBatch, PairError, pair_batch
from interp.analysis.patching.grid import Grid, Site
from interp.analysis.patching.noise import Noise, noised, noisy_columns
from interp.model.hooked import HookedModel
from interp.model.replay import Recording, pass_cost, passes, record, tokens_at_once

Direction = Literal["denoise", "noise"]
Source = Literal["pair", "zero", "mean", "resample"]

PAIRS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Sweep:
    """All cells of a grid on some pairs."""

    model: HookedModel
    grid: Grid
    metric: Metric
    direction: Direction
    source: Source
    corruption: Noise | None
    means: dict[int, Tensor] | None
    batch_size: int | None

    @torch.no_grad()
    def run(self, pairs: Dataset) -> pd.DataFrame:
        """One row a pair: its metric on the clean and the corrupted prompt, and under each cell."""
        batch = pair_batch(self.model, pairs)
        base, other = ("clean", "corrupted")[:: 1 if self.direction == "noise" else -1]
        with self._side(batch, base) as ids:
            recording = record(self.model, ids, batch.attention_mask)
        with self._side(batch, other) as ids:
            logits, values = self._values(ids, batch.attention_mask)
        found = {base: recording.logits[:, -1].float(), other: logits}
        if self.source != "pair":
            values = self._ablated(recording, batch)
        answers = batch.answers(found["clean"])
        measured = {side: self.metric(found[side], answers) for side in found}
        cells = self._cells(recording, values, batch, answers, measured[base])
        return pd.DataFrame(
            {
                "clean": measured["clean"].tolist(),
                "corrupted": measured["corrupted"].tolist(),
                "values": cells.T.tolist(),
            }
        )

    @contextmanager
    def _side(self, batch: PairBatch, side: str) -> Iterator[Int[Tensor, "batch token"]]:
        """The tokens of one side, corrupted in the block as it should be."""
        if side == "clean":
            yield batch.clean.input_ids
        elif self.corruption is None:
            yield batch.corrupted.input_ids
        else:
            with noised(self.model, batch, self.corruption):
                yield batch.clean.input_ids

    def _values(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits at the last token, and the site's values in each touched layer."""
        kept: dict[int, Tensor] = {}

        def keep(value: Tensor, hook, layer: int) -> None:
            kept[layer] = value

        layers = self.grid.touched if self.source in ("pair", "resample") else []
        hooks = [(self.grid.name(layer), partial(keep, layer=layer)) for layer in layers]
        with self.model.hooks(fwd_hooks=hooks):
            logits = self.model.last_logits(ids, mask, 1)[:, -1]
        return logits, kept

    def _ablated(self, recording: Recording, batch: PairBatch) -> dict[int, Tensor]:
        """What takes the clean run's place: zeros, means, or another prompt's values."""
        if self.source == "mean":
            assert self.means is not None
            return self.means
        if self.source == "zero":
            return {
                layer: torch.zeros((), device=batch.right.device) for layer in self.grid.touched
            }
        if len(batch) < 2 or not bool(batch.attention_mask.all()):
            raise PairError(
                "source='resample': takes the values of another prompt of the batch, so it needs "
                "two or more pairs, all of one length."
            )
        _, values = self._values(recording.input_ids.roll(1, dims=0), batch.attention_mask)
        return values

    def _cells(
        self,
        recording: Recording,
        values: dict[int, Tensor],
        batch: PairBatch,
        answers: Answers,
        unpatched: Float[Tensor, " batch"],
    ) -> Float[Tensor, "cell batch"]:
        """The metric under each cell's patch."""
        changed = self._changed(recording, batch)
        columns = [batch.at(position) for position in self.grid.column("position")]
        found = unpatched.repeat(len(columns), 1)
        starts = []
        for chosen in columns:
            there = (chosen & changed).any(0)
            starts.append(int(there.int().argmax()) if bool(there.any()) else -1)
        if not recording.can_start_late:
            starts = [min(start, 0) for start in starts]
        # a cell without a start changes nothing: every value it copies is the same in both runs
        order = [cell for cell, start in enumerate(starts) if start >= 0]
        order.sort(key=lambda cell: (self.grid.layers[cell], starts[cell], cell))
        for layers, group in groupby(order, key=lambda cell: self.grid.layers[cell]):
            for chunk in self._chunks(list(group), starts, len(batch), batch.n_tokens):
                start = starts[chunk[0]]
                chosen = torch.stack([columns[cell] for cell in chunk])[:, :, start:]
                hooks = self._hooks(layers, values, chosen, chunk, start)
                rows = torch.arange(len(batch)).repeat(len(chunk))
                with self.model.hooks(fwd_hooks=hooks):
                    logits = recording.replay(min(layers), rows, start, lean=True)[:, -1].float()
                for cell, part in zip(chunk, logits.split(len(batch)), strict=True):
                    found[cell] = self.metric(part, answers)
        return found

    def _changed(self, recording: Recording, batch: PairBatch) -> Bool[Tensor, "batch token"]:
        """Where values of the two runs can differ: from each pair's first different token on."""
        if self.source != "pair" or not recording.can_start_late:
            return torch.ones_like(batch.attention_mask, dtype=torch.bool)
        if self.corruption is None:
            return batch.after_difference
        return noisy_columns(batch, self.corruption).cumsum(1) > 0

    def _chunks(
        self, cells: list[int], starts: list[int], n_pairs: int, n_tokens: int
    ) -> Iterator[list[int]]:
        """Cells for one pass each, in the order of their starts."""
        n_suffix = n_tokens - starts[cells[0]]
        room = self.batch_size or tokens_at_once(self.model) // n_suffix
        most, cost = max(1, room // n_pairs), pass_cost(self.model) / n_pairs
        for first, last in passes([starts[cell] for cell in cells], n_tokens, most, cost):
            yield cells[first:last]

    def _hooks(
        self,
        layers: tuple[int, ...],
        values: dict[int, Tensor],
        chosen: Bool[Tensor, "cell batch token"],
        cells: list[int],
        start: int,
    ) -> list[tuple[str, Callable]]:
        """One hook a layer, which puts each cell's values into its own rows."""
        heads = [self.grid.column("head")[cell] for cell in cells]
        site = self.grid.site

        def patch(value: Tensor, hook, layer: int) -> Tensor:
            split = value.unflatten(0, chosen.shape[:2])  # [cell batch ...]
            where = _where(chosen, heads, value, site).to(value.device)
            new = values[layer]
            if new.dim() == value.dim():  # that of a whole run
                new = new[:, :, start:] if site.is_pattern else new[:, start:]
            return torch.where(where, new.to(value), split).flatten(0, 1)

        return [(self.grid.name(layer), partial(patch, layer=layer)) for layer in layers]


def _where(
    chosen: Bool[Tensor, "cell batch token"], heads: list[int | None], value: Tensor, site: Site
) -> Bool[Tensor, "..."]:
    """Which numbers of `[cell batch ...]` a chunk of cells replaces."""
    if site.heads is None:
        return chosen[..., None]
    n_heads = value.shape[1] if site.is_pattern else value.shape[2]
    own = torch.ones(len(heads), n_heads, dtype=torch.bool, device=chosen.device)
    for row, head in enumerate(heads):
        if head is not None:
            own[row] = False
            own[row, head] = True
    if site.is_pattern:  # [cell batch head query key]
        return chosen[:, :, None, :, None] & own[:, None, :, None, None]
    return chosen[:, :, :, None, None] & own[:, None, None, :, None]


def mean_values(model: HookedModel, pairs: Dataset, grid: Grid) -> dict[int, Tensor]:
    """Mean of the site's values over all real tokens of the clean prompts, by layer."""
    sums: dict[int, Tensor] = {}
    count = 0

    def add(value: Tensor, hook, layer: int) -> None:
        total = value[model.call.real].double().sum(0)
        sums[layer] = sums.get(layer, torch.zeros_like(total)) + total

    if grid.site.is_pattern:
        raise PairError("source='mean': patterns of different queries have no common mean.")
    hooks = [(grid.name(layer), partial(add, layer=layer)) for layer in grid.touched]
    with model.hooks(fwd_hooks=hooks):
        for batch in model.batches(list(pairs["clean_input_ids"]), PAIRS_AT_ONCE):
            model.run(batch.input_ids, batch.attention_mask)
            count += int(batch.attention_mask.sum())
    return {layer: (total / count).float() for layer, total in sums.items()}
