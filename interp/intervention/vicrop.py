"""ViCrop: the model sees the image and, as a second one, the part of it that it looks at.

A map over the image's patches is made from the model itself (`interp.analysis.image_maps`); around
its strongest place a square is cut out of the image as it is given, before the processor makes it
small; then the prompt is asked with both, image first. Nothing inside the model is changed, so it
acts where a run starts from prompts (`evaluate`, `compare`, harnesses).

The square: its side is `side` pixels times r, for r of `RATIOS`. Of each r the window of whole
patches with the largest sum is taken, and the r whose window stands out most, by

    (largest sum - mean of its up to four neighbours) / patches in it

A window over all patches is no choice: at r = 1 the whole image is taken, larger r are left out.

Source: Zhang et al. 2025, "MLLMs Know Where to Look: Training-free Perception of Small Visual
Details with Multimodal LLMs" (arXiv 2502.17422), and its code. Ours: a window has one patch at
least (the code's may have none on large images), boxes are whole pixels.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from interp.analysis.boxes import window_sums
from interp.analysis.general_prompts import GENERAL
from interp.analysis.image_maps import (
    ImageMaps,
    gradient_attention,
    input_gradient,
    relative_attention,
)
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.var import as_layers, chosen_layers
from interp.model.hooked import HookedModel
from interp.model.image_grid import WHOLE, Region
from interp.model.images import (
    ImageError,
    as_rgb,
    image_counts,
    image_mark,
    image_token,
    listed,
    with_images,
)
from interp.tasks.prompts import from_examples

RATIOS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
QWEN_SIDE = 224  # where the encoder takes any size

Method = Literal["relative_attention", "gradient_attention", "input_gradient"]
Where = Literal["map", "random", "center", "given"]
Pixels = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False, repr=False)
class ViCrop(Intervention):
    """Give each prompt's image once more, cut to where the model looks.

    Args:
        method: How the map is made; of the attention of `layers` (numbers, or a slice such as
            "2:-1"; default all).
        side: Of the smallest square, in pixels of the image. Default: what the encoder takes (224
            where it takes any size). An image that is no larger is given a second time whole.
        general: The general prompt, see `relative_attention`.

    Controls: `where="random"` and `"center"` cut a square as large as the map's own elsewhere;
    `"given"` one of the smallest size, or larger, around the prompt's column `box` (left, top,
    right, bottom as parts of the image). `seed` draws.
    """

    method: Method = "relative_attention"
    layers: Sequence[int] | slice | str | None = None
    side: int | None = None
    where: Where = "map"
    general: str = GENERAL
    seed: int = 0

    def __post_init__(self):
        for name, kind in {"method": Method, "where": Where}.items():
            if getattr(self, name) not in get_args(kind):
                value = getattr(self, name)
                raise InterventionError(f"{name}={value!r}: one of {', '.join(get_args(kind))}.")
        if self.side is not None and self.side < 1:
            raise InterventionError(f"side={self.side}: a number of pixels, from 1 on.")
        if self.layers is not None:
            object.__setattr__(self, "layers", as_layers(self.layers))

    def __repr__(self) -> str:
        side = "the encoder's side" if self.side is None else f"{self.side} pixels"
        layers = self.layers if isinstance(self.layers, str | None) else list(self.layers)
        of = "" if self.method == "input_gradient" else f" of layers {layers or 'all'}"
        what = {
            "map": f"where {self.method.replace('_', ' ')}{of} is strongest",
            "random": f"anywhere (seed {self.seed}), as large as by {self.method}{of}",
            "center": f"from its middle, as large as by {self.method}{of}",
            "given": "around the prompt's box",
        }[self.where]
        return f"ViCrop(a second image cut {what}, {side} or more; in the prompt)"

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """None: what goes in is changed, and nothing else.

        Raises `ImageError` for a text-only model.
        """
        image_token(model)
        return []

    def prepare(self, prompt: dict[str, Any], model: HookedModel) -> dict[str, Any]:
        """The prompt with a second image. Raises `ImageError` where it has none."""
        shown = listed(prompt.get("image"))
        if not shown:
            raise ImageError("ViCrop: a prompt without an image; there is nothing to cut out.")
        if len(shown) > 1:
            raise InterventionError(f"ViCrop: a prompt with {len(shown)} images; give one.")
        image = as_rgb(shown[0], "the prompt's image")
        return with_second_image(model, prompt, image.crop(self.box(prompt, model)))

    def box(self, prompt: dict[str, Any], model: HookedModel) -> Pixels:
        """Which pixels of the image are cut out: left, top, right, bottom."""
        size = as_rgb(listed(prompt["image"])[0], "the prompt's image").size
        side = self._side(model)
        if self.where == "given":
            return around_box(prompt.get("box"), size, side)
        maps = self.maps(prompt, model)
        found = choose_box(maps.map(0), size, side, maps.grids[0].region)
        if self.where == "map":
            return found
        width, height = found[2] - found[0], found[3] - found[1]
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        if self.where == "random":
            rng = random.Random(f"{self.seed} {list(prompt['input_ids'])}")
            left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
        return left, top, left + width, top + height

    def maps(self, prompt: dict[str, Any], model: HookedModel) -> ImageMaps:
        """The map of one prompt, made by the model as it is (with what else is applied)."""
        one = from_examples(model, [dict(prompt) | {"spans": _spans(prompt)}])
        if self.method == "input_gradient":
            return input_gradient(model, one, general=self.general, progress=False)
        layers = None if self.layers is None else chosen_layers(self.layers, model)
        if self.method == "gradient_attention":
            return gradient_attention(model, one, layers=layers, progress=False)
        return relative_attention(model, one, general=self.general, layers=layers, progress=False)

    def _side(self, model: HookedModel) -> int:
        vision = getattr(model.original_model.config, "vision_config", None)
        return self.side or int(getattr(vision, "image_size", None) or QWEN_SIDE)


def choose_box(
    values: Float[np.ndarray, "row column"],
    size: tuple[int, int],
    side: int,
    region: Region = WHOLE,
) -> Pixels:
    """The square around a map's strongest place, in pixels of an image of `size`."""
    n_rows, n_columns = values.shape
    left, top = region[0] * size[0], region[1] * size[1]
    across = (region[2] - region[0]) * size[0] / n_columns  # pixels of a patch
    down = (region[3] - region[1]) * size[1] / n_rows
    best: tuple[float, float, tuple[float, float]] | None = None
    for ratio in RATIOS:
        columns, rows = (
            max(1, min(int(side * ratio / pixels + 1e-9), most))
            for pixels, most in ((across, n_columns), (down, n_rows))
        )
        if columns == n_columns and rows == n_rows:
            if ratio == RATIOS[0]:
                return 0, 0, *size
            break
        sums = window_sums(values, rows, columns)
        # columns first, as the authors count, which matters where several are equal
        column, row = divmod(int(sums.T.argmax()), len(sums))
        stands_out = (sums[row, column] - _beside(sums, row, column)) / (rows * columns)
        if best is None or stands_out > best[0]:
            at = left + (column + columns / 2) * across, top + (row + rows / 2) * down
            best = float(stands_out), ratio, at
    assert best is not None  # the first ratio is tried or returned
    return square(best[2], side * best[1], size)


