"""Where must the needed line stand, and where the right option? Position bias, and three remedies.

    python analyses/position_bias.py smollm2-135m --out runs/position-bias-study

After Liu et al. 2023 (arXiv 2307.03172) and Wang et al. 2024 (PINE, arXiv 2407.01100), on two tasks
whose segments could stand in any order:

1. Lines, one of which has the answer: how likely is it, with the needed line at each place?
2. Options with their letters: how often is the right one chosen, with it at each place?

Each in the same prompts as they are, under PINE, under PINE without new positions (segments see
each other and stay where they are), with the question read twice (RE2), and with all heads sharper
(Temperature). What changes is compared prompt by prompt. A run that was killed goes on.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

import interp
from interp import figures
from interp.analysis.position_bias import PositionBias, position_bias, resampled
from interp.model.hooked import HookedModel
from interp.tasks.documents import FOUND, HEADING
from telling import finish, show

CONDITIONS = {
    "as it is": [],
    "PINE": interp.PINE(),
    "PINE, no new positions": interp.PINE(order="input"),
    "question read twice": interp.RE2("question"),
    "sharper": interp.Temperature(None, 0.8),
}
WORDINGS = {"finds": (FOUND, HEADING), "codes": (interp.tasks.Needle(), "")}
RELEVANT = {"lines": "relevant", "options": "right_option"}
SAME = 1e-3  # probabilities that differ by less are the same but for rounding


def main() -> None:
    args = arguments()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, tuple[Dataset, list[int] | None]] = {
        "lines": (lines_of(model, args), args.places),
        "options": (options_of(model, args), None),
    }
    parts, said = {"places": [], "summary": [], "changes": []}, []
    for task, (prompts, places) in tasks.items():
        show(
            f"{task}: {len(prompts)} prompts, such as\n\n{prompts[0]['text']}{prompts[0]['answer']}"
        )
        found = measured(model, task, prompts, places, args)
        before = found["as it is"]
        for name, bias in found.items():
            about = {"task": task, "condition": name}
            parts["places"].append(bias.by_place().assign(**about))
            parts["summary"].append(bias.summary().assign(**about))
            if bias is not before:
                parts["changes"].append(bias.changes(before).assign(**about))
        for metric in before.metrics:
            figure(found, metric).write_html(args.out / f"{task}_{metric}.html")
        print(wide(parts["places"], task))
        said += [f"{task}: {sentence}" for sentence in sentences(found)]
        if task == "options":
            said.append(f"{task}: {letters_said(found, prompts)}")
    for name, tables in parts.items():
        pd.concat(tables, ignore_index=True).to_parquet(args.out / f"{name}.parquet")
    finish(said, args.out)


# Prompts


def lines_of(model: HookedModel, args) -> Dataset:
    wording, heading = WORDINGS[args.wording]
    return interp.tasks.documents(
        model, n=args.n, seed=args.seed, lines=args.lines, wording=wording, heading=heading
    )


def options_of(model: HookedModel, args) -> Dataset:
    """Multiple choice by letter, each option with its letter a segment."""
    pairs = interp.tasks.multiple_choice(model, n=args.n, seed=args.seed)
    return pairs.map(with_option_segments)


def with_option_segments(row: dict[str, Any]) -> dict[str, Any]:
    spans = dict(row["spans"])
    n = sum(name.startswith("label_") for name in spans)
    for i in range(1, n + 1):
        spans[f"segment_{i}"] = [spans[f"label_{i}"][0], spans[f"option_{i}"][1]]
    # from behind the full stop of the one fact on
    spans["question"] = [spans["color"][1] + 1, spans[f"option_{n}"][1]]
    return {"spans": spans}


# Measuring


def measured(
    model: HookedModel, task: str, prompts: Dataset, places: list[int] | None, args
) -> dict[str, PositionBias]:
    found = {}
    for name in args.conditions:
        with model.intervene(CONDITIONS[name]):
            found[name] = position_bias(
                model, prompts, relevant=RELEVANT[task], places=places,
                batch_size=args.batch_size, out=args.out / task / re.sub(r"\W+", "-", name),
            )  # fmt: skip
        print(f"{name}: {found[name]!r}")
    return found


def figure(found: dict[str, PositionBias], metric: str):
    """A line for each condition over places."""
    rows = pd.concat([bias.by_place().assign(condition=name) for name, bias in found.items()])
    rows = rows[rows["metric"] == metric]
    return figures.profile(
        rows["place"], rows["value"], low=rows["low"], high=rows["high"],
        series=rows["condition"], x_title="place of the relevant segment", y_title=metric,
    )  # fmt: skip


# What the numbers say


def sentences(found: dict[str, PositionBias]) -> list[str]:
    before = found["as it is"]
    others = [(name, bias) for name, bias in found.items() if bias is not before]
    return [said_of(before), *(said_of_change(name, bias, before) for name, bias in others)]


def letters_said(found: dict[str, PositionBias], prompts: Dataset) -> str:
    """A taste for some letters, which move with their options: no order explains it."""
    said = {"right are": pd.Series(prompts["answer"])}
    said |= {f"{name}: said are": bias.table["said"] for name, bias in found.items()}
    return "; ".join(f"{name} {shares(letters)}" for name, letters in said.items())


def shares(letters: pd.Series) -> str:
    found = letters.str.strip().value_counts(normalize=True).sort_index()
    return ", ".join(f"{letter} {share:.2f}" for letter, share in found.items())


def metric_of(bias: PositionBias) -> str:
    """Is the right choice the likeliest of the choices, whatever other words the model prefers?"""
    return "choice" if "choice" in bias.metrics else "accuracy"


def said_of(bias: PositionBias) -> str:
    metric, table = metric_of(bias), bias.by_place()
    rows = table[table["metric"] == metric].set_index("place")
    best, worst = rows["value"].idxmax(), rows["value"].idxmin()
    spread = quantity(bias, metric, "range")
    return (
        f"right at best {interval(rows.loc[best])} of the time, at place {best}, at worst "
        f"{interval(rows.loc[worst])}, at place {worst} (range {spread['value']:.2f}, by chance "
        f"{spread['chance']:.2f}, p = {spread['p_value']:.4f}); last minus first "
        f"{interval(quantity(bias, metric, 'recency'), '+')}; the answer depends on the place in "
        f"{interval(quantity(bias, 'said', 'flips'))} of the prompts"
    )


def said_of_change(name: str, bias: PositionBias, before: PositionBias) -> str:
    metric, still = metric_of(bias), "the place makes no difference"
    if np.ptp(bias.values("probability"), axis=1).max() >= SAME:
        spread, flips = quantity(bias, metric, "range"), quantity(bias, "said", "flips")
        still = (
            f"range {spread['value']:.2f} (p = {spread['p_value']:.4f}), the answer depends on the "
            f"place in {interval(flips)}"
        )
    right, probability = (mean_change(bias, before, m) for m in (metric, "probability"))
    return (
        f"{name}: {still}; over all places, prompt by prompt, the share right changes by "
        f"{interval(right, '+')}, the answer's probability by {interval(probability, '+')}"
    )


def quantity(bias: PositionBias, metric: str, name: str) -> dict[str, float]:
    """A row of the summary."""
    rows = bias.summary()
    row = rows[(rows["metric"] == metric) & (rows["quantity"] == name)].iloc[0]
    return {column: float(row[column]) for column in ("value", "low", "high", "chance", "p_value")}


def mean_change(bias: PositionBias, before: PositionBias, metric: str) -> dict[str, float]:
    """Over all places, in pairs of the same prompt."""
    change = bias.values(metric) - before.values(metric)
    low, high = np.quantile(resampled(change).mean(1), [0.025, 0.975])
    return {"value": float(change.mean()), "low": float(low), "high": float(high)}


def interval(row, sign: str = "") -> str:
    return f"{row['value']:{sign}.2f} ({row['low']:{sign}.2f} to {row['high']:{sign}.2f})"


def wide(tables: list[pd.DataFrame], task: str) -> str:
    """Conditions by places, one table a metric."""
    table = pd.concat(tables)
    table = table[table["task"] == task]
    parts = []
    for metric in table["metric"].unique():
        rows = table[table["metric"] == metric]
        shown = rows.pivot(index="condition", columns="place", values="value")
        shown = shown.reindex(rows["condition"].unique())
        parts.append(f"\n{metric}\n{shown.to_string(float_format=lambda x: f'{x:.3f}')}")
    return "\n".join(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/position-bias-study"))
    parser.add_argument("--n", type=int, default=96, help="prompts of each task")
    parser.add_argument("--lines", type=int, default=10)
    parser.add_argument("--places", type=int, nargs="+", default=[0, 2, 4, 7, 9])
    parser.add_argument("--wording", choices=[*WORDINGS], default="finds", help="of the lines")
    parser.add_argument(
        "--conditions", nargs="+", choices=[*CONDITIONS], default=[*CONDITIONS],
        help="the first has to be 'as it is'",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    if args.conditions[0] != "as it is":
        parser.error("--conditions: the first has to be 'as it is', which others are compared with")
    return args


if __name__ == "__main__":
    main()
