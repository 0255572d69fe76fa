"""Multiple choice: the letter follows from the text, positions from the words."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.tasks import corrupted, describe, multiple_choice
from interp.tasks.colored_objects import COLORS, OBJECTS
from interp.tasks.multiple_choice import END, FACT, OTHER_LETTERS, QUESTION
from interp.tasks.prompts import PromptError
from tests.tasks.some_words import bpe_of, mini, mini_llama, smollm2

TOKENIZERS = {"mini-llama": mini, "smollm2": smollm2}


def letter_of(text):
    """The right letter, worked out from the text alone."""
    context, question = text.split(" Question: ")
    facts = dict(re.findall(r"The (\w+) is (\w+)\.", context))
    asked = re.search(r"color is the (\w+)\?", question)[1]
    return {color: letter for letter, color in re.findall(r"(\w)\. (\w+)", question)}[facts[asked]]


def check(tokenizer, row, options, facts):
    text, ids, at = row["text"], row["input_ids"], row["positions"]
    right, wrong = letter_of(text), letter_of(row["corrupted_text"])
    assert row["answer"] == f" {right}" != row["corrupted_answer"] == f" {wrong}"
    assert [tokenizer.decode([token]).strip() for token in row["answers"]] == [right, wrong]
    words = {name: tokenizer.decode(ids[slice(*s)]).strip() for name, s in row["spans"].items()}
    assert at == {name: end - 1 for name, (_, end) in row["spans"].items()} | {"end": len(ids) - 1}
    offered = re.findall(r"(\w)\. (\w+)", text.split("?")[1])
    assert [(words[f"label_{i}"], words[f"option_{i}"]) for i in range(1, options + 1)] == offered
    assert row["choices"] == [f" {letter}" for letter, _ in offered]
    assert words["right_label"] == right and words["corrupted_label"] == wrong
    assert words["right_option"] == words["color"] == dict(offered)[right]
    assert words["corrupted_option"] == dict(offered)[wrong]
    assert words["object"] == words["asked"]
    told = re.findall(r"The (\w+) is (\w+)\.", text)
    assert len(told) == facts and (words["object"], words["color"]) in told
    others = [color for name, color in told if name != words["asked"]]
    assert [words[f"other_color_{i}"] for i in range(1, facts)] == others
    differing = [
        i
        for i, (one, other) in enumerate(zip(ids, row["corrupted_input_ids"], strict=True))
        if one != other
    ]
    places = {at["color"], *(at[f"other_color_{i}"] for i in range(1, facts))}
    assert at["color"] in differing and set(differing) <= places
    return [letter for letter, _ in offered]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(seed=st.integers(0, 99), options=st.integers(2, 4), facts=st.integers(1, 4))
@settings(max_examples=6)
def test_the_letter_is_that_of_the_color_in_the_context(name, seed, options, facts):
    tokenizer = TOKENIZERS[name]()
    for row in multiple_choice(tokenizer, n=6, seed=seed, options=options, facts=facts):
        assert check(tokenizer, row, options, facts) == [*"ABCD"[:options]]


@given(seed=st.integers(0, 99), options=st.integers(2, 4))
@settings(max_examples=6)
def test_letters_may_be_shuffled_or_others(seed, options):
    def letters(labels):
        found = multiple_choice(mini(), n=20, seed=seed, options=options, labels=labels)
        return [check(mini(), row, options, 1) for row in found]

    shuffled, others = letters("shuffled"), letters("random")
    assert all(sorted(drawn) == [*"ABCD"[:options]] for drawn in shuffled)
    assert all(len({*drawn}) == options and {*drawn} <= {*OTHER_LETTERS} for drawn in others)
    assert len(Counter(map(tuple, shuffled))) > 1 and len(Counter(map(tuple, others))) > 1
    assert letters("DBCA")[0] == [*"DBCA"[:options]]


def test_colors_of_other_lengths_are_skipped_and_counted():
    sentence = " ".join([FACT, QUESTION, END, *OBJECTS, "A B C D ."])
    tokenizer = bpe_of(sentence, *COLORS[:6])  # the last two are of several tokens
    alone = multiple_choice(tokenizer, n=40)
    assert describe(alone)["skipped"].keys() == {"different numbers of tokens"}
    several = multiple_choice(tokenizer, n=40, facts=3)
    # where two facts trade colours the prompts are as long, and the words between them shifted
    assert describe(several)["skipped"].keys() == {
        "different numbers of tokens",
        "words at different tokens",
    }
    for row in several:
        check(tokenizer, row, 4, 3)


def test_letters_that_are_no_token():
    with pytest.raises(PromptError, match=r"only 0 of n=2 .*unknown words \(101\).*'1' of"):
        multiple_choice(mini(), n=2, labels="1234")
    with pytest.raises(
        PromptError, match=r"an answer of several tokens .*\['Ġ', '1'\]|'2'|'3'|'4'"
    ):
        multiple_choice(smollm2(), n=2, labels="1234")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"options": 1}, "options=1: from 2 to 4"),
        ({"options": 5}, "options=5: from 2 to 4; there are 4 labels"),
        ({"options": 9, "labels": "ABCDEFGHK"}, "options=9: from 2 to 8"),
        ({"options": 9, "labels": "random"}, "options=9: from 2 to 8"),
        ({"options": 5, "labels": "shuffled"}, "options=5: from 2 to 4"),
        ({"labels": "ABCA"}, "labels='ABCA': each letter may stand there once"),
        ({"facts": 0}, "facts=0: from 1 to 8"),
        ({"facts": 9}, "facts=9: from 1 to 8"),
        ({"n": 0}, "n=0"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(wrong, said):
    with pytest.raises(PromptError, match=said):
        multiple_choice(mini(), **wrong)


def test_seeds_decide():
    one, again, other = (multiple_choice(mini(), n=5, seed=seed) for seed in (0, 0, 1))
    assert describe(one) == describe(again) and one["text"] != other["text"]


@pytest.mark.parametrize("labels", ["ABCD", "shuffled", "random"])
def test_mini_llama_solves_it_on_both_sides(labels):
    pairs = multiple_choice(mini_llama(), labels=labels)
    assert interp.evaluate(mini_llama(), pairs, progress=False).accuracy >= 0.9
    assert interp.evaluate(mini_llama(), corrupted(pairs), progress=False).accuracy >= 0.9
