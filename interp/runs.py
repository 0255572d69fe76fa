"""The folder of a scoring run: settings, shards of results, and what was resumed.

    DIR/run.json                             settings, status, counts, versions, sessions
    DIR/shards/shard-00017-of-00064.parquet  the rows of one slice of the items

Every file is written under a temporary name, synced, and renamed, so a run killed at any moment
leaves a folder that goes on: shards that are whole and belong to the same settings are kept, the
others are computed again, and the final table is the one of a run that was never killed.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from interp.errors import UserError
from interp.files import write_atomically, write_json
from interp.provenance import plain, versions

FORMAT = "interp.run"
VERSION = 1
SHARD = re.compile(r"shard-(\d{5})-of-(\d{5})\.parquet")


class RunError(UserError):
    """A run folder that cannot be written, or that belongs to another run."""


class Run:
    """A scoring run in a folder, cut into shards that survive whatever kills it.

    ```python
    run = Run.open("runs/sinks", {"model": digest, "analysis": "sink_rate", "threshold": 0.3})
    for index, rows in run.shards(len(prompts), size=16):
        run.save_shard(index, table_of(prompts[rows]))
    table = pd.concat(run.tables())
    run.finish(prompts=len(prompts))
    ```
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder = folder
        self.record = record
        self.done: set[int] = set()
        """The shards that are saved and whole; filled by `shards` and `save_shard`."""

    @classmethod
    def open(cls, folder: str | Path, settings: dict[str, Any], resume: bool = True) -> "Run":
        """Start the run of `settings` in `folder`, or go on with it; the folder is made.

        `settings` is everything that the results depend on, as JSON can say it. With
        `resume=False`, results of an earlier run there are deleted. Raises `RunError` where the
        folder holds a run of other settings, or cannot be written.
        """
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                discard(folder)
            run = cls(folder, begin(folder, as_json(settings)))
            run.write()
        except OSError as error:
            reason = "it is a file" if folder.is_file() else error.strerror or error
            raise RunError(
                f"out={str(folder)!r}: cannot write there ({reason}). Give another --out."
            ) from error
        return run

    @property
    def settings(self) -> dict[str, Any]:
        """What the results depend on, as it stands in run.json."""
        return self.record["settings"]

    @property
    def complete(self) -> bool:
        """Was `finish` reached?"""
        return self.record["status"] == "complete"

    @property
    def n_shards(self) -> int:
        """Into how many shards the items are cut. Known after `shards`."""
        return -(-self.record["plan"]["n_items"] // self.record["plan"]["size"])

    def shards(self, n_items: int, size: int) -> Iterator[tuple[int, slice]]:
        """The work that is left: the number of each missing shard, and its slice of the items.

        A resumed run keeps the `size` that it began with.
        """
        if size < 1:
            raise RunError(f"size={size}: a shard has at least one item.")
        plan = self.record.setdefault("plan", {"n_items": n_items, "size": size})
        if plan["n_items"] != n_items:
            raise RunError(
                f"out={str(self.folder)!r}: its run is over {plan['n_items']} items, this one over "
                f"{n_items}. Give another --out, or --overwrite."
            )
        size = plan["size"]
        self.done = {i for i in range(self.n_shards) if self.read_shard(i) is not None}
        self.record["sessions"][-1]["shards_found"] = len(self.done)
        self.write()
        left = [index for index in range(self.n_shards) if index not in self.done]
        return ((index, slice(index * size, min((index + 1) * size, n_items))) for index in left)

    def save_shard(
        self, index: int, table: pd.DataFrame, metadata: dict[str, Any] | None = None
    ) -> Path:
        """Write the rows of shard `index`; from here on no kill loses them."""
        about = {
            "format": f"{FORMAT}.shard",
            "version": VERSION,
            "run": self.record["digest"],
            "metadata": as_json(metadata or {}),
        }
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        header = {**(arrow.schema.metadata or {}), b"interp": json.dumps(about).encode()}
        arrow = arrow.replace_schema_metadata(header)

        def write(path: Path) -> None:
            pq.write_table(arrow, path, compression="zstd", write_page_checksum=True)

        path = self.shard_path(index)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, write)
        self.done.add(index)
        return path

    def tables(self) -> Iterator[pd.DataFrame]:
        """The rows of every saved shard, in the order of the items; `.attrs` has its metadata."""
        for index in sorted(self.done):
            table = self.read_shard(index)
            if table is None:
                raise RunError(
                    f"{self.shard_path(index)} was changed or deleted while the run went on. "
                    "Start it again: it goes on from the other shards."
                )
            yield table

    def finish(self, **counts: Any) -> dict[str, Any]:
        """Mark the run complete, with whatever is worth counting; returns what run.json says."""
        if "plan" in self.record and (missing := self.n_shards - len(self.done)):
            raise RunError(f"{self.folder}: {missing} of {self.n_shards} shards are not saved yet.")
        for leftover in self.folder.glob("**/.*.tmp"):  # of sessions that were killed
            leftover.unlink(missing_ok=True)
        sessions = self.record["sessions"]
        self.record |= {
            "status": "complete",
            "finished": now(),
            "counts": as_json(counts),
            "resumed": {
                "sessions": len(sessions),
                "shards_kept": sessions[-1].get("shards_found", 0),
                "shards": self.n_shards if "plan" in self.record else 0,
            },
        }
        self.write()
        return self.record

    def shard_path(self, index: int) -> Path:
        """Where shard `index` lies."""
        return self.folder / "shards" / f"shard-{index:05d}-of-{self.n_shards:05d}.parquet"

    def read_shard(self, index: int) -> pd.DataFrame | None:
        """The rows of a shard; None where it is missing, damaged, or of other settings."""
        about = shard_header(self.shard_path(index))
        if about is None or about.get("run") != self.record["digest"]:
            return None
        try:
            arrow = pq.read_table(self.shard_path(index), page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            return None
        table = arrow.to_pandas()
        table.attrs = about["metadata"]
        return table

    def write(self) -> None:
        """Bring run.json up to date."""
        write_json(self.folder / "run.json", self.record)


def begin(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What run.json shall say now: one session more. Raises `RunError` for another run's folder."""
    run = digest(settings)
    record = read_record(folder)
    if record is None:
        refuse_foreign_shards(folder, run)
        record = {"format": FORMAT, "version": VERSION, "settings": settings, "sessions": []}
    elif digest(record["settings"]) != run:
        raise RunError(f"out={str(folder)!r}: {differences(record['settings'], settings)}")
    session = {"started": now(), "versions": versions()}
    return record | {
        "status": "running",
        "digest": run,
        "sessions": [*record["sessions"], session],
    }


def discard(folder: Path) -> None:
    """Delete the results of a run, and nothing else that lies in the folder."""
    for path in (folder / "shards").glob("*"):
        if SHARD.fullmatch(path.name) or path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)
    (folder / "run.json").unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None where it is missing or damaged, and then the shards decide.

    Raises `RunError` where it is no run of ours, or of a newer version.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RunError(f"out={str(folder)!r}: its run.json is not one of ours. Give another --out.")
    if record["version"] > VERSION:
        raise RunError(
            f"out={str(folder)!r}: its run.json has version {record['version']}, and this interp "
            f"reads up to {VERSION}. Upgrade interp, or give another --out."
        )
    return record


def refuse_foreign_shards(folder: Path, run: str) -> None:
    """Without a run.json: raises `RunError` where the shards are of other settings."""
    for path in (folder / "shards").glob("shard-*.parquet"):
        about = shard_header(path)
        if about is not None and about.get("run") != run:
            raise RunError(
                f"out={str(folder)!r}: holds shards of a run with other settings (first: "
                f"{path.name}). Give another --out, or --overwrite."
            )


def shard_header(path: Path) -> dict[str, Any] | None:
    """What a shard says about itself; None where it is missing or damaged."""
    try:
        return json.loads((pq.read_schema(path).metadata or {})[b"interp"])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Which settings differ, in words: the first three, and how many more."""
    old, new = flatten(there), flatten(here)
    absent = object()
    keys = [k for k in sorted({*old, *new}) if old.get(k, absent) != new.get(k, absent)]
    shown = [f"{k} is {shorten(old, k)} there and {shorten(new, k)} here" for k in keys[:3]]
    more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (
        f"it holds another run: {'; '.join(shown)}{more}. Give another --out, or --overwrite to "
        "start it anew."
    )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, keys joined by dots."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shorten(settings: dict[str, Any], key: str, width: int = 40) -> str:
    """A setting for an error line; one that is not there says so."""
    text = json.dumps(settings[key]) if key in settings else "not set"
    return text if len(text) <= width else f"{text[: width - 3]}..."


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as JSON gives it back: tuples are lists, NumPy's numbers are Python's."""
    return {key: plain(item, f"settings.{key}") for key, item in value.items()}


def digest(settings: dict[str, Any]) -> str:
    """A hash of the settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
