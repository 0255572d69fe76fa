"""The studies run on the embedded model from the command line, and say what its numbers say."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT


def run(study: str, out: Path, *options: str) -> str:
    """What a study prints; it keeps its tables in `out`."""
    command = [sys.executable, ROOT / "analyses" / f"{study}.py", "mini-llama", "--out", out]
    done = subprocess.run(
        [*map(str, command), *options], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_circuit_reuse(tmp_path):
    run("circuit_reuse", tmp_path, "--n", "24", "--n-repair", "32", "--draws", "5")
    found = pd.read_parquet(tmp_path / "circuits.parquet").set_index("task")
    assert (found["faithfulness"] > 0.7).all() and (found["without"] < 0.15).all()
    assert (found["faithfulness"] > found["random"] + 0.2).all()
    # each circuit does its own task and not the other's
    crossed = pd.read_parquet(tmp_path / "cross-task.parquet")
    crossed = crossed.set_index(["task", "circuit"])["faithfulness"]
    for task, other in (("ioi", "colored"), ("colored", "ioi")):
        assert crossed[task, task] > crossed[task, other] + 0.3
    # IOI's heads that lower what they look at do so to colours too, others less
    repair = pd.read_parquet(tmp_path / "repair-differences.parquet")
    change = repair[repair["metric"] == "logit_diff"].set_index("condition")
    random = change[change.index.str.startswith("random")]["value"]
    assert change.loc["on the wrong colours", "low"] > random.mean()
    assert change.loc["on the right colour", "high"] < -1


@pytest.mark.slow
def test_multiple_choice(tmp_path):
    said = run("multiple_choice", tmp_path, "--n", "48")
    assert "letter" in said and list(tmp_path.glob("*.parquet"))


@pytest.mark.slow
def test_lofit(tmp_path):
    """A form of question that can be taught, beside one that would have to be looked up anew."""
    options = ["--tasks", "bare letters,two facts", "--n-train", "64", "--n-validation", "24"]
    options += ["--n-test", "60", "--epochs", "3", "--seeds", "0,1", "--rates", "0.05"]
    said = run("lofit", tmp_path, *options)
    found = pd.read_parquet(tmp_path / "methods.parquet").set_index(["task", "method"])
    letters = found.loc["bare letters", "value"]
    assert letters["LoFiT"] > letters["no edit"] + 0.15
    assert (
        letters["LoFiT"] > letters["ITI"] and letters["LoFiT"] > letters["shuffled answers"] + 0.1
    )
    facts = found.loc["two facts"]
    assert abs(facts.loc["LoFiT", "gain"]) < 0.1 and (facts["n"] == facts["n"].max()).all()
    assert "two facts: NOT learned" in said and "3 of 32 heads" in said
    folded = (tmp_path / "findings.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert float(folded.split("at most ")[1].split()[0]) < 1e-3

    # what is missing is learned again, and nothing else
    next((tmp_path / "ways" / "ITI" / "shards").glob("shard-00001-*")).unlink()
    again = run("lofit", tmp_path, *options)
    assert again.count("accuracy 0.") - again.count("\nITI, bare letters, seed 1: accuracy 0.") == (
        again.count("saved and loaded (bare letters): accuracy 0.")
    )
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "methods.parquet").set_index(["task", "method"]), found
    )


@pytest.mark.slow
def test_attention_calibration(tmp_path):
    options = ["--all-heads", "--n-screen", "64", "--n-test", "100"]
    options += ["--draws", "6", "--columns", "3"]
    said = run("attention_calibration", tmp_path, "--tasks", "two facts", *options)
    gains = pd.read_parquet(tmp_path / "gains.parquet").set_index(["condition", "metric"])
    assert "NO gain beyond the controls" in said and gains.loc[("accepted", "loss"), "low"] < 0
    assert gains.loc[("all candidates", "loss"), "high"] < 0


@pytest.mark.slow
def test_position_bias(tmp_path):
    options = ["--n", "12", "--wording", "codes", "--lines", "5", "--places", "0", "2", "4"]
    said = run("position_bias", tmp_path, *options)
    assert "lines: PINE: the place makes no difference" in said
    assert "options: PINE: the place makes no difference" in said
    places = pd.read_parquet(tmp_path / "places.parquet")
    right = places[places["metric"] == "choice"].groupby(["task", "condition"])["value"].mean()
    assert right["lines", "as it is"] > 0.9 and right["options", "as it is"] > 0.9
    # what is missing is asked again, and the rest is read
    next((tmp_path / "lines" / "PINE" / "shards").glob("shard-00000-*")).unlink()
    assert run("position_bias", tmp_path, *options) == said
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "places.parquet"), places)
