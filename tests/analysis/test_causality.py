"""The ablation experiment: what it compares, how it counts, and that it goes on after a kill."""

import json

import numpy as np
import pandas as pd
import pytest

import interp
from interp import tasks
from interp.analysis import causality
from interp.analysis.causality import (
    AblationControl,
    CausalityError,
    Condition,
    ablation_control,
    crossed_interval,
)
from interp.heads import Head, ScoresError


@pytest.fixture(scope="module")
def model(stories260k):
    return interp.load(stories260k)


@pytest.fixture(scope="module")
def prompts(model):
    return tasks.repeats(model, n=4, length=12, seed=3)


@pytest.fixture(scope="module")
def text(model):
    return tasks.text(model, max_tokens=24, n=3, seed=1)


@pytest.fixture(scope="module")
def scores():
    rows = [(layer, head, 10 * layer + head) for layer in range(5) for head in range(8)]
    return interp.HeadScores(pd.DataFrame(rows, columns=["layer", "head", "score"]))


@pytest.fixture(scope="module")
def result(model, scores, prompts, text):
    return ablation_control(model, scores, prompts, ks=(1, 2), draws=3, other=text, progress=False)


def test_each_condition_is_what_compare_says_of_it(model, scores, prompts, text, result):
    random = next(c for c in result.conditions if c.name == "random 2" and c.draw == 1)
    conditions = {
        "unablated": [],
        "top 2": interp.Ablate(scores.top(2)),
        "random 2": interp.Ablate(random.heads),
    }
    rows = result.table[result.table["draw"].isna() | (result.table["draw"] == 1)]
    for data, names in ((prompts, {}), (text, {"loss": "text_loss"})):
        expected = interp.compare(model, data, conditions, progress=False).table
        expected["metric"] = expected["metric"].replace(names)
        both = expected.merge(rows, on=["condition", "metric"], suffixes=("", "_ours"))
        assert len(both) == len(expected)
        for column in ("value", "low", "high", "n"):
            np.testing.assert_allclose(both[column], both[f"{column}_ours"], atol=1e-6)


def test_the_controls_are_other_heads_of_the_same_layers(scores, result):
    for k in (1, 2):
        top = result.heads(k)
        assert list(top) == scores.top(k)
        drawn = [c for c in result.conditions if c.name == f"random {k}"]
        assert [c.draw for c in drawn] == [0, 1, 2]
        for condition in drawn:
            assert not set(condition.heads) & set(top)
            assert sorted(h.layer for h in condition.heads) == sorted(h.layer for h in top)


def test_the_columns_are_the_promised_ones(result):
    columns = ["condition", "k", "draw", "metric", "value", "low", "high", "n"]
    assert list(result.table) == list(result.differences) == columns
    assert set(result.differences["condition"]) == {"top 1", "top 2", "random 1", "random 2"}
    assert result.metrics == ["accuracy", "loss", "text_loss"]
    assert len(result.plot().data) == 6  # draws and means, in three panels


def by_hand(unablated, top, draws) -> AblationControl:
    """A result whose accuracies are given prompt by prompt."""
    heads = (Head(0, 0),)
    conditions = [Condition("unablated", 0, None, ()), Condition("top 1", 1, None, heads)]
    conditions += [Condition("random 1", 1, i, heads) for i in range(len(draws))]
    tables = [
        pd.DataFrame({"set": "task", "correct": row, "loss": np.zeros(len(row))})
        for row in [unablated, top, *draws]
    ]
    return causality._result(conditions, tables, {})


def test_the_p_value_counts_draws_that_are_as_bad_ties_included():
    yes, no = [True] * 4, [False] * 4
    half = [True, True, False, False]
    result = by_hand(yes, half, [yes, yes, half, no])
    rank = result.rank(1, "accuracy")
    assert (rank["as_bad"], rank["draws"]) == (2, 4)
    assert result.p_value() == pytest.approx(3 / 5)
    assert rank["top"] == -0.5 and rank["random"] == pytest.approx(-0.375)
    assert (rank["random_low"], rank["random_high"]) == (-1.0, 0.0)
    assert rank["gap"] == pytest.approx(-0.125)
    assert rank["gap_low"] < -0.125 < rank["gap_high"]


def test_the_crossed_interval_has_the_spread_of_prompts_and_of_draws():
    generator = np.random.default_rng(0)
    prompts, draws = generator.normal(size=(1, 400)), generator.normal(size=(20, 1))
    low, high = crossed_interval(prompts + 0 * draws)
    assert (high - low) / 2 == pytest.approx(1.96 * prompts.std() / 400**0.5, rel=0.15)
    low, high = crossed_interval(draws + 0 * prompts)
    assert (high - low) / 2 == pytest.approx(1.96 * draws.std() / 20**0.5, rel=0.15)
    assert crossed_interval(np.ones((3, 3))) == (1.0, 1.0)


def test_a_killed_run_goes_on_and_ends_with_the_same_table(
    model, scores, prompts, text, result, tmp_path, monkeypatch
):
    settings = {"ks": (1, 2), "draws": 3, "other": text, "out": tmp_path, "progress": False}
    evaluate, calls = causality.evaluate, []

    def counted(*args, **kwargs):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(1)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(causality, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        ablation_control(model, scores, prompts, **settings)
    monkeypatch.setattr(causality, "evaluate", evaluate)
    again = ablation_control(model, scores, prompts, **settings)
    pd.testing.assert_frame_equal(again.table, result.table)
    pd.testing.assert_frame_equal(again.differences, result.differences)
    assert json.loads((tmp_path / "run.json").read_text())["resumed"]["shards_kept"] == 3


@pytest.mark.parametrize("wrong", [{"ks": ()}, {"ks": (0,)}, {"draws": 0}], ids=str)
def test_numbers_that_make_no_experiment(model, scores, prompts, wrong):
    with pytest.raises(CausalityError, match="from 1 on"):
        ablation_control(model, scores, prompts, **wrong)


def test_a_layer_without_enough_other_heads(model, scores, prompts):
    with pytest.raises(ScoresError, match="smaller k or match=None"):
        ablation_control(model, scores, prompts, ks=(6,))


def test_what_a_result_does_not_have(result):
    with pytest.raises(CausalityError, match="one of 1, 2"):
        result.rank(3, "accuracy")
    with pytest.raises(CausalityError, match="accuracy, loss, text_loss"):
        result.p_value(1, "logit_diff")
