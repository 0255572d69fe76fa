"""A hooked model to which nobody listens is as fast as the plain one: at most 1.05x its time.

The peer is Hugging Face's own forward with SDPA; beside it TransformerLens' eager bridge, which is
what one would hook otherwise.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.models import (
    about,
    eager_bridge,
    hooked,
    last_logits,
    plain,
    random_tokens,
    smollm2,
)
from benchmarks.timing import ratio


def run(quick: bool) -> Iterator[dict]:
    """The whole model at 1K and 4K tokens; quick: 2 layers at 256."""
    n_layers = 2 if quick else 30
    lengths = {256: 3} if quick else {1024: 11, 4096: 5}
    for n_tokens, repeats in lengths.items():
        for record in measure(smollm2(n_layers), n_tokens, repeats, eager=n_tokens <= 1024):
            yield record | {"model": about(n_layers)}


def measure(folder: Path, n_tokens: int, repeats: int, eager: bool = True) -> Iterator[dict]:
    """Ours / plain SDPA, then (`eager`) the eager bridge / plain SDPA."""
    peer = plain(folder)
    tokens = random_tokens(peer, n_tokens)
    cases = {"hooked, no hooks / plain SDPA": (hooked, repeats, "<= 1.05")}
    if eager:
        cases["eager bridge / plain SDPA"] = (eager_bridge, min(3, repeats), "")
    for case, (load, repeats, goal) in cases.items():
        yield ratio(
            partial(last_logits, load(folder), tokens),
            partial(last_logits, peer, tokens),
            repeats=repeats,
            atol=1e-3,
            benchmark="forward",
            case=f"{case}, {n_tokens} tokens",
            goal=goal,
        )
