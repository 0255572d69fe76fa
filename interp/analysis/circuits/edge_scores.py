"""Scores of the edges of a model's residual graph, and where they come from."""

import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from torch import Tensor

from interp.files import write_atomically
from interp.heads import Head, HeadScores, mean_std_n
from interp.model.graph import Edge, Graph, GraphError
from interp.provenance import plain

FORMAT = "interp.edge_scores"
VERSION = 1


class EdgeScores:
    """A score for each edge, its spread over pairs, and its origin. Not to be changed in place.

    `table` has a row for each edge, by reader, then by writer: `writer, reader, score, std, n`
    (names as in `interp.model.graph`). A score above 0 speaks for the clean answer: it is what the
    edge adds to the metric when it carries what it carries on the clean prompt.
    """

    def __init__(self, table: pd.DataFrame, metadata: dict):
        self._table = table[["writer", "reader", "score", "std", "n"]].reset_index(drop=True)
        self._metadata = {key: plain(value, key) for key, value in metadata.items()}
        self._metadata["graph"] = {k: metadata["graph"][k] for k in Graph.__dataclass_fields__}

    @classmethod
    def from_samples(
        cls,
        graph: Graph,
        samples: Float[Tensor, "pair edge"],
        metadata: dict,
        mask: Bool[Tensor, "reader writer"] | None = None,
    ) -> "EdgeScores":
        """Mean, std and n over pairs. The edges are those of `mask`, default all."""
        edges = graph.edges if mask is None else graph.edges_of(mask)
        mean, std, n = mean_std_n(samples.double().numpy())
        table = pd.DataFrame(edges, columns=["writer", "reader"])
        about = {"graph": {k: getattr(graph, k) for k in Graph.__dataclass_fields__}}
        return cls(table.assign(score=mean, std=std, n=n), metadata | about)

    @property
    def table(self) -> pd.DataFrame:
        return self._table.copy()

    @property
    def metadata(self) -> dict:
        return json.loads(json.dumps(self._metadata))

    @cached_property
    def graph(self) -> Graph:
        """The graph whose edges these are."""
        return Graph(**self._metadata["graph"])

    @property
    def edges(self) -> list[Edge]:
        """In the order of `table`."""
        return list(zip(self._table["writer"], self._table["reader"]))

    @property
    def ranked(self) -> pd.DataFrame:
        """`table`, the largest score of either sign first; ties in the order of `table`."""
        order = np.argsort(-self._table["score"].abs().to_numpy(), kind="stable")
        return self._table.iloc[order].reset_index(drop=True)

    def top(self, n: int) -> list[Edge]:
        """The n edges with the largest scores of either sign. Raises `GraphError` out of range."""
        if not 0 <= n <= len(self):
            raise GraphError(f"n={n}: there are {len(self)} scored edges.")
        best = self.ranked.iloc[:n]
        return list(zip(best["writer"], best["reader"]))

    @property
    def heads(self) -> HeadScores:
        """Each head by the sum of |score| over the edges that it writes to.

        Paths that cancel do not cancel here, so it is no effect of the head: see
        `attribution_patching` or `activation_patching` for that.
        """
        own = self._table[self._table["writer"].str.startswith("L")]
        sums = own["score"].abs().groupby(own["writer"], sort=False).sum()
        heads = [Head.parse(name) for name in sums.index]
        table = pd.DataFrame(
            {"layer": [h.layer for h in heads], "head": [h.head for h in heads], "score": sums}
        )
        n = int(own["n"].max()) if len(own) else 0
        return HeadScores(table.assign(n=n), self._metadata | {"heads": "sum of |edge scores|"})

    def save(self, path: str | os.PathLike) -> Path:
        """Write parquet, the metadata inside; the file appears whole or not at all."""
        path = Path(path)
        if path.suffix != ".parquet":
            raise GraphError(f"path {path.name}: must end in .parquet.")
        arrow = pa.Table.from_pandas(self._table, preserve_index=False)
        about = {"format": FORMAT, "version": VERSION, "metadata": self._metadata}
        arrow = arrow.replace_schema_metadata(
            {**(arrow.schema.metadata or {}), b"interp": json.dumps(about).encode()}
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: pq.write_table(arrow, file, compression="zstd"))
        except OSError as error:
            raise GraphError(f"{path}: cannot be written ({error.strerror or error}).") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "EdgeScores":
        """Read what `save` wrote. Raises `GraphError` for anything else."""
        try:
            arrow = pq.read_table(path)
            about = json.loads((arrow.schema.metadata or {}).get(b"interp", b"null"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise GraphError(f"{path}: is no readable parquet file of edge scores.") from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise GraphError(f"{path}: is a parquet file, but not one of edge scores ({FORMAT}).")
        if about["version"] > VERSION:
            raise GraphError(
                f"{path}: has version {about['version']} of the format, this interp reads up to "
                f"{VERSION}. Upgrade interp."
            )
        return cls(arrow.to_pandas(), about["metadata"])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, edge: Edge) -> float:
        """The score of (writer, reader)."""
        writer, reader = edge
        row = (self._table["writer"] == writer) & (self._table["reader"] == reader)
        if not row.any():
            self.graph.mask([edge])  # raises, with the nearest names, for what is no edge at all
            raise GraphError(f"edge {writer} -> {reader}: is in the graph, but was not scored.")
        return float(self._table.loc[row, "score"].iloc[0])

    __iter__ = None  # without it, Python would iterate by asking for scores[0]

    def __repr__(self) -> str:
        best = self.ranked.iloc[:3]
        shown = ", ".join(f"{r.writer} -> {r.reader} {r.score:+.3g}" for r in best.itertuples())
        about = self._metadata
        return f"EdgeScores({about.get('analysis')}, {len(self)} edges; top: {shown or 'none'})"


def as_edges(edges: Iterable) -> list[Edge]:
    """Pairs of names from what a user gave; `GraphError` where an item is no pair."""
    found = []
    for edge in edges:
        if isinstance(edge, str) or len(tuple(edge)) != 2:
            raise GraphError(f"edges: {edge!r} is no pair of a writer and a reader.")
        writer, reader = edge
        found.append((str(writer), str(reader)))
    return found
