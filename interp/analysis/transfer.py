"""Do heads that were chosen on one task serve another? Each task learned on each task's heads.

Heads are chosen on task a (stage 1 of LoFiT), offsets are learned on task b anew, and b's test
prompts measure what they do. On the diagonal a task has its own heads; beside it stand as many
random heads, and the model as it is. Everything is repeated for each seed; intervals are bootstrap
intervals over seeds and prompts both, differences are paired by prompt.

Source: Yin, Ye & Durrett 2024, "LoFiT" (arXiv 2406.01563), figure 2. If heads hold what a task
needs, its own serve it better than another's; if any heads do, the rows are alike.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float
from tqdm.auto import tqdm

from interp.analysis.causality import crossed_interval
from interp.errors import UserError
from interp.evaluation import evaluate
from interp.heads import Head
from interp.intervention.descent import Tuning
from interp.intervention.lofit import OFFSETS, SELECTION, LoFiT
from interp.intervention.objectives import Kind
from interp.intervention.offsets import top_heads
from interp.model.hooked import HookedModel
from interp.runs import Run
from interp.tasks.prompts import as_prompts, describe

UNEDITED, RANDOM = "no edit", "random"
COLUMNS = {"accuracy": "correct", "loss": "loss"}

Metric = Literal["accuracy", "loss"]
Cell = tuple[str, str, int]
"""Whose heads, the task that is learned, and the seed."""


class TransferError(UserError):
    """Tasks that heads cannot be carried between, or a result that there is not."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A task's prompts with answers: to learn from, to say when to stop, to measure by."""

    train: Dataset
    validation: Dataset
    test: Dataset


@dataclass(frozen=True, eq=False)
class HeadTransfer:
    """What each task's heads do for each task.

    `samples` has a row for every test prompt of a cell: `heads, task, seed, prompt, correct, loss`,
    `heads` the name of a task, "random" or "no edit". `chosen` are the heads of (name, task, seed);
    random ones are drawn for each task beside its own.
    """

    samples: pd.DataFrame
    chosen: dict[Cell, tuple[Head, ...]]
    metadata: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row a cell and metric: `heads, task, metric, value, low, high, n, seeds`."""
        rows = [
            self._row(heads, task, metric, self._values(heads, task, metric))
            for heads, task in self._cells()
            for metric in COLUMNS
        ]
        return pd.DataFrame(rows)

    @property
    def differences(self) -> pd.DataFrame:
        """As `table`: each cell minus the task on its own heads, paired by seed and prompt."""
        rows = []
        for heads, task in self._cells():
            if heads != task:
                for metric in COLUMNS:
                    change = self._values(heads, task, metric) - self._values(task, task, metric)
                    rows.append(self._row(heads, task, metric, change))
        return pd.DataFrame(rows)

    def matrix(self, metric: Metric = "accuracy") -> pd.DataFrame:
        """Heads down, tasks across: the mean over seeds and prompts."""
        if metric not in COLUMNS:
            raise TransferError(f"metric={metric!r}: one of {', '.join(COLUMNS)}.")
        means = self.samples.groupby(["heads", "task"], sort=False)[COLUMNS[metric]].mean()
        table = means.astype(float).unstack("task")
        return table.loc[list(dict.fromkeys(self.samples["heads"]))]

    def relative(self, metric: Metric = "accuracy") -> pd.DataFrame:
        """The matrix in shares of what each task's own heads do."""
        table = self.matrix(metric)
        return table / pd.Series({task: table.loc[task, task] for task in table.columns})

    def plot(self, metric: Metric = "accuracy", **options):
        """The matrix (see `interp.figures.grid`)."""
        from interp import figures

        table = self.table[self.table["metric"] == metric]
        most = max(1.0, float(table["value"].max()))
        options = {"title": f"{metric}: heads of one task, offsets of another"} | options
        return figures.grid(
            table, "task", "heads", "value", colorbar=metric, limits=(0.0, most), **options
        )

    def __repr__(self) -> str:
        return (
            f"HeadTransfer(accuracy)\n{self.matrix().to_string(float_format=lambda x: f'{x:.3f}')}"
        )

    def _cells(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys(zip(self.samples["heads"], self.samples["task"])))

    def _values(self, heads: str, task: str, metric: Metric) -> Float[np.ndarray, "seed prompt"]:
        own = self.samples[(self.samples["heads"] == heads) & (self.samples["task"] == task)]
        wide = own.pivot(index="seed", columns="prompt", values=COLUMNS[metric])
        return wide.to_numpy(float)

    @staticmethod
    def _row(
        heads: str, task: str, metric: str, values: Float[np.ndarray, "seed prompt"]
    ) -> dict[str, Any]:
        low, high = crossed_interval(values)
        about = {"heads": heads, "task": task, "metric": metric, "value": values.mean()}
        return about | {"low": low, "high": high, "n": values.shape[1], "seeds": len(values)}


