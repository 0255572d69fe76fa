"""Circuits: keeping heads is what a run by hand says; what is found is needed, others are not."""

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp.analysis.circuits.find import Circuit, CircuitError, random_circuits
from interp.analysis.circuits.importance import METHODS, by_greedy, by_strength
from interp.analysis.circuits.keeping import circuit_faithfulness, kept_values, mask_of, share
from interp.analysis.circuits.overlap import weighted_overlap
from interp.analysis.paired import PairError
from interp.heads import Head, HeadError, HeadScores, overlap_null
from tests.analysis.test_patching import pairs_of
from tests.tiny import tiny, unchecked

FAMILIES = ["gpt2", "llama", "gpt_neox", "gemma2"]


def kept_by_hand(model, row: dict, heads: list[Head]) -> float:
    """The logit difference of one clean prompt with every other head's z from the corrupted one."""
    clean, corrupted = (torch.tensor([row[f"{s}_input_ids"]]) for s in ("clean", "corrupted"))
    _, cache = model.run_with_cache(corrupted)

    def ablate(z, hook):
        z = z.clone()
        layer = int(hook.name.split(".")[1])
        for head in range(z.shape[2]):
            if Head(layer, head) not in heads:
                z[:, :, head] = cache[f"blocks.{layer}.attn.hook_z"][:, :, head]
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", ablate) for layer in (0, 1)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(clean)[0, -1]
    right, wrong = row["answers"]
    return float(logits[right] - logits[wrong])


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_heads_is_ablating_all_others(family):
    model, pairs = tiny(family), pairs_of(8, 6, 7, shared=2)
    sets = [[], [Head(0, 1)], [Head(0, 2), Head(1, 3)], [Head(1, h) for h in range(4)]]
    sets.append([Head(layer, head) for layer in range(2) for head in range(4)])
    masks = torch.stack([mask_of(model, heads) for heads in sets])
    for size in (None, 4):
        found = kept_values(model, pairs, masks, batch_size=size, progress=False)
        expected = [[kept_by_hand(model, row, heads) for heads in sets] for row in pairs]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_faithfulness_is_one_for_all_heads_and_none_for_none():
    model, pairs = tiny("llama"), turned(pairs_of(8, 8, 8))
    every = [Head(layer, head) for layer in range(2) for head in range(4)]
    table = circuit_faithfulness(
        model, pairs, {"all": every, "none": [], "some": "L0H1, L1H2"}, progress=False
    ).set_index("circuit")
    for name, kept in (("all", 1), ("none", 0)):
        assert table.loc[name, "faithfulness"] == pytest.approx(kept)
        assert table.loc[name, "complement"] == pytest.approx(1 - kept)
    some = [Head(0, 1), Head(1, 2)]
    whole, nothing, kept = (
        np.mean([kept_by_hand(model, row, heads) for row in pairs]) for heads in (every, [], some)
    )
    expected = (kept - nothing) / (whole - nothing)
    assert table.loc["some", "faithfulness"] == pytest.approx(expected, abs=1e-3)
    assert table["size"].tolist() == [8, 0, 2] and (table["n"] == 3).all()


def turned(pairs):
    """The answers of each pair in the order in which the model has a gap to explain."""
    model = tiny("llama")
    every = [Head(layer, head) for layer in range(2) for head in range(4)]
    answers = [
        row["answers"]
        if kept_by_hand(model, row, every) > kept_by_hand(model, row, [])
        else row["answers"][::-1]
        for row in pairs
    ]
    return pairs.remove_columns("answers").add_column("answers", answers)


def test_a_share_is_a_ratio_of_means_with_its_interval():
    values = np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0]])
    whole, nothing = np.array([4.0, 4.0, 4.0]), np.array([0.0, 2.0, 1.0])
    mean, low, high = share(values, whole, nothing)
    np.testing.assert_allclose(mean, [(1 - 1) / 3, (3 - 1) / 3])
    assert (low <= mean).all() and (mean <= high).all()
    assert np.isnan(share(values, nothing, whole)[0]).all()  # no task to have a share of


@pytest.fixture(scope="module")
def model(mini_llama):
    return interp.load(mini_llama)


@pytest.fixture(scope="module")
def ioi(model) -> Circuit:
    return interp.find_circuit(model, interp.tasks.ioi(model, n=24, seed=0), progress=False)


