"""Activation patching: copy one value of one run into another, and see how far the answer moves.

With m_c and m_r the metric on the clean and on the corrupted prompt, and m_p under the patch,

    effect = (m_p - m_r) / (m_c - m_r)          0: as corrupted, 1: as clean

as a ratio of means over pairs (the mean of ratios explodes on pairs with a small gap). Denoising
runs the corrupted prompt with values of the clean one: is this value enough? Noising runs the clean
prompt with values of the corrupted one: is it needed? They are no mirror images. `moved` is the
share of the gap that a patch covers, whichever way: effect, or 1 - effect when noising.

Every cell is exact, as if the whole model had run: blocks before the patch are replayed from a
recording (see `interp.model.replay`), many cells in one pass, and under causal attention only from
the first position where anything changes.

Sources: Zhang & Nanda 2024, "Towards Best Practices of Activation Patching" (arXiv 2309.16042);
Heimersheim & Nanda 2024 (arXiv 2404.15255); noise at the embedding and windows of layers: Meng et
al. 2022, ROME (arXiv 2202.05262).
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analysis.paired import Answers, Metric, PairBatch, PairError, metric_of, pair_batch
from interp.analysis.shards import in_shards
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.model.replay import Recording, record, tokens_at_once
from interp.tasks.prompts import describe

Direction = Literal["denoise", "noise"]
Source = Literal["pair", "zero", "mean", "resample"]
Position = int | str

PAIRS_AT_ONCE = 16
RESAMPLES = 2000


@dataclass(frozen=True)
class Site:
    """A kind of activation: its hook in each block, and whose heads its third axis counts."""

    hook: str
    heads: Literal["query", "kv"] | None = None

    @property
    def is_pattern(self) -> bool:
        """`[batch head query key]`; all others have positions second."""
        return self.hook.endswith("hook_pattern")


SITES = {
    "resid_pre": Site("hook_resid_pre"),
    "resid_mid": Site("hook_resid_mid"),
    "resid_post": Site("hook_resid_post"),
    "attn_out": Site("hook_attn_out"),
    "mlp_out": Site("hook_mlp_out"),
    "z": Site("attn.hook_z", "query"),
    "q": Site("attn.hook_q", "query"),
    "k": Site("attn.hook_k", "kv"),
    "v": Site("attn.hook_v", "kv"),
    "pattern": Site("attn.hook_pattern", "query"),
}
AXES = ("layer", "head", "position")


@dataclass(frozen=True)
class Noise:
    """Corrupt by Gaussian noise on the embeddings of the tokens at the positions `at`.

    Its standard deviation is `scale` times that of the model's token embeddings (3 in ROME). The
    draw of a pair depends on `seed` and its tokens alone.
    """

    at: tuple[str, ...]
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "at", (self.at,) if isinstance(self.at, str) else tuple(self.at))
        if not self.at or self.scale <= 0:
            raise PairError(f"at={self.at}, scale={self.scale}: some positions, and above 0.")


@dataclass(frozen=True, eq=False)
class Patching:
    """What a sweep of patches did: `values[i, c]` is the metric of pair i under the patch of cell c.

    `cells` has the columns named in `by`, one row a cell; `clean` and `corrupted` are each pair's
    metric without a patch.
    """

    cells: pd.DataFrame
    values: Float[np.ndarray, "pair cell"]
    clean: Float[np.ndarray, " pair"]
    corrupted: Float[np.ndarray, " pair"]
    metadata: dict[str, Any]

    @property
    def by(self) -> list[str]:
        return list(self.cells.columns)

    @property
    def gap(self) -> float:
        """Mean metric of the clean prompts minus that of the corrupted ones."""
        return float(self.clean.mean() - self.corrupted.mean())

    @property
    def table(self) -> pd.DataFrame:
        """One row a cell: `by`, `value`, `effect`, `moved`, `low`, `high`, `n`.

        `low` and `high` bound `effect`: 95 %, bootstrap over pairs of the ratio of means.
        """
        effect = self._moved_up.mean(0) / self._gap_or_nan
        low, high = self._interval()
        moved = effect if self.metadata["direction"] == "denoise" else 1 - effect
        return self.cells.assign(
            value=self.values.mean(0), effect=effect, moved=moved, low=low, high=high,
            n=len(self.values),
        )  # fmt: skip

    @property
    def per_prompt(self) -> pd.DataFrame:
        """One row a pair and cell: `pair`, `by`, `value`, and the pair's `clean`, `corrupted`."""
        n_pairs, n_cells = self.values.shape
        pair = np.repeat(np.arange(n_pairs), n_cells)
        cells = pd.concat([self.cells] * n_pairs, ignore_index=True)
        return cells.assign(
            pair=pair, value=self.values.reshape(-1), clean=self.clean[pair],
            corrupted=self.corrupted[pair],
        )  # fmt: skip

    @property
    def heads(self) -> HeadScores:
        """`moved` as scores of heads, where `by` is layer and head.

        Raises `PairError` for other cells, or for the key-value heads of a grouped-query model.
        """
        if set(self.by) != {"layer", "head"}:
            raise PairError(f"heads: the cells are by {', '.join(self.by)}, not by layer and head.")
        if self.metadata["head_kind"] == "kv":
            raise PairError(
                f"heads: the cells are key-value heads, each shared by several heads; see .table."
            )
        up = self._moved_up / self._gap_or_nan
        moved = up if self.metadata["direction"] == "denoise" else 1 - up
        return HeadScores._summarise(
            self.cells.assign(tower="text"), moved, self.metadata, keep_samples=True
        )

    def plot(self, **options):
        """`effect` as a map over two axes, or a line over one."""
        from interp import figures

        return figures.effects(self.table, self.by, **options)

    def __repr__(self) -> str:
        about = self.metadata
        table = self.table.sort_values("moved", ascending=False).head(3)
        best = "; ".join(
            f"{' '.join(f'{k} {row[k]}' for k in self.by)}: {row['moved']:.2f}"
            for _, row in table.iterrows()
        )
        return (
            f"Patching({about['site']}, {about['direction']}, {about['metric']}: clean "
            f"{self.clean.mean():.3g}, corrupted {self.corrupted.mean():.3g}; {len(self.cells)} "
            f"cells x {len(self.values)} pairs; share of the gap moved: {best})"
        )

    @property
    def _moved_up(self) -> Float[np.ndarray, "pair cell"]:
        return self.values - self.corrupted[:, None]

    @property
    def _gap_or_nan(self) -> float:
        return self.gap or float("nan")

    def _interval(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.values)
        if n < 2:
            return (np.full(len(self.cells), np.nan),) * 2
        draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES) / n
        gaps = draws @ (self.clean - self.corrupted)
        with np.errstate(divide="ignore", invalid="ignore"):
            effects = (draws @ self._moved_up) / gaps[:, None]
        low, high = np.nanquantile(effects, [0.025, 0.975], axis=0)
        return low, high


