"""Probes against a general minimiser and against heads whose answer is planted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm
from torch.testing import assert_close

import interp
from interp.analysis.probes import (
    Labelled,
    ProbeError,
    folds_of,
    labelled,
    last_z,
    logistic,
    probe_scores,
)
from tests.intervention.test_ablate import by_hand
from tests.tiny import random_ids, tiny, with_answers, words

PROMPTS = random_ids(8, 5, 11, 6, seed=2)
TEXTS = [words(ids) for ids in PROMPTS]


def by_scipy(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """The definition, for one head, by a minimiser that knows nothing of it."""
    sign = 2 * y - 1

    def cost(beta):
        w, b = beta[:-1], beta[-1]
        return w @ w / 2 + penalty * np.logaddexp(0, -sign * (x @ w + b)).sum()

    found = minimize(cost, np.zeros(x.shape[1] + 1), method="BFGS", options={"gtol": 1e-7})
    return found.x


@settings(max_examples=15)
@given(
    n=st.integers(4, 30),
    width=st.integers(1, 5),
    shift=st.floats(0, 6),
    scale=st.sampled_from([0.05, 1.0, 20.0]),
    penalty=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_all_probes_at_once_are_each_the_minimum(n, width, shift, scale, penalty, seed):
    """Also where two kinds lie far apart, and activations are large or small."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = scale * (
        rng.normal(size=(3, n, width)) + shift * y[:, None] * np.array([0, 1, -1])[:, None, None]
    )
    w, b = logistic(torch.tensor(x).float(), torch.tensor(y == 1), penalty)
    for head in range(3):
        expected = by_scipy(x[head].astype(np.float32).astype(float), y, penalty)
        ours = np.append(w[head].numpy(), b[head].numpy())
        assert ours == pytest.approx(expected, abs=2e-3 * (1 + np.abs(expected).max()))


def test_it_is_scikit_learn_s_default():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.normal(size=(40, 6)) + y[:, None] * 0.7
    theirs = linear_model.LogisticRegression(tol=1e-10, max_iter=10_000).fit(x, y)
    w, b = logistic(torch.tensor(x)[None], torch.tensor(y == 1), 1.0)
    assert w[0].numpy() == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert float(b[0]) == pytest.approx(float(theirs.intercept_[0]), abs=1e-4)


