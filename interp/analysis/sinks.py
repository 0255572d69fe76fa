"""Attention sinks: keys that receive much attention from nearly all queries, whatever they hold.

With a_ij the weight from query i to key j and n_j the real queries that may see key j,

    a_j = (1 / n_j) * sum over those i of a_ij      (what key j *receives*, between 0 and 1)

- First token: a_0, the first real token of each prompt (a BOS where the tokenizer adds one).
- Sink rate of Gu et al. 2025 (arXiv 2410.10781): share of (prompt, head) with a_k > epsilon. The
  threshold is tested on each prompt, then averaged, as in their code.
- Later sinks, of the kind that ACT calibrates (Yu et al. 2024, arXiv 2406.15765): other tokens with
  a_j > theta; theta is alpha / T in the paper (T tokens), a constant in the code. The last columns
  see few queries (the very last one only itself), so a token needs `min_queries` of them.
- Uniform attention would give a_j = (H_T - H_j) / (T - j), H the harmonic numbers: the null that a
  head which looks at everything follows (causal attention without a window).
- Massive activations (Sun et al. 2024, arXiv 2402.17762): |x| > 100 and > 1000 times the median of
  |x| in the residual stream after that block, over that prompt's real tokens.
- Value norms: |v_j| over the median of |v| on the same prompt: a sink whose values are small is a
  place to park attention without saying anything.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from interp.analysis.shards import in_shards
from interp.errors import UserError
from interp.heads import HeadScores
from interp.model.attention import Attention
from interp.model.hooked import HookedModel
from interp.tasks.prompts import as_prompts, describe

N_MASSIVE = 3


class SinkError(UserError):
    """Sinks that can't be measured as asked, or activations that are no numbers."""


