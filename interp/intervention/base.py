"""What every intervention is: a frozen, saveable description of an edit, which yields hooks.

It says *what* is done, *where* (heads) and *when* (`prompt`, `generated` or `both` kinds of token),
and holds neither a model nor a handle: `model.intervene(...)` applies it and undoes it.
"""

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.errors import UserError
from interp.files import write_atomically
from interp.heads import Head, heads_of
from interp.intervention.made_on import MadeOn
from interp.model.hooked import HookedModel
from interp.provenance import versions

Hook = tuple[str, Callable]

FORMAT = "interp.intervention"
VERSION = 1
VECTORS = "vectors.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")

# Where the class of a saved intervention lives; each module is imported when it is asked for.
MODULES = {
    "ACT": "interp.intervention.act",
    "Ablate": "interp.intervention.ablate",
    "HeadModulation": "interp.intervention.head_modulation",
    "HideTokens": "interp.intervention.hide",
    "ITI": "interp.intervention.iti",
    "LoFiT": "interp.intervention.lofit",
    "LongHeads": "interp.intervention.long_heads",
    "LowRank": "interp.intervention.low_rank",
    "PINE": "interp.intervention.pine",
    "RE2": "interp.intervention.re2",
    "RecycledAttention": "interp.intervention.recycled",
    "SteerAttention": "interp.intervention.steer",
    "Temperature": "interp.intervention.temperature",
    "VAR": "interp.intervention.var",
    "ViCrop": "interp.intervention.vicrop",
    "VHR": "interp.intervention.vhr",
    "VTC": "interp.intervention.vtc",
}


