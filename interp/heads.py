"""`Head` and `HeadScores`: the currency between analysis passes, reports and interventions.

A `HeadScores` is a tidy table, one row a head (`layer, head, score, std, n, tower` and what a
pass adds), with metadata that say where it comes from. `score` is the mean over n samples, `std`
their sample standard deviation (n - 1 in the denominator; NaN below two samples, since one sample
says nothing about the spread). A head without any sample has n = 0 and a NaN score.

Tables of disjoint samples merge into the table of all of them: with n_i, m_i, s_i the parts,

    n = sum n_i,   m = sum n_i m_i / n,   (n - 1) s^2 = sum [(n_i - 1) s_i^2 + n_i (m_i - m)^2]

(Chan, Golub, LeVeque 1979), which says the same as adding up sums and sums of squares but does
not cancel when the spread is small beside the mean.
"""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped
from scipy import stats

from interp.errors import UserError
from interp.files import write_atomically
from interp.provenance import plain

FORMAT = "interp.head_scores"
VERSION = 1

KEY = ["tower", "layer", "head"]
COLUMNS = ["layer", "head", "score", "std", "n", "tower"]

# Facts about one part of a run; all other metadata must agree before tables merge.
PER_PART = ("prompts", "shard", "created", "seconds", "resumed")


class HeadError(UserError):
    """A head that cannot be read, or is not there."""


class ScoresError(UserError):
    """A table of head scores, or a file of one, that cannot be what was asked for."""


@dataclass(frozen=True, order=True)
class Head:
    """One attention head, counted from 0. Printed `L3H5`, in another tower `vision:L3H5`."""

    layer: int
    head: int
    tower: str = "text"

    def __post_init__(self):
        for name in ("layer", "head"):
            object.__setattr__(self, name, _index(getattr(self, name), name))

    def __str__(self) -> str:
        name = f"L{self.layer}H{self.head}"
        return name if self.tower == "text" else f"{self.tower}:{name}"

    @classmethod
    def parse(cls, value) -> "Head":
        """Read `Head(3, 5)`, "L3H5", "3.5", "3-5", "vision:L3H5", (3, 5) or (3, 5, "vision")."""
        if isinstance(value, Head):
            return value
        if isinstance(value, str):
            return cls._from_text(value)
        if isinstance(value, tuple | list) and len(value) in (2, 3):
            layer, head, *tower = value
            return cls(_index(layer, "layer"), _index(head, "head"), *tower)
        hint = " A number loses the last zero of 3.10: write it as text." * isinstance(value, float)
        raise HeadError(f"head {value!r}: write it as 'L3H5', '3.5', '3-5' or (3, 5).{hint}")

    @classmethod
    def _from_text(cls, text: str) -> "Head":
        found = re.fullmatch(
            r"(?:(?P<tower>[A-Za-z]\w*):)?(?:L(\d+)H(\d+)|(\d+)[.-](\d+))",
            text.strip(),
            flags=re.IGNORECASE | re.ASCII,
        )
        if not found:
            raise HeadError(f"head {text!r}: write it as 'L3H5', '3.5' or '3-5' (layer first).")
        layer, head = (int(number) for number in found.groups()[1:] if number is not None)
        return cls(layer, head, found["tower"] or "text")


def _index(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise HeadError(f"{name}={value!r}: a whole number from 0 on.")
    return int(value)  # numpy's integers print and save badly


def heads_of(heads) -> tuple[Head, ...]:
    """What users write for heads, as a tuple without doubles, in their order.

    One head in any form that `Head.parse` reads, text with several ("3.5, L4H1"), an iterable of
    heads, or a `HeadScores`, which stands for every head in its table.
    """
    if isinstance(heads, HeadScores):
        return tuple(heads.heads)
    if isinstance(heads, str):
        heads = [part for part in re.split(r"[,;\s]+", heads) if part]
    elif isinstance(heads, Head) or _is_pair(heads):
        heads = [heads]
    elif not isinstance(heads, Iterable):
        raise HeadError(f"heads={heads!r}: a list of heads, such as ['L3H5', (4, 1)].")
    return tuple(dict.fromkeys(Head.parse(head) for head in heads))


def _is_pair(value) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) in (2, 3)
        and all(isinstance(number, Integral) for number in value[:2])
    )


