"""Plain English filler that does not repeat: the haystack of the needle task, and its control text.

Sentences are drawn from a small grammar (about 8 million sentences), none twice in a text. Filler
that repeats itself is an induction task of its own, and would hide what an ablation spares.
"""

import random
from collections.abc import Iterator

PEOPLE = (
    "farmer", "teacher", "doctor", "sailor", "baker", "painter", "student", "driver", "neighbor",
    "singer", "writer", "judge", "soldier", "nurse", "tailor", "gardener",
)  # fmt: skip
KINDS = ("old", "young", "tall", "quiet", "happy", "tired", "kind", "busy", "clever", "careful")
DEEDS = (
    "walked to", "looked at", "talked about", "went back to", "ran past", "thought about",
    "pointed at", "came from", "waited near", "stood behind", "drew", "remembered", "cleaned",
    "visited", "found", "left",
)  # fmt: skip
THINGS = (
    "bridge", "market", "church", "station", "garden", "kitchen", "library", "river", "school",
    "field", "harbor", "office", "tower", "window", "road", "forest", "hill", "boat", "table",
    "fence",
)  # fmt: skip
LOOKS = ("small", "large", "new", "broken", "empty", "famous", "wooden", "white", "narrow", "dark")
TIMES = (
    "in the morning", "after lunch", "before the storm", "during the winter", "on Sunday",
    "last summer", "late at night", "every day", "for an hour", "once again", "after the rain",
    "at noon", "in the spring", "without a word", "with a friend", "as usual",
)  # fmt: skip


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar, such as "The old farmer walked to the small bridge at noon."."""
    subject = f"The {rng.choice(KINDS)} {rng.choice(PEOPLE)}"
    place = f"the {rng.choice(LOOKS)} {rng.choice(THINGS)}"
    return f"{subject} {rng.choice(DEEDS)} {place} {rng.choice(TIMES)}."


def sentences(seed: int) -> Iterator[str]:
    """Sentences without end, none of them twice; the same `seed` gives the same ones."""
    rng, seen = random.Random(seed), set()
    while True:
        line = sentence(rng)
        if line not in seen:
            seen.add(line)
            yield line


def text(n_words: int, seed: int) -> str:
    """About `n_words` words of filler: whole sentences, none of them twice."""
    lines, count = [], 0
    for line in sentences(seed):
        lines.append(line)
        count += len(line.split())
        if count >= n_words:
            return " ".join(lines)
    raise AssertionError("sentences() never ends")
