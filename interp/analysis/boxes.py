"""Boxes on maps of an image: windows of whole patches, and whether a map points at one."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Box = Sequence[float]


def box_ratio(values: Float[np.ndarray, "row column"], box: Box) -> float:
    """The sum inside of a box (parts of the map), over its mean over all places of that box.

    The box takes every patch that it touches. NaN where it lies outside, or the map is 0.
    """
    height, width = values.shape
    left, right = _cells(box[0], box[2], width)
    top, bottom = _cells(box[1], box[3], height)
    if right <= left or bottom <= top:
        return float("nan")
    sums = window_sums(values, bottom - top, right - left)
    mean = sums.mean()
    return float(sums[top, left] / mean) if mean > 0 else float("nan")


def _cells(start: float, end: float, n: int) -> tuple[int, int]:
    """The cells of n that [start, end) touches."""
    first = int(np.clip(np.floor(start * n + 1e-6), 0, n))
    last = int(np.clip(np.ceil(end * n - 1e-6), 0, n))
    return first, last


def window_sums(
    values: Float[np.ndarray, "row column"], height: int, width: int
) -> Float[np.ndarray, "top left"]:
    """The sums over all windows of that many cells."""
    total = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    total[1:, 1:] = values.astype(np.float64).cumsum(0).cumsum(1)
    rows = total[height:] - total[:-height]
    return rows[:, width:] - rows[:, :-width]
