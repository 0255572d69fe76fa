"""Handwritten digits: three splits, cut once and for all."""

import builtins
from collections import Counter

import numpy as np
import pytest

from interp.tasks import digits
from interp.tasks.digits import DigitsError
from tests.tiny import unchecked

SPLITS = ("train", "validation", "test")


def hashes(split):
    return [np.asarray(image).tobytes() for image in digits(split)["image"]]


def test_every_digit_is_in_one_split():
    parts = {split: hashes(split) for split in SPLITS}
    assert sum(map(len, parts.values())) == 1797
    seen = {split: set(part) for split, part in parts.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not seen[one] & seen[other]


@pytest.mark.parametrize("split", SPLITS)
def test_each_digit_has_the_same_share_and_no_order(split):
    targets = digits(split)["target"]
    counts = Counter(targets)
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) < 0.12 * len(targets) / 10 + 2
    assert len(set(targets[:20])) > 4


def test_images_are_small_and_grey_and_use_all_of_a_byte():
    image = digits("test", 1)["image"][0]
    assert image.size == (8, 8) and image.mode == "L"
    pixels = np.stack([np.asarray(i) for i in digits("test")["image"]])
    assert pixels.min() == 0 and pixels.max() == 255
    from sklearn.datasets import load_digits

    raw = load_digits().images
    assert {tuple(np.rint(p.ravel().astype(float) * 16 / 255)) for p in pixels} <= {
        tuple(image.ravel()) for image in raw
    }


def test_the_first_rows_are_those_of_the_whole():
    assert digits("validation", 7)["target"] == digits("validation")["target"][:7]


def test_bad_asking_is_named():
    with unchecked(), pytest.raises(DigitsError, match="split='all': one of train"):
        digits("all")
    with pytest.raises(DigitsError, match="n=9999: test has from 1 to 504"):
        digits("test", 9999)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("no sklearn", name="sklearn")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DigitsError, match=r"sklearn is not installed.*interp\[vision\]"):
        digits("test", 1)
