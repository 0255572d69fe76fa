"""To look at one layer's pattern costs that layer, not all of them.

The peer is TransformerLens' eager bridge with the same hook, which forms every layer's pattern.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.models import about, eager_bridge, hooked, last_logits, random_tokens, smollm2
from benchmarks.timing import ratio
from interp.model.attention import Attention


def run(quick: bool) -> Iterator[dict]:
    """1K and 2K tokens; quick: 256."""
    n_layers = 2 if quick else 6
    for n_tokens in [256] if quick else [1024, 2048]:
        for record in measure(smollm2(n_layers), n_tokens, layer=1, repeats=3 if quick else 7):
            yield record | {"model": about(n_layers)}


def measure(folder: Path, n_tokens: int, layer: int, repeats: int) -> Iterator[dict]:
    """The whole layer through either hook, then one head of it."""
    ours, peer = hooked(folder), eager_bridge(folder)
    tokens = random_tokens(peer, n_tokens)
    everything = partial(seen, name=f"blocks.{layer}.attn.hook_pattern", look=torch.clone)
    one_head = partial(everything, look=lambda pattern: pattern[:, :1].clone())
    attention = partial(seen, ours, name=f"blocks.{layer}.attn.hook_attention")
    cases = {
        "hook_pattern": (partial(everything, ours), everything),
        "hook_attention": (partial(attention, look=Attention.pattern), everything),
        "hook_attention, one head": (
            partial(attention, look=partial(Attention.pattern, heads=[0])),
            one_head,
        ),
    }
    for case, (look_at_ours, look_at_peer) in cases.items():
        yield ratio(
            partial(look_at_peer, peer, tokens=tokens),
            partial(look_at_ours, tokens=tokens),
            repeats=repeats,
            benchmark="one_layer",
            case=f"eager bridge / {case}, {n_tokens} tokens",
            goal="> 1",
        )


def seen(
    model: nn.Module, tokens: Int[Tensor, "1 token"], name: str, look: Callable
) -> Float[Tensor, "1 heads query key"]:
    """What `look` makes of the value at the hook `name`, in one forward pass."""
    found = []

    def hook_fn(value, hook) -> None:
        found.append(look(value))

    with model.hooks(fwd_hooks=[(name, hook_fn)]):
        last_logits(model, tokens)
    return found[0]
