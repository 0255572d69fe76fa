"""The patches of an image as a grid: which token is where, which part of the image it covers."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from interp.model.hooked import HookedModel
from interp.model.images import ImageError, processor_of

Region = tuple[float, float, float, float]
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Grid:
    """`height` x `width` patches, row by row from the image's token number `first` on.

    `region` is the part of the image that they cover: left, top, right, bottom as parts of its
    width and height.
    """

    height: int
    width: int
    region: Region = WHOLE
    first: int = 0

    def lay_out(self, tokens: Float[Tensor, "*at token"]) -> Float[Tensor, "*at row column"]:
        """The values of an image's tokens where they stand."""
        own = tokens[..., self.first : self.first + self.height * self.width]
        return own.unflatten(-1, (self.height, self.width))

    def within(self, box) -> Region:
        """A box in parts of the image, in parts of the region."""
        left, top, right, bottom = self.region
        width, height = right - left, bottom - top
        x0, y0, x1, y1 = box
        return (x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height


def grid_of(model: HookedModel, size: tuple[int, int], n_tokens: int) -> Grid:
    """The grid of an image of `size` (width, height) that takes up `n_tokens` tokens.

    Of a LLaVA-NeXT's image that of the whole picture, which comes before its tiles. Raises
    `ImageError` where the tokens are on no grid that we know.
    """
    processor = processor_of(model)
    reader = getattr(processor, "image_processor", processor)
    if hasattr(reader, "merge_size"):  # a square of patches becomes one token
        found = reader(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0]
        _, height, width = (int(n) for n in found)
        grid = Grid(height // reader.merge_size, width // reader.merge_size)
        if grid.height * grid.width == n_tokens:
            return grid
    else:
        config = model.original_model.config
        vision = getattr(config, "vision_config", None)
        side = int(getattr(vision, "image_size", 0)) // int(getattr(vision, "patch_size", 1))
        tiled = getattr(config, "image_grid_pinpoints", None) is not None
        if side and (n_tokens == side**2 or (tiled and n_tokens > side**2)):
            return Grid(side, side, WHOLE if tiled else _seen(reader, size))
        if side and n_tokens == side**2 + 1:  # with the class token
            return Grid(side, side, _seen(reader, size), first=1)
    raise ImageError(
        f"model: the {n_tokens} tokens of an image of {model.name} ({model.cfg.architecture}) are "
        "on no grid of patches that is known here."
    )


def _seen(reader: Any, size: tuple[int, int]) -> Region:
    """The part of an image that is left where its processor cuts out the middle."""
    wanted, crop = reader.size, getattr(reader, "crop_size", None)
    shortest = _get(wanted, "shortest_edge")
    if not getattr(reader, "do_center_crop", False) or shortest is None or crop is None:
        return WHOLE
    scale = min(size) / shortest  # pixels of the image in one of the resized one
    parts = [
        min(1.0, _get(crop, name) * scale / length)
        for name, length in zip(("width", "height"), size, strict=True)
    ]
    left, top = ((1 - part) / 2 for part in parts)
    return left, top, 1 - left, 1 - top


def _get(sizes: Any, name: str) -> Any:
    """From a dict, or what newer versions of transformers have in its place."""
    return sizes.get(name) if hasattr(sizes, "get") else getattr(sizes, name, None)
