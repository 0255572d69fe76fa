"""What pruning the heads of an image encoder does, image by image: the measures of `vit_heads`."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from interp.model.hooked import HookedModel
from interp.model.image_replay import ImageRecording, Seen, has_classifier, look
from interp.model.pictures import Pictures
from interp.model.towers import towers

MEASURES = ("drop", "margin", "jsd", "shift", "taylor", "alone")


def measured(
    recording: ImageRecording, y: Int[Tensor, " image"], means: Tensor | None
) -> dict[str, Tensor]:
    """[image, layer, head] of every measure, and [image, layer] of `layer_drop`."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    n_heads = recording.z[0].shape[2]
    labelled = has_classifier(recording.model)
    without = torch.eye(n_heads, dtype=torch.bool, device=y.device)
    for layer in range(recording.n_layers):
        mean = None if means is None else means[layer]
        pruned = _without(recording, layer, without, mean)
        before = recording.seen.features[:, None].expand_as(pruned.features)
        found["shift"].append(1 - cosine_similarity(before, pruned.features, dim=-1))
        if not labelled:
            continue
        logits = recording.seen.logits[:, None].expand_as(pruned.logits)
        ys = y[:, None].expand(-1, n_heads)
        found["drop"].append(drop(logits, pruned.logits, ys))
        found["margin"].append(margin_drop(logits, pruned.logits, ys))
        found["jsd"].append(jensen_shannon(logits, pruned.logits))
        all_but = torch.cat([~without, torch.ones_like(without[:1])])
        kept = _without(recording, layer, all_but, mean)
        alone, none = kept.logits[:, :-1], kept.logits[:, -1:]
        found["alone"].append(drop(alone, none.expand_as(alone), ys))
        found["layer_drop"].append(drop(logits[:, 0], none[:, 0], y))
    stacked = {name: torch.stack(values, dim=1) for name, values in found.items()}
    if labelled:
        stacked["taylor"] = _taylor(recording, y)
    return {name: stacked[name] for name in (*MEASURES, "layer_drop") if name in stacked}


def drop(
    before: Float[Tensor, "*image label"],
    after: Float[Tensor, "*image label"],
    y: Int[Tensor, "*image"],
) -> Float[Tensor, "*image"]:
    """p_y - p-_y, from logits."""
    p, q = before.softmax(-1), after.softmax(-1)
    return (p - q).gather(-1, y[..., None]).squeeze(-1)


def margin_drop(
    before: Float[Tensor, "*image label"],
    after: Float[Tensor, "*image label"],
    y: Int[Tensor, "*image"],
) -> Float[Tensor, "*image"]:
    """By how much the logit of y loses its lead over the largest other one."""
    own = torch.nn.functional.one_hot(y, before.shape[-1]).bool()

    def margin(logits: Tensor) -> Tensor:
        others = logits.masked_fill(own, float("-inf")).amax(-1)
        return logits.gather(-1, y[..., None]).squeeze(-1) - others

    return margin(before) - margin(after)


def jensen_shannon(
    before: Float[Tensor, "*image label"], after: Float[Tensor, "*image label"]
) -> Float[Tensor, "*image"]:
    """Jensen-Shannon divergence of two softmaxes in bits, from logits; 0 to 1."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    middle = torch.logaddexp(p, q) - np.log(2)
    nats = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
    return (nats / np.log(2)).clamp(0, 1).to(before.dtype)


@dataclass(frozen=True, eq=False)
class _Pruned:
    logits: Float[Tensor, "image case label"]
    features: Float[Tensor, "image case d_model"]


def _without(
    recording: ImageRecording,
    layer: int,
    heads: Bool[Tensor, "case head"],
    mean: Float[Tensor, "head d_head"] | None,
) -> _Pruned:
    """What the images end in without some heads of a layer, all cases at once."""
    z = recording.z[layer]
    n_images, n_cases = len(z), len(heads)
    instead = torch.zeros_like(z) if mean is None else mean.to(z).expand_as(z)
    cut = heads[None, :, None, :, None]
    new = torch.where(cut, instead[:, None], z[:, None]).flatten(0, 1)
    images = torch.arange(n_images, device=z.device).repeat_interleave(n_cases)
    seen: Seen = recording.replay(layer, images, new)
    logits, features = (x.unflatten(0, (n_images, n_cases)) for x in (seen.logits, seen.features))
    return _Pruned(logits.float(), features.float())


def _taylor(
    recording: ImageRecording, y: Int[Tensor, " image"]
) -> Float[Tensor, "image layer head"]:
    """|gradient of -log p_y| by a mask of ones on each head."""
    model, n_images = recording.model, len(y)
    n_heads = recording.z[0].shape[2]
    ones = recording.pixels.new_ones(n_images, recording.n_layers, n_heads)
    with torch.enable_grad():
        mask = ones.requires_grad_()

        def scale(z: Tensor, hook, layer: int) -> Tensor:
            return z * mask[:, layer, None, :, None]

        hooks = [
            (f"blocks.{layer}.attn.hook_z", partial(scale, layer=layer))
            for layer in range(recording.n_layers)
        ]
        with model.hooks(fwd_hooks=hooks):
            logits = model(recording.pixels)
        loss = cross_entropy(logits.float(), y, reduction="sum")  # images don't meet
        (gradient,) = torch.autograd.grad(loss, mask)
    return gradient.abs().float()


def mean_z(
    model: HookedModel, pictures: Pictures, batch_size: int, progress: bool
) -> Float[Tensor, "layer head d_head"]:
    """Each head's z, mean over tokens and images."""
    sums: dict[int, list[Tensor]] = defaultdict(list)
    n_tokens: list[int] = []

    def add(z: Tensor, hook, layer: int) -> None:
        sums[layer].append(z.double().sum((0, 1)))
        if layer == layers[0]:
            n_tokens.append(z.shape[0] * z.shape[1])

    layers = towers(model)["vision"].layers
    hooks = [(f"blocks.{n}.attn.hook_z", partial(add, layer=n)) for n in layers]
    for inputs in pictures.batches(batch_size, "mean z" if progress else None):
        with model.hooks(fwd_hooks=hooks):
            look(model, inputs["pixel_values"])
    return torch.stack([torch.stack(sums[layer]).sum(0) for layer in layers]) / sum(n_tokens)


@torch.no_grad()
def shifts(
    model: HookedModel, pictures: Pictures, batch_size: int, progress: bool
) -> Float[np.ndarray, "image layer head"]:
    """`shift` of each head of a vision-language model's tower, which is run anew for each."""
    tower = towers(model)["vision"]
    rows = []
    for inputs in pictures.batches(batch_size, "pruning heads" if progress else None):
        before = pictures.run(inputs)
        found = torch.zeros(len(before), len(tower.layers), tower.n_heads)
        for place, layer in enumerate(tower.layers):
            for head in range(tower.n_heads):
                cut = [(tower.hook(layer, "hook_z"), partial(_zero, head=head))]
                with model.hooks(fwd_hooks=cut):
                    after = pictures.run(inputs)
                for image, (old, new) in enumerate(zip(before, after, strict=True)):
                    same = cosine_similarity(old.float(), new.float(), dim=-1)
                    found[image, place, head] = 1 - same.mean()
        rows.append(found)
    return torch.cat(rows).double().numpy()


def _zero(z: Tensor, hook, head: int) -> Tensor:
    kept = torch.ones(z.shape[-2], 1, dtype=z.dtype, device=z.device)
    kept[head] = 0
    return z * kept