def activation_patching(
    model: HookedModel,
    pairs: Dataset,
    site: str = "z",
    by: Sequence[str] = ("layer", "head"),
    metric: str | Metric = "logit_diff",
    *,
    direction: Direction = "denoise",
    source: Source = "pair",
    corruption: Noise | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Sequence[Position] | None = None,
    window: int = 1,
    batch_size: int | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Patching:
    """Patch every cell of a grid by itself, and measure each.

    Args:
        pairs: From `interp.tasks` (`ioi`, `pairs`, ...): clean and corrupted prompts.
        site: One of `SITES`; `k` and `v` are counted by key-value heads.
        by: The axes of the grid, of "layer", "head", "position"; a patch covers all of an axis that
            is not named.
        metric: A name in `METRICS`, or a function of logits and `Answers`.
        direction: Clean values into the corrupted run ("denoise"), or the other way.
        source: "pair": the other prompt of the pair. Ablations of the clean run (these are
            "noise"): "zero", "mean" (over all tokens of all clean prompts), "resample" (the clean
            prompt before in its batch of 16, same position; prompts of one length).
        corruption: Corrupt the clean prompts by noise instead of using the corrupted ones.
        layers, heads: Leave out the others; default all.
        positions: Numbers (from the start; negative: from the end) where all prompts are of one
            length, or names from the column `positions`. Default: every number, else every name.
        window: Patch so many adjacent layers together; the cell is named by the middle one.
        batch_size: Patched prompts in one pass; default as many as are fast and fit the memory.
        out: Folder to keep finished pairs in: a killed run continues there.

    Raises:
        PairError: An unknown site, axis or metric, a head axis where a site has none, positions
            that are not there, pairs that are none.
        HookError: A site that this architecture does not have (parallel blocks: resid_mid).
        ReplayError: A model that cannot be replayed, or is in training mode.
    """
    name, function = metric_of(metric)
    grid = Grid.of(model, pairs, site, by, layers, heads, positions, window)
    _check(direction, source, corruption, batch_size)
    means = _means(model, pairs, grid) if source == "mean" else None
    settings = {
        "analysis": "activation_patching",
        "site": site,
        "by": list(by),
        "metric": name,
        "direction": direction,
        "source": source,
        "corruption": corruption and asdict(corruption),
        "window": window,
        "head_kind": SITES[site].heads,
        "task": describe(pairs),
        "cells": zlib.crc32(grid.cells.to_json().encode()),
        **model.provenance(),
    }
    sweep = Sweep(model, grid, function, direction, source, corruption, means, batch_size)
    table = in_shards(
        sweep.run, pairs, PAIRS_AT_ONCE, settings, out, resume, "patching" if progress else None
    )
    return Patching(
        grid.cells,
        np.stack(table["values"].to_list()),
        table["clean"].to_numpy(float),
        table["corrupted"].to_numpy(float),
        settings,
    )


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of a sweep, and which layers, head and position each one patches."""

    site: Site
    cells: pd.DataFrame
    layers: list[tuple[int, ...]]

    @classmethod
    def of(
        cls, model: HookedModel, pairs: Dataset, site: str, by, layers, heads, positions, window
    ) -> "Grid":
        """Raises as `activation_patching` says."""
        by = [by] if isinstance(by, str) else list(by)
        if site not in SITES:
            raise PairError(f"site={site!r}: one of {', '.join(SITES)}.")
        if not by or len(set(by)) < len(by) or not set(by) <= set(AXES):
            raise PairError(f"by={by}: one or more of {', '.join(AXES)}, each once.")
        if "head" in by and SITES[site].heads is None:
            raise PairError(f"by={by}: {site} has no heads; z, q, k, v and pattern do.")
        if window < 1 or (window > 1 and "layer" not in by):
            raise PairError(f"window={window}: at least 1, and above 1 only by layer.")
        every = list(range(len(model.blocks))) if SITES[site].heads is None else model.attention_layers
        if layers is not None:
            outside = [layer for layer in layers if layer not in every]
            if outside:
                raise PairError(f"layers: {outside[0]} is not among {every[0]}-{every[-1]}.")
        ranges: dict[str, Sequence] = {
            "layer": every if layers is None else list(layers),
            "head": _heads(model, SITES[site], heads) if "head" in by else [],
            "position": _positions(pairs, positions) if "position" in by else [],
        }
        model.check_hooks(f"blocks.{layer}.{SITES[site].hook}" for layer in ranges["layer"])
        rows = list(product(*(ranges[axis] for axis in by)))
        cells = pd.DataFrame(rows, columns=by)
        before, after = (window - 1) // 2, window // 2
        patched = [
            tuple(k for k in every if layer - before <= k <= layer + after)
            if "layer" in by
            else tuple(ranges["layer"])
            for layer in (cells["layer"] if "layer" in by else [0] * len(cells))
        ]
        return cls(SITES[site], cells, patched)

    @property
    def touched(self) -> list[int]:
        """All layers that any cell patches."""
        return sorted({layer for layers in self.layers for layer in layers})

    def name(self, layer: int) -> str:
        return f"blocks.{layer}.{self.site.hook}"

    def column(self, axis: str) -> list:
        """Each cell's head or position; None where it patches all of them."""
        return self.cells[axis].tolist() if axis in self.cells else [None] * len(self.cells)


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
        noised = partial(_noised, self.model, batch, self.corruption)
        corrupted_ids = batch.corrupted.input_ids if self.corruption is None else batch.clean.input_ids
        sides = {
            "clean": (batch.clean.input_ids, partial(_noised, self.model, batch, None)),
            "corrupted": (corrupted_ids, noised),
        }
        base = "corrupted" if self.direction == "denoise" else "clean"
        other = "clean" if base == "corrupted" else "corrupted"
        ids, corrupting = sides[base]
        with corrupting():
            recording = record(self.model, ids, batch.attention_mask)
        ids, corrupting = sides[other]
        with corrupting():
            logits, values = self._values(ids, batch.attention_mask)
        found = {base: recording.logits[:, -1].float(), other: logits}
        if self.source != "pair":
            values = self._ablated(recording, batch)
        answers = batch.answers(found["clean"])
        measured = {side: self.metric(found[side], answers) for side in sides}
        cells = self._cells(recording, values, batch, answers, measured[base])
        return pd.DataFrame(
            {
                "clean": measured["clean"].tolist(),
                "corrupted": measured["corrupted"].tolist(),
                "values": cells.T.tolist(),
            }
        )

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
            return {layer: torch.zeros((), device=batch.right.device) for layer in self.grid.touched}
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
        real = batch.attention_mask.bool()
        changed = self._changed(recording, batch)
        columns = [_columns(batch, position, real) for position in self.grid.column("position")]
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
                    logits = recording.replay(min(layers), rows, start)[:, -1].float()
                for cell, part in zip(chunk, logits.split(len(batch)), strict=True):
                    found[cell] = self.metric(part, answers)
        return found

    def _changed(self, recording: Recording, batch: PairBatch) -> Bool[Tensor, "batch token"]:
        """Where values of the two runs can differ: from each pair's first different token on."""
        if self.source != "pair" or not recording.can_start_late:
            return torch.ones_like(batch.attention_mask, dtype=torch.bool)
        if self.corruption is None:
            apart = batch.clean.input_ids != batch.corrupted.input_ids
        else:
            apart = _noisy(batch, self.corruption)
        return apart.cumsum(1) > 0

    def _chunks(
        self, cells: list[int], starts: list[int], n_pairs: int, n_tokens: int
    ) -> Iterator[list[int]]:
        """Cells for one pass each, in the order of their starts."""
        while cells:
            n_suffix = n_tokens - starts[cells[0]]
            room = self.batch_size or max(1, tokens_at_once(self.model) // n_suffix)
            size = max(1, room // n_pairs)
            if "position" in self.grid.cells and self.batch_size is None:
                # a later start saves more than a fuller pass
                near = sum(starts[c] - starts[cells[0]] <= n_suffix // 8 for c in cells)
                size = min(size, near)
            yield cells[:size]
            cells = cells[size:]

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


def _columns(
    batch: PairBatch, position: Position | None, real: Bool[Tensor, "batch token"]
) -> Bool[Tensor, "batch token"]:
    """The columns that a cell patches: its position in each pair, or all real ones."""
    if position is None:
        return real
    places = torch.arange(batch.n_tokens, device=real.device).expand_as(real)
    if isinstance(position, str):
        return places == batch.columns(position)[:, None]
    return places == position


def _heads(model: HookedModel, site: Site, heads: Sequence[int] | None) -> list[int]:
    n_kv = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    count = n_kv if site.heads == "kv" else model.cfg.n_heads
    chosen = list(range(count)) if heads is None else [int(head) for head in heads]
    outside = [head for head in chosen if not 0 <= head < count]
    if outside:
        kind = "key-value heads" if site.heads == "kv" else "heads"
        raise PairError(f"heads: {outside[0]} is not among the {kind} 0-{count - 1}.")
    return chosen


def _positions(pairs: Dataset, positions: Sequence[Position] | None) -> list[Position]:
    """Numbers from the start of the prompt, or names."""
    lengths = {len(ids) for ids in pairs["clean_input_ids"]}
    known = list(pairs.features["positions"]) if "positions" in pairs.column_names else []
    if positions is None:
        if len(lengths) == 1:
            return list(range(lengths.pop()))
        if not known:
            raise PairError(
                f"by position: the prompts have {min(lengths)} to {max(lengths)} tokens and no "
                "named positions; give pairs of one length, or name positions."
            )
        return known
    found: list[Position] = []
    for position in positions:
        if isinstance(position, str):
            if position not in known:
                raise PairError(f"positions: {position!r} is none of {', '.join(known) or 'none'}.")
            found.append(position)
            continue
        if len(lengths) > 1:
            raise PairError(
                f"positions: numbers mean the same token only in prompts of one length, and these "
                f"have {min(lengths)} to {max(lengths)}; use names ({', '.join(known) or 'none'})."
            )
        (size,) = lengths
        if not -size <= position < size:
            raise PairError(f"positions: {position} is outside the prompts' {size} tokens.")
        found.append(int(position) % size)
    return found


def _check(direction, source, corruption, batch_size: int | None) -> None:
    for name, value, allowed in (
        ("direction", direction, get_args(Direction)),
        ("source", source, get_args(Source)),
    ):
        if value not in allowed:
            raise PairError(f"{name}={value!r}: one of {', '.join(allowed)}.")
    if source != "pair" and direction != "noise":
        raise PairError(f"source={source!r}: ablates the clean run; give direction='noise'.")
    if batch_size is not None and batch_size < 1:
        raise PairError(f"batch_size={batch_size}: at least 1.")


def _noisy(batch: PairBatch, corruption: Noise) -> Bool[Tensor, "batch token"]:
    places = torch.arange(batch.n_tokens, device=batch.right.device)
    return torch.stack([places == batch.columns(at)[:, None] for at in corruption.at]).any(0)


@contextmanager
def _noised(model: HookedModel, batch: PairBatch, corruption: Noise | None) -> Iterator[None]:
    """Adds the noise to whatever is embedded in the block; nothing without a corruption."""
    if corruption is None:
        yield
        return
    where = _noisy(batch, corruption)
    sigma = corruption.scale * _embedding_spread(model)

    def add(value: Tensor, hook) -> Tensor:
        draws = []
        for ids, mask in zip(batch.clean.input_ids, batch.attention_mask, strict=True):
            own = zlib.crc32(str(ids[mask.bool()].tolist()).encode())
            generator = torch.Generator().manual_seed(own + corruption.seed)
            draws.append(torch.randn(value.shape[1:], generator=generator))
        noise = sigma * torch.stack(draws).to(value)
        return torch.where(where[..., None], value + noise, value)

    with model.hooks(fwd_hooks=[("hook_embed", add)]):
        yield


def _embedding_spread(model: HookedModel) -> float:
    """Standard deviation of the numbers of token embeddings, over tokens spread evenly."""
    count = int(model.cfg.d_vocab)
    tokens = torch.arange(0, count, max(1, count // 2000), device=model.cfg.device)
    return float(model.embed(tokens[None]).float().std())


def _means(model: HookedModel, pairs: Dataset, grid: Grid) -> dict[int, Tensor]:
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
