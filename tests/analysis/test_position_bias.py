"""Position bias: segments moved as tokens, scores by place by hand, biases that were planted."""

from itertools import chain, permutations

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import interp
from interp.analysis.position_bias import (
    PositionBias,
    PositionError,
    everywhere,
    ranges_by_chance,
    reordered,
    resampled,
)
from interp.tasks.prompts import spans_of
from tests.intervention.roped import roped
from tests.tasks.some_words import mini_llama
from tests.tiny import random_ids, tokenizer, words

SEGMENTS = [[5, 6], [7], [8, 9, 10], [11, 12]]
PREFIX, SUFFIX = [3, 4], [13, 14]


def rows(n=3, choices=True, relevant=(0, 2, 3)) -> Dataset:
    """Prompts of the same four segments; the answer is one token."""
    found = []
    for number in range(n):
        parts = [[(t + 9 * number) % 50 + 3 for t in segment] for segment in SEGMENTS]
        ids, spans = list(PREFIX), {}
        for i, part in enumerate(parts):
            spans[f"segment_{i + 1}"] = [len(ids), len(ids) + len(part)]
            ids += part
        spans["relevant"] = spans[f"segment_{relevant[number % len(relevant)] + 1}"]
        spans["question"] = [len(ids), len(ids) + 2]
        row = {"text": words(ids + SUFFIX), "input_ids": ids + SUFFIX, "spans": spans}
        row |= {"answer": f" w{20 + number}", "answer_ids": [20 + number]}
        if choices:
            row["choices"] = [f" w{20 + number}", " w40", " w41"]
        found.append(row)
    return Dataset.from_list(found)


def ranges_of(row) -> list[tuple[int, int]]:
    return [tuple(row["spans"][f"segment_{n}"]) for n in (1, 2, 3, 4)]


# Moving


@given(order=st.permutations(range(4)))
def test_segments_take_their_tokens_and_spans_along(order):
    row = rows()[1]
    row["spans"] |= {
        "within": [6, 7], "all": [2, 10], "more": [0, 12], "across": [3, 5], "first": [0, 1],
    }  # fmt: skip
    moved = reordered(tokenizer(), row, ranges_of(row), order)
    tokens = [row["input_ids"][slice(*ranges_of(row)[i])] for i in order]
    assert moved["input_ids"] == [*PREFIX, *chain(*tokens), *SUFFIX]
    assert moved["text"] == words(moved["input_ids"])
    for name, span in moved["spans"].items():
        before = row["input_ids"][slice(*row["spans"][name])]
        after = moved["input_ids"][slice(*span)]
        assert after == before or name in ("all", "more")
    assert moved["spans"]["all"] == [2, 10] and moved["spans"]["more"] == [0, 12]
    assert row["spans"].keys() - moved["spans"].keys() == {"across"}


def test_the_others_keep_their_order():
    moved = everywhere(roped("llama"), rows(), places=[0, 3])
    assert moved["place"] == [0, 3] * 3 and moved["prompt"] == [0, 0, 1, 1, 2, 2]
    for row, spans in zip(moved, spans_of(moved) or [], strict=True):
        names = sorted((n for n in spans if n.startswith("segment")), key=spans.__getitem__)
        needed = (1, 3, 4)[row["prompt"]]
        others = [f"segment_{n}" for n in (1, 2, 3, 4) if n != needed]
        others.insert(row["place"], f"segment_{needed}")
        assert names == others and spans["relevant"] == spans[f"segment_{needed}"]


# Asking


@pytest.mark.parametrize("choices", [True, False])
def test_scores_are_those_of_each_prompt_by_itself(choices):
    model, prompts = roped("llama"), rows(choices=choices)
    found = interp.position_bias(model, prompts, batch_size=5, progress=False)
    moved = everywhere(model, prompts)
    assert len(found.table) == len(moved) == 12
    for row, line in zip(moved, found.table.itertuples(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]]))[0, -1]
        right = row["answer_ids"][0]
        allowed = [right, 40, 41] if choices else list(range(60))
        said = max(allowed, key=lambda token: float(logits[token]))
        assert (line.prompt, line.place) == (row["prompt"], row["place"])
        assert line.probability == pytest.approx(float(logits.softmax(-1)[right]), abs=1e-6)
        assert line.accuracy == (int(logits.argmax()) == right) and line.said == f"w{said}"
        assert not choices or line.choice == (said == right)
    assert found.metrics == ["accuracy", "probability", *["choice"] * choices]


