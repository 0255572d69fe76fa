"""Lettered questions for models that were never trained: a fact, four labelled options, a mark.

    <filling> COLOR <filling> L1 c1 L2 c2 L3 c3 L4 c4 MARK        -> the label of COLOR's option

The fact of the corrupted prompt names another option. Prompts differ in length.
"""

import random
from functools import cache

import torch
from datasets import Dataset

from interp.model.hooked import HookedModel
from tests.tiny import fresh, words

LABELS = (20, 21, 22, 23)
COLORS = range(30, 40)
MARK = 5


@cache
def gained(family: str) -> HookedModel:
    """A tiny model whose norms' gains and all biases are random too; shared: leave it as it is."""
    return with_gains(fresh(family))


def with_gains(model: HookedModel, biases: bool = True) -> HookedModel:
    """The same model, its gains and (or) biases drawn at random, in place."""
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.original_model.named_parameters():
        if weight.dim() == 1 and (biases or not name.endswith("bias")):
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = 0.3 * noise + (0 if name.endswith("bias") else 1)
    return model


def lettered(n: int = 12, seed: int = 0, labels=LABELS, longest: int = 4) -> Dataset:
    """`n` pairs in the form that tasks of pairs have; each place is the right one equally often."""
    rng = random.Random(seed)
    return Dataset.from_list([_pair(rng, i % len(labels), labels, longest) for i in range(n)])


def _pair(rng: random.Random, right: int, labels, longest: int) -> dict:
    n = len(labels)
    colors = rng.sample(list(COLORS), n)
    wrong = rng.choice([i for i in range(n) if i != right])
    before, between = ([rng.randint(40, 59) for _ in range(rng.randint(1, longest))] for _ in "ab")
    first = len(before) + 1 + len(between)  # the first label
    options = [token for pair in zip(labels, colors, strict=True) for token in pair]
    clean, corrupted = (
        [*before, colors[place], *between, *options, MARK] for place in (right, wrong)
    )
    places = {f"label_{i + 1}": first + 2 * i for i in range(n)}
    ends = {f"option_{i + 1}": first + 2 * i + 1 for i in range(n)}
    answer, other = f" w{labels[right]}", f" w{labels[wrong]}"
    return {
        "text": words(clean),
        "input_ids": clean,
        "answer": answer,
        "answer_ids": [labels[right]],
        "choices": [f" w{label}" for label in labels],
        "spans": {name: [place, place + 1] for name, place in (places | ends).items()},
        "clean_text": words(clean),
        "clean_input_ids": clean,
        "corrupted_text": words(corrupted),
        "corrupted_input_ids": corrupted,
        "corrupted_answer": other,
        "answers": [labels[right], labels[wrong]],
        "positions": places | ends | {"end": len(clean) - 1},
    }
