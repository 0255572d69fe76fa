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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float

from interp.analysis.paired import Metric, PairError, Position, check_pairs, metric_of
from interp.analysis.patching.grid import SITES, Grid
from interp.analysis.patching.noise import Noise
from interp.analysis.patching.sweep import PAIRS_AT_ONCE, Direction, Source, Sweep, mean_values
from interp.analysis.shards import in_shards
from interp.files import write_atomically
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.tasks.prompts import describe

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Patching:
    """What a sweep of patches did: `values[i, c]` is the metric of pair i under cell c's patch.

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
        moved = self._moved.mean(0)
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
                "heads: the cells are key-value heads, each shared by several heads; see .table."
            )
        cells = self.cells.assign(tower="text")
        return HeadScores.from_columns(cells, self._moved, self.metadata)

    def save(self, folder: str | Path) -> Path:
        """Write `cells.parquet`, `per_prompt.parquet` and, by layer and head, `heads.parquet`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in (("cells", self.table), ("per_prompt", self.per_prompt)):
            write_atomically(folder / f"{name}.parquet", table.to_parquet)
        if set(self.by) == {"layer", "head"} and self.metadata["head_kind"] == "query":
            self.heads.save(folder / "heads.parquet")
        return folder

    def plot(self, **options):
        """`effect` as a map over two axes, or a line over one."""
        from interp import figures

        return figures.effects(self.table, self.by, **options)

    def __repr__(self) -> str:
        about = self.metadata
        table = self.table.sort_values("moved", ascending=False).head(3)
        best = "; ".join(
            f"{' '.join(f'{k} {row[k]}' for k in self.by)}: {row['moved']:.2f}"
            for row in table.to_dict("records")
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
    def _moved(self) -> Float[np.ndarray, "pair cell"]:
        noising = self.metadata["direction"] == "noise"
        change = self.clean[:, None] - self.values if noising else self._moved_up
        return change / self._gap_or_nan

    @property
    def _gap_or_nan(self) -> float:
        return self.gap or float("nan")

    def _interval(self) -> Float[np.ndarray, "2 cell"]:
        n = len(self.values)
        if n < 2:
            return np.full((2, len(self.cells)), np.nan)
        draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES) / n
        gaps = draws @ (self.clean - self.corrupted)
        with np.errstate(divide="ignore", invalid="ignore"):
            effects = (draws @ self._moved_up) / gaps[:, None]
        return np.quantile(effects, [0.025, 0.975], axis=0)


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
    check_pairs(pairs)
    name, function = metric_of(metric)
    grid = Grid.of(model, pairs, site, by, layers, heads, positions, window)
    _check(direction, source, corruption, batch_size)
    means = mean_values(model, pairs, grid) if source == "mean" else None
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
    found = Patching(
        grid.cells,
        np.stack(table["values"].to_list()),
        table["clean"].to_numpy(float),
        table["corrupted"].to_numpy(float),
        settings,
    )
    if out is not None:
        found.save(out)
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
