"""Vision-language models in plain transformers: one prompt at a time, its heads read or edited."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from tests.model import vision_families as vision
from tests.model.vision_families import END, IMAGE, START

N_HEADS = 4
PIXELS = ("pixel_values", "image_sizes", "image_grid_thw")


@cache
def plain(family: str, copy: int = 0):
    """The weights of `vision_families.tiny(family)` in transformers' own eager attention.

    Another `copy` may run while this one does.
    """
    return vision.build(family)


def projections(model) -> list[torch.nn.Module]:
    """What reads the heads' outputs, layer by layer, in the language model."""
    found = dict(model.named_modules())
    names = [n for n in found if n.endswith("self_attn.o_proj") and "language_model" in n]
    return [found[name] for name in names]


def inputs_of(family: str, prompts: Dataset, row: int, *more: int) -> dict[str, Tensor]:
    """A prompt with its image, and tokens behind it."""
    reader = vision.tiny(family).processor
    ids = torch.tensor([[*prompts[row]["input_ids"], *more]])
    found: dict[str, Any] = {"input_ids": ids}
    if images := prompts[row]["image"]:
        made = getattr(reader, "image_processor", reader)(images=images, return_tensors="pt")
        found |= {name: value for name, value in made.items() if name in PIXELS}
        if "image_grid_thw" in found:
            found["mm_token_type_ids"] = (ids == IMAGE).int()
    return found


def text_of(prompts: Dataset, row: int, *more: int) -> dict[str, Tensor]:
    """The same without its image."""
    ids = [i for i in prompts[row]["input_ids"] if i not in (IMAGE, START, END)]
    return {"input_ids": torch.tensor([[*ids, *more]])}


@torch.no_grad()
def heads_of(model, inputs: dict[str, Tensor], **more) -> list[Tensor]:
    """Each layer's heads `[token head d_head]`."""
    return passed(model, inputs, **more)[0]


@torch.no_grad()
def passed(
    model, inputs: dict[str, Tensor], edit: Callable | None = None, **more
) -> tuple[list[Tensor], Any]:
    """The heads of each layer as they were, and the model's output.

    `edit(layer, z)` is what they are to say instead.
    """
    found: list[Tensor] = []

    def hook_of(layer: int):
        def look(module, args):
            z = args[0][0].unflatten(-1, (N_HEADS, -1))
            found.append(z.clone())
            return None if edit is None else (edit(layer, z).flatten(-2)[None],)

        return look

    handles = [
        module.register_forward_pre_hook(hook_of(layer))
        for layer, module in enumerate(projections(model))
    ]
    try:
        out = model(**inputs, **more)
    finally:
        for handle in handles:
            handle.remove()
    return found, out


def step_by_step(
    model, inputs: dict[str, Tensor], tokens: Sequence[int], edit: Callable | None = None
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """With the cache: at each step, the heads at the last token and the logits that follow."""
    heads, logits, cache = [], [], None
    model.model.rope_deltas = None  # Qwen-VL's, of the prompt before
    for n in range(len(tokens)):
        if cache is None:
            known = dict(inputs)
        else:
            known = {"input_ids": torch.tensor([[tokens[n - 1]]]), "past_key_values": cache}
        z, out = passed(model, known, edit, use_cache=True)
        cache = out.past_key_values
        heads.append([layer[-1] for layer in z])
        logits.append(out.logits[0, -1])
    return heads, logits
