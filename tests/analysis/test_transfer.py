"""Heads of one task for another: the cells are LoFiT fits, and the tables say what they hold."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

import interp
from interp.analysis.transfer import HeadTransfer, Parts, TransferError, head_transfer
from interp.intervention.descent import Tuning
from interp.intervention.lofit import LoFiT
from tests.tiny import random_ids, tiny, unchecked, with_answers

QUICK = Tuning(lr=0.05, epochs=1, batch_size=6)
SETTINGS = {"k": 2, "selection": QUICK, "tuning": QUICK, "progress": False}


def task(answer: int) -> Parts:
    def prompts(n: int, seed: int) -> Dataset:
        return with_answers(random_ids(*[6] * n, seed=seed), [[answer]] * n, [(0, 1)] * n)

    return Parts(prompts(6, answer), prompts(2, answer + 1), prompts(8, answer + 2))


TASKS = {"forty": task(40), "fifty": task(50)}


@pytest.fixture(scope="module")
def found() -> HeadTransfer:
    return head_transfer(tiny("llama"), TASKS, seeds=(0, 1), **SETTINGS)


def test_a_cell_is_the_task_learned_on_the_other_s_heads(found):
    model, other = tiny("llama"), TASKS["forty"]
    scores = LoFiT.select(
        model, TASKS["fifty"].train, validation=TASKS["fifty"].validation, tuning=QUICK, seed=1,
        progress=False,
    )  # fmt: skip
    assert found.chosen["fifty", "forty", 1] == tuple(scores.top(2))
    edit = LoFiT.fit(
        model, other.train, scores.top(2), tuning=QUICK, validation=other.validation, seed=1,
        progress=False,
    )  # fmt: skip
    with model.intervene(edit):
        expected = interp.evaluate(model, other.test, progress=False).table
    cell = found.samples.query("heads == 'fifty' and task == 'forty' and seed == 1")
    assert cell["loss"].tolist() == pytest.approx(expected["loss"].tolist(), abs=1e-6)
    assert cell["correct"].tolist() == expected["correct"].tolist()


def test_random_heads_are_others_and_the_unedited_model_is_there_once(found):
    for name in TASKS:
        for seed in (0, 1):
            own, drawn = found.chosen[name, name, seed], found.chosen["random", name, seed]
            assert len(own) == len(drawn) == 2 and not set(own) & set(drawn)
    plain = found.samples.query("heads == 'no edit' and task == 'forty'")
    expected = interp.evaluate(tiny("llama"), TASKS["forty"].test, progress=False).table
    assert plain["loss"].tolist() == pytest.approx(expected["loss"].tolist(), abs=1e-6)
    assert plain["seed"].tolist() == [0] * 8


def test_learning_helps_whichever_heads_are_taken(found):
    loss = found.matrix("loss")
    assert list(loss.index) == ["no edit", "forty", "fifty", "random"]
    assert (loss.drop("no edit") < loss.loc["no edit"]).all().all()


def test_tables_are_means_over_seeds_and_prompts():
    """A result written by hand: two seeds, three prompts."""
    rows = []
    right = {
        ("no edit", "a"): [[0, 0, 1]], ("a", "a"): [[1, 1, 1], [1, 1, 0]],
        ("b", "a"): [[0, 0, 1], [0, 1, 0]],
    }  # fmt: skip
    for (heads, name), seeds in right.items():
        for seed, values in enumerate(seeds):
            for prompt, value in enumerate(values):
                rows.append([heads, name, seed, prompt, bool(value), 1.0 - value])
    columns = ["heads", "task", "seed", "prompt", "correct", "loss"]
    made = HeadTransfer(pd.DataFrame(rows, columns=columns), {}, {})
    assert made.matrix()["a"].tolist() == pytest.approx([1 / 3, 5 / 6, 1 / 3])
    assert made.relative()["a"].tolist() == pytest.approx([0.4, 1.0, 0.4])
    change = made.differences.set_index(["heads", "metric"])
    assert change.loc[("b", "accuracy"), "value"] == pytest.approx(-0.5)
    assert change.loc[("no edit", "loss"), "value"] == pytest.approx(0.5)
    row = made.table.set_index(["heads", "metric"]).loc[("a", "accuracy")]
    assert row["low"] <= row["value"] <= row["high"] == 1.0
    assert (row["n"], row["seeds"]) == (3, 2)


def test_a_run_that_was_killed_ends_as_one_that_was_not(found, tmp_path, monkeypatch):
    model, real, count = tiny("llama"), LoFiT.fit, iter(range(99))

    def interrupted(*args, **kwargs):
        if next(count) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(LoFiT, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        head_transfer(model, TASKS, seeds=(0, 1), out=tmp_path, **SETTINGS)
    again = head_transfer(model, TASKS, seeds=(0, 1), out=tmp_path, **SETTINGS)
    assert again.chosen == found.chosen
    assert np.allclose(again.samples["loss"], found.samples["loss"], atol=1e-6)
    kept = interp.load_intervention(tmp_path / "learned" / "fifty-for-forty-1")
    assert kept.heads == tuple(sorted(found.chosen["fifty", "forty", 1]))
    assert next(count) < 14  # what was done was not done again


def test_it_is_shown_as_a_grid(found):
    figure = found.plot()
    assert figure.data[0].z.shape == (4, 2)
    assert "HeadTransfer(accuracy)" in repr(found) and "random" in repr(found)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"tasks": {}}, r"tasks=\[\], .*at least one of each"),
        ({"seeds": ()}, r"seeds=\[\]"),
        ({"tasks": {"random": TASKS["forty"]}}, "'random' are names of controls"),
    ],
)
def test_tasks_that_heads_can_not_be_carried_between(change, said):
    given = {"tasks": TASKS, "seeds": (0,)} | change
    with pytest.raises(TransferError, match=said):
        head_transfer(tiny("llama"), given.pop("tasks"), **given)


def test_an_unknown_metric(found):
    said = "metric='logit_diff': one of accuracy, loss"
    with unchecked(), pytest.raises(TransferError, match=said):
        found.matrix("logit_diff")
