"""Tiny models whose attention is written by hand, from q, k and v before they are rotated.

Their norms have gains, and their windows hide nothing. (GPT-2 rotates nothing at all.)
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from interp.model.hooked import HookedModel, load
from tests.model.families import build
from tests.tiny import tokenizer

FAMILIES = ["llama", "qwen3", "gpt_neox", "gemma2"]


@cache
def roped(family: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    """Windows wide enough to hide nothing; norms with random gains."""
    model = build(family)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 4096
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 4096 if layer.self_attn.sliding_window else None
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    return load(model.to(dtype), tokenizer=tokenizer())


def turned(x: Tensor, position: int, family: str) -> Tensor:
    """R(t) x by its definition, pair by pair: dimension i of the turned half with its partner."""
    if family == "gpt2":
        return x
    width = 2 if family == "gpt_neox" else x.shape[-1]  # a quarter of 8 dimensions
    x, half = x.clone(), width // 2
    for i in range(half):
        angle = torch.tensor(position * 10000.0 ** (-2 * i / width))
        a, b = x[..., i].clone(), x[..., i + half].clone()
        x[..., i] = a * angle.cos() - b * angle.sin()
        x[..., i + half] = b * angle.cos() + a * angle.sin()
    return x


def before_rotation(family: str) -> tuple[str, str]:
    """The hooks whose values are rotated next, as `[batch pos head d]` in all of these families."""
    normed = family == "qwen3"
    return ("hook_q_normed", "hook_k_normed") if normed else ("hook_q", "hook_k")


@torch.no_grad()
def logits_by_hand(
    model: HookedModel, family: str, prompts: Sequence[Sequence[int]], z_of: Callable
) -> list[Tensor]:
    """Each prompt's logits where every layer's z is `z_of(row, q, k, v, scale, cap)`.

    q, k, v are those of one prompt before rotation, `[token head d]`; prompts go in one by one.
    """
    return [_by_hand(model, family, row, ids, z_of) for row, ids in enumerate(prompts)]


def _by_hand(model, family, row, ids, z_of) -> Tensor:
    seen = {}

    def keep(name):
        def look(value, hook):
            value = value[0]
            seen[name] = value.transpose(0, 1) if "normed" in hook.name else value

        return look

    def replace_z(z, hook):
        return z_of(row, seen["q"], seen["k"], seen["v"], *seen["attention"])[None].to(z)

    def keep_attention(attention, hook):
        seen["attention"] = attention.scale, attention.softcap

    hooks = []
    for layer in model.attention_layers:
        at = f"blocks.{layer}.attn."
        q, k = before_rotation(family)
        names = {q: "q", k: "k", "hook_v": "v"}
        hooks += [(at + point, keep(name)) for point, name in names.items()]
        hooks += [(at + "hook_attention", keep_attention), (at + "hook_z", replace_z)]
    with model.hooks(fwd_hooks=hooks):
        return model(torch.tensor([ids]))[0]


def row_by_hand(q, keys, places, place, scale, cap, family) -> Tensor:
    """One query's weights on keys that stand at `places`, itself at `place`."""
    query = turned(q, place, family)
    logits = [scale * (query @ turned(k, at, family)) for k, at in zip(keys, places, strict=True)]
    if cap is not None:
        logits = [torch.tanh(s / cap) * cap for s in logits]
    return torch.stack(logits).softmax(0)
