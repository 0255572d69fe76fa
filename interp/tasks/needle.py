"""The needle task: find the code that one sentence of a long text gives, and copy it out.

    ... filler. The secret code of Emma is amber river stone. filler ... Question: What is the
    secret code of Emma? Answer: The secret code of Emma is          -> " amber river stone"

A grid of prompt lengths and needle depths, as in Wu et al. 2024, "Retrieval Head Mechanistically
Explains Long-Context Factuality" (arXiv 2404.15574). Unlike the authors' code: spans are exact
(known from the building of the text, not searched), the needle always stands between sentences, no
special token is written into the text, and folders are read in the order of their file names.
"""

import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, product
from operator import neg
from pathlib import Path

from datasets import Dataset

from interp.tasks import filler
from interp.tasks.prompts import PromptError, context_window, count, from_examples, tokenizer_of
from interp.tasks.text import read_texts

OWNERS = (
    "David", "Emma", "Frank", "Helen", "Jack", "Karen", "Laura", "Martin", "Nancy", "Oscar",
    "Peter", "Robert", "Sarah", "Thomas",
)  # fmt: skip
CODEWORDS = (
    "amber", "apple", "arrow", "autumn", "beach", "bell", "bird", "blue", "brown", "candle",
    "castle", "chair", "circle", "cloud", "copper", "corn", "cotton", "crown", "dream", "eagle",
    "engine", "feather", "finger", "flower", "ghost", "glass", "gold", "green", "hammer",
    "honey", "horse", "iron", "island", "jacket", "lamp", "leaf", "lemon", "lion", "marble",
    "mirror", "moon", "mountain", "music", "ocean", "orange", "paper", "pearl", "piano", "pilot",
    "planet", "purple", "rabbit", "red", "rice", "ring", "rocket", "rose", "sand", "shadow",
    "silver", "snow", "spider", "spoon", "star", "steel", "stone", "sugar", "sun", "tiger",
    "tree", "turtle", "valley", "velvet", "violet", "water", "wheel", "wind", "wolf",
)  # fmt: skip
STATEMENT = "The secret code of {owner} is{answer}."
QUESTION = "Question: What is the secret code of {owner}? Answer: The secret code of {owner} is"


class NeedleError(PromptError):
    """A needle, or a grid of them, that cannot be built."""


@dataclass(frozen=True)
class Needle:
    """The wording: `{owner}` and `{answer}` are filled in, the answer with its leading space.

    An answer is drawn from `codewords` (words or whole phrases), an owner from `owners`. What
    follows "Answer:" in the question opens the assistant's turn in a chat.
    """

    statement: str = STATEMENT
    question: str = QUESTION
    owners: Sequence[str] = field(default=OWNERS, repr=False)
    codewords: Sequence[str] = field(default=CODEWORDS, repr=False)

    def __post_init__(self):
        if self.statement.count("{answer}") != 1 or "{answer}" in self.question:
            raise NeedleError(
                f"statement={self.statement!r}, question={self.question!r}: "
                "'{answer}' has to stand once in the statement, and never in the question."
            )
        if "{owner}" in self.statement + self.question and not self.owners:
            raise NeedleError("owners: none, but the wording has an '{owner}'.")


def needle(
    model,
    lengths: int | Sequence[int] = (256, 512),
    depths: int | Sequence[float] = 5,
    n: int = 20,
    seed: int = 0,
    *,
    needles: int = 1,
    n_words: int = 3,
    wording: Needle = Needle(),
    haystack: str | Path | None = None,
    chat: bool = False,
) -> Dataset:
    """`n` needle prompts in all, spread evenly over the grid of `lengths` x `depths`.

    `lengths` are in tokens, prompt and answer together: no prompt is longer, and none could take
    one more sentence. `depths` are shares of the haystack before the needle, from 0 to 1 (a number
    of them: evenly spaced), rounded to a whole sentence. The answer is `n_words` of the codewords.
    With `needles` > 1, as many statements about different owners are planted and one is asked for.
    `haystack` is a .txt file or a folder of them; None is our filler, different in every prompt.

    Spans: `needle` (the statement), `answer` (the code in it), `question`. Further columns:
    `length`, `depth`, `owner`, and with several needles `distractors`, a list of `[start, end)`.
    """
    lengths = [lengths] if isinstance(lengths, int) else [int(length) for length in lengths]
    depths = _depths(depths)
    _check(model, lengths, n, needles, n_words, wording)
    tokenizer = tokenizer_of(model)
    hay = _Filler(tokenizer) if haystack is None else _Corpus(tokenizer, haystack)
    rng = random.Random(f"needle {seed}")
    examples = []
    for length, depth in _spread(list(product(lengths, depths)), n):
        case = _case(rng, wording, needles, n_words)
        examples.append(_fit(model, case, hay, length, depth, rng, chat))
    about = {
        "lengths": lengths, "depths": depths, "n": n, "seed": seed, "needles": needles,
        "n_words": n_words, "statement": wording.statement, "question": wording.question,
        "haystack": hay.name,
    }  # fmt: skip
    return from_examples(model, examples, task="needle", parameters=about, chat=chat)


