"""The sentences say what the numbers say: on a strong effect, on none, and in between."""

import numpy as np
import pandas as pd
import pytest

from interp import HeadScores
from interp.analysis.causality import AblationControl, Condition, _result
from interp.evaluation import Evaluation
from interp.heads import Head
from interp.report.ablation import ablation_section, text_control, verdict
from interp.report.retrieval import accuracy, counted_on, stability, stability_sentence, strongest
from interp.report.words import change, listed, percent

N, DRAWS = 40, 10


def experiment(base: float, top: float, draws, text_top: float = 0.0) -> AblationControl:
    """An ablation with these accuracies; losses move along, the text's by `text_top`."""
    heads = tuple(Head(0, i) for i in range(3))
    conditions = [Condition("unablated", 0, None, ()), Condition("top 3", 3, None, heads)]
    conditions += [Condition("random 3", 3, i, heads) for i in range(DRAWS)]
    noise = np.random.default_rng(0).normal(0, 0.01, size=(len(conditions), N))
    tables = []
    for i, share in enumerate([base, top, *draws]):
        correct = np.arange(N) < round(share * N)
        task = pd.DataFrame({"correct": correct, "loss": 3 - 2 * share + noise[i]})
        more = text_top if i == 1 else 0.001 * i
        text = pd.DataFrame({"loss": 2 + more + noise[i]})
        tables.append(pd.concat([task.assign(set="task"), text.assign(set="text")]))
    return _result(conditions, tables, {"match": "layer", "how": "zero"})


def test_a_strong_effect_is_said_to_be_one():
    said = verdict(experiment(0.6, 0.1, np.linspace(0.55, 0.65, DRAWS)), 3)
    assert "hurts, and none of 10 random draws" in said and "p = 0.09" in said
    assert "accuracy 60 % → 10 % (random heads: 60 %)" in said


def test_no_effect_is_said_to_be_none():
    said = verdict(experiment(0.6, 0.6, np.linspace(0.55, 0.65, DRAWS)), 3)
    assert "no measurable harm" in said and "hurts" not in said


def test_random_heads_that_hurt_as_much_are_said_to():
    said = verdict(experiment(0.6, 0.2, np.linspace(0.1, 0.3, DRAWS)), 3)
    assert "hurts no more than taking out others" in said
    assert "does not single these heads out" in said and "none of" not in said


def test_some_draws_as_bad_are_counted():
    draws = [0.1, *[0.6] * (DRAWS - 1)]
    said = verdict(experiment(0.6, 0.2, draws), 3)
    assert "on average, but 1 of 10 random draws" in said and "p = 0.18" in said


def test_where_few_needles_are_answered_the_loss_decides():
    result = experiment(0.05, 0.0, [0.05] * DRAWS)
    said = verdict(result, 3)
    assert said.startswith("Accuracy has no room to fall") and "loss on answers" in said
    assert "answers only 5 %" in " ".join(
        p for p in ablation_section(result).parts if isinstance(p, str)
    )


@pytest.mark.parametrize(
    ("harm", "words"), [(0.5, "more than any random draw"), (-0.1, "no measurable harm")]
)
def test_harm_to_ordinary_text_is_said(harm, words):
    assert words in text_control(experiment(0.6, 0.1, [0.6] * DRAWS, harm), 3)


def scores_of(samples, answered: int, only_successes: bool = True) -> HeadScores:
    counts = {"attempted": len(samples), "answered": answered, "scored": len(samples)}
    about = {"counts": counts, "only_successes": only_successes}
    return HeadScores.from_samples(samples, keep_samples=True, **about)


def test_heads_that_retrieve_are_named_and_counted():
    samples = np.zeros((20, 4, 5))
    samples[:, 2, 3], samples[:, 1, 0] = 0.9, 0.2
    said = strongest(scores_of(samples, 20))
    assert "2 of 20 heads (10 %)" in said and "L2H3 (0.90) and L1H0 (0.20)" in said


def test_no_retrieval_head_is_said():
    samples = np.full((20, 4, 5), 0.02)
    said = strongest(scores_of(samples, 20))
    assert "No head reaches" in said and "0.02; 20 prompts" in said


def test_what_scores_rest_on():
    samples = np.zeros((20, 4, 5))
    assert "only 2 of 20 prompts" in counted_on(scores_of(samples, 2, only_successes=False))
    assert "rest on" not in counted_on(scores_of(samples, 20))
    few = counted_on(scores_of(samples, 3))
    assert "answers few of them" in few


@pytest.mark.parametrize(("noise", "word"), [(0.001, "is stable"), (3.0, "is not stable")])
def test_stability_follows_the_numbers(noise, word):
    generator = np.random.default_rng(0)
    samples = np.linspace(0, 1, 100).reshape(1, 10, 10)
    samples = samples + generator.normal(0, noise, size=(20, 10, 10))
    lengths = [128, 256] * 10
    table = stability(scores_of(samples, 20), lengths, k=5)
    assert list(table["between"]) == ["two halves of the prompts", "128 and 256 tokens"]
    assert word in stability_sentence(table)


def test_equal_scores_have_no_stability():
    lengths = [128] * 8
    table = stability(scores_of(np.zeros((8, 2, 4)), 8), lengths, k=3)
    assert "nothing can be said" in stability_sentence(table)
    assert "Too few" in stability_sentence(table.iloc[:0])


def test_accuracy_by_length():
    table = pd.DataFrame({"length": [128, 256] * 10, "depth": 0.5, "correct": [True, False] * 10})
    said = accuracy(Evaluation(table, {}))
    assert "10 of 20" in said and "100 % at 128 and 0 % at 256 tokens" in said
    none = accuracy(Evaluation(table.assign(correct=False), {}))
    assert "0 of 20" in none and "says little" in none


def test_words():
    assert percent(0.126) == "13 %" and percent(0.001) == "under 1 %" and percent(0) == "0 %"
    assert change(-0.5) == "−0.50" and change(0.001) == "0.00"
    assert listed("abc") == "a, b and c" and listed(range(9), 4) == "0, 1, 2 and 6 more"
