"""Multiple choice by letter: the context gives a colour, the answer is the letter of its option.

    The lamp is red. Question: What color is the lamp? A. blue B. red C. green D. white Answer: -> B

Source: the question of Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?"
(arXiv 2307.09458), how a known answer becomes its letter. As in MIB's CopyColors the knowledge is
in the prompt, so nothing need be filtered for. The corrupted partner has another option's colour
in the context: the same options, another letter. Shuffled or other letters part a letter from its
place in the list, which is the paper's test of what the heads look for.
"""

import random
from collections.abc import Iterator

from datasets import Dataset

from interp.tasks.aligned import fill, from_paired_examples
from interp.tasks.colored_objects import COLORS, OBJECTS
from interp.tasks.prompts import PromptError

LETTERS = "ABCD"
OTHER_LETTERS = "EFGHKLMN"
FACT = "The {object} is {color}."
QUESTION = "Question: What color is the {object}?"
END = "Answer:"


def multiple_choice(
    model,
    n: int = 64,
    seed: int = 0,
    *,
    options: int = 4,
    facts: int = 1,
    labels: str = LETTERS,
) -> Dataset:
    """`n` pairs of prompts; answers are the right letter and that of the corrupted prompt.

    Positions, and spans of the same names:

    - `color`, `object`: what is asked for, in the context; `other_color_1`, ...: further facts;
    - `asked`: the object in the question;
    - `label_1`, ... and `option_1`, ...: each option's letter and (the last token of) its text;
    - `right_label`, `right_option`, `corrupted_label`, `corrupted_option`: those of either answer;
    - `end`.

    Args:
        model: A `HookedModel` or a tokenizer. Draws that don't line up are skipped and counted.
        options: How many options there are.
        facts: How many objects' colours the context gives; wrong options are those of the others.
        labels: The letters in the order of the options (any characters that differ), or "shuffled":
            those of ABCD in any order, or "random": others, drawn anew for each prompt.
    """
    pool = {"shuffled": LETTERS, "random": OTHER_LETTERS}.get(labels, labels)
    _check(options, facts, pool)
    rng = random.Random(f"multiple choice {options} {facts} {labels} {seed}")

    def draws() -> Iterator[dict]:
        while True:
            letters = pool
            if labels == "shuffled":
                letters = "".join(rng.sample(pool[:options], options))
            elif labels == "random":
                letters = "".join(rng.sample(pool, options))
            yield example(rng, options, facts, letters)

    about = {"n": n, "seed": seed, "options": options, "facts": facts, "labels": labels}
    return from_paired_examples(model, draws(), n, task="multiple_choice", parameters=about)


def examples(
    n: int, seed: int, options: int = 4, facts: int = 1, labels: str = LETTERS
) -> list[dict]:
    """`n` prompts with `options` options; `choices` are their letters, as ` A`.

    `labels` are the letters in the order of the options. `char_spans` gives [start, end) in
    characters under the names of `multiple_choice`.
    """
    _check(options, facts, labels)
    rng = random.Random(f"multiple choice {options} {facts} {labels} {seed}")
    return [example(rng, options, facts, labels) for _ in range(n)]


def example(rng: random.Random, options: int, facts: int, labels: str) -> dict:
    """One prompt, drawn with `rng`; the arguments are those of `examples`."""
    known = list(zip(rng.sample(OBJECTS, facts), rng.sample(COLORS, facts)))
    name, color = rng.choice(known)
    offered = _offered(rng, color, [c for _, c in known if c != color], options)
    other = rng.choice([c for c in offered if c != color])
    # the corrupted context never gives two objects one colour: the two colours trade places
    traded = {color: other, other: color}
    template = _template(options, facts)
    words = {"asked": name}
    words |= {f"object_{i}": o for i, (o, _) in enumerate(known, 1)}
    words |= {f"color_{i}": c for i, (_, c) in enumerate(known, 1)}
    words |= {f"label_{i}": letter for i, letter in enumerate(labels[:options], 1)}
    words |= {f"option_{i}": c for i, c in enumerate(offered, 1)}
    changed = {f"color_{i}": traded.get(c, c) for i, (_, c) in enumerate(known, 1)}
    text, places = fill(template, words)
    corrupted_text, corrupted_places = fill(template, words | changed)
    fact, right, wrong = known.index((name, color)), offered.index(color), offered.index(other)

    def named(places: dict[str, list[int]]) -> dict[str, list[int]]:
        others = [places[f"color_{i}"] for i in range(1, facts + 1) if i != fact + 1]
        return {
            "color": places[f"color_{fact + 1}"],
            "object": places[f"object_{fact + 1}"],
            **{f"other_color_{i}": place for i, place in enumerate(others, 1)},
            "asked": places["asked"],
            **{name: places[name] for name in places if name.startswith(("label_", "option_"))},
            "right_label": places[f"label_{right + 1}"],
            "right_option": places[f"option_{right + 1}"],
            "corrupted_label": places[f"label_{wrong + 1}"],
            "corrupted_option": places[f"option_{wrong + 1}"],
        }

    return {
        "text": text,
        "answer": f" {labels[right]}",
        "wrong": f" {labels[wrong]}",
        "choices": [f" {letter}" for letter in labels[:options]],
        "corrupted_text": corrupted_text,
        "corrupted_answer": f" {labels[wrong]}",
        "place": right,
        "char_spans": named(places),
        "corrupted_char_spans": named(corrupted_places),
    }


def _template(options: int, facts: int) -> str:
    """The whole prompt, its fields numbered."""
    told = [
        FACT.replace("{object}", f"{{object_{i}}}").replace("{color}", f"{{color_{i}}}")
        for i in range(1, facts + 1)
    ]
    offers = [f"{{label_{i}}}. {{option_{i}}}" for i in range(1, options + 1)]
    return " ".join([*told, QUESTION.replace("{object}", "{asked}"), *offers, END])


def _offered(rng: random.Random, color: str, others: list[str], options: int) -> list[str]:
    """The options' colours, shuffled: the right one, those of other facts, then any."""
    lures = others[: options - 1]
    free = [c for c in COLORS if c not in (color, *others)]
    offered = [color, *lures, *rng.sample(free, options - 1 - len(lures))]
    rng.shuffle(offered)
    return offered


def _check(options: int, facts: int, labels: str) -> None:
    if len(set(labels)) < len(labels):
        raise PromptError(f"labels={labels!r}: each letter may stand there once.")
    most = min(len(labels), len(COLORS))
    if not 2 <= options <= most:
        raise PromptError(
            f"options={options}: from 2 to {most}; there are {len(labels)} labels and "
            f"{len(COLORS)} colours."
        )
    if not 1 <= facts <= len(COLORS):
        raise PromptError(f"facts={facts}: from 1 to {len(COLORS)}, the number of colours.")
