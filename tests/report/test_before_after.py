"""The section on an intervention: its numbers are those of `compare`, its words those numbers."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import interp
from interp import report
from interp.evaluation import Comparison, Evaluation
from interp.model.hooked import HookedModel
from interp.report.before_after import before_after_section, compare_tasks, headline
from interp.report.plan import Texts
from interp.runs import RunError
from tests.intervention.test_base import Backwards
from tests.report.test_report import TINY, markup_of

EDIT = interp.Ablate(["L0H0", "L1H3", "L2H5"])
PLAN = replace(TINY, n=4, n_ablation=3, draws=1, n_pairs=0)


@pytest.fixture(scope="module")
def model(stories260k):
    return interp.load(stories260k)


def compared(model, edits, out, plan=PLAN):
    plan = plan.fitted(model)
    return compare_tasks(
        model, edits, plan, Texts.of(model, plan), out, resume=True, progress=False
    )


def test_a_page_with_an_intervention_compares_it(model, tmp_path):
    page = report.write(model, tmp_path, PLAN, interventions=EDIT, progress=False)
    assert '<section id="before-after">' in markup_of(page) and repr(EDIT) in markup_of(page)
    table = pd.read_parquet(tmp_path / "figures" / "before-after.parquet")
    assert len(pd.read_parquet(tmp_path / "figures" / "before-after-values.parquet")) > 0
    prompts = {
        "needles": PLAN.held_out(model),
        "plain texts": Texts.of(model, PLAN.fitted(model)).control,
    }
    assert list(dict.fromkeys(table["task"])) == list(prompts)
    for name, rows in table.groupby("task"):
        found = interp.compare(model, prompts[name], {"none": [], "edit": EDIT}, progress=False)
        expected = found.differences[["metric", "value", "low", "high", "n"]]
        pd.testing.assert_frame_equal(
            rows[expected.columns].reset_index(drop=True), expected, atol=1e-5, rtol=0
        )
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["compared with"] == [f"{EDIT!r} {EDIT.digest[:12]}"]
    assert record["counts"]["headlines"]["before-after"].startswith("With the intervention: ")
    with pytest.raises(RunError, match="compared with"):
        report.write(model, tmp_path, PLAN, interventions=interp.Ablate(["L0H0"]), progress=False)
    with pytest.raises(RunError, match="compared with"):
        report.write(model, tmp_path, PLAN, progress=False)


def test_what_was_measured_is_not_measured_again(model, tmp_path, monkeypatch):
    first = compared(model, [EDIT], tmp_path)

    def ran(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(HookedModel, "last_logits", ran)
    again = compared(model, [EDIT], tmp_path)
    for name, one in first.items():
        pd.testing.assert_frame_equal(again[name].differences, one.differences)


def test_where_texts_have_no_loss_the_section_says_so(model, tmp_path):
    found = compared(model, [Backwards(shift=0.5)], tmp_path)
    assert isinstance(found["needles"], Comparison) and isinstance(found["plain texts"], str)
    section = before_after_section(found, [Backwards(shift=0.5)])
    said = " ".join(part for part in section.parts if isinstance(part, str))
    assert "Not on plain texts: " in said and "no meaning" in said
    nowhere = before_after_section({"needles": "no spans."}, [EDIT])
    assert "on no task" in nowhere.headline and not nowhere.exhibits


def test_an_intervention_that_does_not_fit_is_told_before_anything_runs(model, tmp_path):
    with pytest.raises(interp.heads.HeadError, match="L9H0"):
        report.write(model, tmp_path / "run", PLAN, interventions=interp.Ablate(["L9H0"]))
    assert not (tmp_path / "run").exists()


def experiment(**tables: tuple) -> dict[str, Comparison]:
    """Comparisons of 40 prompts, from (column, before, after)."""
    found = {}
    for name, (column, *values) in tables.items():
        pair = [Evaluation(pd.DataFrame({column: value}), {}) for value in values]
        found[name] = Comparison(dict(zip(("without", "with"), pair)))
    return found


def test_the_headline_tells_what_changed_beyond_chance():
    rank, noise = np.arange(40), np.tile([-0.1, 0.1], 20)
    found = experiment(
        needles=("correct", rank < 36, rank < 10),
        pairs=("correct", rank < 20, (rank < 19) | (rank == 30)),
        texts=("loss", 2 + noise, 2.5 + noise / 2),
    )
    assert headline(found) == (
        "With the intervention: accuracy on needles 90 % → 25 %; loss on texts 2.00 → 2.50; no "
        "measurable change on pairs."
    )
