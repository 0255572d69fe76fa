"""Which objects does a text name? A table of words, and how words are read by it.

A text is read from left to right. The longest phrase of the table that begins at a word is taken,
its last word in the singular or the plural ("traffic lights"), and written with spaces or hyphens.
A phrase may stand for another word ("baby elephant": elephant) or for nothing ("home plate").

Rohrbach et al. 2018, "Object Hallucination in Image Captioning" (arXiv 1809.02156), and the
rewrite that most later papers use, do the same with pairs of words. What differs here, and can move
a number a little: plurals are undone by rules, and only where that leads to a word of the table
(the code of 2018 makes every word singular, the rewrite takes WordNet's lemmas, for verbs too:
"skiing" names skis there and nothing here); phrases may have three words or more; entries that the
rewrite can never reach ("iPhone", "stove top oven") do count.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path

from interp.metrics.measured import MetricError

WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
OURS = Path(__file__).with_name("coco_objects.txt")
IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "policemen": "policeman",
    "firemen": "fireman",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "calves": "calf",
    "feet": "foot",
    "teeth": "tooth",
}

# MSCOCO's phrases that must not be read word by word, as in both codes: "baby" and "adult" before
# an animal and "passenger" before a vehicle are no person, a home plate is no dinner's.
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
COCO_PHRASES: dict[str, str] = {
    **{f"{age} {name}": name for age in ("baby", "adult") for name in (*ANIMALS, "animal", "cub")},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "home plate": "",
    "train track": "",
}
COCO_UNLESS = {"seat": "toilet"}


@dataclass(frozen=True)
class Mention:
    """One object that a text names: the words, the object they stand for, and where they are."""

    word: str
    object: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words for objects.

    `synonyms`: object -> its other words. `phrases`: several words -> the word they stand for, ""
    for nothing. `unless`: a word that is no object in a text which also has the other one.
    """

    synonyms: Mapping[str, Sequence[str]]
    phrases: Mapping[str, str] = field(default_factory=dict)
    unless: Mapping[str, str] = field(default_factory=dict)
    version: str = "unnamed"

    def __post_init__(self):
        if not self.synonyms:
            raise MetricError("synonyms: none; a vocabulary needs an object at least.")
        self._object_of  # noqa: B018, raises

    @classmethod
    def read(cls, path: str | Path) -> "Vocabulary":
        """A table with MSCOCO's phrases from a published file, whatever its format.

        Text (`synonyms.txt`: a line an object, its name first, words apart by comma), a Python file
        that holds that text (the rewrite's `chair.py`, which is parsed and never run), or JSON
        (object -> words, or a list of lists).
        """
        path = Path(path).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MetricError(f"{path}: cannot be read as a vocabulary ({error}).") from error
        rows = {".json": _json_rows, ".py": _python_rows}.get(path.suffix, _text_rows)(text, path)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cls(_synonyms(rows), COCO_PHRASES, COCO_UNLESS, f"{path.name} {digest}")

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects, by name."""
        return tuple(self.synonyms)

    @property
    def words(self) -> dict[str, str]:
        """Every word, and the object it stands for."""
        return dict(self._object_of)

    def object_of(self, word: str) -> str:
        """The object that a word stands for. Raises `MetricError` with the nearest words."""
        found = self._lookup(_plain(word).split(" "))
        if not found:
            near = get_close_matches(_plain(word), self._object_of, n=3)
            hint = f"the nearest: {', '.join(near)}" if near else f"it has {len(self.words)} words"
            raise MetricError(
                f"object {word!r}: the vocabulary {self.version!r} has no such word; {hint}."
            )
        return self._object_of[found]

    def mentions(self, text: str) -> list[Mention]:
        """The objects that a text names, in its order, repeats and all."""
        found = [
            (entry, text[start:end].lower(), start, end)
            for entry, start, end in self._entries(text)
            if entry
        ]
        there = {entry for entry, *_ in found}
        return [
            Mention(word, self._object_of[entry], start, end)
            for entry, word, start, end in found
            if entry in self._object_of and self._unless.get(entry) not in there
        ]

    def n_words(self, text: str) -> int:
        """How many words a text has, where a phrase of the table is one, and punctuation none."""
        return sum(1 for _ in self._entries(text))

    def _entries(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Each word or phrase: what it is in the table ("": nothing), and its characters."""
        spoken = list(self._pieces(text))
        place = 0
        while place < len(spoken):
            for size in range(min(self._longest, len(spoken) - place), 0, -1):
                some = spoken[place : place + size]
                between = text[some[0][1] : some[-1][2]]
                if size > 1 and not re.fullmatch(r"[\w\s-]+", between):
                    continue  # a comma or full stop ends a phrase
                entry = self._lookup([word for word, *_ in some])
                if entry is not None:
                    yield entry, some[0][1], some[-1][2]
                    place += size
                    break
            else:
                yield "", *spoken[place][1:]
                place += 1

    def _pieces(self, text: str) -> Iterator[tuple[str, int, int]]:
        """The words of a text; one with hyphens comes apart where its parts are a phrase."""
        for match in WORD.finditer(text):
            word, start = match.group().lower(), match.start()
            parts = word.split("-")
            if len(parts) > 1 and self._lookup(parts) is not None:
                for part in parts:
                    yield part, start, start + len(part)
                    start += len(part) + 1
            else:
                yield word, start, match.end()

    def _lookup(self, words: list[str]) -> str | None:
        """The entry that these words are, "" for one that means nothing; None where there is none.

        A phrase that stands for another word is that word's entry.
        """
        *before, last = words
        for form in singulars(last):
            entry = " ".join([*before, form])
            if entry in self._phrases:
                return self._phrases[entry]
            if entry in self._object_of:
                return entry
        return None

    @cached_property
    def _object_of(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, words in self.synonyms.items():
            for word in (name, *words):
                other = found.setdefault(_plain(word), name)
                if other != name:
                    raise MetricError(
                        f"synonyms: {word!r} stands for {other!r} and for {name!r}; keep one."
                    )
        return found

    @cached_property
    def _phrases(self) -> dict[str, str]:
        return {_plain(phrase): _plain(word) for phrase, word in self.phrases.items()}

    @cached_property
    def _unless(self) -> dict[str, str]:
        return {_plain(word): _plain(other) for word, other in self.unless.items()}

    @cached_property
    def _longest(self) -> int:
        return max(entry.count(" ") + 1 for entry in (*self._object_of, *self._phrases))


@cache
def coco() -> Vocabulary:
    """The 80 objects of MSCOCO with words of our own choice; see `Vocabulary.read` for others'."""
    rows = _text_rows(OURS.read_text(encoding="utf-8"), OURS)
    return Vocabulary(_synonyms(rows), COCO_PHRASES, COCO_UNLESS, "interp coco 1")


# Words for the shapes of `interp.tasks.scenes`; the first of each is the task's own.
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "dot", "ball"),
    "square": ("box",),
    "triangle": (),
    "star": (),
    "cross": ("plus", "x"),
}


