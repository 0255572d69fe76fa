"""Tables of disjoint samples become the table of all of them.

With n_i, m_i, s_i the parts,

    n = sum n_i,   m = sum n_i m_i / n,   (n - 1) s^2 = sum [(n_i - 1) s_i^2 + n_i (m_i - m)^2]

(Chan, Golub, LeVeque 1979), which says the same as adding up sums and sums of squares but does
not cancel when the spread is small beside the mean.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from interp.heads.head import Head, heads_in
from interp.heads.table import COLUMNS, KEY, ScoresError, short

# Facts about one part of a run; all other metadata must agree before tables merge.
PER_PART = ("prompts", "shard", "created", "seconds", "resumed")


def merged_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The formula at the top of this file, for all heads at once.

    Other float columns count as means over the same samples; other columns must agree.
    """
    rows = pd.concat(tables, ignore_index=True)
    unknown = rows[(rows["n"] > 1) & rows["std"].isna() & rows["score"].notna()]
    if len(unknown):
        raise ScoresError(
            f"parts: {heads_in(unknown)[0]} has n={unknown['n'].iloc[0]} but no std; both are "
            "needed to merge."
        )

    group = rows.groupby(KEY).ngroup().to_numpy()

    def summed(column: pd.Series) -> pd.Series:
        sums = np.bincount(group, weights=column)  # NaN stays: an undefined part makes the whole so
        return pd.Series(sums[group], index=rows.index)

    def averaged(column: pd.Series) -> pd.Series:
        return summed((rows["n"] * column).where(rows["n"] > 0, 0.0)) / total

    total = summed(rows["n"])
    mean = averaged(rows["score"])
    within = (rows["n"] - 1) * rows["std"].where(rows["n"] > 1, 0.0) ** 2
    between = rows["n"] * (rows["score"] - mean) ** 2
    squares = summed((within + between).where(rows["n"] > 0, 0.0))
    std = np.sqrt(squares / (total - 1).where(total > 1))
    merged = rows.assign(score=mean, std=std, n=total)
    for name in merged.columns.difference(COLUMNS, sort=False):
        if pd.api.types.is_float_dtype(rows[name]):
            merged[name] = averaged(rows[name])
        else:
            _check_agrees(rows, name)
    return merged.drop_duplicates(KEY, ignore_index=True)


def _check_agrees(rows: pd.DataFrame, name: str):
    differs = rows.groupby(KEY)[name].transform(lambda values: values.nunique(dropna=False)) > 1
    if differs.any():
        raise ScoresError(
            f"parts: the column {name!r} differs at {heads_in(rows[differs])[0]} and holds no "
            "floats that could be averaged. Drop it before merging."
        )


def merged_samples(
    parts: Sequence[tuple[list[Head], Float[np.ndarray, "_ _"] | None]],
    table: pd.DataFrame,
) -> Float[np.ndarray, "prompt row"] | None:
    """Samples one below the other, in the rows of `table`; None unless every part kept them.

    `parts`: the heads of each part's columns, and its samples.
    """
    rows = {head: row for row, head in enumerate(heads_in(table))}
    pieces = []
    for heads, samples in parts:
        if samples is None:
            return None
        piece = np.full((len(samples), len(rows)), np.nan)
        piece[:, [rows[head] for head in heads]] = samples
        pieces.append(piece)
    return np.concatenate(pieces)


def merged_metadata(all_metadata: list[dict]) -> dict:
    """What agrees, and under `parts` the facts of single parts that differ (without doubles)."""
    shared = [_without(metadata, (*PER_PART, "parts")) for metadata in all_metadata]
    for other in shared[1:]:
        for key in sorted(shared[0].keys() | other.keys()):
            if shared[0].get(key) != other.get(key):
                raise ScoresError(
                    f"parts: {key!r} differs ({short(shared[0].get(key))} and "
                    f"{short(other.get(key))}): only tables of one analysis, model and set of "
                    "parameters merge."
                )
    entries = [
        {**{key: metadata[key] for key in PER_PART if key in metadata}, **entry}
        for metadata in all_metadata
        for entry in metadata.get("parts", [{}])
    ]
    same = {
        key: entries[0][key]
        for key in PER_PART
        if key in entries[0] and all(entry.get(key) == entries[0][key] for entry in entries)
    }
    rest: list[dict] = []
    for entry in (_without(entry, tuple(same)) for entry in entries):
        if entry and entry not in rest:
            rest.append(entry)
    return {**shared[0], **same, **({"parts": rest} if rest else {})}


def _without(metadata: dict, keys: tuple[str, ...]) -> dict:
    return {key: value for key, value in metadata.items() if key not in keys}
