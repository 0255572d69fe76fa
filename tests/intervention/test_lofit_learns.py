"""On mini-llama: a form of question that it half fails is taught to three heads, and its controls.

It answers letter questions, but not half of them where the full stops behind the letters are
missing. What it would have to look up anew (which of two facts is asked for) no constant brings.
"""

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

import interp
from interp.intervention.descent import Tuning
from interp.intervention.iti import ITI
from interp.intervention.lofit import LoFiT
from interp.tasks.multiple_choice import examples
from interp.tasks.prompts import from_examples

K = 3  # of 32 heads: 9 %
TUNING = Tuning(lr=0.05, epochs=6)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(mini_llama):
    return interp.load(mini_llama)


def bare_letters(model, n: int, seed: int) -> Dataset:
    """`A blue B red` instead of `A. blue B. red`."""
    rows = []
    for example in examples(n, seed):
        context, options = example["text"].split("? ")
        text = f"{context}? {options.replace('.', '')}"
        rows.append({"text": text, "answer": example["answer"], "choices": example["choices"]})
    return from_examples(model, rows)


def accuracy(model, edit, test: Dataset) -> float:
    with model.intervene(edit):
        return interp.evaluate(model, test, progress=False).accuracy


def test_three_heads_are_taught_what_their_controls_are_not(model):
    train, stop, test = (bare_letters(model, n, seed) for seed, n in enumerate((128, 48, 200)))
    learning = {"validation": stop, "tuning": TUNING, "progress": False}
    scores = LoFiT.select(model, train, validation=stop, progress=False)
    before = accuracy(model, [], test)
    found = [
        accuracy(model, LoFiT.fit(model, train, scores.top(K), seed=s, **learning), test)
        for s in (0, 1)
    ]
    drawn = [
        accuracy(model, LoFiT.fit(model, train, scores.random(K, seed=s), **learning), test)
        for s in (0, 1, 2)
    ]
    order = np.random.default_rng(0).permutation(len(train))
    columns = ["answer", "answer_ids"]
    answers = train.select_columns(columns).select(order)
    mixed = concatenate_datasets([train.remove_columns(columns), answers], axis=1)
    shuffled = LoFiT.fit(model, mixed, scores.top(K), **(learning | {"validation": None}))
    push = ITI.fit(model, train, k=K, progress=False)
    pushed = [
        accuracy(model, ITI(push.heads, push.directions, push.spreads, strength), test)
        for strength in (1.0, 5.0, 15.0)
    ]
    assert before < 0.7
    assert min(found) > 0.93
    assert np.mean(drawn) < min(found) - 0.03
    assert max(pushed) < min(found) - 0.1
    assert accuracy(model, shuffled, test) < before + 0.1


def test_what_must_be_looked_up_anew_is_not_learned(model):
    """Two facts, of which one is asked for: the model takes either, and goes on to."""
    train, stop, test = (
        interp.tasks.multiple_choice(model, n, seed, facts=2)
        for seed, n in enumerate((128, 48, 300))
    )
    assert 0.4 < accuracy(model, [], test) < 0.6
    everyone = [(layer, head) for layer in range(4) for head in range(8)]
    for heads in (LoFiT.select(model, train, validation=stop, progress=False).top(K), everyone):
        edit = LoFiT.fit(model, train, heads, validation=stop, tuning=TUNING, progress=False)
        assert accuracy(model, edit, test) < 0.6


def test_preferences_teach_it_too(model):
    """From pairs of a right and a wrong letter, the likelihood of neither asked for."""
    train, stop, test = (bare_letters(model, n, seed) for seed, n in enumerate((128, 48, 200)))
    edit = LoFiT.fit(
        model, train, k=K, objective="preferences", validation=stop, tuning=TUNING, progress=False
    )
    assert accuracy(model, edit, test) > accuracy(model, [], test) + 0.1