class InterventionError(UserError):
    """An intervention that has no meaning, does not fit the model, or can't be read."""


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """Base of all interventions. A subclass is a frozen dataclass with `eq=False`.

    Its fields are heads, numbers, text, tensors, or tuples and dicts (with text or heads for keys)
    of what is not a tensor: that is what `save_pretrained` can write. `made_on` is the model that a
    `fit` was given; it is no part of what the intervention is.
    """

    made_on: MadeOn | None = field(default=None, kw_only=True, repr=False)

    causal: ClassVar[bool] = True
    """False where a prompt's later tokens change what is read at earlier ones: the likelihood of
    the prompt's own tokens then is none. What follows the prompt, read or written, is predicted
    from what came before it either way."""

    def __init_subclass__(cls, **options):
        """Whatever a `fit` returns knows which model it was made on."""
        super().__init_subclass__(**options)
        fit = cls.__dict__.get("fit")
        if isinstance(fit, classmethod):
            cls.fit = classmethod(_remembering(fit.__func__))

    @abstractmethod
    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """(name, function) pairs, made anew for each block; raises where they do not fit `model`.

        A function returns a new value, or None where it leaves things as they are; it asks
        `model.call` for the facts of the pass.
        """

    def prepare(self, prompt: dict[str, Any], model: HookedModel) -> dict[str, Any]:
        """What shall go into the model in place of a prompt; by default the prompt itself.

        A prompt is a row as in `interp.tasks`: `text`, `input_ids`, and where they are known
        `spans`, `answer`, ... Whoever starts from prompts (`evaluate`, `compare`, the harnesses)
        asks `model.prepare(row)`; tokens that are given to the model itself are taken as they are.
        """
        return prompt

    def image_tokens(self, n: int) -> int:
        """How many tokens are left of an image that takes up `n`; `prepare` gives such prompts."""
        return n

    def check_model(self, model: HookedModel) -> None:
        """Raises `InterventionError` where it was made on another kind of model, or holds NaN."""
        if self.made_on is not None and (differences := self.made_on.differences(MadeOn.of(model))):
            raise InterventionError(
                f"{type(self).__name__}: was made on {self.made_on}, which has "
                f"{'; '.join(differences)}. Fit it on {model.name}."
            )
        for name, tensor in self._tensors().items():
            if not torch.isfinite(tensor).all():
                raise InterventionError(
                    f"{type(self).__name__}: {name} holds NaN or infinite numbers."
                )

    def describe(self, model: HookedModel | None = None) -> str:
        """What it does, its size, what it was made on, and with a model the hooks it attaches."""
        tensors = self._tensors()
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        lines = [repr(self)]
        lines += [f"stored numbers: {self.n_stored}" + (f" ({shapes})" if shapes else "")]
        if self.made_on is not None:
            lines.append(f"made on: {self.made_on}")
        if not self.causal:
            lines.append("not causal: likelihoods of a prompt's own tokens are not valid")
        if model is not None:
            lines += [f"hook: {name}" for name, _ in self.hooks(model)]
        return "\n".join(lines)

    @property
    def n_stored(self) -> int:
        """How many numbers its tensors hold."""
        return sum(tensor.numel() for tensor in self._tensors().values())

    @cached_property
    def digest(self) -> str:
        """A hash of the type and of all it holds; equal interventions have equal ones."""
        state = hashlib.sha256(type(self).__name__.encode())
        for name, value in self._values().items():
            state.update(name.encode())
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous()
                state.update(f"{value.dtype}{tuple(value.shape)}".encode())
                state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                state.update(json.dumps(_plain(value, name), sort_keys=True).encode())
        return state.hexdigest()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def save_pretrained(self, folder: str | Path, model: HookedModel | None = None) -> Path:
        """Write `intervention.json`, `vectors.safetensors` where it holds tensors, and a README.

        `model`: what it is meant for, where no `fit` made it; it then fits that kind of model only.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self._tensors().items()}
        made_on = self.made_on if model is None else MadeOn.of(model)
        plain = {name: value for name, value in self._values().items() if name not in tensors}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "type": type(self).__name__,
            **({"base_model": None, "architecture": None} if made_on is None else made_on.record()),
            "parameters": {name: _plain(value, name) for name, value in plain.items()},
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "versions": versions(),
        }
        text = json.dumps(record, indent=2) + "\n"
        vectors = folder / VECTORS
        if tensors:
            write_atomically(vectors, lambda path: save_file(tensors, path, {"format": "pt"}))
        else:
            vectors.unlink(missing_ok=True)
        made = "" if made_on is None else f"Made on {made_on}.\n\n"
        (folder / "README.md").write_text(
            f"# {type(self).__name__}\n\n{self!r}\n\n{made}"
            f'Load it with `interp.load_intervention("{folder.name}")`.\n',
            encoding="utf-8",
        )
        # the last file: a folder that was cut short is none
        write_atomically(
            folder / "intervention.json", lambda path: path.write_text(text, encoding="utf-8")
        )
        return folder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: HookedModel | None = None
    ) -> "Intervention":
        """Read what `save_pretrained` wrote; raises `InterventionError` with the reason."""
        found = load_intervention(folder, model)
        if not isinstance(found, cls):
            kind = type(found).__name__
            raise InterventionError(f"{folder}: holds {kind}, not {cls.__name__}.")
        return found

    def _values(self) -> dict[str, Any]:
        names = (field.name for field in fields(self) if field.name != "made_on")
        return {name: getattr(self, name) for name in names}

    def _tensors(self) -> dict[str, Tensor]:
        return {k: value for k, value in self._values().items() if isinstance(value, Tensor)}


def load_intervention(folder: str | Path, model: HookedModel | None = None) -> Intervention:
    """The intervention saved in a folder, whatever its class.

    Raises `InterventionError` where there is none, or one of an unknown type or newer version, or
    where its vectors are missing, pickled, not finite, or of another shape than it says; with
    `model`, also where it was made on a model of another architecture or shape.
    """
    folder = Path(folder).expanduser()
    record = _read_record(folder)
    kind = _kind(record["type"], folder)
    parameters = dict(record["parameters"])
    if parameters.get("heads") is not None:
        parameters["heads"] = heads_of(parameters["heads"])
    values = parameters | _read_tensors(folder, record["tensors"])
    own = [f for f in fields(kind) if f.name != "made_on"]
    unknown = sorted(values.keys() - {f.name for f in own})
    if unknown:
        raise InterventionError(f"{folder}: {kind.__name__} has no parameter {unknown[0]!r}.")
    needed = {f.name for f in own if f.default is MISSING and f.default_factory is MISSING}
    absent = sorted(needed - values.keys())
    if absent:
        raise InterventionError(f"{folder}: {kind.__name__} needs the parameter {absent[0]!r}.")
    found = kind(**values, made_on=record["made_on"])
    if model is not None:
        found.check_model(model)
    return found


def interventions_of(given: Any) -> list[Any]:
    """One or several interventions, lists of them and folders, as one list in their order.

    Raises `InterventionError` for what is none of these.
    """
    if given is None:
        return []
    if isinstance(given, str | Path):
        return [load_intervention(given)]
    if isinstance(given, list | tuple):
        return [one for some in given for one in interventions_of(some)]
    if not hasattr(given, "hooks") or isinstance(given, type):
        what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise InterventionError(
            f"interventions: {what} is none; give interventions, lists of them, or folders in "
            "which some were saved."
        )
    return [given]


def _remembering(fit: Callable) -> Callable:
    """`fit`, whose result knows the model that it was given."""

    @wraps(fit)
    def fitted(cls, model: HookedModel, *args, **options):
        found = fit(cls, model, *args, **options)
        if not isinstance(found, Intervention):
            return found
        found = copy(found)
        object.__setattr__(found, "made_on", MadeOn.of(model))
        return found

    return fitted


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "intervention.json"
    if folder.is_file():
        _refuse_pickle(folder)
        raise InterventionError(f"intervention={str(folder)!r}: a file; give the folder it is in.")
    if not path.is_file():
        for file in sorted(folder.glob("*")):
            _refuse_pickle(file)
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
    try:
        record["made_on"] = MadeOn.from_record(record)
    except (KeyError, TypeError, ValueError, AttributeError):
        broken.append("shape")
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
    path = folder / VECTORS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        for there in (path, *sorted(folder.glob("*"))):
            _refuse_pickle(there)
        raise InterventionError(f"{path}: can't be read ({error}).") from error
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name]:
            has = list(tensor.shape)
            raise InterventionError(f"{path}: {name} is {has}, and should be {shapes[name]}.")
        if not torch.isfinite(tensor).all():
            raise InterventionError(f"{path}: {name} holds NaN or infinite numbers.")
    return tensors


def _refuse_pickle(path: Path) -> None:
    """Raises `InterventionError` for a file that only Python's pickle could read."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(4)
    # torch.save writes a zip of pickles, and before torch 1.6 a bare one
    bare = start[:1] == b"\x80" and start[2:3] not in (b"", b"\0")  # no safetensors' header
    if path.suffix in PICKLES or start == b"PK\x03\x04" or bare:
        raise InterventionError(
            f"{path}: a pickle, which can run code when it is read, so none is read here. If you "
            "trust where it is from, convert it: safetensors.torch.save_file(torch.load("
            f"{path.name!r}, weights_only=True), {VECTORS!r})."
        )


def _plain(value: Any, name: str) -> Any:
    """As JSON can say it."""
    if isinstance(value, Head):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item, name) for item in value]
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str | Head)]
        if strange:
            raise InterventionError(f"{name}: the key {strange[0]!r} is neither text nor a head.")
        return {str(key): _plain(item, name) for key, item in value.items()}
    return value
