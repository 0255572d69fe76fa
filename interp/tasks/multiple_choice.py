"""Multiple choice by letter: the context gives a colour, the answer is the letter of its option.

    The lamp is red. Question: What color is the lamp? A. blue B. red C. green D. white Answer: -> B

Source: the question of Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?"
(arXiv 2307.09458), how a known answer becomes its letter. As in MIB's CopyColors the knowledge is
in the prompt, so nothing need be filtered for. The corrupted partner has another option's colour
in the context: the same options, another letter.
"""

import random

from interp.tasks.colored_objects import COLORS, OBJECTS

LETTERS = "ABCD"
OTHER_LETTERS = "EFGHKLMN"
FACT = "The {object} is {color}."
QUESTION = "Question: What color is the {object}?"
END = "Answer:"


def examples(n: int, seed: int, options: int = 4, facts: int = 1, labels: str = LETTERS):
    """`n` prompts with `options` options; `choices` are their letters, as ` A`.

    With `facts` above 1 the context gives that many objects' colours, and wrong options may be
    those of the others. `labels` are the letters in the order of the options; e.g. "DBCA" parts a
    letter from its place. `char_spans` gives [start, end) in characters of the colour in the
    context (`color`), of the right option's letter (`letter`) and of its text (`option`).
    """
    if not 2 <= options <= len(labels):
        raise ValueError(f"options={options}: from 2 to {len(labels)}, the number of labels.")
    if not 1 <= facts <= len(COLORS):
        raise ValueError(f"facts={facts}: from 1 to {len(COLORS)}, the number of colours.")
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
    question = [QUESTION.format(object=name)]
    question += [f"{letter}. {text}" for letter, text in zip(labels, offered)] + [END]

    def text(facts):
        return " ".join([FACT.format(object=o, color=c) for o, c in facts] + question)

    clean, right = text(known), labels[offered.index(color)]
    fact = clean.index(FACT.format(object=name, color=color)) + len(f"The {name} is ")
    option = clean.index(f"{right}. {color}")
    return {
        "text": clean,
        "answer": f" {right}",
        "choices": [f" {letter}" for letter in labels[:options]],
        "corrupted_text": text([(o, traded.get(c, c)) for o, c in known]),
        "corrupted_answer": f" {labels[offered.index(other)]}",
        "place": offered.index(color),
        "char_spans": {
            "color": [fact, fact + len(color)],
            "letter": [option, option + 1],
            "option": [option + 3, option + 3 + len(color)],
        },
    }


def _offered(rng: random.Random, color: str, others: list[str], options: int) -> list[str]:
    """The options' colours, shuffled: the right one, those of other facts, then any."""
    lures = others[: options - 1]
    free = [c for c in COLORS if c not in (color, *others)]
    offered = [color, *lures, *rng.sample(free, options - 1 - len(lures))]
    rng.shuffle(offered)
    return offered
