"""The README's Python runs, on the embedded model."""

import re

import pytest

from tests.conftest import ROOT


def python_blocks() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def test_the_readmes_python_runs_on_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = python_blocks().replace("smollm2-135m", "mini-llama")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["comparison"].evaluations) == 3
    assert (tmp_path / "runs" / "no-retrieval" / "vectors.safetensors").exists()


def names_in(notebook: str, tmp_path, monkeypatch) -> dict:
    """What a notebook's cells leave behind when they have run on the embedded model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERP_MODEL", "mini-llama")
    code = (ROOT / "notebooks" / f"{notebook}.py").read_text(encoding="utf-8")
    names: dict = {"__name__": "notebook"}
    exec(compile(code, f"{notebook}.py", "exec"), names)
    return names


@pytest.mark.slow
def test_a_first_look_runs_on_the_embedded_model(tmp_path, monkeypatch):
    names = names_in("01_first_look", tmp_path, monkeypatch)
    assert (tmp_path / "heads.parquet").exists()
    assert names["entropy"].table["score"].ge(0).all()


@pytest.mark.slow
def test_interventions_run_on_the_embedded_model(tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "notebooks").mkdir()
    names = names_in("04_interventions", tmp_path / "notebooks", monkeypatch)
    assert names["again"] == names["lofit"]
    assert names["edited"].accuracy == names["comparison"].evaluations["LoFiT"].accuracy