@dataclass(frozen=True)
class SinkRule:
    """When a key is a sink. Defaults: epsilon of Gu et al.; alpha of the ACT paper.

    `theta`: a constant threshold for later sinks (0.1 or 0.15 in ACT's code) instead of alpha / T.
    `min_queries`: how many queries must see a later sink; default 8, or 5 % of T if that is more.
    """

    epsilon: float = 0.3
    alpha: float = 5.0
    theta: float | None = None
    min_queries: int | None = None

    def __post_init__(self):
        if not 0 < self.epsilon < 1:
            raise SinkError(f"epsilon={self.epsilon}: a share of attention, between 0 and 1.")
        if self.theta is not None and not 0 < self.theta < 1:
            raise SinkError(f"theta={self.theta}: a share of attention, between 0 and 1.")
        if self.alpha <= 0:
            raise SinkError(f"alpha={self.alpha}: above 0 (5: five times uniform attention).")

    def threshold(self, n_tokens: int) -> float:
        """Above which a later token is a sink, in a prompt of `n_tokens`."""
        return self.alpha / n_tokens if self.theta is None else self.theta

    def least_queries(self, n_tokens: int) -> int:
        """How many queries must see a token before it can count as a sink."""
        return max(8, n_tokens // 20) if self.min_queries is None else self.min_queries


@dataclass(frozen=True, eq=False)
class Sinks:
    """What `attention_sinks` found. `received[p]` is [layer head token] of prompt p, float32."""

    heads: HeadScores
    tokens: pd.DataFrame
    massive: pd.DataFrame
    received: list[Float[np.ndarray, "layer head _token"]]  # prompts differ in length
    rule: SinkRule

    def per_head(self) -> pd.DataFrame:
        """`tokens` by head: columns `prompt, layer, head, position, token, received, queries`."""
        parts = []
        for prompt, values in enumerate(self.received):
            rows = self.tokens[self.tokens["prompt"] == prompt]
            layers, tokens = rows["layer"].unique(), rows.iloc[: values.shape[2]]
            layer, head, position = np.indices(values.shape).reshape(3, -1)
            columns = {"layer": layers[layer], "head": head, "position": position}
            columns["token"] = tokens["token"].to_numpy()[position]
            columns["received"] = values.reshape(-1)
            columns["queries"] = tokens["queries"].to_numpy()[position]
            parts.append(pd.DataFrame({"prompt": prompt, **columns}))
        return pd.concat(parts, ignore_index=True)

    def later(self, threshold: float | None = None) -> pd.DataFrame:
        """Tokens other than the first that are sinks on the mean over heads, strongest first.

        `threshold`: default the rule's, alpha / T or theta.
        """
        lengths = self.tokens.groupby("prompt")["position"].transform("max") + 1
        least = lengths.map(self.rule.least_queries)
        above = lengths.map(self.rule.threshold) if threshold is None else threshold
        t = self.tokens
        found = t[(t["position"] > 0) & (t["queries"] >= least) & (t["received"] > above)]
        return found.sort_values("received", ascending=False, ignore_index=True)

    def sink_rate(self, key: int = 0, epsilon: float | None = None) -> float:
        """Gu et al.'s rate of the key at position `key`: share of prompts and heads, 0 to 1."""
        epsilon = self.rule.epsilon if epsilon is None else epsilon
        short = [p for p, values in enumerate(self.received) if values.shape[2] <= key]
        if short:
            raise SinkError(f"key={key}: prompt {short[0]} has no such token.")
        return float(np.mean([(values[:, :, key] > epsilon).mean() for values in self.received]))

    def plot(self, prompt: int = 0, layers: list[int] | None = None, **options):
        """What each token of a prompt receives (mean over heads), a line a layer, peaks named."""
        from interp import figures

        table = self.tokens[self.tokens["prompt"] == prompt]
        if layers is None:  # the layers where later tokens receive most
            later = table[(table["position"] > 0) & (table["queries"] >= 8)]
            layers = sorted(later.groupby("layer")["received"].max().nlargest(4).index)
        table = table[table["layer"].isin(layers)]
        options = {"title": f"Attention received, prompt {prompt}", "log": True} | options
        return figures.profile(
            table["position"].to_numpy(),
            table["received"].to_numpy(),
            tokens=table["token"].tolist(),
            series=[f"layer {layer}" for layer in table["layer"]],
            x_title="position",
            y_title="attention received",
            **options,
        )

    def __repr__(self) -> str:
        return (
            f"Sinks(first token receives {self.heads.table['score'].mean():.2f}, sink rate "
            f"{self.sink_rate():.0%}; {len(self.later())} later sinks; "
            f"{len(self.received)} prompts)"
        )


def attention_sinks(
    model: HookedModel,
    prompts,
    *,
    rule: SinkRule = SinkRule(),
    max_tokens: int | None = None,
    batch_size: int = 4,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Sinks:
    """Measure what every token receives, in every layer and head. Forms no pattern.

    Args:
        prompts: Text, texts, a data set with a `text` column, or prompts from `interp.tasks`.
        max_tokens: Cut texts there. Rates fall with length: never compare across lengths.
        out: Folder to keep shards in: a killed run continues there and ends with the same table.

    Returns:
        `Sinks`. `.heads.score` is a_0, the mean over prompts; beside it `rate` (share of prompts
        with a_0 > epsilon), `later` (largest a_j of a later token, mean), `n_later` (later sinks
        per prompt), `value_norm` (|v_0| over the median; shared by the query heads of a kv head).

    Raises:
        SinkError: A bad rule; NaN in the activations, naming layer and prompt.
    """
    prompts = as_prompts(model, prompts, max_tokens=max_tokens)
    settings = {
        "analysis": "attention_sinks",
        "task": describe(prompts),
        **model.provenance(),
    }
    desc = "attention sinks" if progress else None
    score = partial(_measure, model)
    table = in_shards(score, prompts, batch_size, settings, out, resume, desc)
    sinks = _summarise(model, prompts, table, rule, settings)
    if out is not None:
        sinks.heads.save(Path(out) / "heads.parquet")
    return sinks


def uniform_received(n_tokens: int) -> Float[np.ndarray, " token"]:
    """What each of `n_tokens` receives if every query looks evenly at all it may see (causal)."""
    tail = np.cumsum((1 / np.arange(1, n_tokens + 1))[::-1])[::-1]  # H_T - H_j
    return tail / np.arange(n_tokens, 0, -1)


@torch.no_grad()
def _measure(model: HookedModel, prompts: Dataset) -> pd.DataFrame:
    """One row a prompt: what tokens receive, queries, value norms, massive activations."""
    batch = model.batch(prompts["input_ids"])
    layers = model.attention_layers
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}

    def look(attention: Attention, hook, layer: int) -> None:
        found[layer]["received"] = attention.mass_received()
        found[layer]["queries"] = attention.queries_per_key()
        found[layer]["value_norm"] = attention.v.float().norm(dim=-1)

    def weigh(residual: Tensor, hook, layer: int) -> None:
        found[layer] |= massive_activations(residual.float(), model.call.real)

    hooks: list[tuple[str, Callable]] = []
    for layer in layers:
        hooks.append((f"blocks.{layer}.attn.hook_attention", partial(look, layer=layer)))
        hooks.append((f"blocks.{layer}.hook_resid_post", partial(weigh, layer=layer)))
    with model.hooks(fwd_hooks=hooks):
        model.run(batch.input_ids, batch.attention_mask)
    stacked = {k: torch.stack([found[layer][k] for layer in layers], 1) for k in found[layers[0]]}
    rows = []
    for row, first in enumerate(batch.first.tolist()):
        mine = {name: value[row].cpu() for name, value in stacked.items()}
        _check_finite(mine["received"][..., first:], layers, row, model)
        rows.append(
            {
                "n_heads": mine["received"].shape[1],
                "received": mine["received"][..., first:].flatten().numpy(),
                "queries": mine["queries"][0, first:].numpy(),
                "n_kv_heads": mine["value_norm"].shape[1],
                "value_norm": mine["value_norm"][..., first:].flatten().numpy(),
                "median": mine["median"].numpy(),
                "massive_value": mine["value"].flatten().numpy(),
                "massive_position": (mine["position"] - first).flatten().numpy(),
                "massive_dim": mine["dim"].flatten().numpy(),
            }
        )
    return pd.DataFrame(rows)


def massive_activations(
    residual: Float[Tensor, "batch token d_model"], real: Tensor
) -> dict[str, Tensor]:
    """The largest |x| of each prompt with its sign, token and dimension, and the median of |x|."""
    size = residual.abs().masked_fill(~real[..., None], -1)
    top = size.flatten(1).topk(N_MASSIVE).indices
    flat = size.flatten(1).masked_fill(size.flatten(1) < 0, torch.nan)
    return {
        "value": residual.flatten(1).gather(1, top),
        "position": top // residual.shape[2],
        "dim": top % residual.shape[2],
        "median": flat.nanmedian(dim=1).values,
    }


def _check_finite(received: Tensor, layers: list[int], row: int, model: HookedModel) -> None:
    bad = torch.isnan(received).flatten(1).any(1)
    if bad.any():
        layer = layers[int(bad.int().argmax())]
        dtype = model.original_model.dtype
        cure = "look at the weights" if dtype == torch.float32 else "load with dtype=float32"
        raise SinkError(
            f"prompts: the attention of layer {layer} is not a number (prompt {row} of its batch); "
            f"the activations overflow in {dtype}: {cure}."
        )


def _summarise(
    model: HookedModel, prompts: Dataset, table: pd.DataFrame, rule: SinkRule, settings: dict
) -> Sinks:
    layers = model.attention_layers
    received, tokens, massive, samples = [], [], [], []
    for prompt, (row, ids) in enumerate(zip(table.itertuples(), prompts["input_ids"], strict=True)):
        names = [model.tokenizer.decode([token]) for token in ids]
        values = np.asarray(row.received).reshape(len(layers), row.n_heads, len(ids))
        norms = np.asarray(row.value_norm).reshape(len(layers), row.n_kv_heads, len(ids))
        norms = norms / np.median(norms, axis=2, keepdims=True)
        queries = np.asarray(row.queries)
        received.append(values)
        samples.append(_per_head(values, norms, queries, rule))
        tokens.append(_tokens_of(prompt, layers, names, values, norms, queries))
        massive.append(_massive_of(prompt, layers, names, row))
    columns = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    heads = HeadScores.from_samples(
        columns.pop("first"), layers=layers, keep_samples=True, rule=asdict(rule), **settings
    )
    more = {name: values.mean(0).reshape(-1) for name, values in columns.items()}
    heads = HeadScores(heads.table.assign(**more), heads.metadata, samples=heads.samples)
    joined = (pd.concat(tables, ignore_index=True) for tables in (tokens, massive))
    return Sinks(heads, *joined, received, rule)


def _per_head(
    received: Float[np.ndarray, "layer head token"],
    norms: Float[np.ndarray, "layer kv_head token"],
    queries: Int[np.ndarray, " token"],
    rule: SinkRule,
) -> dict[str, Float[np.ndarray, "layer head"]]:
    """One prompt's numbers for each head."""
    n_heads, n_tokens = received.shape[1:]
    later = received[:, :, 1:][:, :, queries[1:] >= rule.least_queries(n_tokens)]
    if not later.shape[2]:  # too short for a later token to be seen often enough
        later = np.zeros((*later.shape[:2], 1))
    return {
        "first": received[:, :, 0],
        "rate": (received[:, :, 0] > rule.epsilon).astype(float),
        "later": later.max(2),
        "n_later": (later > rule.threshold(n_tokens)).sum(2).astype(float),
        "value_norm": norms[:, :, 0].repeat(n_heads // norms.shape[1], axis=1),
    }


def _tokens_of(prompt, layers, names, received, norms, queries) -> pd.DataFrame:
    """One prompt's tokens, a row a layer and position, means over heads."""
    n_tokens = len(names)
    return pd.DataFrame(
        {
            "prompt": prompt,
            "layer": np.repeat(layers, n_tokens),
            "position": np.tile(np.arange(n_tokens), len(layers)),
            "token": names * len(layers),
            "received": received.mean(1).reshape(-1),
            "queries": np.tile(queries, len(layers)),
            "uniform": np.tile(uniform_received(n_tokens), len(layers)),
            "value_norm": norms.mean(1).reshape(-1),
        }
    )


def _massive_of(prompt, layers, names, row) -> pd.DataFrame:
    """One prompt's largest activations after each layer, and which of them are massive."""
    position, value = np.asarray(row.massive_position), np.asarray(row.massive_value)
    table = pd.DataFrame(
        {
            "prompt": prompt,
            "layer": np.repeat(layers, N_MASSIVE),
            "position": position,
            "token": [names[i] for i in position],
            "dim": np.asarray(row.massive_dim),
            "value": value,
            "ratio": np.abs(value) / np.repeat(np.asarray(row.median), N_MASSIVE),
        }
    )
    return table.assign(massive=(table["value"].abs() > 100) & (table["ratio"] > 1000))
