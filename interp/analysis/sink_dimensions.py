"""Sink dimensions: the few coordinates of a residual stream that are huge at sinks of attention.

With x what enters a block,

    |x[d]| / rms(x) >= tau,      rms(x) = sqrt(mean(x^2) + 1e-6)

at the *first* token of most prompts and layers (from the third to the last but one), and at no more
than a tenth of all other tokens, makes d one of them; typically one to three are. A model may have
none. (The first token may be an image's, and its patches may share coordinates which are large in
most of them: hence the second condition.) Since |x[d]| / rms(x) is at most
sqrt(width), and tau^2 / width the share that one coordinate has of the vector's energy, tau = 20 at
width 4096 is 20 sqrt(width / 4096) at another.

Source: Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
(arXiv 2503.03321), whose code has lists for some models; how to find them is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.analysis.image_attention import image_prompts
from interp.errors import UserError
from interp.model.hooked import HookedModel
from interp.model.images import images_of

PROBED = 30  # prompts that sink dimensions are looked for on
MOST = 0.5  # of prompts and layers must agree
RARE = 0.1  # of the other tokens may be as large: what is large everywhere marks no sink
SHOWN = 20


class VisualSinkError(UserError):
    """Visual sinks that can't be looked for as asked, or a model that has none."""


def scaled_tau(width: int) -> float:
    """The threshold that means in a residual stream of `width` what 20 means in one of 4096."""
    return 20 * (width / 4096) ** 0.5


def sizes(x: Float[Tensor, "*at d_model"]) -> Float[Tensor, "*at d_model"]:
    """|x[d]| / rms(x), float32; no learned gain."""
    x = x.float()
    return x.abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def phi(x: Float[Tensor, "*at d_model"], dimensions: Sequence[int]) -> Float[Tensor, "*at"]:
    """How large the largest of these coordinates is; 0 where there are none."""
    if not len(dimensions):
        return x.new_zeros(x.shape[:-1], dtype=torch.float32)
    return sizes(x)[..., list(dimensions)].amax(-1)


@dataclass(frozen=True, eq=False)
class SinkDimensions:
    """Which coordinates are huge at the first token.

    `table` has the largest ones: `dimension, share` (of prompts and layers that are over tau),
    `size` (mean), `elsewhere` (share of the other tokens that are over tau), `found`.
    """

    table: pd.DataFrame
    tau: float
    layers: tuple[int, ...]
    model: str

    @property
    def found(self) -> tuple[int, ...]:
        """Those over tau at the first token in most prompts and layers, and rarely elsewhere."""
        return tuple(sorted(self.table.loc[self.table["found"], "dimension"].tolist()))

    def needed(self) -> tuple[int, ...]:
        """As `found`. Raises `VisualSinkError` where there are none."""
        if not self.found:
            first = self.table.iloc[0]
            raise VisualSinkError(
                f"no sink dimensions: {self.model} has no coordinate above tau = {self.tau:.2f} at "
                f"the first token of most prompts and rarely elsewhere; {int(first['dimension'])} "
                f"is so in {first['share']:.0%} of prompts and layers (mean {first['size']:.2f}), "
                f"and at {first['elsewhere']:.0%} of the other tokens."
            )
        return self.found

    def __repr__(self) -> str:
        what = ", ".join(map(str, self.found)) or "no sink dimensions"
        return f"SinkDimensions({what}; tau {self.tau:.2f})"


@torch.no_grad()
def sink_dimensions(
    model: HookedModel, prompts, *, tau: float | None = None, batch_size: int = 8
) -> SinkDimensions:
    """Look for D on the first prompts, in blocks from the third to the last but one.

    (All blocks in a model that has none such.) Raises `ImageError` for a text-only model.
    """
    prompts = image_prompts(model, prompts)
    prompts = prompts.select(range(min(PROBED, len(prompts))))
    tau = checked_tau(model, tau)
    layers = range(2, len(model.blocks) - 1) or range(len(model.blocks))
    first = {layer: [] for layer in layers}
    elsewhere = torch.zeros(model.cfg.d_model)
    n_other = 0

    def look(x: Tensor, hook, layer: int, at: Tensor) -> None:
        nonlocal elsewhere, n_other
        size = sizes(x)
        rows = torch.arange(len(x), device=x.device)
        first[layer].append(size[rows, at].cpu())
        others = model.call.real.clone()
        others[rows, at] = False
        elsewhere = elsewhere + (size[others] >= tau).sum(0).cpu()
        n_other += int(others.sum())

    for batch in model.batches(prompts["input_ids"], batch_size, images=images_of(prompts)):
        hooks = [
            (f"blocks.{layer}.hook_resid_pre", partial(look, layer=layer, at=batch.first))
            for layer in layers
        ]
        with model.hooks(fwd_hooks=hooks):
            model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
    size = torch.stack([torch.cat(found) for found in first.values()]).flatten(0, 1)
    share = (size >= tau).float().mean(0)
    table = pd.DataFrame(
        {
            "dimension": np.arange(len(share)),
            "share": share.numpy(),
            "size": size.mean(0).numpy(),
            "elsewhere": (elsewhere / max(n_other, 1)).numpy(),
        }
    )
    table["found"] = (table["share"] > MOST) & (table["elsewhere"] <= RARE)
    table = table.sort_values(["share", "size"], ascending=False, ignore_index=True).head(SHOWN)
    return SinkDimensions(table, tau, tuple(layers), model.name)


def checked_tau(model: HookedModel, tau: float | None) -> float:
    """Raises `VisualSinkError` where nothing can reach it."""
    width = model.cfg.d_model
    if tau is None:
        return scaled_tau(width)
    if not 0 < tau <= width**0.5:
        raise VisualSinkError(
            f"tau={tau}: above 0, and at most sqrt({width}) = {width**0.5:.1f} in {model.name}, "
            f"or nothing can be a sink; the default is {scaled_tau(width):.2f}."
        )
    return tau
