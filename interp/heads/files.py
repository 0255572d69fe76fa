"""The files that `HeadScores` reads and writes: parquet, and the published retrieval-head JSON."""

import json
import re
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from interp.heads.head import Head
from interp.heads.table import ScoresError, short

FORMAT = "interp.head_scores"
VERSION = 1

Samples = Float[np.ndarray, "prompt row"]


def to_parquet(path: Path, table: pd.DataFrame, samples: Samples | None, metadata: dict) -> None:
    """Everything in one file: the table, its samples as a column of lists, the metadata within."""
    frame = table if samples is None else table.assign(samples=list(samples.T))
    arrow = pa.Table.from_pandas(frame, preserve_index=False)
    about = {"format": FORMAT, "version": VERSION, "metadata": metadata}
    told = {**(arrow.schema.metadata or {}), b"interp": json.dumps(about).encode()}
    pq.write_table(arrow.replace_schema_metadata(told), path, compression="zstd")


def from_parquet(path: Path) -> tuple[pd.DataFrame, Samples | None, dict]:
    """Table, samples and metadata.

    Raises `ScoresError` where the file is no such table, or a newer interp wrote it.
    """
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
    return frame, samples, about["metadata"]


def to_published(heads: Sequence[Head], samples: Samples) -> str:
    """{"LAYER-HEAD": [score, ...]}, as nightdessert/Retrieval_Head publishes it.

    Raises `ScoresError` for heads of another tower, for which it has no place.
    """
    towers = sorted({head.tower for head in heads} - {"text"})
    if towers:
        raise ScoresError(
            f"the published JSON has no place for a tower (here: {', '.join(towers)}). "
            "Save as .parquet."
        )
    lists = {
        f"{head.layer}-{head.head}": values[~np.isnan(values)].tolist()
        for head, values in zip(heads, samples.T)
    }
    return json.dumps(lists) + "\n"  # on one line: readers call json.loads(file.readline())


def from_published(path: Path) -> tuple[pd.DataFrame, Samples]:
    """Where each head is, and its scores; a single score counts as a list of one."""
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
    return where, samples


def _published_head(key: str, path: Path) -> Head:
    found = re.fullmatch(r"(\d+)-(\d+)", key, flags=re.ASCII)
    if not found:
        raise ScoresError(f"{path}: the key {key!r} must be 'LAYER-HEAD', such as '3-5'.")
    return Head(int(found[1]), int(found[2]))


def _published_scores(key: str, value, path: Path) -> list[float]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, Real) and not isinstance(v, bool) for v in values):
        raise ScoresError(f"{path}: the scores of {key!r} must be numbers, not {short(value)}.")
    return [float(v) for v in values]
