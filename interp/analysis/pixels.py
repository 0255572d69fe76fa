"""Gradients in the pixels of images, as pictures, and where a picture has edges."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import convolve1d, median_filter
from torch import Tensor

from interp.model.gradients import GradientError
from interp.model.hooked import Batch, HookedModel
from interp.model.image_grid import Grid
from interp.model.images import processor_of

BLUR = np.array([0.25, 0.5, 0.25])  # a Gaussian of three pixels
SMOOTHED = 7  # pixels

Picture = Float[Tensor, "channel height width"]


def pixel_gradients(
    model: HookedModel, batch: Batch, grids: Sequence[Grid]
) -> list[tuple[Tensor, Tensor]]:
    """For each prompt of a batch, which has one image each: (gradient, picture), as encoded.

    The gradient of log p of the likeliest next token. The picture is what the encoder gets, in its
    own brightness but for an offset.
    """
    pixels = batch.inputs["pixel_values"].detach().requires_grad_()
    seen = Batch(
        batch.input_ids, batch.attention_mask, batch.index, batch.inputs | {"pixel_values": pixels}
    )
    with torch.enable_grad():
        total = likeliest(model, seen).sum()
    (gradient,) = torch.autograd.grad(total, [pixels])
    gradients = as_pictures(model, gradient.float(), grids, summed=True)
    pictures = as_pictures(model, pixels.detach().float(), grids, summed=False)
    processor = processor_of(model)
    reader = getattr(processor, "image_processor", processor)
    spread = torch.tensor(reader.image_std, device=pixels.device)[:, None, None]
    return [
        (one.cpu(), (other * spread).cpu()) for one, other in zip(gradients, pictures, strict=True)
    ]


def likeliest(model: HookedModel, batch: Batch) -> Float[Tensor, " batch"]:
    """log p of the likeliest next token, with its gradient.

    Raises `GradientError` in inference or training mode.
    """
    if torch.is_inference_mode_enabled() or model.original_model.training:
        raise GradientError(
            f"{model.name}: no gradients in training mode (call model.eval()) or inside "
            "torch.inference_mode()."
        )
    mask = batch.attention_mask
    logits = model(batch.input_ids, attention_mask=mask, use_cache=False, **batch.inputs)
    return logits[:, -1].float().log_softmax(-1).amax(-1)


def as_pictures(
    model: HookedModel, values: Tensor, grids: Sequence[Grid], *, summed: bool
) -> list[Tensor]:
    """What the encoder gets of each image as `[channel, height, width]`.

    Of tiles the first, which is the whole image. Qwen's patches hold each picture twice, as two
    frames, which are `summed` or else the first is taken.
    """
    if values.dim() == 4:
        return list(values)
    if values.dim() == 5:
        return list(values[:, 0])
    processor = processor_of(model)
    reader = getattr(processor, "image_processor", processor)
    merged, side, frames = reader.merge_size, reader.patch_size, reader.temporal_patch_size
    counts = [grid.height * grid.width * merged**2 for grid in grids]
    found = []
    for part, grid in zip(values.split(counts), grids, strict=True):
        shape = (grid.height, grid.width, merged, merged, -1, frames, side, side)
        # [row column row-in-it column-in-it channel frame y x] -> frames of pictures
        moved = part.reshape(shape).permute(5, 4, 0, 2, 6, 1, 3, 7)
        pictures = moved.flatten(5, 7).flatten(2, 4)
        found.append(pictures.sum(0) if summed else pictures[0])
    return found


def edges(picture: Float[Tensor, "channel height width"]) -> Bool[Tensor, "height width"]:
    """Where the picture changes most: above the median of its smoothed difference from a blur."""
    values = picture.numpy().astype(np.float64)
    blurred = convolve1d(convolve1d(values, BLUR, axis=1), BLUR, axis=2)
    change = np.linalg.norm(values - blurred, axis=0)
    change = median_filter(change, size=SMOOTHED)
    return torch.from_numpy(change > np.median(change))
