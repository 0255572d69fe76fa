"""Image encoders: a pass over images is recorded, and continued with other outputs of its heads.

As in `interp.model.replay`, what changes at layer l changes nothing before it: a replay enters
block l with what was recorded there and runs the blocks from l on, for many changes at once. The
attention of layer l itself is computed anew and then replaced, so what later layers make of the
change is exact.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model.hooked import HookedModel
from interp.model.replay import COARSE, TOLERANCE, ReplayError, passing_over
from interp.model.towers import sees_only

FINAL = "ln_final.hook_out"
CLASSIFIER = "unembed.hook_in"


@dataclass(frozen=True, eq=False)
class Seen:
    """What a pass ends in: the classifier's logits, and the CLS token that it reads them from."""

    logits: Float[Tensor, "image label"]
    features: Float[Tensor, "image d_model"]


@dataclass(frozen=True, eq=False)
class ImageRecording:
    """A pass over images: what entered each block, and what each head gave there."""

    model: HookedModel
    pixels: Float[Tensor, "image channel height width"]
    resid_pre: list[Float[Tensor, "image token d_model"]]
    z: list[Float[Tensor, "image token head d_head"]]
    seen: Seen

    @property
    def n_layers(self) -> int:
        return len(self.resid_pre)

    def replay(
        self,
        layer: int,
        images: Int[Tensor, " row"],
        z: Float[Tensor, "row token head d_head"],
    ) -> Seen:
        """What some images (any, repeated as wished) end in where `layer`'s heads give `z`."""

        def replace(value: Tensor, hook) -> Tensor:
            return z

        with ExitStack() as around:
            around.enter_context(passing_over(self.model, layer, self.resid_pre[layer][images]))
            point = f"blocks.{layer}.attn.hook_z"
            around.enter_context(self.model.hooks(fwd_hooks=[(point, replace)]))
            return look(self.model, self.pixels[images])


@torch.no_grad()
def record_images(
    model: HookedModel, pixels: Float[Tensor, "image channel height width"]
) -> ImageRecording:
    """Run once and keep what replays need.

    Raises `ReplayError` for a model that is no image encoder, is in training mode, or does not end
    in the same when nothing is changed.
    """
    if not sees_only(model):
        raise ReplayError(
            f"model: {model.name} ({model.cfg.architecture}) is no encoder of images alone."
        )
    if model.original_model.training:
        raise ReplayError(f"{model.name} is in training mode; call model.eval() first.")
    kept: dict[str, list[Tensor]] = {"hook_resid_pre": [], "attn.hook_z": []}

    def keep(value: Tensor, hook, point: str) -> None:
        kept[point].append(value)

    hooks = [
        (f"blocks.{layer}.{point}", partial(keep, point=point))
        for layer in range(len(model.blocks))
        for point in kept
    ]
    with model.hooks(fwd_hooks=hooks):
        seen = look(model, pixels)
    recording = ImageRecording(model, pixels, *kept.values(), seen)
    _try_out(recording)
    return recording


@torch.no_grad()
def look(model: HookedModel, pixels: Float[Tensor, "image channel height width"]) -> Seen:
    """Run the model on images."""
    found: list[Tensor] = []

    def keep(value: Tensor, hook) -> None:
        found.append(value[:, 0])

    with model.hooks(fwd_hooks=[(FINAL, keep)]):
        logits = model(pixels)
    # an encoder without a classifier gives all of its tokens
    return Seen(logits if has_classifier(model) else found[0], found[0])


def has_classifier(model: HookedModel) -> bool:
    """Does it end in labels?"""
    return CLASSIFIER in model.hook_dict


def _try_out(recording: ImageRecording) -> None:
    """Nothing changed must change nothing."""
    layer = recording.n_layers // 2
    first = torch.zeros(1, dtype=torch.long, device=recording.pixels.device)
    again = recording.replay(layer, first, recording.z[layer][first])
    before = recording.seen.logits[:1]
    apart = float((again.logits - before).abs().max() / before.abs().max().clamp_min(1))
    if not apart <= TOLERANCE.get(before.dtype, COARSE):
        raise ReplayError(
            f"{recording.model.name}: a replay without any change differs by {apart:.1g} of the "
            "largest logit, so its blocks depend on more than what enters them."
        )
