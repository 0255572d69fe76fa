"""Where numbers come from: package versions and digests that stay the same across machines."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from os import PathLike, fspath
from pathlib import Path

from interp.errors import UserError

PACKAGES = ("interp", "torch", "transformers", "transformer_lens")


class ProvenanceError(UserError):
    """Something that should be written down cannot be expressed in JSON."""


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of `packages` (none is imported); None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package.replace("_", "-"))
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def digest_rows(rows: Iterable[Mapping]) -> str:
    """SHA-256 of the rows as canonical JSON lines. The order of rows counts, of columns not."""
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        line = json.dumps(
            plain(row, f"rows[{number}]"),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        )
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def digest_file(path: str | PathLike) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value, name: str):
    """`value` in the types that JSON has; `name` is what the error calls it.

    Numpy scalars, arrays and tensors become numbers and lists, tuples and sets lists (sets
    sorted), paths and dtypes text, dataclasses dicts. NaN becomes None: it equals nothing, itself
    included, and two runs of one kind must compare equal.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if value != value else float(value)
    if isinstance(value, Mapping):
        return {_key(key, name): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, name) for item in value), key=json.dumps)
    if isinstance(value, PathLike):
        return Path(fspath(value)).as_posix()
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), name)
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist(), name)
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    raise ProvenanceError(
        f"{name}: a {type(value).__name__} cannot be written as JSON. "
        "Give text, numbers, lists or dicts of these."
    )


def _key(key, name: str) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, int):
        return str(key)
    raise ProvenanceError(f"{name}: the key {key!r} must be text to be written as JSON.")