def test_answers_of_several_tokens():
    model = roped("llama")
    prompts = rows(choices=False).to_list()
    for row, answer in zip(prompts, random_ids(2, 3, 1, seed=3)):
        row |= {"answer": " " + words(answer), "answer_ids": answer}
    found = interp.position_bias(model, Dataset.from_list(prompts), places=[1, 2], progress=False)
    for line, row in zip(found.table.itertuples(), everywhere(model, Dataset.from_list(prompts),
                                                              places=[1, 2])):  # fmt: skip
        whole, n = row["input_ids"] + row["answer_ids"], len(row["answer_ids"])
        with torch.no_grad():
            told = model(torch.tensor([whole]))[0, -n - 1 : -1].softmax(-1)
        own = told[range(n), row["answer_ids"]]
        assert line.probability == pytest.approx(float(own.prod()), rel=1e-4)


def test_under_pine_no_place_matters():
    model = roped("qwen3")
    plain = interp.position_bias(model, rows(), progress=False)
    with model.intervene(interp.PINE()):
        pine = interp.position_bias(model, rows(), progress=False)
    assert np.ptp(plain.values("probability"), axis=1).min() > 1e-4
    assert np.ptp(pine.values("probability"), axis=1).max() < 1e-6
    assert pine.summary().set_index("quantity")["value"]["flips"] == 0
    assert "PINE" in str(pine.metadata["interventions"])


