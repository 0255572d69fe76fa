"""By how much a head's output differs when the image is taken away.

With z+ a head's output (before W_O) at the token that predicts the next one, and z- the same with
the prompt's images deleted,

    VHD = |z+ - z-|                      activity = |z-|^2
    T-VHD(k) = sum over layers of the k largest VHD in each

Among the heads of a layer, one whose VHD and activity both lie above mean + one standard deviation
is an *outlier*: it says more without the image. The *upper half* are the heads whose VHD lies above
the layer's median once that of outliers is set to 0.

VHD grows with the length of what a head says, so it compares heads of one layer only;
*relative* = VHD / (|z+| + |z-|), between 0 and 1, compares layers.

Source: He et al. 2024, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head
Divergence" (arXiv 2412.13949), equations 4 to 7. It does not say which standard deviation; here it
is the population's (n in the denominator). The median of an even number is the mean of the middle
two, so that upper and lower half are equally large.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Heads = Float[Tensor, "*rows head"]


class Divergence(NamedTuple):
    """What a layer's heads say with and without the image, compared."""

    distance: Heads
    relative: Heads
    activity: Heads


def divergence(
    z: Float[Tensor, "*rows head d_head"], without: Float[Tensor, "*rows head d_head"]
) -> Divergence:
    """VHD, relative VHD and activity of each head, float32."""
    z, without = z.float(), without.float()
    distance, length = (z - without).norm(dim=-1), without.norm(dim=-1)
    relative = distance / (z.norm(dim=-1) + length).clamp_min(torch.finfo(torch.float32).tiny)
    return Divergence(distance, relative, length**2)


def outliers(distance: Heads, activity: Heads) -> Bool[Tensor, "*rows head"]:
    """Heads that say more without the image, among those of their layer."""
    return _stands_out(distance) & _stands_out(activity)


def upper_half(distance: Heads, activity: Heads | None = None) -> Bool[Tensor, "*rows head"]:
    """Heads with more than the layer's median; with `activity` outliers are none of them.

    Strictly more: where nothing differs, no head is chosen.
    """
    if activity is not None:
        distance = distance.masked_fill(outliers(distance, activity), 0)
    return distance > _median(distance)


def lower_half(distance: Heads) -> Bool[Tensor, "*rows head"]:
    """Heads with less than the layer's median: as many as the upper half has, the control."""
    return distance < _median(distance)


def token_divergence(
    distance: Float[Tensor, "batch row layer head"],
) -> Float[Tensor, "batch row head"]:
    """T-VHD for each k, the first for k = 1."""
    return distance.sort(-1, descending=True).values.cumsum(-1).sum(2)


def _stands_out(values: Heads) -> Bool[Tensor, "*rows head"]:
    mean = values.mean(-1, keepdim=True)
    return values > mean + values.std(-1, correction=0, keepdim=True)


def _median(values: Heads) -> Float[Tensor, "*rows 1"]:
    ordered, n = values.sort(-1).values, values.shape[-1]
    return (ordered[..., [(n - 1) // 2]] + ordered[..., [n // 2]]) / 2