def test_a_circuit_is_small_faithful_and_complete(ioi):
    assert len(ioi.members) <= 12  # of 32
    assert ioi.faithfulness > 0.75 and ioi.interval[0] > 0.6
    assert ioi.complement < 0.1
    random = ioi.tested["faithfulness"].iloc[1:]
    assert len(random) == 10 and random.mean() < ioi.faithfulness - 0.2
    assert (ioi.minimality["cost"] > 0).all()  # every member is needed
    assert 0.4 < ioi.area["log"] < ioi.area["linear"] < 1


def test_what_is_said_of_it_was_measured_on_other_pairs(model, ioi):
    pairs = interp.tasks.ioi(model, n=24, seed=0)
    odd = pairs.select(range(1, 24, 2))
    again = circuit_faithfulness(model, odd, {"it": ioi.members}, progress=False)
    assert again["faithfulness"].iloc[0] == pytest.approx(ioi.faithfulness, abs=1e-6)
    assert ioi.metadata["pairs"] == {"searched": 12, "tested": 12}
    assert ioi.heads.samples.shape[0] == 12


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_circuit_that_random_heads_are_not(model, method):
    pairs = interp.tasks.ioi(model, n=32, seed=3)
    found = interp.find_circuit(model, pairs, method, progress=False)
    random = found.tested["faithfulness"].iloc[1:]
    assert found.faithfulness > 0.75 and found.faithfulness > random.mean() + 0.2
    assert found.metadata["method"] == method


def test_greedy_search_takes_heads_out_one_after_the_other():
    """Against the definition: each head's cost given what was taken out before it."""
    model, pairs = tiny("llama"), turned(pairs_of(8, 8, 8))
    found = by_greedy(model, pairs, "logit_diff", False, threshold=0.2)
    heads = [Head(layer, head) for layer in range(2) for head in range(4)]
    kept = list(heads)

    def mean(some):
        return np.mean([kept_by_hand(model, row, some) for row in pairs])

    corrupted = np.mean(
        [
            float(logits[0, -1, row["answers"][0]] - logits[0, -1, row["answers"][1]])
            for row in pairs
            for logits in [model(torch.tensor([row["corrupted_input_ids"]])).detach()]
        ]
    )
    gap, current = mean(heads) - corrupted, mean(heads)
    for head in [h for layer in (1, 0) for h in heads if h.layer == layer]:
        without = mean([h for h in kept if h != head])
        cost = (current - without) / gap
        assert found[head]["score"] == pytest.approx(cost, abs=1e-4)
        if abs(cost) < 0.2:
            kept.remove(head)
            current = without


def test_a_fixed_size_and_a_scorer_of_ones_own(model):
    def backwards(model, pairs, metric, progress):
        matrix = np.arange(32.0).reshape(1, 4, 8)
        return HeadScores.from_samples(matrix, analysis="backwards")

    pairs = interp.tasks.ioi(model, n=8, seed=0)
    found = interp.find_circuit(model, pairs, backwards, size=3, draws=2, progress=False)
    assert found.members == (Head(3, 7), Head(3, 6), Head(3, 5))
    assert found.metadata["method"] == "backwards" and len(found.tested) == 3


def test_heads_that_work_against_the_answer_rank_by_their_strength():
    scores = HeadScores(pd.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0],
                                      "score": [0.2, -0.9, 0.5]}))  # fmt: skip
    assert by_strength(scores) == [Head(0, 1), Head(1, 0), Head(0, 0)]


def test_random_circuits_have_as_many_heads_in_each_layer(model):
    members = (Head(0, 1), Head(0, 2), Head(3, 7))
    draws = random_circuits(model, members, 5, seed=0)
    assert len(draws) == 5 == len(set(draws))
    assert all([h.layer for h in draw] == [0, 0, 3] for draw in draws)
    assert draws == random_circuits(model, members, 5, seed=0)


def test_a_circuit_is_saved_and_loaded(ioi, tmp_path):
    again = Circuit.load(ioi.save(tmp_path / "ioi"))
    assert again.members == ioi.members and again.metadata == ioi.metadata
    for name in ("curve", "tested", "minimality"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(ioi, name))
    pd.testing.assert_frame_equal(again.heads.table, ioi.heads.table)
    assert repr(again) == repr(ioi) and f"{len(ioi.members)} of 32 heads" in repr(ioi)
    with pytest.raises(CircuitError, match="holds no circuit"):
        Circuit.load(tmp_path)


