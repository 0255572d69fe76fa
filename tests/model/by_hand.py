"""Attention written from its definition, one weight at a time: what the streamed one must equal."""

import math
from types import SimpleNamespace

import torch

from interp.model.attention import Attention

BATCH, HEADS, KV_HEADS, TOKENS, WIDTH = 2, 4, 2, 7, 8


def random_attention(
    n_queries=TOKENS, padding=0, mask=None, causal=True, dtype=torch.float32, seed=0, **kwargs
) -> Attention:
    """Random q, k, v for 7 keys; the second prompt's first `padding` keys are no tokens.

    `mask` is None or a function (query index, key index) -> may it be seen; padding is then hidden.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    real_keys = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    real_keys[1, :padding] = False
    key_positions = (real_keys.cumsum(1) - 1).clamp_min(0)
    queries = range(TOKENS - n_queries, TOKENS)
    if mask is not None:
        seen = torch.tensor([[bool(mask(i, j)) for j in range(TOKENS)] for i in queries])
        mask = seen[None, None] & real_keys[:, None, None, :]
    return Attention(
        q=randn(BATCH, HEADS, n_queries, WIDTH) * 2,
        k=randn(BATCH, KV_HEADS, TOKENS, WIDTH),
        v=randn(BATCH, KV_HEADS, TOKENS, WIDTH),
        scale=WIDTH**-0.5,
        positions=key_positions[:, -n_queries:],
        key_positions=key_positions,
        real_queries=real_keys[:, -n_queries:],
        real_keys=real_keys,
        mask=mask,
        causal=causal,
        **kwargs,
    )


def causally(i, j):
    return j <= i


def in_window(i, j):
    return i - 3 < j <= i


def everywhere(i, j):
    return True


def slopes(padding=0):
    """A float mask as ALiBi's: hides later keys and padding, and tilts what is seen."""
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    mask = (-0.3 * distance.float()).masked_fill(distance < 0, torch.finfo(torch.float32).min)
    mask = mask.expand(BATCH, 1, -1, -1).clone()
    mask[1, :, :, :padding] = torch.finfo(torch.float32).min
    return mask


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0]).reshape(1, HEADS, 1)


def with_slopes(**kwargs):
    made = random_attention(padding=2, mask=causally, **kwargs)
    object.__setattr__(made, "mask", slopes(2))
    return made


CASES = {
    "causal": lambda **kw: random_attention(**kw),
    "left padding": lambda **kw: random_attention(padding=2, mask=causally, **kw),
    "float mask": with_slopes,
    "sliding window": lambda **kw: random_attention(padding=1, mask=in_window, **kw),
    "both ways": lambda **kw: random_attention(causal=False, **kw),
    "both ways, padded": lambda **kw: random_attention(2 + 5, 2, everywhere, False, **kw),
    "soft-capped": lambda **kw: random_attention(softcap=0.8, **kw),
    "soft-capped, padded": lambda **kw: random_attention(
        padding=2, mask=causally, softcap=0.8, **kw
    ),
    "sink logits": lambda **kw: random_attention(sink_logits=SINKS, **kw),
    "sink logits, padded": lambda **kw: random_attention(
        padding=2, mask=in_window, sink_logits=SINKS, **kw
    ),
    "decoding": lambda **kw: random_attention(1, causal=False, **kw),
    "decoding, padded": lambda **kw: random_attention(1, 2, everywhere, False, **kw),
    "chunk": lambda **kw: random_attention(3, 2, causally, **kw),
}


def may_see(a: Attention, b: int, i: int, j: int) -> bool:
    if a.mask is None:
        return j <= i or not a.causal
    seen = a.mask[b, 0, i, j].item()
    return seen if a.mask.dtype == torch.bool else seen > -1e30


def by_hand(a: Attention, edit_logit=None, edit_row=None) -> SimpleNamespace:
    """Pattern, z and lse of an attention, weight by weight.

    `edit_logit(logit, b, h, i, j)` changes one logit, `edit_row(row, b, h, i)` the weights of one
    query on all keys. A query that sees nothing has no weights.
    """
    group = a.q.shape[1] // a.k.shape[1]
    batch, heads, queries = a.q.shape[:3]
    keys = a.k.shape[2]
    pattern, lse = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                logits = {}
                for j in range(keys):
                    if not may_see(a, b, i, j):
                        continue
                    s = (a.q[b, h, i].float() * a.k[b, h // group, j].float()).sum() * a.scale
                    if a.softcap is not None:
                        s = torch.tanh(s / a.softcap) * a.softcap
                    if a.mask is not None and a.mask.dtype != torch.bool:
                        s = s + a.mask[b, 0, i, j]
                    logits[j] = s if edit_logit is None else edit_logit(s, b, h, i, j)
                logits = {j: s for j, s in logits.items() if s > -math.inf}
                terms = {j: s.exp() for j, s in logits.items()}
                total = sum(terms.values(), torch.tensor(0.0))
                if a.sink_logits is not None:
                    total = total + a.sink_logits[0, h, 0].exp()
                row = [terms[j] / total if j in terms else torch.tensor(0.0) for j in range(keys)]
                row = torch.stack(row)
                pattern.append(row if edit_row is None else edit_row(row, b, h, i))
                lse.append(total.log())
    pattern = torch.stack(pattern).view(batch, heads, queries, keys)
    v = a.v.float().repeat_interleave(group, dim=1)
    return SimpleNamespace(
        pattern=pattern, z=pattern @ v, lse=torch.stack(lse).view(batch, heads, queries)
    )
