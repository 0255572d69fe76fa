"""ACT without n x n matrices: generation takes at most 1.15x the plain model's time, and a fifth or
less of what an eager implementation takes at 2K tokens.

The peer forms every pattern and edits it, as the authors' code does; that code cannot use a KV
cache, so each token that it writes is a pass over all of them. Beside it stands one pass, where a
cache plays no part. Edited is a tenth of the heads.

So that ACT writes what the plain model writes when the two are timed, a sink keeps all but a
millionth of its weight there, which is as much work as any other share; that ACT moves logits at
its own share, and that the peer says the same, is checked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from benchmarks.models import about, hooked, last_logits, plain, random_tokens, smollm2, written
from benchmarks.timing import ratio
from interp.heads import Head, heads_of
from interp.intervention.act import ACT, middle_heads
from interp.model.hooked import HookedModel

EAGER = "benchmarks_eager_act"
SAME = 1 - 1e-6  # what sinks keep where both sides shall write the same


def run(quick: bool) -> Iterator[dict]:
    """All 30 layers: 256 + 64 and 2048 + 8 tokens; quick: 2 layers, 32 + 8 and 64 + 4."""
    n_layers, repeats = (2, 3) if quick else (30, 9)
    short, long = ((32, 8), (64, 4)) if quick else ((256, 64), (2048, 8))
    for record in measure(smollm2(n_layers), short, long, repeats):
        yield record | {"model": about(n_layers)}


def measure(
    folder: Path, short: tuple[int, int], long: tuple[int, int], repeats: int
) -> Iterator[dict]:
    """ACT / plain SDPA, then eager / ACT; `short` and `long` are tokens read and written."""
    ours, peer = hooked(folder), plain(folder)
    act = ACT(a_tenth(ours))
    check(ours, peer, act, random_tokens(peer, short[0]))
    yield from beside_plain(ours, peer, act, {short: repeats, long: repeats})
    yield from beside_eager(ours, peer, act, long, max(2, repeats // 3))


def a_tenth(model: HookedModel) -> list[Head]:
    """Heads drawn from ACT's candidates."""
    heads = middle_heads(model)
    order = torch.randperm(len(heads), generator=torch.Generator().manual_seed(0))
    return [heads[i] for i in order[: max(1, round(len(heads) / 10))]]


def beside_plain(
    ours: HookedModel, peer: nn.Module, act: ACT, sizes: dict[tuple[int, int], int]
) -> Iterator[dict]:
    """Generation with the cache, against the model that nobody touches."""
    for (n_tokens, n_new), repeats in sizes.items():
        tokens = random_tokens(peer, n_tokens)
        for decode, goal in (("frozen", "<= 1.15"), ("running", "")):
            edit = replace(act, factor=SAME, decode=decode)
            yield ratio(
                partial(written, ours, tokens, n_new, edit),
                partial(written, peer, tokens, n_new),
                repeats=repeats,
                benchmark="act",
                case=f"generation, {decode} / plain SDPA, {n_tokens} + {n_new} tokens",
                goal=goal,
            )


def beside_eager(
    ours: HookedModel, peer: nn.Module, act: ACT, size: tuple[int, int], repeats: int
) -> Iterator[dict]:
    """The eager implementation, by generation and by one pass."""
    n_tokens, n_new = size
    tokens = random_tokens(peer, n_tokens)
    same = replace(act, factor=SAME)
    about_it = {"benchmark": "act", "repeats": repeats}
    with eagerly(peer, same, n_tokens):
        yield ratio(
            partial(written, peer, tokens, n_new, cache=False),
            partial(written, ours, tokens, n_new, same),
            case=f"generation, eager / ACT, {n_tokens} + {n_new} tokens",
            goal=">= 5",
            **about_it,
        )
    with eagerly(peer, act, n_tokens):
        yield ratio(
            partial(last_logits, peer, tokens),
            partial(edited_logits, ours, tokens, act),
            atol=1e-3,
            case=f"one pass, eager / ACT, {n_tokens} tokens",
            goal="",
            **about_it,
        )


def edited_logits(
    model: HookedModel, tokens: Int[Tensor, "1 token"], act: ACT
) -> Float[Tensor, "1 vocab"]:
    with model.intervene(act):
        return last_logits(model, tokens)


def check(ours: HookedModel, peer: nn.Module, act: ACT, tokens: Int[Tensor, "1 token"]) -> None:
    """Raises `AssertionError` where ACT moves nothing, or the peer does something else."""
    before, after = last_logits(ours, tokens), edited_logits(ours, tokens, act)
    moved = float((after - before).abs().max())
    assert moved > 1e-2, f"ACT moved no logit by more than {moved:.1e}"
    with eagerly(peer, act, tokens.shape[1]):
        torch.testing.assert_close(last_logits(peer, tokens), after, atol=1e-3, rtol=0)


# The peer: attention as one would write it down, for one prompt without padding.


@dataclass(frozen=True)
class Eager:
    """What the attention of a plain model does while `eagerly` is on."""

    heads: dict[int, list[int]]
    n_prompt: int
    factor: float
    alpha: float

    def edited(self, pattern: Float[Tensor, "1 heads n n"]) -> Float[Tensor, "1 heads n n"]:
        """Sinks found in the rows of the prompt, damped in all rows."""
        n = pattern.shape[-1]
        queries = (self.n_prompt - torch.arange(n, device=pattern.device)).clamp_min(1)
        received = pattern[:, :, : self.n_prompt].sum(2) / queries
        over = received > self.alpha / self.n_prompt
        sinks = (over & (over.cumsum(-1) > 1))[:, :, None]
        mass = (pattern * sinks).sum(-1, keepdim=True)
        gain = 1 + (1 - self.factor) * mass / (1 - mass)
        return torch.where(sinks, self.factor * pattern, gain * pattern)


CURRENT: list[Eager] = []


def eager_attention(
    module: nn.Module, query, key, value, attention_mask, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """What transformers calls in each layer."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(2, 3) * scaling + attention_mask[..., : key.shape[2]]
    pattern = logits.softmax(-1)
    if heads := CURRENT[-1].heads.get(module.layer_idx):  # pyright: ignore[reportArgumentType]
        pattern[:, heads] = CURRENT[-1].edited(pattern[:, heads])
    return (pattern @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(EAGER, eager_attention)
AttentionMaskInterface.register(EAGER, eager_mask)


@contextmanager
def eagerly(model: nn.Module, act: ACT, n_prompt: int) -> Iterator[None]:
    """A plain model with ACT in it: `decode="frozen"`, without a cache."""
    layers: dict[int, list[int]] = {}
    for head in heads_of(act.heads):
        layers.setdefault(head.layer, []).append(head.head)
    before = model.config._attn_implementation
    CURRENT.append(Eager(layers, n_prompt, act.factor, act.alpha))
    model.set_attn_implementation(EAGER)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        CURRENT.pop()
