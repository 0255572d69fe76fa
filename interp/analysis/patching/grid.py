"""The cells of a sweep: which site of which layers, heads and positions each of them patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import pandas as pd
from datasets import Dataset

from interp.analysis.paired import PairError, Position
from interp.model.hooked import HookedModel


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
        every = (
            list(range(len(model.blocks))) if SITES[site].heads is None else model.attention_layers
        )
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
