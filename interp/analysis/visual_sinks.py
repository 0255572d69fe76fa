"""Visual attention sinks: tokens of an image that text looks at whatever they hold.

A few coordinates D of the residual stream are huge in them, as they are in the first token of a
text (`interp.analysis.sink_dimensions`; a model may have none). With x_j what enters a block at
token j,

    phi_j = max over d in D of |x_j[d]| / rms(x_j)

and j is a *sink* of that layer where phi_j >= tau. With I the image's tokens, S the sinks, and a_ij
the weight of row i (a token of text that follows an image), per head and row

    M_i = sum over I of a_ij,    v_i = sum over I and S of a_ij,    t_i = sum over S without I

a row is *image-centric* where M_i >= s and (M_i - v_i) / M_i >= rho: a head's score is the share of
its rows that are. What a key contributes to a row is |a_ij v_j W_O|, its value's norm behind the
head's output weights (what a norm after them makes of it is left out).

The control: as many other coordinates, drawn at random, and how many image tokens they would call
sinks.

Source: Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models"
(arXiv 2503.03321).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float

from interp.analysis.image_attention import image_prompts
from interp.analysis.shards import in_shards
from interp.analysis.sink_dimensions import (
    SinkDimensions,
    VisualSinkError,
    checked_tau,
    sink_dimensions,
)
from interp.analysis.visual_sink_look import PER_HEAD, PER_TOKEN, ImageCentric, look_at_sinks
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.tasks.prompts import describe

MANY = 0.05  # of an image's tokens: more sinks than that are no few tokens
DRAWS = 20  # of random coordinates


@dataclass(frozen=True, eq=False)
class VisualSinks:
    """What `visual_sinks` found; `heads` are scored by the share of image-centric rows.

    `tokens`: a row a prompt, layer and token (`position, token, image, phi, sink, received,
    contribution`; the last two are means over heads and over the rows of text behind the image).
    `layers`: a row a layer, see `visual_sinks`.
    """

    heads: HeadScores
    tokens: pd.DataFrame
    layers: pd.DataFrame
    dimensions: tuple[int, ...]
    tau: float
    candidates: SinkDimensions | None = field(default=None, repr=False)

    def positions(self, prompt: int) -> list[int]:
        """Where the image's sinks of a prompt are, in any of its layers."""
        rows = self.tokens[(self.tokens["prompt"] == prompt) & self.tokens["image"]]
        return sorted(rows.loc[rows["sink"], "position"].unique().tolist())

    def plot(self, **options):
        """What the first token and the image hold in these coordinates, layer by layer."""
        from interp import figures

        t = self.tokens
        largest = t[t["image"]].groupby(["prompt", "layer"])["phi"].max()
        lines = {
            "first token": t[t["position"] == 0].groupby("layer")["phi"].mean(),
            "largest of the image": largest.groupby("layer").mean(),
            "mean of the image": t[t["image"]].groupby("layer")["phi"].mean(),
            "tau": pd.Series(self.tau, index=sorted(t["layer"].unique())),
        }
        options = {"title": "Size of the sink dimensions", "x_title": "layer"} | options
        return figures.profile(
            np.concatenate([line.index for line in lines.values()]),
            np.concatenate([line.to_numpy() for line in lines.values()]),
            series=[name for name, line in lines.items() for _ in line],
            y_title="phi",
            **options,
        )

    def __repr__(self) -> str:
        n = self.tokens["prompt"].nunique()
        if not self.dimensions:
            return f"VisualSinks(no sink dimensions; {n} prompts)"
        most = self.layers.loc[self.layers["image_sinks"].idxmax()]
        return (
            f"VisualSinks(dimensions {', '.join(map(str, self.dimensions))}, tau {self.tau:.2f}; "
            f"most in layer {int(most['layer'])}: {most['image_sinks']:.1f} image tokens a prompt, "
            f"with {most['share_of_mass']:.0%} of what the image gets; {n} prompts)"
        )