def _beside(sums: Float[np.ndarray, "row column"], row: int, column: int) -> float:
    """The mean of the up to four neighbours; of a window without any, itself."""
    n_rows, n_columns = sums.shape
    places = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    near = [sums[r, c] for r, c in places if 0 <= r < n_rows and 0 <= c < n_columns]
    return float(np.mean(near)) if near else float(sums[row, column])


def square(center: tuple[float, float], side: float, size: tuple[int, int]) -> Pixels:
    """A square about a point, moved to lie inside the image, and cut where it is too large."""
    ends = []
    for at, length in zip(center, size, strict=True):
        whole = min(round(side), length)
        start = min(max(round(at - whole / 2), 0), length - whole)
        ends.append((start, start + whole))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def around_box(box: Sequence[float] | None, size: tuple[int, int], side: int) -> Pixels:
    """A square of `side` pixels about a box (parts of the image), or as large as the box is.

    Raises `InterventionError` where there is none.
    """
    if box is None:
        raise InterventionError(
            "where='given': the prompt has no column 'box' (left, top, right, bottom as parts of "
            "the image)."
        )
    x0, y0, x1, y1 = box
    center = (x0 + x1) / 2 * size[0], (y0 + y1) / 2 * size[1]
    return square(center, max(side, (x1 - x0) * size[0], (y1 - y0) * size[1]), size)


def with_second_image(model: HookedModel, prompt: dict[str, Any], second) -> dict[str, Any]:
    """The prompt with another image right behind its own; spans are moved along.

    The span `image` becomes `image_1` and `image_2`.
    """
    mark = image_mark(model)
    written = model.tokenizer(mark, add_special_tokens=False).input_ids
    token = image_token(model)
    opening = written[: written.index(token)]
    closing = written[len(opening) + 1 :]  # around an image, in some models
    spans, ids = _spans(prompt), list(prompt["input_ids"])
    at = spans.pop("image")[1]
    if ids[at : at + len(closing)] == closing:
        at += len(closing)
    (count,) = image_counts(model, [second])
    added = [*opening, *[token] * count, *closing]

    def moved(span: Sequence[int]) -> list[int]:
        start, end = span
        return [start + len(added) if start >= at else start, end + len(added) if end > at else end]

    row = {
        **prompt,
        "text": prompt["text"].replace(mark, mark + mark, 1),
        "input_ids": [*ids[:at], *added, *ids[at:]],
        "spans": {name: moved(span) for name, span in spans.items()},
        "image": [listed(prompt["image"])[0], second],
    }
    return with_images(model, 0, row)


def _spans(prompt: dict[str, Any]) -> dict[str, list[int]]:
    spans = {name: list(span) for name, span in (prompt.get("spans") or {}).items() if span}
    if "image" not in spans:
        raise InterventionError("ViCrop: nobody told where the prompt's image stands (its spans).")
    return spans
