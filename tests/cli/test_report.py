"""`interp report --intervention`: what reaches the report."""

import interp
from interp import report
from tests.test_cli import refused, succeeded


def test_interventions_reach_the_report(capsys, stories260k, tmp_path, monkeypatch):
    edits, given = [interp.Ablate(["L0H0"]), interp.Ablate(["L1H1"], "uniform")], {}
    folders = [edit.save_pretrained(tmp_path / name) for name, edit in zip("ab", edits)]

    def write(model, out, plan, **options):
        given.update(options)
        return out / "report.html"

    monkeypatch.setattr(report, "write", write)
    words = [word for folder in folders for word in ("--intervention", folder)]
    said = succeeded(capsys, "report", stories260k, "--out", tmp_path / "run", *words)
    assert said.strip() == str(tmp_path / "run" / "report.html")
    assert given["interventions"] == edits
    assert f"--intervention {folders[0]} --intervention {folders[1]}" in given["command"]


def test_a_folder_without_an_intervention_is_told_before_the_model_is_loaded(capsys, tmp_path):
    words = ["--intervention", tmp_path / "none", "--out", tmp_path / "run"]
    assert "no intervention.json" in refused(capsys, "report", "nothing", *words)
