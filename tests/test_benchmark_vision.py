"""The benchmark of edits that read the image raises where one does nothing."""

import pytest

from benchmarks import vision
from interp.intervention.var import VAR
from interp.intervention.vhr import VHR


def test_captions_are_the_same_on_both_sides():
    records = list(vision.measure("mini-llava", 3, repeats=2))
    assert len(records) == 4
    assert max(record["largest_difference"] for record in records) == 0


@pytest.mark.parametrize("name", ["VHR", "VAR"])
def test_an_edit_that_does_nothing_is_not_timed(monkeypatch, name):
    idle = {"VHR": lambda: VHR(1.0), "VAR": lambda *args, **rest: VAR(*args, **rest, moved=0.0)}
    monkeypatch.setattr(vision, name, idle[name])
    with pytest.raises(AssertionError, match="moved no logit"):
        list(vision.measure("mini-llava", 3, repeats=2))
