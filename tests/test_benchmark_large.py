"""The benchmark of 7B models, in miniature on the CPU: both sides say the same."""

from benchmarks.large import run


def test_it_runs_and_both_sides_agree():
    records = list(run(quick=True))
    cases = [record["case"] for record in records]
    for name in ("hooked", "mass received", "ITI", "ACT", "VHR", "VAR"):
        assert any(name in case for case in cases), name
    passes = [record for record in records if record["case"].startswith("forward")]
    assert max(record["largest_difference"] for record in passes) < 0.05