def test_mistakes_are_told(model):
    pairs = interp.tasks.ioi(model, n=8, seed=0)
    with pytest.raises(CircuitError, match="pairs: 2; four or more"):
        interp.find_circuit(model, pairs.select([0, 1]))
    with pytest.raises(CircuitError, match="method='magic': one of patching"):
        interp.find_circuit(model, pairs, "magic")
    with pytest.raises(CircuitError, match="size=99: from 1 to 32"):
        interp.find_circuit(model, pairs, size=99, progress=False)
    with pytest.raises(CircuitError, match="target=5.0: no circuit reaches it"):
        interp.find_circuit(model, pairs, target=5.0, progress=False)
    with pytest.raises(HeadError, match="L9H0"), unchecked():
        circuit_faithfulness(model, pairs, {"it": ["L9H0"]}, progress=False)
    turned = pairs.remove_columns("answers").add_column(
        "answers", [row["answers"][::-1] for row in pairs]
    )
    with pytest.raises(PairError, match="no gap that a circuit could explain"):
        interp.find_circuit(model, turned, progress=False)


# Overlap


def test_overlap_with_itself_is_whole(ioi):
    found = interp.circuit_overlap(ioi, ioi)
    row = found.table.iloc[0]
    assert found.jaccard == 1 and set(found.shared) == set(ioi.members)
    assert row["of_one"] == row["of_other"] == row["weighted"] == 1
    assert row["correlation"] == pytest.approx(1)
    assert found.p_value < 0.01 < row["expected"]


def test_other_tasks_stand_beside(model, ioi):
    pairs = interp.tasks.colored_objects(model, n=16, seed=0)
    colored = interp.find_circuit(model, pairs, progress=False)
    found = interp.circuit_overlap(ioi, colored, beside={"again": ioi})
    assert found.table[["one", "other"]].values.tolist() == [
        ["ioi", "colored_objects"], ["ioi", "again"], ["colored_objects", "again"],
    ]  # fmt: skip
    shared = set(ioi.members) & set(colored.members)
    assert set(found.shared) == shared
    assert found.jaccard == len(shared) / len({*ioi.members, *colored.members})
    assert found.table["jaccard"][1] == 1
    assert len(found.plot().data) == 2


@pytest.mark.parametrize("match", [None, "layer"])
def test_the_null_is_that_of_draws(match):
    """The exact law against heads drawn ten thousand times."""
    pool = [Head(layer, head) for layer in range(4) for head in range(6)]
    ours = [Head(0, 0), Head(0, 1), Head(1, 3), Head(3, 3), Head(3, 5)]
    theirs = [Head(0, 0), Head(0, 2), Head(0, 4), Head(3, 1)]
    null = overlap_null(pool, ours, theirs, match)
    generator = np.random.default_rng(0)
    counts = np.zeros(len(null))
    for _ in range(10_000):
        if match is None:
            drawn = {pool[i] for i in generator.choice(24, 4, replace=False)}
        else:
            drawn = {Head(0, int(h)) for h in generator.choice(6, 3, replace=False)}
            drawn |= {Head(3, int(generator.integers(6)))}
        counts[len(drawn & set(ours))] += 1
    np.testing.assert_allclose(counts / 10_000, null, atol=0.02)
    assert null.sum() == pytest.approx(1)


def test_weighted_overlap_by_definition():
    one, other = (
        HeadScores.from_samples(np.array([[values]])) for values in ([0.5, -1.0], [1.0, 0.25])
    )
    assert weighted_overlap(one, other) == pytest.approx((0.5 + 0.25) / (1.0 + 1.0))


def test_circuits_of_two_models_do_not_overlap(ioi):
    metadata = {**ioi.metadata, "model": "another"}
    other = Circuit(ioi.members, ioi.heads, ioi.curve, ioi.tested, ioi.minimality, metadata)
    with pytest.raises(CircuitError, match="of another, and the first is of"):
        interp.circuit_overlap(ioi, other)
    none = Circuit((), ioi.heads, ioi.curve, ioi.tested, ioi.minimality, ioi.metadata)
    with pytest.raises(CircuitError, match="no heads"):
        interp.circuit_overlap(ioi, none)
