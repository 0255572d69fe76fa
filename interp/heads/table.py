"""The table behind `HeadScores`: its columns, their order, and means over samples."""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from interp.errors import UserError
from interp.heads.head import heads_in

KEY = ["tower", "layer", "head"]
COLUMNS = ["layer", "head", "score", "std", "n", "tower"]


class ScoresError(UserError):
    """A table of head scores, or a file of one, that cannot be what was asked for."""


def tidy(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The columns complete, typed and ordered; rows by tower, layer, head (and their order)."""
    missing = {"layer", "head", "score"} - set(table.columns)
    if missing:
        raise ScoresError(f"table: lacks the columns {', '.join(sorted(missing))}.")
    if "samples" in table.columns:
        raise ScoresError("table: 'samples' is no column; give it as HeadScores(..., samples=...).")
    defaults = {"std": np.nan, "n": 1, "tower": "text"}
    table = table.assign(**{k: v for k, v in defaults.items() if k not in table.columns})
    for name in ("layer", "head", "n"):
        numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
        if not ((numbers >= 0) & (numbers % 1 == 0)).all():
            raise ScoresError(f"table: the column {name!r} must hold whole numbers from 0 on.")
        table[name] = numbers.astype(np.int64)
    table = table.astype({"score": np.float64, "std": np.float64, "tower": "str"})
    double = table.duplicated(KEY)
    if double.any():
        raise ScoresError(
            f"table: {double.sum()} heads are there twice ({heads_in(table[double])[0]})."
        )
    extras = [name for name in table.columns if name not in COLUMNS]
    order = np.lexsort([table[name].to_numpy() for name in reversed(KEY)])
    return table[COLUMNS + extras].iloc[order].reset_index(drop=True), order


def by_score(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by falling score; ties go to the lower layer, then the lower head."""
    order = ["score", "layer", "head", "tower"]
    return table.sort_values(order, ascending=[False, True, True, True], kind="stable")


def as_numpy(values: Shaped[Any, "..."]) -> Float[np.ndarray, "..."]:
    """Floats in double precision from an array or a tensor of any type, on any device."""
    if hasattr(values, "detach"):  # numpy knows no bfloat16
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def mean_std_n(
    samples: Float[np.ndarray, "prompt row"],
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Mean, sample standard deviation and number of what is not NaN in each column."""
    there = ~np.isnan(samples)
    n = there.sum(axis=0)
    mean = np.where(n > 0, np.where(there, samples, 0).sum(axis=0) / np.maximum(n, 1), np.nan)
    squares = (np.where(there, samples - mean, 0) ** 2).sum(axis=0)
    return mean, np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1)), np.nan), n


def short(value) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
