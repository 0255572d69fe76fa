"""Position bias: what an answer owes to where the segment that it needs stands among the others.

A prompt is *prefix, {segment_1 ... segment_k}, suffix*: documents, options, answers to judge, which
could stand in any order. The relevant segment is moved to each place, the others keep their order,
and the model is asked again. With a(p) the mean over prompts where it stands at place p, of which
there are P (all k, or some),

    recency = a(last) - a(first)                               below 0: what stands first wins
    u_index = (a(first) + a(last)) / 2 - mean of a between     above 0: the middle is lost
    range   = max a(p) - min a(p)
    flips   = share of prompts whose answer is not the same at all P places

All places have the same prompts, so intervals of differences are of differences within a prompt
(bootstrap over prompts). A range is above 0 by chance alone: `chance` is its mean where each
prompt's places are shuffled, `p_value` how often that gave one as large.

Source: Liu et al. 2023, "Lost in the Middle" (arXiv 2307.03172), accuracy by place; Wang et al.
2024 (PINE, arXiv 2407.01100), answers that flip. Segments are moved as tokens, so that every order
has the same ones, and what a segment is called ("A.", "[1]") moves with it: order, not labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float

from interp.analysis.shards import in_shards
from interp.errors import UserError
from interp.evaluation import forced_logits, prepared, share_interval, token_after
from interp.intervention.base import InterventionError
from interp.intervention.segments import Range, check_ranges
from interp.model.hooked import HookedModel
from interp.tasks.prompts import about_of, as_prompts, describe, from_examples, spans_of

METRICS = ("accuracy", "probability", "choice")
DRAWS = 2000

ByPlace = Float[np.ndarray, "draw place"]


class PositionError(UserError):
    """Prompts whose segments can't be moved as asked."""


@dataclass(frozen=True, eq=False)
class PositionBias:
    """One row a prompt and place in `table`: `prompt, place`, its scores, and what was `said`.

    Scores: `accuracy` (are all of the answer's tokens the likeliest?), `probability` of the answer,
    and where prompts have choices `choice` (does the right one have the likeliest first token of
    them?). `said` is the likeliest choice, or without choices the likeliest next token.
    """

    table: pd.DataFrame
    metadata: dict[str, Any]

    @property
    def metrics(self) -> list[str]:
        return [metric for metric in METRICS if metric in self.table]

    def values(self, metric: str) -> Float[np.ndarray, "prompt place"]:
        """Each prompt's score at each place."""
        wide = self.table.pivot(index="prompt", columns="place", values=metric)
        return wide.to_numpy(float)

    def by_place(self) -> pd.DataFrame:
        """One row a metric and place: `metric, place, value, low, high, n`."""
        return _by_place(self, self.values, shares=("accuracy", "choice"))

    def changes(self, before: "PositionBias") -> pd.DataFrame:
        """What it is more than `before` at each place, in pairs of the same prompt.

        Raises `PositionError` where the two are not of the same prompts and places.
        """
        one, other = (found.table[["prompt", "place"]] for found in (self, before))
        same_task = self.metadata["task"] == before.metadata["task"]
        if not one.equals(other) or not same_task:
            raise PositionError("before: it has other prompts or other places.")
        return _by_place(self, lambda metric: self.values(metric) - before.values(metric))

    def summary(self) -> pd.DataFrame:
        """One row a metric and quantity: `metric, quantity, value, low, high, n, chance, p_value`.

        Quantities as in the module's docstring, `mean` over all places, and `flips` of what was
        said. `u_index` needs three places.
        """
        rows = [row for metric in self.metrics for row in self._quantities(metric)]
        said = self.table.groupby("prompt")["said"].nunique() > 1
        low, high = share_interval(int(said.sum()), len(said))
        about = {"low": low, "high": high, "n": len(said)}
        flips = {"metric": "said", "quantity": "flips", "value": float(said.mean()), **about}
        table = pd.DataFrame([*rows, flips])
        return table.reindex(
            columns=["metric", "quantity", "value", "low", "high", "n", "chance", "p_value"]
        )

    def _quantities(self, metric: str) -> list[dict]:
        values = self.values(metric)
        mean, drawn = values.mean(0)[None], resampled(values)
        rows = []
        for name, quantity in QUANTITIES.items():
            if name == "u_index" and values.shape[1] < 3:
                continue
            low, high = np.quantile(quantity(drawn), [0.025, 0.975])
            row = {"metric": metric, "quantity": name, "value": float(quantity(mean)[0])}
            rows.append({**row, "low": float(low), "high": float(high), "n": len(values)})
        by_chance, spread = ranges_by_chance(values), float(np.ptp(mean))
        as_large = int((by_chance >= spread - 1e-12).sum())
        about = {"chance": float(by_chance.mean()), "p_value": (1 + as_large) / (1 + DRAWS)}
        last = {"metric": metric, "quantity": "range", "value": spread, "n": len(values)}
        return [*rows, {**last, **about}]

    def plot(self, metric: str = "accuracy", **options):
        """A line over places with its intervals (see `interp.figures.profile`)."""
        from interp import figures

        rows = self.by_place()
        rows = rows[rows["metric"] == metric]
        return figures.profile(
            rows["place"], rows["value"], low=rows["low"], high=rows["high"],
            x_title="place of the relevant segment", y_title=metric, **options,
        )  # fmt: skip

    def __repr__(self) -> str:
        rows = self.summary().set_index(["metric", "quantity"])["value"]
        said = [
            f"{metric} {rows[metric, 'mean']:.3f}, range {rows[metric, 'range']:.3f}"
            for metric in self.metrics
        ]
        n, places = self.table["prompt"].nunique(), self.table["place"].nunique()
        flips = rows["said", "flips"]
        return f"PositionBias({'; '.join(said)}; flips {flips:.3f}; {n} prompts, {places} places)"


