"""Prune a part of a head's attention: which of the things that it reads matter?

A head's output is a sum over the tokens that it reads, z_i = sum_j a_ij v_j. Pruning a part S takes
its summands away,

    z'_i = z_i - sum over S of a_ij v_j          or, with the rest of the row taking up its mass
    z'_i = (z_i - sum over S of a_ij v_j) / (1 - m_i),        m_i = sum over S of a_ij

The parts are disjoint; with what special tokens read of each other they are all of z. The second
form says nothing where m_i is 1: rows with m_i > 1 - 1e-6 stay as they are.

Li et al. 2023 (arXiv 2303.13731) prune parts of attention matrices too; which parts is our choice.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analysis.vit.patterns import Grid, grid_of
from interp.analysis.vit.pruning import drop, jensen_shannon
from interp.analysis.vit_heads import VitHeadsError, targets_of
from interp.heads import HeadScores
from interp.model.attention import Attention
from interp.model.hooked import HookedModel
from interp.model.image_replay import ImageRecording, has_classifier, look, record_images
from interp.model.pictures import Pictures
from interp.model.towers import sees_only

ALL = 1 - 1e-6


def prune_parts(
    model: HookedModel,
    images,
    labels: Sequence[int | str] | None = None,
    *,
    hops: int = 1,
    renormalise: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """What pruning a part of each head's attention does: a row a head and part.

    Parts: `CLS reads patches`, `patches read CLS` (any token that is no patch), `itself` (a patch
    its own value), `near` (patches 1 to `hops` away) and `far`. What is pruned is the part of z
    that came from there, z_i - sum over the part of a_ij v_j; `renormalise` gives its mass to the
    rest of the row, divided by 1 - m_i (rows with m_i > 1 - 1e-6 stay as they are).

    Returns:
        `layer, head, part, mass` (mean weight that goes), `drop, low, high` (t interval over
        images) and `jsd`, means; n in `n`.

    Raises:
        VitHeadsError, ImageError, PatternError: As `vit_heads`; a model without a classifier.
    """
    if not sees_only(model) or not has_classifier(model):
        raise VitHeadsError(f"model: {model.name} has no classifier whose answer could change.")
    pictures = Pictures.of(model, images)
    targets, _ = targets_of(model, images, labels, len(pictures))
    found: dict[str, list[Tensor]] = defaultdict(list)
    names: list[str] = []
    start = 0
    for inputs in pictures.batches(batch_size, "pruning parts" if progress else None):
        recording = record_images(model, inputs["pixel_values"])
        n = len(recording.pixels)
        y = recording.seen.logits.argmax(-1) if targets is None else targets[start : start + n]
        start += n
        attentions, grid = _attentions(recording)
        parts = parts_of(grid, hops)
        names = list(parts)
        masks = torch.stack(list(parts.values())).to(y.device)
        for name, values in _measured(recording, attentions, masks, y, renormalise).items():
            found[name].append(values.cpu())
    samples = {name: torch.cat(values).double().numpy() for name, values in found.items()}
    return _table(samples, names)


def parts_of(grid: Grid, hops: int) -> dict[str, Bool[Tensor, "query key"]]:
    """The weights of a head's map that belong to each part."""
    n_tokens = grid.side**2 + grid.n_special
    if not 1 <= hops < grid.side - 1:
        raise VitHeadsError(f"hops={hops}: from 1 to {grid.side - 2} on {grid.side} x {grid.side}.")
    special = torch.arange(n_tokens) < grid.n_special
    apart = torch.full((n_tokens, n_tokens), -1)
    apart[grid.n_special :, grid.n_special :] = grid.hops
    return {
        "CLS reads patches": special[:, None] & ~special,
        "patches read CLS": ~special[:, None] & special,
        "itself": apart == 0,
        "near": (apart >= 1) & (apart <= hops),
        "far": apart > hops,
    }


def without_part(
    z: Float[Tensor, "image head query d_head"],
    pattern: Float[Tensor, "image head query key"],
    v: Float[Tensor, "image head key d_head"],
    part: Bool[Tensor, "query key"],
    renormalise: bool,
) -> tuple[Float[Tensor, "image head query d_head"], Float[Tensor, "image head query"]]:
    """z without what came from `part`, and the mass that went."""
    gone = pattern * part
    mass = gone.sum(-1)
    left = z - (gone @ v.float()).to(z)
    if renormalise:
        whole = (mass > ALL)[..., None]
        left = torch.where(whole, z, left / (1 - mass).clamp_min(1 - ALL)[..., None].to(z))
    return left, mass


def _attentions(recording: ImageRecording) -> tuple[list[Attention], Grid]:
    """Every layer's attention on the recorded images."""
    kept: list[Attention] = []

    def keep(attention: Attention, hook) -> None:
        kept.append(attention)

    hooks = [(f"blocks.{n}.attn.hook_attention", keep) for n in range(recording.n_layers)]
    with recording.model.hooks(fwd_hooks=hooks):
        look(recording.model, recording.pixels)
    return kept, grid_of(recording.model, kept[0])


@torch.no_grad()
def _measured(
    recording: ImageRecording,
    attentions: list[Attention],
    masks: Bool[Tensor, "part query key"],
    y: Int[Tensor, " image"],
    renormalise: bool,
) -> dict[str, Float[Tensor, "image layer head part"]]:
    n_images, n_parts = len(y), len(masks)
    images = torch.arange(n_images, device=y.device)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for layer, attention in enumerate(attentions):
        whole = recording.z[layer]
        pattern, v = attention.pattern(), attention.per_query_head(attention.v)
        n_heads = pattern.shape[1]
        cut, gone = zip(
            *(without_part(whole.transpose(1, 2), pattern, v, m, renormalise) for m in masks),
            strict=True,
        )
        # [image, head, part, query, head again, d_head]: one head changes in each case
        cases = whole[:, None, None].repeat(1, n_heads, n_parts, 1, 1, 1)
        changed = torch.stack(cut, dim=2)
        for head in range(n_heads):
            cases[:, head, :, :, head] = changed[:, head]
        rows = images.repeat_interleave(n_heads * n_parts)
        logits = recording.replay(layer, rows, cases.flatten(0, 2)).logits.float()
        logits = logits.unflatten(0, (n_images, n_heads, n_parts))
        before = recording.seen.logits.float()[:, None, None].expand_as(logits)
        found["drop"].append(drop(before, logits, y[:, None, None].expand(logits.shape[:-1])))
        found["jsd"].append(jensen_shannon(before, logits))
        readers = masks.any(-1).sum(-1)
        found["mass"].append(torch.stack(gone, dim=2).sum(-1) / readers)
    return {name: torch.stack(values, dim=1) for name, values in found.items()}


def _table(
    samples: dict[str, Float[np.ndarray, "image layer head part"]], parts: Sequence[str]
) -> pd.DataFrame:
    n_images, n_layers, n_heads, n_parts = samples["drop"].shape
    where = pd.MultiIndex.from_product(
        [range(n_layers), range(n_heads), parts], names=["layer", "head", "part"]
    ).to_frame(index=False)
    # one "head" a head and part, for the intervals
    flat = samples["drop"].reshape(n_images, n_layers, n_heads * n_parts)
    drops = HeadScores.from_samples(flat).interval()
    return where.assign(
        mass=samples["mass"].mean(0).reshape(-1),
        drop=drops["score"].to_numpy(),
        low=drops["low"].to_numpy(),
        high=drops["high"].to_numpy(),
        jsd=samples["jsd"].mean(0).reshape(-1),
        n=n_images,
    )
