"""What one pass says of visual sinks, layer by layer: see `interp.analysis.visual_sinks`."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from interp.analysis.image_attention import read_with_answers, text_after_image
from interp.analysis.sink_dimensions import VisualSinkError, sizes
from interp.model.attention import Attention
from interp.model.graph import output_weights
from interp.model.hooked import HookedModel
from interp.model.images import images_of, of_images

PER_TOKEN = ("phi", "received", "contribution")
PER_HEAD = ("chosen", "image_mass", "visual_sink_mass", "text_sink_mass")


@dataclass(frozen=True)
class ImageCentric:
    """When a row looks at the picture. Defaults: the paper's, against hallucination."""

    min_image_mass: float = 0.2
    min_non_sink: float = 0.5

    def __post_init__(self):
        for name in ("min_image_mass", "min_non_sink"):
            if not 0 <= getattr(self, name) <= 1:
                raise VisualSinkError(f"{name}={getattr(self, name)}: a share, from 0 to 1.")

    def chosen(self, on_image: Tensor, on_others: Tensor) -> Tensor:
        """By the mass of rows on the image, and on those of its tokens that are no sinks."""
        enough = (on_image >= self.min_image_mass) & (on_image > 0)
        return enough & (on_others >= self.min_non_sink * on_image)


@torch.no_grad()
def look_at_sinks(
    model: HookedModel,
    dimensions: tuple[int, ...],
    random: list[list[int]],
    tau: float,
    rule: ImageCentric,
    prompts: Dataset,
) -> pd.DataFrame:
    """One row a prompt, what is known of each layer flattened."""
    lists, lengths = read_with_answers(prompts)
    batch = model.batch(lists, images=images_of(prompts))
    look = Look(model, dimensions, random, tau, rule)
    with model.spans(None, lengths), model.hooks(fwd_hooks=look.hooks()):
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
    image = of_images(model, batch.input_ids)
    rows = []
    for row, first in enumerate(batch.first.tolist()):
        own = slice(first, None)
        found: dict[str, Any] = {"length": len(lists[row])}
        found["image"] = image[row, own].cpu().numpy()
        for name, layers in look.found.items():
            values = torch.stack([value[row] for value in layers])
            values = values[:, own] if name in PER_TOKEN else values
            found[name] = values.float().flatten().cpu().numpy()
        rows.append(found)
    return pd.DataFrame(rows)


class Look:
    """What each layer says of a batch: `found[name]` has a tensor `[batch, ...]` a layer."""

    def __init__(self, model: HookedModel, dimensions, random, tau: float, rule: ImageCentric):
        self.model, self.dimensions, self.tau, self.rule = model, list(dimensions), tau, rule
        self.random = torch.tensor(random)
        self.found: dict[str, list[Tensor]] = defaultdict(list)
        self._sinks: Any = None

    def hooks(self) -> list[tuple[str, Callable]]:
        """Two read-only hooks a layer."""
        hooks: list[tuple[str, Callable]] = []
        for layer in self.model.attention_layers:
            hooks.append((f"blocks.{layer}.hook_resid_pre", self._weigh))
            see = partial(self._see, layer)
            hooks.append((f"blocks.{layer}.attn.hook_attention", see))
        return hooks

    def _weigh(self, x: Float[Tensor, "batch token d_model"], hook) -> None:
        call = self.model.call
        prompt = call.rows("prompt")
        if not self.dimensions:
            self._sinks = torch.zeros_like(prompt)
            self.found["phi"].append(torch.zeros(prompt.shape, device=x.device))
            self.found["random"].append(torch.zeros(len(x), device=x.device))
            return
        size = sizes(x)
        size_here = size[..., self.dimensions].amax(-1)
        self._sinks = (size_here >= self.tau) & prompt
        self.found["phi"].append(size_here)
        called = size[..., self.random.to(x.device)].amax(-1) >= self.tau
        on_image = called & (of_images(self.model, call.input_ids) & prompt)[..., None]
        self.found["random"].append(on_image.sum(1).float().mean(-1))

    def _see(self, layer: int, attention: Attention, hook) -> None:
        device, call = attention.q.device, self.model.call
        image = (of_images(self.model, call.input_ids) & call.rows("prompt")).to(device)
        sinks = self._sinks.to(device)
        rows = text_after_image(image, attention.real_queries)
        columns = rows.any(0).nonzero().squeeze(1)
        sets = torch.stack([image, image & ~sinks, image & sinks, sinks & ~image], dim=-1)
        total: dict[str, Any] = defaultdict(float)
        received = torch.zeros(len(rows), attention.n_heads, attention.n_keys, device=device)
        for index, weights in attention.blocks(None, columns):
            mine = rows[:, None, index]
            mass = weights @ sets[:, None, : weights.shape[-1]].to(weights.dtype)
            on_image, on_others, on_visual, on_text = mass.unbind(-1)
            values = (self.rule.chosen(on_image, on_others), on_image, on_visual, on_text)
            for name, value in zip(PER_HEAD, values, strict=True):
                total[name] = total[name] + (value * mine).sum(-1)
            received[..., : weights.shape[-1]] += (mine[:, :, None].to(weights) @ weights)[:, :, 0]
        n = rows.sum(1).clamp_min(1)[:, None]
        for name in PER_HEAD:
            self.found[name].append(total[name] / n)
        received = received / n[..., None]
        norms = output_norms(self.model, layer, attention)
        self.found["received"].append(received.mean(1))
        self.found["contribution"].append((received * norms).mean(1))


def output_norms(
    model: HookedModel, layer: int, attention: Attention
) -> Float[Tensor, "batch head key"]:
    """|v_j W_O| of each head."""
    v = attention.per_query_head(attention.v).float()
    w_o, _ = output_weights(model, layer, attention.n_heads)
    gram = w_o.float() @ w_o.float().transpose(1, 2)
    square = torch.einsum("bhkd,hde,bhke->bhk", v, gram.to(v.device), v)
    return square.clamp_min(0).sqrt()
