"""How strongly head modulation raises each token of each image, found anew for each prompt.

Which patches are chosen is told by rows of the image encoder (`interp.model.class_rows`), while it
runs; the strengths are then laid on the prompt's tokens as it goes in, and kept by the places of
these tokens, so that they are at hand in every later step.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from interp.intervention.base import Hook
from interp.intervention.following import check_goes_on
from interp.model.attention import Attention
from interp.model.call import at_places
from interp.model.class_rows import (
    EncoderRows,
    Row,
    copied_from,
    feature_layer,
    global_layers,
    has_class_token,
)
from interp.model.hooked import HookedModel
from interp.model.images import ImageError, of_images

if TYPE_CHECKING:
    from interp.intervention.head_modulation import HeadModulation

FENCE = 1.5  # interquartile ranges above the third quartile: an outlier


def chosen_patches(
    early: Float[Tensor, " patch"],
    late: Float[Tensor, " patch"],
    local_share: float,
    received: Float[Tensor, " patch"] | None = None,
    spatial_share: float = 0.0,
) -> tuple[Bool[Tensor, " patch"], Bool[Tensor, " patch"]]:
    """Lc and Sm of one image: by its rows in the encoder's first and last layer.

    The first of equal patches is chosen; no patch is in both.
    """
    summary = outliers(late)
    local = largest(early, local_share)
    if received is not None:
        local = local | largest(received, spatial_share)
    return local & ~summary, summary


def largest(values: Float[Tensor, " patch"], share: float) -> Bool[Tensor, " patch"]:
    """That share of the patches, rounded down, with the largest values."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    # 1e-9: a third of 36 is 12, whatever floats make of it
    n = int(share * len(values) + 1e-9)
    chosen[values.argsort(descending=True, stable=True)[:n]] = True
    return chosen


def outliers(values: Float[Tensor, " patch"]) -> Bool[Tensor, " patch"]:
    """Above Tukey's upper fence."""
    q1, q3 = torch.quantile(values.float(), values.new_tensor([0.25, 0.75]).float())
    return values > q3 + FENCE * (q3 - q1)


class ImageStrengths:
    """The strengths of one block in which a `HeadModulation` is applied."""

    def __init__(self, rule: "HeadModulation", model: HookedModel):
        self.rule, self.model = rule, model
        self.row: Row = self._row()
        layers = global_layers(model) or [feature_layer(model)]
        self.early, self.late = layers[0], layers[-1]
        wanted: list[tuple[int, Row]] = []
        if rule.tokens != "all":
            wanted = [(self.early, self.row), (self.late, self.row)]
            if rule.spatial_share:
                wanted.append((self.early, "received"))
        self.encoder = EncoderRows(model, wanted)
        # of the prompts that are being continued, by the places of their tokens
        self._by_place: Float[Tensor, "batch place"] | None = None

    def hooks(self) -> Iterator[Hook]:
        """In the encoder and where the prompt goes in."""
        yield from self.encoder.hooks()
        yield "blocks.0.hook_resid_pre", self._lay

    def at(self, attention: Attention) -> Float[Tensor, "batch key"]:
        """c of each key of a layer; 0 for what is no token of an image.

        Raises `InterventionError` where this pass goes on from a prompt that was not seen.
        """
        known, places = self._by_place, attention.key_positions
        check_goes_on("HeadModulation", known, len(places))
        return at_places(known.to(places.device), places, attention.real_keys)

    def _row(self) -> Row:
        if self.rule.tokens == "random":
            return "class" if has_class_token(self.model) else "received"
        return "received" if self.rule.tokens == "received" else "class"

    def _lay(self, embedded: Float[Tensor, "batch token d_model"], hook) -> None:
        """Note what is given in this pass: all of a prompt, a part of it, or what follows."""
        call = self.model.call
        whole = call.n_tokens == call.real_keys.shape[1]
        ids = call.input_ids
        image = torch.ones_like(call.real) if ids is None else of_images(self.model, ids)
        image = image & call.real
        new = embedded.new_zeros(call.real_keys.shape, dtype=torch.float32)
        if bool(image.any()):
            new = self._at_places(new, embedded, image, must=whole and ids is not None)
        before = None if whole else self._by_place
        if before is not None and len(before) == len(new):
            new = new + pad(before, (0, new.shape[1] - before.shape[1]))
        elif not whole:
            return  # `at` says what is missing, should a row of it be edited
        self._by_place = new

    def _at_places(
        self,
        by_place: Float[Tensor, "batch place"],
        embedded: Float[Tensor, "batch token d_model"],
        image: Bool[Tensor, "batch token"],
        must: bool,
    ) -> Float[Tensor, "batch place"]:
        features, positions = self.encoder.features, self.model.call.positions
        source: Int[Tensor, " token"] | None = None
        if features is not None:
            source = copied_from(embedded[image], features.to(embedded.device))
        if source is None or not bool((source >= 0).any()):
            if must:
                raise ImageError(
                    "HeadModulation: what the tokens of these images get is not what the image "
                    "encoder gave in this block; give the model the pixels, in the block, and put "
                    "what edits its embeddings behind."
                )
            return by_place  # a token that was written, and happens to be the image's
        if self.rule.tokens == "all":
            strength = torch.full((len(source),), float(self.rule.local), device=embedded.device)
        else:
            of_feature = torch.cat([self._of_image(n) for n in range(self._n_images)])
            assert features is not None
            if len(of_feature) != len(features):
                raise ImageError(
                    f"HeadModulation: the image encoder looked at {len(of_feature)} patches, and "
                    f"{len(features)} features came of them: something prunes them (VTC). With it, "
                    "only tokens='all' has a meaning."
                )
            of_feature = of_feature.to(embedded.device)
            strength = torch.where(source >= 0, of_feature[source.clamp_min(0)], 0.0)
        rows, columns = image.nonzero(as_tuple=True)
        by_place[rows, positions[rows, columns]] = strength
        return by_place

    @property
    def _n_images(self) -> int:
        return len(self.encoder.of(self.early, self.row))

    def _of_image(self, n: int) -> Float[Tensor, " feature"]:
        """c of each feature of one image (or tile)."""
        rule, of = self.rule, self.encoder.of
        spatial = of(self.early, "received")[n] if rule.spatial_share else None
        local, summary = chosen_patches(
            of(self.early, self.row)[n],
            of(self.late, self.row)[n],
            rule.local_share,
            spatial,
            rule.spatial_share,
        )
        if rule.tokens == "random":
            local, summary = self._as_many(local, summary)
        return rule.local * local.float() + rule.summary * summary.float()

    def _as_many(
        self, local: Bool[Tensor, " patch"], summary: Bool[Tensor, " patch"]
    ) -> tuple[Bool[Tensor, " patch"], Bool[Tensor, " patch"]]:
        generator = torch.Generator().manual_seed(self.rule.seed)
        drawn = torch.randperm(len(local), generator=generator).to(local.device)
        n_local, n_summary = int(local.sum()), int(summary.sum())
        others = torch.zeros_like(local), torch.zeros_like(summary)
        others[0][drawn[:n_local]] = True
        others[1][drawn[n_local : n_local + n_summary]] = True
        return others
