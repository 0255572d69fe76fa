"""Images of prompts: where their tokens stand, and the pixels that go in beside the tokens.

A prompt's text holds the model's own image token once for each image (`image_mark` writes it); in
its tokens it stands there as often as the image has features, and the model puts these in their
places. How many those are is for the processor to say: with LLaVA-1.5 always the same, with
LLaVA-NeXT and Qwen-VL it depends on the size of the image.

An image is a `PIL.Image`, a file, an array of bytes `[height, width]` or `[height, width, 3]`, or
what a `datasets.Image` column stores. Whatever its mode, the model gets RGB: grey becomes three
equal channels, and what is transparent lies on white (PIL's own conversion would show the colours
hidden under it).
"""

import re
from collections.abc import Iterable, Sequence
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from PIL import Image, ImageOps
from torch import Tensor

from interp.errors import UserError

Span = tuple[int, int]
IMAGE_SPAN = re.compile(r"image(_\d+)?$")


class ImageError(UserError):
    """An image that is missing, unreadable or at odds with its prompt; a model that takes none."""


# Where images stand


def image_token(model) -> int:
    """The token that stands for (a part of) an image. Raises `ImageError` for a text-only model."""
    token = _image_token(model)
    if token is None:
        raise ImageError(
            f"model: {model.name} ({model.cfg.architecture}) takes no images in its prompts; give "
            "a vision-language model, such as 'mini-llava'."
        )
    return token


def reads_images(model) -> bool:
    """May a prompt of this model hold images?"""
    return _image_token(model) is not None


def _image_token(model) -> int | None:
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is None:
        raise ImageError(
            f"model: a {type(model).__name__} does not tell how images are written; give the "
            "HookedModel."
        )
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if token is not None), None)


def image_mark(model) -> str:
    """What a prompt's text says where an image is to stand, such as `<image>`."""
    config, tokens = model.original_model.config, [image_token(model)]
    ends = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    if None not in ends:
        tokens = [ends[0], *tokens, ends[1]]
    words = model.tokenizer.convert_ids_to_tokens(tokens)
    if None in words:
        raise ImageError(f"tokenizer: it has no word for token {tokens}; is it this model's own?")
    return "".join(words)


def image_spans(
    model, input_ids: Int[Tensor, "batch token"] | Sequence[Sequence[int]]
) -> list[list[Span]]:
    """For each row the images in it, `[start, end)` in its columns: the runs of the image token.

    Images that touch each other are one run; prompts made by `interp.tasks` tell them apart (spans
    `image`, or `image_1`, `image_2`, ...). Raises `ImageError` for a text-only model.
    """
    token = image_token(model)
    rows = input_ids.tolist() if torch.is_tensor(input_ids) else input_ids
    return [_runs(row, token) for row in rows]


def _runs(row: Sequence[int], token: int) -> list[Span]:
    spans: list[Span] = []
    for place in (i for i, found in enumerate(row) if found == token):
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans


def of_images(model, input_ids: Int[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
    """Which tokens stand for images; none in a text-only model."""
    token = _image_token(model)
    return torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids == token


# What goes in beside the tokens


def pixel_inputs(model, images: Sequence[Any]) -> dict[str, Tensor]:
    """What the model wants of these images: `pixel_values`, and sizes or grids where it has them.

    On the model's device and in its dtype. Raises `ImageError` for an image that cannot be read,
    and for a model that has nothing to read images with.
    """
    pictures = [as_rgb(image, f"image {n}") for n, image in enumerate(images)]
    made = processor_of(model)(images=pictures, return_tensors="pt")
    kept = {name: value for name, value in made.items() if name in _arguments(model)}
    dtype = model.original_model.dtype
    return {
        name: value.to(model.cfg.device, dtype if value.is_floating_point() else value.dtype)
        for name, value in kept.items()
    }


def image_counts(model, images: Sequence[Any]) -> list[int]:
    """How many image tokens each of these images takes up in a prompt, under what is applied."""
    pictures = [as_rgb(image, f"image {n}") for n, image in enumerate(images)]
    of_size = {picture.size: picture for picture in pictures}  # the same for all of one size
    counts = {size: _count(model, picture) for size, picture in of_size.items()}
    for one in getattr(model, "applied", ()):
        left = getattr(one, "image_tokens", None)  # an intervention of a user's own may lack it
        counts = {size: left(n) if left else n for size, n in counts.items()}
    return [counts[picture.size] for picture in pictures]


def _count(model, picture: Image.Image) -> int:
    processor = processor_of(model)
    reader = getattr(processor, "image_processor", processor)
    if hasattr(reader, "merge_size"):  # a square of patches becomes one token
        patches = reader(images=[picture], return_tensors="pt")["image_grid_thw"][0].prod()
        return int(patches) // reader.merge_size**2
    if reader is processor:
        raise ImageError(
            f"processor: a {type(processor).__name__} does not tell how many tokens an image "
            "takes; give the whole one, interp.load(model, processor=AutoProcessor...)."
        )
    written = processor(images=[picture], text=[processor.image_token])["input_ids"][0]
    return list(written).count(image_token(model))


def batch_inputs(
    model,
    token_lists: Sequence[Sequence[int]],
    input_ids: Int[Tensor, "batch token"],
    images: Iterable[Any] | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """All that a batch needs beside its tokens and their mask; for text that is nothing.

    `input_ids` are the `token_lists`, padded; `images` is what each prompt has: one, several, or
    None. `numbers` says how errors call the prompts. Raises `ImageError` where a prompt's image
    tokens are not those of its images.
    """
    numbers = range(len(token_lists)) if numbers is None else numbers
    shown = [[] for _ in numbers] if images is None else [listed(image) for image in images]
    if any(shown) or reads_images(model):
        token = image_token(model)
        _check_tokens(numbers, [list(row).count(token) for row in token_lists], shown)
    if not any(shown):
        return {}
    rows = [_readable(n, own) for n, own in zip(numbers, shown, strict=True)]
    flat = [picture for row in rows for picture in row]
    counts = iter(image_counts(model, flat))
    for number, tokens, row in zip(numbers, token_lists, rows, strict=True):
        has, wants = list(tokens).count(token), sum(next(counts) for _ in row)
        if has != wants:
            raise ImageError(
                f"prompt {number}: it has {has} image tokens, and its images want {wants}; make "
                "the prompts with the model they are for."
            )
    inputs = pixel_inputs(model, flat)
    if "mm_token_type_ids" in _arguments(model):  # Qwen's positions in two dimensions
        inputs["mm_token_type_ids"] = (input_ids == token).int()
    return inputs


def _check_tokens(numbers: Sequence[int], tokens: list[int], shown: list[list]) -> None:
    for number, n_tokens, own in zip(numbers, tokens, shown, strict=True):
        if n_tokens and not own:
            raise ImageError(
                f"prompt {number}: it has {n_tokens} image tokens and no image. Give it one, in a "
                "column 'image'; or else what was called is for text only."
            )


def check_plain_positions(model, inputs: dict[str, Any]) -> None:
    """Raises `ImageError` where `inputs` are images whose tokens have positions in a plane.

    The next token's position is then not the number of tokens so far, as some loops take it to be.
    """
    if "image_grid_thw" in inputs and "mm_token_type_ids" in _arguments(model):
        raise ImageError(
            "generate: TransformerLens' own loop cannot go on from this model's images; use "
            "model.continue_greedily(...) or model.original_model.generate(...)."
        )


def processor_of(model) -> Any:
    """What reads images for the model. Raises `ImageError` where it has nothing that does."""
    if getattr(model, "processor", None) is None:
        if reads_images(model):
            raise ImageError(
                f"model: {model.name} was loaded without a processor, which makes pixels of "
                "images; give one, interp.load(model, tokenizer=..., processor=...)."
            )
        raise ImageError(
            f"model: {model.name} ({model.cfg.architecture}) sees no images; give a "
            "vision-language model, such as 'mini-llava'."
        )
    return model.processor


def _arguments(model) -> Iterable[str]:
    return signature(model.original_model.forward).parameters


# Prompts with images


def with_images(model, n: int, row: dict, lists: Iterable[str] = ()) -> dict:
    """A row of prompts whose image tokens are as many as its images want, spans moved along.

    Where the text has one image token for each image, each is repeated; where it has them all, they
    stay. Adds the spans `image`, or `image_1`, `image_2`, ... where there are several. `lists`:
    columns that hold lists of spans. `n` is how errors call the prompt.
    """
    pictures = _readable(n, listed(row.get("image")))
    token, counts = image_token(model), image_counts(model, pictures)
    found = list(row["input_ids"]).count(token)
    if found == sum(counts):
        ids, where = list(row["input_ids"]), range(len(row["input_ids"]) + 1)
    elif found == len(counts):
        ids, where = expanded(row["input_ids"], token, counts)
    else:
        raise ImageError(
            f"prompt {n}: {len(counts)} image(s), and the image token {found} times in its text; "
            f"write {image_mark(model)!r} once for each image, where it is to stand."
        )

    def moved(span) -> list[int]:
        return [where[span[0]], where[span[1]]]

    spans = {name: moved(span) for name, span in row["spans"].items() if span is not None}
    places = iter([i for i, found in enumerate(ids) if found == token])
    for image, count in enumerate(counts, 1):
        start = next(places)
        for _ in range(count - 1):
            next(places)
        spans["image" if len(counts) == 1 else f"image_{image}"] = [start, start + count]
    more = {name: [moved(span) for span in row[name]] for name in lists}
    return {**row, **more, "input_ids": ids, "spans": spans}


def expanded(ids: Sequence[int], token: int, counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """`ids` with the i-th `token` repeated `counts[i]` times; and where each old place went."""
    left, long, where = iter(counts), [], []
    for one in ids:
        where.append(len(long))
        long += [one] * (next(left) if one == token else 1)
    return long, [*where, len(long)]


def written_out(row: dict, ids: Sequence[int]) -> list[int]:
    """`ids` of a text that goes on from the row's, with each image token as often as in the row."""
    spans = sorted(
        span for name, span in (row.get("spans") or {}).items() if span and IMAGE_SPAN.match(name)
    )
    if not listed(row.get("image")) or not spans:
        return list(ids)
    token = row["input_ids"][spans[0][0]]
    return expanded(ids, token, [end - start for start, end in spans])[0]


def images_of(prompts: Dataset) -> "Images | None":
    """The images of prompts, read when asked for; None where there are none."""
    return Images(prompts) if "image" in prompts.column_names else None


class Images(Sequence):
    """The column `image` as it is stored: what cannot be decoded is found by `as_rgb`, with a name.

    (A `datasets.Image` column decodes by itself, and its errors do not say which row they are of.)
    """

    def __init__(self, prompts: Dataset):
        self._rows = prompts.select_columns(["image"]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        return self._rows[row].column("image")[0].as_py()


# One image


def listed(image: Any) -> list:
    """What a prompt has in its column `image`, as a list: none, one, or several."""
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _readable(n: int, images: list) -> list[Image.Image]:
    """A prompt's images as RGB."""
    if len(images) == 1:
        return [as_rgb(images[0], f"prompt {n}")]
    return [as_rgb(image, f"prompt {n}, image {i}") for i, image in enumerate(images, 1)]


def as_rgb(image: Any, name: str = "image") -> Image.Image:
    """An image in any of the forms above, as RGB. `name` is how errors call it."""
    picture = _opened(image, name)
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises either for broken files
        raise ImageError(f"{name}: the image is damaged ({error}); write it anew.") from error
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith(("I", "F")):
        raise ImageError(
            f"{name}: a picture of mode {picture.mode!r} has values beyond 0 to 255; scale it to "
            "8 bits first, such as Image.fromarray((array / array.max() * 255).astype('uint8'))."
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _opened(image: Any, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path")  # as a datasets.Image column stores it
    if isinstance(image, (str, Path)) and not Path(image).is_file():
        raise ImageError(f"{name}: there is no file {str(image)!r}.")
    if not isinstance(image, (str, Path, bytes)):
        raise ImageError(
            f"{name}: a {type(image).__name__} is no image; give a PIL.Image, a file or an array."
        )
    try:
        opened = Image.open(BytesIO(image) if isinstance(image, bytes) else image)
        return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError) as error:
        what = "its bytes are" if isinstance(image, bytes) else f"{str(image)!r} is"
        raise ImageError(f"{name}: {what} no image that can be read ({error}).") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shaped:
        raise ImageError(
            f"{name}: an array {list(array.shape)} of {array.dtype}; give bytes (uint8, 0 to 255) "
            "of shape [height, width] or [height, width, 3]."
        )
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