def test_a_prompt_that_is_read_twice_is_asked_too():
    model = roped("llama")
    with model.intervene(interp.RE2("question", " w7 w8 ")):
        found = interp.position_bias(model, rows(), places=[0, 3], progress=False)
    row = rows()[0]
    ids = [*row["input_ids"], 7, 8, *SUFFIX]  # segment 1 is first already
    with torch.no_grad():
        told = model(torch.tensor([ids]))[0, -1].softmax(-1)
    assert found.table["probability"][0] == pytest.approx(float(told[20]), rel=1e-4)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    model, prompts = roped("llama"), rows(6)
    expected = interp.position_bias(model, prompts, batch_size=2, progress=False).table
    forward, passes = model.original_model.forward, []

    def dies(*args, **kwargs):
        passes.append(1)
        if len(passes) == 6:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(model.original_model, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            interp.position_bias(model, prompts, batch_size=2, out=tmp_path, progress=False)
    before = len(list(tmp_path.glob("shards/*.parquet")))
    assert before == 1
    found = interp.position_bias(model, prompts, batch_size=2, out=tmp_path, progress=False)
    pd.testing.assert_frame_equal(found.table, expected)
    with pytest.raises(interp.runs.RunError, match="places is"):
        interp.position_bias(model, prompts, places=[0, 1], out=tmp_path, progress=False)


def test_mini_llama_finds_a_code_wherever_it_stands():
    """It has read one code among filler, never a list of them."""
    model = mini_llama()
    prompts = interp.tasks.documents(
        model, n=16, lines=4, wording=interp.tasks.Needle(), heading=""
    )
    plain = interp.position_bias(model, prompts, progress=False)
    with model.intervene(interp.PINE()):
        pine = interp.position_bias(model, prompts, progress=False)
    assert np.ptp(pine.values("probability"), axis=1).max() < 1e-4
    assert np.ptp(plain.values("probability"), axis=1).max() > 1e-3
    assert plain.values("accuracy").mean() > 0.9 and pine.values("accuracy").mean() > 0.9


# What is made of it


def planted(values, said=None, metric="probability") -> PositionBias:
    values = np.asarray(values, dtype=float)
    n, k = values.shape
    table = pd.DataFrame({
        "prompt": np.repeat(range(n), k), "place": np.tile(range(k), n), metric: values.flatten(),
    })  # fmt: skip
    return PositionBias(table.assign(said="a" if said is None else said), {"task": None})


def quantities(found, metric="probability") -> dict[str, dict[str, float]]:
    table = found.summary()
    table = table[table["metric"] == metric].set_index("quantity").drop(columns="metric")
    return {str(name): dict(row) for name, row in table.iterrows()}


def test_without_bias_all_is_0():
    found = quantities(planted(np.full((20, 5), 0.3)))
    assert found["mean"]["value"] == pytest.approx(0.3)
    for name in ("recency", "u_index", "range"):
        assert found[name]["value"] == pytest.approx(0, abs=1e-12)
    assert found["range"]["p_value"] == 1


def test_a_middle_that_is_lost_is_seen():
    found = quantities(planted([[1, 0, 0, 0, 1]] * 10))
    assert found["u_index"]["value"] == 1 and found["range"]["value"] == 1
    assert found["recency"]["value"] == 0 and found["range"]["p_value"] < 0.01


def test_quantities_are_their_definitions():
    values = np.random.default_rng(1).random((30, 4))
    mean, found = values.mean(0), quantities(planted(values))
    assert found["recency"]["value"] == pytest.approx(mean[3] - mean[0])
    assert found["u_index"]["value"] == pytest.approx(
        (mean[0] + mean[3]) / 2 - (mean[1] + mean[2]) / 2
    )
    assert found["range"]["value"] == pytest.approx(mean.max() - mean.min())
    differences = values[:, 3] - values[:, 0]
    error = differences.std(ddof=1) / np.sqrt(30)
    low, high = found["recency"]["low"], found["recency"]["high"]
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(differences.mean(), abs=0.1 * error)


def test_differences_are_within_prompts():
    """Prompts that differ a lot, and places that differ by the same in each of them."""
    levels = np.linspace(0, 0.8, 12)[:, None] + np.array([0, 0.1, 0.2])
    found = quantities(planted(levels))
    assert found["recency"]["low"] == pytest.approx(0.2)
    assert found["recency"]["high"] == pytest.approx(0.2)
    assert found["mean"]["high"] - found["mean"]["low"] > 0.2


def test_a_range_by_chance_is_told():
    """Of noise alone: p-values are even, and the range is what chance gives."""
    rng = np.random.default_rng(2)
    noise = [quantities(planted(rng.random((12, 3))))["range"] for _ in range(40)]
    p_values = np.array([row["p_value"] for row in noise])
    assert 0.3 < p_values.mean() < 0.7 and (p_values < 0.1).mean() < 0.3
    spread, chance = (np.mean([row[name] for row in noise]) for name in ("value", "chance"))
    assert spread == pytest.approx(chance, rel=0.2) and chance > 0.05
    every = [
        np.ptp(np.mean([a, b], axis=0))
        for a in permutations([0.1, 0.5, 0.9])
        for b in permutations([0.2, 0.3, 1.0])
    ]
    drawn = ranges_by_chance(np.array([[0.1, 0.5, 0.9], [0.2, 0.3, 1.0]]))
    assert drawn.mean() == pytest.approx(np.mean(every), rel=0.03)


def test_resampling_draws_whole_prompts():
    values = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    drawn = resampled(values)
    np.testing.assert_allclose(drawn[:, 1], 10 * drawn[:, 0])
    assert drawn[:, 0].mean() == pytest.approx(2, abs=0.05)
    assert set(np.round(3 * drawn[:, 0])) == set(range(3, 10))


def test_flips_are_of_what_was_said():
    same, other = ["a", "a"], ["a", "b"]
    found = planted(np.ones((4, 2)), said=[*same, *other, *same, *same]).summary()
    flips = found[found["quantity"] == "flips"].iloc[0]
    assert flips["value"] == 0.25 and flips["n"] == 4 and flips["low"] < 0.25 < flips["high"]


def test_shares_have_intervals_where_all_are_right():
    found = planted(np.ones((20, 2)), metric="accuracy").by_place()
    assert found["value"].tolist() == [1, 1] and (found["low"] > 0.8).all()
    assert (found["low"] < 0.9).all()


def test_changes_are_in_pairs():
    before = planted(np.random.default_rng(3).random((8, 3)))
    after = planted(before.values("probability") + np.array([0.1, 0.0, -0.2]))
    changes = after.changes(before)
    assert changes["value"].tolist() == pytest.approx([0.1, 0, -0.2])
    assert changes["low"].tolist() == pytest.approx([0.1, 0, -0.2])
    with pytest.raises(PositionError, match="other prompts or other places"):
        after.changes(planted(np.ones((8, 2))))


def test_it_is_said_and_drawn():
    found = planted([[1, 0, 0.5], [1, 0, 0.5]])
    assert "probability 0.500, range 1.000; flips 0.000; 2 prompts, 3 places" in repr(found)
    line = found.plot("probability").data[-1]
    assert list(line.x) == [0, 1, 2] and list(line.y) == pytest.approx([1, 0, 0.5])


# What is refused


def without_spans(*names):
    changed = rows().to_list()
    for row in changed:
        row["spans"] = {name: s for name, s in row["spans"].items() if name not in names}
    return Dataset.from_list(changed)


@pytest.mark.parametrize(
    "prompts, options, match",
    [
        (rows().remove_columns(["answer", "answer_ids"]), {}, "no answer"),
        (rows(), {"relevant": "needle"}, "relevant='needle': prompt 0 has no such span"),
        (rows(), {"relevant": "question"}, "in prompt 0 it is in no single segment"),
        (rows(), {"segments": "document_*"}, "prompt 0 of the batch has none"),
        (without_spans("segment_2"), {}, r"tokens \[4, 5\).*in none"),
        (rows(), {"places": [0, 4]}, r"places=\[0, 4\]: two or more of 0 to 3"),
        (rows(), {"places": [2]}, r"places=\[2\]: two or more"),
    ],
)
def test_what_cannot_be_moved(prompts, options, match):
    with pytest.raises(PositionError, match=match):
        interp.position_bias(roped("llama"), prompts, progress=False, **options)


def test_other_numbers_of_segments_are_refused():
    changed = rows().to_list()
    changed[1]["spans"].pop("segment_4")
    changed[1]["spans"]["relevant"] = changed[1]["spans"]["segment_1"]
    with pytest.raises(PositionError, match=r"\[3, 4\] segments"):
        interp.position_bias(roped("llama"), Dataset.from_list(changed), progress=False)
