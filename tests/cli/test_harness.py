"""`interp lm-eval`: what it hands to the harness."""

import sys

import pytest

from interp import cli
from interp.cli.harness import with_model
from tests.test_cli import refused


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        (["--tasks", "x"], ["run", "--model", "interp", "--tasks", "x"]),
        (["run", "--tasks", "x"], ["run", "--model", "interp", "--tasks", "x"]),
        (["--model", "hf", "--tasks", "x"], None),
        (["--model=hf"], None),
        (["run", "-M", "hf"], None),
        (["--config", "run.yaml"], None),
        (["run", "--help"], None),
        (["ls", "tasks"], None),
        (["validate", "--tasks", "x"], None),
    ],
    ids=lambda words: " ".join(words or ["as given"]),
)
def test_the_model_is_ours_unless_another_is_named(given, handed):
    assert with_model(given) == (handed or given)


def test_without_the_harness_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr("interp.cli.harness.find_spec", lambda name: None)
    assert "pip install 'interp[harness]'" in refused(capsys, "lm-eval", "--tasks", "x")


def test_help_of_the_harness_own_is_the_harness_own(capsys):
    pytest.importorskip("lm_eval", reason="needs the extra `harness`")
    before = list(sys.argv)
    with pytest.raises(SystemExit) as ended:
        cli.main(["lm-eval", "run", "--help"])
    assert ended.value.code == 0 and sys.argv == before
    assert "--model_args" in capsys.readouterr().out
