"""Copying: does a head that looks at a token raise that token's logit, or lower it?

Let v be the head's value at the token's place, o = v W_O what the head writes when it looks there
alone, and N the final norm. With L(o) = W_U N(o) and rank 0 the largest logit,

    score = [rank of the token in L(o) < top]  -  [rank of the token in L(-o) < top]

which is 1 where the head copies, -1 where it does the opposite, 0 else. Values are those of the
prompts at hand, and o is what the block itself makes of z (a norm behind attention included,
biases left out).

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), whose copying score
asks for the five largest logits; there v is that of a name alone, after the first MLP.
"""

from contextlib import suppress
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analysis.patching.path_sweep import AllRead
from interp.model.hooked import HookedModel
from interp.model.replay import Recording, record

# Logits held at a time.
MOST_LOGITS = 1 << 25


@torch.no_grad()
def copying(
    model: HookedModel,
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Int[Tensor, "batch token"],
    keys: Bool[Tensor, "batch token"],
    targets: Int[Tensor, " batch"],
    top: int = 5,
) -> Float[Tensor, "batch layer head"]:
    """The score of every head, looking at `keys` (their mean value), for the tokens `targets`.

    Layers are `model.attention_layers`. NaN for prompts without keys.

    Raises `ReplayError` for a model that cannot be replayed.
    """
    layers = model.attention_layers
    if not bool(keys.any()):
        return torch.full((len(keys), len(layers), model.cfg.n_heads), torch.nan).to(keys.device)
    values: dict[int, Tensor] = {}

    def keep(value: Tensor, hook, layer: int) -> None:
        values.setdefault(layer, value)  # record runs the model more than once

    hooks = [(f"blocks.{layer}.attn.hook_v", partial(keep, layer=layer)) for layer in layers]
    with model.hooks(fwd_hooks=hooks):
        recording = record(model, input_ids, attention_mask)
    found = []
    for layer in layers:
        mean = _mean_at(values[layer], keys.to(values[layer].device))
        written = _written(recording, layer, mean)
        raised, lowered = (_in_top(recording, sign * written, targets, top) for sign in (1, -1))
        found.append(raised.float() - lowered.float())
    scores = torch.stack(found, dim=1)
    return scores.masked_fill(~keys.any(1)[:, None, None], torch.nan)


def _mean_at(
    v: Float[Tensor, "batch token kv_head d_head"], keys: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch kv_head d_head"]:
    weights = keys / keys.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("bt,btkd->bkd", weights.to(v.dtype), v)


def _written(
    recording: Recording, layer: int, v: Float[Tensor, "batch kv_head d_head"]
) -> Float[Tensor, "head batch d_model"]:
    """What each head by itself would add to the stream with z = v, beside what no head adds."""
    model, n_heads = recording.model, recording.model.cfg.n_heads
    each = v.repeat_interleave(n_heads // v.shape[1], dim=1)
    alone = torch.zeros(n_heads + 1, *each.shape, dtype=v.dtype, device=v.device)
    own = torch.arange(n_heads, device=v.device)
    alone[own, :, own] = each.transpose(0, 1)  # the last of the n_heads + 1 stays silent
    written: list[Tensor] = []

    def put(z: Tensor, hook) -> Tensor:
        return alone.flatten(0, 1)[:, None].expand_as(z)

    def keep(attn_out: Tensor, hook) -> None:
        written.append(attn_out[:, -1].unflatten(0, (n_heads + 1, -1)))
        raise AllRead

    hooks = [(f"blocks.{layer}.attn.hook_z", put), (f"blocks.{layer}.hook_attn_out", keep)]
    rows = torch.arange(len(v)).repeat(n_heads + 1)
    with suppress(AllRead), model.hooks(fwd_hooks=hooks):
        recording.replay(layer, rows, _last(recording))
    return written[0][:-1] - written[0][-1]


def _in_top(
    recording: Recording,
    stream: Float[Tensor, "head batch d_model"],
    targets: Int[Tensor, " batch"],
    top: int,
) -> Bool[Tensor, "batch head"]:
    """Is the target among the `top` tokens that this last residual stream would favour?"""
    model, n_layers = recording.model, recording.n_layers
    size = max(1, MOST_LOGITS // (model.cfg.d_vocab * stream.shape[1]))
    found = []
    for part in stream.split(size):

        def put(value: Tensor, hook, part=part) -> Tensor:
            return part.flatten(0, 1)[:, None].expand_as(value)

        rows = torch.arange(stream.shape[1]).repeat(len(part))
        with model.hooks(fwd_hooks=[(f"blocks.{n_layers - 1}.hook_resid_post", put)]):
            logits = recording.replay(n_layers - 1, rows, _last(recording))[:, -1].float()
        own = logits.gather(1, targets.repeat(len(part))[:, None])
        found.append(((logits > own).sum(1) < top).unflatten(0, (len(part), -1)))
    return torch.cat(found).T


def _last(recording: Recording) -> int:
    return recording.input_ids.shape[1] - 1 if recording.can_start_late else 0
