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


@pytest.mark.slow
def test_the_notebook_runs_on_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERP_MODEL", "mini-llama")
    code = (ROOT / "notebooks" / "01_first_look.py").read_text(encoding="utf-8")
    names: dict = {"__name__": "notebook"}
    exec(compile(code, "01_first_look.py", "exec"), names)
    assert (tmp_path / "heads.parquet").exists()
    assert names["entropy"].table["score"].ge(0).all()
