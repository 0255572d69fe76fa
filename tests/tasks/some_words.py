"""Tokenizers that know some words: chosen ones, those of mini-llama, and those of SmolLM2."""

import re
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from interp.model.hooked import HookedModel, load
from interp.zoo import SMOLLM2, embedded


def bpe_of(*texts: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that has learnt every word of `texts`, with its space before it; no others."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    made.train_from_iterator([" " + " ".join(words), *words] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


@cache
def smollm2() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2; the test is skipped where it was not fetched."""
    if not SMOLLM2.installed:
        pytest.skip("needs `interp models get smollm2-135m`")
    return AutoTokenizer.from_pretrained(SMOLLM2.folder)


@cache
def mini() -> PreTrainedTokenizerBase:
    """The tokenizer of mini-llama: whole words, <unk> for those it does not have."""
    return AutoTokenizer.from_pretrained(embedded("mini-llama").folder)


@cache
def mini_llama() -> HookedModel:
    """mini-llama itself, shared by all tests."""
    return load("mini-llama")
