"""Scoring in shards: what is computed, in which order, and what a folder keeps."""

import pandas as pd
import pytest
from datasets import Dataset

from interp.analysis.shards import in_shards
from interp.runs import RunError

PROMPTS = Dataset.from_dict({"item": list(range(7))})


class Score:
    """Doubles each item; remembers what it was asked, and may fail at one item."""

    def __init__(self, fails_at: int = -1):
        self.asked: list[list[int]] = []
        self.fails_at = fails_at

    def __call__(self, rows: Dataset) -> pd.DataFrame:
        if self.fails_at in rows["item"]:
            raise KeyboardInterrupt
        self.asked.append(list(rows["item"]))
        return pd.DataFrame({"twice": [2 * i for i in rows["item"]]})


def shards(score, out=None, size=3, resume=True, settings=None):
    return in_shards(score, PROMPTS, size, settings or {"analysis": "x"}, out, resume, None)


@pytest.mark.parametrize("kept", [False, True])
def test_rows_come_in_the_order_of_the_prompts(tmp_path, kept):
    score = Score()
    table = shards(score, tmp_path if kept else None)
    assert score.asked == [[0, 1, 2], [3, 4, 5], [6]]
    assert table["twice"].tolist() == list(range(0, 14, 2))
    assert table.index.tolist() == list(range(7))


def test_a_run_that_was_stopped_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        shards(Score(fails_at=4), tmp_path)
    score = Score()
    table = shards(score, tmp_path, size=2)  # it keeps the size that it began with
    assert score.asked == [[3, 4, 5], [6]]
    pd.testing.assert_frame_equal(table, shards(Score()))


def test_a_run_may_be_started_anew(tmp_path):
    shards(Score(), tmp_path)
    score = Score()
    shards(score, tmp_path)
    assert score.asked == []
    shards(score, tmp_path, resume=False)
    assert len(score.asked) == 3


def test_other_settings_are_refused(tmp_path):
    shards(Score(), tmp_path)
    with pytest.raises(RunError, match="analysis is .*x.* there and .*y.* here"):
        shards(Score(), tmp_path, settings={"analysis": "y"})


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_at_least_one_prompt(size):
    with pytest.raises(RunError, match=f"batch_size={size}"):
        shards(Score(), size=size)
