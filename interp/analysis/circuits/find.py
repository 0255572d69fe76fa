"""Circuits: the heads that carry a task, found by themselves, with what they do and what they miss.

1. Every head gets a score on one half of the pairs: how much of the gap between the clean and the
   corrupted prompt it moves (`method`).
2. Heads are kept from the largest |score| down (a head that works against the answer belongs to the
   circuit too), and the faithfulness of each size is measured on the same half; the circuit is the
   smallest one that reaches `target`. What keeping means: `keeping`.
3. What is reported is measured on the *other* half: faithfulness, the complement (completeness), as
   many heads drawn at random from the same layers, and what leaving out each member costs.

Sources: Wang et al. 2022 (arXiv 2211.00593) for faithfulness, completeness and minimality; Conmy et
al. 2023, ACDC (arXiv 2304.14997) for the greedy search, here over heads; Syed et al. 2023 (arXiv
2310.10348) and Hanna et al. 2024 (arXiv 2403.17806) for scores by gradients; Merullo et al. 2024
(arXiv 2310.08744) for the walk back along paths. Circuits of edges: `edges`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.integrate import trapezoid

from interp.analysis.circuits.importance import METHODS, Scorer, by_strength
from interp.analysis.circuits.keeping import circuit_faithfulness, kept_values, mask_of, share
from interp.analysis.paired import Metric, PairError, check_pairs, metric_of
from interp.errors import UserError
from interp.files import read_json, write_json
from interp.heads import Head, HeadScores, heads_of
from interp.model.hooked import HookedModel
from interp.tasks.prompts import describe

RANDOM_DRAWS = 10


class CircuitError(UserError):
    """A circuit that cannot be found as asked, compared, or read."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """The heads of a task's circuit, and how good a circuit they are.

    `curve` (`size, faithfulness, low, high, complement, ...`) holds every size that was measured on
    the held-out pairs, `tested` the circuit itself beside random ones, `minimality` what leaving
    out each member costs there, in units of faithfulness.
    """

    members: tuple[Head, ...]
    heads: HeadScores
    curve: pd.DataFrame
    tested: pd.DataFrame
    minimality: pd.DataFrame
    metadata: dict[str, Any]

    @property
    def faithfulness(self) -> float:
        """Share of the task that the members do by themselves, on the pairs that test them."""
        return float(self.tested["faithfulness"].iloc[0])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `faithfulness`, over pairs."""
        return float(self.tested["low"].iloc[0]), float(self.tested["high"].iloc[0])

    @property
    def complement(self) -> float:
        """Share of the task that is left without the members: low where the circuit is complete."""
        return float(self.tested["complement"].iloc[0])

    @property
    def area(self) -> dict[str, float]:
        """Area under the curve of faithfulness over the share of heads: linear, and over its log.

        On the linear axis half of the area lies between 50 and 100 % of heads; the log axis, from
        one head to all, is where small circuits count.
        """
        curve = self.curve[self.curve["size"] > 0]
        size, value = curve["size"].to_numpy(float), curve["faithfulness"].to_numpy(float)
        whole = self.curve["size"].to_numpy(float) / size.max()
        return {
            "linear": float(trapezoid(self.curve["faithfulness"].to_numpy(float), whole)),
            "log": float(trapezoid(value, np.log(size)) / np.log(size.max())),
        }

    def plot(self, **options):
        """Faithfulness against size, with the complement and the chosen size."""
        from interp import figures

        options.setdefault("title", f"Circuit of {self.metadata['task']['task']}")
        return figures.faithfulness_curve(self.curve, self.tested, **options)

    def save(self, folder: str | Path) -> Path:
        """Write `circuit.json`, `heads.parquet`, `curve.parquet`, `tested.parquet`, ..."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.heads.save(folder / "heads.parquet")
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)
        about = {"members": [str(head) for head in self.members], "metadata": self.metadata}
        write_json(folder / "circuit.json", {"format": FORMAT, "version": VERSION, **about})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Circuit":
        """Read what `save` wrote; `CircuitError` where there is none."""
        folder = Path(folder)
        about = read_json(folder / "circuit.json")
        if about is None or about.get("format") != FORMAT or about.get("version", 0) > VERSION:
            raise CircuitError(
                f"{folder}: holds no circuit that this interp reads (circuit.json); make one with "
                "find_circuit(...).save(folder) or `interp circuit`."
            )
        tables = {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}
        return cls(
            heads_of(about["members"]),
            HeadScores.load(folder / "heads.parquet"),
            metadata=about["metadata"],
            **tables,
        )

    def __repr__(self) -> str:
        low, high = self.interval
        shown = ", ".join(map(str, self.members[:6])) + (", ..." if len(self.members) > 6 else "")
        return (
            f"Circuit({len(self.members)} of {len(self.heads)} heads: {shown}; faithfulness "
            f"{self.faithfulness:.2f} [{low:.2f}, {high:.2f}], without them {self.complement:.2f})"
        )


FORMAT, VERSION = "interp.circuit", 1
TABLES = ("curve", "tested", "minimality")


def find_circuit(
    model: HookedModel,
    pairs: Dataset,
    method: str | Scorer = "patching",
    metric: str | Metric = "logit_diff",
    *,
    target: float = 0.8,
    size: int | None = None,
    draws: int = RANDOM_DRAWS,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Circuit:
    """Find the circuit of heads of the task that `pairs` pose, and measure it on other pairs.

    Args:
        pairs: From `interp.tasks`; every second one finds the circuit, the others test it.
        method: How heads are scored: one of `METHODS`, or a function (model, pairs, metric,
            progress) -> HeadScores.
        target: The faithfulness that the smallest circuit must reach where it is searched for.
        size: Take so many heads instead.
        draws: Random circuits of as many heads from the same layers, beside it.
        batch_size: Prompts in one pass; default what is fast and fits the memory.

    Raises:
        CircuitError: Fewer than four pairs, an unknown method, a target that no circuit reaches.
        PairError: As `activation_patching`; also where clean and corrupted prompts have no gap.
    """
    check_pairs(pairs)
    name, _ = metric_of(metric)
    if len(pairs) < 4:
        raise CircuitError(f"pairs: {len(pairs)}; four or more, half of which test the circuit.")
    searched = pairs.select(range(0, len(pairs), 2))
    tested = pairs.select(range(1, len(pairs), 2))
    scorer, method_name = _scorer(method)
    scores = scorer(model, searched, metric, progress)
    order = by_strength(scores)
    run = Measure(model, metric, batch_size, progress)
    if size is None:
        size = _smallest_size(run, searched, order, target)
    elif not 0 < size <= len(order):
        raise CircuitError(f"size={size}: from 1 to {len(order)}, the number of heads scored.")
    members = tuple(order[:size])
    curve = run.curve(tested, order, sorted({*_sizes(len(order)), size}))
    return Circuit(
        members,
        scores,
        curve,
        run.tested(tested, members, random_circuits(model, members, draws, seed)),
        run.minimality(tested, members),
        {
            "analysis": "find_circuit",
            "method": method_name,
            "metric": name,
            "target": target,
            "draws": draws,
            "seed": seed,
            "pairs": {"searched": len(searched), "tested": len(tested)},
            "task": describe(pairs),
            **model.provenance(),
        },
    )


@dataclass(frozen=True, eq=False)
class Measure:
    """Circuits of heads on some pairs."""

    model: HookedModel
    metric: str | Metric
    batch_size: int | None
    progress: bool

    def faithfulness(self, pairs: Dataset, circuits: dict[str, Sequence[Head]]) -> pd.DataFrame:
        """As `circuit_faithfulness`."""
        options = {"batch_size": self.batch_size, "progress": self.progress}
        return circuit_faithfulness(self.model, pairs, circuits, self.metric, **options)

    def curve(self, pairs: Dataset, order: list[Head], sizes: list[int]) -> pd.DataFrame:
        """Faithfulness of the first heads of `order`, for each size."""
        found = self.faithfulness(pairs, {str(size): order[:size] for size in sizes})
        return found.drop(columns="circuit")

    def tested(
        self, pairs: Dataset, members: Sequence[Head], random: list[tuple[Head, ...]]
    ) -> pd.DataFrame:
        """The circuit, then the random ones."""
        named = {f"random {n}": heads for n, heads in enumerate(random)}
        return self.faithfulness(pairs, {"circuit": members, **named})

    def minimality(self, pairs: Dataset, members: Sequence[Head]) -> pd.DataFrame:
        """What leaving out each member costs: columns `layer, head, cost, low, high`."""
        masks = [mask_of(self.model, members)] * (len(members) + 3)
        masks = torch.stack(masks)
        masks[0], masks[1] = True, False
        for row, head in enumerate(members):
            masks[3 + row, head.layer, head.head] = False
        values = kept_values(self.model, pairs, masks, self.metric, self.batch_size, self.progress)
        whole, nothing, kept = values[:, 0], values[:, 1], values[:, 2]
        lost = kept[:, None] - values[:, 3:] + nothing[:, None]
        cost, low, high = share(lost, whole, nothing)
        where = {"layer": [h.layer for h in members], "head": [h.head for h in members]}
        return pd.DataFrame({**where, "cost": cost, "low": low, "high": high})


def random_circuits(
    model: HookedModel, members: Sequence[Head], draws: int, seed: int
) -> list[tuple[Head, ...]]:
    """As many heads, as many from each layer, drawn from all that the layer has."""
    generator = np.random.default_rng(seed)
    counts: dict[int, int] = {}
    for head in members:
        counts[head.layer] = counts.get(head.layer, 0) + 1
    return [
        tuple(
            Head(layer, int(h))
            for layer, count in sorted(counts.items())
            for h in sorted(generator.choice(model.cfg.n_heads, count, replace=False))
        )
        for _ in range(draws)
    ]


def _sizes(n_heads: int, n: int = 16) -> list[int]:
    """From none to all, evenly spaced on a log scale."""
    spaced = np.unique(np.geomspace(1, n_heads, n).round().astype(int))
    return [0, *spaced.tolist()]


def _smallest_size(run: Measure, pairs: Dataset, order: list[Head], target: float) -> int:
    """The smallest circuit that reaches `target`: among sizes far apart, then between two."""
    sizes = _sizes(len(order))
    size = _smallest(run.curve(pairs, order, sizes), target)
    before = sizes[sizes.index(size) - 1]
    between = np.unique(np.linspace(before + 1, size, 16).round().astype(int)).tolist()
    return _smallest(run.curve(pairs, order, between), target)


def _smallest(curve: pd.DataFrame, target: float) -> int:
    if curve["faithfulness"].isna().any():
        raise PairError(
            "pairs: with all heads the model does no better than with all heads of the corrupted "
            "prompts, so there is no gap that a circuit could explain. Does it do this task at all "
            "(interp.evaluate)? metric='kl' compares whole distributions instead."
        )
    reached = curve[(curve["faithfulness"] >= target) & (curve["size"] > 0)]
    if reached.empty:
        best = curve["faithfulness"].max()
        raise CircuitError(f"target={target}: no circuit reaches it (at most {best:.2f}).")
    return int(reached["size"].min())


def _scorer(method: str | Scorer) -> tuple[Scorer, str]:
    if isinstance(method, str):
        if method not in METHODS:
            raise CircuitError(f"method={method!r}: one of {', '.join(METHODS)}, or a function.")
        return METHODS[method], method
    return method, getattr(method, "__name__", type(method).__name__)
