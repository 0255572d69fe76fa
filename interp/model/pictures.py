"""Images to be looked at: a data set, a list or pixels, in batches through the vision tower."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.model.hooked import HookedModel
from interp.model.images import ImageError, Images, listed, pixel_inputs, processor_of, reads_images
from interp.model.towers import sees_only


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images for the vision tower of `model`; `shown` is a tensor of pixels, or one image a row."""

    model: HookedModel
    shown: Tensor | Sequence[Any]
    task: dict[str, Any]

    @classmethod
    def of(cls, model: HookedModel, images) -> "Pictures":
        """From a data set with a column `image`, a list of images, or pixels as the model has them.

        Raises `ImageError` where there are none, or the model has no vision tower.
        """
        if not sees_only(model) and not reads_images(model):
            processor_of(model)  # says what kind of model this is
        task: dict[str, Any] = {}
        if isinstance(images, Dataset):
            if "image" not in images.column_names:
                has = ", ".join(images.column_names)
                raise ImageError(f"images: the data set has no column 'image'; it has {has}.")
            shown: Any = Images(images)
        elif torch.is_tensor(images):
            shown, task = _pixels(model, images), {"pixels": list(images.shape)}
        else:
            shown = [images] if not isinstance(images, (list, tuple)) else list(images)
        if not len(shown):
            raise ImageError("images: none; give at least one.")
        return cls(model, shown, task)

    def __len__(self) -> int:
        return len(self.shown)

    def batches(self, size: int, desc: str | None) -> Iterator[dict[str, Tensor]]:
        """What the encoder wants of some images at a time, in their order."""
        starts = range(0, len(self), size)
        for start in tqdm(starts, desc=desc, disable=desc is None, leave=False):
            yield self.inputs(range(start, min(start + size, len(self))))

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the encoder wants of these images."""
        if torch.is_tensor(self.shown):
            return {"pixel_values": self.shown[list(rows)]}
        images = [listed(self.shown[row]) for row in rows]
        for row, own in zip(rows, images, strict=True):
            if len(own) != 1:
                raise ImageError(f"images: row {row} has {len(own)} images; one is wanted.")
        return pixel_inputs(self.model, [own[0] for own in images])

    def run(self, inputs: dict[str, Tensor]) -> Any:
        """Run the encoder alone: logits, or what a language model would get of each image."""
        if sees_only(self.model):
            return self.model(inputs["pixel_values"])
        found = self.model.original_model.get_image_features(**inputs)
        found = getattr(found, "pooler_output", found)  # transformers before 5: the features
        return list(found) if isinstance(found, (list, tuple)) else list(found.unbind(0))

    def describe(self) -> dict[str, Any]:
        """How many, and what; for provenance."""
        return {"n": len(self), **self.task}


def _pixels(model: HookedModel, pixels: Tensor) -> Float[Tensor, "image channel height width"]:
    if pixels.dim() != 4 or not pixels.is_floating_point() or not sees_only(model):
        raise ImageError(
            f"images: a tensor {list(pixels.shape)} of {pixels.dtype}; pixels are floats [image, "
            "channel, height, width], and for an image encoder only. Give images otherwise."
        )
    model_dtype = model.original_model.dtype
    return pixels.to(model.cfg.device, model_dtype)
