"""Coloured objects: a list of objects, each with its colour, and a question for one of them.

    On the table there is a red pen, a blue cup and a green ring.
    Question: What color is the cup? Answer: The cup is -> blue

Source: Merullo et al. 2024, "Circuit Component Reuse Across Tasks in Transformer Language Models"
(arXiv 2310.08744), after BIG-bench's "reasoning about colored objects". There one worked example
comes first and the answer is capitalised; here neither, and the answer's sentence is begun. The
corrupted partner is the paper's: the same list, another of its objects asked for.
"""

import random
from collections.abc import Sequence

COLORS = ("black", "blue", "brown", "green", "purple", "red", "white", "yellow")
OBJECTS = (
    "ball", "bell", "book", "bottle", "bowl", "box", "chair", "cup", "hat", "key", "lamp", "pen",
    "plate", "ring", "spoon",
)  # fmt: skip
SURFACES = ("table", "floor", "desk", "shelf")
OPENERS = ("there is", "you see", "I see")
LIST = "On the {surface} {opener} {items}."
QUESTION = "Question: What color is the {object}? Answer: The {object} is"


def examples(n: int, seed: int, objects: int = 3) -> list[dict]:
    """`n` prompts with `objects` objects, all of different colours; `choices` are those colours.

    `char_spans` gives [start, end) in characters of the asked object (`object`) and its colour
    (`color`) in the list, and of the object in the question (`asked`).
    """
    if not 2 <= objects <= len(COLORS):
        raise ValueError(f"objects={objects}: from 2 to {len(COLORS)}, the number of colours.")
    rng = random.Random(f"colored objects {objects} {seed}")
    return [example(rng, objects) for _ in range(n)]


def scene(rng: random.Random, objects: int) -> tuple[str, Sequence[tuple[str, str]]]:
    """The list's sentence, and its (colour, object) pairs in the order of the list."""
    items = list(zip(rng.sample(COLORS, objects), rng.sample(OBJECTS, objects)))
    named = [f"a {color} {name}" for color, name in items]
    listed = f"{', '.join(named[:-1])} and {named[-1]}"
    surface, opener = rng.choice(SURFACES), rng.choice(OPENERS)
    return LIST.format(surface=surface, opener=opener, items=listed), items


def example(rng: random.Random, objects: int) -> dict:
    """One prompt, drawn with `rng`."""
    listed, items = scene(rng, objects)
    (color, name), (other_color, other) = rng.sample(items, 2)
    text = f"{listed} {QUESTION.format(object=name)}"
    start = text.index(f"{color} {name}")
    asked = text.index(name, len(listed))
    return {
        "text": text,
        "answer": f" {color}",
        "choices": [f" {color}" for color, _ in items],
        "corrupted_text": f"{listed} {QUESTION.format(object=other)}",
        "corrupted_answer": f" {other_color}",
        "place": items.index((color, name)),
        "char_spans": {
            "color": [start, start + len(color)],
            "object": [start + len(color) + 1, start + len(color) + 1 + len(name)],
            "asked": [asked, asked + len(name)],
        },
    }
