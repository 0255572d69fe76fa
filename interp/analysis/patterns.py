"""The attention pattern of one's own prompt, with token labels: the first thing people look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float

from interp.heads import Head, HeadError, heads_of
from interp.model.hooked import HookedModel
from interp.tasks.prompts import PromptError, as_prompts


@dataclass(frozen=True, eq=False)
class Patterns:
    """`patterns[i]` is [query key] of `heads[i]`; rows are queries."""

    patterns: Float[np.ndarray, "panel query key"]
    heads: list[Head]
    tokens: list[str]

    @property
    def table(self) -> pd.DataFrame:
        """One row a head, query and key: `layer, head, query, key, weight`."""
        panel, query, key = np.indices(self.patterns.shape).reshape(3, -1)
        layer, head = np.array([(h.layer, h.head) for h in self.heads]).T
        columns = {"layer": layer[panel], "head": head[panel], "query": query, "key": key}
        return pd.DataFrame({**columns, "weight": self.patterns.reshape(-1)})

    def plot(self, **options):
        """Heads side by side, tokens on both axes (see `interp.figures.attention_pattern`)."""
        from interp import figures

        titles = [str(head) for head in self.heads]
        return figures.attention_pattern(self.patterns, self.tokens, titles, **options)

    def __repr__(self) -> str:
        return f"Patterns({len(self.heads)} heads, {len(self.tokens)} tokens); .plot() draws them"


@torch.no_grad()
def attention(
    model: HookedModel,
    text: str | Sequence | Dataset,
    layers: Sequence[Integral] | Integral | None = None,
    heads: Sequence | Head | None = None,
) -> Patterns:
    """The pattern of chosen heads on `text`; only those are computed.

    Args:
        text: One prompt, in any form that the passes take.
        layers: Layers to look at; default 0, or those of `heads`.
        heads: Heads of each of `layers` as numbers, or heads as `Head`, "L3H5" or (3, 5).
            Default: all heads of the layers.

    Raises:
        HeadError: A layer or head that the model does not have.
        PromptError: More than one prompt.
    """
    prompts = as_prompts(model, text)
    if len(prompts) != 1:
        raise PromptError(f"text: {len(prompts)} prompts; the patterns of one are shown, give it.")
    prompt = prompts[0]
    chosen = _chosen(model, layers, heads)
    if not chosen:
        raise HeadError("heads: none; leave it out for all heads of the layers.")
    model.check_heads(chosen)
    wanted = {
        layer: [h.head for h in chosen if h.layer == layer]
        for layer in dict.fromkeys(h.layer for h in chosen)
    }
    found: dict[Head, np.ndarray] = {}

    def reader(layer: int):
        def look(attention, hook) -> None:
            patterns = attention.pattern(heads=wanted[layer])[0].cpu().numpy()
            found.update({Head(layer, h): p for h, p in zip(wanted[layer], patterns, strict=True)})

        return f"blocks.{layer}.attn.hook_attention", look

    with model.hooks(fwd_hooks=[reader(layer) for layer in wanted]):
        model.run(model.batch([prompt["input_ids"]]).input_ids)
    tokens = [model.tokenizer.decode([token]) for token in prompt["input_ids"]]
    return Patterns(np.stack([found[head] for head in chosen]), chosen, tokens)


def _chosen(model: HookedModel, layers, heads) -> list[Head]:
    """The heads that `layers` and `heads` name together."""
    if heads is not None and (
        isinstance(heads, Head) or not all(isinstance(head, Integral) for head in heads)
    ):
        if layers is not None:
            raise HeadError("layers: not together with heads that name their layer (L3H5).")
        return list(heads_of(heads))
    layers = [0] if layers is None else [layers] if isinstance(layers, Integral) else layers
    numbers = [int(layer) for layer in layers]
    model.check_layers(numbers)
    heads = range(model.cfg.n_heads) if heads is None else heads
    return [Head(layer, int(head)) for layer in numbers for head in heads]
