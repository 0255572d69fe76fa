"""Heads of an image encoder: how much does each matter, how far does it look, what does it draw?

*Pruning* a head sets its output z to 0 at all tokens (or to its mean over tokens and images: what
is left out is then no longer out of distribution, and the ranking is another one). With p the
probabilities of the labels, p- those without the head, y the right label and e what the classifier
reads (the CLS token after the last norm), per image:

- `drop`: p_y - p-_y; above 0 where the head helps. `drop_size` is the mean of |drop|, `changed` the
  share of images with |drop| > 0.01: signed drops cancel in a mean.
- `margin`: how much smaller the logit of y minus the largest other one becomes: confident images
  have hardly any `drop`.
- `jsd`: Jensen-Shannon divergence of p and p-, in bits, 0 to 1: any change, right or wrong.
- `shift`: 1 - cos(e, e-); needs no labels and no classifier.
- `taylor`: |sum_i z_i . d loss / d z_i|, what pruning does to the loss -log p_y to first order; one
  backward pass for all heads.
- `alone`: p_y with this head alone in its layer, minus p_y with none: one head's pruning
  shows little where another makes up for it. `layer_drop` is the drop without all of the layer.

Where the head looks is told by the columns of `interp.analysis.vit.patterns`. In the last layer
only the CLS token reaches the classifier: what a head does at patches there has no effect.

In a vision-language model the encoder has no labels: `shift` then compares what the language model
gets of the image, mean over its tokens (a layer that it does not read from has a shift of 0).

Source: Li et al. 2023, "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt"
(arXiv 2303.13731), which ranks heads by several metrics of pruning, prunes parts of a head's
attention too (`interp.analysis.vit.parts`), and reads k-hop profiles and patterns beside them
(`interp.analysis.vit.atlas`). It has no public code and its abstract no formulas; those above are
ours, except for `taylor` (Michel, Levy & Neubig 2019, "Are Sixteen Heads Really Better than One?",
arXiv 1905.10650).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.analysis.vit.patterns import look_at_patterns
from interp.analysis.vit.pruning import MEASURES, mean_z, measured, shifts
from interp.errors import UserError
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.model.image_replay import has_classifier, record_images
from interp.model.pictures import Pictures
from interp.model.towers import sees_only, towers

Value = Literal["zero", "mean"]
CHANGED = 0.01


class VitHeadsError(UserError):
    """Images or labels that no head of an image encoder can be scored by."""


@dataclass(frozen=True, eq=False)
class Pruning:
    """What pruning each head does to each image: `samples[measure][image, layer, head]`."""

    samples: dict[str, Float[np.ndarray, "image layer head"]]
    layer_drop: Float[np.ndarray, "image layer"] | None
    layers: tuple[int, ...]
    metadata: dict[str, Any]

    @property
    def measures(self) -> list[str]:
        return list(self.samples)

    def scores(self, measure: str) -> HeadScores:
        """Heads by one measure, the means of the others beside it; samples kept.

        Raises `VitHeadsError` for a measure that was not taken.
        """
        if measure not in self.samples:
            why = "" if measure not in MEASURES else "; the others need labels"
            raise VitHeadsError(f"score={measure!r}: one of {', '.join(self.samples)}{why}.")
        scores = HeadScores.from_samples(
            self.samples[measure],
            tower="vision",
            layers=self.layers,
            keep_samples=True,
            **self.metadata,
            score=measure,
        )
        means = {name: values.mean(0).reshape(-1) for name, values in self.samples.items()}
        if (drop := self.samples.get("drop")) is not None and self.layer_drop is not None:
            n_heads = drop.shape[2]
            means["drop_size"] = np.abs(drop).mean(0).reshape(-1)
            means["changed"] = (np.abs(drop) > CHANGED).mean(0).reshape(-1)
            means["layer_drop"] = np.repeat(self.layer_drop.mean(0), n_heads)
        table = scores.table.assign(**means)
        return HeadScores(table, scores.metadata, samples=scores.samples)


def vit_heads(
    model: HookedModel,
    images,
    labels: Sequence[int | str] | None = None,
    *,
    score: str | None = None,
    value: Value = "zero",
    patterns: bool = True,
    batch_size: int = 16,
    progress: bool = True,
) -> HeadScores:
    """Score every head of the image encoder by what pruning it does to `images`.

    Args:
        images: A data set with a column `image`, a list of images, or (for an encoder alone) a
            tensor of pixels.
        labels: Numbers or names of the model's labels. Default: the data set's column `target` or
            `label`; without one what the model itself says of each image.
        score: The measure that becomes `score`; default `drop` where there is a classifier, else
            `shift`. All are in the table.
        value: What a pruned head gives: nothing, or its mean over tokens and images.
        patterns: Also say where heads look (columns `kind`, `mean_hop`, `near`, `hop_0` ...,
            `on_special`, `key_share`, `spread`).

    Returns:
        `HeadScores` of the tower "vision", samples kept, one an image.

    Raises:
        VitHeadsError: Labels that are too few or no labels of the model, an unknown `score`.
        ImageError: No images, one that can't be read, a model that sees none.
        PatternError: Patches on no square grid, with `patterns`.
    """
    found = prune_heads(
        model, images, labels, value=value, batch_size=batch_size, progress=progress
    )
    scores = found.scores(score or ("drop" if "drop" in found.samples else "shift"))
    if not patterns:
        return scores
    looked = look_at_patterns(model, images, batch_size=batch_size, progress=progress)
    table = scores.table.merge(
        looked.columns.assign(kind=looked.kinds), on=["layer", "head"], validate="1:1"
    )
    return HeadScores(table, scores.metadata, samples=scores.samples)


def prune_heads(
    model: HookedModel,
    images,
    labels: Sequence[int | str] | None = None,
    *,
    value: Value = "zero",
    batch_size: int = 16,
    progress: bool = True,
) -> Pruning:
    """All measures of pruning each head on each image; arguments as in `vit_heads`."""
    if value not in get_args(Value):
        raise VitHeadsError(f"value={value!r}: one of {', '.join(get_args(Value))}.")
    pictures = Pictures.of(model, images)
    tower = towers(model)["vision"]
    metadata = {"analysis": "vit_heads", "value": value, "images": pictures.describe()}
    if not sees_only(model):
        if labels is not None or value != "zero":
            raise VitHeadsError(
                f"labels, value: {model.name} is a vision-language model, whose encoder has no "
                "labels and is only pruned to zero."
            )
        found = shifts(model, pictures, batch_size, progress)
        return Pruning({"shift": found}, None, tower.layers, metadata | model.provenance())
    targets, how = targets_of(model, images, labels, len(pictures))
    means = mean_z(model, pictures, batch_size, progress) if value == "mean" else None
    parts: dict[str, list[Tensor]] = defaultdict(list)
    start = 0
    for inputs in pictures.batches(batch_size, "pruning heads" if progress else None):
        recording = record_images(model, inputs["pixel_values"])
        n = len(recording.pixels)
        y = recording.seen.logits.argmax(-1) if targets is None else targets[start : start + n]
        start += n
        for name, values in measured(recording, y.to(recording.pixels.device), means).items():
            parts[name].append(values.cpu())
    samples = {name: torch.cat(values).double().numpy() for name, values in parts.items()}
    layer_drop = samples.pop("layer_drop", None)
    metadata |= {"labels": how, **model.provenance()}
    return Pruning(samples, layer_drop, tower.layers, metadata)


def targets_of(
    model: HookedModel, images, labels: Sequence[int | str] | None, n: int
) -> tuple[Int[Tensor, " image"] | None, str | None]:
    """The labels as numbers, and where they are from; None for the model's own answers."""
    columns = getattr(images, "column_names", None) or []
    if not has_classifier(model):
        if labels is not None:
            raise VitHeadsError(f"labels: {model.name} has no classifier; leave them out.")
        return None, None
    column = next((name for name in ("target", "label") if name in columns), None)
    if labels is None and column is None:
        return None, "predicted"
    found = list(images[column]) if labels is None else list(labels)
    if len(found) != n:
        raise VitHeadsError(f"labels: {len(found)} for {n} images; one for each.")
    names = {str(name): int(k) for k, name in model.original_model.config.id2label.items()}
    numbers = [int(x) if isinstance(x, Integral) else names.get(str(x), -1) for x in found]
    for row, number in enumerate(numbers):
        if not 0 <= number < len(names):
            raise VitHeadsError(
                f"labels: {found[row]!r} (image {row}) is none of {model.name}'s {len(names)} "
                f"labels; give numbers from 0 to {len(names) - 1}, or names such as "
                f"{', '.join(map(repr, list(names)[:3]))}."
            )
    return torch.tensor(numbers), "given" if labels is not None else f"column {column}"
