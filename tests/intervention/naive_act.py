"""ACT as its definition reads: eager attention, every n x n pattern, one entry at a time.

Plain transformers models of `tests.model.families` run it under the name `IMPLEMENTATION`, without
a cache: each pass is over all tokens so far, and told how many of them are the prompt.
"""

from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.model.families import build

IMPLEMENTATION = "naive_act"


@dataclass
class Naive:
    """Which heads of which layers, and the method's parameters.

    `lengths`: how many tokens each prompt has; rows of a pass belong to prompts in turn, several
    next to each other where a prompt stands several times (beams). `chunks`: where a prompt that is
    read in pieces is cut.
    """

    heads: dict[int, list[int]]
    lengths: list[int]
    factor: float = 0.4
    alpha: float = 5.0
    theta: float | None = None
    min_queries: int = 1
    spare: str = "first_over_threshold"
    decode: str = "frozen"
    chunks: tuple[int, ...] = ()
    sizes: list[int] = field(default_factory=list)  # of every S that a row was edited with

    def edited(self, pattern, visible, layer):
        """A copy of `pattern` [batch head query key]; `visible` [batch query key]."""
        pattern = pattern.clone()
        times = len(pattern) // len(self.lengths)
        for row in range(len(pattern)):
            for head in self.heads.get(layer, []):
                self.edit(pattern[row, head], visible[row], self.lengths[row // times])
        return pattern

    def edit(self, weights, visible, length):
        """One head on one prompt, in place."""
        before = weights.clone()
        real = [j for j in range(len(weights)) if visible[j, j]]
        for place, query in enumerate(real):
            if place < length:
                rows = next((end for end in self.chunks if place < end), length)
            elif self.decode == "running":
                rows = place + 1
            else:
                rows = length
            if place >= length and self.decode == "prefill":
                continue
            sinks = self.sinks(before, visible, real, real[:rows])
            self.sizes.append(len(sinks))
            mass = sum(float(before[query, j]) for j in sinks if visible[query, j])
            others = [j for j in real if visible[query, j] and j not in sinks]
            held = sum(float(before[query, j]) for j in others)
            if held < 1e-6:
                continue
            for j in real:
                if j in sinks:
                    weights[query, j] *= self.factor
                elif visible[query, j]:
                    weights[query, j] *= 1 + (1 - self.factor) * mass / held

    def sinks(self, weights, visible, real, rows):
        """S, from some of the rows."""
        threshold = self.alpha / len(rows) if self.theta is None else self.theta
        over = []
        for j in real:
            seen = [float(weights[i, j]) for i in rows if visible[i, j]]
            if len(seen) >= self.min_queries and sum(seen) / len(seen) > threshold:
                over.append(j)
        return [j for j in over if j != real[0]] if self.spare == "bos" else over[1:]


CURRENT: list[Naive] = []


def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """What transformers calls in each layer."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    n = logits.shape[-1]
    visible = torch.ones(len(logits), n, n, dtype=torch.bool).tril()
    if attention_mask is not None:
        logits = logits + attention_mask
        visible = attention_mask[:, 0].expand(len(logits), n, n) > -1e9
    else:
        logits = logits.masked_fill(~visible[:, None], float("-inf"))
    if kwargs.get("s_aux") is not None:
        virtual = kwargs["s_aux"].reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        pattern = torch.cat([logits, virtual], dim=-1).softmax(-1)[..., :-1]
    else:
        pattern = logits.softmax(-1)
    edited = CURRENT[0].edited(pattern, visible, module.layer_idx)
    return (edited @ value).transpose(1, 2).contiguous(), edited


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def naive_model(family, naive):
    """The weights of `tests.tiny.tiny(family)`, under `naive`."""
    CURRENT[:] = [naive]
    model = build(family)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


@torch.no_grad()
def naive_logits(family, naive, lists, **options):
    """The logits of each sequence's tokens, from one left-padded batch."""
    model = naive_model(family, naive)
    width = max(map(len, lists))
    ids = torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in lists])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in lists])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(ids, attention_mask=mask, position_ids=places, use_cache=False, **options).logits
    return [out[row, width - len(tokens) :] for row, tokens in enumerate(lists)]
