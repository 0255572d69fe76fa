"""What an image encoder looks at, patch by patch, and which token of a prompt each patch becomes.

With V[h, i, j] the weight from token i to token j in head h of a layer of the encoder, patch j gets

    class:     mean over heads of V[h, CLS, j]             (one row a head, never the map)
    received:  mean over heads and over tokens i of V[h, i, j]

An image that is cut into tiles has a CLS token, and so a set of patches, for each tile. Qwen's
encoders have none, and merge a square of patches into what becomes one token: it gets their sum.

At each token of an image the language model's input is a copy of one row of the projector's output.
So which token is which patch is found by comparing the two: whatever the order, the tiles, and the
tokens (ends of lines) that are no patch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.model.attention import Attention
from interp.model.hooked import HookedModel
from interp.model.images import ImageError, image_token
from interp.model.towers import Tower, towers

Row = Literal["class", "received"]

PROJECTED = "vision_projector.hook_out"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class EncoderRows:
    """What an encoder looked at in its last run, by layer: one object for each block.

    `rows[layer]` has a vector for each image (or tile), in the order of the features that the
    projector makes of them.
    """

    def __init__(self, model: HookedModel, wanted: Sequence[tuple[int, Row]]):
        self.model, self.tower = model, tower_of(model)
        self.wanted = sorted(set(wanted))
        if any(row == "class" for _, row in self.wanted):
            check_class_token(model)
        self.merged = merged_patches(model)
        self._rows: dict[tuple[int, Row], list[Tensor]] = defaultdict(list)
        self._features: list[Tensor] = []
        self._read = False

    def hooks(self, features: bool = True) -> Iterator[tuple[str, Callable]]:
        """Of the layers that are looked at, and, with `features`, of the projector."""
        for layer in sorted({layer for layer, _ in self.wanted}):
            yield self.tower.hook(layer, "hook_attention"), partial(self._look, layer)
        if features:
            yield PROJECTED, self._keep

    def of(self, layer: int, row: Row) -> list[Float[Tensor, " feature"]]:
        """A number for each feature of each image (or tile); what comes next is another run's."""
        self._read = True
        return self._rows[layer, row]

    @property
    def features(self) -> Float[Tensor, "feature width"] | None:
        """The projector's output, all images' one after the other; None where it has not run."""
        self._read = True
        return torch.cat(self._features) if self._features else None

    def _begin(self) -> None:
        if self._read:
            self._rows.clear()
            self._features.clear()
            self._read = False

    def _look(self, layer: int, attention: Attention, hook) -> None:
        self._begin()
        for own, row in self.wanted:
            if own == layer:
                read = class_row if row == "class" else received_row
                weights = read(attention, n_special(self.model, attention)).mean(1)
                weights = weights.unflatten(1, (-1, self.merged)).sum(-1)
                self._rows[layer, row] += list(weights.unbind(0))

    def _keep(self, projected: Tensor, hook) -> None:
        self._begin()
        self._features.append(projected.detach().flatten(0, -2))


def class_row(attention: Attention, n_special: int = 1) -> Float[Tensor, "image head patch"]:
    """What each head's CLS token (the first) gives to each patch."""
    return attention.pattern(queries=[0])[:, :, 0, n_special:]


def received_row(attention: Attention, n_special: int = 1) -> Float[Tensor, "image head patch"]:
    """What each patch gets from the encoder's tokens, mean over these."""
    return attention.mass_received()[..., n_special:]


# The encoder


def tower_of(model: HookedModel) -> Tower:
    """The image encoder in front of a language model. Raises `ImageError` for a text-only one."""
    image_token(model)
    found = towers(model).get("vision")
    if found is None:
        raise ImageError(
            f"model: the heads of {model.name}'s image encoder ({model.cfg.architecture}) are not "
            "known, so what it looks at can't be told; give a LLaVA or Qwen-VL model."
        )
    return found


def feature_layer(model: HookedModel) -> int:
    """The last layer of the encoder that the language model gets anything from."""
    last = tower_of(model).layers[-1]
    given = getattr(model.original_model.config, "vision_feature_layer", None)
    if given is None:
        return last
    # entry k of the hidden states is what layer k - 1 gives
    entries = given if isinstance(given, (list, tuple)) else [given]
    layer = max(entry if entry >= 0 else last + 2 + entry for entry in entries) - 1
    if layer < 0:
        raise ImageError(f"model: {model.name} reads no layer of its image encoder.")
    return min(layer, last)


def global_layers(model: HookedModel) -> list[int]:
    """Layers in which a patch sees its whole image, not a window of it, up to `feature_layer`."""
    layers = [n for n in tower_of(model).layers if n <= feature_layer(model)]
    vision = getattr(model.original_model.config, "vision_config", None)
    whole = getattr(vision, "fullatt_block_indexes", None)
    return layers if whole is None else [n for n in layers if n in whole]


def has_class_token(model: HookedModel) -> bool:
    """Does the encoder have a token of its own for the whole image?"""
    names = (name for name, _ in model.original_model.named_parameters())
    return any(name.endswith(("class_embedding", "cls_token")) for name in names)


def check_class_token(model: HookedModel) -> None:
    """Raises `ImageError` where the encoder has no CLS token."""
    if not has_class_token(model):
        raise ImageError(
            f"model: the image encoder of {model.name} ({model.cfg.architecture}) has no CLS "
            "token, whose attention was asked for; what patches receive from each other "
            "('received') takes its place, under that name."
        )


def n_patches(model: HookedModel) -> int | None:
    """How many patches an image (or tile) has; None where that depends on its size."""
    vision = getattr(model.original_model.config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) else None


def n_special(model: HookedModel, attention: Attention) -> int:
    """How many of the encoder's tokens stand before the patches."""
    patches = n_patches(model)
    return 0 if patches is None else attention.n_queries - patches


def merged_patches(model: HookedModel) -> int:
    """How many patches become one token of the prompt."""
    vision = getattr(model.original_model.config, "vision_config", None)
    return int(getattr(vision, "spatial_merge_size", 1) or 1) ** 2


# From patches to tokens


def copied_from(
    tokens: Float[Tensor, "token width"], features: Float[Tensor, "feature width"]
) -> Int[Tensor, " token"]:
    """Which feature each token is a copy of, to the bit; the first of equal ones; -1: of none."""
    wanted, known = fingerprint(tokens), fingerprint(features.to(tokens))
    known, order = known.sort(stable=True)
    place = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
    return torch.where(known[place] == wanted, order[place], -1)


def fingerprint(rows: Float[Tensor, "row width"]) -> Int[Tensor, " row"]:
    """A number for each row that depends on all of its bits (in whole numbers: sums are exact)."""
    bits = rows.contiguous().view(BITS[rows.element_size()]).long()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**62, (rows.shape[1],), generator=generator)
    return (bits * (2 * weights + 1).to(bits)).sum(-1)
