"""Indirect object identification: two names, one repeats as the giver, the other receives.

    Then, Emma and David went to the market. David gave a lamp to -> Emma

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), templates ABBA (the
giver was named second) and BABA (named first). The corrupted partner follows Merullo et al. 2024
(arXiv 2310.08744): the giver's second mention becomes the other name, so the right answer flips.
"""

import random

from interp.tasks.needle import OWNERS as NAMES

PLACES = (
    "market", "church", "station", "garden", "library", "river", "school", "harbor", "office",
    "forest",
)  # fmt: skip
GIFTS = ("ball", "bell", "book", "bottle", "bowl", "box", "cup", "hat", "key", "lamp", "ring")
TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {giver} gave a {gift} to",
    "When {first} and {second} came to the {place}, {giver} gave a {gift} to",
    "After {first} and {second} left the {place}, {giver} handed a {gift} to",
    "While {first} and {second} waited near the {place}, {giver} showed a {gift} to",
    "Last summer {first} and {second} found a {gift} in the {place}. Then {giver} gave it to",
    "On Sunday {first} and {second} walked to the {place}, and {giver} brought a {gift} to",
    "The friends {first} and {second} were at the {place}. {giver} sold a {gift} to",
    "At noon {first} and {second} talked in the {place}. Later, {giver} passed a {gift} to",
)
ORDERS = ("ABBA", "BABA")


def examples(n: int, seed: int) -> list[dict]:
    """`n` prompts; answers have their leading space and `choices` are the two names.

    `char_spans` gives [start, end) in characters of both names' mentions in `text`.
    """
    rng = random.Random(f"ioi {seed}")
    return [example(rng) for _ in range(n)]


def example(rng: random.Random) -> dict:
    """One prompt, drawn with `rng`."""
    receiver, giver = rng.sample(NAMES, 2)
    order = rng.choice(ORDERS)
    first, second = (receiver, giver) if order == "ABBA" else (giver, receiver)
    template = rng.choice(TEMPLATES)
    scene = {"first": first, "second": second}
    scene |= {"place": rng.choice(PLACES), "gift": rng.choice(GIFTS)}
    text = template.format(giver=giver, **scene)
    return {
        "text": text,
        "answer": f" {receiver}",
        "choices": [f" {receiver}", f" {giver}"],
        "corrupted_text": template.format(giver=receiver, **scene),
        "corrupted_answer": f" {giver}",
        "order": order,
        "char_spans": {
            "receiver": _found(text.index(receiver), receiver),
            "giver_first": _found(text.index(giver), giver),
            "giver_again": _found(text.rindex(giver), giver),
        },
    }


def _found(start: int, word: str) -> list[int]:
    return [start, start + len(word)]