def position_bias(
    model: HookedModel,
    prompts,
    *,
    relevant: str = "relevant",
    segments: str = "segment_*",
    places: Sequence[int] | None = None,
    batch_size: int = 8,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> PositionBias:
    """How `model` (as it is now, interventions and all) answers with a segment at each place.

    Args:
        prompts: With answers, and spans of segments that touch each other; the same number in each
            prompt. `interp.tasks.documents` makes such.
        relevant: The span within the segment that is moved.
        segments: Names of the spans that are segments; with a star at its end, all that begin so.
        places: Where the relevant segment is put, from 0; None: everywhere.
        out: Folder to keep shards in: a killed run continues there and ends with the same table.

    Raises:
        PositionError: Prompts without answers, segments or that span, with different numbers of
            segments, or without such a place.
    """
    prompts = as_prompts(model, prompts)
    moved = everywhere(model, prompts, relevant, segments, places)
    settings = {
        "analysis": "position_bias",
        "relevant": relevant,
        "segments": segments,
        "places": sorted(set(moved["place"])),
        "task": describe(prompts),
        **model.provenance(),
    }

    def score(rows: Dataset) -> pd.DataFrame:
        return _asked(model, rows, batch_size)

    desc = "position bias" if progress else None
    table = in_shards(score, moved, 4 * batch_size, settings, out, resume, desc)
    return PositionBias(table.sort_values(["prompt", "place"], ignore_index=True), settings)


# Moving segments


def everywhere(
    model: HookedModel,
    prompts: Dataset,
    relevant: str = "relevant",
    segments: str = "segment_*",
    places: Sequence[int] | None = None,
) -> Dataset:
    """Each prompt with its relevant segment at each place: columns `prompt` and `place` are new."""
    if "answer_ids" not in prompts.column_names or not all(prompts["answer_ids"]):
        raise PositionError("prompts: some have no answer, so none can be right or wrong.")
    spans = spans_of(prompts) or [{}] * len(prompts)
    ranges = [_ranges(n, own, segments) for n, own in enumerate(spans)]
    if len({len(own) for own in ranges}) > 1:
        counts = sorted({len(own) for own in ranges})
        raise PositionError(f"prompts: they have {counts} segments; ask for each number by itself.")
    places = _places(places, len(ranges[0]))
    rows: list[dict] = []
    for n, row in enumerate(prompts.to_list()):
        own, parts = spans[n], ranges[n]
        which = _which(n, own, parts, relevant)
        row |= {"spans": own, "prompt": n}
        if row.get("choices"):
            row["choice_ids"] = [token_after(model, row, choice) for choice in row["choices"]]
        for place in places:
            order = [number for number in range(len(parts)) if number != which]
            order.insert(place, which)
            rows.append({**reordered(model.tokenizer, row, parts, order), "place": place})
    about = about_of(prompts.info.description)
    return from_examples(model, rows, task=about["task"], parameters=about["parameters"])


def reordered(
    tokenizer, row: dict[str, Any], ranges: Sequence[Range], order: Sequence[int]
) -> dict[str, Any]:
    """A prompt with its segments in another order; spans move along, but for those across edges.

    `ranges` are the segments' [start, end) in the text, side by side; `order[i]` is which of them
    stands i-th.
    """
    ids, begin, end = row["input_ids"], ranges[0][0], ranges[-1][1]
    new, moved = list(ids[:begin]), {}
    for number in order:
        start, stop = ranges[number]
        moved[start, stop] = len(new) - start
        new += ids[start:stop]
    spans = {}
    for name, (a, b) in row["spans"].items():
        inside = [by for (start, stop), by in moved.items() if start <= a and b <= stop]
        if inside:
            spans[name] = [a + inside[0], b + inside[0]]
        elif b <= begin or a >= end or (a <= begin and b >= end):
            spans[name] = [a, b]
    new += ids[end:]
    # the text of a chat has its special tokens, others do not
    written_out = tokenizer.decode(ids) == row["text"]
    text = tokenizer.decode(new, skip_special_tokens=not written_out)
    return {**row, "input_ids": new, "spans": spans, "text": text}


def _ranges(n: int, spans: dict[str, Sequence[int]], segments: str) -> list[Range]:
    stem = segments.removesuffix("*")
    chosen = [
        name for name in spans if name == segments or (stem != segments and name.startswith(stem))
    ]
    ranges = sorted({(int(spans[name][0]), int(spans[name][1])) for name in chosen})
    try:
        check_ranges(ranges, n, max((end for _, end in ranges), default=0))
    except InterventionError as error:
        raise PositionError(str(error)) from None
    return ranges


def _which(n: int, spans: dict[str, Sequence[int]], ranges: list[Range], relevant: str) -> int:
    if relevant not in spans:
        raise PositionError(
            f"relevant={relevant!r}: prompt {n} has no such span; it has {', '.join(spans)}."
        )
    a, b = spans[relevant]
    inside = [number for number, (start, end) in enumerate(ranges) if start <= a and b <= end]
    if not inside:
        raise PositionError(f"relevant={relevant!r}: in prompt {n} it is in no single segment.")
    return inside[0]


def _places(places: Sequence[int] | None, k: int) -> list[int]:
    places = list(range(k)) if places is None else sorted(set(places))
    if len(places) < 2 or not 0 <= places[0] <= places[-1] < k:
        raise PositionError(f"places={places}: two or more of 0 to {k - 1}, one a segment.")
    return places


# Asking


def _asked(model: HookedModel, rows: Dataset, batch_size: int) -> pd.DataFrame:
    """One row a prompt of `rows`, in their order."""
    given, found = prepared(model, rows), {}
    choices = rows["choice_ids"] if "choice_ids" in rows.column_names else None
    for forced in forced_logits(
        model,
        given["input_ids"],
        given["answer_ids"],
        spans=spans_of(given),
        batch_size=batch_size,
    ):
        probability = forced.losses.sum(1).neg().exp().tolist()
        correct, first = forced.greedy.tolist(), forced.real.int().argmax(1).tolist()
        for row, i in enumerate(forced.rows):
            own = {"accuracy": correct[row], "probability": probability[row]}
            logits = forced.logits[row, first[row]]
            if choices is None:
                said = int(logits.argmax())
            else:
                said = choices[i][int(logits[choices[i]].argmax())]
                own["choice"] = said == rows[i]["answer_ids"][0]
            about = {"prompt": rows[i]["prompt"], "place": rows[i]["place"]}
            found[i] = {**about, **own, "said": model.tokenizer.decode([said])}
    return pd.DataFrame([found[i] for i in range(len(rows))])


# What is made of it


def _recency(mean: ByPlace) -> Float[np.ndarray, " draw"]:
    return mean[:, -1] - mean[:, 0]


def _u_index(mean: ByPlace) -> Float[np.ndarray, " draw"]:
    return (mean[:, 0] + mean[:, -1]) / 2 - mean[:, 1:-1].mean(1)


QUANTITIES: dict[str, Callable[[ByPlace], Float[np.ndarray, " draw"]]] = {
    "mean": lambda mean: mean.mean(1),
    "recency": _recency,
    "u_index": _u_index,
}


def resampled(values: Float[np.ndarray, "prompt place"], seed: int = 0) -> ByPlace:
    """Means by place over prompts drawn with replacement, each with all its places."""
    n = len(values)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    return counts @ values / n


def ranges_by_chance(
    values: Float[np.ndarray, "prompt place"], seed: int = 0
) -> Float[np.ndarray, " draw"]:
    """Ranges of the means by place where each prompt's places are shuffled."""
    rng = np.random.default_rng(seed)
    return np.array([np.ptp(rng.permuted(values, axis=1).mean(0)) for _ in range(DRAWS)])


def _by_place(
    bias: PositionBias,
    values_of: Callable[[str], Float[np.ndarray, "prompt place"]],
    shares: Sequence[str] = (),
) -> pd.DataFrame:
    places, rows = sorted(bias.table["place"].unique()), []
    for metric in bias.metrics:
        values = values_of(metric)
        lows, highs = np.quantile(resampled(values), [0.025, 0.975], axis=0)
        for i, place in enumerate(places):
            low, high = lows[i], highs[i]
            if metric in shares:  # where all are right, resampling shows no spread
                low, high = share_interval(int(values[:, i].sum()), len(values))
            row = {"metric": metric, "place": int(place), "value": values[:, i].mean()}
            rows.append(row | {"low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)
