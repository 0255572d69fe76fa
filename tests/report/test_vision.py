"""The report of a model that sees images and reads none of our texts."""

import json
from dataclasses import replace

import pandas as pd
import pytest

import interp
from interp import report
from interp.intervention.ablate import Ablate

TINY = report.Plan(n_scenes=4, batch_size=2)


@pytest.fixture(scope="module")
def model():
    return interp.load("mini-llava")


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return report.write(model, out, TINY, interventions=Ablate(["L1H2"]), progress=False)


def test_it_has_what_can_be_said_and_nothing_else(page):
    record = json.loads((page.parent / "run.json").read_text())
    headlines = record["counts"]["headlines"]
    assert list(headlines) == ["pictures", "vision-heads", "before-after"]
    assert all(headlines.values()) and "nan" not in str(headlines).lower()
    assert record["settings"]["plan"]["lengths"] is None
    markup = page.read_text(encoding="utf-8")
    assert "needle prompts" not in markup and "questions about pictures" in markup


def test_its_numbers_are_those_of_the_passes(page, model):
    shown = pd.read_parquet(page.parent / "figures" / "divergence.parquet")
    kept = pd.read_parquet(page.parent / "captions" / "heads.parquet")
    pd.testing.assert_series_equal(shown["score"], kept["score"])
    captions = pd.read_parquet(page.parent / "figures" / "captions.parquet")
    assert captions["objects"].map(list).tolist() == TINY.scenes(model)["objects"][:]


def test_it_goes_on_where_it_was(page, model, monkeypatch):
    def wrote(*args, **kwargs):
        raise AssertionError("captions were written again")

    monkeypatch.setattr(type(model), "continue_greedily", wrote)
    figures = {path.name: pd.read_parquet(path) for path in (page.parent / "figures").iterdir()}
    report.write(model, page.parent, TINY, interventions=Ablate(["L1H2"]), progress=False)
    for name, table in figures.items():
        pd.testing.assert_frame_equal(pd.read_parquet(page.parent / "figures" / name), table)


def test_without_pictures_nothing_is_left_to_say(model, tmp_path):
    with pytest.raises(report.plan.PlanError, match="n_scenes=0"):
        report.write(model, tmp_path, replace(TINY, n_scenes=0), progress=False)
