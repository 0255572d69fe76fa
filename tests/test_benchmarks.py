import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import forward, one_layer, patching, retrieval, sinks, timing
from benchmarks.peers import __main__ as peers
from benchmarks.timing import line, ratio
from tests.tiny import N_WORDS, tokenizer


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=N_WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def zero():
    return torch.zeros(1)


def test_a_ratio_is_the_time_of_the_first_over_that_of_the_second(monkeypatch):
    def other():
        return zero()

    seconds = {zero: iter([2, 4, 6, 8, 10]), other: iter([2, 2, 2, 2, 2])}
    monkeypatch.setattr(timing, "elapsed", lambda call: (next(seconds[call]), 1.0))
    found = ratio(zero, other, repeats=5, case="counted")
    assert [found[name] for name in ("ratio_low", "ratio", "ratio_high")] == [2, 3, 4]
    assert found["cpu"] == 1
    assert found["case"] == "counted"


def test_different_answers_are_never_timed():
    with pytest.raises(AssertionError):
        ratio(zero, lambda: zero() + 1, repeats=2)


def test_the_table_has_a_row_for_records_without_quartiles():
    row = line({"benchmark": "sinks", "case": "memory", "ratio": 4.0, "goal": "linear"})
    assert "4.00x" in row and "linear" in row


# Each benchmark raises where its two sides differ.


def test_forward_has_the_same_logits_on_all_sides(tiny_llama):
    cases = [record["case"] for record in forward.measure(tiny_llama, 12, repeats=2)]
    assert len(cases) == 2


def test_one_layer_has_the_same_pattern_on_both_sides(tiny_llama):
    differences = [
        record["largest_difference"]
        for record in one_layer.measure(tiny_llama, 12, layer=1, repeats=2)
    ]
    assert len(differences) == 3
    assert max(differences) < 1e-5


def test_sinks_are_those_of_eager_patterns(tiny_llama):
    assert len(list(sinks.measure(tiny_llama, 12, repeats=2))) == 1


def test_the_check_of_the_sinks_sees_a_difference(tiny_llama, monkeypatch):
    by_hand = sinks.received_by_hand
    monkeypatch.setattr(sinks, "received_by_hand", lambda *args: by_hand(*args) + 1e-3)
    with pytest.raises(AssertionError):
        list(sinks.measure(tiny_llama, 12, repeats=2))


@pytest.mark.skipif(not sinks.STATUS.exists(), reason="needs /proc")
def test_memory_is_measured_in_a_process_of_its_own(tiny_llama):
    assert sinks.peak(tiny_llama, "sinks", 48) >= 0


def test_retrieval_scores_are_those_of_the_published_procedure(mini_llama):
    records = list(retrieval.measure(mini_llama, n=4, length=96, max_new_tokens=6, repeats=2))
    exact = [record for record in records if "published / forced" not in record["case"]]
    assert max(record["largest_difference"] for record in exact) < 1e-6


def test_patching_gives_the_same_numbers_on_both_sides(tiny_llama):
    records = list(patching.measure(tiny_llama, repeats=2))
    assert len(records) == 4
    assert {record["peer"] for record in records} <= {"hooked model", "eager bridge"}
    assert max(record["largest_difference"] for record in records) < 1e-5


def test_pairs_to_be_patched_differ_where_they_should_and_patches_move_something(tiny_llama):
    model = patching.hooked(tiny_llama)
    for columns in (slice(None), slice(11, 12)):
        pairs = patching.random_pairs(model, 16, columns)
        clean, corrupted = (
            torch.tensor(list(pairs[f"{side}_input_ids"])) for side in ("clean", "corrupted")
        )
        apart = torch.zeros(16, dtype=torch.bool)
        apart[columns] = True
        assert ((clean != corrupted) == apart).all()
        for sweep in patching.SWEEPS.values():
            assert patching.by_replay(model, pairs, sweep).std() > 1e-5


def test_the_check_of_patching_sees_a_difference(tiny_llama, monkeypatch):
    by_replay = patching.by_replay
    monkeypatch.setattr(patching, "by_replay", lambda *args: by_replay(*args) + 0.01)
    with pytest.raises(AssertionError):
        list(patching.measure(tiny_llama, repeats=2))


@pytest.mark.skipif(not sinks.STATUS.exists(), reason="needs /proc")
@pytest.mark.parametrize("side", ["ours", "peer"])
def test_memory_of_patching_is_measured_in_a_process_of_its_own(tiny_llama, side):
    assert patching.peak(tiny_llama, side, 16) >= 0


def test_sides_with_other_answers_than_ours_are_not_compared(tiny_llama, tmp_path):
    peers.prepare(tmp_path, tiny_llama)
    for side in peers.SIDES:
        peers.measure(tmp_path, side)
    table = peers.compare(tmp_path)
    assert table["library"].tolist() == ["interp", "transformer-lens"]
    assert table["ratio"][0] == 1
    assert table["apart"].max() < 1e-5
    results = tmp_path / "results.jsonl"
    other = json.loads(results.read_text().splitlines()[0]) | {"library": "other"}
    other["values"][1][2] += 0.01
    results.write_text(results.read_text() + json.dumps(other) + "\n")
    with pytest.raises(AssertionError, match="other"):
        peers.compare(tmp_path)
