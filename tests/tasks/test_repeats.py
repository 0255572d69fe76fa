"""Repeated random tokens: the copies are equal, ordinary tokens, and the answer is the last one."""

from types import SimpleNamespace

import pytest

from interp.tasks.prompts import PromptError
from interp.tasks.repeats import repeats


@pytest.mark.parametrize("copies", [2, 3])
def test_the_copies_are_equal_and_the_answer_ends_the_last(tokenizer, copies):
    for row in repeats(tokenizer, n=3, length=20, repeats=copies):
        ids, names = row["input_ids"] + row["answer_ids"], ("first", "second", "third")[:copies]
        spans = [row["spans"][name] for name in names]
        assert [end - start for start, end in spans] == [20] * (copies - 1) + [19]
        first = ids[slice(*spans[0])]
        assert all(ids[start : start + 20] == first for start, _ in spans)
        assert len(ids) == spans[0][0] + 20 * copies
        assert len(set(first)) == 20
        assert not set(first) & set(tokenizer.all_special_ids)


def test_what_precedes_is_what_the_tokenizer_puts_there(tokenizer):
    row = repeats(tokenizer, n=1, length=5)[0]
    start = row["spans"]["first"][0]
    assert row["input_ids"][:start] == tokenizer("a").input_ids[:start]


def test_a_seed_gives_the_same_tokens_and_another_seed_others(byte_tokenizer):
    one, again, other = (repeats(byte_tokenizer, n=3, seed=seed) for seed in (0, 0, 1))
    assert one.to_list() == again.to_list() != other.to_list()


def test_a_block_longer_than_the_vocabulary_draws_tokens_again(byte_tokenizer):
    row = repeats(byte_tokenizer, n=1, length=2 * len(byte_tokenizer))[0]
    assert len(row["input_ids"]) == 4 * len(byte_tokenizer) - 1


@pytest.mark.parametrize("wrong", [{"n": 0}, {"length": 1}, {"repeats": 1}, {"repeats": 6}])
def test_what_cannot_be_repeated(byte_tokenizer, wrong):
    with pytest.raises(PromptError, match="give"):
        repeats(byte_tokenizer, **wrong)


def test_too_long_for_the_window(byte_tokenizer):
    model = SimpleNamespace(tokenizer=byte_tokenizer, cfg=SimpleNamespace(n_ctx=64))
    with pytest.raises(PromptError, match=r"prompt 0: 80 tokens .* window has 64"):
        repeats(model, n=1, length=40)
