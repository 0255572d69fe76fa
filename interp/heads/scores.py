"""`HeadScores`: a score for each head, and where it comes from.

A tidy table, one row a head (`layer, head, score, std, n, tower` and what a pass adds). `score` is
the mean over n samples, `std` their sample standard deviation (n - 1 in the denominator; NaN below
two samples, since one sample says nothing about the spread). A head without any sample has n = 0
and a NaN score.
"""

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy import stats

from interp.files import write_atomically
from interp.heads import files
from interp.heads.head import Head, HeadError, heads_in
from interp.heads.merging import merged_metadata, merged_samples, merged_table
from interp.heads.overlap import Overlap, overlap_null, stratum_of
from interp.heads.table import KEY, ScoresError, as_numpy, by_score, mean_std_n, tidy
from interp.provenance import plain


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
        self._table, order = tidy(table)
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
        infinite = heads_in(where[np.isinf(samples).any(axis=0)])
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
        metadata = merged_metadata([part.metadata for part in parts])
        table = merged_table([part._table for part in parts])
        samples = merged_samples([(part.heads, part._samples) for part in parts], table)
        return cls(table, metadata, samples=samples)

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
        return heads_in(self._table)

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
            return heads_in(ranked[ranked["score"] > threshold])
        if fraction is not None:
            if not 0 < fraction <= 1:
                raise ScoresError(f"fraction={fraction}: above 0 and at most 1.")
            k = min(len(ranked), max(1, round(fraction * len(ranked))))
        return heads_in(ranked.iloc[: _check_k(k, len(ranked))])

    def random(self, k: int, seed: int, match: str | None = None, exclude=()) -> list[Head]:
        """`k` heads that are not among `top(k)`: the control of an experiment on `top(k)`.

        Drawn without replacement from the other scored heads; with `match="layer"` as many from
        each layer as `top(k)` has there. `exclude` names more heads that must not be drawn.
        """
        _check_match(match)
        top = self.top(k)
        others = [
            head for head in heads_in(self._ranked()) if head not in {*top, *heads_of(exclude)}
        ]
        stratum = stratum_of(match)
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
        ours = heads_in(by_score(common).iloc[:k])
        theirs = heads_in(by_score(common.assign(score=common["score_other"])).iloc[:k])
        shared = tuple(sorted(set(ours) & set(theirs)))
        null = overlap_null(heads_in(common), ours, theirs, match)
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
        published = self._as_published() if path.suffix == ".json" else None

        def write(temporary: Path) -> None:
            if published is None:
                files.to_parquet(temporary, self._table, self._samples, self._metadata)
            else:
                temporary.write_text(published, encoding="utf-8")

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
            where, samples = files.from_published(path)
            about = {"analysis": "retrieval_heads", "source": path.name}
            return cls.from_columns(where, samples, about, keep_samples)
        table, samples, metadata = files.from_parquet(path)
        return cls(table, metadata, samples=samples)

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
        shown = ", ".join(f"{h} {score:.3g}" for h, score in zip(heads_in(best), best["score"]))
        return f"HeadScores({self._name()}, {len(self)} heads; top: {shown or 'none'})"

    def _repr_html_(self) -> str:
        from html import escape

        best = self._ranked().iloc[:5]
        rows = "".join(
            f"<tr><td>{head}</td><td>{row['score']:.4g}</td><td>{row['std']:.3g}</td>"
            f"<td>{row['n']}</td></tr>"
            for head, (_, row) in zip(heads_in(best), best.iterrows())
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
        return by_score(self._table[self._table["score"].notna()])

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

    def _as_published(self) -> str:
        means = self._table["score"].to_numpy()[None]
        return files.to_published(self.heads, means if self._samples is None else self._samples)


# What users may write for heads; `heads_of` reads all of them.
HeadsLike = Head | HeadScores | str | Iterable


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


def _check_k(k, available: int, what: str = "heads with a score") -> int:
    if isinstance(k, bool) or not isinstance(k, Integral) or not 0 <= int(k) <= available:
        raise ScoresError(f"k={k!r}: a whole number from 0 to {available}, the number of {what}.")
    return int(k)


def _check_match(match):
    if match not in (None, "layer"):
        raise ScoresError(f"match={match!r}: 'layer' or None.")


def _place_name(place: tuple) -> str:
    tower, layer = place
    return f"layer {layer}" if tower == "text" else f"layer {layer} of the {tower} tower"


def _grouped(heads: list[Head], stratum: Callable) -> dict[tuple, list[Head]]:
    groups: dict[tuple, list[Head]] = {}
    for head in heads:
        groups.setdefault(stratum(head), []).append(head)
    return groups