def visual_sinks(
    model: HookedModel,
    prompts,
    *,
    dimensions: Sequence[int] | None = None,
    tau: float | None = None,
    min_image_mass: float = 0.2,
    min_non_sink: float = 0.5,
    seed: int = 0,
    batch_size: int = 8,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> VisualSinks:
    """Which tokens of images are sinks, what they get and give, and which heads look elsewhere.

    Args:
        prompts: With an image each; where they have answers, these are read behind them.
        dimensions: D. Default: found on the first 30 prompts.
        tau: Default 20 * sqrt(width / 4096).
        seed: Draws the random coordinates of the control.
        out: Folder to keep shards in: a killed run continues there and ends with the same table.

    Returns:
        `VisualSinks`. `.heads` has, beside the score, `image_mass` (M), `visual_sink_mass` (v),
        `text_sink_mass` (t), means over rows, then over prompts; samples kept. `.layers` has
        `image_sinks` and `text_sinks` (a prompt), `share_of_image` (of its tokens that are sinks),
        `share_of_mass` (v / M), `contribution` and `contribution_others` (mean of an image token
        that is a sink, or none), `phi_first`, and `random_dims`: image tokens that as many random
        coordinates would call sinks.

    Raises:
        ImageError: A text-only model, a prompt without an image.
        VisualSinkError: Dimensions or a tau that the model cannot have.
    """
    prompts = image_prompts(model, prompts)
    rule = ImageCentric(min_image_mass, min_non_sink)
    tau, candidates = checked_tau(model, tau), None
    if dimensions is None:
        candidates = sink_dimensions(model, prompts, tau=tau, batch_size=batch_size)
        dimensions = candidates.found
        if not dimensions:
            warn(
                f"visual_sinks: no sink dimensions in {model.name} (no coordinate above tau = "
                f"{tau:.2f} at the first token of most prompts and rarely elsewhere), so no token "
                "is a sink.",
                stacklevel=2,
            )
    dimensions = _checked_dimensions(model, dimensions)
    settings = {
        "analysis": "visual_sinks",
        "dimensions": list(dimensions),
        "tau": tau,
        "min_image_mass": min_image_mass,
        "min_non_sink": min_non_sink,
        "seed": seed,
        "task": describe(prompts),
        **model.provenance(),
    }
    random = _random_dimensions(model.cfg.d_model, dimensions, seed)
    score = partial(look_at_sinks, model, dimensions, random, tau, rule)
    desc = "visual sinks" if progress else None
    table = in_shards(score, prompts, batch_size, settings, out, resume, desc)
    found = _summarise(model, prompts, table, dimensions, tau, candidates, settings)
    if out is not None:
        found.heads.save(Path(out) / "heads.parquet")
    many = found.layers[found.layers["share_of_image"] > MANY]
    if len(many):
        worst = many.loc[many["share_of_image"].idxmax()]
        warn(
            f"visual_sinks: in {len(many)} layers more than {MANY:.0%} of the image's tokens are "
            f"sinks (layer {int(worst['layer'])}: {worst['share_of_image']:.0%}); a fixed tau "
            "drifts where norms change with depth. Look at .layers, or raise tau.",
            stacklevel=2,
        )
    return found


def _checked_dimensions(model: HookedModel, dimensions: Sequence[int]) -> tuple[int, ...]:
    found = tuple(sorted({int(d) for d in dimensions}))
    width = model.cfg.d_model
    if found and not (found[0] >= 0 and found[-1] < width):
        raise VisualSinkError(f"dimensions={list(found)}: {model.name} has 0-{width - 1}.")
    return found


def _random_dimensions(width: int, dimensions: Sequence[int], seed: int) -> list[list[int]]:
    """`DRAWS` times as many of the other coordinates."""
    others = np.setdiff1d(np.arange(width), np.asarray(dimensions, dtype=int))
    generator = np.random.default_rng(seed)
    return [generator.choice(others, len(dimensions), replace=False).tolist() for _ in range(DRAWS)]


def _summarise(
    model: HookedModel,
    prompts: Dataset,
    table: pd.DataFrame,
    dimensions: tuple[int, ...],
    tau: float,
    candidates: SinkDimensions | None,
    settings: dict,
) -> VisualSinks:
    layers = model.attention_layers
    per_head = {
        name: np.stack([np.reshape(row, (len(layers), -1)) for row in table[name]])
        for name in PER_HEAD
    }
    heads = HeadScores.from_samples(
        per_head.pop("chosen"), layers=layers, keep_samples=True, **settings
    )
    means = {name: values.mean(0).reshape(-1) for name, values in per_head.items()}
    heads = HeadScores(heads.table.assign(**means), heads.metadata, samples=heads.samples)
    tokens = pd.concat(
        [
            _tokens_of(model, n, ids, row, layers, tau if dimensions else np.inf)
            for n, (ids, row) in enumerate(
                zip(prompts["input_ids"], table.itertuples(), strict=True)
            )
        ],
        ignore_index=True,
    )
    shares = {name: values.mean((0, 2)) for name, values in per_head.items()}
    by_layer = _layers_of(tokens, layers, shares, np.stack(table["random"].to_list()).mean(0))
    return VisualSinks(heads, tokens, by_layer, dimensions, tau, candidates)


def _tokens_of(
    model: HookedModel, prompt: int, ids: Sequence[int], row: Any, layers: list[int], tau: float
) -> pd.DataFrame:
    n = len(ids)  # without the answer that was read behind it
    columns = {
        name: np.reshape(getattr(row, name), (len(layers), row.length))[:, :n].reshape(-1)
        for name in PER_TOKEN
    }
    return pd.DataFrame(
        {
            "prompt": prompt,
            "layer": np.repeat(layers, n),
            "position": np.tile(np.arange(n), len(layers)),
            "token": [model.tokenizer.decode([token]) for token in ids] * len(layers),
            "image": np.tile(np.asarray(row.image)[:n], len(layers)),
            **columns,
        }
    ).assign(sink=lambda t: t["phi"] >= tau)


def _layers_of(
    tokens: pd.DataFrame,
    layers: list[int],
    shares: dict[str, Float[np.ndarray, " layer"]],
    random: Float[np.ndarray, " layer"],
) -> pd.DataFrame:
    n_prompts = tokens["prompt"].nunique()
    of_image = tokens[tokens["image"]]
    sinks = of_image[of_image["sink"]].groupby("layer")
    others = of_image[~of_image["sink"]].groupby("layer")
    count = sinks.size().reindex(layers, fill_value=0)
    text = tokens[~tokens["image"] & tokens["sink"]].groupby("layer").size()
    first = tokens[tokens["position"] == 0].groupby("layer")["phi"].mean()
    on_image, on_sinks = shares["image_mass"], shares["visual_sink_mass"]
    return pd.DataFrame(
        {
            "layer": layers,
            "image_sinks": count.to_numpy() / n_prompts,
            "share_of_image": (count / of_image.groupby("layer").size()).to_numpy(),
            "share_of_mass": on_sinks / np.maximum(on_image, 1e-12),
            "text_sinks": text.reindex(layers, fill_value=0).to_numpy() / n_prompts,
            "image_mass": on_image,
            "text_sink_mass": shares["text_sink_mass"],
            "contribution": sinks["contribution"].mean().reindex(layers).to_numpy(),
            "contribution_others": others["contribution"].mean().reindex(layers).to_numpy(),
            "phi_first": first.reindex(layers).to_numpy(),
            "random_dims": random,
        }
    )
