"""Documents: the answer follows from the text alone, and lines are segments."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.tasks import Needle, PromptError, describe, documents
from interp.tasks.documents import HEADING, THINGS
from interp.tasks.ioi import PLACES
from interp.tasks.needle import OWNERS
from interp.tasks.prompts import spans_of
from tests.tasks.some_words import bpe_of, mini, smollm2

SENTENCE = f"{HEADING} went to the and found a there . Question : What did find ? Answer : a"


def known():
    return bpe_of(SENTENCE, " ".join([*OWNERS, *THINGS, *PLACES]))


TOKENIZERS = {"words": known, "smollm2": smollm2}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(seed=st.integers(0, 99), lines=st.integers(2, 14))
@settings(max_examples=6)
def test_the_answer_is_on_the_line_that_is_asked_for(name, seed, lines):
    tokenizer = TOKENIZERS[name]()
    prompts = documents(tokenizer, n=4, seed=seed, lines=lines)
    for row, spans in zip(prompts, spans_of(prompts) or [], strict=True):
        found = dict(re.findall(r"\n(\w+) went to the \w+ and found a (\w+) there\.", row["text"]))
        asked = re.search(r"What did (\w+) find\?", row["text"])
        assert asked and len(found) == len(set(found.values())) == lines
        assert row["answer"] == f" {found[asked[1]]}"
        assert row["choices"] == [f" {thing}" for thing in found.values()]
        told = {n: tokenizer.decode(row["input_ids"][slice(*s)]) for n, s in spans.items()}
        assert told["answer"] == row["answer"]
        assert told["question"] == f"Question: What did {asked[1]} find?"
        assert told["relevant"] == told[f"segment_{row['place'] + 1}"]
        segments = [told[f"segment_{i + 1}"] for i in range(lines)]
        assert all(re.fullmatch(r"\n.* there\.", segment) for segment in segments)
        places = [spans[f"segment_{i + 1}"] for i in range(lines)]
        assert all(one[1] == other[0] for one, other in pairwise(places))
        assert row["text"].startswith(HEADING + "\n")


def test_lines_are_the_same_tokens_wherever_they_stand():
    """So that moved segments are what a text in that order would give."""
    tokenizer = smollm2()
    for row, spans in zip(*[iter(x) for x in pair_of(tokenizer)]):
        ids = row["input_ids"]
        first, last = spans["segment_1"], spans["segment_3"]
        swapped = ids[: first[0]] + ids[slice(*last)] + ids[first[1] : last[0]]
        swapped += ids[slice(*first)] + ids[last[1] :]
        lines = row["text"].split("\n")
        lines[1], lines[3] = lines[3], lines[1]
        assert tokenizer("\n".join(lines)).input_ids == swapped


def pair_of(tokenizer):
    prompts = documents(tokenizer, n=8, lines=3)
    return prompts, spans_of(prompts)


def test_answers_are_one_token_of_smollm2_and_begin_with_no_vowel():
    for thing in THINGS:
        assert len(smollm2()(f" {thing}").input_ids) == 1 and thing[0] not in "aeiou"


def test_other_words_and_no_heading():
    prompts = documents(mini(), n=3, lines=4, wording=Needle(), heading="")
    for row in prompts:
        codes = dict(re.findall(r"The secret code of (\w+) is (\w+)\.", row["text"]))
        owner = row["text"].split()[-2]
        assert row["answer"] == f" {codes[owner]}" and len(codes) == 4
        begins = row["spans"]["segment_1"][0]
        assert mini().decode(row["input_ids"][begins]) == "The" and begins == len(
            mini()("").input_ids
        )


def test_seeds_decide():
    one, again, other = (documents(known(), n=5, seed=seed) for seed in (0, 0, 1))
    assert describe(one) == describe(again) and one["text"] != other["text"]
    assert len(set(documents(known(), n=60, lines=3)["place"])) == 3


@pytest.mark.parametrize(
    "wrong, said",
    [({"lines": 1}, "lines=1: from 2 to 14"), ({"lines": 15}, "14 owners and 20 answers"),
     ({"n": 0}, "n=0")],
)  # fmt: skip
def test_what_cannot_be_asked_for(wrong, said):
    with pytest.raises(PromptError, match=said):
        documents(known(), **wrong)
