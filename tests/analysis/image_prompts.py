"""Prompts with images for tiny models, and what plain transformers says of one of them."""

import torch

from interp.model.images import image_mark, images_of
from interp.tasks import from_examples
from tests.model.vision_families import build, picture


def prompts_of(model, several: bool = False):
    """Of different lengths, images of different sizes; with `several`, two in one prompt."""
    mark = image_mark(model)
    rows = [
        {"text": f"w5 {mark} w6 w7 w8", "answer": " w8 w9 w4", "image": picture(0)},
        {"text": f"w3 w4 w9 {mark} w6 w7", "answer": " w8 w9", "image": picture(1, 16, 24)},
        {"text": f"{mark} w7 w12 w13 w14 w15", "answer": " w8", "image": picture(2, 24, 16)},
    ]
    if several:
        images = [picture(3), picture(4, 16, 32)]
        rows.append({"text": f"w4 {mark} w6 {mark} w7", "answer": " w9", "image": images})
    return from_examples(model, rows)


def plain(family: str, model, prompts, row: int, more=()):
    """The eager model of transformers on one prompt alone, with its attention, gradients on."""
    one = prompts.select([row])
    ids = torch.tensor([[*one["input_ids"][0], *more]])
    batch = model.batch(ids.tolist(), images=images_of(one))
    inputs = {name: value.clone() for name, value in batch.inputs.items()}
    inputs["pixel_values"].requires_grad_()
    eager = build(family)
    out = eager(input_ids=ids, output_attentions=True, use_cache=False, **inputs)
    return out, inputs["pixel_values"]
