"""Handwritten digits: small real images with labels, for a classifier of images.

The 1,797 digits of 8 x 8 grey values that come with scikit-learn, which are the test set of the UCI
repository's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC BY 4.0; 13
writers that no other of its sets has). Grey values 0-16 become 0-255.

They are cut once and for all, each digit in the same shares: `train` is what `digits-vit` learned
from, `validation` is there to choose heads by, `test` to say what that does.
"""

from typing import Any, Literal, get_args

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from jaxtyping import Int

from interp.errors import UserError

Split = Literal["train", "validation", "test"]
SHARES = {"train": 0.55, "validation": 0.17, "test": 0.28}
NAMES = [str(digit) for digit in range(10)]


class DigitsError(UserError):
    """Digits that cannot be had as asked."""


def digits(split: Split = "test", n: int | None = None) -> Dataset:
    """Rows with `image` (PIL, 8 x 8, grey) and `target` (the digit); `n`: the first so many.

    A split is in random order, so its first rows are a random sample.

    Raises:
        DigitsError: Another split, an `n` that it does not have, or no scikit-learn or pillow.
    """
    if split not in get_args(Split):
        raise DigitsError(f"split={split!r}: one of {', '.join(get_args(Split))}.")
    images, targets = _read()
    rows = split_of(targets, split)
    n = len(rows) if n is None else n
    if not 1 <= n <= len(rows):
        raise DigitsError(f"n={n}: {split} has from 1 to {len(rows)}.")
    from PIL import Image as Pillow

    return Dataset.from_dict(
        {
            "image": [Pillow.fromarray(images[row]) for row in rows[:n]],
            "target": targets[rows[:n]],
        },
        features=Features({"image": Image(), "target": ClassLabel(names=NAMES)}),
    )


def split_of(targets: Int[np.ndarray, " image"], split: Split) -> Int[np.ndarray, " row"]:
    """Which images are a split's, in its order: a fixed draw within each digit."""
    generator = np.random.default_rng(20231)
    edges = np.cumsum([0.0, *SHARES.values()])
    place = list(SHARES).index(split)
    chosen = []
    for digit in range(len(NAMES)):
        own = generator.permutation(np.flatnonzero(targets == digit))
        first, last = (round(edge * len(own)) for edge in edges[place : place + 2])
        chosen.append(own[first:last])
    return np.random.default_rng(place).permutation(np.concatenate(chosen))


def _read() -> tuple[Any, Any]:
    try:
        from PIL import Image as Pillow  # noqa: F401
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DigitsError(
            f"digits: {error.name} is not installed; the images come with scikit-learn and are "
            "opened by pillow. Install both: pip install 'interp[vision]'."
        ) from error
    data = load_digits()
    images = (np.asarray(data.images) * 255 / 16).round().astype(np.uint8)
    return images, np.asarray(data.target)
