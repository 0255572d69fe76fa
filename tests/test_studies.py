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
