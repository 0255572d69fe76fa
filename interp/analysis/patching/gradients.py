"""Gradients on pairs of prompts: both sides' values, and the slope of the metric between them.

`base` is the side that would be patched, `source` the side that values come from: the clean prompt
is the source when denoising and the base when noising. The gradient is taken in the base run
(`ig_steps` 1) or at midpoints between what the two prompts send into the first block.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analysis.paired import Metric, PairBatch, PairError
from interp.analysis.patching.sweep import Direction
from interp.model.gradients import ENTRY, Trace, along_path, trace
from interp.model.hooked import Batch, HookedModel


@dataclass(frozen=True, eq=False, repr=False)
class PairGradients:
    """What hooks saw on both sides, each side's metric, and a trace for each point."""

    base: dict[str, Any]
    source: dict[str, Any]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    points: Iterable[Trace]


def check_gradient(direction: str, ig_steps: int, metric: str) -> None:
    """Raises `PairError` for a gradient that cannot be taken, or vanishes."""
    if direction not in get_args(Direction):
        raise PairError(f"direction={direction!r}: one of {', '.join(get_args(Direction))}.")
    if ig_steps < 1:
        raise PairError(f"ig_steps={ig_steps}: at least 1.")
    if metric == "kl" and direction == "noise" and ig_steps == 1:
        raise PairError(
            "metric='kl': its gradient vanishes in the clean run, where it is largest; give "
            "ig_steps=5 or direction='denoise'."
        )


def where_taken(direction: Direction, ig_steps: int) -> str:
    """Where the gradient is taken, in words: for metadata."""
    if ig_steps == 1:
        return f"in the {'corrupted' if direction == 'denoise' else 'clean'} run"
    return f"mean of {ig_steps} midpoints between what both prompts send into the first block"


def pair_gradients(
    model: HookedModel,
    batch: PairBatch,
    metric: Metric,
    direction: Direction,
    ig_steps: int,
    names: Sequence[str],
    looks: Sequence[str] = (),
) -> PairGradients:
    """Gradients at the hooks `names`, values there and at `looks`.

    One forward pass on each side and one backward pass; with `ig_steps` above 1, so many passes
    both ways besides. `points` is worked out while it is gone through.
    """
    base, source = batch.corrupted, batch.clean
    if direction == "noise":
        base, source = source, base
    source_logits, source_values = _look(model, source, [*names, *looks, ENTRY])

    def measure(logits: Tensor, clean_logits: Tensor) -> Tensor:
        return metric(logits, batch.answers(clean_logits))

    def measure_base(logits: Tensor) -> Tensor:
        return measure(logits, source_logits if direction == "denoise" else logits.detach())

    if ig_steps == 1:
        traced = trace(model, base.input_ids, base.attention_mask, names, measure_base, looks=looks)
        base_logits, base_values, points = traced.logits, traced.values, [traced]
    else:
        base_logits, base_values = _look(model, base, [*names, *looks, ENTRY])
        clean_logits = source_logits if direction == "denoise" else base_logits
        points = along_path(
            model,
            base.input_ids,
            base.attention_mask,
            names,
            partial(measure, clean_logits=clean_logits),
            base_values[ENTRY],
            source_values[ENTRY],
            ig_steps,
            looks=looks,
        )
    base_metric = measure_base(base_logits)
    clean_logits = source_logits if direction == "denoise" else base_logits
    source_metric = measure(source_logits, clean_logits)
    ends = (source_metric, base_metric) if direction == "denoise" else (base_metric, source_metric)
    return PairGradients(base_values, source_values, *ends, points)


def _look(
    model: HookedModel, side: Batch, names: Sequence[str]
) -> tuple[Float[Tensor, "batch d_vocab"], dict[str, Any]]:
    """The last token's logits, and what hooks see; no gradients."""
    kept: dict[str, Any] = {}

    def keep(value: Any, hook, name: str) -> None:
        kept[name] = value

    hooks: list[tuple[str, Callable]] = [(name, partial(keep, name=name)) for name in set(names)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model.last_logits(side.input_ids, side.attention_mask, 1)
    return logits[:, -1], kept
