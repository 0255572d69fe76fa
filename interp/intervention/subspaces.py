"""What heads hold at lettered options: where these are, q, k and v there, their subspaces.

T is a prompt's last token and p_n a place for its option n: the last token of a named span (the
label's, or that of the option's text), or a number, counted in the prompt's own tokens. q is read
at T, k and v at the p_n, before rotation (and before the norm of q and k where a model has one), k
and v of the head's key-value head.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from interp.heads import Head
from interp.intervention.base import InterventionError
from interp.model.call import Call, Spans
from interp.model.hooked import HookedModel
from interp.tasks.prompts import spans_of

PARTS = ("q", "k", "v")
LABELS = ("label_1", "label_2", "label_3", "label_4")
ENDS = ("option_1", "option_2", "option_3", "option_4")

Basis = Float[Tensor, "head rank d_head"]


def option_columns(call: Call, at: Sequence[str | int]) -> Int[Tensor, "batch option"] | None:
    """Where the places `at` are among the tokens of this pass; None where it has none of them.

    Raises `InterventionError` where a prompt lacks one, or only some of them are in this pass.
    """
    places = torch.tensor(_places(call, at), device=call.real_keys.device)
    real, positions = call.real, call.positions
    found = (positions[:, None] == places[..., None]) & real[:, None]
    there = found.any(-1)
    if not there.any():
        return None
    if not there.all():
        raise InterventionError(
            f"at={tuple(at)}: some prompts of this pass have only part of them (places "
            f"{places[~there.all(1)][0].tolist()}); give prompts whole, with all of their options."
        )
    return found.int().argmax(-1)


def _places(call: Call, at: Sequence[str | int]) -> list[list[int]]:
    """Each row's places, counted in the prompt's own tokens."""
    names = [place for place in at if isinstance(place, str)]
    if names and call.spans is None:
        raise InterventionError(
            f"at: nobody told where {names[0]!r} is; use interp.evaluate on prompts with spans, or "
            "run within `with model.spans(...)`, or give places as numbers."
        )
    rows = call.spans if names else [{}] * len(call.real_keys)
    return [[_place(row, place) for place in at] for row in rows or ()]


def _place(spans: Spans, place: str | int) -> int:
    if isinstance(place, int):
        return place
    if place not in spans:
        raise InterventionError(f"at: a prompt has no span {place!r}; it has {', '.join(spans)}.")
    return spans[place][1] - 1


def heads_per_kv_head(model: HookedModel) -> int:
    """How many query heads share keys and values."""
    return model.cfg.n_heads // (getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)


@torch.no_grad()
def collect(
    model: HookedModel,
    prompts: Dataset,
    heads: tuple[Head, ...],
    at: tuple[str | int, ...],
    parts: str,
    batch_size: int,
) -> dict[str, Float[Tensor, "head prompt option d_head"] | Float[Tensor, "head prompt d_head"]]:
    """q at the last token, k and v at the places, in the order of the prompts, float64."""
    group, found = heads_per_kv_head(model), defaultdict(lambda: [[] for _ in heads])
    order: list[int] = []

    def keep(x: Tensor, hook, layer: int, part: str) -> None:
        columns = None if part == "q" else option_columns(model.call, at)
        rows = torch.arange(len(x), device=x.device)[:, None]
        for row, head in enumerate(heads):
            if head.layer == layer:
                own = x[:, -1, head.head] if part == "q" else x[rows, columns, head.head // group]
                found[part][row].append(own.double().cpu())

    layers = sorted({head.layer for head in heads})
    hooks = [
        (f"blocks.{layer}.attn.hook_{part}", partial(keep, layer=layer, part=part))
        for layer in layers
        for part in parts
    ]
    with model.hooks(fwd_hooks=hooks):
        for batch in model.batches(prompts["input_ids"], batch_size, desc="subspaces"):
            index = batch.index.tolist()
            with model.spans(spans_of(prompts.select(index))):
                model.run(batch.input_ids, batch.attention_mask)
            order += index
    back = torch.tensor(order).argsort()
    return {part: torch.stack([torch.cat(x)[back] for x in rows]) for part, rows in found.items()}


def right_options(prompts: Dataset) -> Int[Tensor, " prompt"]:
    """Which option is right, from `choices` and `answer`."""
    if "choices" not in prompts.column_names:
        raise InterventionError("class_means=True: the prompts have no choices to tell apart.")
    pairs = zip(prompts["choices"], prompts["answer"], strict=True)
    return torch.tensor([choices.index(answer) for choices, answer in pairs])


def class_means_of(
    x: Tensor, right: Int[Tensor, " prompt"], n_options: int, permute: int | None
) -> Float[Tensor, "head option d_head"]:
    """Mean over prompts of each option's k or v; of q, over the prompts where it is right."""
    generator = None if permute is None else torch.Generator().manual_seed(permute)
    if x.dim() == 4:  # k, v: [head prompt option d_head]
        if generator is not None:
            shuffled = torch.rand(x.shape[1:3], generator=generator).argsort(-1)
            x = x.gather(2, shuffled[None, :, :, None].expand_as(x))
        return x.mean(1)
    if generator is not None:
        right = right[torch.randperm(len(right), generator=generator)]
    missing = sorted(set(range(n_options)) - set(right.tolist()))
    if missing:
        raise InterventionError(f"class_means=True: option {missing[0] + 1} is never right.")
    means = [x[:, right == option].mean(1) for option in range(n_options)]
    means = torch.stack(means, dim=1)
    return means - means.mean(1, keepdim=True)


def principal(x: Float[Tensor, "head sample d_head"], n_means: int, rank: int, part: str) -> Basis:
    """The first `rank` right singular vectors of each head's samples, `n_means` means taken off.

    Raises `InterventionError` for a rank that the samples do not have.
    """
    n_samples, width = x.shape[1:]
    most = min(width, n_samples - n_means)
    if not 0 <= rank <= most:
        raise InterventionError(
            f"rank={rank}: from 0 to {most} for {part}, with heads of width {width} and "
            f"{n_samples - n_means} samples beside the means; give a lower rank, or more prompts "
            "(and class_means=False)."
        )
    return torch.linalg.svd(x, full_matrices=False).Vh.float().contiguous()[:, :rank]
