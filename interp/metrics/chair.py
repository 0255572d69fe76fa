"""CHAIR: how many of the objects that captions name are not in their images?

With m(c) the mentions of objects in caption c (a list, repeats kept), u(c) the set of them, and
G(x) the objects of its image,

    CHAIR_i   = mentions not in G / mentions          CHAIR_s = captions with such a one / captions
    recall    = |u & G| / |G|                         precision = |u & G| / |u|

each a ratio of sums over all captions; `f1` is the harmonic mean of the last two. A caption that
names nothing counts in CHAIR_s as clean and adds nothing to CHAIR_i.

CHAIR alone rewards saying little, and saying a true thing again and again. So beside it stand
recall, the number of words, `chair_i_set` (= 1 - precision: each object once a caption) and
`distinct`, the share of different ones among a caption's runs of four words. For a fair comparison
cut the longer captions: `cut_to_recall`, `first_words`; and `whole_sentences` where a token limit
has left half of one.

Source: Rohrbach et al. 2018, "Object Hallucination in Image Captioning" (arXiv 1809.02156); recall
and length as in the rewrite that later papers use. See `interp.metrics.vocabulary` for how words
are read. An image without annotations is an error here (the rewrite takes it as empty); the length
counts words without punctuation (there, with it).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from interp.metrics.measured import Measured, MetricError, Rates, Sums, ratio
from interp.metrics.vocabulary import WORD, Mention, Vocabulary
from interp.provenance import digest_rows

SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
GRAM = 4

Captions = Mapping[Any, Any] | Sequence[Any] | pd.Series | pd.DataFrame
Objects = Mapping[Any, Iterable[str]] | Sequence[Iterable[str]]


@dataclass(frozen=True, eq=False)
class Chair(Measured):
    """CHAIR of some captions: `summary()`, `minus(other)`, `chair["recall"]`.

    `table` has a row a caption: `image, caption, objects` (G), what was `named` and `hallucinated`
    (lists of mentions' objects, repeats kept), and the counts that the rates are made of.
    """

    quantities: ClassVar[tuple[str, ...]] = (
        "captions", "bad_captions", "n_mentions", "n_hallucinated", "n_named", "n_right",
        "n_objects", "n_words", "n_grams", "n_distinct",
    )  # fmt: skip
    shares: ClassVar[tuple[str, ...]] = (
        "chair_s", "chair_i", "chair_i_set", "recall", "precision", "f1", "distinct",
    )  # fmt: skip

    @staticmethod
    def rates(sums: Sums) -> Rates:
        """The formulas of this module on sums over captions."""
        named, right, objects = sums["n_named"], sums["n_right"], sums["n_objects"]
        precision = ratio(right, named)
        return {
            "chair_s": ratio(sums["bad_captions"], sums["captions"]),
            "chair_i": ratio(sums["n_hallucinated"], sums["n_mentions"]),
            "chair_i_set": 1 - precision,
            "recall": ratio(right, objects),
            "precision": precision,
            "f1": ratio(2 * right, named + objects),
            "words": ratio(sums["n_words"], sums["captions"]),
            "distinct": ratio(sums["n_distinct"], sums["n_grams"]),
        }

    @cached_property
    def mentions(self) -> pd.DataFrame:
        """A row a mention: `row` of `table`, `word, object, start, end` (characters), `right`."""
        columns = ["row", "word", "object", "start", "end", "right"]
        return pd.DataFrame(
            [
                (n, m.word, m.object, m.start, m.end, m.object in objects)
                for n, (found, objects) in enumerate(
                    zip(self.table["mentions"], self.table["objects"], strict=True)
                )
                for m in found
            ],
            columns=columns,
        )

    def __repr__(self) -> str:
        rates = self._rates()
        shown = ", ".join(f"{name} {rates[name]:.3f}" for name in ("chair_s", "chair_i"))
        beside = f"recall {rates['recall']:.3f}, {rates['words']:.1f} words"
        return f"Chair({shown}; {beside}; {len(self.table)} captions)"


def chair(
    captions: Captions,
    objects: Objects,
    vocabulary: Vocabulary,
    *,
    cut: Callable[[str], str] | None = None,
    **about,
) -> Chair:
    """Which objects do captions name that their images lack?

    Args:
        captions: image -> caption (or several), or rows with `image` and `caption`; or texts, in
            the order of `objects`.
        objects: image -> what is in it, or a list of that. Any word of the vocabulary will do.
        cut: What to make of each caption first, such as `whole_sentences`.
        about: What else the result shall remember: prompt, token limit, ...

    Raises:
        MetricError: No captions, an image without annotations, an object that is no word of the
            vocabulary, a caption that is no text.
    """
    rows = [
        _row(image, caption if cut is None else cut(caption), there, vocabulary)
        for image, caption, there in _aligned(captions, objects, vocabulary)
    ]
    table = pd.DataFrame(rows)
    metadata = {
        "metric": "chair",
        "vocabulary": vocabulary.version,
        "plurals": "rules",
        "images": digest_rows({"image": image} for image in table["image"]),
        "n_images": int(table["image"].nunique()),
        **about,
    }
    return Chair(table, metadata)


def first_words(caption: str, n: int) -> str:
    """The caption up to its n-th word. Raises `MetricError` for a negative `n`."""
    if n < 0:
        raise MetricError(f"n={n}: a number of words, from 0 on.")
    ends = [match.end() for match in WORD.finditer(caption)]
    return caption if n >= len(ends) else caption[: ends[n - 1]] if n else ""


def whole_sentences(caption: str) -> str:
    """The caption without a last sentence that was cut short; "" where there is no other."""
    ends = [match.end() for match in SENTENCE_END.finditer(caption)]
    return caption[: ends[-1]] if ends else ""


def cut_to_recall(
    captions: Captions, objects: Objects, vocabulary: Vocabulary, recall: float
) -> tuple[list[dict[str, str]], int]:
    """Captions after their first k words, with the smallest k that leaves a recall of `recall`.

    The control for a method that names less: plain captions cut to its recall. Returns them as
    rows with `image` and `caption`, and k. Raises `MetricError` where whole captions recall less.
    """
    rows = _aligned(captions, objects, vocabulary)
    found_at: list[int] = []
    for _, caption, there in rows:
        ends = [match.end() for match in WORD.finditer(caption)]
        first: dict[str, int] = {}
        for mention in vocabulary.mentions(caption):
            words = sum(end <= mention.end for end in ends)
            first.setdefault(mention.object, words)
        found_at += [words for name, words in first.items() if name in there]
    n_objects = sum(len(there) for *_, there in rows)
    reached = np.bincount(found_at or [0], minlength=1).cumsum() / max(n_objects, 1)
    reached = reached if found_at else np.zeros(1)
    enough = np.flatnonzero(reached >= recall - 1e-12)
    if not len(enough):
        raise MetricError(
            f"recall={recall:.3f}: the whole captions reach {reached[-1]:.3f}; nothing to cut."
        )
    k = int(enough[0])
    return [{"image": i, "caption": first_words(text, k)} for i, text, _ in rows], k


def _row(image: str, caption: str, objects: frozenset[str], vocabulary: Vocabulary) -> dict:
    mentions: list[Mention] = vocabulary.mentions(caption)
    named = [mention.object for mention in mentions]
    wrong = [name for name in named if name not in objects]
    words = [match.group().lower() for match in WORD.finditer(caption)]
    grams = [tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1)]
    return {
        "image": image,
        "caption": caption,
        "objects": sorted(objects),
        "named": named,
        "hallucinated": wrong,
        "mentions": mentions,
        "captions": 1,
        "bad_captions": int(bool(wrong)),
        "n_mentions": len(named),
        "n_hallucinated": len(wrong),
        "n_named": len(set(named)),
        "n_right": len(set(named) & objects),
        "n_objects": len(objects),
        "n_words": vocabulary.n_words(caption),
        "n_grams": len(grams),
        "n_distinct": len(set(grams)),
    }


def _aligned(
    captions: Captions, objects: Objects, vocabulary: Vocabulary
) -> list[tuple[str, str, frozenset[str]]]:
    """(image, caption, its objects) for each caption."""
    rows = _caption_rows(captions)
    if not rows:
        raise MetricError("captions: none; there is nothing to measure.")
    for n, (_, caption) in enumerate(rows):
        if not isinstance(caption, str):
            raise MetricError(f"captions: {n} is {type(caption).__name__}, not text.")
    if isinstance(objects, Mapping):
        if any(image is None for image, _ in rows):
            raise MetricError(
                "captions: texts alone don't say which image they are of, and objects go by image; "
                "give image -> caption."
            )
        known = {str(image): there for image, there in objects.items()}
        named = [(str(image), caption) for image, caption in rows]
        missing = sorted({image for image, _ in named if image not in known})
        if missing:
            raise MetricError(
                f"objects: the image {missing[0]} (of {len(missing)} such) has no annotations."
            )
        pairs = [(image, caption, known[image]) for image, caption in named]
    else:
        if len(objects) != len(rows):
            raise MetricError(f"objects: {len(objects)} for {len(rows)} captions; one for each.")
        pairs = [
            (str(n if image is None else image), caption, there)
            for n, ((image, caption), there) in enumerate(zip(rows, objects, strict=True))
        ]
    strange = [image for image, _, there in pairs if isinstance(there, str)]
    if strange:
        raise MetricError(f"objects: those of image {strange[0]} are one text; give a list.")
    object_of = cache(vocabulary.object_of)
    return [(image, text, frozenset(map(object_of, there))) for image, text, there in pairs]


def _caption_rows(captions: Captions) -> list[tuple[Any, Any]]:
    """(image, or None, and caption) for each caption."""
    if isinstance(captions, str):
        raise MetricError("captions: one text; give a list of them.")
    if isinstance(captions, pd.DataFrame):
        captions = captions.to_dict("records")
    if isinstance(captions, Mapping):
        return [
            (image, text)
            for image, texts in captions.items()
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
    rows = []
    for n, row in enumerate(captions):
        if isinstance(row, Mapping):
            if "image" not in row or "caption" not in row:
                raise MetricError(f"captions: row {n} needs `image` and `caption`.")
            rows.append((row["image"], row["caption"]))
        else:
            rows.append((None, row))
    return rows
