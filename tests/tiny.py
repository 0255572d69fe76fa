"""Tiny random models that can be read and written to: a tokenizer of 60 words, and prompts of them.

Word `wN` is token N (from 3 on), so a text can be made from any token ids and back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from jaxtyping import config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interp.model.hooked import HookedModel, load
from tests.model.families import build

N_WORDS = 60
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


FOLDER = TemporaryDirectory(prefix="tiny-tokenizer-")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """In a folder: the bridge reads a tokenizer a second time, from where it came."""
    vocabulary = SPECIAL | {f"w{i}": i for i in range(len(SPECIAL), N_WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(FOLDER.name)
    return PreTrainedTokenizerFast.from_pretrained(FOLDER.name)


def fresh(family: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    """A model of a family that a test may spoil."""
    return load(build(family, dtype=dtype), tokenizer=deepcopy(tokenizer()))


@cache
def tiny(family: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    """A model of a family, shared by all tests: leave it as it is."""
    return fresh(family, dtype)


@cache
def eager(family: str):
    """The same weights as `tiny(family)` in plain transformers, with its own eager attention."""
    return build(family)


@contextmanager
def unchecked() -> Iterator[None]:
    """What users meet: no type check stands before our own errors."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    """One list of tokens for each length; no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, N_WORDS, (n,), generator=generator).tolist() for n in lengths]


def with_answers(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    **columns,
) -> Dataset:
    """Prompts from tokens, their answers, and where the span `answer` lies."""
    rows = {
        "text": [words(ids) for ids in prompts],
        "input_ids": [list(ids) for ids in prompts],
        "answer": [" " + words(ids) for ids in answers],
        "answer_ids": [list(ids) for ids in answers],
        "spans": [{"answer": list(span)} for span in spans],
    }
    return Dataset.from_dict(rows | columns)


def one_by_one(model, ids: Sequence[int], **options):
    """Plain transformers on one prompt without padding."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), **options)