@dataclass(frozen=True)
class Overlap:
    """How many of two top-k lists are the same heads, against chance.

    `p_value`: the chance of at least so many shared heads if one list had been drawn at random,
    `expected`: the mean number then.
    """

    shared: tuple[Head, ...]
    jaccard: float
    p_value: float
    expected: float
    k: int
    n_heads: int


class HeadScores:
    """A score for each head, its spread, and where it comes from. Not to be changed in place.

    `table` needs the columns `layer, head, score`; `std` (NaN), `n` (1) and `tower` ("text") are
    filled in, other columns are kept. `metadata` must be expressible in JSON; by custom they hold
    `analysis`, `model` and the parameters. `samples` [prompt, row of `table`] are the numbers
    behind the means, if they are kept.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        metadata: dict | None = None,
        *,
        samples: Float[np.ndarray, "prompt row"] | None = None,
    ):
        self._table, order = _tidy(table)
        self._metadata = {key: plain(value, key) for key, value in (metadata or {}).items()}
        self._samples = None if samples is None else samples[:, order]

    @classmethod
    def from_samples(
        cls,
        samples: Shaped[Any, "prompt layer head"],
        tower: str = "text",
        *,
        layers: Sequence[int] | None = None,
        keep_samples: bool = False,
        **metadata,
    ) -> "HeadScores":
        """Mean, std and n over prompts. NaN: this prompt says nothing about this head.

        `layers` numbers the layer axis where a model does not have attention in every layer.
        """
        values = as_numpy(samples)
        n_prompts, n_layers, n_heads = values.shape
        layer, head = np.divmod(np.arange(n_layers * n_heads), max(n_heads, 1))
        if layers is not None:
            layer = np.asarray(layers)[layer]
        where = pd.DataFrame({"layer": layer, "head": head, "tower": tower})
        return cls.from_columns(
            where, values.reshape(n_prompts, n_layers * n_heads), metadata, keep_samples
        )

    @classmethod
    def from_columns(
        cls, where: pd.DataFrame, samples, metadata: dict, keep_samples: bool = True
    ) -> "HeadScores":
        """Mean, std and n of `samples` [prompt row]; `where` [row] has `layer, head, tower`."""
        infinite = _heads(where[np.isinf(samples).any(axis=0)])
        if infinite:
            raise ScoresError(
                f"samples: {len(infinite)} heads have infinite values (first: {infinite[0]})."
            )
        mean, std, n = mean_std_n(samples)
        table = where.assign(score=mean, std=std, n=n)
        return cls(table, metadata, samples=samples if keep_samples else None)

    @classmethod
    def merge(cls, parts: Iterable["HeadScores"]) -> "HeadScores":
        """The table of all samples from tables of disjoint samples, in any grouping.

        Metadata must agree but for facts of one part (`prompts`, `shard`, ...), which are listed
        under `parts`. Other float columns count as means over the same samples; other columns
        must agree. Samples are kept where every part kept them.
        """
        parts = list(parts)
        if not parts:
            raise ScoresError("parts: nothing to merge; give at least one HeadScores.")
        metadata = _merged_metadata([part.metadata for part in parts])
        table = _merged_table([part._table for part in parts])
        return cls(table, metadata, samples=_merged_samples(parts, table))

    @property
    def table(self) -> pd.DataFrame:
        """One row a head: `layer, head, score, std, n, tower` and what the pass added."""
        return self._table.copy()

    @property
    def metadata(self) -> dict:
        """Where the scores come from (a copy; see `with_metadata`)."""
        return copy.deepcopy(self._metadata)

    @property
    def samples(self) -> Float[np.ndarray, "prompt row"] | None:
        """The numbers behind the means, a column for each row of `table`; None if not kept."""
        return None if self._samples is None else self._samples.copy()

    @property
    def heads(self) -> list[Head]:
        """All heads in the order of `table`."""
        return _heads(self._table)

    @property
    def towers(self) -> list[str]:
        return sorted(self._table["tower"].unique())

    @property
    def matrix(self) -> Float[np.ndarray, "layer head"]:
        """Scores as [layer, head]; NaN where a head was not scored. One tower only."""
        return self._as_matrix("score")

    @property
    def counts(self) -> Int[np.ndarray, "layer head"]:
        """n as [layer, head]; 0 where a head was not scored."""
        return np.nan_to_num(self._as_matrix("n")).astype(np.int64)

    def tower(self, name: str) -> "HeadScores":
        """The heads of one tower."""
        rows = (self._table["tower"] == name).to_numpy()
        if not rows.any():
            raise ScoresError(f"tower={name!r}: there are {', '.join(self.towers)}.")
        samples = None if self._samples is None else self._samples[:, rows]
        return HeadScores(self._table[rows], self._metadata, samples=samples)

    def with_metadata(self, **more) -> "HeadScores":
        """The same scores, with `more` added to the metadata."""
        return HeadScores(self._table, {**self._metadata, **more}, samples=self._samples)

    def interval(self, confidence: float = 0.95) -> pd.DataFrame:
        """`table` with `low` and `high`, the t interval of each mean (NaN below two samples)."""
        if not 0 < confidence < 1:
            raise ScoresError(f"confidence={confidence}: between 0 and 1, such as 0.95.")
        n = self._table["n"].where(self._table["n"] > 1)
        half = stats.t.ppf((1 + confidence) / 2, n - 1) * self._table["std"] / np.sqrt(n)
        score = self._table["score"]
        return self._table.assign(low=score - half, high=score + half)

    def top(
        self,
        k: int | None = None,
        *,
        fraction: float | None = None,
        threshold: float | None = None,
    ) -> list[Head]:
        """Heads by falling score: the first `k`, the first `fraction`, or all above `threshold`.

        Ties go to the lower layer, then the lower head. Heads without a score are never among
        them, and `fraction` counts those that have one (rounded, at least one head).
        """
        if sum(value is not None for value in (k, fraction, threshold)) != 1:
            raise ScoresError("top: give exactly one of k, fraction and threshold.")
        ranked = self._ranked()
        if threshold is not None:
            return _heads(ranked[ranked["score"] > threshold])
        if fraction is not None:
            if not 0 < fraction <= 1:
                raise ScoresError(f"fraction={fraction}: above 0 and at most 1.")
            k = min(len(ranked), max(1, round(fraction * len(ranked))))
        return _heads(ranked.iloc[: _check_k(k, len(ranked))])

    def random(self, k: int, seed: int, match: str | None = None, exclude=()) -> list[Head]:
        """`k` heads that are not among `top(k)`: the control of an experiment on `top(k)`.

        Drawn without replacement from the other scored heads; with `match="layer"` as many from
        each layer as `top(k)` has there. `exclude` names more heads that must not be drawn.
        """
        _check_match(match)
        top = self.top(k)
        others = [head for head in _heads(self._ranked()) if head not in {*top, *heads_of(exclude)}]
        stratum = _stratum(match)
        wanted, pools = Counter(map(stratum, top)), _grouped(sorted(others), stratum)
        generator = np.random.default_rng(seed)
        drawn: list[Head] = []
        for place in sorted(wanted):
            pool = pools.get(place, [])
            if len(pool) < wanted[place]:
                raise ScoresError(
                    f"random(k={k}, match={match!r}): {wanted[place]} heads are wanted"
                    f"{f' from {_place_name(place)}' if match else ''}, and {len(pool)} are left "
                    "beside the top and the excluded ones. Take a smaller k"
                    f"{' or match=None' if match else ''}."
                )
            chosen = generator.choice(len(pool), wanted[place], replace=False)
            drawn += [pool[i] for i in chosen]
        return sorted(drawn)

    def correlation(self, other: "HeadScores", method: str = "spearman") -> float:
        """Rank ("spearman") or linear ("pearson") correlation over the heads that both score."""
        methods: dict[str, Callable] = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}
        if method not in methods:
            raise ScoresError(f"method={method!r}: one of {', '.join(methods)}.")
        common = self._common(other)
        if len(common) < 3:
            raise ScoresError(f"other: only {len(common)} heads are scored in both; 3 are needed.")
        return float(methods[method](common["score"], common["score_other"]).statistic)

    def overlap(self, other: "HeadScores", k: int, match: str | None = None) -> Overlap:
        """How far the two top-k lists agree, among the heads that both score.

        The null draws k heads at random (hypergeometric), with `match="layer"` as many in each
        layer as the list has there (a sum of hypergeometrics). Both are exact: no permutations.
        """
        _check_match(match)
        common = self._common(other)
        k = _check_k(k, len(common), "heads scored in both")
        ours = _heads(_by_score(common).iloc[:k])
        theirs = _heads(_by_score(common.assign(score=common["score_other"])).iloc[:k])
        shared = tuple(sorted(set(ours) & set(theirs)))
        null = overlap_null(_heads(common), ours, theirs, match)
        return Overlap(
            shared=shared,
            jaccard=len(shared) / max(1, 2 * k - len(shared)),
            p_value=float(min(1.0, null[len(shared) :].sum())),
            expected=float(null @ np.arange(len(null))),
            k=k,
            n_heads=len(common),
        )

    def split(self, labels: Sequence[Hashable]) -> dict[Hashable, "HeadScores"]:
        """One `HeadScores` for each label, from kept samples: `scores.split(prompts["length"])`."""
        if self._samples is None:
            raise ScoresError(
                "split: the single samples were not kept. Score with keep_samples=True."
            )
        if len(labels) != len(self._samples):
            raise ScoresError(
                f"labels: {len(labels)} for {len(self._samples)} samples; give one for each."
            )
        rows: dict[Hashable, list[int]] = {}
        for row, label in enumerate(labels):
            rows.setdefault(label, []).append(row)
        where = self._table[KEY]
        return {
            label: self.from_columns(where, self._samples[chosen], self._metadata, True)
            for label, chosen in rows.items()
        }

    def halves(self, seed: int | None = None) -> tuple["HeadScores", "HeadScores"]:
        """Every other sample against the rest; with `seed` a random half against the other."""
        n = 0 if self._samples is None else len(self._samples)
        labels = np.arange(n) % 2
        if seed is not None:
            labels = np.random.default_rng(seed).permutation(labels)
        parts = self.split(labels.tolist())
        if len(parts) < 2:
            raise ScoresError(f"halves: {n} samples cannot be halved; two are needed.")
        return parts[0], parts[1]

    def save(self, path: str | os.PathLike) -> Path:
        """Write parquet, or by the suffix `.json` the published retrieval-head JSON.

        The file appears whole or not at all. The JSON has no place for metadata; it holds the
        samples where they are kept, else the mean.
        """
        path = Path(path)
        if path.suffix not in (".parquet", ".json"):
            raise ScoresError(f"path {path.name}: must end in .parquet or .json.")
        published = json.dumps(self._as_published()) if path.suffix == ".json" else None

        def write(temporary: Path) -> None:
            if published is None:
                pq.write_table(self._as_arrow(), temporary, compression="zstd")
            else:  # on one line: readers call json.loads(file.readline())
                temporary.write_text(f"{published}\n", encoding="utf-8")

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, write)
        except OSError as error:
            raise ScoresError(f"{path}: cannot be written ({error.strerror or error}).") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike, *, keep_samples: bool = False) -> "HeadScores":
        """Read what `save` wrote, or a published retrieval-head JSON.

        Parquet brings its samples along; for a JSON of many samples, ask with `keep_samples`.
        """
        path = Path(path)
        if not path.is_file():
            raise ScoresError(f"{path}: there is no such file.")
        if path.suffix == ".json":
            return _load_published(path, keep_samples)
        return _load_parquet(path)

    def plot(self, **options):
        """The layer x head map; `options` go to `interp.figures.head_map`."""
        from interp import figures

        matrix = self.matrix
        options.setdefault("title", self._name())
        options.setdefault("colorbar", "score")
        options.setdefault("counts", self.counts)
        options.setdefault("diverging", bool((matrix < 0).any()))
        return figures.head_map(matrix, **options)

    def __len__(self) -> int:
        return len(self._table)

    __iter__ = None  # without it, Python would iterate by asking for scores[0]

    def __getitem__(self, head) -> dict:
        head = Head.parse(head)
        found = self._table.loc[
            (self._table["layer"] == head.layer)
            & (self._table["head"] == head.head)
            & (self._table["tower"] == head.tower)
        ]
        if found.empty:
            raise HeadError(f"{head}: not scored here. {self._extent()}")
        return found.iloc[0].to_dict()

    def __repr__(self) -> str:
        best = self._ranked().iloc[:5]
        shown = ", ".join(f"{h} {score:.3g}" for h, score in zip(_heads(best), best["score"]))
        return f"HeadScores({self._name()}, {len(self)} heads; top: {shown or 'none'})"

    def _repr_html_(self) -> str:
        from html import escape

        best = self._ranked().iloc[:5]
        rows = "".join(
            f"<tr><td>{head}</td><td>{row['score']:.4g}</td><td>{row['std']:.3g}</td>"
            f"<td>{row['n']}</td></tr>"
            for head, (_, row) in zip(_heads(best), best.iterrows())
        )
        return (
            f"<div><b>{escape(self._name())}</b>, {len(self)} heads; the first five:"
            "<table><thead><tr><th>head</th><th>score</th><th>std</th><th>n</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )

    def _name(self) -> str:
        analysis = str(self._metadata.get("analysis", "scores")).replace("_", " ")
        model = self._metadata.get("model")
        model = model.get("name", "") if isinstance(model, dict) else model
        return f"{analysis} of {model}" if model else analysis

    def _extent(self) -> str:
        if not len(self):
            return "The table is empty."
        layer, head = self._table["layer"], self._table["head"]
        return (
            f"There are layers {layer.min()}-{layer.max()}, heads {head.min()}-{head.max()} "
            f"(tower {', '.join(self.towers)})."
        )

    def _ranked(self) -> pd.DataFrame:
        return _by_score(self._table[self._table["score"].notna()])

    def _common(self, other: "HeadScores") -> pd.DataFrame:
        right = other._table[[*KEY, "score"]]
        common = self._table[[*KEY, "score"]].merge(right, on=KEY, suffixes=("", "_other"))
        return common.dropna()

    def _as_matrix(self, column: str) -> Float[np.ndarray, "layer head"]:
        if len(self.towers) > 1:
            raise ScoresError(
                f"a matrix holds one tower, here are {', '.join(self.towers)}: "
                f"ask scores.tower({self.towers[0]!r})."
            )
        layer, head = self._table["layer"].to_numpy(), self._table["head"].to_numpy()
        matrix = np.full((layer.max(initial=-1) + 1, head.max(initial=-1) + 1), np.nan)
        matrix[layer, head] = self._table[column]
        return matrix

    def _as_arrow(self) -> pa.Table:
        frame = self._table
        if self._samples is not None:
            frame = frame.assign(samples=list(self._samples.T))
        table = pa.Table.from_pandas(frame, preserve_index=False)
        about = {"format": FORMAT, "version": VERSION, "metadata": self._metadata}
        return table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"interp": json.dumps(about).encode()}
        )

    def _as_published(self) -> dict[str, list[float]]:
        if self.towers != ["text"] and len(self):
            raise ScoresError(
                f"the published JSON has no place for a tower (here: {', '.join(self.towers)}). "
                "Save as .parquet."
            )
        means = self._table["score"].to_numpy()[None]
        samples = means if self._samples is None else self._samples
        return {
            f"{head.layer}-{head.head}": values[~np.isnan(values)].tolist()
            for head, values in zip(self.heads, samples.T)
        }


# What users may write for heads; `heads_of` reads all of them.
HeadsLike = Head | HeadScores | str | Iterable


def as_numpy(values: Shaped[Any, "..."]) -> Float[np.ndarray, "..."]:
    """Floats in double precision from an array or a tensor of any type, on any device."""
    if hasattr(values, "detach"):  # numpy knows no bfloat16
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def mean_std_n(
    samples: Float[np.ndarray, "prompt row"],
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Mean, sample standard deviation and number of what is not NaN in each column."""
    there = ~np.isnan(samples)
    n = there.sum(axis=0)
    mean = np.where(n > 0, np.where(there, samples, 0).sum(axis=0) / np.maximum(n, 1), np.nan)
    squares = (np.where(there, samples - mean, 0) ** 2).sum(axis=0)
    return mean, np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1)), np.nan), n


