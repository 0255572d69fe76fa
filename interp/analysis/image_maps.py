"""Where in its image does a model look while it answers? Maps over the patches of one image.

All read the row that gives the answer's first token, i, the last of the prompt; j is a patch.

- `relative_attention`: with a_h the weights of head h on the question, and a'_h those on a general
  prompt about the same image, (mean over h of a_hij) / (mean over h of a'_hij). What is looked at
  whatever is asked (sinks, borders) drops out.
- `gradient_attention`: mean over h of a_hij relu(d L / d a_hij), L = log p(y) with y the likeliest
  next token. Since z = sum over j of a_ij v_j, the derivative is g . v_j with g = d L / d z_i: no
  pattern is made.
- `input_gradient`: |d L / d pixel| of the question over that of the general prompt, where the image
  has edges, averaged over each patch.

The first two have a map for each layer; `.map(prompt, layers)` is their mean. `attention_ratio`
says whether a map points at a box: its sum there, over the mean of its sums over all boxes of that
size (in whole patches), 1 by chance.

Patches: those of the image encoder. A LLaVA whose processor cuts out the image's middle sees only
that (`Grid.region`); of a LLaVA-NeXT's image those of the whole picture are taken, not the tiles'.

Source: Zhang et al. 2025, "MLLMs Know Where to Look: Training-free Perception of Small Visual
Details with Multimodal LLMs" (arXiv 2502.17422), and its code. The attention ratio is after the
paper's; that it counts in whole patches is ours, and so is that a pixel which the general prompt
leaves without any gradient counts 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float, Shaped
from torch import Tensor

from interp.analysis.boxes import Box, box_ratio
from interp.analysis.general_prompts import GENERAL, general_prompts
from interp.analysis.image_attention import ImageAttentionError, image_prompts
from interp.analysis.pixels import edges, likeliest, pixel_gradients
from interp.model.attention import Attention
from interp.model.gradients import ENTRY
from interp.model.hooked import Batch, HookedModel
from interp.model.image_grid import Grid, grid_of
from interp.model.images import as_rgb, images_of, listed
from interp.tasks.prompts import describe, spans_of


@dataclass(frozen=True, eq=False)
class ImageMaps:
    """A map for each prompt and layer: `maps[p]` is `[layer, row, column]` of prompt p."""

    maps: list[Float[np.ndarray, "layer _row _column"]]
    layers: tuple[int, ...]
    grids: list[Grid]
    metadata: dict[str, Any]

    def map(
        self, prompt: int = 0, layers: int | Sequence[int] | None = None
    ) -> Float[np.ndarray, "row column"]:
        """The map of a prompt, mean over `layers` (default all)."""
        chosen = self.layers if layers is None else np.atleast_1d(np.asarray(layers)).tolist()
        missing = [layer for layer in chosen if layer not in self.layers]
        if missing or not chosen:
            has = ", ".join(map(str, self.layers))
            raise ImageAttentionError(f"layers={list(chosen)}: there are maps of {has}.")
        return self.maps[prompt][[self.layers.index(layer) for layer in chosen]].mean(0)

    def attention_ratio(self, boxes: Sequence[Box]) -> pd.DataFrame:
        """`prompt, layer, ratio`: does each map point at the prompt's box? 1 by chance.

        `boxes`: left, top, right, bottom as parts of the image's width and height.
        """
        if len(boxes) != len(self.maps):
            raise ImageAttentionError(f"boxes: {len(boxes)} for {len(self.maps)} prompts.")
        rows = [
            {"prompt": n, "layer": layer, "ratio": box_ratio(one, grid.within(box))}
            for n, (maps, grid, box) in enumerate(zip(self.maps, self.grids, boxes, strict=True))
            for layer, one in zip(self.layers, maps, strict=True)
        ]
        return pd.DataFrame(rows)

    def plot(self, prompts: Dataset, prompt: int = 0, layers=None, boxes=(), **options):
        """The map drawn over the image; `boxes` are outlined."""
        from interp import figures

        image = as_rgb(listed(_images(prompts)[prompt])[0], f"prompt {prompt}")
        options = {"title": prompts["text"][prompt][-80:]} | options
        return figures.overlay(
            image, self.map(prompt, layers), region=self.grids[prompt].region, boxes=boxes,
            **options,
        )  # fmt: skip

    def __repr__(self) -> str:
        kind = self.metadata["analysis"]
        return f"ImageMaps({kind}; {len(self.maps)} prompts, {len(self.layers)} layers)"


def relative_attention(
    model: HookedModel,
    prompts,
    *,
    general: str | Dataset = GENERAL,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> ImageMaps:
    """Attention on the image, over that of a general prompt about it.

    Args:
        prompts: With one image each.
        general: What is asked in place of all that follows the image (up to the end of the span
            `text`, so that a chat's markers stay); or such prompts, one for each.
        layers: Default all.

    Raises:
        ImageError: A text-only model, a prompt without an image.
        ImageAttentionError: Several images in a prompt, patches on no grid, a question that stands
            before its image, `general` prompts with other image tokens.
    """
    prompts, grids, layers = _checked(model, prompts, layers)
    others = general_prompts(model, prompts, general)
    read = partial(_attended, model, layers, batch_size)
    asked = read(prompts, "relative attention" if progress else None)
    plain = read(others, "general prompt" if progress else None)
    maps = []
    for grid, one, other in zip(grids, asked, plain, strict=True):
        tiny = torch.finfo(one.dtype).tiny
        maps.append(grid.lay_out((one.clamp_min(tiny).log() - other.clamp_min(tiny).log()).exp()))
    return _maps(model, prompts, maps, layers, grids, "relative_attention", general)


def gradient_attention(
    model: HookedModel,
    prompts,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> ImageMaps:
    """Attention on the image, weighted by what it does for the likeliest next token.

    Arguments and errors as in `relative_attention`; `GradientError` in inference or training mode.
    """
    prompts, grids, layers = _checked(model, prompts, layers)
    found: dict[int, Tensor] = {}
    spans = spans_of(prompts) or []
    for batch in _batches(model, prompts, batch_size, "gradient attention" if progress else None):
        weighted = _weighted(model, prompts, batch, layers)
        for row, n in enumerate(batch.index.tolist()):
            found[n] = weighted[row, :, _columns(spans[n]["image"], batch, row)].cpu()
    maps = [grid.lay_out(found[n]) for n, grid in enumerate(grids)]
    return _maps(model, prompts, maps, layers, grids, "gradient_attention")


def input_gradient(
    model: HookedModel,
    prompts,
    *,
    general: str | Dataset = GENERAL,
    batch_size: int = 8,
    progress: bool = True,
) -> ImageMaps:
    """The gradient of the likeliest next token in the pixels, over that of a general prompt.

    One map a prompt, as of layer 0. Arguments and errors as in `relative_attention`.
    """
    prompts, grids, _ = _checked(model, prompts, None)
    others = general_prompts(model, prompts, general)
    desc = "input gradient" if progress else None
    sizes: list[dict[int, Tensor]] = []
    pictures: dict[int, Tensor] = {}
    for some in (prompts, others):
        found: dict[int, Tensor] = {}
        for batch in _batches(model, some, batch_size, desc):
            index = batch.index.tolist()
            with _told(model, some, batch):
                seen = pixel_gradients(model, batch, [grids[n] for n in index])
            for n, (gradient, picture) in zip(index, seen, strict=True):
                found[n], pictures[n] = gradient.norm(dim=0), picture
        sizes.append(found)
    maps = []
    for n, grid in enumerate(grids):
        one, other = sizes[0][n], sizes[1][n]
        ratio = torch.where(other > 0, one / other.clamp_min(torch.finfo(other.dtype).tiny), 0)
        kept = ratio * edges(pictures[n])
        pooled = torch.nn.functional.adaptive_avg_pool2d(kept[None], (grid.height, grid.width))
        maps.append(pooled.numpy())
    return _maps(model, prompts, maps, (0,), grids, "input_gradient", general)


# Reading the model


def _checked(
    model: HookedModel, prompts, layers: Sequence[int] | None
) -> tuple[Dataset, list[Grid], tuple[int, ...]]:
    prompts = image_prompts(model, prompts)
    layers = model.attention_layers if layers is None else list(layers)
    model.check_layers(layers)
    if not layers:
        raise ImageAttentionError("layers=[]: at least one.")
    grids = []
    for n, (spans, image) in enumerate(zip(prompts["spans"], _images(prompts), strict=True)):
        if spans.get("image") is None:
            raise ImageAttentionError(
                f"prompt {n}: it has {len(listed(image))} images, and a map is of one."
            )
        size = as_rgb(listed(image)[0], f"prompt {n}").size
        start, end = spans["image"]
        grids.append(grid_of(model, size, end - start))
    return prompts, grids, tuple(layers)


def _attended(
    model: HookedModel, layers: Sequence[int], batch_size: int, prompts: Dataset, desc: str | None
) -> list[Float[Tensor, "layer patch"]]:
    """What the last token gives the image, mean over heads."""
    found: dict[int, Tensor] = {}
    spans = spans_of(prompts) or []

    def read(attention: Attention) -> Tensor:
        return attention.pattern(queries=slice(-1, None))[:, :, 0].mean(1)

    for batch in _batches(model, prompts, batch_size, desc):
        with _told(model, prompts, batch):
            rows = model.read_attention(
                batch.input_ids, read, layers=layers, attention_mask=batch.attention_mask,
                **batch.inputs,
            )  # fmt: skip
        for row, n in enumerate(batch.index.tolist()):
            found[n] = rows[row, :, _columns(spans[n]["image"], batch, row)].cpu()
    return [found[n] for n in range(len(prompts))]


def _weighted(
    model: HookedModel, prompts: Dataset, batch: Batch, layers: Sequence[int]
) -> Float[Tensor, "batch layer key"]:
    """Mean over heads of a relu(g . v), at the last token."""
    z: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def enter(value: Tensor, hook) -> Tensor:
        return value.detach().requires_grad_()

    def hand_over(value: Tensor, hook, layer: int) -> Tensor:
        z[layer] = value.view_as(value)
        return z[layer]

    def look(attention: Attention, hook, layer: int) -> None:
        with torch.no_grad():
            weights[layer] = attention.pattern(queries=slice(-1, None))[:, :, 0].detach()
            values[layer] = attention.per_query_head(attention.v).detach().float()

    hooks: list[tuple[str, Callable]] = [(ENTRY, enter)]
    for layer in layers:
        hooks.append((f"blocks.{layer}.attn.hook_z", partial(hand_over, layer=layer)))
        hooks.append((f"blocks.{layer}.attn.hook_attention", partial(look, layer=layer)))
    with torch.enable_grad(), _told(model, prompts, batch), model.hooks(fwd_hooks=hooks):
        total = likeliest(model, batch).sum()
    gradients = torch.autograd.grad(total, [z[layer] for layer in layers])
    parts = []
    for layer, gradient in zip(layers, gradients, strict=True):
        worth = torch.einsum("bhd,bhkd->bhk", gradient[:, -1].float(), values[layer])
        parts.append((weights[layer] * worth.relu()).mean(1))
    return torch.stack(parts, dim=1)


def _batches(model: HookedModel, prompts: Dataset, size: int, desc: str | None):
    return model.batches(prompts["input_ids"], size, desc, images=images_of(prompts))


def _told(model: HookedModel, prompts: Dataset, batch: Batch):
    """Interventions may ask where spans lie."""
    rows = prompts.select(batch.index.tolist())
    return model.spans(spans_of(rows), [len(ids) for ids in rows["input_ids"]])


def _columns(span: Sequence[int], batch: Batch, row: int) -> slice:
    """The columns of an image in a row of the batch."""
    start, end = span
    first = int(batch.first[row])
    return slice(first + start, first + end)


def _images(prompts: Dataset):
    return images_of(prompts) or []


def _maps(
    model: HookedModel,
    prompts: Dataset,
    maps: list[Shaped[Any, "layer _row _column"]],
    layers: tuple[int, ...],
    grids: list[Grid],
    analysis: str,
    general: str | Dataset | None = None,
) -> ImageMaps:
    about = {"analysis": analysis, "layers": list(layers), "task": describe(prompts)}
    if general is not None:
        about["general"] = general if isinstance(general, str) else describe(general)
    arrays = [np.asarray(one, dtype=np.float32) for one in maps]
    return ImageMaps(arrays, layers, grids, about | model.provenance())
