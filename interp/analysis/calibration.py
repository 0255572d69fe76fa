"""Which heads does it help to calibrate? ACT on one head at a time, on prompts with answers.

With y_p the metric of prompt p as the model is, and y_p(h) with ACT on head h alone, the effect is

    e_h = mean over p of [y_p(h) - y_p]

for the accuracy (all answer tokens are the argmax, one pass over prompt and answer) and for the
answer's loss, which moves on every prompt and so needs fewer of them. Intervals are 95 %
(bootstrap over prompts); p-values are of "it does not help": McNemar's exact test for the accuracy,
a t test of the paired differences for the loss, both one-sided.

ACT on one head changes its z, and nothing before it. So one pass gives every head's damped z, and
each head's effect is a replay of the recorded pass from its layer on (`interp.model.replay`), from
the first token that changes; prompts on which a head has no later sink are not run at all.

Source: Yu et al. 2024 (arXiv 2406.15765; see `interp.intervention.act`) keep every head that raises
the accuracy; their code only logs accuracies, so that is all there is of a rule. Among heads that
do nothing, chance alone passes nearly half of those that move any answer: see `Acceptance`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from interp.analysis.shards import in_shards
from interp.errors import UserError
from interp.evaluation import Forced, answer_rows
from interp.heads import Head, HeadScores, heads_of
from interp.intervention.act import ACT, apply
from interp.intervention.later_sinks import Search
from interp.model.attention import Attention
from interp.model.hooked import Batch, HookedModel
from interp.model.replay import Recording, pass_cost, passes, record, tokens_at_once
from interp.tasks.prompts import as_prompts, describe, spans_of

Metric = Literal["accuracy", "loss"]
BETTER: dict[Metric, int] = {"accuracy": 1, "loss": -1}  # the sign of a change for the better
RESAMPLES = 2000
OTHER = ("heads", "effects", "made_on")  # fields of ACT that say nothing of how it edits


class CalibrationError(UserError):
    """A screen that cannot be run, or a rule of acceptance that means nothing."""


@dataclass(frozen=True)
class Acceptance:
    """Which heads a screen accepts. Default: the paper's rule, any gain in accuracy at all.

    `margin`: the gain must be above it. `level`: only heads whose gain is beyond chance, at this
    false discovery rate over all candidates (Benjamini & Hochberg 1995). `most`: the best so many.
    """

    metric: Metric = "accuracy"
    margin: float = 0.0
    level: float | None = None
    most: int | None = None

    def __post_init__(self):
        if self.metric not in get_args(Metric):
            raise CalibrationError(f"metric={self.metric!r}: accuracy or loss.")
        if self.margin < 0:
            raise CalibrationError(f"margin={self.margin}: a gain, from 0 on.")
        if self.level is not None and not 0 < self.level < 1:
            raise CalibrationError(f"level={self.level}: a rate between 0 and 1, such as 0.05.")
        if self.most is not None and self.most < 1:
            raise CalibrationError(f"most={self.most}: a number of heads, from 1 on.")

    def accepts(self, effects: pd.DataFrame) -> Bool[np.ndarray, " head"]:
        """Which rows of `Screen.effects`."""
        gain = BETTER[self.metric] * effects[self.metric].to_numpy()
        chosen = gain > self.margin
        if self.level is not None:
            p_values = effects[f"{self.metric}_p"].to_numpy()
            chosen &= stats.false_discovery_control(p_values) <= self.level
        if self.most is not None:
            order = np.argsort(np.where(chosen, -gain, np.inf), kind="stable")
            chosen &= np.isin(np.arange(len(gain)), order[: self.most])
        return chosen


@dataclass(frozen=True, eq=False)
class Screen:
    """What calibrating each candidate by itself does.

    `effects` has a row a head: `layer, head`, the change of `accuracy` and of `loss`, each with
    `_low, _high, _p`; `edited`, the share of prompts on which the head had a later sink; `n`.
    `base` is the accuracy and loss of the model as it is, `candidates` the ACT that was screened.
    """

    effects: pd.DataFrame
    base: dict[str, float]
    candidates: ACT
    samples: dict[str, Float[np.ndarray, "prompt head"]]
    metadata: dict[str, Any]

    def accepted(self, rule: Acceptance = Acceptance()) -> tuple[Head, ...]:
        """The heads that a rule accepts; none is an answer too."""
        rows = self.effects[rule.accepts(self.effects)]
        return tuple(Head(int(row.layer), int(row.head)) for row in rows.itertuples())

    def act(self, rule: Acceptance = Acceptance()) -> ACT:
        """ACT on the accepted heads, with the effects of all candidates."""
        rows = self.effects.to_dict("records")
        found = {
            str(Head(row.pop("layer"), row.pop("head"))): {k: float(v) for k, v in row.items()}
            for row in rows
        }
        return replace(self.candidates, heads=self.accepted(rule), effects=found)

    def scores(self, metric: Metric = "accuracy") -> HeadScores:
        """Each head's gain: the change for the better in a metric, prompt by prompt."""
        if metric not in get_args(Metric):
            raise CalibrationError(f"metric={metric!r}: accuracy or loss.")
        where = self.effects[["layer", "head"]].assign(tower="text")
        gains = BETTER[metric] * self.samples[metric]
        return HeadScores.from_columns(where, gains, {**self.metadata, "metric": metric})

    def __repr__(self) -> str:
        best = self.effects.sort_values("accuracy", ascending=False).iloc[0]
        return (
            f"Screen({len(self.effects)} heads, {int(best.n)} prompts; accuracy "
            f"{self.base['accuracy']:.3f}, with the best head {best.accuracy:+.3f} "
            f"[{best.accuracy_low:+.3f}, {best.accuracy_high:+.3f}]; the paper's rule accepts "
            f"{len(self.accepted())})"
        )


