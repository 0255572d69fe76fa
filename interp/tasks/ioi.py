"""Indirect object identification: two names, one repeats as the giver, the other receives.

    After lunch Emma and David visited the market. David gave a lamp to -> Emma
                IO       S1                        S2

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), in the orders ABBA (the
giver was named second) and BABA (named first); the sentences are our own. Two corruptions: `flip`
puts the other name in the place of the giver's second mention, so that the right answer is the
giver (Merullo et al. 2024, arXiv 2310.08744); `abc` puts three other names in the place of the
three mentions, after which neither name is right (Wang et al.). Numbers of one don't compare with
those of the other: under `flip` the logit difference changes its sign, under `abc` it goes to
about 0.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from string import Formatter

from datasets import Dataset

from interp.tasks.aligned import fill, from_paired_examples
from interp.tasks.needle import OWNERS as NAMES
from interp.tasks.prompts import PromptError

PLACES = (
    "market", "church", "station", "garden", "library", "river", "school", "harbor", "office",
    "forest",
)  # fmt: skip
GIFTS = ("ball", "bell", "book", "bottle", "bowl", "box", "cup", "hat", "key", "lamp", "ring")
BASIC_TEMPLATES = (  # what mini-llama was trained on
    "After lunch {first} and {second} visited the {place}. {giver} gave a {gift} to",
    "When {first} and {second} came to the {place}, {giver} gave a {gift} to",
    "After {first} and {second} left the {place}, {giver} handed a {gift} to",
    "While {first} and {second} waited near the {place}, {giver} showed a {gift} to",
    "Last summer {first} and {second} found a {gift} in the {place}. Then {giver} gave it to",
    "On Sunday {first} and {second} walked to the {place}, and {giver} brought a {gift} to",
    "The friends {first} and {second} were at the {place}. {giver} sold a {gift} to",
    "At noon {first} and {second} talked in the {place}. Later, {giver} passed a {gift} to",
)
TEMPLATES = (
    *BASIC_TEMPLATES,
    "After the storm {first} and {second} cleaned the {place}, and {giver} handed a {gift} to",
    "When {first} and {second} found a {gift} behind the {place}, {giver} showed it to",
    "Today {first} and {second} repaired a {gift} near the {place}. At night {giver} lent it to",
    "Because {first} and {second} often met at the {place}, {giver} offered a {gift} to",
    "Before dinner {first} and {second} argued about the {place}, so {giver} returned a {gift} to",
    "Although {first} and {second} arrived late at the {place}, {giver} delivered a {gift} to",
    "Once {first} and {second} had bought a {gift} at the {place}, {giver} promised it to",
)
ORDERS = ("ABBA", "BABA")
CORRUPTIONS = ("flip", "abc")


def ioi(
    model,
    n: int = 64,
    seed: int = 0,
    *,
    corruption: str = "flip",
    order: str = "both",
    templates: Sequence[str] | None = None,
) -> Dataset:
    """`n` pairs of prompts; answers are the receiver (right) and the giver (wrong).

    Positions, as Wang et al. name them: `IO` the receiver, `S1` the giver's first mention, `S1+1`
    the token after it, `S2` the giver's second mention, `end`. The same seed has the same clean
    prompts under both corruptions (as far as no other draws are skipped).

    Args:
        model: A `HookedModel` or a tokenizer. Names that are several of its tokens, and templates
            with words that it does not know, are skipped and counted.
        corruption: "flip" (the right answer flips) or "abc" (no answer is right).
        order: "both", "ABBA" or "BABA".
        templates: Sentences of your own, each with `{first}`, `{second}` and then `{giver}` once,
            and `{place}` and `{gift}` where wanted, that end before the answer. Default: all 15.
    """
    templates = TEMPLATES if templates is None else tuple(templates)
    _check(corruption, order, templates)
    rng = random.Random(f"ioi {seed}")
    orders = ORDERS if order == "both" else (order,)
    draw = _draws(rng, templates, orders, corruption)
    about = {"n": n, "seed": seed, "corruption": corruption, "order": order}
    about |= {"templates": list(templates)}
    return from_paired_examples(model, draw, n, task="ioi", parameters=about)


def examples(n: int, seed: int, templates: Sequence[str] = BASIC_TEMPLATES) -> list[dict]:
    """`n` prompts; answers have their leading space and `choices` are the two names.

    `char_spans` gives [start, end) in characters of the three mentions: `IO`, `S1`, `S2`.
    """
    rng = random.Random(f"ioi {seed}")
    return list(islice(_draws(rng, templates, ORDERS, "flip"), n))


def example(
    rng: random.Random,
    templates: Sequence[str] = BASIC_TEMPLATES,
    orders: Sequence[str] = ORDERS,
    corruption: str = "flip",
) -> dict:
    """One prompt, drawn with `rng`."""
    receiver, giver = rng.sample(NAMES, 2)
    order = rng.choice(orders)
    first, second = (receiver, giver) if order == "ABBA" else (giver, receiver)
    template = rng.choice(templates)
    scene = {"place": rng.choice(PLACES), "gift": rng.choice(GIFTS)}
    text, places = fill(template, scene | {"first": first, "second": second, "giver": giver})
    if corruption == "flip":
        names = {"first": first, "second": second, "giver": receiver}
    else:  # drawn apart, so that what follows is the same under both corruptions
        others = [name for name in NAMES if name not in (receiver, giver)]
        names = dict(zip(("first", "second", "giver"), random.Random(text).sample(others, 3)))
    corrupted_text, corrupted_places = fill(template, scene | names)
    return {
        "text": text,
        "answer": f" {receiver}",
        "wrong": f" {giver}",
        "choices": [f" {receiver}", f" {giver}"],
        "corrupted_text": corrupted_text,
        "corrupted_answer": f" {giver}" if corruption == "flip" else None,
        "order": order,
        "template": templates.index(template),
        "char_spans": _mentions(places, order),
        "corrupted_char_spans": _mentions(corrupted_places, order),
        "followed": ["S1"],
    }


def _draws(rng: random.Random, templates, orders, corruption: str) -> Iterator[dict]:
    while True:
        yield example(rng, templates, orders, corruption)


def _mentions(places: dict[str, list[int]], order: str) -> dict[str, list[int]]:
    io, s1 = ("first", "second") if order == "ABBA" else ("second", "first")
    return {"IO": places[io], "S1": places[s1], "S2": places["giver"]}


def _check(corruption: str, order: str, templates: Sequence[str]) -> None:
    if corruption not in CORRUPTIONS:
        raise PromptError(f"corruption={corruption!r}: one of {', '.join(CORRUPTIONS)}.")
    if order not in ("both", *ORDERS):
        raise PromptError(f"order={order!r}: one of both, {', '.join(ORDERS)}.")
    if not templates:
        raise PromptError("templates: none; give at least one, or None for ours.")
    for template in templates:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        names = [field for field in fields if field in ("first", "second", "giver")]
        unknown = {*fields} - {"first", "second", "giver", "place", "gift"}
        if sorted(names) != ["first", "giver", "second"] or names[-1] != "giver" or unknown:
            raise PromptError(
                f"templates: {template!r} has the fields {', '.join(fields) or 'none'}; it needs "
                "{first}, {second} and then {giver}, once each, and may have {place} and {gift}."
            )
        if template != template.rstrip():
            raise PromptError(
                f"templates: {template!r} ends with a space, which belongs to the answer; take it "
                "off."
            )
