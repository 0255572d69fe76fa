"""Running a model with only some heads left as they are: what a circuit of heads does by itself.

Every head outside the circuit gives, at every token, the z that it has on the corrupted prompt
(resample ablation); embeddings and MLPs stay, and recompute. Many circuits run in one pass, from a
recording of the clean prompts (`interp.model.replay`).

With F(C) the mean metric when only the heads of C are kept,

    faithfulness(C) = (F(C) - F(none)) / (F(all) - F(none))       1: does all that the model does

as a ratio of means over pairs; the faithfulness of a circuit's complement says what the circuit
misses (Marks et al. 2024, arXiv 2403.19647: low is complete). Definitions differ between papers,
and so do their numbers (Miller et al. 2024, arXiv 2407.08734).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.analysis.paired import (
    Answers,
    Metric,
    PairBatch,
    check_pairs,
    in_pair_batches,
    metric_of,
)
from interp.heads import Head, heads_of
from interp.model.hooked import HookedModel
from interp.model.replay import Recording, record, tokens_at_once

PAIRS_AT_ONCE = 16
RESAMPLES = 2000


def circuit_faithfulness(
    model: HookedModel,
    pairs: Dataset,
    circuits: Mapping[str, Sequence[Head] | str],
    metric: str | Metric = "logit_diff",
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How much of the task each circuit does by itself, and how much is left without it.

    Columns `circuit, size, value, faithfulness, low, high, complement, complement_low,
    complement_high, n`: `value` is F(C), intervals are 95 % (bootstrap over pairs).

    Raises `HeadError` for heads that the model lacks, `PairError` as `activation_patching` does.
    """
    named = {name: heads_of(heads) for name, heads in circuits.items()}
    for heads in named.values():
        model.check_heads(heads)
    masks = torch.stack([mask_of(model, heads) for heads in named.values()])
    every = torch.ones_like(masks[:1])
    stacked = torch.cat([every, ~every, masks, ~masks])
    values = kept_values(model, pairs, stacked, metric, batch_size, progress)
    kept, left = np.split(values[:, 2:], 2, axis=1)
    whole, nothing = values[:, 0], values[:, 1]
    table = pd.DataFrame({"circuit": list(named), "size": [len(heads) for heads in named.values()]})
    shares = {"": share(kept, whole, nothing), "complement": share(left, whole, nothing)}
    (mean, low, high), (rest, rest_low, rest_high) = shares.values()
    return table.assign(
        value=kept.mean(0), faithfulness=mean, low=low, high=high,
        complement=rest, complement_low=rest_low, complement_high=rest_high, n=len(values),
    )  # fmt: skip


def share(
    values: Float[np.ndarray, "pair circuit"],
    whole: Float[np.ndarray, " pair"],
    nothing: Float[np.ndarray, " pair"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean value - mean nothing) / (mean whole - mean nothing), with its 95 % interval.

    NaN where the whole is not above nothing: then there is no task to have a share of.
    """
    n = len(values)
    if not whole.mean() > nothing.mean():
        nowhere = np.full(values.shape[1], np.nan)
        return nowhere, nowhere, nowhere
    draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES) / n
    weights = np.concatenate([np.full((1, n), 1 / n), draws])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (weights @ (values - nothing[:, None])) / (weights @ (whole - nothing))[:, None]
    low, high = np.nanquantile(found[1:], [0.025, 0.975], axis=0)
    return found[0], low, high


def mask_of(model: HookedModel, heads: Sequence[Head]) -> Bool[Tensor, "layer head"]:
    """True at the given heads."""
    mask = torch.zeros(len(model.blocks), model.cfg.n_heads, dtype=torch.bool)
    for head in heads:
        mask[head.layer, head.head] = True
    return mask


def kept_values(
    model: HookedModel,
    pairs: Dataset,
    masks: Bool[Tensor, "circuit layer head"],
    metric: str | Metric = "logit_diff",
    batch_size: int | None = None,
    progress: bool = True,
) -> Float[np.ndarray, "pair circuit"]:
    """Each pair's metric when only the heads of each mask are kept.

    `batch_size`: prompts in one pass (circuits x pairs); default what is fast and fits the memory.
    """
    check_pairs(pairs)
    _, function = metric_of(metric)
    total, parts = len(pairs) * len(masks), []
    with tqdm(total=total, desc="circuits", disable=not progress, unit="run", leave=False) as bar:
        for batch in in_pair_batches(model, pairs, PAIRS_AT_ONCE):
            parts.append(Kept.of(model, batch, function).values(masks, batch_size))
            bar.update(len(batch) * len(masks))
    return torch.cat(parts, dim=1).T.double().cpu().numpy()


@dataclass(frozen=True, eq=False)
class Kept:
    """Some pairs, ready to run with any heads kept: a recording, and every head's corrupted z."""

    model: HookedModel
    batch: PairBatch
    metric: Metric
    clean: Recording
    answers: Answers
    z: dict[int, Float[Tensor, "batch pos head d_head"]]
    corrupted: Float[Tensor, " batch"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: HookedModel, batch: PairBatch, metric: Metric) -> "Kept":
        """Run both sides once."""
        clean = record(model, batch.clean.input_ids, batch.attention_mask)
        answers = batch.answers(clean.logits[:, -1].float())
        z: dict[int, Tensor] = {}

        def keep(value: Tensor, hook, layer: int) -> None:
            z[layer] = value

        names = {layer: f"blocks.{layer}.attn.hook_z" for layer in model.attention_layers}
        hooks = [(name, partial(keep, layer=layer)) for layer, name in names.items()]
        with model.hooks(fwd_hooks=hooks):
            logits = model.last_logits(batch.corrupted.input_ids, batch.attention_mask, 1)[:, -1]
        return cls(model, batch, metric, clean, answers, z, metric(logits, answers))

    @property
    def start(self) -> int:
        """Before it, nothing differs between the two prompts."""
        return self.batch.first_difference if self.clean.can_start_late else 0

    @torch.no_grad()
    def values(
        self, masks: Bool[Tensor, "circuit layer head"], batch_size: int | None = None
    ) -> Float[Tensor, "circuit batch"]:
        """The metric when only the heads of each mask are kept."""
        n_pairs = len(self.batch)
        room = batch_size or tokens_at_once(self.model) // (self.batch.n_tokens - self.start)
        found = []
        for some in masks.split(max(1, room // n_pairs)):
            ablated = ~some.to(self.batch.right.device)
            layers = [layer for layer in self.z if bool(ablated[:, layer].any())]
            if not layers:
                unchanged = self.metric(self.answers.clean_logits, self.answers)
                found += [unchanged] * len(some)
                continue
            hooks = [
                (f"blocks.{layer}.attn.hook_z", partial(self._ablate, layer, ablated[:, layer]))
                for layer in layers
            ]
            rows = torch.arange(n_pairs).repeat(len(some))
            with self.model.hooks(fwd_hooks=hooks):
                logits = self.clean.replay(layers[0], rows, self.start, lean=True)[:, -1].float()
            found += [self.metric(part, self.answers) for part in logits.split(n_pairs)]
        return torch.stack(found)

    def _ablate(
        self, layer: int, ablated: Bool[Tensor, "circuit head"], z: Tensor, hook
    ) -> Float[Tensor, "circuit_and_batch pos head d_head"]:
        split = z.unflatten(0, (len(ablated), len(self.batch)))
        where = ablated.to(z.device)[:, None, None, :, None]
        return torch.where(where, self.z[layer][:, self.start :], split).flatten(0, 1)