def planted(
    n: int = 400, mu: float = 1.0, noise: float = 1.0, classes: int = 2, seed: int = 0
) -> Labelled:
    """Heads of pure noise, but for layer 1's head 2, which also has a code of each label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    z = noise * torch.randn(n, 2, 4, 8, generator=generator)
    codes = torch.tensor([[-mu], [mu]]) if classes == 2 else 2 * mu * torch.eye(classes)
    z[:, 1, 2, : codes.shape[1]] += codes[labels]
    kinds = list(range(classes))
    return Labelled(z, labels, torch.arange(n), kinds, [0, 1], {"task": "planted"})


def test_a_head_with_the_label_is_as_right_as_it_can_be():
    scores = probe_scores(tiny("llama"), planted(1000), progress=False)
    assert scores.top(1) == [interp.Head(1, 2)]
    best = norm.cdf(1.0)
    error = (best * (1 - best) / 1000) ** 0.5
    assert scores["L1H2"]["score"] == pytest.approx(best, abs=3 * error)
    others = np.delete(scores.matrix.flatten(), 6)
    assert np.abs(others - 0.5).max() < 4 * (0.25 / 1000) ** 0.5
    assert scores.metadata["chance"] == 0.5 and scores["L1H2"]["n"] == 1000
    assert set(np.unique(scores.samples)) == {0.0, 1.0}


def test_more_than_two_kinds_are_told_apart():
    scores = probe_scores(tiny("llama"), planted(600, mu=2.0, classes=3), progress=False)
    assert scores["L1H2"]["score"] > 0.9
    assert np.abs(np.delete(scores.matrix.flatten(), 6) - 1 / 3).max() < 0.1
    assert scores.metadata["chance"] == pytest.approx(1 / 3)


def test_each_prompt_is_judged_by_a_probe_that_has_not_seen_it():
    """By hand, one head, one fold after the other."""
    found = planted(40, mu=0.6)
    scores = probe_scores(tiny("llama"), found, folds=4, penalty=0.5, seed=3, progress=False)
    fold_of = folds_of(found.labels, found.groups, 4, 3)
    x, y = found.z[:, 1, 2].numpy().astype(float), found.labels.numpy()
    right = np.zeros(40)
    for fold in range(4):
        out = (fold_of == fold).numpy()
        beta = by_scipy(x[~out], y[~out], 0.5)
        right[out] = ((x[out] @ beta[:-1] + beta[-1]) > 0) == y[out]
    column = scores.heads.index(interp.Head(1, 2))
    assert scores.samples[:, column].tolist() == right.tolist()


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=4, max_size=12),
    folds=st.integers(2, 4),
    seed=st.integers(0, 9),
)
def test_groups_stay_together_and_folds_are_even(sizes, folds, seed):
    groups = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    labels = torch.arange(len(groups)) % 2
    try:
        fold_of = folds_of(labels, groups, folds, seed)
    except ProbeError:
        return  # a label that is in one fold only
    used = [fold_of[groups == group].unique() for group in range(len(sizes))]
    assert all(len(of_group) == 1 for of_group in used)
    counts = torch.bincount(torch.cat(used), minlength=folds)
    assert counts.max() - counts.min() <= 1


def test_labels_are_spread_evenly_over_folds():
    labels = torch.tensor([0] * 15 + [1] * 5)
    fold_of = folds_of(labels, torch.arange(20), 5, seed=1)
    assert [int(labels[fold_of == fold].sum()) for fold in range(5)] == [1] * 5


# What heads say


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"])
def test_what_is_probed_is_z_at_the_last_token_of_each_prompt(family):
    found = last_z(tiny(family), PROMPTS, batch_size=3)
    for row, tokens in enumerate(PROMPTS):
        kept = {}
        by_hand(family, lambda layer, z, real, kept=kept: kept.update({layer: z[0, -1]}), [tokens])
        for layer in (0, 1):
            assert_close(found[row, layer], kept[layer], atol=2e-5, rtol=1e-4)


def test_the_label_that_can_be_read_is_found_in_a_model():
    """Prompts of odd and prompts of even words: what they are made of tells them apart."""
    kinds = ["even", "odd"] * 30
    rng = np.random.default_rng(0)
    texts = [words(rng.choice(range(20 + (kind == "odd"), 40, 2), 6)) for kind in kinds]
    scores = interp.probe_heads(tiny("llama"), texts, kinds, progress=False)
    assert scores.metadata["classes"] == ["even", "odd"] and scores.metadata["chance"] == 0.5
    shuffled = interp.probe_heads(tiny("llama"), texts, rng.permutation(kinds), progress=False)
    assert shuffled.matrix.mean() < 0.65 < 0.8 < scores.matrix.mean()


def test_answers_are_judged_by_the_question_they_belong_to():
    prompts = with_answers(
        PROMPTS, random_ids(*[1] * 4, seed=4), [(0, 1)] * 4, rejected_ids=random_ids(*[2] * 4)
    )
    found = labelled(tiny("llama"), prompts, progress=False)
    assert found.labels.tolist() == [1, 0] * 4 and found.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    wrong = prompts[2]["input_ids"] + prompts[2]["rejected_ids"]
    assert_close(found.z[5], last_z(tiny("llama"), [wrong])[0], atol=2e-5, rtol=1e-4)
    scores = interp.probe_heads(tiny("llama"), prompts, folds=2, progress=False)
    assert scores.counts.tolist() == [[8] * 4] * 2


def test_interventions_are_in_what_is_probed_and_know_where_answers_begin():
    prompts = with_answers(PROMPTS, [[20]] * 4, [(0, 1)] * 4, rejected_ids=[[21]] * 4)
    model = tiny("llama")
    plain = labelled(model, prompts, progress=False)
    with model.intervene(interp.Ablate(["L0H1"], when="generated")):
        edited = labelled(model, prompts, progress=False)
    assert not edited.z[:, 0, 1].any() and plain.z[:, 0, 1].any()


@pytest.mark.parametrize(
    "labels, options, said",
    [
        ([0, 1, 0], {}, "labels: 3 for 4 prompts"),
        ([1, 1, 1, 1], {}, "labels: all are 1; a probe needs two kinds"),
        ([0, 1, 0, 1], {"groups": [0, 0, 1]}, "groups: 3 for 4 prompts"),
        ([0, 1, 0, 1], {"folds": 5}, "folds=5: from 2 to 4, the number of groups"),
        ([0, 1, 0, 1], {"folds": 1}, "folds=1: from 2"),
        ([0, 1, 0, 0], {"folds": 2}, "one kind is in a single fold of 2 only"),
        ([0, 1, 0, 1], {"folds": 2, "penalty": 0.0}, "penalty=0.0: above 0"),
        (None, {"groups": [0, 0, 1, 1]}, "groups: only with labels"),
    ],
)
def test_labels_that_no_probe_can_be_fitted_to(labels, options, said):
    with pytest.raises(ProbeError, match=said):
        interp.probe_heads(tiny("llama"), TEXTS, labels, progress=False, **options)