def overlap_null(
    pool: Sequence[Head], ours: Sequence[Head], theirs: Sequence[Head], match: str | None = None
) -> Float[np.ndarray, " shared"]:
    """P(0, 1, ... shared heads) if one of two lists were drawn at random from `pool`.

    With `match="layer"` as many in each layer as it has there: a sum of hypergeometric laws, exact.
    """
    stratum = _stratum(match)
    sizes, left, right = (Counter(map(stratum, heads)) for heads in (pool, ours, theirs))
    null = np.ones(1)
    for place, size in sizes.items():
        counts = np.arange(min(left[place], right[place]) + 1)
        null = np.convolve(null, stats.hypergeom.pmf(counts, size, left[place], right[place]))
    return np.pad(null, (0, max(0, len(ours) + 1 - len(null))))


def _tidy(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The columns complete, typed and ordered; rows by tower, layer, head (and their order)."""
    missing = {"layer", "head", "score"} - set(table.columns)
    if missing:
        raise ScoresError(f"table: lacks the columns {', '.join(sorted(missing))}.")
    if "samples" in table.columns:
        raise ScoresError("table: 'samples' is no column; give it as HeadScores(..., samples=...).")
    defaults = {"std": np.nan, "n": 1, "tower": "text"}
    table = table.assign(**{k: v for k, v in defaults.items() if k not in table.columns})
    for name in ("layer", "head", "n"):
        numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
        if not ((numbers >= 0) & (numbers % 1 == 0)).all():
            raise ScoresError(f"table: the column {name!r} must hold whole numbers from 0 on.")
        table[name] = numbers.astype(np.int64)
    table = table.astype({"score": np.float64, "std": np.float64, "tower": "str"})
    double = table.duplicated(KEY)
    if double.any():
        raise ScoresError(
            f"table: {double.sum()} heads are there twice ({_heads(table[double])[0]})."
        )
    extras = [name for name in table.columns if name not in COLUMNS]
    order = np.lexsort([table[name].to_numpy() for name in reversed(KEY)])
    return table[COLUMNS + extras].iloc[order].reset_index(drop=True), order


def _heads(table: pd.DataFrame) -> list[Head]:
    columns = (table[name] for name in ("layer", "head", "tower"))
    return [Head(int(layer), int(head), tower) for layer, head, tower in zip(*columns)]


def _by_score(table: pd.DataFrame) -> pd.DataFrame:
    order = ["score", "layer", "head", "tower"]
    return table.sort_values(order, ascending=[False, True, True, True], kind="stable")


def _check_k(k, available: int, what: str = "heads with a score") -> int:
    if isinstance(k, bool) or not isinstance(k, Integral) or not 0 <= int(k) <= available:
        raise ScoresError(f"k={k!r}: a whole number from 0 to {available}, the number of {what}.")
    return int(k)


def _check_match(match):
    if match not in (None, "layer"):
        raise ScoresError(f"match={match!r}: 'layer' or None.")


def _stratum(match: str | None) -> Callable[[Head], tuple]:
    return (lambda head: (head.tower, head.layer)) if match == "layer" else (lambda head: ())


def _place_name(place: tuple) -> str:
    tower, layer = place
    return f"layer {layer}" if tower == "text" else f"layer {layer} of the {tower} tower"


def _grouped(heads: list[Head], stratum: Callable) -> dict[tuple, list[Head]]:
    groups: dict[tuple, list[Head]] = {}
    for head in heads:
        groups.setdefault(stratum(head), []).append(head)
    return groups


def _merged_table(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The formula at the top of this file, for all heads at once."""
    rows = pd.concat(tables, ignore_index=True)
    unknown = rows[(rows["n"] > 1) & rows["std"].isna() & rows["score"].notna()]
    if len(unknown):
        raise ScoresError(
            f"parts: {_heads(unknown)[0]} has n={unknown['n'].iloc[0]} but no std; both are "
            "needed to merge."
        )

    group = rows.groupby(KEY).ngroup().to_numpy()

    def summed(column: pd.Series) -> pd.Series:
        sums = np.bincount(group, weights=column)  # NaN stays: an undefined part makes the whole so
        return pd.Series(sums[group], index=rows.index)

    def averaged(column: pd.Series) -> pd.Series:
        return summed((rows["n"] * column).where(rows["n"] > 0, 0.0)) / total

    total = summed(rows["n"])
    mean = averaged(rows["score"])
    within = (rows["n"] - 1) * rows["std"].where(rows["n"] > 1, 0.0) ** 2
    between = rows["n"] * (rows["score"] - mean) ** 2
    squares = summed((within + between).where(rows["n"] > 0, 0.0))
    std = np.sqrt(squares / (total - 1).where(total > 1))
    merged = rows.assign(score=mean, std=std, n=total)
    for name in merged.columns.difference(COLUMNS, sort=False):
        if pd.api.types.is_float_dtype(rows[name]):
            merged[name] = averaged(rows[name])
        else:
            _check_agrees(rows, name)
    return merged.drop_duplicates(KEY, ignore_index=True)


def _check_agrees(rows: pd.DataFrame, name: str):
    differs = rows.groupby(KEY)[name].transform(lambda values: values.nunique(dropna=False)) > 1
    if differs.any():
        raise ScoresError(
            f"parts: the column {name!r} differs at {_heads(rows[differs])[0]} and holds no "
            "floats that could be averaged. Drop it before merging."
        )


def _merged_samples(
    parts: list[HeadScores], table: pd.DataFrame
) -> Float[np.ndarray, "prompt row"] | None:
    """Samples one below the other, in the rows of `table`; None unless every part kept them."""
    rows = {head: row for row, head in enumerate(_heads(table))}
    pieces = []
    for part in parts:
        if (samples := part.samples) is None:
            return None
        piece = np.full((len(samples), len(rows)), np.nan)
        piece[:, [rows[head] for head in part.heads]] = samples
        pieces.append(piece)
    return np.concatenate(pieces)


def _merged_metadata(all_metadata: list[dict]) -> dict:
    """What agrees, and under `parts` the facts of single parts that differ (without doubles)."""
    shared = [_without(metadata, (*PER_PART, "parts")) for metadata in all_metadata]
    for other in shared[1:]:
        for key in sorted(shared[0].keys() | other.keys()):
            if shared[0].get(key) != other.get(key):
                raise ScoresError(
                    f"parts: {key!r} differs ({_short(shared[0].get(key))} and "
                    f"{_short(other.get(key))}): only tables of one analysis, model and set of "
                    "parameters merge."
                )
    entries = [
        {**{key: metadata[key] for key in PER_PART if key in metadata}, **entry}
        for metadata in all_metadata
        for entry in metadata.get("parts", [{}])
    ]
    same = {
        key: entries[0][key]
        for key in PER_PART
        if key in entries[0] and all(entry.get(key) == entries[0][key] for entry in entries)
    }
    rest: list[dict] = []
    for entry in (_without(entry, tuple(same)) for entry in entries):
        if entry and entry not in rest:
            rest.append(entry)
    return {**shared[0], **same, **({"parts": rest} if rest else {})}


def _without(metadata: dict, keys: tuple[str, ...]) -> dict:
    return {key: value for key, value in metadata.items() if key not in keys}


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _load_parquet(path: Path) -> HeadScores:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ScoresError(f"{path}: is not a readable parquet file.") from error
    try:
        about = json.loads((table.schema.metadata or {}).get(b"interp", b"null"))
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ScoresError(f"{path}: is a parquet file, but not one of head scores ({FORMAT}).")
    if about["version"] > VERSION:
        raise ScoresError(
            f"{path}: has version {about['version']} of the format, this interp reads up to "
            f"{VERSION}. Upgrade interp."
        )
    frame = table.to_pandas()
    samples = None
    if "samples" in frame.columns:
        columns = [np.asarray(values, dtype=np.float64) for values in frame.pop("samples")]
        samples = np.stack(columns, axis=1) if columns else np.empty((0, 0))
    return HeadScores(frame, about["metadata"], samples=samples)


def _load_published(path: Path, keep_samples: bool) -> HeadScores:
    """{"LAYER-HEAD": [score, ...] or score, ...}, as nightdessert/Retrieval_Head publishes it."""
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ScoresError(f"{path}: is not JSON.") from error
    if not isinstance(published, dict) or not published:
        raise ScoresError(
            f"{path}: must be one JSON object {{'LAYER-HEAD': [scores]}}, and not empty."
        )
    heads = [_published_head(key, path) for key in published]
    lists = [_published_scores(key, value, path) for key, value in published.items()]
    samples = np.full((max(map(len, lists)), len(lists)), np.nan)
    for row, values in enumerate(lists):
        samples[: len(values), row] = values
    where = pd.DataFrame(
        {
            "layer": [head.layer for head in heads],
            "head": [head.head for head in heads],
            "tower": "text",
        }
    )
    metadata = {"analysis": "retrieval_heads", "source": path.name}
    return HeadScores.from_columns(where, samples, metadata, keep_samples)


def _published_head(key: str, path: Path) -> Head:
    found = re.fullmatch(r"(\d+)-(\d+)", key, flags=re.ASCII)
    if not found:
        raise ScoresError(f"{path}: the key {key!r} must be 'LAYER-HEAD', such as '3-5'.")
    return Head(int(found[1]), int(found[2]))


def _published_scores(key: str, value, path: Path) -> list[float]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, Real) and not isinstance(v, bool) for v in values):
        raise ScoresError(f"{path}: the scores of {key!r} must be numbers, not {_short(value)}.")
    return [float(v) for v in values]
