"""The benchmark of offsets raises where its two sides differ."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import offsets
from interp.intervention.lofit import LoFiT
from tests.tiny import N_WORDS, tokenizer


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=N_WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_offsets_leave_what_is_written_as_it_is_at_strength_0(tiny_llama):
    records = list(offsets.measure(tiny_llama, 12, 4, repeats=2))
    assert len(records) == 3
    assert max(record["largest_difference"] for record in records) < 1e-5


def test_a_push_that_does_nothing_is_not_timed(tiny_llama, monkeypatch):
    real = offsets.pushes
    monkeypatch.setattr(offsets, "pushes", lambda model: replace(real(model), strength=0.0))
    with pytest.raises(AssertionError, match="the push moved no logit"):
        list(offsets.measure(tiny_llama, 12, 4, repeats=2))


def test_a_fold_of_something_else_is_not_timed(tiny_llama, monkeypatch):
    real = LoFiT.fold
    monkeypatch.setattr(LoFiT, "fold", lambda self, model: real(replace(self, strength=0.5), model))
    with pytest.raises(AssertionError):
        list(offsets.measure(tiny_llama, 12, 4, repeats=2))