def calibration_screen(
    model: HookedModel,
    prompts,
    candidates: ACT,
    *,
    batch_size: int = 8,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Screen:
    """The effect of ACT on each of `candidates.heads` alone; its other parameters as they are.

    `out`: folder for every prompt's numbers, so that a killed run continues there.

    Raises:
        CalibrationError: No candidates, prompts without answers, a model whose attention runs on
            the bridge's eager path.
        ReplayError: A model that a recorded pass cannot be continued from.
    """
    prompts = as_prompts(model, prompts)
    _check(model, prompts, candidates)
    settings = {
        "analysis": "calibration_screen",
        "heads": [str(head) for head in heads_of(candidates.heads)],
        "act": {f.name: getattr(candidates, f.name) for f in fields(ACT) if f.name not in OTHER},
        "task": describe(prompts),
        **model.provenance(),
    }
    measure = partial(_measure, model, candidates)
    desc = "calibration" if progress else None
    table = in_shards(measure, prompts, batch_size, settings, out, resume, desc)
    screen = _screen(candidates, table, settings)
    if out is not None:
        screen.scores().save(Path(out) / "heads.parquet")
        screen.effects.to_parquet(Path(out) / "effects.parquet", index=False)
    return screen


def _check(model: HookedModel, prompts: Dataset, candidates: ACT) -> None:
    heads = heads_of(candidates.heads)
    model.check_heads(heads)
    if not heads:
        raise CalibrationError("candidates: no heads to calibrate; give some.")
    answers = prompts["answer_ids"] if "answer_ids" in prompts.column_names else [None]
    without = [n for n, ids in enumerate(answers) if not ids]
    if without:
        raise CalibrationError(
            f"prompts: {without[0]} has no answer, and heads are judged by answers; take prompts "
            "with answers, such as those of interp.tasks."
        )
    if not model.lazy:
        raise CalibrationError(
            f"{model.name}: its attention runs on the bridge's eager path, from which no damped z "
            "can be had; give ACT its heads by hand."
        )


@torch.no_grad()
def _measure(model: HookedModel, act: ACT, prompts: Dataset) -> pd.DataFrame:
    """One row a prompt: its numbers as the model is, and with each candidate calibrated."""
    answers = prompts["answer_ids"]
    lists = [[*p, *a[:-1]] for p, a in zip(prompts["input_ids"], answers, strict=True)]
    batch = model.batch(lists)
    target, real = answer_rows(answers, batch.input_ids.device)
    with model.spans(spans_of(prompts), [len(ids) for ids in prompts["input_ids"]]):
        damped = damped_z(model, act, batch)
        read = range(-target.shape[1], 0)
        recording = record(model, batch.input_ids, batch.attention_mask, read=read)
    plain = judged(recording.logits, target, real)
    if not plain["loss"].isfinite().all():
        raise CalibrationError(
            f"prompts: {model.name} gives an answer a loss that is not finite (dtype "
            f"{model.original_model.dtype}); load it in another dtype."
        )
    column = {head: index for index, head in enumerate(heads_of(act.heads))}
    found = {name: value[:, None].repeat(1, len(column)) for name, value in plain.items()}
    edited = torch.zeros(len(prompts), len(column), dtype=torch.bool)
    for layer, z in damped.items():
        heads = torch.tensor([column[Head(layer, head)] for head in z.heads.tolist()])
        for rows, chosen, start in z.runs(model, recording):
            logits = z.replay(model, layer, recording, rows, chosen, start)
            for name, values in judged(logits, target[rows], real[rows]).items():
                found[name][rows, heads[chosen]] = values
            edited[rows, heads[chosen]] = True
    columns = {f"plain_{name}": value.tolist() for name, value in plain.items()}
    columns |= {name: value.tolist() for name, value in found.items()}
    return pd.DataFrame(columns | {"edited": edited.tolist()})


@dataclass(frozen=True, eq=False)
class DampedZ:
    """Some heads' z in a layer, each as ACT on it alone would make it.

    `first[p, h]` is the first column of prompt p at which that differs; `n_tokens` where nowhere.
    """

    heads: Int[Tensor, " heads"]
    z: Float[Tensor, "batch pos heads d_head"]
    first: Int[Tensor, "batch heads"]

    def runs(
        self, model: HookedModel, recording: Recording
    ) -> Iterator[tuple[Int[Tensor, " run"], Int[Tensor, " run"], int]]:
        """Prompts and heads to be run, many in one pass, and the column each pass starts from."""
        n_tokens = self.z.shape[1]
        rows, chosen = (self.first < n_tokens).nonzero().unbind(1)
        starts = self.first[rows, chosen]
        if not recording.can_start_late:
            starts = torch.zeros_like(starts)
        starts, order = starts.sort(stable=True)
        if not len(order):
            return
        most = max(1, tokens_at_once(model) // (n_tokens - int(starts[0])))
        for one, last in passes(starts.tolist(), n_tokens, most, pass_cost(model)):
            some = order[one:last]
            yield rows[some], chosen[some], int(starts[one])

    def replay(
        self,
        model: HookedModel,
        layer: int,
        recording: Recording,
        rows: Int[Tensor, " run"],
        chosen: Int[Tensor, " run"],
        start: int,
    ) -> Float[Tensor, "run read d_vocab"]:
        """The logits of prompts `rows`, each with the z of one of the heads put in."""

        def put(z: Tensor, hook) -> Tensor:
            edited = z.clone()
            runs = torch.arange(len(rows), device=z.device)
            new = self.z[rows.to(z.device), start:, chosen.to(z.device)]
            edited[runs, :, self.heads[chosen].to(z.device)] = new.to(z)
            return edited

        with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)]):
            return recording.replay(layer, rows, start, lean=True)