def head_transfer(
    model: HookedModel,
    tasks: Mapping[str, Parts],
    *,
    k: int | float = 0.1,
    seeds: Sequence[int] = (0,),
    objective: Kind = "answers",
    selection: Tuning = SELECTION,
    tuning: Tuning = OFFSETS,
    batch_size: int = 8,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> HeadTransfer:
    """Every task's offsets on every task's heads, and on random ones.

    Args:
        tasks: Name -> prompts in three parts.
        k: How many heads; a float is a share of all of them.
        seeds: Of noise, order of prompts, and random heads.
        out: Folder that keeps each cell, with what was learned as an intervention; a killed run
            goes on there.

    Other arguments as in `LoFiT.fit`. Raises `TransferError` for no task, or no seed.
    """
    names = list(tasks)
    if not names or not seeds or {UNEDITED, RANDOM} & set(names):
        raise TransferError(
            f"tasks={names}, seeds={list(seeds)}: at least one of each; {UNEDITED!r} and "
            f"{RANDOM!r} are names of controls."
        )
    parts = {name: _read(model, part) for name, part in tasks.items()}
    study = _Study(
        model, parts, k, tuple(seeds), objective, selection, tuning, batch_size, out, resume
    )
    run = None if out is None else Run.open(out, study.settings, resume)
    chosen = study.chosen()
    cells = list(_cells_of(names, seeds))
    samples = _measured(partial(study.measure, chosen), cells, run, progress)
    if run is not None:
        run.finish(cells=len(cells))
    return HeadTransfer(samples, chosen, study.settings)


def learned_in(out: str | Path, heads: str, task: str, seed: int) -> Path:
    """Where `head_transfer(out=out)` saves the offsets that it learned for a cell."""
    return _folder(out, heads, "for", task, seed)


@dataclass(frozen=True, eq=False)
class _Study:
    """What a transfer is made with; arguments as in `head_transfer`."""

    model: HookedModel
    parts: dict[str, Parts]
    k: int | float
    seeds: tuple[int, ...]
    objective: Kind
    selection: Tuning
    tuning: Tuning
    batch_size: int
    out: str | Path | None
    resume: bool

    @property
    def settings(self) -> dict[str, Any]:
        """All that the samples depend on."""
        return {
            "analysis": "head_transfer",
            "k": self.k,
            "seeds": list(self.seeds),
            "objective": self.objective,
            "selection": asdict(self.selection),
            "tuning": asdict(self.tuning),
            "tasks": {name: _about(part) for name, part in self.parts.items()},
            **self.model.provenance(),
        }

    def chosen(self) -> dict[Cell, tuple[Head, ...]]:
        """The heads of every cell: those of stage 1, and as many others."""
        found: dict[Cell, tuple[Head, ...]] = {}
        for task in self.parts:
            for seed in self.seeds:
                out = None if self.out is None else _folder(self.out, "heads of", task, seed)
                scores = LoFiT.select(
                    self.model, self.parts[task].train, tuning=self.selection,
                    **self._learning(task, seed, out),
                )  # fmt: skip
                top = top_heads(scores, self.k)
                found |= {(task, other, seed): tuple(top) for other in self.parts}
                found[RANDOM, task, seed] = tuple(scores.random(len(top), seed=seed))
        return found

    def measure(
        self, chosen: dict[Cell, tuple[Head, ...]], heads: str, task: str, seed: int
    ) -> pd.DataFrame:
        """What a cell's offsets do for the test prompts."""
        edit = (
            [] if heads == UNEDITED else self._offsets(chosen[heads, task, seed], heads, task, seed)
        )
        with self.model.intervene(edit):
            found = evaluate(
                self.model, self.parts[task].test, batch_size=self.batch_size, progress=False
            ).table
        about = {"heads": heads, "task": task, "seed": seed, "prompt": range(len(found))}
        return pd.DataFrame(about).assign(**{c: found[c] for c in COLUMNS.values()})

    def _offsets(self, chosen: tuple[Head, ...], heads: str, task: str, seed: int) -> LoFiT:
        out = None if self.out is None else learned_in(self.out, heads, task, seed)
        edit = LoFiT.fit(
            self.model, self.parts[task].train, chosen, tuning=self.tuning,
            **self._learning(task, seed, out),
        )  # fmt: skip
        if out is not None:
            edit.save_pretrained(out)
        return edit

    def _learning(self, task: str, seed: int, out: Path | None) -> dict[str, Any]:
        return {
            "validation": self.parts[task].validation,
            "objective": self.objective,
            "seed": seed,
            "out": out,
            "resume": self.resume,
            "progress": False,
        }


def _cells_of(names: list[str], seeds: Sequence[int]) -> Iterator[Cell]:
    for task in names:
        yield UNEDITED, task, seeds[0]  # nothing is drawn there
    for heads in (*names, RANDOM):
        for task in names:
            for seed in seeds:
                yield heads, task, seed


def _measured(measure, cells: list[Cell], run: Run | None, progress: bool) -> pd.DataFrame:
    """The samples of all cells; those that the folder has are not made again."""
    bar = tqdm(total=len(cells), desc="transfer", unit="cell", disable=not progress, leave=False)
    tables = {}
    with bar:
        left = range(len(cells)) if run is None else [i for i, _ in run.shards(len(cells), 1)]
        bar.update(len(cells) - len(left))
        for index in left:
            tables[index] = measure(*cells[index])
            if run is not None:
                run.save_shard(index, tables[index])
            bar.update()
    return pd.concat(tables.values() if run is None else run.tables(), ignore_index=True)


def _folder(out: str | Path, *words: object) -> Path:
    return Path(out) / "learned" / "-".join(re.sub(r"\W+", "-", str(word)) for word in words)


def _read(model: HookedModel, part: Parts) -> Parts:
    return Parts(*(as_prompts(model, data) for data in (part.train, part.validation, part.test)))


def _about(part: Parts) -> dict[str, Any]:
    return {name: describe(getattr(part, name)) for name in ("train", "validation", "test")}
