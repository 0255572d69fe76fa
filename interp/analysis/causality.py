"""Does the model need these heads? Ablate the top k, and as many others many times over.

A drop after ablating the top heads says little by itself: any ablation may hurt. So the same number
of other heads is ablated in each of D draws (by default as many from each layer, since layers
differ in how much they matter), on the same prompts, and all differences are paired by prompt. With
b the number of draws that hurt at least as much as the top heads do,

    p = (1 + b) / (1 + D)

is the rank p-value of "the top heads are like any others" (Phipson & Smyth 2010): with D = 10 it
cannot be below 0.09. `other` is text of another kind, to see whether something else broke too.

Which heads matter and how much must not be read off the same prompts: choose them on other ones.
Source of the experiment: Wu et al. 2024 (arXiv 2404.15574), top-K against random-K heads masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float
from tqdm.auto import tqdm

from interp.errors import UserError
from interp.evaluation import Comparison, Evaluation, evaluate, metric_values
from interp.heads import Head, HeadScores
from interp.intervention.ablate import Ablate, How
from interp.model.hooked import HookedModel
from interp.runs import Run
from interp.tasks.prompts import as_prompts, describe

METRICS = ("accuracy", "loss", "text_loss")
WORSE = {"accuracy": -1, "loss": 1, "text_loss": 1}  # the sign of a change for the worse
RESAMPLES = 2000
UNABLATED = "unablated"


class CausalityError(UserError):
    """An ablation experiment that cannot be run, or a result that it does not have."""


@dataclass(frozen=True)
class Condition:
    """One set of ablated heads: the top `k`, or draw number `draw` of as many others."""

    name: str
    k: int
    draw: int | None
    heads: tuple[Head, ...]


@dataclass(frozen=True, eq=False)
class AblationControl:
    """What ablating the top heads does, beside what ablating as many others does.

    `table` has a row for each condition, draw and metric: `condition, k, draw, metric, value, low,
    high, n` (`draw` is NA but for random heads; intervals over prompts). `differences` are the same
    minus the unablated model, paired by prompt. `samples` holds every prompt's numbers. Metrics:
    `accuracy` and `loss` of the answers, `text_loss` of the other text (nats a token).
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    samples: pd.DataFrame
    conditions: list[Condition]
    metadata: dict[str, Any]

    @property
    def ks(self) -> list[int]:
        """How many heads were ablated."""
        return sorted({condition.k for condition in self.conditions if condition.k})

    @property
    def metrics(self) -> list[str]:
        """The metrics that were measured."""
        return [metric for metric in METRICS if (self.table["metric"] == metric).any()]

    @property
    def ranks(self) -> pd.DataFrame:
        """One row a k and metric: the top heads against the draws, `p_value` as at the top.

        `top` and `random` are changes from the unablated model (mean over draws), `random_low` and
        `random_high` the mildest and worst draw in numbers; `gap` is `top` minus `random`, with an
        interval over prompts and draws; `as_bad` of `draws` hurt at least as much.
        """
        rows = [self._rank(k, metric) for k in self.ks for metric in self.metrics]
        return pd.DataFrame(rows)

    @property
    def summary(self) -> pd.DataFrame:
        """One row a condition and metric, the draws of a k averaged: what `.plot()` shows.

        The interval of random heads is a bootstrap over both prompts and draws.
        """
        fixed = self.table[self.table["draw"].isna()]
        rows = [fixed[fixed["condition"] == UNABLATED]]
        for k in self.ks:
            rows.append(fixed[fixed["condition"] == top_name(k)])
            values = [(m, self._draws(k, m, change=False)) for m in self.metrics]
            averaged = [
                {"condition": random_name(k), "k": k, "metric": metric, "value": v.mean()}
                | dict(zip(("low", "high"), crossed_interval(v), strict=True))
                | {"n": v.shape[1]}
                for metric, v in values
            ]
            rows.append(pd.DataFrame(averaged))
        return pd.concat(rows, ignore_index=True)

    def heads(self, k: int) -> tuple[Head, ...]:
        """The top `k` heads that were ablated."""
        return self._condition(top_name(k)).heads

    def rank(self, k: int, metric: str) -> dict[str, Any]:
        """The row of `ranks` of one k and metric."""
        if k not in self.ks or metric not in self.metrics:
            raise CausalityError(
                f"k={k}, metric={metric!r}: k is one of {', '.join(map(str, self.ks))}, metric one "
                f"of {', '.join(self.metrics)}."
            )
        return self._rank(k, metric)

    def p_value(self, k: int | None = None, metric: str = "accuracy") -> float:
        """Share of draws that hurt at least as much as the top heads, these counted in."""
        return float(self.rank(max(self.ks) if k is None else k, metric)["p_value"])

    def plot(self, **options):
        """Each condition with its interval, the single draws as grey dots, one panel a metric."""
        from interp import figures

        draws = self.table[self.table["draw"].notna()].copy()
        draws["condition"] = draws["k"].map(random_name)
        return figures.conditions(self.summary, draws=draws, **options)

    def __repr__(self) -> str:
        lines = [
            f"top {r.k}: {r.metric} {r.top:+.3f}; random {r.k}: {r.random:+.3f} "
            f"[{r.random_low:+.3f}, {r.random_high:+.3f}] over {r.draws} draws, p = {r.p_value:.2f}"
            for r in self.ranks.itertuples()
        ]
        return "AblationControl(" + "\n  ".join(lines) + ")"

    def _condition(self, name: str) -> Condition:
        found = [c for c in self.conditions if c.name == name]
        if not found:
            raise CausalityError(f"k: one of {', '.join(map(str, self.ks))}.")
        return found[0]

    def _values(self, name: str, draw: int | None, metric: str) -> Float[np.ndarray, " prompt"]:
        rows = self.samples[
            (self.samples["condition"] == name) & (self.samples["metric"] == metric)
        ]
        rows = rows[rows["draw"].isna() if draw is None else rows["draw"] == draw]
        return rows.sort_values("prompt")["value"].to_numpy(float)

    def _draws(self, k: int, metric: str, *, change: bool) -> Float[np.ndarray, "draw prompt"]:
        drawn = [c for c in self.conditions if c.k == k and c.draw is not None]
        values = np.stack([self._values(c.name, c.draw, metric) for c in drawn])
        return values - self._values(UNABLATED, None, metric) if change else values

    def _rank(self, k: int, metric: str) -> dict[str, Any]:
        top = self._values(top_name(k), None, metric) - self._values(UNABLATED, None, metric)
        drawn = self._draws(k, metric, change=True)
        single, sign = drawn.mean(1), WORSE[metric]
        # as_bad: a tie counts against the top heads; rounding must not decide it
        as_bad = int((sign * single >= sign * top.mean() - 1e-9).sum())
        low, high = crossed_interval(top - drawn)
        return {
            "k": k,
            "metric": metric,
            "top": top.mean(),
            "random": single.mean(),
            "random_low": single.min(),
            "random_high": single.max(),
            "gap": top.mean() - single.mean(),
            "gap_low": low,
            "gap_high": high,
            "as_bad": as_bad,
            "draws": len(single),
            "p_value": (1 + as_bad) / (1 + len(single)),
            "n": len(top),
        }