def damped_z(model: HookedModel, act: ACT, batch: Batch) -> dict[int, DampedZ]:
    """Every candidate's z by layer, from one pass in which nothing is edited."""
    found: dict[int, DampedZ] = {}

    def look(attention: Attention, hook, layer: int, search: Search) -> None:
        sinks = search.find(attention, model.call)
        edited = attention if sinks is None else apply(attention, sinks)
        if edited is attention:
            return
        heads = search.heads
        before, after = (one.output()[:, heads].transpose(1, 2) for one in (attention, edited))
        apart = (before != after).any(-1)
        first = torch.where(apart.any(1), apart.int().argmax(1), after.shape[1])
        found[layer] = DampedZ(heads.cpu(), after, first.cpu())

    hooks = [
        (f"blocks.{layer}.attn.hook_attention", partial(look, layer=layer, search=search))
        for layer, search in act.searches().items()
    ]
    with model.hooks(fwd_hooks=hooks):
        model.run(batch.input_ids, batch.attention_mask)
    return found


def judged(
    logits: Float[Tensor, "run answer d_vocab"],
    target: Int[Tensor, "run answer"],
    real: Bool[Tensor, "run answer"],
) -> dict[str, Float[Tensor, " run"]]:
    """Whether every answer token is the argmax, and their mean negative log-likelihood."""
    found = Forced([], logits.float(), target, real)
    loss = found.losses.sum(1) / real.sum(1)
    return {"accuracy": found.greedy.float().cpu(), "loss": loss.cpu()}


def _screen(act: ACT, table: pd.DataFrame, settings: dict[str, Any]) -> Screen:
    plain = {name: table[f"plain_{name}"].to_numpy(float) for name in BETTER}
    samples = {name: np.stack(table[name]) - plain[name][:, None] for name in BETTER}
    edited = np.stack(table["edited"])
    heads = heads_of(act.heads)
    p_values = {"accuracy": mcnemar(samples["accuracy"]), "loss": paired_t(-samples["loss"])}
    columns: dict[str, Any] = {
        "layer": [head.layer for head in heads],
        "head": [head.head for head in heads],
    }
    for name, values in samples.items():
        low, high = intervals(values)
        columns |= {name: values.mean(0), f"{name}_low": low, f"{name}_high": high}
        columns[f"{name}_p"] = p_values[name]
    frame = pd.DataFrame(columns | {"edited": edited.mean(0), "n": len(table)})
    base = {name: float(values.mean()) for name, values in plain.items()}
    return Screen(frame, base, act, samples, {**settings, "base": base})


def intervals(
    values: Float[np.ndarray, "prompt head"],
) -> tuple[Float[np.ndarray, " head"], Float[np.ndarray, " head"]]:
    """95 % percentile intervals of the means, prompts resampled."""
    n = len(values)
    draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES)
    low, high = np.quantile(draws @ values / n, [0.025, 0.975], axis=0)
    return low, high


def mcnemar(changes: Float[np.ndarray, "prompt head"]) -> Float[np.ndarray, " head"]:
    """P(so many prompts or more got right of those that changed), if each way were as likely."""
    better, worse = (changes > 0).sum(0), (changes < 0).sum(0)
    return stats.binom.sf(better - 1, better + worse, 0.5)


def paired_t(gains: Float[np.ndarray, "prompt head"]) -> Float[np.ndarray, " head"]:
    """P of so large a mean gain, if there were none; 1 where all gains are alike."""
    spread = gains.std(0)
    p_values = np.ones(gains.shape[1])
    if len(gains) > 1 and (spread > 0).any():
        p_values[spread > 0] = stats.ttest_1samp(
            gains[:, spread > 0], 0, alternative="greater"
        ).pvalue
    return p_values
