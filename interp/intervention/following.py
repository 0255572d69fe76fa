"""What an edit keeps from one step of a generation to the next, row by row.

Rows of a batch change places when beams are reordered, and nobody tells: the cache is reordered,
and so the keys in it say which row of the step before a row goes on from.
"""

from collections.abc import Sized

from jaxtyping import Float, Int
from torch import Tensor

from interp.intervention.base import InterventionError
from interp.model.attention import Attention
from interp.model.call import Call


def check_goes_on(who: str, had: Sized | None, n_rows: int) -> None:
    """Is what was kept of prompts that of a pass of `n_rows` which goes on from a cache?

    Raises `InterventionError`, in which `who` says what asks, where it is not.
    """
    if had is None or len(had) != n_rows:
        what = "no prompt was" if had is None else f"{len(had)} rows were"
        raise InterventionError(
            f"{who}: this pass of {n_rows} rows goes on from a cache, and {what} read in this "
            "block; read the prompt in it too."
        )


class Rows:
    """One layer's rows, from step to step."""

    def __init__(self):
        self._keys: Float[Tensor, "batch column"] | None = None
        self._first = 0

    def go_on(self, attention: Attention, call: Call) -> Int[Tensor, " batch"] | None:
        """For each row that of the step before which it goes on from; None: these are new prompts.

        To be asked once in every pass.
        """
        total = call.real_keys.shape[1]
        first = max(0, total - attention.n_keys)
        # one number a key; a static cache has slots that nothing is in yet
        keys = attention.k[:, 0, : total - first, 0].detach().clone()
        before, began = self._keys, self._first
        self._keys, self._first = keys, first
        if before is None or attention.n_queries >= total:
            return None
        shared = keys[:, max(0, began - first) : began + before.shape[1] - first]
        # a window may have left some of the older ones behind
        before = before[:, max(0, first - began) :]
        if shared.shape[1] != before.shape[1] or not shared.shape[1]:
            return None
        same = (before[None] == shared[:, None]).all(-1)
        return same.int().argmax(1) if bool(same.any(1).all()) else None
