"""What lines up: fields filled and found again, misfits named and counted."""

from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.tasks.aligned import (
    UnfitPair,
    answer_after,
    fill,
    from_paired_examples,
    line_up,
    text_side,
    unknown_tokens,
)
from interp.tasks.prompts import PromptError, SpanError, describe
from tests.tasks.conftest import tokenizer_named
from tests.tasks.some_words import bpe_of
from tests.tiny import tokenizer as tiny_tokenizer

WORD = st.text(st.characters(codec="ascii", exclude_characters="{}!:[]."), min_size=1, max_size=5)


@given(before=WORD, first=WORD, between=WORD, second=WORD)
def test_a_template_is_filled_as_format_does_and_knows_where(before, first, between, second):
    template = before + "{one}" + between + "{two}"
    text, places = fill(template, {"one": first, "two": second, "unused": "x"})
    assert text == template.format(one=first, two=second)
    assert {name: text[slice(*place)] for name, place in places.items()} == {
        "one": first,
        "two": second,
    }


def example(clean="w5 w6 w7", corrupted="w5 w8 w7", answer=" w9", wrong=" w10", **more):
    """A pair for the tokenizer of words, whose second word changes."""
    return {
        "text": clean,
        "corrupted_text": corrupted,
        "answer": answer,
        "wrong": wrong,
        "corrupted_answer": wrong,
        "choices": [answer, wrong],
        "char_spans": {"word": [3, 5]},
        "corrupted_char_spans": {"word": [3, 5]},
    } | more


def test_an_example_becomes_a_row():
    row = from_paired_examples(
        tiny_tokenizer(), [example(followed=["word"], kind="odd")], 1, task="t", parameters={}
    )[0]
    assert row == {
        "text": "w5 w6 w7",
        "input_ids": [5, 6, 7],
        "answer": " w9",
        "answer_ids": [9],
        "spans": {"word": [1, 2]},
        "choices": [" w9", " w10"],
        "clean_text": "w5 w6 w7",
        "clean_input_ids": [5, 6, 7],
        "corrupted_text": "w5 w8 w7",
        "corrupted_input_ids": [5, 8, 7],
        "corrupted_answer": " w10",
        "corrupted_answer_ids": [10],
        "answers": [9, 10],
        "positions": {"word": 1, "word+1": 2, "end": 2},
        "kind": "odd",
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"corrupted_text": "w5 w8 w7 w7"}, "different numbers of tokens"),
        ({"text": "w5 zebra w7"}, "unknown words"),
        ({"corrupted_text": "w5 zebra w7"}, "unknown words"),
        ({"answer": " zebra"}, "unknown words"),
        ({"answer": " w9 w10"}, "an answer of several tokens"),
        ({"wrong": " w9 w10"}, "an answer of several tokens"),
        ({"corrupted_answer": " w9 w10"}, "an answer of several tokens"),
        ({"answer": " "}, "an answer that merges with its prompt"),
        ({"wrong": " w9"}, "right and wrong alike"),
        ({"corrupted_char_spans": {"word": [6, 8]}}, "words at different tokens"),
    ],
)
def test_what_does_not_line_up_is_skipped_and_counted(change, reason):
    draw = [example(), example(**change), example(**change), example()]
    found = from_paired_examples(tiny_tokenizer(), draw, 2, task="t", parameters={"a": 1})
    about = describe(found)
    assert len(found) == 2 and about["skipped"] == {reason: 2}
    assert about["task"] == "t" and about["parameters"] == {"a": 1}
    assert about["tokens"]["vocabulary"] == 60
    with pytest.raises(PromptError, match=rf"only 2 of n=3 .*{reason} \(2\).* Give n=2 or less"):
        from_paired_examples(tiny_tokenizer(), draw, 3, task="t", parameters={})


def test_draws_without_end_that_fail_are_given_up():
    draw = repeat(example(text="w5 zebra w7"))
    with pytest.raises(PromptError, match=r"only 0 of n=2 .*unknown words \(101\).*'zebra' of"):
        from_paired_examples(tiny_tokenizer(), draw, 2, task="t", parameters={})


def test_a_mistake_in_an_example_is_not_skipped():
    with pytest.raises(SpanError, match="not in the text"):
        from_paired_examples(
            tiny_tokenizer(), [example(char_spans={"word": [3, 99]})], 1, task="t", parameters={}
        )


def test_none_wanted_is_an_error():
    with pytest.raises(PromptError, match="n=0: .* at least 1"):
        from_paired_examples(tiny_tokenizer(), [example()], 0, task="t", parameters={})


@given(st.lists(st.integers(5, 59), min_size=1), st.lists(st.integers(5, 59), min_size=1))
def test_prompts_line_up_where_their_lengths_are_equal(a, b):
    tokenizer = tiny_tokenizer()
    clean, other = (text_side(tokenizer, " ".join(f"w{i}" for i in ids)) for ids in (a, b))
    if len(a) == len(b):
        line_up(tokenizer, clean, other)
        return
    with pytest.raises(UnfitPair) as caught:
        line_up(tokenizer, clean, other)
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(map(len, (a, b)))
    )
    said = str(caught.value)
    assert f"{len(a)} clean and {len(b)} corrupted tokens: from token {same} on" in said


def test_where_they_part_is_shown_in_tokens():
    tokenizer = bpe_of("the cup is red")

    def error(clean, corrupted):
        with pytest.raises(UnfitPair) as caught:
            line_up(tokenizer, *(text_side(tokenizer, text) for text in (clean, corrupted)))
        return str(caught.value)

    said = error("the cup is red", "the cups is red")
    assert "token 2 on the clean prompt has nothing where the corrupted one has ['s']" in said
    said = error("the cup is red", "the jug is red")
    assert "token 1 on the clean prompt has ['Ġcup'] where the corrupted one has ['Ġ', 'j'" in said


def test_special_tokens_at_the_end_are_left_out_even_without_an_answer():
    tokenizer = tokenizer_named("wordpiece")  # [CLS] ... [SEP]
    side = text_side(tokenizer, "the old farmer")
    assert side.ids == tokenizer("the old farmer").input_ids[:-1] and side.own[0] == 1


def test_the_answers_token_is_that_of_the_whole_text(tokenizer):
    """On every kind of tokenizer: one token that makes the prompt the longer text, or an error."""
    prompt, seen = text_side(tokenizer, "The old farmer walked to the"), 0
    for answer in (" river", " a", "s", " market.", "zq"):
        whole = text_side(tokenizer, prompt.text + answer).ids
        try:
            found = answer_after(tokenizer, prompt, answer)
        except UnfitPair as error:
            fits = whole[:-1] == prompt.ids and whole[-1] not in unknown_tokens(tokenizer)
            assert not fits, error
        else:
            seen += 1
            assert [*prompt.ids, found.token] == whole
    assert seen or tokenizer.is_fast is False


def test_unknown_tokens_are_found_where_transformers_is_not_told():
    assert tiny_tokenizer().unk_token_id is None
    assert unknown_tokens(tiny_tokenizer()) == {tiny_tokenizer()("zebra").input_ids[0]}
    assert unknown_tokens(bpe_of("a b")) == set()
    wordpiece = tokenizer_named("wordpiece")
    assert unknown_tokens(wordpiece) == {wordpiece.unk_token_id}