def ablation_control(
    model: HookedModel,
    scores: HeadScores,
    prompts: Dataset,
    *,
    ks: Sequence[int] = (3, 6, 12),
    draws: int = 10,
    match: str | None = "layer",
    how: How = "zero",
    seed: int = 0,
    other: str | Sequence[str] | Dataset | None = None,
    batch_size: int = 8,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> AblationControl:
    """Ablate `scores.top(k)` for each k, and `draws` times as many other heads; measure both.

    Args:
        prompts: Prompts with answers that `scores` did not come from (teacher-forced).
        match: Draw as many heads from each layer as the top ones have there; None: from anywhere.
        how: As in `Ablate`.
        other: Text without answers; its loss tells what else the ablation breaks.
        out: Folder to keep every condition's numbers in: a killed run continues there.

    Raises:
        CausalityError: A bad k or number of draws.
        ScoresError: Too few other heads to draw from: take a smaller k, or `match=None`.
    """
    prompts = as_prompts(model, prompts)
    sets = {"task": prompts} | ({} if other is None else {"text": as_prompts(model, other)})
    conditions = conditions_of(scores, ks, draws, match, seed)
    settings = {
        "analysis": "ablation_control",
        "conditions": [[c.name, c.draw, [str(head) for head in c.heads]] for c in conditions],
        "match": match,
        "how": how,
        "seed": seed,
        **{name: describe(data) for name, data in sets.items()},
        **model.provenance(),
    }

    def measure(condition: Condition) -> pd.DataFrame:
        edits = [Ablate(condition.heads, how)] if condition.heads else []
        with model.intervene(edits):
            parts = [
                evaluate(model, data, batch_size=batch_size, progress=False).table.assign(set=name)
                for name, data in sets.items()
            ]
        return pd.concat(parts, ignore_index=True)

    run = None if out is None else Run.open(out, settings, resume)
    tables = _measured(measure, conditions, run, progress)
    result = _result(conditions, tables, settings)
    if run is not None:
        result.table.to_parquet(Path(run.folder) / "table.parquet", index=False)
        run.finish(conditions=len(conditions), **{n: len(data) for n, data in sets.items()})
    return result


def conditions_of(
    scores: HeadScores, ks: Sequence[int], draws: int, match: str | None, seed: int
) -> list[Condition]:
    """The unablated model, then for each k the top heads and the draws."""
    ks = list(dict.fromkeys(int(k) for k in ks))
    if not ks or min(ks) < 1 or draws < 1:
        raise CausalityError(f"ks={ks}, draws={draws}: numbers of heads and of draws, from 1 on.")
    found = [Condition(UNABLATED, 0, None, ())]
    for k in ks:
        found.append(Condition(top_name(k), k, None, tuple(scores.top(k))))
        for draw in range(draws):
            heads = scores.random(k, seed=seed * 1000 + draw, match=match)
            found.append(Condition(random_name(k), k, draw, tuple(heads)))
    return found


def top_name(k: int) -> str:
    return f"top {k}"


def random_name(k: int) -> str:
    return f"random {k}"


def crossed_interval(values: Float[np.ndarray, "draw prompt"]) -> tuple[float, float]:
    """95 % percentile interval of the mean, both draws and prompts resampled."""
    generator = np.random.default_rng(0)
    n_draws, n_prompts = values.shape
    draws = generator.multinomial(n_draws, [1 / n_draws] * n_draws, size=RESAMPLES)
    prompts = generator.multinomial(n_prompts, [1 / n_prompts] * n_prompts, size=RESAMPLES)
    means = np.einsum("rd,dp,rp->r", draws, values, prompts) / (n_draws * n_prompts)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _measured(measure, conditions: list[Condition], run: Run | None, progress: bool):
    """Each condition's prompts; those that the folder has are not run again."""
    bar = tqdm(
        total=len(conditions), desc="ablation", unit="condition", disable=not progress, leave=False
    )
    with bar:
        if run is None:
            tables = []
            for condition in conditions:
                tables.append(measure(condition))
                bar.update()
            return tables
        left = [index for index, _ in run.shards(len(conditions), 1)]
        bar.update(len(conditions) - len(left))
        for index in left:
            run.save_shard(index, measure(conditions[index]))
            bar.update()
    return list(run.tables())


def _result(
    conditions: list[Condition], tables: list[pd.DataFrame], settings: dict[str, Any]
) -> AblationControl:
    parts = {"table": [], "differences": [], "samples": []}
    first: dict[str, Evaluation] = {}
    for condition, table in zip(conditions, tables, strict=True):
        about = {"condition": condition.name, "k": condition.k, "draw": condition.draw}
        for name, rows in table.groupby("set", sort=False):
            # the two sets share a table, so each has the other's columns, empty
            rows = rows.dropna(axis=1, how="all").reset_index(drop=True)
            evaluation = Evaluation(rows, settings)
            comparison = Comparison({"first": first.setdefault(str(name), evaluation),
                                     "this": evaluation})  # fmt: skip
            parts["table"].append(_renamed(evaluation.summary(), name).assign(**about))
            if condition.name != UNABLATED:
                differences = comparison.differences.drop(columns="condition")
                parts["differences"].append(_renamed(differences, name).assign(**about))
            parts["samples"].append(_samples(rows, str(name)).assign(**about))
    columns = ["condition", "k", "draw", "metric"]
    joined = {}
    for name, frames in parts.items():
        table = pd.concat(frames, ignore_index=True).astype({"draw": "Int64"})
        joined[name] = table[columns + [c for c in table if c not in columns]]
    return AblationControl(**joined, conditions=conditions, metadata=settings)


def _renamed(table: pd.DataFrame, name) -> pd.DataFrame:
    """The metrics under the names that a result has; what it does not know is left out."""
    names = {"loss": "text_loss"} if name == "text" else {}
    table = table.assign(metric=table["metric"].replace(names))
    return table[table["metric"].isin(METRICS)]


def _samples(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    metrics = {"text_loss": "loss"} if name == "text" else {"accuracy": "accuracy", "loss": "loss"}
    found = {metric: metric_values(rows, source) for metric, source in metrics.items()}
    return pd.concat(
        [
            pd.DataFrame({"metric": metric, "prompt": range(len(values)), "value": values})
            for metric, values in found.items()
            if values is not None
        ],
        ignore_index=True,
    )
