"""Scoring prompts shard by shard, so that a run that was killed goes on where it stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from tqdm.auto import tqdm

from interp.runs import Run, RunError


def in_shards(
    score: Callable[[Dataset], pd.DataFrame],
    prompts: Dataset,
    size: int,
    settings: dict[str, Any],
    out: str | Path | None,
    resume: bool,
    desc: str | None,
) -> pd.DataFrame:
    """`score` on slices of `size` prompts, one row a prompt, in order; kept in `out` as they come.

    `settings` is all that the rows depend on: a folder with other settings is refused (`RunError`).
    """
    if size < 1:
        raise RunError(f"batch_size={size}: at least 1.")
    starts = range(0, len(prompts), size)
    slices = [slice(start, min(start + size, len(prompts))) for start in starts]
    bar = tqdm(total=len(prompts), desc=desc, disable=desc is None, unit="prompt", leave=False)
    with bar:
        if out is None:
            return pd.concat([_scored(score, prompts, s, bar) for s in slices], ignore_index=True)
        run = Run.open(out, settings, resume)
        left = list(run.shards(len(prompts), size))
        bar.update(len(prompts) - sum(s.stop - s.start for _, s in left))
        for index, rows in left:
            run.save_shard(index, _scored(score, prompts, rows, bar))
        table = pd.concat(run.tables(), ignore_index=True)
        run.finish(prompts=len(prompts))
    return table


def _scored(score, prompts: Dataset, rows: slice, bar: tqdm) -> pd.DataFrame:
    table = score(prompts.select(range(rows.start, rows.stop)))
    bar.update(len(table))
    return table
