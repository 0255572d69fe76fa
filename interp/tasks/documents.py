"""Documents with one needed fact: each line tells of somebody, and one of them is asked for.

    Each line tells what somebody found.
    Emma went to the river and found a lamp there.
    David went to the school and found a bell there.
    Question: What did David find? Answer: a                         -> " bell"

The lines may stand in any order, so they are segments (`segment_1`, ...): what an answer owes to
where its line stands is position bias (`interp.position_bias`). The setting, with sentences instead
of passages, of Liu et al. 2023, "Lost in the Middle" (arXiv 2307.03172).
"""

import random
from dataclasses import asdict

from datasets import Dataset

from interp.tasks.ioi import PLACES
from interp.tasks.needle import OWNERS, Needle
from interp.tasks.prompts import PromptError, from_examples

THINGS = (
    "ball", "bell", "book", "bottle", "bowl", "box", "candle", "coin", "cup", "drum", "hat", "key",
    "lamp", "letter", "map", "mirror", "pen", "ring", "rope", "spoon",
)  # fmt: skip
HEADING = "Each line tells what somebody found."
FOUND = Needle(
    "{owner} went to the {place} and found a {answer} there.",
    "Question: What did {owner} find? Answer: a",
    OWNERS,
    THINGS,
)


def documents(
    model,
    n: int = 64,
    seed: int = 0,
    *,
    lines: int = 10,
    wording: Needle = FOUND,
    heading: str = HEADING,
) -> Dataset:
    """`n` prompts of `lines` lines, one of which has the answer; `choices` are those of all lines.

    Spans: `segment_1`, ... (a line with the line break before it), `relevant` (the one that is
    needed), `answer` (within it) and `question` (up to "Answer:"). The column `place` says which
    line is needed, counted from 0.

    Args:
        model: A `HookedModel` or a tokenizer.
        wording: Owners and answers are drawn from it, none twice in a prompt; its statement may
            have a `{place}` as well.
        heading: What stands before the lines; "" for nothing.
    """
    _check(n, lines, wording)
    rng = random.Random(f"documents {seed} {lines}")
    examples = [_example(rng, lines, wording, heading) for _ in range(n)]
    about = {"n": n, "seed": seed, "lines": lines, "heading": heading, "wording": asdict(wording)}
    return from_examples(model, examples, task="documents", parameters=about)


def _example(rng: random.Random, lines: int, wording: Needle, heading: str) -> dict:
    owners = rng.sample(wording.owners, lines)
    answers = [f" {answer}" for answer in rng.sample(wording.codewords, lines)]
    place, text, spans = rng.randrange(lines), heading, {}
    # the answer brings its space along
    line = "\n" + wording.statement.replace(" {answer}", "{answer}")
    for number, (owner, answer) in enumerate(zip(owners, answers, strict=True)):
        statement = line.replace("{owner}", owner).replace("{place}", rng.choice(PLACES))
        before = len(text) + statement.index("{answer}")
        text, start = text + statement.replace("{answer}", answer), len(text)
        spans[f"segment_{number + 1}"] = (start, len(text))
        if number == place:
            spans |= {"relevant": (start, len(text)), "answer": (before, before + len(answer))}
    asked = "\n" + wording.question.replace("{owner}", owners[place])
    question = len(text) + 1, len(text) + len(asked.partition("Answer:")[0].rstrip())
    return {
        "text": text + asked,
        "answer": answers[place],
        "choices": answers,
        "char_spans": {**spans, "question": question},
        "place": place,
    }


def _check(n: int, lines: int, wording: Needle) -> None:
    most = min(len(set(wording.owners)), len(set(wording.codewords)))
    if not 2 <= lines <= most:
        raise PromptError(
            f"lines={lines}: from 2 to {most}; there are {len(wording.owners)} owners and "
            f"{len(wording.codewords)} answers to draw from."
        )
    if n < 1:
        raise PromptError(f"n={n}: at least 1.")
