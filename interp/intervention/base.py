"""What every intervention is: a frozen, saveable description of an edit, which yields hooks.

It says *what* is done, *where* (heads) and *when* (`prompt`, `generated` or `both` kinds of token),
and holds neither a model nor a handle: `model.intervene(...)` applies it and undoes it.
"""

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.errors import UserError
from interp.heads import Head, heads_of
from interp.model.hooked import HookedModel
from interp.provenance import versions

Hook = tuple[str, Callable]

FORMAT = "interp.intervention"
VERSION = 1

# Where the class of a saved intervention lives; each module is imported when it is asked for.
MODULES = {
    "Ablate": "interp.intervention.ablate",
    "LowRank": "interp.intervention.low_rank",
    "SteerAttention": "interp.intervention.steer",
}


class InterventionError(UserError):
    """An intervention that has no meaning, does not fit the model, or can't be read."""


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """Base of all interventions. A subclass is a frozen dataclass with `eq=False`.

    Its fields are heads, numbers, text, or tensors: that is what `save_pretrained` can write.
    """

    @abstractmethod
    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """(name, function) pairs, made anew for each block; raises where they do not fit `model`.

        A function returns a new value, or None where it leaves things as they are; it asks
        `model.call` for the facts of the pass.
        """

    def describe(self, model: HookedModel | None = None) -> str:
        """What it does, its size, and with a model the hooks that it attaches."""
        tensors = [v for v in self._values().values() if isinstance(v, Tensor)]
        lines = [repr(self), f"stored numbers: {sum(t.numel() for t in tensors)}"]
        if model is not None:
            lines += [f"hook: {name}" for name, _ in self.hooks(model)]
        return "\n".join(lines)

    @property
    def digest(self) -> str:
        """A hash of the type and of all it holds; equal interventions have equal ones."""
        state = hashlib.sha256(type(self).__name__.encode())
        for name, value in self._values().items():
            state.update(name.encode())
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous()
                state.update(f"{value.dtype}{tuple(value.shape)}".encode())
                state.update(value.view(torch.uint8).numpy().tobytes())
            else:
                state.update(json.dumps(_plain(value)).encode())
        return state.hexdigest()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `intervention.json`, `vectors.safetensors` where it holds tensors, and a README."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = self._values()
        tensors = {
            k: v.detach().cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)
        }
        record = {
            "format": FORMAT,
            "version": VERSION,
            "type": type(self).__name__,
            "parameters": {k: _plain(v) for k, v in values.items() if k not in tensors},
            "tensors": {k: list(v.shape) for k, v in tensors.items()},
            "versions": versions(),
        }
        if tensors:
            save_file(tensors, folder / "vectors.safetensors", metadata={"format": "pt"})
        text = json.dumps(record, indent=2) + "\n"
        (folder / "intervention.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(
            f"# {type(self).__name__}\n\n{self!r}\n\n"
            f'Load it with `interp.load_intervention("{folder.name}")`.\n',
            encoding="utf-8",
        )
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Intervention":
        """Read what `save_pretrained` wrote; raises `InterventionError` with the reason."""
        found = load_intervention(folder)
        if not isinstance(found, cls):
            kind = type(found).__name__
            raise InterventionError(f"{folder}: holds {kind}, not {cls.__name__}.")
        return found

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load_intervention(folder: str | Path) -> Intervention:
    """The intervention saved in a folder, whatever its class.

    Raises `InterventionError` where there is none, or one of an unknown type or newer version, or
    where its vectors are missing, not finite, or of another shape than it says.
    """
    folder = Path(folder)
    record = _read_record(folder)
    kind = _kind(record["type"], folder)
    parameters = dict(record["parameters"])
    if "heads" in parameters:
        parameters["heads"] = heads_of(parameters["heads"])
    values = parameters | _read_tensors(folder, record["tensors"])
    unknown = sorted(values.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise InterventionError(f"{folder}: {kind.__name__} has no parameter {unknown[0]!r}.")
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    absent = sorted(needed - values.keys())
    if absent:
        raise InterventionError(f"{folder}: {kind.__name__} needs the parameter {absent[0]!r}.")
    return kind(**values)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "intervention.json"
    if not path.is_file():
        raise InterventionError(f"intervention={str(folder)!r}: no intervention.json there.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT and record["version"] <= VERSION
        whole = {"type": str, "parameters": dict, "tensors": dict}
        broken = [name for name, kind in whole.items() if not isinstance(record.get(name), kind)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InterventionError(f"{path}: not an intervention of ours ({error!r}).") from error
    if not known:
        raise InterventionError(
            f"{path}: format {record['format']} version {record.get('version')}; this interp reads "
            f"{FORMAT} up to version {VERSION}. Upgrade interp."
        )
    if broken:
        raise InterventionError(f"{path}: {broken[0]!r} is missing or damaged.")
    return record


def _kind(name: str, folder: Path) -> type[Intervention]:
    if name not in MODULES:
        near = ", ".join(get_close_matches(name, MODULES)) or ", ".join(MODULES)
        raise InterventionError(f"{folder}: unknown type {name!r}; this interp has {near}.")
    return getattr(importlib.import_module(MODULES[name]), name)


def _read_tensors(folder: Path, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    if not shapes:
        return {}
    path = folder / "vectors.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise InterventionError(f"{path}: can't be read ({error}).") from error
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name]:
            has = list(tensor.shape)
            raise InterventionError(f"{path}: {name} is {has}, and should be {shapes[name]}.")
        if not torch.isfinite(tensor).all():
            raise InterventionError(f"{path}: {name} holds NaN or infinite numbers.")
    return tensors


def _plain(value: Any) -> Any:
    if isinstance(value, Head):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