# The grid


def _depths(depths: int | Sequence[float]) -> list[float]:
    if isinstance(depths, int):
        if depths < 1:
            raise NeedleError(f"depths={depths}: give at least 1, or a list of shares from 0 to 1.")
        return [i / (depths - 1) for i in range(depths)] if depths > 1 else [0.5]
    depths = [float(depth) for depth in depths]
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong or not depths:
        raise NeedleError(f"depths={depths}: give shares of the haystack, from 0 to 1 (not %).")
    return depths


def _spread(cells: list[tuple[int, float]], n: int) -> list[tuple[int, float]]:
    """`n` cells, each as often as the next give or take one, in the order of the grid."""
    every, rest = divmod(n, len(cells))
    extra = {(2 * i + 1) * len(cells) // (2 * rest) for i in range(rest)}  # evenly spaced
    return [cell for i, cell in enumerate(cells) for _ in range(every + (i in extra))]


def _check(model, lengths, n: int, needles: int, n_words: int, wording: Needle) -> None:
    if n < 1:
        raise NeedleError(f"n={n}: give the number of prompts, at least 1.")
    window = context_window(model)
    if not lengths:
        raise NeedleError("lengths: none; give prompt lengths in tokens, such as [256, 512].")
    if window and max(lengths) > window:
        raise NeedleError(
            f"lengths={lengths}: the model's context window has {window} tokens; give at most that."
        )
    if needles < 1 or n_words < 1 or needles * n_words > len(wording.codewords):
        raise NeedleError(
            f"needles={needles}, n_words={n_words}: both from 1, and their product at most "
            f"the {len(wording.codewords)} codewords, since no word is used twice in a prompt."
        )
    if needles > 1 and not ("{owner}" in wording.statement and "{owner}" in wording.question):
        raise NeedleError(f"needles={needles}: statement and question need an '{{owner}}' then.")
    if needles > max(1, len(wording.owners)):
        raise NeedleError(
            f"needles={needles}: there are {len(wording.owners)} owners to tell apart."
        )


# One prompt


@dataclass(frozen=True)
class _Case:
    """What is planted and asked; the first statement is the one asked for."""

    owner: str | None
    answer: str
    statements: tuple[str, ...]
    question: str
    at: int  # where the answer begins in its statement


def _case(rng: random.Random, wording: Needle, needles: int, n_words: int) -> _Case:
    words = rng.sample(wording.codewords, needles * n_words)
    owners = rng.sample(wording.owners, needles) if wording.owners else [""]
    answers = ["".join(f" {w}" for w in words[i::needles]) for i in range(needles)]
    # the answer brings its space along
    before, _, after = wording.statement.replace(" {answer}", "{answer}").partition("{answer}")
    before, after = (
        [part.replace("{owner}", owner) for owner in owners] for part in (before, after)
    )
    return _Case(
        owner=owners[0] or None,
        answer=answers[0],
        statements=tuple("".join(parts) for parts in zip(before, answers, after, strict=True)),
        question=wording.question.replace("{owner}", owners[0]),
        at=len(before[0]),
    )


def _fit(model, case: _Case, hay, length: int, depth: float, rng: random.Random, chat) -> dict:
    """The example with as many sentences of the haystack as `length` allows."""
    bare = count(model, _example(case, [], depth), chat=chat)
    fewest = max(1, len(case.statements) - 1)  # distractors stand at places of their own
    sentences, sizes = hay.draw(rng, length - bare, fewest)

    def size(k: int) -> int:
        return count(model, _example(case, sentences[:k], depth), chat=chat)

    if size(fewest) > length:
        raise NeedleError(
            f"lengths: the needle does not fit in {length} tokens: with question, answer and "
            f"{fewest} sentence(s) of haystack it needs {size(fewest)}. Give longer lengths, or "
            "fewer needles or n_words."
        )
    k = max(fewest, bisect_right(list(accumulate(sizes)), length - bare))  # near; now exactly:
    while size(k) > length:
        k -= 1
    while k < len(sentences) and size(k + 1) <= length:
        k += 1
    if k == len(sentences):
        raise NeedleError(
            f"haystack: {hay.name} has too little text, {sum(sizes)} tokens where a prompt of "
            f"{length} needs about {length - bare}. Give more text or shorter lengths."
        )
    return {**_example(case, sentences[:k], depth), "length": length}


def _example(case: _Case, sentences: list[str], depth: float) -> dict:
    """Haystack, statements and question as one text, with the characters where each stands."""
    planted = _places(case, len(sentences), depth)
    parts, places, at = [], {}, 0
    for gap in range(len(sentences) + 1):
        if gap in planted:
            statement = case.statements[planted[gap]]
            places[planted[gap]] = (at, at + len(statement))
            parts.append(statement)
            at += len(statement) + 1
        for sentence in sentences[gap : gap + 1]:
            parts.append(sentence)
            at += len(sentence) + 1
    asked, marker, reply = case.question.partition("Answer:")
    start = places[0][0] + case.at
    others = [places[i] for i in sorted(places) if i]
    return {
        "text": " ".join([*parts, case.question]),
        "answer": case.answer,
        "reply": reply.lstrip() if marker else "",
        "char_spans": {
            "needle": places[0],
            "answer": (start, start + len(case.answer)),
            "question": (at, at + len(asked.rstrip())),
        },
        "char_span_lists": {"distractors": others} if others else {},
        "depth": depth,
        "owner": case.owner,
    }


def _places(case: _Case, n_sentences: int, depth: float) -> dict[int, int]:
    """Gap between sentences -> the statement in it: the one asked for at `depth`, others apart."""
    asked = round(depth * n_sentences)
    free = [gap for gap in range(n_sentences + 1) if gap != asked]
    others = list(range(1, len(case.statements)))[: len(free)]
    gaps = random.Random(case.statements[0]).sample(free, len(others))
    return {asked: 0, **dict(zip(gaps, others, strict=True))}


# The haystack


class _Filler:
    """Our own sentences: another text for every prompt, no sentence twice in it."""

    name = "filler"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def draw(self, rng: random.Random, room: int, fewest: int) -> tuple[list[str], list[int]]:
        """More than enough sentences for `room` tokens, and about how many tokens each has."""
        lines = filler.sentences(rng.getrandbits(32))
        sentences = list(islice(lines, fewest + 1))
        sizes = _sizes(self.tokenizer, sentences)
        while sum(sizes) < 1.25 * room:  # a sentence has other tokens alone than in the text
            more = list(islice(lines, room // 16 + 4))
            sentences, sizes = sentences + more, sizes + _sizes(self.tokenizer, more)
        return sentences, sizes


class _Corpus:
    """Sentences of .txt files in the order of the files' names, from a place drawn per prompt."""

    def __init__(self, tokenizer, path: str | Path):
        self.name = str(path)
        self.sentences = [s for text in read_texts(path).values() for s in split(text)]
        self.sizes = _sizes(tokenizer, self.sentences)
        self.left = [*accumulate(reversed(self.sizes))][::-1]  # tokens from sentence i to the end

    def draw(self, rng: random.Random, room: int, fewest: int) -> tuple[list[str], list[int]]:
        """As `_Filler.draw`, as far as the text reaches."""
        starts = min(self._first_with(1.25 * room), len(self.left) - fewest)
        start = rng.randrange(max(1, starts))
        stop = self._first_with(self.left[start] - 1.25 * room) + 1
        chosen = slice(start, max(stop, start + fewest + 1))
        return self.sentences[chosen], self.sizes[chosen]

    def _first_with(self, left: float) -> int:
        """The first sentence from which no more than `left` tokens follow."""
        return bisect_left(self.left, -left, key=neg)


def split(text: str, longest: int = 60) -> list[str]:
    """Sentences by punctuation and empty lines, white space made single.

    What has no full stop for `longest` words (a table, verse) is cut there.
    """
    found = re.split(r"""(?<=[.!?])\s+|(?<=[.!?]["')])\s+|\n\s*\n""", text)
    words = [sentence.split() for sentence in found]
    return [
        " ".join(sentence[i : i + longest])
        for sentence in words
        for i in range(0, len(sentence), longest)
    ]


def _sizes(tokenizer, sentences: list[str]) -> list[int]:
    got = tokenizer(sentences, add_special_tokens=False, verbose=False)
    return [len(ids) for ids in got["input_ids"]]
