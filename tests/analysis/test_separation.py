"""AUC against scipy and against counting pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from interp.analysis.separation import SeparationError, separation


def random_words(seed: int, n: int = 40):
    rng = np.random.default_rng(seed)
    right = rng.random(n) < 0.6
    right[:2] = [True, False]
    return rng.integers(0, 6, n).astype(float), right, rng.integers(0, 9, n), rng


@given(st.integers(0, 40))
def test_it_is_mann_whitney_s(seed):
    values, right, groups, _ = random_words(seed)
    found = separation(values, right, groups)
    expected = mannwhitneyu(values[right], values[~right]).statistic
    assert found.auc == pytest.approx(expected / found.n_pairs)
    assert found.n_pairs == found.n_right * found.n_wrong
    assert 0 <= found.low <= found.high <= 1


@given(st.integers(0, 40))
def test_pairs_are_of_one_stratum(seed):
    values, right, groups, rng = random_words(seed)
    strata = rng.integers(0, 3, len(values))
    strata[:2] = 0
    wins = pairs = 0
    for i in np.flatnonzero(right):
        for j in np.flatnonzero(~right):
            if strata[i] == strata[j]:
                pairs += 1
                wins += (values[i] > values[j]) + 0.5 * (values[i] == values[j])
    found = separation(values, right, groups, strata)
    assert found.n_pairs == pairs and found.auc == pytest.approx(wins / pairs)


def test_words_of_a_caption_are_drawn_together():
    """Forty copies of five captions say no more than five."""
    values, right, *_ = random_words(3, 200)
    own = separation(values, right, np.arange(200))
    together = separation(values, right, np.arange(200) % 5)
    assert together.high - together.low != own.high - own.low
    same = separation(np.tile([0.0, 1], 50), np.tile([False, True], 50), np.repeat(range(50), 2))
    assert (same.auc, same.low, same.high) == (1, 1, 1)
    assert str(same) == "1.00 (1.00 to 1.00)"


def test_nothing_to_tell_apart_is_an_error():
    with pytest.raises(SeparationError, match="2 words are right and 0 wrong"):
        separation([1.0, 2.0], [True, True], [0, 1])
    with pytest.raises(SeparationError, match="no stratum has both"):
        separation([1.0, 2.0], [True, False], [0, 1], [0, 1])
