"""Rates over captions or questions, with intervals that know that images are what was sampled.

Every rate here is a function of sums over rows: hallucinated mentions over mentions, right answers
over questions. Rows of one image depend on each other, so images are drawn, with replacement and
all their rows together: with S the sums of each image and w the times that it was drawn,

    rate*  =  f(sum over images of w_i S_i),    w ~ multinomial(I, 1/I)

and the 95 % interval is that of the percentiles. A rate of 0 or 1 shows no spread however few
images there are; its other end is Wilson's, for as many trials as images that say anything.
A difference between two results draws the same images for both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from interp.errors import UserError
from interp.evaluation import share_interval

RESAMPLES = 2000

Sums = Mapping[str, Shaped[np.ndarray, " some"]]
Rates = dict[str, Float[np.ndarray, " some"]]


class MetricError(UserError):
    """Captions, answers or annotations that nothing can be measured on."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured, row by row; `image` says which rows belong together.

    A subclass names the columns of `table` that are added up, and says what rates their sums make.
    """

    table: pd.DataFrame
    metadata: dict[str, Any]

    quantities: ClassVar[tuple[str, ...]]
    shares: ClassVar[tuple[str, ...]]
    """The rates that lie between 0 and 1."""

    @staticmethod
    def rates(sums: Sums) -> Rates:
        """The rates of each of some sums, by name; NaN where nothing can be said."""
        raise NotImplementedError

    def __getitem__(self, rate: str) -> float:
        """One rate over all rows. Raises `MetricError` with the names there are."""
        found = self._rates()
        if rate not in found:
            raise MetricError(f"rate={rate!r}: one of {', '.join(found)}.")
        return found[rate]

    def summary(self) -> pd.DataFrame:
        """One row a rate: `metric, value, low, high, n`; n counts rows (captions, questions)."""
        drawn = self.rates(self._draws(self._sums()))
        rows = []
        for name, value in self._rates().items():
            low, high = self._interval(name, value, drawn[name])
            rows.append({"metric": name, "value": value, "low": low, "high": high})
        return pd.DataFrame(rows).assign(n=len(self.table))

    def by(self, column: str) -> pd.DataFrame:
        """The summary within each group of rows, such as `by("split")`."""
        if column not in self.table:
            raise MetricError(f"by={column!r}: no such column; {', '.join(self.table)}.")
        parts = [
            type(self)(rows, self.metadata).summary().assign(**{column: name})
            for name, rows in self.table.groupby(column, sort=False)
        ]
        return pd.concat(parts, ignore_index=True)[[column, "metric", "value", "low", "high", "n"]]

    def minus(self, other: "Measured") -> pd.DataFrame:
        """This result minus `other` on the same images, drawn together; columns as `summary()`.

        Raises `MetricError` where the two were not measured on the same images.
        """
        ours, theirs = self._sums(), other._sums()
        if type(self) is not type(other) or set(ours.index) != set(theirs.index):
            raise MetricError(
                "other: measured on other images; a paired difference needs the same ones."
            )
        theirs = theirs.loc[ours.index]
        before, after = other._rates(), self._rates()
        old, new = self.rates(self._draws(theirs)), self.rates(self._draws(ours))
        rows = []
        for name in after:
            low, high = percentiles(new[name] - old[name])
            value = after[name] - before[name]
            rows.append({"metric": name, "value": value, "low": low, "high": high})
        return pd.DataFrame(rows).assign(n=len(self.table))

    def _rates(self) -> dict[str, float]:
        """Over all rows."""
        total = {name: self.table[name].to_numpy().sum(keepdims=True) for name in self.quantities}
        return {name: float(value[0]) for name, value in self.rates(total).items()}

    def _sums(self) -> pd.DataFrame:
        """One row an image: the sums of its rows."""
        return self.table.groupby("image", sort=False)[list(self.quantities)].sum()

    def _draws(self, sums: pd.DataFrame) -> dict[str, Float[np.ndarray, " draw"]]:
        n = len(sums)
        weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        drawn = weights @ sums.to_numpy(float)
        return dict(zip(sums.columns, drawn.T, strict=True))

    def _interval(
        self, name: str, value: float, drawn: Float[np.ndarray, " draw"]
    ) -> tuple[float, float]:
        if name in self.shares and value in (0.0, 1.0):
            own = self._sums()
            rates = self.rates({column: own[column].to_numpy(float) for column in own})[name]
            n = int(np.isfinite(rates).sum())
            return share_interval(round(value) * n, n)
        return percentiles(drawn)


def percentiles(drawn: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """The middle 95 % of the draws that say anything."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def ratio(
    above: Shaped[np.ndarray, " some"], below: Shaped[np.ndarray, " some"]
) -> Float[np.ndarray, " some"]:
    """above / below; NaN, without a warning, where below is 0."""
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)


def table_of(results: Mapping[str, Measured]) -> pd.DataFrame:
    """Several results, `condition, metric, value, low, high, n`, as figures take them."""
    parts = [found.summary().assign(condition=name) for name, found in results.items()]
    return pd.concat(parts, ignore_index=True)[["condition", "metric", "value", "low", "high", "n"]]


def differences(results: Mapping[str, Measured]) -> pd.DataFrame:
    """Each result minus the first, paired by image; columns as in `table_of`."""
    (_, first), *others = results.items()
    parts = [found.minus(first).assign(condition=name) for name, found in others]
    if not parts:
        raise MetricError("results: a difference needs two at least.")
    return pd.concat(parts, ignore_index=True)[["condition", "metric", "value", "low", "high", "n"]]