def scenes(
    colors: Iterable[str] | None = None, shapes: Mapping[str, Sequence[str]] | None = None
) -> Vocabulary:
    """Coloured shapes, such as "red circle"; default: those of `interp.tasks.scenes`.

    `shapes`: name -> other words for it. A shape without its colour is no object: it says too
    little to be right or wrong.
    """
    if colors is None or shapes is None:
        from interp.tasks.pictures import COLORS
        from interp.tasks.pictures import SHAPES as OWN

        colors = COLORS if colors is None else colors
        shapes = {name: SHAPES.get(name, ()) for name in OWN} if shapes is None else shapes
    synonyms = {
        f"{color} {shape}": [f"{color} {other}" for other in others]
        for color in colors
        for shape, others in shapes.items()
    }
    return Vocabulary(synonyms, version="interp scenes 1")


def singulars(word: str) -> Iterator[str]:
    """The word, and what it may be the plural of; most are no words, so look them up."""
    yield word
    if word in IRREGULAR:
        yield IRREGULAR[word]
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("ves"):
        yield from (word[:-3] + "f", word[:-3] + "fe")
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]


def _plain(word: str) -> str:
    return " ".join(word.lower().replace("-", " ").split())


def _synonyms(rows: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    """The first word of a row is the object's name."""
    cleaned = ([_plain(word) for word in row] for row in rows)
    return {name: [w for w in words if w] for name, *words in cleaned if name}


def _text_rows(text: str, path: Path) -> list[list[str]]:
    lines = (line.strip() for line in text.splitlines())
    return [line.split(",") for line in lines if line and not line.startswith("#")]


def _python_rows(text: str, path: Path) -> list[list[str]]:
    """From the longest text constant of the module."""
    try:
        constants = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    except (SyntaxError, ValueError) as error:
        raise MetricError(f"{path}: no Python that can be parsed ({error}).") from error
    tables = [c for c in constants if isinstance(c, str) and c.count("\n") > 1 and ", " in c]
    if not tables:
        raise MetricError(f"{path}: holds no text with a line of words an object.")
    return _text_rows(max(tables, key=lambda table: table.count(", ")), path)


def _json_rows(text: str, path: Path) -> list[list[str]]:
    try:
        found = json.loads(text)
        rows = [[k, *v] for k, v in found.items()] if isinstance(found, dict) else list(found)
        if not all(isinstance(word, str) for row in rows for word in row):
            raise ValueError("words must be text")
    except (ValueError, TypeError) as error:
        raise MetricError(f"{path}: object -> list of words, please ({error}).") from error
    return rows
