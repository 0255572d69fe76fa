"""The benchmark of ACT raises where its two sides differ."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import act as benchmark
from tests.tiny import N_WORDS, tokenizer


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=N_WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def records(folder) -> list[dict]:
    return list(benchmark.measure(folder, (40, 4), (48, 3), repeats=2))


def test_both_sides_write_the_same_and_have_the_same_logits(tiny_llama):
    found = records(tiny_llama)
    assert [record["goal"] for record in found] == ["<= 1.15", "", "<= 1.15", "", ">= 5", ""]
    assert max(record["largest_difference"] for record in found) < 1e-4


def test_a_peer_that_edits_otherwise_is_not_timed(tiny_llama, monkeypatch):
    real = benchmark.Eager.edited
    other = lambda self, pattern: real(replace(self, factor=0.5), pattern)  # noqa: E731
    monkeypatch.setattr(benchmark.Eager, "edited", other)
    with pytest.raises(AssertionError):
        records(tiny_llama)


def test_an_edit_that_does_nothing_is_not_timed(tiny_llama, monkeypatch):
    monkeypatch.setattr(benchmark, "a_tenth", lambda model: [])
    with pytest.raises(AssertionError, match="ACT moved no logit"):
        records(tiny_llama)


def test_a_plain_model_is_as_it_was(tiny_llama):
    peer = benchmark.plain(tiny_llama)
    tokens = benchmark.random_tokens(peer, 40)
    before = benchmark.last_logits(peer, tokens)
    with benchmark.eagerly(peer, benchmark.ACT(["L0H1"]), 40):
        assert (benchmark.last_logits(peer, tokens) - before).abs().max() > 1e-4
    assert torch.equal(benchmark.last_logits(peer, tokens), before)
