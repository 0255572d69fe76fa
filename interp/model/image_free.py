"""The same prompts without their images: taken out of the text, or hidden where they stand.

- *Deleted*: the image's tokens, and the marks that open and close it (Qwen-VL's), are left out, and
  what remains is numbered from 0. Text behind the image then lies nearer to text before it.
- *Masked*: the prompt is as it was, positions too, but no token outside of the images looks at
  their keys, in any layer.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.attention import Attention
from interp.model.call import Spans
from interp.model.hooked import HookedModel
from interp.model.images import IMAGE_SPAN, ImageError, image_token


def tokens_of_images(model: HookedModel) -> tuple[int, ...]:
    """The token that stands for an image, and those that open and close one.

    Raises `ImageError` for a text-only model.
    """
    config = model.original_model.config
    marks = (getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end"))
    return (image_token(model), *(mark for mark in marks if mark is not None))


def text_places(model: HookedModel, ids: Sequence[int]) -> list[int]:
    """Where in a prompt there is text: all places but those of images and their marks."""
    left_out = tokens_of_images(model)
    return [place for place, token in enumerate(ids) if token not in left_out]


def without_images(
    model: HookedModel, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None = None
) -> list[list[int]]:
    """The prompts' text alone; one that has no image stays as it is.

    `numbers` says how errors call the prompts. Raises `ImageError` where no text is left, or the
    prompt ends in its image: what follows is then predicted from another token.
    """
    found = []
    for number, ids in zip(range(len(prompts)) if numbers is None else numbers, prompts):
        places = text_places(model, ids)
        if len(places) < len(ids) and (not places or places[-1] != len(ids) - 1):
            raise ImageError(
                f"prompt {number}: it ends in an image, so without it the next token would be "
                "predicted from another one; put text behind the image."
            )
        found.append([ids[place] for place in places])
    return found


def spans_without_images(model: HookedModel, ids: Sequence[int], spans: Spans) -> Spans:
    """Where the spans of a prompt lie once its images are deleted; those of images are gone."""
    before = torch.zeros(len(ids) + 1, dtype=torch.long)
    before[[place + 1 for place in text_places(model, ids)]] = 1
    moved = before.cumsum(0).tolist()
    return {
        name: [moved[start], moved[end]]
        for name, (start, end) in spans.items()
        if not IMAGE_SPAN.match(name)
    }


def hiding_images(model: HookedModel) -> list[tuple[str, Callable]]:
    """Hooks under which no text looks at an image; for passes over whole prompts.

    Raises `ImageError` for a text-only model.
    """
    left_out = torch.tensor(tokens_of_images(model))
    return [
        (f"blocks.{layer}.attn.hook_attention", partial(_hide, model, left_out))
        for layer in model.attention_layers
    ]


def _hide(
    model: HookedModel, left_out: Int[Tensor, " kind"], attention: Attention, hook
) -> Attention:
    ids = model.call.input_ids
    if ids is None or ids.shape[1] != attention.n_keys:
        raise ImageError("images: they can be hidden only in a pass over whole prompts.")
    of_image = torch.isin(ids, left_out.to(ids.device)).to(attention.q.device)
    return attention.bias(hidden(of_image))


def hidden(of_image: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch 1 token token"]:
    """-inf where text would look at an image; images still see themselves, or nothing would."""
    pairs = ~of_image[:, :, None] & of_image[:, None]
    return torch.zeros(pairs.shape, device=pairs.device).masked_fill(pairs, -torch.inf)[:, None]
